"""How fast a run and its parts are beside diffusers, eager and compiled, with the same weights in one process.

    python benchmarks/speed.py [--device cpu|cuda] [--part forward vae text generation] [--json FILE]

    forward      one evaluation of the DiT                  vae    decoding latents with the video VAE
    text         one prompt through Qwen2.5-VL and CLIP     generation   a whole text-to-video run

On a CPU sizes are small and `generation` and `text` are the tiny checkpoint's; on a GPU they are the published ones,
with random weights and embeddings (`text` needs the published encoders in --weights). Ours is compiled as
`--compile on` does it, diffusers' DiT by its own `compile_repeated_blocks`. The VAE and the text encoders are compiled
in neither.

Times are medians of calls in which the implementations take turns, without autograd, after a call that isn't counted;
processor time where there is one thread on a CPU, so that other programs disturb less. The floor is the time that the
published computation's matrix products would take at the rate of one large product, measured in the same process.
"Difference" is that of the results, of diffusers' rounding of rotated queries and keys above all. Peak memory is what
a call needs beyond what is there before it, on a CPU in a process of its own. First calls are wall
times in new processes, with nothing compiled on disk ("cold") and with it ("warm"). diffusers runs as it ships.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo as TheirVAE
from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5T2VPipeline
from diffusers import Kandinsky5Transformer3DModel as TheirDiT
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

from benchmarks._flops import counted_flops, dit_flops
from benchmarks.attention import matmul_flops, median_seconds
from benchmarks.compare import processor_name, randomise, resident, wait_for
from kandinsky.attention.engines import resolve_engine
from kandinsky.config import Config, DiTConfig, load_config
from kandinsky.loading import KEEP_PRECISION, load_dit, load_text_encoders, load_vae
from kandinsky.models.dit import DiffusionTransformer3D
from kandinsky.models.text_embedder import TextEmbeddings
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
from kandinsky.pipelines.text_to_video import TextToVideoPipeline
from kandinsky.prompts import get_template
from kandinsky.runtime.compile import CACHE_VARIABLE, compile_blocks
from kandinsky.runtime.placement import FixedPlacement

ROOT = Path(__file__).resolve().parents[1]
EAGER = ("ours", "diffusers")
COMPILED = ("ours compiled", "diffusers compiled")
PARTS = {"forward": EAGER + COMPILED, "vae": EAGER, "text": EAGER, "generation": EAGER + COMPILED}
REPEATS = {"forward": 7, "vae": 3, "text": 15, "generation": 3}
PROMPT = "a red circle moves left on a white background"
TINY, PUBLISHED = ROOT / "configs" / "config_tiny_t2v.yaml", ROOT / "configs" / "config_5s_sft.yaml"
SMALL_DIT = DiTConfig(model_dim=512, ff_dim=2048, num_text_blocks=1, num_visual_blocks=4, in_text_dim=256)


@dataclass(frozen=True)
class Part:
    title: str
    runs: dict[str, Callable[[], object]]
    flops: int  # of the published computation; 0: not counted


class OurSchedule(FlowMatchEulerDiscreteScheduler):
    """Their scheduler with the published models' points, so that both take the same steps."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        super().set_timesteps(sigmas=torch.linspace(1, 0, num_inference_steps + 1)[:-1].tolist(), device=device)


