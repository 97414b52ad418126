"""Whether a video ends with the picture that it is given, and a loop goes round, read from pixels on a tiny checkpoint.

    python benchmarks/keyframes.py --cases 100 --output outputs/keyframes.json

A case is a held-out clip: its caption, its first and its last frame. `last`: of the last frame of what is made, shape,
colour and background are the clip's, and the object stands within 6 % of the picture's side of where it stood. The same
is asked of the first frame. Of the whole clip, whether all that the caption says is right, and how much the object's
silhouette has in common with the drawn one (intersection over union), which falls where it is torn on the way.

A loop is given the first frame and the caption. `seam`: the PSNR between its last and its first frame, against the mean
of those between other neighbours. What goes round without a jump is at most 1 dB below, or has 45 dB, a level and a
half of 255, which nobody sees: where all stands still, which neighbours differ least is chance.

Cases that `--output` has already are not made again: with `--minutes` a run ends early, and the next one goes on.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks._resumable import Kept, add_arguments  # noqa: E402
from tools import tiny_world  # noqa: E402
from tools.eval_tiny import MAX_SHIFT, Case, make_cases, psnr  # noqa: E402

FRAMES, SIZE = 25, 128
UNSEEN = 45.0  # dB between two frames


def is_the_same(frame: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether a frame (H, W, 3) shows what another one does, in the same place."""
    ours, theirs = (tiny_world.measure_picture(one) for one in (frame, wanted))
    if "x" not in ours.diagnostics or "x" not in theirs.diagnostics:
        return False
    shift = np.hypot(*(ours.diagnostics[axis] - theirs.diagnostics[axis] for axis in ("x", "y")))
    named = all(getattr(ours, name) == getattr(theirs, name) for name in ("shape", "colour", "background"))
    return named and bool(shift <= MAX_SHIFT)


def measured(pipe: Any, case: Case) -> dict[str, Any]:
    from PIL import Image

    def made(picture: np.ndarray, **given: Any) -> np.ndarray:
        video = pipe(case.text, Image.fromarray(picture), seed=case.seed, progress=False, **given)
        return np.moveaxis(video[0].numpy(), 0, -1)  # uint8 (T, H, W, 3)

    clip = tiny_world.render(case.wanted, FRAMES, SIZE)
    video = made(clip[0], last_image=Image.fromarray(clip[-1]))
    seen = tiny_world.measure(video)
    loop = made(clip[0], loop=True)
    neighbours = [psnr(a, b) for a, b in pairwise(loop)]
    return {
        "caption": case.text,
        "first": is_the_same(video[0], clip[0]),
        "last": is_the_same(video[-1], clip[-1]),
        **seen.agrees(case.wanted.attributes),
        "overlap": seen.overlap(case.wanted.shape) or 0.0,
        "loop overlap": tiny_world.measure(loop).overlap(case.wanted.shape) or 0.0,
        "seam": psnr(loop[-1], loop[0]),
        "neighbours": float(np.mean(neighbours)),
        "worst neighbours": float(min(neighbours)),
    }


def report(cases: list[dict[str, Any]]) -> str:
    counts = {name: sum(case[name] for case in cases) for name in ("first", "last", *tiny_world.Attributes._fields)}
    seams = [case["seam"] - case["neighbours"] for case in cases]
    unseen = sum(case["seam"] >= UNSEEN and seam < -1 for case, seam in zip(cases, seams, strict=True))
    close = sum(seam >= -1 for seam in seams)
    between, loops = ([case[name] for case in cases] for name in ("overlap", "loop overlap"))
    return (
        f"{len(cases)} cases, right in: {', '.join(f'{name} {count}' for name, count in counts.items())}; silhouettes' "
        f"overlap {np.mean(between):.3f}, at worst {min(between):.3f}\n"
        f"loops without a jump: {close + unseen}, of which {unseen} by 45 dB alone; seam against neighbours "
        f"{np.mean(seams):+.2f} dB, at worst {min(seams):+.2f}; overlap {np.mean(loops):.3f}, at worst {min(loops):.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "config_tiny_flf.yaml")
    add_arguments(parser, cases=20)
    args = parser.parse_args()

    import kandinsky

    if (task := kandinsky.load_config(args.config).task) != "i2v":
        parser.error(f"--config {args.config} is for {task}: give one for i2v")
    kept = Kept(args.output, [], args.minutes)
    pipe = kandinsky.get_I2V_pipeline(device_map="cpu", conf_path=str(args.config))
    cases: list[dict[str, Any]] = kept.data
    for case in kept.each(make_cases("i2v", args.cases)[len(cases) :]):
        cases.append(measured(pipe, case))
        print(cases[-1])
    print(report(cases))


if __name__ == "__main__":
    main()
