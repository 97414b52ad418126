"""How far each fast path is from the plain run of the same seeds, and what it spends: quality against cost.

    python benchmarks/quality.py --cases 24 --output benchmarks/quality.json
    python benchmarks/quality.py --only MagCache --cases 100 --output outputs/quality.json
    python benchmarks/quality.py --draw benchmarks/quality.json benchmarks/quality.png

A case is a held-out caption with its seed (tools/eval_tiny.py), generated as the tiny config says (`plain`) and with
every setting of SETTINGS; a line there adds one. Each is compared with the plain clip (benchmarks/_distance.py), and
what was asked for is read back from its pixels. Known degradations of the plain clips, and DiTs whose weights are
rounded to fewer bits, stand beside them as a scale.

Spent are evaluations of the DiT, as the record beside an output has them; operations (of all products of a whole
request with text and VAE, counted as they are made, in each setting's first case); and processor seconds of the call,
the median over the cases: with one thread those are seconds of work, whatever else runs.

What `--output` has is not made again: with `--minutes` a run ends early, and the next one goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks._distance import DEGRADATIONS, MOST_DB, WEIGHT_BITS, distance  # noqa: E402
from benchmarks._resumable import Kept, add_arguments  # noqa: E402
from tools.eval_tiny import Case, make_cases, pipeline_caller, score  # noqa: E402

TINY, NABLA = "config_tiny_t2v", "config_tiny_t2v_10s"
MOST_CASES = {NABLA: 5}  # 256x256, where a case takes five times as long
QUALITY = ("psnr", "ssim", "xpsnr", "vmaf")


@dataclass(frozen=True)
class Setting:
    """A way to make what the plain run of its config makes. name: also its key in the results."""

    name: str
    values: tuple[str, ...] = ()  # over the YAML's
    config: str = TINY
    dtype: str = "float32"
    bits: int | None = None  # that the DiT's weights are rounded to
    spoil: Callable[[np.ndarray], np.ndarray] | None = None  # what is done to the plain clip, in place of a run

    @property
    def is_known_to_be_worse(self) -> bool:
        return self.bits is not None or self.spoil is not None

    def facts(self) -> dict[str, Any]:
        """What makes it, for the results: rows of other values don't belong to it."""
        return {"config": self.config, "values": list(self.values), "dtype": self.dtype}


PLAIN = {TINY: Setting("plain"), NABLA: Setting("plain, 256x256", ("model.attention.type=full",), NABLA)}
SETTINGS = (
    *PLAIN.values(),
    *(Setting(f"{steps} steps", (f"model.num_steps={steps}",)) for steps in (12, 8, 4)),
    Setting("MagCache 0.06", ("magcache.enabled=true", "magcache.threshold=0.06")),
    Setting("MagCache 0.12", ("magcache.enabled=true",)),
    Setting("MagCache 0.24", ("magcache.enabled=true", "magcache.threshold=0.24", "magcache.max_skips=4")),
    *(Setting(kind, (f"cache.kind={kind}",)) for kind in ("tracked", "taylorseer", "firstblock", "dbcache")),
    Setting("attention in int8", ("model.attention.engine=sage_emulated",)),
    Setting(
        "int8, exact at the end", ("model.attention.engine=sage_emulated", "model.attention.exact_steps=[0.75,1.0]")
    ),
    Setting("guidance every 2nd step", ("model.guidance_every=2",)),
    Setting("guidance in the first half", ("model.guidance_interval=[0.0,0.5]",)),
    Setting("no guidance", ("model.guidance_weight=1",)),
    Setting("bfloat16", dtype="bfloat16"),
    *(Setting(f"DiT {scheme}", (f"runtime.dit_quantization={scheme}",)) for scheme in ("int8", "fp8", "nf4")),
    Setting("Qwen nf4", ("runtime.qwen_quantization=true",)),
    Setting("tiny VAE decoder", ("model.vae.decoder=tiny",)),
    *(
        Setting(f"coarse {share:g} at {scale:g}", (f"generation.coarse_steps={{share: {share}, scale: {scale}}}",))
        for share, scale in ((0.25, 0.5), (0.5, 0.5), (0.25, 0.75), (0.5, 0.75))
    ),
    Setting("coarse 0.25, 256x256", (*PLAIN[NABLA].values, "generation.coarse_steps.share=0.25"), NABLA),
    *(Setting(f"NABLA {P}", (f"model.attention.P={P}",), NABLA) for P in (0.9, 0.6, 0.3)),
    *(
        Setting(f"{name} {strength:g}", spoil=partial(spoil, strength=strength))
        for name, (spoil, strengths) in DEGRADATIONS.items()
        for strength in strengths
    ),
    *(Setting(f"weights in {bits} bits", bits=bits) for bits in WEIGHT_BITS),
)