def build_dits(
    params: DiTConfig,
    names: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype,
    weights: nn.Module | None = None,
) -> dict[str, nn.Module]:
    """The DiT in each implementation, with the weights of `weights` or random ones."""
    theirs = TheirDiT(**{name: value for name, value in asdict(params).items() if name != "instruct_type"})
    if weights is None:
        randomise(theirs)
    else:
        theirs.load_state_dict(weights.state_dict())
    for name, parameter in theirs.named_parameters():  # what from_pretrained and our loading keep in float32
        parameter.data = parameter.to(device, torch.float32 if any(key in name for key in KEEP_PRECISION) else dtype)
    theirs.to(device).eval().requires_grad_(False)
    dits: dict[str, nn.Module] = {}
    for name in names:
        if name.startswith("ours"):
            with torch.device("meta"):
                dits[name] = ours = DiffusionTransformer3D(**asdict(params))
            ours.load_state_dict(theirs.state_dict(), assign=True)
            ours.eval().requires_grad_(False)
            ours.attention = resolve_engine("auto", device, dtype, params.head_dim)
            if name == "ours compiled":
                compile_blocks(ours)
        elif name == "diffusers compiled":
            dits[name] = compiled = copy.deepcopy(theirs)
            compiled.compile_repeated_blocks(fullgraph=True)
        else:
            dits[name] = theirs
    return dits


