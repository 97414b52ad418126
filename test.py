"""Make a video or a picture: python test.py --config configs/config_tiny_t2v.yaml --prompt "..." [--image FILE]

The config's `task` says what is made and whether a picture is needed; its file's name decides nothing.

The command line turns words into one checked `Request` before anything heavy is imported or loaded; everything else
happens in the `kandinsky` package. A flag that is not given leaves what the YAML says.

Several GPUs make one output together where a launcher starts this program once for each of them:

    torchrun --nproc-per-node 4 test.py ...        python -m torch.distributed.launch --nproc-per-node 4 test.py ...
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from shlex import join, quote
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from kandinsky.common.signals import Stopper
    from kandinsky.config.schema import Config
    from kandinsky.planning.machine import Machine
    from kandinsky.request import Request

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "config_5s_sft.yaml"
# Flags that stand for a value of the YAML: flag -> (key, help).
SETTINGS = {
    "magcache": ("magcache.enabled", "skip model evaluations that change little"),
    "compile": ("runtime.compile", "compile the DiT's blocks; auto: on a GPU, where there are steps enough"),
    "cache_prompts": ("runtime.cache_prompts", "keep the prompts' embeddings on disk"),
    "offload": ("runtime.offload", "have each model on the device only while it runs"),
    "blocks_on_gpu": ("runtime.blocks_on_gpu", "visual blocks that stay there; the others stream in"),
    "dit_quantization": ("runtime.dit_quantization", "keep the DiT's weights in fewer bits"),
    "qwen_quantization": ("runtime.qwen_quantization", "keep Qwen's weights in 4 bits (NF4)"),
    "expand_prompt": ("generation.expand_prompts", "have Qwen write a short prompt out first; default: where it can"),
    "preview": ("runtime.preview", "write a small preview beside the output after every N-th step"),
    "save_latents": ("runtime.save_latents", "keep the denoised latents beside the output"),
    "cfg_parallel": ("runtime.cfg_parallel", "of several processes, one half evaluates the negative prompt"),
    "shard_weights": ("runtime.shard_weights", "of several processes, each keeps a part of the DiT's weights"),
}
PROMPT_OF_A_BARE_LAUNCH = "The bear plays balalaika."
# What a run that is gone on with has settled.
FIXED_BY_A_FILE = (
    *("prompt", "prompts_file", "image", "negative_prompt", "width", "height", "video_duration"),
    *("sample_steps", "seed", "guidance_weight", "guidance_interval", "guidance_every", "scheduler_scale", "lora"),
)
CHOICES = {"compile": ("auto", "on", "off"), "expand_prompt": ("on", "off"), "dit_quantization": ("int8", "fp8", "nf4")}


class Launch:
    """Which copy of this program this is, of how many that a launcher has started.

    environment: with what torchrun and torch.distributed.launch tell; where they don't, there is one copy.
    """

    def __init__(self, environment: Mapping[str, str], together: bool = True) -> None:
        """together: whether the copies are to meet. Raises ValueError for variables that no launcher has set so."""

        def number(name: str, otherwise: int) -> int:
            text = environment.get(name, str(otherwise))
            if not re.fullmatch("[0-9]{1,9}", text.strip()):
                raise ValueError(f"the variable {name} is {text!r}; a launcher sets it to a number: unset it")
            return int(text)

        self.rank = number("RANK", 0)
        self.size = number("WORLD_SIZE", 1)
        self.local_rank = number("LOCAL_RANK", 0)  # on this machine
        if not self.rank < self.size:
            raise ValueError(f"the variable RANK is {self.rank} of WORLD_SIZE {self.size}: it counts from 0")
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if self.size > 1 and together and missing:
            raise ValueError(
                f"the variable WORLD_SIZE is {self.size}, and {missing[0]}, where they meet, is not set: start them "
                f"with torchrun --nproc-per-node {self.size} test.py ..., or unset WORLD_SIZE"
            )

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    @cached_property
    def processes(self) -> Any:
        """All copies, once they have met; None where there is one."""
        if self.size == 1:
            return None
        from kandinsky.runtime.processes import Processes

        return Processes.join(self.rank, self.size, self.local_rank)

    @cached_property
    def stopper(self) -> Stopper:
        """What signals come to; it is to know the pipeline."""
        from kandinsky.common.signals import Stopper

        return Stopper(self.size > 1, self.is_first)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all other mistakes are told."""

    def error(self, message: str) -> NoReturn:
        from kandinsky.common.given import LONGEST_LINE, shortened

        self.exit(2, f"error: {shortened(message, LONGEST_LINE)} (python test.py --help shows every flag)\n")


