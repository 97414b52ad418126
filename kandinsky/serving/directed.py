"""What a job has besides words, numbers and the picture that it begins with: a video and a mask, further pictures,
segments, and what is done to its frames afterwards.

Everything is checked before a job is queued, with the command line's words; files were uploaded and lie in a folder,
and what is wrong with them is told by their names alone. Knows configs and files; knows no HTTP, no rows and no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky.clips import open_clip
from kandinsky.common.given import as_number, shown
from kandinsky.config.reading import with_settings
from kandinsky.config.schema import Config
from kandinsky.frames import FPS
from kandinsky.keyframes import Keyframe, read_keyframes
from kandinsky.outputs.post import Post
from kandinsky.outputs.sources import Media, open_source, read_mask, read_source
from kandinsky.request import MAX_SEED, Request, recorded_request, resolve_request
from kandinsky.serving.limits import Limits
from kandinsky.serving.longer import resolve_long, rows_of, without_post
from kandinsky.serving.segments import LongVideo

if TYPE_CHECKING:
    from PIL import Image

Files = Mapping[str, Sequence[Path]]  # by field
NOT_OF_SEGMENTS = ("strength", "loop", "keyframe_seconds", "mask", "last_image", "keyframe")


@dataclass(frozen=True)
class Extras:
    """Of an order; nothing of most.

    files: (field, what its client calls it), in order. keyframe_seconds: one a file of "keyframe". further: of a longer
    video the requests of the segments after the first, `overlap` frames of which are there already.
    """

    files: tuple[tuple[str, str], ...] = ()
    keyframe_seconds: tuple[float, ...] = ()
    further: tuple[Request, ...] = ()
    is_long: bool = False
    overlap: int = 0
    colour_match: bool = True
    fps: int | None = None
    upscale: int = 1

    @property
    def as_dict(self) -> dict[str, Any]:
        """What differs from nothing, as JSON keeps it."""
        values = dataclasses.asdict(self)
        return {field.name: values[field.name] for field in dataclasses.fields(self) if self._differs(field)}

    def _differs(self, field: dataclasses.Field[Any]) -> bool:
        return bool(getattr(self, field.name) != field.default)

    @property
    def has_clip(self) -> bool:
        return any(name == "video" for name, _ in self.files)

    def with_seeds(self, more: int) -> Extras:
        """Of a later output of one request: seeds count up."""
        further = tuple(with_seed(request, more) for request in self.further)
        return dataclasses.replace(self, further=further)


NOTHING_MORE = Extras()


def with_seed(request: Request, more: int) -> Request:
    (sample,) = request.samples
    seed = ((sample.seed or 0) + more) % (MAX_SEED + 1)
    return dataclasses.replace(request, samples=(dataclasses.replace(sample, seed=seed),))


def extras_from(values: Mapping[str, Any], config: Config) -> Extras:
    """What `as_dict` made of one and JSON kept. Raises ValueError where it is none of this config."""
    further = tuple(recorded_request(one, config) for one in values.get("further", []))
    lists = {name: tuple(map(tuple, values[name])) for name in ("files",) if name in values}
    seconds = tuple(values.get("keyframe_seconds", ()))
    return Extras(**{**values, **lists, "further": further, "keyframe_seconds": seconds})


def total_seconds(request: Mapping[str, Any], extras: Mapping[str, Any]) -> float:
    """How long the output of a row's request is."""
    frames = request["num_frames"] - (extras.get("overlap", 0) if is_after_a_clip(extras) else 1)
    frames += sum(one["num_frames"] - extras["overlap"] for one in extras.get("further", []))
    return float(frames) / FPS


def is_after_a_clip(extras: Mapping[str, Any]) -> bool:
    """Whether all segments go on from something, the first too."""
    return bool(extras.get("is_long")) and any(field == "video" for field, _ in extras.get("files", []))


