"""One picture of several videos or images, each under its caption: what the README shows.

    python tools/contact_sheet.py outputs/a.mp4 outputs/b.mp4 --output sheet.png
    python tools/contact_sheet.py outputs/a.png outputs/b.png --columns 2 --output sheet.png
    python tools/contact_sheet.py outputs/edited.png --sources cat.png --output sheet.png
    python tools/contact_sheet.py --held_out 6 --config configs/config_tiny_i2v.yaml --output sheet.png
    python tools/contact_sheet.py --held_out 6 --config configs/config_tiny_flf.yaml --given last --output sheet.png

The first three read files, and their captions from the JSON files beside them; `--sources` puts in front of each the
picture that it was made from. The last two have a tiny checkpoint make what it was never trained on, and the very last
one gives it the last frame as well. Knows the pipelines by their public call only, through tools/eval_tiny.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs without the project being installed

if TYPE_CHECKING:
    from tools.eval_tiny import Case, Generate

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "config_tiny_t2v.yaml"
VIDEOS = (".mp4", ".mov", ".webm", ".gif")

Block = tuple[str, Sequence[np.ndarray]]  # a caption, and the uint8 pictures (H, W, 3) that stand side by side under it

STRIP = 22  # pixels of a caption's strip, where the caption needs one line
LINE = 16  # and of every further line
MARGIN = 6
TILE_GAP = 3  # between pictures under one caption
GAP = 12  # between columns


def frames_shown(clip: np.ndarray, count: int = 7) -> list[np.ndarray]:
    """``count`` frames of (T, H, W, 3), from the first to the last evenly spaced; of a single frame just that."""
    if len(clip) == 1:
        return [clip[0]]
    return [clip[i] for i in np.linspace(0, len(clip) - 1, count).round().astype(int)]


def around_seam(clip: np.ndarray, count: int = 7) -> list[np.ndarray]:
    """The same of a video that goes round, from its middle over its end and its beginning to its middle."""
    return frames_shown(np.roll(clip, len(clip) // 2, axis=0), count)


def captioned_sheet(blocks: Sequence[Block], columns: int = 1) -> np.ndarray:
    """uint8 (H, W, 3), black on white, ``columns`` blocks beside one another. Raises ValueError for unequal sizes."""
    sizes = {tile.shape for _, tiles in blocks for tile in tiles}
    if len(sizes) != 1:
        raise ValueError(f"the clips have {len(sizes)} sizes, {sorted(sizes)}; a sheet needs clips of one size")
    rows = [blocks[i : i + columns] for i in range(0, len(blocks), columns)]
    most = max(len(tiles) for _, tiles in blocks)
    width = most * blocks[0][1][0].shape[1] + (most - 1) * TILE_GAP
    drawn = []
    for row in rows:
        captions = [_wrap(text, width) for text, _ in row]
        strip_height = STRIP + LINE * (max(len(lines) for lines in captions) - 1)
        cells = [_cell(lines, tiles, width, strip_height) for lines, (_, tiles) in zip(captions, row, strict=True)]
        cells += [np.full_like(cells[0], 255)] * (min(columns, len(blocks)) - len(cells))
        drawn.append(_side_by_side(cells, GAP))
    return np.concatenate(drawn, axis=0)


def _side_by_side(pictures: Sequence[np.ndarray], gap: int) -> np.ndarray:
    white = np.full((len(pictures[0]), gap, 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (white, picture)][1:], axis=1)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=13)


def _wrap(text: str, width: int) -> list[str]:
    """The lines of a caption; a word that is too long for a line gets one of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and _font().getlength(f"{lines[-1]} {word}") <= width - 2 * MARGIN:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or [""]


