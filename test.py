"""Make a video or a picture: python test.py --config configs/config_tiny_t2v.yaml --prompt "..." [--image FILE]

The config's `task` says what is made and whether a picture is needed; its file's name decides nothing.

The command line turns words into one checked `Request` before anything heavy is imported or loaded; everything else
happens in the `kandinsky` package. A flag that is not given leaves what the YAML says.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from kandinsky.config import Config
    from kandinsky.plan import Machine
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
    "save_latents": ("runtime.save_latents", "keep the denoised latents beside the output"),
}
CHOICES = {"compile": ("auto", "on", "off"), "dit_quantization": ("int8", "fp8", "nf4")}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all other mistakes are told."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (python test.py --help shows every flag)\n")


def build_parser() -> Parser:
    parser = Parser(
        description="Generate a video or a picture from a text prompt, and from a picture where the config says so.",
        epilog="Any value of the YAML can be overridden: python test.py --prompt '...' model.num_steps=20",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="the variant's YAML file")
    parser.add_argument("--prompt", help="what to show, what happens, or what to change")
    parser.add_argument("--image", type=Path, help="the picture that a video begins with, or that is edited")
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
    parser.add_argument("--output_filename", type=Path, help="default: a new name in outputs/ that replaces nothing")
    parser.add_argument(
        "--decode_latents",
        type=Path,
        metavar="FILE",
        help="instead of a prompt: the .latents.safetensors of a run that died while decoding, to be finished",
    )
    parser.add_argument(
        "--attention_engine",
        help="auto, sdpa, sdpa_cudnn, flash_attention_2, flash_attention_3, sage; for NABLA configs auto, flex, sdpa",
    )
    for flag, words in SETTINGS.items():
        options = {"choices": CHOICES[flag]} if flag in CHOICES else {"action": "store_const", "const": "true"}
        if flag == "blocks_on_gpu":
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
    return [*args.overrides, *flags]


def wishes(args: argparse.Namespace, image_sizes: Sequence[tuple[int, int]]) -> tuple[Config, Request]:
    """What the flags come to, checked: the variant's config and the request."""
    from kandinsky.config import load_config, preset_file
    from kandinsky.request import resolve_request

    presets = [] if args.device_preset is None else [preset_file(args.device_preset)]
    config = load_config(args.config, overrides_of(args), presets)
    if args.plan and not image_sizes and config.task in ("i2v", "i2i"):
        image_sizes = [(config.generation.width, config.generation.height)]
    request = resolve_request(
        config,
        "a prompt" if args.plan and args.prompt is None else args.prompt,
        image_sizes=image_sizes,
        time_length=args.video_duration,
        width=args.width,
        height=args.height,
        seed=args.seed,
        num_steps=args.sample_steps,
        guidance_weight=args.guidance_weight,
        scheduler_scale=args.scheduler_scale,
        guidance_interval=args.guidance_interval,
        guidance_every=args.guidance_every,
        negative_caption=args.negative_prompt,
    )
    return config, request


def plan(args: argparse.Namespace) -> str:
    """The plan in words. Raises ValueError, after printing it, for a request that does not fit."""
    from kandinsky import media
    from kandinsky.plan import make_plan, plan_decoding, report, weight_files

    if args.decode_latents is not None:
        make = plan_decoding
        config, request = recorded(args)
    else:
        make = make_plan
        config, request = wishes(args, [] if args.image is None else [media.load_image(args.image).size])
    machine = planned_machine(args)
    dtype = args.dtype or ("float32" if machine.gpu_memory is None else "bfloat16")
    made = make(config, request, machine, weight_files(config, args.cache_dir), dtype)
    if made.refusal is not None:
        print(report(made))
        raise ValueError(made.refusal)
    return report(made)


def recorded(args: argparse.Namespace) -> tuple[Config, Request]:
    """What a run that died was for, as far as its decoding goes."""
    from kandinsky import latents_file
    from kandinsky.config import config_from_dict
    from kandinsky.plan import default_request

    records = latents_file.read_records(args.decode_latents)
    config = config_from_dict(records[0]["config"], overrides_of(args))
    request = default_request(config)
    sizes = {name: records[0][name] for name in ("width", "height", "num_frames", "num_steps")}
    return config, dataclasses.replace(request, samples=request.samples * len(records), **sizes)


