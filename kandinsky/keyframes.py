"""Pictures that a video passes through after its first frame: its last one, a loop's, and any in between.

A latent frame but the first is four frames of video, of which a given picture is meant to be the last. A checkpoint
that was trained for it (`generation.given_frames: any`) is shown the picture and makes the four. Any other one is given
what the VAE makes of the picture alone, which is exactly what it makes of every later latent frame of a video in which
the picture stands still, as the VAE is causal: there it stands still for all four.

Knows pictures, times and configs; knows no models and no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky.common.given import as_number, shown
from kandinsky.config.schema import Config
from kandinsky.frames import FPS, FRAMES_PER_LATENT
from kandinsky.pictures import load_image
from kandinsky.sizes import check_picture

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)
EXPERIMENTAL = (
    "experimental: this checkpoint was trained to be given the first frame alone, and what it makes of others is not "
    "known (generation.given_frames says what a checkpoint was trained with)"
)


@dataclass(frozen=True)
class Keyframe:
    """A picture that a latent frame of every output is. picture: RGB, of any size; None: the one it begins with."""

    name: str
    frame: int  # latent frame, from 1
    picture: Image.Image | None
    origin: str = ""  # the file it comes from


def keyframe_words(words: Sequence[str]) -> list[tuple[float, str]]:
    """(seconds, file) of each "SECONDS:FILE". Raises ValueError for what is none."""
    pairs = []
    for word in words:
        seconds, colon, file = word.partition(":")
        try:
            pairs.append((float(seconds), file))
        except ValueError:
            colon = ""
        if not colon or not file:
            raise ValueError(f"a keyframe is {shown(word)}; it must be SECONDS:FILE, like 2.5:pose.png")
    return pairs


def read_keyframes(
    config: Config,
    num_frames: int,
    last_image: Any = None,
    loop: bool = False,
    keyframes: Mapping[float, Any] | Sequence[tuple[float, Any]] = (),
) -> tuple[Keyframe, ...]:
    """The pictures of a video of `num_frames`, by their time; `keyframes` are (seconds, picture).

    Pictures are what `load_image` takes. Raises ValueError for times that a video doesn't have, for two of one time,
    and where no picture can be given; says so where the checkpoint has not learnt it.
    """
    pairs = list(keyframes.items() if isinstance(keyframes, Mapping) else keyframes)
    if last_image is None and not loop and not pairs:
        return ()
    if config.task != "i2v":
        what = "a last picture" if last_image is not None else "a loop" if loop else "a keyframe"
        raise ValueError(f"{what} goes with i2v configs, whose models are given frames, and this one is {config.task}")
    if num_frames < 1 + FRAMES_PER_LATENT:
        raise ValueError("a picture has no last frame, no loop and no keyframes: leave them out, or ask for a video")
    if loop and last_image is not None:
        raise ValueError("a loop ends with the picture it begins with: leave the last picture out, or the loop")
    last = (num_frames - 1) // FRAMES_PER_LATENT
    if loop and last < 2:
        raise ValueError("a loop has at least 9 frames, 0.34 s: ask for a longer one")
    found = [
        _read(f"keyframe at {as_number(seconds):g} s", _latent_frame_at(seconds, num_frames), picture)
        for seconds, picture in pairs
    ]
    if last_image is not None:
        found.append(_read("last frame", last, last_image))
    if loop:
        found.append(Keyframe("first frame again", last, None))
    found.sort(key=lambda keyframe: keyframe.frame)
    for one, other in pairwise(found):
        if one.frame == other.frame:
            raise ValueError(
                f"{one.name} and {other.name} are of the same four frames, as they lie together in the latents: leave "
                "one of them out, or move it by 0.17 s"
            )
    if config.generation.given_frames == "first":
        logger.warning(EXPERIMENTAL)
    return tuple(found)


def _latent_frame_at(seconds: float, num_frames: int) -> int:
    longest = (num_frames - 1) / FPS
    frame = round(time * FPS) if 0 <= (time := as_number(seconds)) <= longest + 0.5 / FPS else -1
    if not 0 < frame < num_frames:
        what = "is the picture that the video begins with, --image" if frame == 0 else "is not in the video"
        raise ValueError(f"a keyframe at {shown(seconds)} s {what}: give one from {1 / FPS:.2f} to {longest:.2f} s")
    return -(-frame // FRAMES_PER_LATENT)


def _read(name: str, frame: int, source: Any) -> Keyframe:
    try:
        picture = load_image(source)
        check_picture(picture.size)
    except ValueError as error:
        raise ValueError(f"the {name}: {error}") from None
    return Keyframe(name, frame, picture, str(source) if isinstance(source, str | Path) else "")
