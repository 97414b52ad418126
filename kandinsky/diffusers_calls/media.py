"""Pictures in and videos out, by the names and arguments that diffusers.utils has for them.

Knows addresses, files and pixels; knows no models, and imports no torch.
"""

from __future__ import annotations

import io
import logging
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from kandinsky import pictures
from kandinsky.common.given import as_number, shortened, shown
from kandinsky.outputs import media

logger = logging.getLogger(__name__)

MAX_BYTES = 100_000_000  # of a picture that is fetched
TIMEOUT = 30  # seconds without an answer
LARGEST_CRF = 51  # of x264: the worst


def load_image(
    image: str | Path | Image.Image, convert_method: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """A picture from a file, an http or https address, or as it is given: upright RGB in sRGB.

    convert_method: called with that picture; what it returns is returned.
    Raises ValueError for what can't be fetched or read.
    """
    if isinstance(image, str) and image.lower().startswith(("http://", "https://")):
        content = io.BytesIO(_fetched(image))
        try:
            with Image.open(content, formats=pictures.FORMATS) as opened:
                picture = pictures.load_image(opened)
        except OSError as error:  # what is there is no picture
            raise ValueError(f"{shortened(image)} is no picture that can be read ({shortened(str(error))})") from None
    else:
        picture = pictures.load_image(image)
    return picture if convert_method is None else convert_method(picture)


def _fetched(address: str) -> bytes:
    request = urllib.request.Request(address, headers={"User-Agent": "kandinsky"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            content: bytes = answer.read(MAX_BYTES + 1)
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise ValueError(f"{shortened(address)} can't be fetched ({shortened(str(error))}): give a file") from None
    if len(content) > MAX_BYTES:
        raise ValueError(f"{shortened(address)} has more than {MAX_BYTES // 10**6} MB: scale the picture down")
    return content


def export_to_video(
    video_frames: Sequence[Image.Image] | Sequence[np.ndarray] | np.ndarray,
    output_video_path: str | Path | None = None,
    fps: float = 10,
    quality: float | None = 5.0,
    bitrate: int | None = None,
    macro_block_size: int | None = 16,
) -> str:
    """Write frames as an MP4, and return its path: PIL pictures, or float arrays (height, width, 3) from 0 to 1.

    output_video_path: None: a new file in the folder for temporary ones. quality: 0 to 10; 10 is lossless but for
    colour, and None is this project's own. macro_block_size: both sides have to be multiples of it, as those of videos
    of these models are; nothing is stretched.

    Raises ValueError for frames and numbers that are none of that, and for a bitrate, which is not offered.
    """
    if bitrate is not None:
        raise ValueError(f"bitrate is {shown(bitrate)}: videos are written at a quality (0 to 10) only, leave it out")
    crf = media.CRF
    if quality is not None:
        if not 0 <= as_number(quality) <= 10:
            raise ValueError(f"quality is {shown(quality)}; it must be from 0 to 10")
        crf = int((1 - as_number(quality) / 10) * LARGEST_CRF)
    frames = list(video_frames)
    if not frames or not all(isinstance(frame, Image.Image | np.ndarray) for frame in frames):
        raise ValueError("video_frames must be PIL pictures or arrays (height, width, 3), at least one")
    if len({np.shape(frame) for frame in frames}) > 1:
        raise ValueError("video_frames are of several sizes: all of a video's are alike")
    video = np.stack([_levels(frame) for frame in frames])
    height, width = video.shape[1:3]
    if macro_block_size and (height % macro_block_size or width % macro_block_size):
        raise ValueError(f"{width}x{height} are no multiples of macro_block_size = {macro_block_size}: give 1 or 2")
    if output_video_path is None:
        output_video_path = Path(tempfile.mkdtemp(prefix="kandinsky_")) / "video.mp4"
    media.write_video(video, output_video_path, fps=fps, crf=crf)
    return str(output_video_path)


def _levels(frame: Image.Image | np.ndarray) -> np.ndarray:
    """uint8 (height, width, 3)."""
    if isinstance(frame, Image.Image):
        return np.asarray(frame.convert("RGB"))
    if frame.dtype == np.uint8:
        return frame
    if not np.issubdtype(frame.dtype, np.floating) or not np.isfinite(frame).all():
        raise ValueError(f"a frame is an array of {frame.dtype}; it must be finite floats from 0 to 1, or uint8")
    return (frame.clip(0, 1) * 255).round().astype(np.uint8)