def settings_of_extras(request: Mapping[str, Any], extras: Mapping[str, Any]) -> dict[str, Any]:
    """What makes them again, under the names of a request's fields, of what there is; files are not among it."""
    fields = [field for field, _ in extras.get("files", [])]
    found: dict[str, Any] = {name: extras[name] for name in ("fps", "upscale", "keyframe_seconds") if name in extras}
    if request["loop"]:
        found["loop"] = True
    if extras.get("is_long"):
        overlap = extras["overlap"]
        before = overlap if is_after_a_clip(extras) else 1
        found["segments"] = [
            _row(one, overlap if number else before) for number, one in enumerate([request, *extras.get("further", [])])
        ]
        found |= {"overlap": overlap, "colour_match": extras.get("colour_match", True)}
    elif "video" in fields or request["strength"] != 1 or "mask" in fields:
        found["strength"] = request["strength"]
    return found


def _row(request: Mapping[str, Any], before: int) -> dict[str, Any]:
    (sample,) = request["samples"]
    seconds = (request["num_frames"] - before) / FPS
    return {
        "prompt": sample["text"],
        "seconds": seconds,
        "seed": sample["seed"],
        "negative_prompt": sample["negative_caption"],
    }


# --- from what is asked for -------------------------------------------------------------------------------------------


@contextmanager
def told_by_names(files: Files) -> Iterator[None]:
    """No folder of these files stands in a ValueError from within: their client knows names."""
    try:
        yield
    except ValueError as error:
        words = str(error)
        for path in (path for paths in files.values() for path in paths):
            words = words.replace(f"{path.parent}/", "")
        raise ValueError(words) from None


def resolve(
    config: Config,
    text: str | None,
    picture: tuple[int, int] | None,
    fields: Mapping[str, Any],
    files: Files,
    names: Sequence[tuple[str, str]],
    wishes: Mapping[str, Any],
    limits: Limits,
) -> tuple[Request, Extras]:
    """The request that fields come to, and what it has besides; `names` as in `Extras`. Raises ValueError for what is
    wrong, to be `told_by_names`."""
    post = {name: fields[name] for name in ("fps", "upscale") if name in fields}
    for name, value in post.items():
        if isinstance(value, str):
            raise ValueError(f"{name} is {shown(value)}; it must be a whole number")
    config = with_settings(config, runtime=post)
    for name in ("video", "mask", "last_image"):
        if len(files.get(name, ())) > 1:
            raise ValueError(f"{len(files[name])} files are sent as {name}: give one")
    extras = Extras(tuple(names), **post)
    sizes = [] if picture is None else [picture]
    if fields.get("extend") is not None or fields.get("segments") is not None:
        video = _resolve_long(config, text, sizes, fields, files, wishes, limits)
        return video.requests[0], dataclasses.replace(
            extras,
            is_long=True,
            further=video.requests[1:],
            overlap=video.overlap,
            colour_match=video.match_colours,
        )
    for name in ("overlap", "colour_match"):
        if name in fields:
            raise ValueError(f"{name} is about segments: give extend or segments")
    if text is None:
        raise ValueError("there is no prompt: say what to show")
    clip = None
    for path in files.get("video", ()):
        clip = open_source(config, path, wishes.get("time_length"))
    size = None if clip is None else (*clip.size, clip.frames)
    has_mask = bool(files.get("mask"))
    request = resolve_request(config, text, image_sizes=sizes, clip=size, mask=has_mask, **wishes)
    seconds = _checked_times(fields, len(files.get("keyframe", ())))
    _keyframes(config, request, seconds, files)
    for path in files.get("mask", ()):
        read_mask(request, path)  # what is wrong with it is to be told now
    return request, dataclasses.replace(extras, keyframe_seconds=seconds)


