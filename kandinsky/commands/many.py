"""`--prompts_file`: every row of a file, in turn, over processes or on Ray."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from functools import partial
from pathlib import Path

from kandinsky.commands.download import download
from kandinsky.commands.flags import config_for, wishes_of
from kandinsky.commands.launch import Launch


def run_many(args: argparse.Namespace, launch: Launch) -> int:
    """Generate from every row of a file and print what is there; how many rows failed. Raises as `run` does."""
    from kandinsky.serving import batch
    from kandinsky.serving.prompts_file import first_of

    for flag in ("video", "mask", "strength"):
        if getattr(args, flag) is not None:
            raise ValueError(f"--{flag} is for one prompt: leave --prompts_file or --{flag} out")
    for flag in ("prompt", "output_filename"):
        if getattr(args, flag) is not None:
            raise ValueError(
                f"--prompts_file has its own prompts and its own names, in --output_dir: leave --{flag} out"
            )
    rank, world_size = rank_and_size(args)
    config = config_for(args)
    folder = args.output_dir or Path("outputs") / args.prompts_file.stem
    rows = batch.read_prompts(args.prompts_file)
    jobs = batch.resolve_jobs(config, args.prompts_file, rows, folder.absolute(), image=args.image, **wishes_of(args))
    # Shares first, so that they are the same whatever is there already.
    jobs = batch.left_to_do(jobs[rank::world_size], args.resume)

    failed = []
    if jobs:
        download(args, config, Launch({}))  # by every process for itself
        from kandinsky.loading.assemble import load_pipeline
        from kandinsky.loading.devices import device_of_rank, spread_over

        is_local = args.data_parallel and args.device in (None, "cuda")
        device = device_of_rank(int(os.environ.get("LOCAL_RANK", rank))) if is_local else args.device
        if args.ray_gpus is not None and args.ray_gpus > 1:
            device = spread_over(args.ray_gpus)
        options = {"attention_engine": args.attention_engine, "dtype": args.dtype}
        # Settings that are left open are decided so that the largest of them fits.
        options["request"] = max((job.request for job in jobs), key=lambda one: one.width * one.height * one.num_frames)
        load = partial(load_pipeline, config, device, Path(args.cache_dir).absolute(), **options)
        if args.ray_address is None:
            pipeline = launch.stopper.pipeline = load()
            outcomes = batch.run_in_turn(pipeline, jobs, world_size == 1, args.resume)
        else:
            outcomes = batch.run_on_ray(
                load,
                jobs,
                args.ray_address,
                args.ray_actors,
                args.resume,
                use_gpus=args.device != "cpu",
                gpus_each=args.ray_gpus or 1,
            )
        for outcome in outcomes:
            if outcome.error is None:
                print(outcome.job.output, flush=True)
            else:
                logging.error("failed: %s", outcome)
                failed.append(str(outcome))
    if args.data_parallel:
        failed = batch.failures_of_all_ranks(failed)
    if failed:
        print(f"error: {len(failed)} of {len(rows)} prompts failed; --resume tries them again", file=sys.stderr)
        print(*(f"  {line}" for line in first_of(failed)), sep="\n", file=sys.stderr)
    return len(failed)


def rank_and_size(args: argparse.Namespace) -> tuple[int, int]:
    """Which process this is, and of how many that share a prompts file."""
    launched = Launch(os.environ, together=False)
    rank, world_size = launched.rank, launched.size
    if world_size > 1 and not args.data_parallel:
        raise ValueError(f"{world_size} processes for one prompts file: --data_parallel gives each a share")
    if args.data_parallel and "RANK" not in os.environ:
        raise ValueError("--data_parallel needs several processes: torchrun --nproc-per-node 2 test.py ...")
    if args.data_parallel and args.ray_address is not None:
        raise ValueError("--data_parallel and --ray_address are two ways of sharing the work: leave one of them out")
    for flag in ("ray_actors", "ray_gpus"):
        if (number := getattr(args, flag)) is not None and (args.ray_address is None or number < 1):
            raise ValueError(f"--{flag} {number}: give a number from 1, and --ray_address with it")
    if (args.ray_gpus or 1) > 3:
        raise ValueError(f"--ray_gpus {args.ray_gpus}: a pipeline has three models, so give 1 to 3")
    return rank, world_size
