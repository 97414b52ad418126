"""One picture of several clips, a row each with its caption above: what the README shows.

    python tools/contact_sheet.py outputs/a.mp4 outputs/b.mp4 --output sheet.png
    python tools/contact_sheet.py --held_out 6 --output assets/demo.png

The first reads videos, and their captions from the JSON files beside them. The second generates clips for captions
that the tiny checkpoint was never trained on. Knows the pipeline by its public call only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs without the project being installed

from tools.eval_tiny import contact_sheet, held_out
from tools.tiny_world import caption

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "config_tiny_t2v.yaml"

Clip = tuple[str, np.ndarray]  # caption, uint8 frames (T, H, W, 3)

STRIP = 22  # pixels of a caption's strip
MARGIN = 6


def captioned_sheet(clips: Sequence[Clip], frames_per_clip: int = 7) -> np.ndarray:
    """uint8 (rows * (strip + H), frames_per_clip * W, 3), black on white. Raises ValueError for unequal clips."""
    sizes = {frames.shape[1:] for _, frames in clips}
    if len(sizes) != 1:
        raise ValueError(f"the clips have {len(sizes)} sizes, {sorted(sizes)}; a sheet needs clips of one size")
    font = ImageFont.load_default(size=13)
    rows = []
    for text, frames in clips:
        row = contact_sheet([frames], frames_per_clip)
        strip = Image.new("RGB", (row.shape[1], STRIP), "white")
        ImageDraw.Draw(strip).text((MARGIN, STRIP // 2), text, fill="black", font=font, anchor="lm")
        rows += [np.asarray(strip), row]
    return np.concatenate(rows, axis=0)


def read_clip(path: Path) -> Clip:
    """A video, and its prompt from the JSON beside it, or its file name where there is none."""
    import imageio.v2 as imageio

    with imageio.get_reader(path, format="FFMPEG") as reader:
        frames = np.stack(list(reader.iter_data()))
    facts = path.with_suffix(".json")
    return json.loads(facts.read_text(encoding="utf-8"))["prompt"] if facts.is_file() else path.stem, frames


def generate_held_out(num: int, config: str | Path) -> list[Clip]:
    """`num` clips of combinations that were never trained on, at the config's own settings."""
    from kandinsky import get_T2V_pipeline

    pipe = get_T2V_pipeline(conf_path=config)
    clips = []
    for attributes, seed in held_out(num):
        video = pipe(caption(attributes), seed=seed)
        clips.append((caption(attributes), video[0].permute(1, 2, 3, 0).numpy()))
    return clips


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("videos", nargs="*", type=Path)
    parser.add_argument("--held_out", type=int, metavar="N", help="generate N clips instead of reading videos")
    parser.add_argument("--config", default=CONFIG, help="for --held_out")
    parser.add_argument("--frames", type=int, default=7, help="frames of each clip (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="the PNG to write")
    args = parser.parse_args(arguments)
    if bool(args.videos) == bool(args.held_out):
        parser.error("name videos, or --held_out N")
    clips = [read_clip(path) for path in args.videos] or generate_held_out(args.held_out, args.config)
    Image.fromarray(captioned_sheet(clips, args.frames)).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
