"""`--decode_latents`: a run that died while it decoded is brought to its end."""

from __future__ import annotations

import argparse
from pathlib import Path

from kandinsky.commands.flags import check_config_of, overrides_of
from kandinsky.commands.launch import Launch


def finish(args: argparse.Namespace, launch: Launch) -> Path | None:
    """Decode and write what a run that died had denoised; return the path of the result."""
    from kandinsky.common.writing import discard
    from kandinsky.outputs import latents_file, media
    from kandinsky.outputs.records import recorded_config

    record = latents_file.checked_records(args.decode_latents)[0]
    config = recorded_config(record, overrides_of(args), args.decode_latents, decoding=True)
    check_config_of(args, config, args.decode_latents)
    output = None
    if launch.is_first:
        suffix = media.IMAGE_SUFFIX if record["num_frames"] == 1 else media.VIDEO_SUFFIX
        output = args.output_filename or latents_file.output_path(args.decode_latents, suffix)
        media.check_writable(output, suffix)
    from kandinsky.loading.assemble import load_for_decoding

    pipeline = load_for_decoding(
        config, args.device, cache_dir=args.cache_dir, dtype=args.dtype, processes=launch.processes
    )
    pipeline.finish(latents_file.load_latents(args.decode_latents), output)
    if launch.is_first and not config.runtime.save_latents:
        discard(args.decode_latents)
    return output
