"""`--prompts_file`: every row of a file, in turn, over processes or on Ray; or each line of standard input."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky.commands.download import download
from kandinsky.commands.flags import config_for, wishes_of
from kandinsky.commands.launch import Launch
from kandinsky.config.schema import Config
from kandinsky.planning.costs import num_evaluations
from kandinsky.serving.prompts_file import STREAM

if TYPE_CHECKING:
    from kandinsky.pipelines.base import Pipeline
    from kandinsky.request import Request
    from kandinsky.serving.batch import Outcome


def run_many(args: argparse.Namespace, launch: Launch) -> int:
    """Generate from every row of a file and print what is there; how many rows failed. Raises as `run` does."""
    from kandinsky.serving import batch
    from kandinsky.serving.prompts_file import first_of

    for flag in ("video", "mask", "strength", "last_image", "loop", "keyframe"):
        if getattr(args, flag) is not None:
            raise ValueError(f"--{flag} is for one prompt: leave --prompts_file or --{flag} out")
    for flag in ("prompt", "output_filename"):
        if getattr(args, flag) is not None:
            raise ValueError(
                f"--prompts_file has its own prompts and its own names, in --output_dir: leave --{flag} out"
            )
    rank, world_size = rank_and_size(args)
    config = config_for(args)
    if args.prompts_file == STREAM:
        return run_stream(args, launch, config)
    folder = args.output_dir or Path("outputs") / args.prompts_file.stem
    rows = batch.read_prompts(args.prompts_file)
    jobs = batch.resolve_jobs(config, args.prompts_file, rows, folder.absolute(), image=args.image, **wishes_of(args))
    # Of all rows, whether or not they are there already, so that going on with a file changes no setting.
    evaluations = sum(num_evaluations(job.request) * len(job.request.samples) for job in jobs)
    evaluations //= max(world_size, args.ray_actors or 1)
    # Shares first, so that they are the same whatever is there already.
    jobs = batch.left_to_do(jobs[rank::world_size], args.resume)

    failed = []
    if jobs:
        download(args, config, Launch({}))  # by every process for itself
        from kandinsky.loading.devices import device_of_rank, spread_over

        is_local = args.data_parallel and args.device in (None, "cuda")
        device = device_of_rank(int(os.environ.get("LOCAL_RANK", rank))) if is_local else args.device
        if args.ray_gpus is not None and args.ray_gpus > 1:
            device = spread_over(args.ray_gpus)
        # Settings that are left open are decided so that the largest of them fits.
        largest = max((job.request for job in jobs), key=lambda one: one.width * one.height * one.num_frames)
        load = loader(args, config, device, largest, evaluations)
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
        failed = told(outcomes)
    if args.data_parallel:
        failed = batch.failures_of_all_ranks(failed)
    if failed:
        print(f"error: {len(failed)} of {len(rows)} prompts failed; --resume tries them again", file=sys.stderr)
        print(*(f"  {line}" for line in first_of(failed)), sep="\n", file=sys.stderr)
    return len(failed)


def run_stream(args: argparse.Namespace, launch: Launch, config: Config) -> int:
    """Generate from lines of standard input, each as soon as it is there; how many failed. The models stay loaded.

    They are loaded with the first line that is a request: settings that are left open are decided for that one.
    """
    from kandinsky.serving import batch
    from kandinsky.serving.prompts_file import read_stream

    if sys.stdin is None:
        raise ValueError("--prompts_file - reads prompts from standard input, which is closed: open it, or name a file")
    folder = (args.output_dir or Path("outputs") / "prompts").absolute()
    pipeline, job_of, failures = None, dict[str, batch.Job](), 0
    for row in read_stream(sys.stdin.buffer):
        try:
            if isinstance(row, str):
                raise ValueError(row)
            wishes = wishes_of(args)
            jobs = batch.resolve_jobs(config, STREAM, [row], folder, image=args.image, job_of=job_of, **wishes)
            jobs = batch.left_to_do(jobs, args.resume)
        except ValueError as error:
            logging.error("failed: %s", error)
            failures += 1
            continue
        if not jobs:
            continue
        if pipeline is None:
            download(args, config, Launch({}))
            pipeline = launch.stopper.pipeline = loader(args, config, args.device, jobs[0].request)()
        failures += len(told(batch.run_in_turn(pipeline, jobs, resume=args.resume)))
    if failures:
        print(f"error: {failures} prompts failed", file=sys.stderr)
    return failures


def loader(
    args: argparse.Namespace, config: Config, device: Any, request: Request, evaluations: int | None = None
) -> Callable[[], Pipeline]:
    """What loads the pipeline that the flags ask for."""
    from kandinsky.loading.assemble import load_pipeline

    options = {"attention_engine": args.attention_engine, "dtype": args.dtype, "request": request}
    options["evaluations"] = evaluations
    return partial(load_pipeline, config, device, Path(args.cache_dir).absolute(), **options)


def told(outcomes: Iterable[Outcome]) -> list[str]:
    """Print each output when it is there; what failed."""
    failed = []
    for outcome in outcomes:
        if outcome.error is None:
            print(outcome.job.output, flush=True)
        else:
            logging.error("failed: %s", outcome)
            failed.append(str(outcome))
    return failed


def rank_and_size(args: argparse.Namespace) -> tuple[int, int]:
    """Which process this is, and of how many that share a prompts file."""
    launched = Launch(os.environ, together=False)
    rank, world_size = launched.rank, launched.size
    if world_size > 1 and not args.data_parallel:
        raise ValueError(f"{world_size} processes for one prompts file: --data_parallel gives each a share")
    if args.data_parallel and "RANK" not in os.environ:
        raise ValueError("--data_parallel needs several processes: torchrun --nproc-per-node 2 test.py ...")
    if args.prompts_file == STREAM and (args.data_parallel or args.ray_address is not None):
        raise ValueError("--prompts_file - is standard input, which one process reads: give a file to share")
    if args.data_parallel and args.ray_address is not None:
        raise ValueError("--data_parallel and --ray_address are two ways of sharing the work: leave one of them out")
    for flag in ("ray_actors", "ray_gpus"):
        if (number := getattr(args, flag)) is not None and (args.ray_address is None or number < 1):
            raise ValueError(f"--{flag} {number}: give a number from 1, and --ray_address with it")
    if (args.ray_gpus or 1) > 3:
        raise ValueError(f"--ray_gpus {args.ray_gpus}: a pipeline has three models, so give 1 to 3")
    return rank, world_size
