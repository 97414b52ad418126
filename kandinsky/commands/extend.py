"""`--extend` and `--segments`: a video that goes on, segment after segment."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky.commands.download import download
from kandinsky.commands.flags import config_for, wishes_of
from kandinsky.commands.launch import Launch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from kandinsky.config.schema import Config
    from kandinsky.outputs.sources import Media
    from kandinsky.serving.segments import LongVideo, Part

# What belongs to one segment that nothing comes before.
NOT_OF_SEGMENTS = ("strength", "mask", "last_image", "loop", "keyframe")


def extend(args: argparse.Namespace, launch: Launch) -> Path | None:
    """Make what is asked for, and return the path of the result. Raises ValueError for whatever the user can mend."""
    from kandinsky.checkpoints import lora_file
    from kandinsky.config.rules import check_processes
    from kandinsky.outputs import media
    from kandinsky.serving import segments

    config = config_for(args)
    check_processes(config, launch.size)
    if launch.size > 1 and args.output_filename is None:
        raise ValueError("several processes extend a video under a name that all of them know: give --output_filename")
    if args.resume and args.output_filename is None:
        raise ValueError("--resume goes on with a video that was begun: name it with --output_filename")
    if args.resume and args.seed is None:
        args.seed = segments.recorded_seed(args.output_filename)
    video, first = asked(args, config)
    (sample,) = video.requests[0].samples
    assert sample.text is not None and sample.seed is not None
    name: AbstractContextManager[Path] = nullcontext(args.output_filename)
    if args.output_filename is None:
        name = media.reserved_output_path(args.output_dir or "outputs", sample.text, sample.seed)
    with name as output:
        if launch.is_first:
            media.check_writable(output, media.VIDEO_SUFFIX)
        segments.check_folder(output, video, config, args.resume)
        lora_file.configured_loras(config, args.cache_dir)
        args.output_filename = output  # for the words that say how to go on
        download(args, config, launch)
        from kandinsky.loading.assemble import load_pipeline

        logging.info("%d segments: %s", len(video.requests), segments.HOW[config.task])
        pipeline = launch.stopper.pipeline = load_pipeline(
            config,
            args.device,
            cache_dir=args.cache_dir,
            attention_engine=args.attention_engine,
            dtype=args.dtype,
            processes=launch.processes,
            request=max(video.requests, key=lambda one: one.num_frames),
        )
        last = segments.make_long(pipeline, video, first, output)
        if args.save_last_frame and last is not None:
            media.write_image(last, media.last_frame_path(output))
        return output


def asked(args: argparse.Namespace, config: Config) -> tuple[LongVideo, Media]:
    """What flags ask for, with the picture that it begins with. Raises ValueError for what doesn't go together."""
    from kandinsky.clips import open_clip
    from kandinsky.config.schema import MAX_SECONDS
    from kandinsky.frames import FPS
    from kandinsky.outputs.sources import Media, resolve_media
    from kandinsky.request import MAX_SEED
    from kandinsky.serving import segments
    from kandinsky.sizes import check_picture, size_for_video

    flag = "segments" if args.segments is not None else "extend"
    if config.task not in segments.OVERLAPS:
        raise ValueError(f"--{flag} makes videos longer, and {config.source} is for {config.task}: leave it out")
    for name in NOT_OF_SEGMENTS:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} is about one video that another one is made of: leave it or --{flag} out")
    if args.video_duration == 0:
        raise ValueError(f"--video_duration 0 makes a picture, and --{flag} a longer video: leave one of them out")
    clip = None
    if args.video is not None:
        if args.image is not None:
            raise ValueError("--video's last frame is what goes on: leave --image or --video out")
        clip = open_clip(args.video, FPS, segments.MOST_SEGMENTS * MAX_SECONDS * FPS)
        check_picture(clip.size)
    wishes = wishes_of(args)
    overlap = segments.checked_overlap(config.task, args.overlap, None if clip is None else clip.frames)
    parts = asked_parts(args, config, overlap, clip is not None)
    if not parts:
        raise ValueError("--extend 0 adds nothing to --video: say how many seconds it is to be longer")

    first, requests = Media(), []
    size = wishes["width"], wishes["height"]
    if clip is None:
        images = [] if args.image is None else [args.image]
        own: dict[str, Any] = {"seed": parts[0].seed, "num_frames": parts[0].frames + 1, "time_length": None}
        if parts[0].negative is not None:
            own["negative_caption"] = parts[0].negative
        request, first = resolve_media(config, parts[0].text, images, **{**wishes, **own})
        overlap = segments.checked_overlap(config.task, args.overlap, request.num_frames)
        requests, size = [request], (request.width, request.height)
        wishes["seed"] = request.samples[0].seed
    elif None in size:
        if size != (None, None):
            raise ValueError("width and height belong together here: give both, or neither for the video's own size")
        size = size_for_video(clip.size, config)
    wishes = {name: value for name, value in wishes.items() if name not in ("width", "height", "time_length")}
    seed = wishes.pop("seed")
    for number, part in enumerate(parts[len(requests) :], len(requests)):
        if part.seed is None and seed is not None:
            part = dataclasses.replace(part, seed=(seed + number) % (MAX_SEED + 1))
        request = segments.request_of(config, part, size, overlap, **wishes)
        requests.append(request)
        if seed is None:
            seed = request.samples[0].seed
    image = args.image if clip is None else None
    return segments.LongVideo(tuple(requests), overlap, not args.no_colour_match, clip, image), first


def asked_parts(args: argparse.Namespace, config: Config, overlap: int, has_clip: bool) -> list[Part]:
    """The segments of a file, or equal ones of one prompt. The first one's frames are without the very first frame,
    where nothing is before it."""
    from kandinsky.frames import wanted_frames
    from kandinsky.serving import segments
    from kandinsky.serving.prompts_file import read_prompts

    usual = wanted_frames(config, args.video_duration)
    if args.segments is None:
        frames = segments.added_frames(args.extend, "--extend")
        lengths = segments.divided(config, frames, overlap, args.video_duration) if frames else []
        lengths = lengths if has_clip else [usual - 1, *lengths]
        return [segments.Part(args.prompt, length, args.seed if i == 0 else None) for i, length in enumerate(lengths)]
    parts: list[Part] = []
    rows = read_prompts(args.segments)
    if len(rows) > segments.MOST_SEGMENTS:
        raise ValueError(f"{args.segments} has {len(rows)} segments; at most {segments.MOST_SEGMENTS} are made")
    for row in rows:
        values: dict[str, Any] = dict(row.values)
        if others := sorted(set(values) - {"prompt", "seconds", "seed", "negative_prompt"}):
            raise ValueError(
                f"{args.segments}, {row}: a segment has prompt, seconds, seed and negative_prompt, and no {others[0]}"
            )
        frames = usual - (overlap if parts or has_clip else 1)
        if "seconds" in values:
            frames = segments.added_frames(values["seconds"], f"{args.segments}, {row}: seconds")
        seed = values.get("seed", args.seed if not parts else None)
        parts.append(segments.Part(values.get("prompt"), frames, seed, values.get("negative_prompt")))
    return parts
