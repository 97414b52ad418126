"""From what is asked for to a long video with nothing left open: the requests of its segments (segments.py).

Knows configs, clips that were looked at, and rows; knows no flags, no fields of HTTP, and no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from kandinsky.clips import Clip
from kandinsky.common.given import shortened
from kandinsky.config.reading import with_settings
from kandinsky.config.schema import Config
from kandinsky.frames import wanted_frames
from kandinsky.outputs.post import Post
from kandinsky.request import MAX_SEED, Request, checked_seed, resolve_request
from kandinsky.serving.prompts_file import nearest
from kandinsky.serving.segments import (
    MOST_SEGMENTS,
    OVERLAPS,
    LongVideo,
    Part,
    added_frames,
    checked_overlap,
    divided,
    request_of,
)
from kandinsky.sizes import check_picture, size_for_video

OF_A_SEGMENT = ("prompt", "seconds", "seed", "negative_prompt")
NO_POST = Post()
Rows = Sequence[tuple[str, Mapping[str, Any]]]  # what messages call a segment, and what it says


def without_post(config: Config) -> tuple[Config, Post]:
    """The config that segments are made with, and what is done to the whole that they make."""
    return with_settings(config, runtime=vars(NO_POST)), Post.of(vars(config.runtime))


def rows_of(text: str | None, segments: Sequence[Mapping[str, Any]]) -> Rows:
    """The rows of segments that have no names of their own; text: of those that have no prompt of their own."""
    return [(f"segment {number}", {"prompt": text, **row}) for number, row in enumerate(segments, 1)]


@contextmanager
def told_of(label: str) -> Iterator[None]:
    """Has a ValueError say what it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None


def resolve_long(
    config: Config,
    text: str | None,
    *,
    name: str,
    seconds: float | None = None,
    rows: Rows | None = None,
    clip: Clip | None = None,
    image: Path | None = None,
    image_sizes: Sequence[tuple[int, int]] = (),
    overlap: int | None = None,
    match_colours: bool = True,
    post: Post = NO_POST,
    seed: int | None = None,
    time_length: float | None = None,
    **wishes: Any,
) -> LongVideo:
    """So many further seconds of one prompt, or the segments of `rows`; after a clip, or from the beginning.

    name: what its user calls this, for messages. image: the file that the first segment begins with, where there is no
    clip; image_sizes: its size. time_length: of a segment at most. post: what is done to the whole. wishes: of all
    segments, as `resolve_request` has them. Raises ValueError that says what was given, what is allowed and what to do.
    """
    if config.task not in OVERLAPS:
        raise ValueError(f"{name} makes videos longer, and {config.source} is for {config.task}: leave it out")
    if time_length == 0:
        raise ValueError(f"a duration of 0 makes a picture, and {name} a longer video: leave one of them out")
    if clip is not None:
        if image_sizes:
            raise ValueError("the video's last frame is what goes on: leave the picture or the video out")
        check_picture(clip.size)
    there = checked_overlap(config.task, overlap, None if clip is None else clip.frames)
    has_clip, requests = clip is not None, list[Request]()
    if rows is None:
        parts = _equal_parts(config, text, added_frames(seconds, name), there, has_clip, time_length, seed)
    else:
        parts = _listed_parts(config, rows, there, has_clip, time_length, seed)
    if not parts:
        raise ValueError(f"{name} 0 adds nothing to the video: say how many seconds it is to be longer")
    size = wishes.pop("width", None), wishes.pop("height", None)
    if clip is None:
        own: dict[str, Any] = {"seed": parts[0].seed, "num_frames": parts[0].frames + 1}
        if parts[0].negative is not None:
            own["negative_caption"] = parts[0].negative
        sides = {"width": size[0], "height": size[1]}
        first = resolve_request(config, parts[0].text, image_sizes=image_sizes, **{**wishes, **sides, **own})
        there = checked_overlap(config.task, overlap, first.num_frames)
        requests, size, seed = [first], (first.width, first.height), first.samples[0].seed
    elif None in size:
        if size != (None, None):
            raise ValueError("width and height belong together here: give both, or neither for the video's own size")
        size = size_for_video(clip.size, config)
    for number, part in enumerate(parts[len(requests) :], len(requests)):
        if part.seed is None and seed is not None:
            part = dataclasses.replace(part, seed=(seed + number) % (MAX_SEED + 1))
        with nullcontext() if rows is None else told_of(rows[number][0]):
            request = request_of(config, part, size, there, **wishes)
        requests.append(request)
        if seed is None:
            seed = request.samples[0].seed
    return LongVideo(tuple(requests), there, match_colours, clip, None if has_clip else image, post)


def _equal_parts(
    config: Config, text: str | None, frames: int, overlap: int, has_clip: bool, longest: float | None, seed: int | None
) -> list[Part]:
    """Of one prompt. The first one's frames are without the very first frame, where nothing is before it."""
    lengths = divided(config, frames, overlap, longest) if frames else []
    lengths = lengths if has_clip else [wanted_frames(config, longest) - 1, *lengths]
    return [Part(text, length, seed if i == 0 else None) for i, length in enumerate(lengths)]


def _listed_parts(
    config: Config, rows: Rows, overlap: int, has_clip: bool, longest: float | None, seed: int | None
) -> list[Part]:
    parts: list[Part] = []
    if len(rows) > MOST_SEGMENTS:
        raise ValueError(f"there are {len(rows)} segments; at most {MOST_SEGMENTS} are made")
    usual = wanted_frames(config, longest)
    for label, values in rows:
        if others := sorted(set(values) - set(OF_A_SEGMENT)):
            near = nearest(others[0], OF_A_SEGMENT)
            advice = "" if near is None else f"; did you mean {near}?"
            given = shortened(others[0])
            raise ValueError(
                f"{label}: a segment has prompt, seconds, seed and negative_prompt, and no {given}{advice}"
            )
        if values.get("prompt") is None:
            raise ValueError(f"{label}: there is no prompt: say what to show")
        frames = usual - (overlap if parts or has_clip else 1)
        if "seconds" in values:
            frames = added_frames(values["seconds"], f"{label}: seconds")
        own = values.get("seed", seed if not parts else None)
        with told_of(label):
            own = None if own is None else checked_seed(own)
            parts.append(Part(values["prompt"], frames, own, values.get("negative_prompt")))
    return parts
