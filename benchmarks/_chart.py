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


def draw_quality(lines: list[dict[str, Any]], machine: str, path: Path) -> None:
    """Of `benchmarks/quality.py`'s summary: PSNR and VMAF against operations and processor seconds, as shares of the
    plain run's. Dotted, as a scale: what is known to be worse."""
    figure, rows = plt.subplots(2, 2, figsize=(12, 10), sharex=True)
    costs = {"operations share": "operations, plain run = 1", "seconds share": "processor seconds, plain run = 1"}
    marks = [line for line in lines if "seconds share" in line and not line["known"] and line["psnr worst"] < 100]
    known = [line for line in lines if line["known"]]
    shares = [line[cost] for line in marks for cost in costs]
    for axes_row, (name, title) in zip(rows, {"psnr": "PSNR, dB", "vmaf": "VMAF"}.items(), strict=True):
        low, high = (pick(line[name] for line in lines if name in line) for pick in (min, max))
        low, high = low - 2, min(high, max(line[name] for line in marks)) + 2
        for axes, (cost, label) in zip(axes_row, costs.items(), strict=True):
            axes.set_xlim(min(shares) - 0.15, max(shares) + 0.05)
            axes.set_ylim(low, high)
            left, right = axes.get_xlim()
            for line, y in zip(marks, spread([line[name] for line in marks], low, high), strict=True):
                colour = FLOOR if line["config"].endswith("_10s") else COLOURS["ours"]
                axes.plot(line[cost], line[name], "o", color=colour, markersize=4)
                axes.plot([line[cost], right], [line[name], y], color=colour, linewidth=0.3)
                axes.text(right, y, f" {line['name']}", fontsize=7, va="center")
            for line, y in zip(known, spread([line[name] for line in known], low, high), strict=True):
                axes.axhline(line[name], color=COLOURS["diffusers compiled"], linewidth=0.5, linestyle=":")
                axes.text(left, y, f" {line['name']}", fontsize=6, va="center", color=COLOURS["diffusers"])
            axes.tick_params(labelsize=8)
            axes.set_xlabel(label, fontsize=8)
            axes.set_ylabel(title, fontsize=8)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
    rows[0, 0].text(0.12, 0.01, "red: 256x256", fontsize=7, color=FLOOR, transform=rows[0, 0].transAxes)
    cases = max(line["cases"] for line in lines)
    figure.suptitle(f"to the plain run of the same seed, {cases} held-out captions; {machine}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def spread(heights: list[float], low: float, high: float, lines: int = 32) -> list[float]:
    """Where to write names of what is at these heights, so that none covers another: `lines` of them fit."""
    gap = (high - low) / lines
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    places, above = list(heights), high + gap
    for i in reversed(order):
        places[i] = above = min(heights[i], above - gap)
    below = low - gap
    for i in order:  # what was pushed out at the bottom goes up again
        places[i] = below = max(places[i], below + gap)
    return places


def main() -> None:
    given = [Path(argument) for argument in sys.argv[1:]]
    source, path = given + [HERE / "results_cpu.json", HERE / "speed.png"][len(given) :]
    draw(json.loads(source.read_text()), path)


if __name__ == "__main__":
    main()
