"""`--extend` and `--segments`: a video that goes on, segment after segment."""

from __future__ import annotations

import argparse
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from kandinsky.commands.download import download
from kandinsky.commands.flags import config_for, wishes_of
from kandinsky.commands.launch import Launch, load

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from kandinsky.config.schema import Config
    from kandinsky.outputs.post import Post
    from kandinsky.outputs.sources import Media
    from kandinsky.serving.segments import LongVideo

# What is not for videos that go on, and why.
NOT_OF_SEGMENTS = {
    **dict.fromkeys(("strength", "mask"), "is about one video that is changed, and one that goes on stays as it is"),
    **dict.fromkeys(("last_image", "loop", "keyframe"), "is about one video alone, and this one is of several"),
}


def extend(args: argparse.Namespace, launch: Launch) -> Path | None:
    """Make what is asked for, and return the path of the result. Raises ValueError for whatever the user can mend."""
    from kandinsky.checkpoints import lora_file
    from kandinsky.config.rules import check_processes
    from kandinsky.outputs import media
    from kandinsky.serving import segments
    from kandinsky.serving.longer import without_post

    config, post = without_post(config_for(args))
    check_processes(config, launch.size)
    if launch.size > 1 and args.output_filename is None:
        raise ValueError("several processes extend a video under a name that all of them know: give --output_filename")
    if args.resume and args.output_filename is None:
        raise ValueError("--resume goes on with a video that was begun: name it with --output_filename")
    if args.resume and args.seed is None:
        args.seed = segments.recorded_seed(args.output_filename)
    video, first = asked(args, config, post)
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
        logging.info("%d segments: %s", len(video.requests), segments.HOW[config.task])
        pipeline = load(args, config, launch, video.largest)
        last = segments.make_long(pipeline, video, first, output)
        if args.save_last_frame and last is not None:
            media.write_image(last, media.last_frame_path(output))
        return output


def asked(args: argparse.Namespace, config: Config, post: Post, any_picture: bool = False) -> tuple[LongVideo, Media]:
    """What flags ask for, with the picture that it begins with. any_picture: where one is needed and none is named, it
    is of the usual size. Raises ValueError for what doesn't go together."""
    from kandinsky.clips import open_clip
    from kandinsky.frames import FPS
    from kandinsky.outputs.sources import Media
    from kandinsky.pictures import load_image
    from kandinsky.serving.longer import resolve_long
    from kandinsky.serving.prompts_file import read_prompts
    from kandinsky.serving.segments import MOST_SECONDS, OVERLAPS

    flag = "segments" if args.segments is not None else "extend"
    for name in NOT_OF_SEGMENTS if config.task in OVERLAPS else ():
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} {NOT_OF_SEGMENTS[name]}: leave it or --{flag} out")
    clip, pictures, rows = None, [], None
    if args.video is not None and config.task in OVERLAPS:
        if args.image is not None:
            raise ValueError("--video's last frame is what goes on: leave --image or --video out")
        clip = open_clip(args.video, FPS, MOST_SECONDS * FPS)
    if args.image is not None:
        pictures = [load_image(args.image)]
    sizes = [picture.size for picture in pictures]
    if any_picture and config.task == "i2v" and args.image is None and clip is None:
        sizes = [(config.generation.width, config.generation.height)]
    if args.segments is not None and config.task in OVERLAPS:
        rows = [(f"{args.segments}, {row}", row.values) for row in read_prompts(args.segments, others=True)]
    wishes = {name: value for name, value in wishes_of(args).items() if name not in NOT_OF_SEGMENTS}
    video = resolve_long(
        config,
        args.prompt,
        name=f"--{flag}",
        seconds=args.extend,
        rows=rows,
        clip=clip,
        image=args.image,
        image_sizes=sizes,
        overlap=args.overlap,
        match_colours=not args.no_colour_match,
        post=post,
        **wishes,
    )
    return video, Media(pictures, [str(args.image)] if pictures else [])
