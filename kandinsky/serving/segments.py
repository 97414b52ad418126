"""One long video, segment after segment: each goes on from the last frames of what is there.

A model that begins with a picture is given the last frame as that. One that knows text alone has the latents of the
last frames held at every step (`overlap_items` in sampling/conditioning.py). The frames that a segment goes on from are
no part of what it adds, so none is there twice. Its colours are brought back to those of the first segment
(outputs/colour.py).

Every segment that is finished lies in a folder beside the output: its MP4, its record, and its last frames as they were
before they were compressed. What was stopped goes on from there. At the end the MP4s' streams are joined as they are,
so that no more than a segment is ever in memory. Knows pipelines by what they can be called for.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from kandinsky.clips import Clip, iterate_clip
from kandinsky.common.given import as_number, as_whole, shown
from kandinsky.common.writing import atomic_path
from kandinsky.config.reading import config_to_dict
from kandinsky.config.schema import MAX_SECONDS, Config
from kandinsky.frames import FPS, FRAMES_PER_LATENT, wanted_frames
from kandinsky.outputs import media
from kandinsky.outputs.colour import Colours, Tally, colours_of, corrected
from kandinsky.outputs.post import Post, iter_of, open_video, processed
from kandinsky.outputs.sources import Media
from kandinsky.request import Request, resolve_request
from kandinsky.serving.unfinished import what_is_left, without_runtime

if TYPE_CHECKING:
    from kandinsky.pipelines.base import Pipeline
    from kandinsky.pipelines.parts import StepCallback

SegmentCallback: TypeAlias = "Callable[[int], StepCallback]"
logger = logging.getLogger(__name__)

# Frames that a segment goes on from, by task. A picture is what I2V models were trained with; several frames tell a
# T2V model of motion too.
OVERLAPS = {"i2v": 1, "t2v": 5}
HOW = {
    "i2v": "image to video from the last frame",
    "t2v": "text to video with the latents of the last frames held",
}
MOST_SEGMENTS = 1000
MOST_SECONDS = MOST_SEGMENTS * MAX_SECONDS  # of all of them
MOST_OVERLAP = (MAX_SECONDS * FPS - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1  # frames
DESCRIPTION = "segments.json"  # in the folder: what is being made


@dataclass(frozen=True)
class Part:
    """A segment as it is asked for; frames: that it adds."""

    text: str | None
    frames: int
    seed: int | None = None
    negative: str | None = None

    def __post_init__(self) -> None:
        if not FRAMES_PER_LATENT <= self.frames <= MAX_SECONDS * FPS:
            raise ValueError(
                f"a segment of {self.frames / FPS:.2f} s is asked for; it must be from {FRAMES_PER_LATENT / FPS:.2f} "
                f"to {MAX_SECONDS} s"
            )


@dataclass(frozen=True)
class LongVideo:
    """What is to be made, with nothing left open.

    requests: of each segment, one sample each; but for a first one that nothing is before, their frames begin with the
    `overlap` frames that are there. clip: what is there before them, brought to their size; image: the file that the
    first of them begins with. post: what is done to the whole; the pipeline that makes it does none of that.
    """

    requests: tuple[Request, ...]
    overlap: int
    match_colours: bool = True
    clip: Clip | None = None
    image: Path | None = None
    post: Post = field(default_factory=Post)

    @property
    def largest(self) -> Request:
        """What has to fit: segments are made one after the other."""
        return max(self.requests, key=lambda one: one.num_frames)

    def overlap_of(self, number: int) -> int:
        """How many frames the segment `number`, from 0, goes on from."""
        return self.overlap if number or self.clip is not None else 0


@dataclass(frozen=True)
class End:
    """The last frames of a segment, uint8 (T, H, W, 3), and the colours of all of it."""

    frames: np.ndarray
    colours: Colours


def checked_overlap(task: str, overlap: int | None, there: int | None) -> int:
    """How many frames each segment goes on from, of `there` that there are. Raises ValueError for what can't be."""
    if overlap is None:
        overlap = OVERLAPS[task] if there is None else min(OVERLAPS[task], (there - 1) // 4 * 4 + 1)
    count = as_whole(overlap)
    if count is None or not 1 <= count <= MOST_OVERLAP or count % FRAMES_PER_LATENT != 1:
        raise ValueError(
            f"the overlap is {shown(overlap)}; it must be 1, 5, 9 or another 4n + 1 frames up to {MOST_OVERLAP}, fewer "
            "than a segment has"
        )
    if there is not None and count > there:
        raise ValueError(f"the overlap is {count} frames, and there are {there}: ask for fewer")
    return count


def added_frames(seconds: object, what: str) -> int:
    """Whole latent frames in that time. Raises ValueError for what is none."""
    length = as_number(seconds)
    if not 0 <= length <= MOST_SECONDS:
        raise ValueError(f"{what} is {shown(seconds)}; it must be a number of seconds from 0 to {MOST_SECONDS}")
    frames = int(length * FPS) // FRAMES_PER_LATENT * FRAMES_PER_LATENT
    if length > 0 and not frames:
        raise ValueError(f"{what} is {length:g}; the least that can be added is 4 frames, 0.17 s")
    return frames


def divided(config: Config, frames: int, overlap: int, longest: float | None = None) -> list[int]:
    """So many further frames in segments of about the same length, none longer than the config's duration or
    `longest` seconds, what they go on from included."""
    most = wanted_frames(config, longest) - overlap
    if most < FRAMES_PER_LATENT:
        raise ValueError(
            f"a segment of {most + overlap} frames that goes on from {overlap} adds nothing: ask for a longer duration "
            "(--video_duration) or a smaller overlap"
        )
    count = -(-frames // most)
    if count > MOST_SEGMENTS:
        raise ValueError(f"that would be {count} segments; at most {MOST_SEGMENTS} are made: ask for less")
    latents = frames // FRAMES_PER_LATENT
    ends = [latents * i // count for i in range(1, count + 1)]
    return [FRAMES_PER_LATENT * (end - start) for start, end in zip([0, *ends], ends, strict=False)]


def request_of(config: Config, part: Part, size: tuple[int, int], overlap: int, **wishes: Any) -> Request:
    """The request of a segment that goes on from `overlap` frames of a size. Raises ValueError for what can't be."""
    frames = part.frames + overlap
    if not part.frames >= FRAMES_PER_LATENT or frames > MAX_SECONDS * FPS + 1:
        raise ValueError(
            f"a segment of {part.frames / FPS:.2f} s; with what it goes on from it may have up to {MAX_SECONDS} s"
        )
    pictures = [size] if config.task == "i2v" else []
    wishes |= {"width": size[0], "height": size[1], "num_frames": frames, "seed": part.seed}
    if part.negative is not None:
        wishes["negative_caption"] = part.negative
    return resolve_request(config, part.text, image_sizes=pictures, **wishes)


# --------------------------------------------------------------------------------------------------- what is on disk


def folder_of(output: Path) -> Path:
    """Where the segments of an output lie until it is there: long.mp4 -> long.segments/."""
    return output.with_suffix(".segments")


def recorded_seed(output: Path) -> int | None:
    """The seed of the first segment of what was begun of an output; None where nothing was."""
    try:
        description = json.loads((folder_of(output) / DESCRIPTION).read_text(encoding="utf-8"))
        seed = as_whole(description["requests"][0]["samples"][0]["seed"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return seed


def check_folder(output: Path, video: LongVideo, config: Config, resume: bool) -> None:
    """Raise ValueError where something is in the way of the segments of `output`, or they are of another video."""
    folder = folder_of(output)
    if not folder.exists():
        return
    if not resume:
        raise ValueError(
            f"{folder} has segments of a run that was stopped: --resume goes on with it; to begin anew, remove the "
            "folder, or take another name"
        )
    try:
        before = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if before != described(video, config):
        raise ValueError(
            f"{folder} has segments of another request: give the same flags again, or remove the folder to begin anew"
        )


def described(video: LongVideo, config: Config) -> Any:
    """All that the pixels depend on, as JSON has it."""
    facts: dict[str, Any] = {
        "requests": [dataclasses.asdict(one) for one in video.requests],
        "overlap": video.overlap,
        "match_colours": video.match_colours,
        "clip": None if video.clip is None else dataclasses.asdict(video.clip),
        "image": video.image,
        "config": without_runtime(config_to_dict(config)),
    }
    return json.loads(json.dumps(facts, default=str))


def _save_end(path: Path, end: End) -> None:
    with atomic_path(path.with_suffix(".npz")) as temporary, temporary.open("wb") as file:
        np.savez(file, frames=end.frames, mean=end.colours.mean, spread=end.colours.spread)


def _load_end(path: Path, size: tuple[int, int]) -> End | None:
    """Of a segment that is finished; None where it isn't. Raises ValueError where it is damaged."""
    file = path.with_suffix(".npz")
    if not path.exists() or not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as found:
            end = End(found["frames"], Colours(found["mean"], found["spread"]))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{file} is damaged ({error}): remove it, and the segment is made again") from None
    if end.frames.dtype != np.uint8 or end.frames.ndim != 4 or end.frames.shape[1:] != (size[1], size[0], 3):
        raise ValueError(f"{file} is damaged: remove it, and the segment is made again")
    return end


# ------------------------------------------------------------------------------------------------------------ making


def make_long(
    pipeline: Pipeline,
    video: LongVideo,
    first: Media,
    output: Path,
    progress: bool = True,
    callback: SegmentCallback | None = None,
) -> np.ndarray | None:
    """Make what is not there yet, join all of it to `output`, and return the last frame, (H, W, 3), in the first of
    several processes. `first`: what the first segment starts from. callback: told the number of a segment, from 0, it
    returns what `Pipeline.generate` calls after each of its steps.

    Raises what `Pipeline.generate` raises; finished segments stay in `folder_of(output)` then.
    """
    is_first, folder = pipeline.team.is_first, folder_of(output)
    size = video.requests[0].width, video.requests[0].height
    paths = [folder / f"{number:04}.mp4" for number in range(len(video.requests) + 1)]
    if video.clip is None:
        del paths[0]
    ends: list[End] = []
    for path in paths:  # before any is made: processes must agree on where to begin
        if (end := _load_end(path, size)) is None:
            break
        ends.append(end)
    if is_first and not folder.exists():
        folder.mkdir(parents=True)
        with atomic_path(folder / DESCRIPTION) as temporary:
            temporary.write_text(json.dumps(described(video, pipeline.config)), encoding="utf-8")
    if ends:
        logger.info("%d of %d segments are there already", len(ends), len(paths))
    if video.clip is not None and not ends:
        ends.append(_copy_clip(video.clip, paths[0], size, video.overlap, is_first))
    offset = 0 if video.clip is None else 1
    reference, end = (ends[0].colours, ends[-1]) if ends else (None, None)
    for number in range(len(ends) - offset, len(video.requests)):
        told, path = None if callback is None else callback(number), paths[number + offset]
        end = _make_segment(pipeline, video, number, end, reference, first, path, progress, told)
        reference = reference or end.colours
    assert end is not None
    if not is_first:
        return None
    records = [_record(path) for path in paths[offset:]]
    facts, joined = _facts(video, records), output if video.post.does_nothing else folder / "joined.mp4"
    count = media.join_videos(paths, joined, lambda: media.write_sidecar(joined, facts))
    if joined != output:
        made = processed(open_video(joined), video.post, pipeline.placement.device("vae"))
        facts |= {"post": video.post.facts(made.count, made.width, made.height)}
        with closing(iter_of(made.frames)) as frames:
            sizes = made.count, made.width, made.height
            media.write_frames(frames, *sizes, output, made.fps, lambda: media.write_sidecar(output, facts))
    logger.info("wrote %s: %d frames, %d segments", output, count, len(paths))
    if not pipeline.config.runtime.save_latents:  # which lie there too
        shutil.rmtree(folder, ignore_errors=True)
    return end.frames[-1]


def _copy_clip(clip: Clip, path: Path, size: tuple[int, int], overlap: int, writes: bool) -> End:
    """The clip at the size and rate of what follows, frame after frame."""
    last: list[np.ndarray] = []
    tally = Tally()

    def remembered(frames: Any) -> Any:
        for frame in frames:
            last.append(frame)
            del last[:-overlap]
            yield frame

    frames = remembered(tally.over(iterate_clip(clip, clip.frames, *size)))
    if writes:
        media.write_frames(frames, None, *size, path, FPS)
    else:
        for _ in frames:
            pass
    end = End(np.stack(last), tally.colours())
    if writes:
        _save_end(path, end)
    return end


def _make_segment(
    pipeline: Pipeline,
    video: LongVideo,
    number: int,
    before: End | None,
    reference: Colours | None,
    first: Media,
    path: Path,
    progress: bool,
    callback: StepCallback | None,
) -> End:
    """Make a segment and write it; `before` is what it goes on from, `reference` the first segment's colours."""
    from kandinsky.pipelines.inputs import Inputs

    request, overlap = video.requests[number], video.overlap_of(number)
    how = HOW[pipeline.config.task] if overlap else "as without --extend"
    logger.info("segment %d of %d, %s: %s", number + 1, len(video.requests), how, request.samples[0].text)
    inputs = Inputs(**vars(first))
    if overlap:
        assert before is not None
        held = before.frames[-overlap:]
        shown = [media.to_pil(held[-1])] if pipeline.config.task == "i2v" else []
        inputs = Inputs(images=shown, overlap=held, source_name="what is before it")
    image = video.image if number == 0 else None
    rest = what_is_left(pipeline, request, image, path, progress, callback) if pipeline.team.size == 1 else None
    pixels = rest() if rest else pipeline.generate(request, inputs, path, progress, None, callback, keep_stopped=True)
    frames = pixels[0].permute(1, 2, 3, 0).numpy()  # (T, H, W, 3)
    own = colours_of(frames)
    matched = reference is not None and video.match_colours
    facts: dict[str, Any] = {"how": how, "added_frames": len(frames), "colours": own.facts()}
    if reference is not None:
        drift = own.mean - reference.mean
        contrast = float(np.mean(own.spread / np.maximum(reference.spread, 1)))
        facts |= {"drift": drift.round(2).tolist(), "contrast": round(contrast, 3), "corrected": matched}
        logger.info(
            "segment %d: red, green and blue are %s levels from the first segment's, contrast is %.3f times its%s",
            number + 1,
            ", ".join(f"{level:+.1f}" for level in drift),
            contrast,
            "; corrected" if matched else "",
        )
    if matched:
        assert reference is not None
        frames = corrected(frames, own, reference)
    # The frames before these belong to the end as well, where this segment is shorter than the overlap.
    joined = frames if before is None else np.concatenate((before.frames, frames[-video.overlap :]))
    end = End(np.ascontiguousarray(joined[-video.overlap :]), own)
    if pipeline.team.is_first:
        if matched:
            media.write_video(frames, path, FPS)
        media.write_sidecar(path, {**_record(path), **facts})
        _save_end(path, end)
    return end


def _record(path: Path) -> dict[str, Any]:
    found = json.loads(media.sidecar_path(path).read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def _facts(video: LongVideo, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is needed to make the whole again: the first segment's record, and of the others what they differ in."""
    names = ("prompt", "expanded_prompt", "negative_prompt", "seed", "num_frames", "conditions", "evaluations")
    more = ("seconds", "how", "added_frames", "colours", "drift", "contrast", "corrected")
    there = 0 if video.clip is None else video.clip.frames
    segments = [{name: record[name] for name in (*names, *more) if name in record} for record in records]
    extended = {
        "from": None if video.clip is None else str(video.clip.path),
        "frames_before": there,
        "overlap": video.overlap,
        "segments": segments,
    }
    total = there + sum(record["added_frames"] for record in records)
    stages = dict.fromkeys(stage for record in records for stage in record["seconds"])
    seconds = {stage: sum(record["seconds"].get(stage, 0.0) for record in records) for stage in stages}
    return {**records[0], "num_frames": total, "seconds": seconds, "extended": extended}
