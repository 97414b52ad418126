"""Longer videos from Python: the call that people make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky.clips import open_clip
from kandinsky.config.schema import MAX_SECONDS
from kandinsky.frames import FPS
from kandinsky.outputs import media
from kandinsky.outputs.sources import ImageSource, Media, name_of
from kandinsky.pictures import load_image
from kandinsky.serving.longer import resolve_long, rows_of, without_post
from kandinsky.serving.segments import MOST_SEGMENTS, check_folder, make_long, recorded_seed

if TYPE_CHECKING:
    from kandinsky.pipelines.base import Pipeline


def extend_video(
    pipe: Pipeline,
    text: str | None,
    seconds: float | None = None,
    *,
    save_path: str | Path,
    video: str | Path | None = None,
    image: ImageSource | None = None,
    segments: Sequence[Mapping[str, Any]] | None = None,
    overlap: int | None = None,
    colour_match: bool = True,
    resume: bool = False,
    progress: bool = True,
    **wishes: Any,
) -> Path:
    """As `test.py --extend` and `--segments`: a video that goes on, segment after segment; returns its path.

    text: of all segments that have no prompt of their own.
    seconds: so much longer than `video`, or than what is made first; or `segments`, in place of it: for each `prompt`,
        `seconds`, `seed` and `negative_prompt`, all as needed.
    save_path: an MP4. Finished segments lie in a folder beside it until the end, and `resume` goes on with them.
    video: a file or a folder of frames to go on from. image: I2V, without a video: what the first segment begins with.
    overlap: frames that a segment goes on from, 4n + 1. None: 1 of I2V, 5 of T2V.
    colour_match: bring later segments' colours back to the first one's.
    wishes: seed, time_length (of a segment at most), width, height, num_steps and the other numbers of a call.

    Raises ValueError for what can't be, and what a call raises.
    """
    output = Path(save_path)
    media.check_writable(output, media.VIDEO_SUFFIX)
    config, post = without_post(pipe.config)
    pipe = pipe.under(config)
    clip = None if video is None else open_clip(video, FPS, MOST_SEGMENTS * MAX_SECONDS * FPS)
    if (seconds is None) == (segments is None):
        raise ValueError("give how many seconds longer it is to be, or segments, and not both")
    pictures = [] if image is None else [load_image(image)]
    if resume and wishes.get("seed") is None:
        wishes["seed"] = recorded_seed(output)
    long = resolve_long(
        pipe.config,
        text,
        name="seconds" if segments is None else "segments",
        seconds=seconds,
        rows=None if segments is None else rows_of(text, segments),
        clip=clip,
        image=None if image is None else Path(name_of(image)),
        image_sizes=[picture.size for picture in pictures],
        overlap=overlap,
        match_colours=colour_match,
        post=post,
        **wishes,
    )
    check_folder(output, long, pipe.config, resume)
    make_long(pipe, long, Media(pictures, [name_of(image)] if image is not None else []), output, progress)
    return output
