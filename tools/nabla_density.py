"""How far NABLA may go: what a tiny checkpoint still gets right against the share of blocks that attention keeps.

    python tools/nabla_density.py --P 1 0.9 0.8 0.6 0.4 0.2 0.05 --num 100
    python tools/nabla_density.py --plot_only

For every P the held-out captions of tools/eval_tiny.py are generated with the same seeds and scored; the density is
counted in every layer, head, step and branch, the window included. Writes benchmarks/nabla_density.json after each P
(those that are in it already are not run again), and draws benchmarks/nabla_density.png from it; prints the table.
Knows the pipeline by its public call, and its block-sparse kernel as the place where every map passes by.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs without the project being installed

from tools.eval_tiny import evaluate, pipeline_caller

REPOSITORY = Path(__file__).resolve().parents[1]
NAMES = ("shape", "colour", "motion", "background")


class CountingKernel:
    """A block-sparse kernel that also adds up how much of each map is kept."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.kept = self.maps = 0.0

    def __call__(self, q: Any, k: Any, v: Any, block_map: Any) -> Any:
        self.kept += float(block_map.float().mean())
        self.maps += 1
        return self.kernel(q, k, v, block_map)

    @property
    def density(self) -> float:
        return self.kept / self.maps


def measure(config: Path, P: float, num: int, device: str) -> dict[str, Any]:
    """Density and scores with this P; P = 1 keeps every block."""
    import kandinsky

    pipe = kandinsky.get_T2V_pipeline(device, conf_path=config, overrides=[f"model.attention.P={P}"])
    kernel = CountingKernel(pipe.execution.block_sparse)
    pipe.execution = dataclasses.replace(pipe.execution, block_sparse=kernel)

    def progress(line: str) -> None:
        print(f"P {P}: {line}, density {kernel.density:.3f}", file=sys.stderr, flush=True)

    report, _ = evaluate(pipeline_caller(pipe), num, progress=progress, size=pipe.config.generation.width)
    return {"P": P, "density": round(kernel.density, 4), "num": num, **report["right"], "all": report["all_right"]}


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| P | density | " + " | ".join(NAMES) + " | all four |", "|---" * (len(NAMES) + 3) + "|"]
    for row in rows:
        shares = " | ".join(f"{100 * row[name] / row['num']:.0f} %" for name in (*NAMES, "all"))
        lines.append(f"| {row['P']:g} | {row['density']:.2f} | {shares} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for name in NAMES:
        axes.plot([row["density"] for row in rows], [100 * row[name] / row["num"] for row in rows], "o-", label=name)
    axes.set(xlabel="share of the blocks that attention keeps", ylabel="% of held-out captions", xlim=(0, 1.02))
    axes.set_ylim(0, 103)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    axes.set_title(f"Tiny T2V at 256x256 with NABLA, {rows[0]['num']} captions a point", fontsize=11)
    temporary = path.with_name(path.stem + ".tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "config_tiny_t2v_10s.yaml")
    parser.add_argument("--P", type=float, nargs="+", default=[1, 0.9, 0.8, 0.6, 0.4, 0.2, 0.05])
    parser.add_argument("--num", type=int, default=100, help="captions for each P (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to run, for example cuda:0 (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "nabla_density.json")
    parser.add_argument("--plot_only", action="store_true", help="draw and print what is in --output")
    args = parser.parse_args(argv)
    rows = json.loads(args.output.read_text()) if args.output.exists() else []
    for P in () if args.plot_only else args.P:
        if any((row["P"], row["num"]) == (P, args.num) for row in rows):
            continue
        rows = sorted([*rows, measure(args.config, P, args.num, args.device)], key=lambda row: -row["density"])
        temporary = args.output.with_suffix(".tmp")
        temporary.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
        temporary.replace(args.output)
    if not rows:
        parser.error(f"{args.output} has nothing to draw: run without --plot_only first")
    print(format_table(rows))
    plot(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
