"""`--plan`: what a request, or all segments of a longer video, would take, in words; nothing is loaded."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from kandinsky.commands.flags import config_for, keyframes_of, overrides_of, wishes_of

if TYPE_CHECKING:
    from kandinsky.config.schema import Config
    from kandinsky.planning.machine import Machine
    from kandinsky.planning.plan import Plan
    from kandinsky.request import Request
    from kandinsky.serving.segments import LongVideo

LEAST_GB, MOST_GB = 0.1, 100_000  # of a machine: what is less is shown as 0.0


def plan(args: argparse.Namespace) -> str:
    """The plan in words. Raises ValueError, after printing it, for a request that does not fit."""
    from kandinsky.config.rules import check_processes
    from kandinsky.planning.plan import make_plan, plan_decoding, weight_files
    from kandinsky.planning.report import report

    video, make = None, make_plan
    if args.decode_latents is not None:
        make = plan_decoding
        config, request = recorded(args)
    elif args.extend or args.segments is not None or (args.extend is not None and args.video is not None):
        config, video = asked_longer(args)
        request = video.largest
    else:
        config, request = asked(args)
    machine = planned_machine(args)
    if make is make_plan:
        check_processes(config, machine.processes)
    dtype = args.dtype or ("float32" if machine.gpu_memory is None else "bfloat16")
    made = make(config, request, machine, weight_files(config, args.cache_dir), dtype)
    if made.refusal is not None:
        print(report(made))
        raise ValueError(made.refusal)
    return report(made) if video is None else f"{report(made)}\n\n{of_segments(video, made)}"


def of_segments(video: LongVideo, largest: Plan) -> str:
    """What all segments take that have the settings with which the largest fits."""
    from kandinsky.planning.costs import denoising_seconds
    from kandinsky.planning.report import report_of_segments

    config, machine = largest.config, largest.machine
    seconds = sum(denoising_seconds(config, request, machine, largest.models) for request in video.requests)
    rate = machine.host_flops if machine.gpu_memory is None else machine.flops
    return report_of_segments(video.requests, video.overlap, seconds, rate)


def asked_longer(args: argparse.Namespace) -> tuple[Config, LongVideo]:
    """What flags ask for that is made segment by segment; of any prompt and picture, where they name none."""
    from kandinsky.commands import extend
    from kandinsky.serving.longer import without_post

    config, post = without_post(config_for(args))
    if args.prompt is None and args.segments is None:
        args.prompt = "a prompt"
    video, _ = extend.asked(args, config, post, any_picture=True)
    return config, video


def asked(args: argparse.Namespace) -> tuple[Config, Request]:
    """What flags ask for; where they name no prompt and no picture, of any prompt, and a picture of the usual size."""
    from kandinsky.outputs import media
    from kandinsky.request import resolve_request

    config = config_for(args)
    sizes = [(config.generation.width, config.generation.height)] if config.task in ("i2v", "i2i") else []
    if args.image is not None:
        sizes = [media.load_image(args.image).size]
    prompt = "a prompt" if args.prompt is None else args.prompt
    if args.video is not None or args.mask is not None or args.strength is not None:
        raise ValueError("--plan is of a run from noise, which takes more: leave --video, --mask and --strength out")
    request = resolve_request(config, prompt, image_sizes=sizes, **wishes_of(args))
    keyframes_of(args, config, request.num_frames)  # they cost nothing, but may be wrong
    return config, request


def recorded(args: argparse.Namespace) -> tuple[Config, Request]:
    """What a run that died was for, as far as its decoding goes."""
    from kandinsky.outputs import latents_file
    from kandinsky.outputs.records import recorded_config
    from kandinsky.planning.plan import default_request

    records = latents_file.checked_records(args.decode_latents)
    config = recorded_config(records[0], overrides_of(args), args.decode_latents, decoding=True)
    request = default_request(config)
    sizes = {name: records[0][name] for name in ("width", "height", "num_frames", "num_steps")}
    return config, dataclasses.replace(request, samples=request.samples * len(records), **sizes)


def planned_machine(args: argparse.Namespace) -> Machine:
    """The machine that flags describe, or this one."""
    from kandinsky.common.host_memory import host_memory
    from kandinsky.models.vae_memory import GB
    from kandinsky.planning.machine import Machine

    for flag in ("memory_gb", "host_memory_gb"):
        if (size := getattr(args, flag)) is not None and not LEAST_GB <= size <= MOST_GB:
            raise ValueError(f"--{flag} is {size:g}; it must be from {LEAST_GB:g} to {MOST_GB:,} (GB of 2^30 bytes)")
    host = host_memory() if args.host_memory_gb is None else args.host_memory_gb * GB
    count = 1 if args.processes is None else args.processes
    if count < 1:
        raise ValueError(f"--processes is {count}; it must be at least 1")
    if args.device == "cpu" and args.dtype in (None, "float32"):  # which every CPU computes in; torch is not asked
        return Machine(host, processes=count, on_host=count)
    if args.memory_gb is not None:
        return Machine(host, args.memory_gb * GB, processes=count, on_host=count)
    from kandinsky.loading.device_map import parse_device_map
    from kandinsky.loading.devices import machine_memory

    here = machine_memory(parse_device_map(args.device)["dit"])
    return dataclasses.replace(here, host_memory=host, processes=count, on_host=count)
