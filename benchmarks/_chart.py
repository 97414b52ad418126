"""Draws what `benchmarks/speed.py --json` wrote: times beside diffusers' eager ones, and the floor of each part.

Of several whole runs it shows the first; the others would make it too tall.

python benchmarks/_chart.py [benchmarks/results_cpu.json [benchmarks/speed.png]]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
COLOURS = {
    "ours": "#1f6fb2",
    "ours compiled": "#7db6e3",
    "diffusers": "#6b6b6b",
    "diffusers compiled": "#bdbdbd",
}
FLOOR = "#d1495b"


def draw(results: dict[str, Any], path: Path) -> None:
    parts = list({part["part"]: part for part in reversed(results["parts"])}.values())[::-1]
    bars = sum(len(part["implementations"]) for part in parts)
    figure, axes = plt.subplots(figsize=(8, 0.32 * bars + 0.6 * len(parts) + 0.9))
    y, ticks, labels = 0.0, [], []
    for part in parts:
        rows = part["implementations"]
        unit = rows["diffusers"]["seconds"]
        axes.text(0, y - 0.15, part["title"], fontsize=9, fontweight="bold", va="bottom")
        for name, row in rows.items():
            y += 1
            ratio = row["seconds"] / unit
            axes.barh(y, ratio, color=COLOURS[name], height=0.8)
            axes.text(ratio + 0.01, y, f"{ratio:.2f}   {row['seconds']:.3g} s", fontsize=8, va="center")
            ticks.append(y)
            labels.append(name)
        if part["flops"]:
            floor = part["flops"] / results["flops_rate"] / unit
            axes.vlines(floor, y - len(rows) + 0.5, y + 0.5, color=FLOOR, linewidth=1.5, linestyle=":")
        y += 1.7
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.set_ylim(y - 0.9, -0.9)
    axes.set_xlim(0, 1.3)
    axes.set_xlabel("time, diffusers eager = 1; dotted: its matrix products alone, at the rate of one large product")
    axes.xaxis.label.set_size(8)
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.suptitle(f"{results['machine']}, {results['dtype']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    given = [Path(argument) for argument in sys.argv[1:]]
    source, path = given + [HERE / "results_cpu.json", HERE / "speed.png"][len(given) :]
    draw(json.loads(source.read_text()), path)


if __name__ == "__main__":
    main()