def round_weights(dit: Any, bits: int) -> None:
    """The linear weights of the DiT's blocks rounded, in place, to 2^bits - 1 even levels a row."""
    from torch import nn

    for name, module in dit.named_modules():
        if isinstance(module, nn.Linear) and "blocks" in name:
            weight = module.weight.data
            step = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
            module.weight.data = (weight / step).round() * step


class Runner:
    """A setting's pipeline."""

    def __init__(self, setting: Setting) -> None:
        import kandinsky

        config = kandinsky.load_config(REPOSITORY / "configs" / f"{setting.config}.yaml", setting.values)
        self.pipe: Any = kandinsky.get_T2V_pipeline("cpu", config=config, dtype=setting.dtype)
        if setting.bits:
            round_weights(self.pipe.dit, setting.bits)

    def __call__(self, case: Case) -> tuple[np.ndarray, dict[str, float]]:
        """uint8 frames (T, H, W, 3), and what they took."""
        records: list[dict[str, Any]] = []
        began = time.process_time()
        video = pipeline_caller(self.pipe, records)(case.text, case.seed)  # (3, T, H, W)
        seconds = time.process_time() - began
        made = records[0]["evaluations"]
        spent = {"evaluations": made["all"] - made["skipped"], "seconds": seconds}
        return np.ascontiguousarray(video.permute(1, 2, 3, 0).numpy()), spent

    def operations(self, case: Case) -> int:
        """Of the products of a whole request, counted in one of its own."""
        from benchmarks._flops import counted_flops

        return counted_flops(lambda: self.pipe(case.text, seed=case.seed, progress=False))


def measure(kept: Kept, settings: Sequence[Setting], count: int, runner: Callable[[Setting], Any] = Runner) -> None:
    """Fill `kept.data` with what is missing: under "rows" for each setting a row a case, by the case's seed, under
    "operations" those of each setting. Case after case: whatever there is is of the same cases for all."""
    rows, operations = kept.data["rows"], kept.data["operations"]
    for setting in settings:
        if kept.data["settings"].setdefault(setting.name, setting.facts()) != setting.facts():
            raise ValueError(
                f"{kept.path} has {setting.name!r} with other values: take it out, or give another --output"
            )
        rows.setdefault(setting.name, {})

    def missing(config: str, case: Case) -> list[Setting]:
        return [one for one in settings if one.config == config and str(case.seed) not in rows[one.name]]

    todo = [
        (config, case)
        for config in PLAIN
        for case in make_cases("t2v", min(count, MOST_CASES.get(config, count)))
        if missing(config, case)
    ]
    load = cache(runner)
    for config, case in kept.each(sorted(todo, key=lambda one: one[1].seed)):
        plain, plain_spent = load(PLAIN[config])(case)
        for setting in missing(config, case):
            spent: dict[str, float] = {}
            if setting == PLAIN[config]:
                clip, spent = plain, plain_spent
            elif setting.spoil is not None:
                clip = setting.spoil(plain)
            else:
                clip, spent = load(setting)(case)
            if setting.spoil is None and setting.name not in operations:
                operations[setting.name] = load(setting).operations(case)
            right, _ = score(clip, case)
            row = {"right": bool(all(right.values())), **distance(clip, plain), **spent}
            rows[setting.name][str(case.seed)] = row
            kept.save()
            shown = ", ".join(f"{name} {row[name]:.4g}" for name in QUALITY)
            print(f"case {case.seed}, {setting.name}: right {row['right']}, {shown}", flush=True)


