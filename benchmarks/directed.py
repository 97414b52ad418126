"""What is kept of a video and what is taken from the prompt, against strength, read from pixels on a tiny checkpoint.

    python benchmarks/directed.py --cases 40 --output curve.json

A case is a held-out clip and its own caption with another colour. `layout`: shape, motion and background are still the
clip's, as measured, and the object stands within 6 % of the picture's side of where it stood in
the first, the middle and the last frame.
`colour`: it is the prompt's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from tools import tiny_world  # noqa: E402
from tools.eval_tiny import MAX_SHIFT, make_cases  # noqa: E402

STRENGTHS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def stands_there(frame: np.ndarray, source: np.ndarray) -> bool:
    """Whether the object of a frame (H, W, 3) is where that of the other one is."""
    ours, theirs = (tiny_world.measure(one[None]).diagnostics for one in (frame, source))
    return "x" in ours and bool(np.hypot(ours["x"] - theirs["x"], ours["y"] - theirs["y"]) <= MAX_SHIFT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(REPOSITORY / "configs/config_tiny_t2v.yaml"))
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    from PIL import Image

    from kandinsky import get_T2V_pipeline

    pipe: Any = get_T2V_pipeline("cpu", conf_path=args.config)
    curve = {strength: {"layout": 0, "colour": 0, "both": 0} for strength in STRENGTHS}
    colours = list(tiny_world.COLOURS)
    for number, case in enumerate(make_cases("t2v", args.cases)):
        asked = case.wanted.attributes
        # Three to the right: none of the eight is its neighbour in hue there.
        other = asked._replace(colour=colours[(colours.index(asked.colour) + 3) % len(colours)])
        frames = tiny_world.render(case.wanted, 25, 128)
        with tempfile.TemporaryDirectory() as folder:
            for i, frame in enumerate(frames):
                Image.fromarray(frame).save(Path(folder) / f"{i:03}.png")
            for strength, counts in curve.items():
                video = pipe(tiny_world.caption(other), video=folder, strength=strength, seed=case.seed, progress=False)
                made = np.moveaxis(video[0].numpy(), 0, -1)  # (T, H, W, 3)
                found = tiny_world.measure(made)
                right = found.agrees(other)
                near = all(stands_there(made[i], frames[i]) for i in (0, 12, 24))
                layout = bool(near and all(right[name] for name in ("shape", "motion", "background")))
                counts["layout"] += layout
                counts["colour"] += right["colour"]
                counts["both"] += layout and right["colour"]
        print(f"{number + 1}/{args.cases}", {s: tuple(c.values()) for s, c in curve.items()}, flush=True)
    if args.output:
        args.output.write_text(json.dumps({"cases": args.cases, "curve": curve}, indent=2))


if __name__ == "__main__":
    main()
