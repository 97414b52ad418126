"""What is kept of a video and what is taken from the prompt, against strength and by a mask, read from pixels on a tiny
checkpoint.

    python benchmarks/directed.py --cases 40 --output benchmarks/directed.json
    python benchmarks/directed.py --cases 100 --strengths 0.7 --no_mask --output outputs/directed_0.7.json
    python benchmarks/directed.py --draw benchmarks/directed.json benchmarks/directed.png

A case is a held-out clip and its own caption with another colour. `layout`: shape, motion and background are still the
clip's, as measured, and the object stands within 6 % of the picture's side of where it stood in the first, the middle
and the last frame. `colour`: it is the prompt's.

The mask is white on the right half, and strength 1: the left half is to be the clip's. `outside` is its PSNR to the
clip, `vae` that of the clip through the VAE alone, both 24 pixels away from the white half and further: a latent is 8
wide, a feather too, and the decoder's convolutions look over another. `inside` is the white half's PSNR to the clip.

Cases that `--output` has already are not made again: with `--minutes` a run ends early, and the next one goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks._resumable import Kept, add_arguments  # noqa: E402
from tools import tiny_world  # noqa: E402
from tools.eval_tiny import MAX_SHIFT, Case, make_cases, psnr  # noqa: E402

STRENGTHS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
FRAMES, SIZE = 25, 128
HALF, APART = SIZE // 2, 24


def stands_there(frame: np.ndarray, source: np.ndarray) -> bool:
    """Whether the object of a frame (H, W, 3) is where that of the other one is."""
    ours, theirs = (tiny_world.measure(one[None]).diagnostics for one in (frame, source))
    return "x" in ours and bool(np.hypot(ours["x"] - theirs["x"], ours["y"] - theirs["y"]) <= MAX_SHIFT)


def made_with(pipe: Any, text: str, folder: str, seed: int, **wishes: Any) -> np.ndarray:
    """uint8 (T, H, W, 3)."""
    video = pipe(text, video=folder, seed=seed, progress=False, **wishes)
    return np.moveaxis(video[0].numpy(), 0, -1)


def measured(pipe: Any, case: Case, folder: str, strengths: Sequence[float], masks: bool) -> dict[str, Any]:
    """Of one case [layout, colour] by strength, and the mask's figures."""
    from PIL import Image

    asked, colours = case.wanted.attributes, list(tiny_world.COLOURS)
    # Three to the right: none of the eight is its neighbour in hue there.
    other = asked._replace(colour=colours[(colours.index(asked.colour) + 3) % len(colours)])
    text, frames = tiny_world.caption(other), tiny_world.render(case.wanted, FRAMES, SIZE)
    clip, mask = f"{folder}/clip", f"{folder}/mask.png"
    Path(clip).mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(f"{clip}/{i:03}.png")
    Image.fromarray(np.where(np.arange(SIZE) < HALF, 0, 255).astype(np.uint8)[None].repeat(SIZE, 0)).save(mask)

    by_strength: dict[str, list[bool]] = {}
    for strength in strengths:
        made = made_with(pipe, text, clip, case.seed, strength=strength)
        found = tiny_world.measure(made)
        right = found.agrees(other)
        near = all(stands_there(made[i], frames[i]) for i in (0, FRAMES // 2, FRAMES - 1))
        layout = near and all(right[name] for name in ("shape", "motion", "background"))
        by_strength[str(strength)] = [bool(layout), bool(right["colour"])]
    facts = {"caption": text, "seed": case.seed, "strengths": by_strength}
    if not masks:
        return facts
    through_vae = made_with(pipe, text, clip, case.seed, strength=0)
    masked = made_with(pipe, text, clip, case.seed, strength=1.0, mask=mask)
    kept = (slice(None), slice(None), slice(0, HALF - APART))
    return {
        **facts,
        "outside": psnr(masked[kept], frames[kept]),
        "vae": psnr(through_vae[kept], frames[kept]),
        "inside": psnr(masked[:, :, HALF:], frames[:, :, HALF:]),
    }


def table(cases: list[dict[str, Any]]) -> str:
    lines = ["| strength | layout kept | new colour | both |", "|---|---|---|---|"]
    for strength in cases[0]["strengths"]:
        pairs = [case["strengths"][strength] for case in cases]
        counts = [sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs), sum(map(all, pairs))]
        lines.append(f"| {strength} | {' | '.join(map(str, counts))} |")
    if "outside" not in cases[0]:
        return "\n".join([*lines, f"{len(cases)} cases"])
    means = {name: np.mean([case[name] for case in cases]) for name in ("outside", "vae", "inside")}
    worst = min(case["outside"] - case["vae"] for case in cases)
    lines.append(
        f"{len(cases)} cases. The mask, PSNR: outside {means['outside']:.2f} dB, the VAE alone {means['vae']:.2f} dB "
        f"(difference at worst {worst:+.2f}), inside {means['inside']:.2f} dB"
    )
    return "\n".join(lines)


def draw(cases: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3))
    strengths = list(cases[0]["strengths"])
    for i, (name, colour) in enumerate((("layout kept", "#1f6fb2"), ("new colour", "#d1495b"))):
        shares = [100 * float(np.mean([case["strengths"][s][i] for case in cases])) for s in strengths]
        axes.plot([float(s) for s in strengths], shares, marker="o", color=colour, label=name)
    axes.axhline(90, color="#bdbdbd", linestyle=":", linewidth=1)
    axes.set_xlabel("strength")
    axes.set_ylabel(f"of 100 ({len(cases)} cases)")
    axes.set_ylim(0, 103)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(REPOSITORY / "configs/config_tiny_t2v.yaml"))
    add_arguments(parser, cases=40)
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    parser.add_argument("--no_mask", action="store_true", help="without the mask's figures")
    parser.add_argument("--draw", type=Path, nargs=2, metavar=("JSON", "PNG"), help="draw what --output has written")
    args = parser.parse_args()
    if args.draw:
        return draw(json.loads(args.draw[0].read_text()), args.draw[1])

    from kandinsky import get_T2V_pipeline

    kept = Kept(args.output, [], args.minutes)
    cases: list[dict[str, Any]] = kept.data
    pipe: Any = get_T2V_pipeline("cpu", conf_path=args.config)
    for case in kept.each(make_cases("t2v", args.cases)[len(cases) :]):
        with tempfile.TemporaryDirectory() as folder:
            cases.append(measured(pipe, case, folder, args.strengths, not args.no_mask))
        print(cases[-1])
    print(table(cases))


if __name__ == "__main__":
    main()
