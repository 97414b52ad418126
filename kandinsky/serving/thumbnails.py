"""A small picture of each output, made when somebody asks for it the first time and kept beside it."""

from __future__ import annotations

import threading
from pathlib import Path

from PIL import Image

from kandinsky.common.writing import atomic_path
from kandinsky.outputs.media import IMAGE_SUFFIX

SUFFIX = ".thumbnail.webp"
SIDE = 320  # pixels, of the longer side

_one_at_a_time = threading.Lock()  # each takes a process of ffmpeg


def thumbnail_of(output: Path) -> Path:
    """Where an output's thumbnail lies now. Raises ValueError where there is no output that can be read."""
    path = output.with_suffix(SUFFIX)
    with _one_at_a_time:
        if not path.exists():
            try:
                picture = Image.open(output) if output.suffix == IMAGE_SUFFIX else _middle(output)
                picture.thumbnail((SIDE, SIDE))
            except (OSError, RuntimeError, StopIteration):  # Pillow's and ffmpeg's; or it is gone
                raise ValueError("there is no thumbnail: the output is damaged, or was removed") from None
            with atomic_path(path) as temporary:
                picture.save(temporary, format="WEBP", quality=80)
    return path


def _middle(video: Path) -> Image.Image:
    """The frame in the middle of a video. Raises RuntimeError or StopIteration where there is none."""
    import imageio_ffmpeg

    seconds = imageio_ffmpeg.count_frames_and_secs(str(video))[1]
    frames = imageio_ffmpeg.read_frames(str(video), input_params=["-ss", f"{seconds / 2:.3f}"])
    try:
        size = next(frames)["size"]
        return Image.frombytes("RGB", size, next(frames))
    finally:
        frames.close()