def build_parser() -> Parser:
    from kandinsky.common.command_line import Once

    parser = Parser(
        description="Generate a video or a picture from a text prompt, and from a picture where the config says so.",
        epilog="Any value of the YAML can be overridden: python test.py --prompt '...' model.num_steps=20",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="the variant's YAML file")
    parser.add_argument("--prompt", help="what to show, what happens, or what to change")
    parser.add_argument(
        "--image", type=Path, action=Once, help="the picture that a video begins with, or that is edited"
    )
    parser.add_argument("--negative_prompt", help="what not to show; used where guidance is on")
    parser.add_argument(
        "--width", type=int, help="pixels, a multiple of 16; default: the config's, or the picture's shape"
    )
    parser.add_argument("--height", type=int, help="likewise")
    parser.add_argument("--video_duration", type=float, help="seconds at 24 frames a second; 0 makes a picture")
    parser.add_argument("--sample_steps", type=int, help="Euler steps")
    parser.add_argument("--guidance_weight", type=float, help="classifier-free guidance; 1 switches it off")
    parser.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("BEGIN", "END"),
        help="shares of the steps, 0 to 1, between which there is guidance; the other steps take half the time",
    )
    parser.add_argument(
        "--guidance_every", type=int, metavar="N", help="of these steps, each N-th evaluates the negative prompt"
    )
    parser.add_argument("--scheduler_scale", type=float, help="shift of the schedule towards noise")
    parser.add_argument("--seed", type=int, help="the same seed gives the same video; not given: a new one every time")
    parser.add_argument("--output_filename", type=Path, help="default: a new name in --output_dir, replacing nothing")
    parser.add_argument(
        "--output_dir",
        type=Path,
        metavar="DIR",
        help="default: outputs/, and for many prompts a folder of their own there",
    )
    parser.add_argument(
        "--prompts_file",
        type=Path,
        metavar="FILE",
        help="instead of a prompt: .txt with one a line, or .csv, .tsv or .jsonl with the column prompt and, as "
        "needed, negative_prompt, seed, width, height, image, output",
    )
    parser.add_argument("--resume", action="store_true", help="of a prompts file, leave out what is there already")
    parser.add_argument(
        "--data_parallel", action="store_true", help="under torchrun, each process takes its share of a prompts file"
    )
    parser.add_argument(
        "--ray_address", metavar="ADDRESS", help="make a prompts file on Ray: auto (this machine's cluster) or local"
    )
    parser.add_argument("--ray_actors", type=int, metavar="N", help="pipelines on Ray; default: one for each GPU")
    parser.add_argument("--ray_gpus", type=int, metavar="N", help="GPUs that each of them has, 1 to 3; default: 1")
    parser.add_argument(
        "--decode_latents",
        type=Path,
        metavar="FILE",
        help="instead of a prompt: the .latents.safetensors of a run that died while decoding, to be finished",
    )
    parser.add_argument(
        "--resume_from",
        type=Path,
        metavar="FILE",
        help="instead of a prompt: the .stopped.safetensors of a run that was stopped while denoising, to go on with",
    )
    parser.add_argument(
        "--attention_engine",
        help="auto, sdpa, sdpa_cudnn, flash_attention_2, flash_attention_3, sage; for NABLA configs auto, flex, sdpa",
    )
    parser.add_argument(
        "--lora",
        action="append",
        metavar="PATH[:SCALE]",
        help="a LoRA adapter, as a file or a folder; several times for several",
    )
    for flag, words in SETTINGS.items():
        options = {"choices": CHOICES[flag]} if flag in CHOICES else {"action": "store_const", "const": "true"}
        if flag == "expand_prompt":  # which the original has with numbers
            options["type"] = lambda word: {"0": "off", "1": "on"}.get(word, word)
        if flag in ("blocks_on_gpu", "cfg_parallel", "preview"):
            options = {"type": int, "metavar": "N"}
        parser.add_argument(f"--{flag}", help=words[1], **options)
    parser.add_argument(
        "--device_preset", metavar="NAME", help="settings for 8gb, 12gb, 16gb, 24gb, 48gb, 80gb or a cpu"
    )
    parser.add_argument("--plan", action="store_true", help="print what it would take, and load nothing")
    parser.add_argument(
        "--memory_gb", type=float, metavar="GB", help="for --plan: a GPU of that size, not the one here"
    )
    parser.add_argument("--host_memory_gb", type=float, metavar="GB", help="for --plan: likewise the host's memory")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: a GPU where there is one")
    parser.add_argument("--dtype", help="bfloat16, float32, float16; default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--cache_dir", default="./weights/", help="the folder that ./weights/ in the YAML stands for")
    parser.add_argument("--download", action="store_true", help="first fetch the weights that are missing there")
    parser.add_argument("--hf_token", help="Hugging Face token for --download; default: the variable HF_TOKEN")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the YAML")
    return parser


