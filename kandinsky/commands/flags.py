"""The command line's flags, and what they say of a config and of a request."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kandinsky.checkpoints.files import REPOSITORY
from kandinsky.common import command_line
from kandinsky.common.given import shortened, shown

if TYPE_CHECKING:
    from kandinsky.config.schema import Config
    from kandinsky.keyframes import Keyframe


DEFAULT_CONFIG = REPOSITORY / "configs" / "config_5s_sft.yaml"
# Flags that stand for a value of the YAML: flag -> (key, help).
SETTINGS = {
    "magcache": ("magcache.enabled", "skip model evaluations that change little"),
    "cache": ("cache.kind", "skip what changes little by this rule; all but magcache need no calibration"),
    "compile": (
        "runtime.compile",
        "compile the DiT's blocks, or only what is elementwise; auto: on a GPU, for many steps",
    ),
    "cache_prompts": ("runtime.cache_prompts", "keep the prompts' embeddings on disk"),
    "offload": ("runtime.offload", "have each model on the device only while it runs"),
    "stream_encoders": ("runtime.stream_encoders", "have Qwen's layers come from the file one after the other"),
    "blocks_on_gpu": ("runtime.blocks_on_gpu", "visual blocks that stay there; the others stream in"),
    "dit_quantization": ("runtime.dit_quantization", "keep the DiT's weights in fewer bits"),
    "qwen_quantization": ("runtime.qwen_quantization", "keep Qwen's weights in 4 bits (NF4)"),
    "expand_prompt": ("generation.expand_prompts", "have Qwen write a short prompt out first; default: where it can"),
    "preview": ("runtime.preview", "write a small preview beside the output after every N-th step"),
    "vae": ("model.vae.decoder", "what decodes the result: full, or tiny for a quick look; default: full"),
    "save_latents": ("runtime.save_latents", "keep the denoised latents beside the output"),
    "fps": ("runtime.fps", "frames a second of the file, 1 to 240, computed between the 24 that are made"),
    "upscale": ("runtime.upscale", "write it 2 or 4 times as large"),
    "upscaler": ("runtime.upscaler", "a Real-ESRGAN network's file to do that with; default: Lanczos' filter"),
    "cfg_parallel": ("runtime.cfg_parallel", "of several processes, one half evaluates the negative prompt"),
    "shard_weights": ("runtime.shard_weights", "of several processes, each keeps a part of the DiT's weights"),
}
# What a run that is gone on with has settled.
FIXED_BY_A_FILE = (
    *("prompt", "prompts_file", "image", "last_image", "loop", "keyframe"),
    *("video", "strength", "mask", "extend", "segments"),
    *("negative_prompt", "width", "height", "video_duration"),
    *("sample_steps", "seed", "guidance_weight", "guidance_interval", "guidance_every"),
    *("coarse_steps", "scheduler_scale", "lora"),
)
CHOICES = {
    "cache": ("magcache", "dbcache", "taylorseer", "firstblock", "tracked", "auto", "off"),
    "compile": ("auto", "on", "off", "elementwise"),
    "expand_prompt": ("on", "off"),
    "stream_encoders": ("auto", "on", "off"),
    "dit_quantization": ("int8", "fp8", "nf4"),
    "vae": ("full", "tiny"),
}


class Parser(command_line.Parser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("argument --keyframe: expected"):  # also for a time that begins with a minus
            message += ", SECONDS:FILE, with a time in the video like 0.5:pose.png"
        super().error(message)


def added_seconds(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{shown(word)} is not how many seconds are to be added, like 2.5; the video that goes on is --video's"
        ) from None


def build_parser() -> Parser:
    parser = Parser(
        prog="python test.py",
        description="Generate a video or a picture from a text prompt, and from a picture where the config says so.",
        epilog="Any value of the YAML can be overridden: python test.py --prompt '...' model.num_steps=20",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="the variant's YAML file")
    parser.add_argument("--prompt", help="what to show, what happens, or what to change")
    parser.add_argument(
        "--image", type=Path, action=command_line.Once, help="the picture that a video begins with, or that is edited"
    )
    experimental = "for i2v; experimental with checkpoints that learnt to be given the first frame alone, as published"
    parser.add_argument(
        "--last_image",
        type=Path,
        action=command_line.Once,
        metavar="FILE",
        help=f"the picture that it ends with: {experimental}",
    )
    parser.add_argument(
        "--loop", action="store_true", default=None, help="have it end as it begins, so that it can go round: likewise"
    )
    parser.add_argument(
        "--keyframe",
        action="append",
        metavar="SECONDS:FILE",
        help="a picture that it passes through at that time; several times for several: likewise",
    )
    parser.add_argument(
        "--video",
        type=Path,
        metavar="FILE",
        help="for t2v, a video, GIF or folder of frames to start from, which gives layout and motion",
    )
    parser.add_argument(
        "--strength",
        type=float,
        help="how far to go from --video, or with t2i from --image: 0 (the same) to 1 (noise alone); default: 0.6",
    )
    parser.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        help="white where --video or t2i's --image may change: a picture, or for a video one a frame",
    )
    parser.add_argument(
        "--extend",
        type=added_seconds,
        metavar="SECONDS",
        help="so much longer, segment by segment, at most 1000 of them: --video, or what is made first; i2v configs "
        "begin each segment with the last frame, t2v configs hold the latents of the last frames",
    )
    parser.add_argument(
        "--segments",
        type=Path,
        metavar="FILE",
        help="in place of --prompt and --extend: a .yaml list, or a prompts file, with prompt and, as needed, seconds, "
        "seed, negative_prompt of each segment",
    )
    parser.add_argument(
        "--overlap",
        type=int,
        metavar="FRAMES",
        help="that a segment goes on from: 4n + 1, from 1 to 501, and fewer than it has; default: 1 for i2v, else 5",
    )
    parser.add_argument(
        "--no_colour_match",
        action="store_true",
        default=None,
        help="leave colour and contrast of later segments as they come, and not bring them back to the first one's",
    )
    parser.add_argument(
        "--save_last_frame", action="store_true", default=None, help="write it beside the video, as NAME.last.png"
    )
    parser.add_argument("--negative_prompt", help="what not to show; used where guidance is on")
    parser.add_argument(
        "--width", type=int, help="pixels, a multiple of 16; default: the config's, or the picture's shape"
    )
    parser.add_argument("--height", type=int, help="likewise")
    parser.add_argument("--video_duration", type=float, help="seconds at 24 frames a second, at most 21; 0: a picture")
    parser.add_argument("--sample_steps", type=int, help="Euler steps, 1 to 1000")
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
    parser.add_argument(
        "--coarse_steps",
        metavar="SHARE[:SCALE]",
        help="make the first steps, that share of all, with each side times SCALE (0.5); 0: none; default: none",
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
        "needed, negative_prompt, seed, width, height, seconds, image, video, strength, mask, last_image, loop, "
        "keyframe, output; -: lines of standard input, as they come",
    )
    parser.add_argument(
        "--resume", action="store_true", help="of a prompts file or segments, leave out what is there already"
    )
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
        options: dict[str, Any] = (
            {"choices": CHOICES[flag]} if flag in CHOICES else {"action": "store_const", "const": "true"}
        )
        if flag == "expand_prompt":  # which the original has with numbers
            options["type"] = lambda word: {"0": "off", "1": "on"}.get(word, word)
        if flag in ("blocks_on_gpu", "cfg_parallel", "preview", "fps", "upscale"):
            options = {"type": int, "metavar": "N"}
        if flag == "upscaler":
            options = {"metavar": "FILE"}
        parser.add_argument(f"--{flag}", help=words[1], **options)
    parser.add_argument(
        "--device_preset", metavar="NAME", help="settings for 8gb, 12gb, 16gb, 24gb, 48gb, 80gb or a cpu"
    )
    parser.add_argument("--plan", action="store_true", help="print what it would take, and load nothing")
    parser.add_argument(
        "--memory_gb", type=float, metavar="GB", help="for --plan: a GPU of that size, not the one here"
    )
    parser.add_argument("--host_memory_gb", type=float, metavar="GB", help="for --plan: likewise the host's memory")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="for --plan: as many share the work, each with such a GPU"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, xpu; default: a CUDA device where there is one")
    parser.add_argument("--dtype", help="bfloat16, float32, float16; default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--cache_dir", default="./weights/", help="the folder that ./weights/ in the YAML stands for")
    parser.add_argument("--download", action="store_true", help="first fetch the weights that are missing there")
    parser.add_argument("--hf_token", help="Hugging Face token for --download; default: the variable HF_TOKEN")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the YAML")
    return parser


def overrides_of(args: argparse.Namespace) -> list[str]:
    """What stands over the YAML: key=value as given, and the flags that stand for one. Raises ValueError for two that
    contradict each other."""
    flags = [f"{key}={getattr(args, flag)}" for flag, (key, _) in SETTINGS.items() if getattr(args, flag) is not None]
    if args.coarse_steps is not None:
        share, colon, scale = args.coarse_steps.partition(":")
        try:
            numbers = float(share), float(scale) if colon else 0.5
        except ValueError:
            raise ValueError(
                f"--coarse_steps {shown(args.coarse_steps)} is not SHARE[:SCALE], numbers like 0.25:0.5: the share of "
                "the steps, and what becomes of each side in them"
            ) from None
        flags.append("generation.coarse_steps={{share: {}, scale: {}}}".format(*numbers))
    if args.lora:  # as JSON, which YAML reads: whatever is in a path stays a path
        flags.append(f"model.loras={json.dumps(args.lora, ensure_ascii=False)}")
    words = [*args.overrides, *flags]
    if "magcache.enabled=true" in words and "cache.kind=off" in words:
        raise ValueError(
            "magcache.enabled=true (--magcache) switches a cache on, and cache.kind=off (--cache off) all of them off: "
            "leave one of the two out"
        )
    return words


def check_config_of(args: argparse.Namespace, config: Config, path: Path) -> None:
    """Raise ValueError where --config names another file than the one that the run in `path` began with."""
    is_given = args.config is not DEFAULT_CONFIG
    if is_given and config.source is not None and args.config.name != config.source.name:
        raise ValueError(
            f"--config {args.config}: {path} goes on with what its run began with, {config.source}: leave --config out"
        )


def config_for(args: argparse.Namespace) -> Config:
    """The variant's config, under the device's preset, under the flags."""
    from kandinsky.config.reading import load_config, preset_file

    presets = [] if args.device_preset is None else [preset_file(args.device_preset)]
    words = overrides_of(args)
    config = load_config(args.config, words, presets)
    for beginning, is_used, why in (
        ("cache.", config.block_cache is not None, "there is no cache: switch one on with --cache"),
        ("model.attention.P=", config.model.attention.type == "nabla", "model.attention.type is full, and not nabla"),
    ):
        for word in words:
            if word.startswith(beginning) and not word.startswith("cache.kind=") and not is_used:
                logging.warning("%s changes nothing: %s", shortened(word), why)
    if config.runtime.upscaler is not None:
        from kandinsky.outputs.post import check_upscaler

        check_upscaler(config.runtime.upscaler)
    return config


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
        "strength": args.strength,
        "loop": bool(args.loop),
        "guidance_interval": args.guidance_interval,
        "guidance_every": args.guidance_every,
        "negative_caption": args.negative_prompt,
    }


def keyframes_of(args: argparse.Namespace, config: Config, num_frames: int) -> tuple[Keyframe, ...]:
    """The pictures that flags give after the first one."""
    from kandinsky.keyframes import keyframe_words, read_keyframes

    return read_keyframes(config, num_frames, args.last_image, bool(args.loop), keyframe_words(args.keyframe or []))


def check_strays(parser: Parser, args: argparse.Namespace, words: Sequence[str]) -> None:
    """Refuse words that are no overrides, and say what happened where they are text that lost its quotes."""
    from kandinsky.config.schema import Config

    sections = {field.name for field in dataclasses.fields(Config)}
    keys = tuple(f"{section}." for section in sections)  # those of overrides that lack a value are told as such
    strays = [word for word in args.overrides if "=" not in word and not word.startswith(keys)]
    takes_text = [action for action in parser._actions if action.nargs is None and action.type in (None, Path)]
    flags = [flag for action in takes_text for flag in action.option_strings]
    if strays and (what := command_line.without_quotes(words, strays, flags)) is not None:
        parser.error(what)