def _resolve_long(
    config: Config,
    text: str | None,
    sizes: Sequence[tuple[int, int]],
    fields: Mapping[str, Any],
    files: Files,
    wishes: Mapping[str, Any],
    limits: Limits,
) -> LongVideo:
    name = "segments" if fields.get("segments") is not None else "extend"
    if name == "segments" and fields.get("extend") is not None:
        raise ValueError("segments have their own seconds: leave extend out")
    for other in NOT_OF_SEGMENTS:
        if other in fields or files.get(other):
            raise ValueError(f"{other} is about one video that another one is made of: leave it or {name} out")
    if name == "extend" and text is None:
        raise ValueError("there is no prompt: say what to show")
    clip, rows, most = None, None, limits.clip_seconds * FPS
    for path in files.get("video", ()):
        clip = open_clip(path, FPS, most + 1)
        if clip.frames > most:
            raise ValueError(
                f"the video is longer than {limits.clip_seconds} s, which is what this server goes on from"
            )
    if name == "segments":
        given = fields["segments"]
        if len(given) > limits.segments:
            raise ValueError(f"there are {len(given)} segments; this server makes at most {limits.segments} in a job")
        rows = rows_of(text, given)
    video = resolve_long(
        config,
        text,
        name=name,
        seconds=fields.get("extend"),
        rows=rows,
        clip=clip,
        image_sizes=sizes,
        overlap=fields.get("overlap"),
        match_colours=fields.get("colour_match", True),
        **wishes,
    )
    if len(video.requests) > limits.segments:
        raise ValueError(
            f"that would be {len(video.requests)} segments; this server makes at most {limits.segments} in a job"
        )
    return video


def _checked_times(fields: Mapping[str, Any], count: int) -> tuple[float, ...]:
    """As many as there are keyframes; whether the video has them is for `read_keyframes` to say."""
    times = fields.get("keyframe_seconds", [])
    if len(times) != count or not all(math.isfinite(as_number(one)) for one in times):
        raise ValueError(
            f"keyframe_seconds is {shown(times)}, and {count} pictures are sent as keyframe: give the time of each, in "
            "seconds, in the same order"
        )
    return tuple(map(as_number, times))


def _keyframes(config: Config, request: Request, seconds: Sequence[float], files: Files) -> tuple[Keyframe, ...]:
    last = next(iter(files.get("last_image", ())), None)
    pairs = list(zip(seconds, files.get("keyframe", ()), strict=True))
    return read_keyframes(config, request.num_frames, last, request.loop, pairs)


# --- to what pipelines take -------------------------------------------------------------------------------------------


def given_media(
    config: Config,
    request: Request,
    extras: Extras,
    pictures: Sequence[Image.Image],
    names: Sequence[str],
    files: Files,
) -> tuple[Media, tuple[Keyframe, ...]]:
    """What a request of one piece is given, read. pictures, names: the one that it begins with, if there is one."""
    clients = dict(extras.files)
    clip = None
    for path in files.get("video", ()):
        clip = open_source(config, path, num_frames=request.num_frames)
    source = read_source(request, clip, pictures if config.task == "t2i" else [])
    mask = next((read_mask(request, path) for path in files.get("mask", ())), None)
    keyframes = tuple(
        dataclasses.replace(one, origin=Path(one.origin).name if one.origin else "")
        for one in _keyframes(config, request, extras.keyframe_seconds, files)
    )
    if source is None:
        return Media(pictures, names), keyframes
    return Media((), names, source, names[0] if clip is None else clients["video"], mask), keyframes


def long_video(config: Config, request: Request, extras: Extras, image: Path | None, files: Files) -> LongVideo:
    """The same of a request of segments."""
    clip = next((open_clip(path, FPS, 10**6) for path in files.get("video", ())), None)
    return LongVideo(
        (request, *extras.further),
        extras.overlap,
        extras.colour_match,
        clip,
        None if clip is not None else image,
        Post(extras.fps or config.runtime.fps, _upscale(config, extras), config.runtime.upscaler),
    )


def _upscale(config: Config, extras: Extras) -> int:
    return extras.upscale if extras.upscale != 1 else config.runtime.upscale


def post_settings(config: Config, extras: Extras) -> Config:
    """The config of the pipeline that makes an order: segments are processed once they are joined."""
    if extras.is_long:
        return without_post(config)[0]
    post = {"fps": extras.fps or config.runtime.fps, "upscale": _upscale(config, extras)}
    return with_settings(config, runtime=post)
