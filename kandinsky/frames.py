"""How many frames a video has: what is asked for, and what a clip has. Knows numbers and configs."""

from __future__ import annotations

from kandinsky.common.given import as_number, as_whole, shown
from kandinsky.common.limits import MAX_PATCHES
from kandinsky.config.schema import MAX_SECONDS, Config

FPS = 24
FRAMES_PER_LATENT = 4


def wanted_frames(config: Config, seconds: float | None = None, num_frames: int | None = None) -> int:
    """How many frames are asked for where no clip is shorter, 4n + 1; 1 of images. Raises ValueError otherwise."""
    if config.task in ("t2i", "i2i"):
        if (seconds is not None and as_number(seconds) != 0) or (num_frames is not None and as_whole(num_frames) != 1):
            raise ValueError(f"{config.source} makes images: leave the duration out")
        return 1
    if num_frames is not None:
        if seconds is not None:
            raise ValueError("both time_length and num_frames are given: leave one of them out")
        return _with_rate(config, checked_frames(num_frames))
    seconds = config.generation.time_length if seconds is None else seconds
    length = as_number(seconds)
    if not 0 <= length <= MAX_SECONDS:
        given = shown(seconds) if isinstance(seconds, str) else f"{shown(seconds)} s"
        raise ValueError(f"the duration is {given}; it must be a number from 0 (an image) to {MAX_SECONDS} s")
    return _with_rate(config, int(length * FPS) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1)


def _with_rate(config: Config, frames: int) -> int:
    if frames == 1 and config.runtime.fps is not None:
        raise ValueError(f"runtime.fps is {config.runtime.fps}, and a picture has no frames a second: leave it out")
    return frames


def frames_of_clip(found: int, wanted: int, seconds: float | None, num_frames: int | None) -> tuple[int, None]:
    """How many frames are made of a clip: all, at most what the config says, or what is asked for if there are as many
    (its last frame may stand for those that are missing of a latent frame)."""
    longest = -(-(found - 1) // FRAMES_PER_LATENT) * FRAMES_PER_LATENT + 1
    if found < 2 and wanted > 1:
        raise ValueError("the video has one frame: a t2i config takes it as a picture, --image FILE --strength 0.6")
    if wanted > longest and (seconds is not None or num_frames is not None):
        raise ValueError(
            f"the video has {found / FPS:.2f} s and {wanted / FPS:.2f} s are asked for: leave the duration out, or ask "
            f"for at most {(longest - 1) / FPS:.2f}"
        )
    return min(wanted, longest), None


def checked_frames(num_frames: int) -> int:
    longest = (MAX_PATCHES - 1) * FRAMES_PER_LATENT + 1
    frames = as_whole(num_frames)
    if frames is None:
        raise ValueError(f"num_frames is {shown(num_frames)}; it must be a whole number, 4n + 1 up to {longest}")
    if not 1 <= frames <= longest or frames % FRAMES_PER_LATENT != 1:
        nearest = round((min(max(frames, 1), longest) - 1) / FRAMES_PER_LATENT) * FRAMES_PER_LATENT + 1
        raise ValueError(f"num_frames is {shown(frames)}; it must be 4n + 1 up to {longest}: the nearest is {nearest}")
    return frames


def checked_loop(loop: bool) -> bool:
    """Whether a video ends as it begins. Raises ValueError for what is neither."""
    if not isinstance(loop, bool):
        raise ValueError(f"loop is {shown(loop)}; it must be True or False")
    return loop