def forward_part(names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> Part:
    small = device.type == "cpu"
    params = replace(SMALL_DIT, visual_cond=True) if small else load_config(PUBLISHED).model.dit_params
    size, text_tokens = ((8, 32, 32), 64) if small else ((31, 64, 96), 128)  # 5 s of 768x512
    dits = build_dits(params, names, device, dtype)
    frames, height, width = size
    latents = torch.randn(1, *size, 33).to(device, dtype)
    text = torch.randn(1, text_tokens, params.in_text_dim).to(device, dtype)
    pooled = torch.randn(1, params.in_text_dim2).to(device, dtype)
    timesteps, scale = torch.tensor([723.4567], device=device), (1.0, 2.0, 2.0)
    positions = [torch.arange(n, device=device) for n in (frames, height // 2, width // 2)]
    text_positions = torch.arange(text_tokens, device=device)

    def run(name: str) -> Callable[[], object]:
        dit = dits[name]
        if name.startswith("ours"):
            tables = dit.request_tables(size, text_tokens, scale, device)
            return lambda: dit(latents, text, pooled, timesteps, scale, tables=tables)
        return lambda: dit(
            hidden_states=latents,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=timesteps,
            visual_rope_pos=positions,
            text_rope_pos=text_positions,
            scale_factor=scale,
            return_dict=False,
        )

    tokens = frames * height * width // 4
    title = f"DiT forward: dim {params.model_dim}, {params.num_visual_blocks} blocks, {tokens:,} tokens"
    return Part(title, {name: run(name) for name in names}, dit_flops(params, size, text_tokens))


def vae_part(names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> Part:
    """One window of 17 frames, untiled."""
    small = device.type == "cpu"
    channels, (height, width) = ((64, 128, 256, 256), (12, 12)) if small else ((128, 256, 512, 512), (64, 96))
    theirs = TheirVAE(block_out_channels=channels).eval().requires_grad_(False)
    randomise(theirs)
    ours = AutoencoderKLHunyuanVideo(block_out_channels=channels)
    ours.load_state_dict(theirs.state_dict())
    ours.to(device, dtype).eval().requires_grad_(False)
    theirs.to(device, dtype)
    ours.convolve_by_frame(small)
    ours.to(memory_format=torch.channels_last_3d)  # as it is loaded
    theirs.use_framewise_decoding = False
    latents = torch.randn(1, 16, 5, height, width).to(device, dtype)
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.decode(latents),
        "diffusers": lambda: theirs.decode(latents, return_dict=False)[0],
    }
    title = f"VAE decode: 17 frames {8 * width}x{8 * height}, channels {'-'.join(map(str, channels))}"
    return Part(title, {name: runs[name] for name in names}, counted_flops(runs["diffusers"]))


def load_their_encoders(config: Config, folders: tuple[Path, Path], device: torch.device, dtype: torch.dtype) -> Any:
    """A diffusers pipeline of which only the text encoders and their tokenizers are there."""
    from transformers import AutoTokenizer, CLIPTextModel, Qwen2_5_VLForConditionalGeneration

    qwen, clip = folders
    tokenizer = AutoTokenizer.from_pretrained(qwen)

    class Processor:  # the tiny encoder has no picture processor, and no picture is given
        decode = tokenizer.decode

        def __call__(self, images: None = None, videos: None = None, **arguments: Any) -> Any:
            return tokenizer(**arguments)

    limits = config.model.text_embedder
    clip_tokenizer = AutoTokenizer.from_pretrained(clip)
    theirs: Any = Kandinsky5T2VPipeline(
        transformer=None,
        vae=None,
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen, dtype=dtype).to(device),
        tokenizer=Processor(),
        text_encoder_2=CLIPTextModel.from_pretrained(clip, dtype=torch.float32).to(device),
        tokenizer_2=lambda prompt, **arguments: clip_tokenizer(
            prompt, **{**arguments, "max_length": limits.clip.max_length}
        ),
        scheduler=OurSchedule(shift=config.metrics.scheduler_scale),
    )
    theirs.prompt_template = get_template("video").text  # they spell the published one differently
    theirs.prompt_template_encode_start_idx = limits.qwen.crop
    return theirs


def encoder_folders(config: Config, weights: Path) -> tuple[Path, Path]:
    encoders = config.model.text_embedder
    paths = (Path(part.checkpoint_path.replace("./weights", str(weights))) for part in (encoders.qwen, encoders.clip))
    qwen, clip = (ROOT / path for path in paths)
    return qwen, clip


def text_part(names: tuple[str, ...], device: torch.device, dtype: torch.dtype, weights: Path) -> Part:
    config = load_config(TINY if device.type == "cpu" else PUBLISHED)
    folders = encoder_folders(config, weights)
    ours = load_text_encoders(config, *folders, device, dtype)
    theirs = load_their_encoders(config, folders, device, dtype)
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.encode([PROMPT]).text_embeds,
        "diffusers": lambda: theirs.encode_prompt(PROMPT, device=device)[0],
    }
    title = f"text encoding: one prompt, {'tiny' if device.type == 'cpu' else 'published'} Qwen2.5-VL and CLIP"
    return Part(title, {name: runs[name] for name in names}, 0)


def generation_part(names: tuple[str, ...], device: torch.device, dtype: torch.dtype, config_path: Path) -> Part:
    """A whole run: text encoding too where the config is the tiny one, else random embeddings and weights."""
    config = load_config(config_path)
    model, generation = config.model, config.generation
    is_tiny = device.type == "cpu"
    devices = dict.fromkeys(("dit", "vae", "text_embedder"), device)
    weights, encoder, given = None, SimpleNamespace(), {"ours": {"text": PROMPT}, "diffusers": {"prompt": PROMPT}}
    if is_tiny:
        weights = load_dit(ROOT / model.checkpoint_path, model.dit_params, "cpu", dtype)
        our_vae: Any = load_vae(ROOT / model.vae.checkpoint_path, device, dtype)
        their_vae = TheirVAE.from_config(TheirVAE.load_config(ROOT / model.vae.checkpoint_path))
        folders = encoder_folders(config, Path())
        encoder = load_text_encoders(config, *folders, device, dtype)
        theirs = load_their_encoders(config, folders, device, dtype)
        given["ours"] |= {"negative_caption": "", "expand_prompts": False}
        given["diffusers"] |= {"negative_prompt": ""}
    else:
        our_vae, their_vae = AutoencoderKLHunyuanVideo().to(device, dtype), TheirVAE()
        randomise(our_vae)
        our_vae.to(memory_format=torch.channels_last_3d)
        theirs = Kandinsky5T2VPipeline(
            None, None, None, None, None, None, OurSchedule(shift=config.metrics.scheduler_scale)
        )
        embeds = torch.randn(1, 128, model.dit_params.in_text_dim).to(device, dtype)
        pooled = torch.randn(1, model.dit_params.in_text_dim2).to(device, dtype)
        text, lengths = TextEmbeddings(embeds, pooled, None), torch.tensor([0, 128], dtype=torch.int32, device=device)
        given["ours"] = {"prompt_embeds": text, "negative_prompt_embeds": text}
        given["diffusers"] = {
            f"{prefix}{name}": value
            for prefix in ("", "negative_")
            for name, value in zip(
                ("prompt_embeds_qwen", "prompt_embeds_clip", "prompt_cu_seqlens"),
                (embeds, pooled, lengths),
                strict=True,
            )
        }
    their_vae.load_state_dict(our_vae.state_dict())
    our_vae.eval().requires_grad_(False)
    their_vae.to(device, dtype).eval().requires_grad_(False)
    dits = build_dits(model.dit_params, names, device, dtype, weights)
    frames = 24 * round(generation.time_length) + 1
    steps, guidance = model.num_steps, model.guidance_weight

    def run(name: str) -> Callable[[], object]:
        if name.startswith("ours"):
            ours = TextToVideoPipeline(config, dits[name], encoder, our_vae, FixedPlacement(devices))  # type: ignore[arg-type]
            return lambda: ours(**given["ours"], num_frames=frames, seed=1, progress=False)
        pipe = copy.copy(theirs)
        pipe.register_modules(transformer=dits[name], vae=their_vae)
        pipe.set_progress_bar_config(disable=True)
        pipe._get_scale_factor = lambda height, width: config.metrics.scale_factor
        sizes = {"width": generation.width, "height": generation.height, "num_frames": frames}

        def call() -> object:
            generator = torch.Generator("cpu").manual_seed(1)
            arguments = {**sizes, "num_inference_steps": steps, "guidance_scale": guidance, "generator": generator}
            return pipe(**given["diffusers"], **arguments, output_type="np", return_dict=False)[0]

        return call

    latents = ((frames - 1) // 4 + 1, generation.height // 8, generation.width // 8)
    z = torch.zeros(1, 16, *latents, device=device, dtype=dtype)
    evaluations = steps * (2 if guidance > 1 else 1)
    flops = evaluations * dit_flops(model.dit_params, latents, 16 if is_tiny else 128)
    flops += counted_flops(lambda: their_vae.decode(z))
    video = f"{frames} frames {generation.width}x{generation.height}"
    title = f"generation: {config_path.stem}, {video}, {evaluations} evaluations"
    return Part(title, {name: run(name) for name in names}, flops)


def build(part: str, names: tuple[str, ...], args: argparse.Namespace) -> Part:
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if part == "forward":
        return forward_part(names, device, dtype)
    if part == "vae":
        return vae_part(names, device, dtype)
    if part == "text":
        return text_part(names, device, dtype, args.weights)
    return generation_part(names, device, dtype, args.config or (TINY if args.device == "cpu" else PUBLISHED))


@torch.no_grad()
def measure_peak(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call needs beyond what is there. The call before it brings what stays: compiled code, threads."""
    run()
    gc.collect()
    wait_for(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        wait_for(device)
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    run()
    return resident("VmHWM") - before


def as_tensor(result: Any) -> torch.Tensor:
    """What a run returned, in one form: videos as (B, 3, T, H, W) from 0 to 255."""
    if isinstance(result, tuple):
        result = result[0]
    if isinstance(result, np.ndarray):
        return torch.from_numpy(result).movedim(-1, 1).float() * 255
    return result.float()


@torch.no_grad()
def difference(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Of each result from the first one's: root mean square over root mean square."""
    results = {name: as_tensor(run()) for name, run in runs.items()}
    first = next(iter(results.values()))
    return {name: ((x - first).square().mean() / first.square().mean()).sqrt().item() for name, x in results.items()}


@torch.no_grad()
def measure_first_call(run: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - begin


def in_a_process(what: str, part: str, name: str, args: argparse.Namespace, cache: str) -> float:
    """`measure_peak` or `measure_first_call` of one implementation in a process of its own."""
    command = [sys.executable, __file__, "--device", args.device, "--dtype", args.dtype, "--threads", str(args.threads)]
    command += ["--weights", str(args.weights), "--child", what, part, name]
    # glibc: give freed tensors back to the system at once, so that what is resident is what is in use.
    environment = os.environ | {CACHE_VARIABLE: cache} | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if what == "peak" else {})
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(result.stdout.split()[-1])


def measure(part: str, names: tuple[str, ...], args: argparse.Namespace, rate: float, cache: str) -> dict[str, Any]:
    device = torch.device(args.device)
    built = build(part, names, args)
    differences = difference(built.runs)
    seconds = median_seconds(built.runs, device, args.repeats or REPEATS[part])
    rows = {name: {"seconds": seconds[name], "difference": differences[name]} for name in names}
    for name, row in rows.items():
        if built.flops:
            row["share_of_floor"] = built.flops / rate / row["seconds"]
        if device.type == "cuda":
            row["peak_mib"] = measure_peak(built.runs[name], device) / 2**20
        elif not args.no_peak:
            row["peak_mib"] = in_a_process("peak", part, name, args, cache) / 2**20
        if part == "forward" and name in COMPILED:
            with tempfile.TemporaryDirectory() as empty:
                row["first_call_cold"] = in_a_process("first", part, name, args, empty)
                row["first_call_warm"] = in_a_process("first", part, name, args, empty)
    print(f"\n{built.title}\n  {'':20}{'s':>9}{'/ diffusers':>13}{'of floor':>10}{'peak MiB':>10}{'difference':>12}")
    for name, row in rows.items():
        ratio = row["seconds"] / rows["diffusers"]["seconds"] if "diffusers" in rows else float("nan")
        share = f"{row['share_of_floor']:.2f}" if built.flops else ""
        peak = f"{row['peak_mib']:.0f}" if "peak_mib" in row else ""
        first = (
            f"  first call {row['first_call_cold']:.1f} s, warm {row['first_call_warm']:.1f} s"
            if "first_call_cold" in row
            else ""
        )
        print(
            f"  {name:20}{row['seconds']:9.4f}{ratio:13.2f}{share:>10}{peak:>10}{row['difference']:12.1e}{first}",
            flush=True,
        )
    return {"part": part, "title": built.title, "flops": built.flops, "implementations": rows}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, else bfloat16")
    parser.add_argument("--part", choices=tuple(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("--only", choices=EAGER + COMPILED, nargs="+", help="these implementations and no others")
    parser.add_argument("--config", type=Path, help="of `generation`, a text-to-video one with dense attention")
    parser.add_argument("--weights", type=Path, default=ROOT / "weights", help="where `text` finds published encoders")
    parser.add_argument("--repeats", type=int, help="timed calls of each implementation")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads on a CPU")
    parser.add_argument("--no_peak", action="store_true", help="leave out peak memory on a CPU, a process each")
    parser.add_argument("--json", type=Path, help="also write the figures here, for benchmarks/_chart.py")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    return args


def main() -> None:
    args = parse_args()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.child:
        what, part, name = args.child
        run = build(part, (name,), args).runs[name]
        print((measure_peak if what == "peak" else measure_first_call)(run, device))
        return

    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{processor_name()}, {args.threads} threads"
    rate = matmul_flops(2048 if args.device == "cpu" else 8192, device, getattr(torch, args.dtype), 5)
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{machine}; torch {torch.__version__}; {args.dtype}; {rate / 1e12:.3f} TFLOP/s; load {load}")
    measured = []
    with tempfile.TemporaryDirectory() as cache:
        for part in args.part:
            if part == "text" and args.device == "cuda" and not args.weights.exists():
                print(f"\ntext encoding is left out: no encoders in {args.weights}")
                continue
            names = tuple(name for name in PARTS[part] if not args.only or name in args.only)
            measured.append(measure(part, names, args, rate, cache))
    if args.json:
        facts = {"machine": machine, "torch": torch.__version__, "dtype": args.dtype, "flops_rate": rate, "load": load}
        command = " ".join(["python", *sys.argv])
        args.json.write_text(json.dumps({**facts, "command": command, "parts": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
