"""`--resume_from`: a run that was stopped between two steps goes on."""

from __future__ import annotations

import argparse
from pathlib import Path

from kandinsky.commands.flags import check_config_of, overrides_of
from kandinsky.commands.launch import Launch, load


def resume(args: argparse.Namespace, launch: Launch) -> Path | None:
    """Go on with a run that was stopped while denoising; return the path of the result."""
    from kandinsky.common.writing import Kept, discard
    from kandinsky.config.rules import check_processes
    from kandinsky.outputs import media
    from kandinsky.outputs import resume as stopped
    from kandinsky.outputs.records import recorded_config

    record = stopped.read_record(args.resume_from)
    config = recorded_config(record, overrides_of(args), args.resume_from, decoding=False)
    check_config_of(args, config, args.resume_from)
    check_processes(config, launch.size)
    output = None
    if launch.is_first:
        suffix = media.IMAGE_SUFFIX if record["request"]["num_frames"] == 1 else media.VIDEO_SUFFIX
        output = args.output_filename or stopped.output_path(args.resume_from, suffix)
        media.check_writable(output, suffix)

    run = stopped.load_run(args.resume_from)
    dtype = args.dtype or record["dtype"]
    pipeline = load(args, config, launch, run.request, dtype=dtype, read_text_encoders=False)
    try:
        pipeline.resume(run, output)
    except Kept as kept:  # something later, which takes its place
        if launch.is_first and kept.path.absolute() != args.resume_from.absolute():
            discard(args.resume_from)
        raise
    if launch.is_first:
        discard(args.resume_from)
    return output