def _cell(lines: Sequence[str], tiles: Sequence[np.ndarray], width: int, strip_height: int) -> np.ndarray:
    strip = Image.new("RGB", (width, strip_height), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(strip).text((MARGIN, STRIP // 2 + i * LINE), line, fill="black", font=_font(), anchor="lm")
    pictures = _side_by_side(tiles, TILE_GAP)
    pictures = np.pad(pictures, ((0, 0), (0, width - pictures.shape[1]), (0, 0)), constant_values=255)
    return np.concatenate([np.asarray(strip), pictures], axis=0)


def read_block(path: Path, frames: int = 7, source: Path | None = None, seam: bool = False) -> Block:
    """A video's frames, maybe with its seam in the middle, or an image, after the picture that it was made from, and
    the prompt from the JSON beside it, or the file's name where there is none."""
    if path.suffix.lower() in VIDEOS:
        import imageio.v2 as imageio

        with imageio.get_reader(path, format="FFMPEG") as reader:
            clip = np.stack(list(reader.iter_data()))  # type: ignore[attr-defined]
        tiles = around_seam(clip, frames) if seam else frames_shown(clip, frames)
    else:
        tiles = [np.asarray(_read_image(path))]
    if source is not None:
        height, width = tiles[0].shape[:2]
        tiles = [np.asarray(ImageOps.fit(_read_image(source), (width, height))), *tiles]
    facts = path.with_suffix(".json")
    return json.loads(facts.read_text(encoding="utf-8"))["prompt"] if facts.is_file() else path.stem, tiles


def _read_image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def given_block(generate: Generate, case: Case, size: int, frames: int, loop: bool) -> Block:
    """A video of which more than the first frame is given, after the pictures that are: two, or a loop's one."""
    from tools import tiny_world

    given = list(tiny_world.render(case.wanted, 2, size))[: 1 if loop else 2]
    first, *last = (Image.fromarray(picture) for picture in given)
    video = generate(case.text, case.seed, first, **({"loop": True} if loop else {"last_image": last[0]}))
    return case.text, [*given, *frames_shown(np.moveaxis(video.numpy(), 0, -1), frames)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="videos or images")
    parser.add_argument("--sources", nargs="+", type=Path, metavar="IMAGE", help="what each file was made from")
    parser.add_argument("--held_out", type=int, metavar="N", help="generate N of them instead of reading files")
    parser.add_argument("--config", default=CONFIG, help="for --held_out (default: the tiny text to video)")
    parser.add_argument(
        "--given",
        choices=("first", "last", "loop"),
        default="first",
        help="for --held_out of i2v: the first frame alone, the last one too, or that it is to go round",
    )
    parser.add_argument("--frames", type=int, default=7, help="frames of each video (default: %(default)s)")
    parser.add_argument("--seam", action="store_true", help="of loops: from the middle over the seam to the middle")
    parser.add_argument("--columns", type=int, help="files beside one another (default: 1, of --held_out images more)")
    parser.add_argument("--output", type=Path, required=True, help="the PNG to write")
    args = parser.parse_args(arguments)
    if bool(args.files) == bool(args.held_out):
        parser.error("name files, or --held_out N")
    if args.sources is not None and len(args.sources) != len(args.files):
        parser.error(f"{len(args.files)} files and {len(args.sources)} sources: give one source for each file")
    columns = args.columns or 1
    if args.files:
        sources = args.sources or [None] * len(args.files)
        try:
            blocks = [
                read_block(file, args.frames, one, args.seam) for file, one in zip(args.files, sources, strict=True)
            ]
        except (OSError, ValueError) as error:
            parser.error(str(error))
    else:
        from tools import eval_tiny  # not at the top: it draws its own sheets with this module

        pipe, task, size = eval_tiny.load_pipeline(args.config)
        if args.given != "first" and task != "i2v":
            parser.error(f"--given {args.given} is for i2v configs, and {args.config} is for {task}")
        cases, generate = eval_tiny.make_cases(task, args.held_out), eval_tiny.pipeline_caller(pipe)
        if args.given == "first":
            blocks = [
                eval_tiny.sheet_block(result, args.frames) for result in eval_tiny.run_cases(generate, cases, size)
            ]
        else:
            blocks = [given_block(generate, case, size, args.frames, args.given == "loop") for case in cases]
        columns = args.columns or eval_tiny.SHEET_COLUMNS[task]
    try:
        sheet = captioned_sheet(blocks, columns)
    except ValueError as error:  # of several sizes
        parser.error(str(error))
    Image.fromarray(sheet).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
