"""What `test.py` does when it is given a prompt: one output, or several of it."""

from __future__ import annotations

import argparse
import logging
from contextlib import nullcontext
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from kandinsky.commands.download import download
from kandinsky.commands.flags import config_for, keyframes_of, wishes_of
from kandinsky.commands.launch import Launch, load

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


def run(args: argparse.Namespace, launch: Launch) -> Path | None:
    """Generate, write, and return the path of the result. Raises ValueError for whatever the user can mend."""
    from kandinsky.checkpoints import lora_file
    from kandinsky.config.rules import check_processes
    from kandinsky.outputs import latents_file, media
    from kandinsky.outputs.sources import resolve_media

    # From cheap to expensive: config, request and output path are known to be good before torch is imported.
    config = config_for(args)
    check_processes(config, launch.size)
    images = [] if args.image is None else [args.image]
    request, found = resolve_media(config, args.prompt, images, args.video, args.mask, **wishes_of(args))
    if args.save_last_frame and request.is_image:
        raise ValueError("--save_last_frame is of a video, and this makes a picture: leave it out")
    keyframes = keyframes_of(args, config, request.num_frames)
    suffix = media.IMAGE_SUFFIX if request.is_image else media.VIDEO_SUFFIX
    seed, folder = request.samples[0].seed, args.output_dir or "outputs"
    name: AbstractContextManager[Path | None] = nullcontext(args.output_filename if launch.is_first else None)
    if launch.is_first and args.output_filename is None:
        assert seed is not None  # the command line gives no generators
        name = media.reserved_output_path(folder, args.prompt, seed, suffix)
    with name as output:
        if output is not None:
            media.check_writable(output, suffix)
            for path in latents_file.unfinished(output.parent):
                logging.info(
                    "a run stopped before its end: python test.py --decode_latents %s makes the rest", quote(str(path))
                )
        lora_file.configured_loras(config, args.cache_dir)

        download(args, config, launch)
        from kandinsky.pipelines.inputs import Inputs

        pipeline = load(args, config, launch, request)
        inputs = Inputs(**vars(found), keyframes=keyframes)
        pixels = pipeline.generate(request, inputs, save_path=output, keep_stopped=True)
        if args.save_last_frame and output is not None:
            media.write_image(pixels[0][:, -1], media.last_frame_path(output))
        return output