def overrides_of(args: argparse.Namespace) -> list[str]:
    """What stands over the YAML: key=value as given, and the flags that stand for one."""
    flags = [f"{key}={getattr(args, flag)}" for flag, (key, _) in SETTINGS.items() if getattr(args, flag) is not None]
    if args.lora:  # as JSON, which YAML reads: whatever is in a path stays a path
        flags.append(f"model.loras={json.dumps(args.lora, ensure_ascii=False)}")
    return [*args.overrides, *flags]


def config_for(args: argparse.Namespace) -> Config:
    """The variant's config, under the device's preset, under the flags."""
    from kandinsky.config.reading import load_config, preset_file

    presets = [] if args.device_preset is None else [preset_file(args.device_preset)]
    return load_config(args.config, overrides_of(args), presets)


def wishes_of(args: argparse.Namespace) -> dict[str, Any]:
    """What flags ask of every request; arguments of `resolve_request`."""
    from kandinsky.config.schema import MIN_SECONDS

    if args.video_duration is not None and 0 < args.video_duration < MIN_SECONDS:
        raise ValueError(
            f"--video_duration {args.video_duration:g} is too short: a video has at least 5 frames, "
            f"{MIN_SECONDS:.2f} s; 0 makes a picture"
        )
    return {
        "time_length": args.video_duration,
        "width": args.width,
        "height": args.height,
        "seed": args.seed,
        "num_steps": args.sample_steps,
        "guidance_weight": args.guidance_weight,
        "scheduler_scale": args.scheduler_scale,
        "guidance_interval": args.guidance_interval,
        "guidance_every": args.guidance_every,
        "negative_caption": args.negative_prompt,
    }


def plan(args: argparse.Namespace) -> str:
    """The plan in words. Raises ValueError, after printing it, for a request that does not fit."""
    from kandinsky.planning.plan import make_plan, plan_decoding, weight_files
    from kandinsky.planning.report import report

    if args.decode_latents is not None:
        make = plan_decoding
        config, request = recorded(args)
    else:
        make = make_plan
        config, request = asked(args)
    machine = planned_machine(args)
    dtype = args.dtype or ("float32" if machine.gpu_memory is None else "bfloat16")
    made = make(config, request, machine, weight_files(config, args.cache_dir), dtype)
    if made.refusal is not None:
        print(report(made))
        raise ValueError(made.refusal)
    return report(made)