def planned_machine(args: argparse.Namespace) -> Machine:
    """The machine that flags describe, or this one."""
    from kandinsky.plan import GB, Machine, host_memory

    for flag in ("memory_gb", "host_memory_gb"):
        if (size := getattr(args, flag)) is not None and not size > 0:
            raise ValueError(f"--{flag} is {size:g}; it must be more than 0 (GB of 2^30 bytes)")
    host = host_memory() if args.host_memory_gb is None else args.host_memory_gb * GB
    if args.device == "cpu":
        return Machine(host)
    if args.memory_gb is not None:
        return Machine(host, args.memory_gb * GB)
    from kandinsky.loading import machine_memory
    from kandinsky.runtime.placement import parse_device_map

    return dataclasses.replace(machine_memory(parse_device_map(args.device)["dit"]), host_memory=host)


def run(args: argparse.Namespace) -> Path:
    """Generate, write, and return the path of the result. Raises ValueError for whatever the user can mend."""
    from kandinsky import latents_file, media

    # From cheap to expensive: config, request and output path are known to be good before torch is imported.
    images = [] if args.image is None else [media.load_image(args.image)]
    config, request = wishes(args, [image.size for image in images])
    suffix = media.IMAGE_SUFFIX if request.is_image else media.VIDEO_SUFFIX
    output = args.output_filename or media.default_output_path("outputs", args.prompt, request.samples[0].seed, suffix)
    media.check_writable(output, suffix)
    for path in latents_file.unfinished(output.parent):
        logging.info(
            "a run stopped before its end: python test.py --decode_latents %s makes the rest", quote(str(path))
        )

    if args.download:
        from kandinsky import hub

        hub.download(hub.sources(config, args.cache_dir, only_missing=True), args.cache_dir, args.hf_token)

    from kandinsky.loading import load_pipeline
    from kandinsky.pipelines.base import Inputs

    pipeline = load_pipeline(
        config,
        args.device,
        cache_dir=args.cache_dir,
        attention_engine=args.attention_engine,
        dtype=args.dtype,
        request=request,
    )
    pipeline.generate(request, Inputs(images, [str(args.image)] if images else []), save_path=output)
    return output


def finish(args: argparse.Namespace) -> Path:
    """Decode and write what a run that died had denoised; return the path of the result."""
    from kandinsky import latents_file, media
    from kandinsky.config import config_from_dict

    if args.prompt is not None or args.image is not None:
        raise ValueError("--decode_latents goes on from a file that has its prompt and its picture: leave them out")
    record = latents_file.read_records(args.decode_latents)[0]
    config = config_from_dict(record["config"], overrides_of(args))
    suffix = media.IMAGE_SUFFIX if record["num_frames"] == 1 else media.VIDEO_SUFFIX
    output = args.output_filename or latents_file.output_path(args.decode_latents, suffix)
    media.check_writable(output, suffix)

    from kandinsky.loading import load_for_decoding

    pipeline = load_for_decoding(config, args.device, cache_dir=args.cache_dir, dtype=args.dtype)
    pipeline.finish(latents_file.load_latents(args.decode_latents), output)
    if not config.runtime.save_latents:
        args.decode_latents.unlink()
    return output


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_intermixed_args(arguments)
    if args.prompt is None and args.decode_latents is None and not args.plan:
        parser.error("the following arguments are required: --prompt")
    # How long a CPU thread that waits for the others spins before it sleeps, read when torch is loaded. As long as GNU
    # OpenMP does it by default (300,000), a tiny model is 60 times slower wherever another program runs on the machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # Libraries report every file they open at this level; their warnings stay.
    for library in ("httpx", "httpx2"):
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        print(plan(args) if args.plan else run(args) if args.decode_latents is None else finish(args))
    except (ValueError, OSError) as error:
        return fail(error)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; by name, because torch may not be imported here
            raise
        return fail("out of GPU memory: --plan says what fits; or try a smaller --width and --height, or less duration")
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def fail(what: object) -> int:
    print("error:", " ".join(str(what).splitlines()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
