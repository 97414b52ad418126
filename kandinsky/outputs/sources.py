"""What sampling starts from, and where it may change: files become frames and masks at a request's size.

Knows requests, clips and pictures; knows no models and no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from kandinsky.clips import PICTURES, Clip, open_clip, read_clip
from kandinsky.config.schema import Config
from kandinsky.frames import FPS, wanted_frames
from kandinsky.outputs.media import fit_image
from kandinsky.pictures import load_image
from kandinsky.request import Request, resolve_request

if TYPE_CHECKING:
    from PIL import Image

ImageSource: TypeAlias = "str | Path | Image.Image | np.ndarray"


@dataclass(frozen=True)
class Media:
    """The pictures and frames of a call, read; fields of `Inputs` (pipelines/inputs.py), which has more."""

    images: Sequence[Image.Image] = ()  # RGB
    image_names: Sequence[str] = ()  # for the record
    source: np.ndarray | None = None  # uint8 (frames, height, width, 3) at the request's size, to start from
    source_name: str = ""
    mask: np.ndarray | None = None  # uint8 (1 or frames, height, width), 255 where something may change
    # As `source`: 4n + 1 frames that the video begins with and that are there already.
    overlap: np.ndarray | None = None


def resolve_media(
    config: Config,
    text: str | Sequence[str] | None,
    images: Sequence[ImageSource] = (),
    video: str | Path | None = None,
    mask: str | Path | None = None,
    **wishes: Any,
) -> tuple[Request, Media]:
    """`resolve_request` of what is asked for, with what its files are; `wishes` are its further arguments.

    Raises ValueError for files that can't be read, and for what doesn't go together.
    """
    pictures, names = [load_image(image) for image in images], [name_of(image) for image in images]
    clip = None
    if video is not None:
        clip = open_source(config, video, wishes.get("time_length"), wishes.get("num_frames"))
    request = resolve_request(
        config,
        text,
        image_sizes=[picture.size for picture in pictures],
        clip=None if clip is None else (*clip.size, clip.frames),
        mask=mask is not None,
        **wishes,
    )
    source = read_source(request, clip, pictures if config.task == "t2i" else [])
    if source is None:
        return request, Media(pictures, names)
    name = names[0] if clip is None else str(video)
    return request, Media((), names, source, name, None if mask is None else read_mask(request, mask))


def name_of(image: ImageSource) -> str:
    """What the record says about a picture: its path, or that it came without one."""
    return str(image) if isinstance(image, str | Path) else "given without a file name"


def open_source(
    config: Config, path: str | Path, time_length: float | None = None, num_frames: int | None = None
) -> Clip:
    """A video to start from, looked at as far as is asked for. Raises ValueError for what can't be read."""
    return open_clip(path, FPS, max(2, wanted_frames(config, time_length, num_frames)))


def read_source(request: Request, clip: Clip | None, pictures: Sequence[Image.Image]) -> np.ndarray | None:
    """uint8 (frames, height, width, 3) at the request's size: of a clip, or of the picture that t2i starts from."""
    if clip is not None:
        return read_clip(clip, request.num_frames, request.width, request.height)
    return np.asarray(fit_image(pictures[0], request.width, request.height))[None] if pictures else None


def read_mask(request: Request, path: str | Path) -> np.ndarray:
    """uint8 (1 or frames, height, width), white where something may change: of a picture, of a video or of a folder."""
    path, size = Path(path), (request.width, request.height)
    if path.suffix.lower() in PICTURES and not path.is_dir():
        return np.array(fit_image(load_image(path), *size).convert("L"))[None]
    try:
        clip = open_clip(path, FPS, request.num_frames)
    except ValueError as error:
        raise ValueError(f"the mask: {error}, or one picture ({', '.join(PICTURES)})") from None
    if clip.frames + 3 < request.num_frames:
        raise ValueError(
            f"the mask {path} has {clip.frames} frames at {FPS} a second, and the video {request.num_frames}: give one "
            "a frame, or one picture for all"
        )
    grey = read_clip(clip, request.num_frames, *size).astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return grey.round().clip(0, 255).astype(np.uint8)