def asked(args: argparse.Namespace) -> tuple[Config, Request]:
    """What flags ask for; where they name no prompt and no picture, of any prompt, and a picture of the usual size."""
    from kandinsky.outputs import media
    from kandinsky.request import resolve_request

    config = config_for(args)
    sizes = [(config.generation.width, config.generation.height)] if config.task in ("i2v", "i2i") else []
    if args.image is not None:
        sizes = [media.load_image(args.image).size]
    prompt = "a prompt" if args.prompt is None else args.prompt
    return config, resolve_request(config, prompt, image_sizes=sizes, **wishes_of(args))


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
        if (size := getattr(args, flag)) is not None and not size > 0:
            raise ValueError(f"--{flag} is {size:g}; it must be more than 0 (GB of 2^30 bytes)")
    host = host_memory() if args.host_memory_gb is None else args.host_memory_gb * GB
    if args.device == "cpu" and args.dtype in (None, "float32"):  # which every CPU computes in; torch is not asked
        return Machine(host)
    if args.memory_gb is not None:
        return Machine(host, args.memory_gb * GB)
    from kandinsky.loading.device_map import parse_device_map
    from kandinsky.loading.devices import machine_memory

    return dataclasses.replace(machine_memory(parse_device_map(args.device)["dit"]), host_memory=host)


def download(args: argparse.Namespace, config: Config, launch: Launch) -> None:
    """With --download, the weights that are missing.

    Of several processes the first one fetches them, then the first one of each other machine, if that has its own disk.
    """
    if not args.download:
        return
    from kandinsky.checkpoints import hub

    def fetch() -> None:
        hub.download(hub.sources(config, args.cache_dir, only_missing=True), args.cache_dir, args.hf_token)

    if launch.is_first:
        fetch()
    if launch.processes is not None:
        launch.processes.wait_for_all("the first download")
        if launch.local_rank == 0 and not launch.is_first:
            fetch()
        launch.processes.wait_for_all("downloads")


def run(args: argparse.Namespace, launch: Launch) -> Path | None:
    """Generate, write, and return the path of the result. Raises ValueError for whatever the user can mend."""
    from kandinsky.checkpoints import lora_file
    from kandinsky.config.rules import check_processes
    from kandinsky.outputs import latents_file, media
    from kandinsky.request import resolve_request

    # From cheap to expensive: config, request and output path are known to be good before torch is imported.
    config = config_for(args)
    check_processes(config, launch.size)
    images = [] if args.image is None else [media.load_image(args.image)]
    sizes = [image.size for image in images]
    request = resolve_request(config, args.prompt, image_sizes=sizes, **wishes_of(args))
    suffix = media.IMAGE_SUFFIX if request.is_image else media.VIDEO_SUFFIX
    seed, folder = request.samples[0].seed, args.output_dir or "outputs"
    name: AbstractContextManager[Path | None] = nullcontext(args.output_filename if launch.is_first else None)
    if launch.is_first and args.output_filename is None:
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
        inputs = Inputs(images, [str(args.image)] if images else [])
        pipeline.generate(request, inputs, save_path=output, keep_stopped=True)
        return output


def resume(args: argparse.Namespace, launch: Launch) -> Path | None:
    """Go on with a run that was stopped while denoising; return the path of the result."""
    from kandinsky.common.writing import Kept, discard
    from kandinsky.config.rules import check_processes
    from kandinsky.outputs import media
    from kandinsky.outputs import resume as stopped
    from kandinsky.outputs.records import recorded_config

    record = stopped.read_record(args.resume_from)
    config = recorded_config(record, overrides_of(args), args.resume_from, decoding=False)
    check_processes(config, launch.size)
    output = None
    if launch.is_first:
        suffix = media.IMAGE_SUFFIX if record["request"]["num_frames"] == 1 else media.VIDEO_SUFFIX
        output = args.output_filename or stopped.output_path(args.resume_from, suffix)
        media.check_writable(output, suffix)

    from kandinsky.loading.assemble import load_pipeline

    run = stopped.load_run(args.resume_from)
    pipeline = launch.stopper.pipeline = load_pipeline(
        config,
        args.device,
        cache_dir=args.cache_dir,
        attention_engine=args.attention_engine,
        dtype=args.dtype or record["dtype"],
        request=run.request,
        read_text_encoders=False,
        processes=launch.processes,
    )
    try:
        pipeline.resume(run, output)
    except Kept as kept:  # something later, which takes its place
        if launch.is_first and kept.path.absolute() != args.resume_from.absolute():
            discard(args.resume_from)
        raise
    if launch.is_first:
        discard(args.resume_from)
    return output


