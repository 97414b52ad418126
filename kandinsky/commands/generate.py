"""What `test.py` does when it is given a prompt: one output, or several of it."""

from __future__ import annotations

import argparse
import logging
from contextlib import nullcontext
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from kandinsky.commands.download import download
from kandinsky.commands.flags import config_for, wishes_of
from kandinsky.commands.launch import Launch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


def run(args: argparse.Namespace, launch: Launch) -> Path | None:
    """Generate, write, and return the path of the result. Raises ValueError for whatever the user can mend."""
    from kandinsky.checkpoints import lora_file
    from kandinsky.config.rules import check_processes
    from kandinsky.outputs import latents_file, media
    from kandinsky.outputs.sources import open_source, read_mask, read_source
    from kandinsky.request import resolve_request

    # From cheap to expensive: config, request and output path are known to be good before torch is imported.
    config = config_for(args)
    check_processes(config, launch.size)
    images = [] if args.image is None else [media.load_image(args.image)]
    sizes = [image.size for image in images]
    wishes = wishes_of(args)
    clip = None if args.video is None else open_source(config, args.video, wishes["time_length"])
    request = resolve_request(
        config,
        args.prompt,
        image_sizes=sizes,
        clip=None if clip is None else (*clip.size, clip.frames),
        mask=args.mask is not None,
        **wishes,
    )
    source = read_source(request, clip, images if config.task == "t2i" else [])
    mask = None if args.mask is None else read_mask(request, args.mask)
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
        from kandinsky.loading.assemble import load_pipeline
        from kandinsky.pipelines.inputs import Inputs

        pipeline = launch.stopper.pipeline = load_pipeline(
            config,
            args.device,
            cache_dir=args.cache_dir,
            attention_engine=args.attention_engine,
            dtype=args.dtype,
            processes=launch.processes,
            request=request,
        )
        name_of_source = str(args.video or args.image) if source is not None else ""
        names = [str(args.image)] if images else []
        inputs = Inputs(images if source is None else [], names, source=source, source_name=name_of_source, mask=mask)
        pipeline.generate(request, inputs, save_path=output, keep_stopped=True)
        return output
