"""Whether a video that goes on, segment after segment, keeps what it shows and where, read from pixels on a tiny
checkpoint.

    python benchmarks/extend.py --cases 100 --output outputs/extend_i2v.json
    python benchmarks/extend.py --config configs/config_tiny_t2v.yaml --cases 100 --output outputs/extend_t2v.json
    python benchmarks/extend.py --config configs/config_tiny_t2v.yaml --overlap 5 --output outputs/extend_5.json

A case is a held-out clip and four segments after it. Their captions turn the motion round each time, left and right,
up and down, growing and shrinking: none could go on for long within the picture. `kept`: shape, colour and background
are the clip's in each of the four. `motion`: in how many of the four it is the caption's. `joints`: how many pixels
further, at worst, the object moves from the last frame before a joint to the first one after it than it does between
any two frames of the clip; at most 2 is what we aim for. `drift`: of the last segment, the largest distance of mean
red, green or blue from the clip's, in levels of 255, before that is corrected.

Cases that `--output` has already are not made again: with `--minutes` a run ends early, and the next one goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks._resumable import Kept, add_arguments  # noqa: E402
from tools import tiny_world  # noqa: E402
from tools.eval_tiny import Case, make_cases  # noqa: E402

FRAMES, SIZE, SEGMENTS = 25, 128, 4
MOST_PIXELS = 2.0  # beyond the motion's own step, at a joint
TURNED = {"left": "right", "right": "left", "up": "down", "down": "up", "grow": "shrink", "shrink": "grow"}


def step(before: np.ndarray, after: np.ndarray) -> float:
    """Pixels that the object moves between two frames (H, W, 3); infinite where one of them has none."""
    ours, theirs = (tiny_world.measure_picture(one).diagnostics for one in (before, after))
    if "x" not in ours or "x" not in theirs:
        return float("inf")
    return SIZE * float(np.hypot(ours["x"] - theirs["x"], ours["y"] - theirs["y"]))


def measured(pipe: Any, case: Case, folder: Path, overlap: int, match_colours: bool) -> dict[str, Any]:
    from PIL import Image

    from kandinsky.clips import iterate_clip, open_clip
    from kandinsky.frames import FPS
    from kandinsky.outputs.media import sidecar_path
    from kandinsky.outputs.sources import Media
    from kandinsky.serving import segments

    added = FRAMES - overlap
    clip = tiny_world.render(case.wanted, FRAMES, SIZE)
    (folder / "clip").mkdir()
    for i, frame in enumerate(clip):
        Image.fromarray(frame).save(folder / "clip" / f"{i:03}.png")
    asked = [case.wanted.attributes]
    for _ in range(SEGMENTS):
        asked.append(asked[-1]._replace(motion=TURNED.get(asked[-1].motion, asked[-1].motion)))
    parts = [segments.Part(tiny_world.caption(one), added, case.seed + i) for i, one in enumerate(asked[1:])]
    requests = tuple(segments.request_of(pipe.config, part, (SIZE, SIZE), overlap) for part in parts)
    source, output = open_clip(folder / "clip", FPS, FRAMES), folder / "long.mp4"
    video = segments.LongVideo(requests, overlap, match_colours, source)
    segments.make_long(pipe, video, Media(), output, progress=False)

    total = FRAMES + SEGMENTS * added
    frames = np.stack(list(iterate_clip(open_clip(output, FPS, total + 1), total + 1, SIZE, SIZE)))
    assert len(frames) == total
    joints = [FRAMES + i * added for i in range(SEGMENTS)]
    # With what it goes on from: whole clips, as the measurement of motion knows them.
    right = [
        tiny_world.measure(frames[joint - overlap : joint + added]).agrees(one)
        for joint, one in zip(joints, asked[1:], strict=True)
    ]
    own = max(step(a, b) for a, b in pairwise(clip))
    record = json.loads(sidecar_path(output).read_text())["extended"]["segments"]
    return {
        "caption": case.text,
        "kept": [bool(one["shape"] and one["colour"] and one["background"]) for one in right],
        "motion": sum(bool(one["motion"]) for one in right),
        "joints": max(step(frames[joint - 1], frames[joint]) for joint in joints) - own,
        "drift": max(abs(level) for level in record[-1]["drift"]),
    }


def report(cases: list[dict[str, Any]]) -> str:
    kept, joints = sum(all(case["kept"]) for case in cases), [case["joints"] for case in cases]
    by_segment = [sum(case["kept"][i] for case in cases) for i in range(SEGMENTS)]
    return (
        f"{len(cases)} cases: shape, colour and background kept in {kept} (segment by segment {by_segment}), the "
        f"caption's motion in {sum(case['motion'] for case in cases)} of {SEGMENTS * len(cases)} segments; continuous "
        f"over all joints in {sum(value <= MOST_PIXELS for value in joints)}, at worst {max(joints):.1f} px beyond the "
        f"motion's own step, at the median {np.median(joints):.1f}; drift of the last segment "
        f"{np.mean([case['drift'] for case in cases]):.1f} levels, at worst {max(case['drift'] for case in cases):.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "config_tiny_i2v.yaml")
    add_arguments(parser, cases=20)
    parser.add_argument("--overlap", type=int, help="frames that a segment goes on from; default: as in test.py")
    parser.add_argument("--no_colour_match", action="store_true", help="colours are left as they come")
    args = parser.parse_args()

    import kandinsky
    from kandinsky.config import load_config
    from kandinsky.serving.segments import checked_overlap

    kept, task = Kept(args.output, [], args.minutes), load_config(args.config).task
    overlap = checked_overlap(task, args.overlap, FRAMES)
    get = {"t2v": kandinsky.get_T2V_pipeline, "i2v": kandinsky.get_I2V_pipeline}[task]
    pipe: Any = get("cpu", conf_path=str(args.config))
    cases: list[dict[str, Any]] = kept.data
    for case in kept.each(make_cases(task, args.cases)[len(cases) :]):
        with tempfile.TemporaryDirectory() as folder:
            cases.append(measured(pipe, case, Path(folder), overlap, not args.no_colour_match))
        print(cases[-1])
    print(report(cases))


if __name__ == "__main__":
    main()