def run_many(args: argparse.Namespace, launch: Launch) -> int:
    """Generate from every row of a file and print what is there; how many rows failed. Raises as `run` does."""
    from kandinsky.serving import batch
    from kandinsky.serving.prompts_file import first_of

    for flag in ("prompt", "output_filename"):
        if getattr(args, flag) is not None:
            raise ValueError(
                f"--prompts_file has its own prompts and its own names, in --output_dir: leave --{flag} out"
            )
    rank, world_size = processes(args)
    config = config_for(args)
    folder = args.output_dir or Path("outputs") / args.prompts_file.stem
    rows = batch.read_prompts(args.prompts_file)
    jobs = batch.plan_jobs(config, args.prompts_file, rows, folder.absolute(), image=args.image, **wishes_of(args))
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
            on_cpu = args.device == "cpu"
            gpus = {"use_gpus": not on_cpu, "gpus_each": args.ray_gpus or 1}
            outcomes = batch.run_on_ray(load, jobs, args.ray_address, args.ray_actors, args.resume, **gpus)
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


def processes(args: argparse.Namespace) -> tuple[int, int]:
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


def finish(args: argparse.Namespace, launch: Launch) -> Path | None:
    """Decode and write what a run that died had denoised; return the path of the result."""
    from kandinsky.common.writing import discard
    from kandinsky.outputs import latents_file, media
    from kandinsky.outputs.records import recorded_config

    record = latents_file.checked_records(args.decode_latents)[0]
    config = recorded_config(record, overrides_of(args), args.decode_latents, decoding=True)
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