def summary(data: dict[str, Any], settings: Sequence[Setting] = SETTINGS) -> list[dict[str, Any]]:
    """A line for each setting that has cases: means over them, and of "worst" the least; what was spent also as shares
    of the plain run's."""
    lines = []
    for setting in settings:
        rows = list(data["rows"].get(setting.name, {}).values())
        if not rows:
            continue
        line: dict[str, Any] = {"name": setting.name, "config": setting.config, "cases": len(rows)}
        line["known"] = setting.is_known_to_be_worse
        line["right"] = sum(row["right"] for row in rows)
        for name in QUALITY:
            line[name] = float(np.mean([row[name] for row in rows]))
            line[f"{name} worst"] = min(row[f"{name} worst"] for row in rows)
        line["flicker change"] = float(np.mean([row["flicker change"] for row in rows]))
        if setting.spoil is None:
            plain = data["rows"].get(PLAIN[setting.config].name, {})
            line["evaluations"] = float(np.mean([row["evaluations"] for row in rows]))
            line["seconds"] = float(np.median([row["seconds"] for row in rows]))
            line["operations"] = data["operations"][setting.name]
            if plain:
                line["seconds share"] = line["seconds"] / float(np.median([row["seconds"] for row in plain.values()]))
                line["operations share"] = line["operations"] / data["operations"][PLAIN[setting.config].name]
        lines.append(line)
    return lines


def table(data: dict[str, Any], settings: Sequence[Setting] = SETTINGS) -> str:
    """Markdown. PSNR, SSIM, XPSNR, VMAF: the mean, and the worst frame of all."""
    heading = "| | right | PSNR, dB | SSIM | XPSNR, dB | VMAF | flicker | evaluations | operations | seconds |"
    lines = [heading, "|---|---|---|---|---|---|---|---|---|---|"]
    digits = {"psnr": 1, "ssim": 3, "xpsnr": 1, "vmaf": 1}
    for line in summary(data, settings):
        cells = [line["name"], f"{line['right']}/{line['cases']}"]
        for name in QUALITY:
            same = name != "vmaf" and line[f"{name} worst"] >= (1 if name == "ssim" else MOST_DB)
            value, worst = (f"{line[key]:.{digits[name]}f}" for key in (name, f"{name} worst"))
            cells.append("same" if same else f"{value} ({worst})")
        cells.append(f"{line['flicker change']:+.2f}")
        if "evaluations" in line:
            shares = [
                f" ({line[f'{name} share']:.2f})" if f"{name} share" in line else ""
                for name in ("operations", "seconds")
            ]
            cells += [f"{line['evaluations']:.4g}", f"{line['operations'] / 1e12:.3g} T{shares[0]}"]
            cells.append(f"{line['seconds']:.3g}{shares[1]}")
        else:
            cells += ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, cases=10)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="settings whose names have one of these in them")
    parser.add_argument("--draw", type=Path, nargs=2, metavar=("JSON", "PNG"), help="draw what --output has written")
    args = parser.parse_args()
    if args.draw:
        from benchmarks._chart import draw_quality

        data = json.loads(args.draw[0].read_text())
        print(table(data))
        return draw_quality(summary(data), data["machine"], args.draw[1])

    from benchmarks.compare import processor_name

    words = args.only or [""]
    settings = [one for one in SETTINGS if one in PLAIN.values() or any(word in one.name for word in words)]
    empty = {"machine": processor_name(), "settings": {}, "operations": {}, "rows": {}}
    kept = Kept(args.output, empty, args.minutes)
    if kept.data["machine"] != processor_name():
        print(f"{args.output} has seconds of another processor: {kept.data['machine']}", file=sys.stderr)
    measure(kept, settings, args.cases)
    print(table(kept.data))


if __name__ == "__main__":
    main()