def main(arguments: Sequence[str] | None = None) -> int:
    from kandinsky.common.command_line import show_every_character

    show_every_character()
    parser = build_parser()
    words = sys.argv[1:] if arguments is None else arguments
    # torch.distributed.launch adds the number that it also has in the environment, with a name like no flag of ours.
    own = [word for word in words if not word.startswith(("--local-rank=", "--local_rank="))]
    args = parser.parse_intermixed_args(own)
    check_strays(parser, args, words)
    if not own and "LOCAL_RANK" in os.environ:  # the original's example of a launch names nothing at all
        args.prompt = PROMPT_OF_A_BARE_LAUNCH
    starts = (args.prompt, args.prompts_file, args.decode_latents, args.resume_from)
    if all(given is None for given in starts) and not args.plan:
        parser.error("the following arguments are required: --prompt")
    for flag in ("prompts_file", "resume_from"):
        if args.plan and getattr(args, flag) is not None:
            parser.error(f"--plan is for one request, or for --decode_latents: leave --{flag} out")
    work = finish if args.decode_latents is not None else resume if args.resume_from is not None else run
    if work is not run:
        given = [flag for flag in FIXED_BY_A_FILE if getattr(args, flag) is not None]
        if given:
            flag = "decode_latents" if work is finish else "resume_from"
            parser.error(f"--{flag} goes on from a file that settles this: leave out --{', --'.join(given)}")
    for flag in ("resume", "data_parallel", "ray_address", "ray_actors", "ray_gpus"):
        if getattr(args, flag) and args.prompts_file is None:
            parser.error(f"--{flag} is for many prompts: give --prompts_file")
    # How long a CPU thread that waits for the others spins before it sleeps, read when torch is loaded. As long as GNU
    # OpenMP does it by default (300,000), a tiny model is 60 times slower wherever another program runs on the machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # Processes that share a file of prompts have nothing to do with each other.
    try:
        launch = Launch(os.environ if args.prompts_file is None else {})
    except ValueError as error:
        return fail(Launch({}), error)
    who = f"rank {os.environ.get('RANK')}: " if args.data_parallel else ""
    level = logging.INFO if launch.is_first else logging.ERROR
    logging.basicConfig(level=level, format=f"{who}%(message)s", stream=sys.stderr)
    # Libraries report every file they open at this level; their warnings stay.
    for library in ("httpx", "httpx2"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what is wrong with a picture is ours to say
    from kandinsky.common.signals import stop_on_signals

    with stop_on_signals(launch.stopper):
        return work_on(work, args, words, launch)


def work_on(
    work: Callable[[argparse.Namespace, Launch], Path | None],
    args: argparse.Namespace,
    words: Sequence[str],
    launch: Launch,
) -> int:
    """Do what flags ask for, and tell how it ended; the exit status."""
    try:
        if args.plan:
            print(plan(args))
            return 0
        if args.prompts_file is not None:
            return 1 if run_many(args, launch) else 0
        output = work(args, launch)
        if launch.is_first:
            print(output, flush=True)
        if launch.processes is not None:
            launch.processes.leave()
    except (ValueError, OSError) as error:
        return fail(launch, *getattr(error, "mistakes", [error]))
    except KeyboardInterrupt as stop:
        return interrupted(stop, args, words, launch)
    except Exception as error:
        # torch's; by name, because torch may not be imported here
        if "OutOfMemoryError" in [kind.__name__ for kind in type(error).__mro__]:
            memory = "out of GPU memory: --plan says what fits; or try a smaller --width and --height, or less duration"
            return fail(launch, memory)
        if args.data_parallel:
            logging.error("failed unexpectedly", exc_info=error)
            return 1
        if launch.size == 1:
            raise
        launch.processes.fail(error)
    return 0


def interrupted(stop: KeyboardInterrupt, args: argparse.Namespace, words: Sequence[str], launch: Launch) -> int:
    """Say what there is and how to go on from it; the exit status."""
    from kandinsky.common.writing import Kept
    from kandinsky.outputs.resume import Stopped

    file = args.decode_latents or args.resume_from
    if isinstance(stop, Kept) and args.prompts_file is None:
        launcher = "python" if launch.size == 1 else f"torchrun --nproc-per-node {launch.size}"
        how = f"{stop}; go on with: {launcher} test.py {stop.flags}"
    elif args.prompts_file is not None:
        kept = f"{stop}; " if isinstance(stop, Kept) else ""
        same = f": python test.py {join(words if args.resume else [*words, '--resume'])}"
        how = f"{kept}the same command with --resume goes on{'' if args.data_parallel else same}"
    elif file is not None:
        how = f"{file} is still there, and the same command goes on from it"
    else:
        how = "nothing was written"
    if launch.is_first:
        print(f"interrupted; {how}", file=sys.stderr, flush=True)
    if launch.size > 1 and "processes" in vars(launch):  # otherwise they have not met yet
        if isinstance(stop, Stopped):  # all of them have
            launch.processes.leave()
        else:
            launch.processes.interrupted(launch.stopper.status)
    return launch.stopper.status


def check_strays(parser: Parser, args: argparse.Namespace, words: Sequence[str]) -> None:
    """Refuse words that are no overrides, and say what happened where they are text that lost its quotes."""
    from kandinsky.common.command_line import without_quotes
    from kandinsky.config.schema import Config

    sections = {field.name for field in dataclasses.fields(Config)}
    keys = tuple(f"{section}." for section in sections)  # those of overrides that lack a value are told as such
    strays = [word for word in args.overrides if "=" not in word and not word.startswith(keys)]
    takes_text = [action for action in parser._actions if action.nargs is None and action.type in (None, Path)]
    flags = [flag for action in takes_text for flag in action.option_strings]
    if strays and (what := without_quotes(words, strays, flags)) is not None:
        parser.error(what)


def fail(launch: Launch, *mistakes: object) -> int:
    from kandinsky.common.given import LONGEST_LINE, shortened

    if launch.size > 1:
        launch.processes.fail("; ".join(map(str, mistakes)), 2)
    for what in mistakes:
        print("error:", shortened(str(what), LONGEST_LINE), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
