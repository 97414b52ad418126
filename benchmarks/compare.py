"""Our models beside diffusers', with the same weights in one run: time and peak memory, as a table.

    python benchmarks/compare.py [--device cpu|cuda] [--dtype float32|bfloat16] [--part dit|vae|image|all] [--compile]

Times are medians over repeats in which the two implementations take turns, without autograd. Peak memory is what one
call needs beyond the weights: on CUDA the allocator's peak; on a CPU the peak of the resident set, in a process of its
own for each implementation, above what is resident after a small warm-up call. Knows nothing about pipelines and needs
no checkpoints: the weights are random. diffusers runs as it ships, its rounding of rotated queries and keys included.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL as TheirImageVAE
from diffusers import AutoencoderKLHunyuanVideo as TheirVAE
from diffusers import Kandinsky5Transformer3DModel as TheirDiT
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

from kandinsky.models.dit import DiffusionTransformer3D
from kandinsky.models.vae_flux import AutoencoderKL
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
from kandinsky.models.vae_tiling import VAETiling

IMPLEMENTATIONS = ("ours", "diffusers")
CASES = ("dit", "vae window", "vae windows", "image vae")
SCALE_FACTOR = (1.0, 2.0, 2.0)
WINDOWS = VAETiling(frames=17, frame_stride=8, size=4096)  # in time only


@dataclass(frozen=True)
class Sizes:
    """What is measured on a kind of device."""

    model_dim: int
    visual_blocks: int
    latents: tuple[int, int, int]  # the DiT's; 1x2x2 of them make a token
    text_tokens: int
    vae_channels: tuple[int, int, int, int]
    vae_latents: tuple[int, int]  # height and width
    image_latents: tuple[int, int]
    repeats: int


CPU_SIZES = Sizes(512, 4, (8, 32, 32), 64, (64, 128, 256, 256), (12, 12), (64, 64), 3)
CUDA_SIZES = Sizes(1792, 8, (16, 64, 96), 128, (128, 256, 512, 512), (64, 96), (128, 128), 5)


@dataclass(frozen=True)
class Case:
    """One computation, in both implementations: `run[name]()`; `warm_up[name]()` is a small one of the same kind."""

    title: str
    run: dict[str, Callable[[], Tensor]]
    warm_up: dict[str, Callable[[], Tensor]]
    comparable: Callable[[Tensor], Tensor] = lambda result: result  # the part that both should agree on
    note: str = ""


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Random values everywhere (a new DiT's modulations are zero) that keep activations of order one."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, device=device)
        if parameter.dim() > 1:
            parameter.copy_(values / math.sqrt(math.prod(parameter.shape[1:])))
        else:
            parameter.copy_(0.2 * values + (1 if "norm" in name and name.endswith("weight") else 0))


def dit_case(sizes: Sizes, device: torch.device, dtype: torch.dtype, compiled: bool) -> Case:
    params = {
        "in_visual_dim": 16,
        "out_visual_dim": 16,
        "in_text_dim": 256,
        "in_text_dim2": 64,
        "time_dim": 512,
        "model_dim": sizes.model_dim,
        "ff_dim": 4 * sizes.model_dim,
        "num_text_blocks": 1,
        "num_visual_blocks": sizes.visual_blocks,
        "visual_cond": True,
    }
    theirs = TheirDiT(patch_size=(1, 2, 2), axes_dims=(16, 24, 24), **params)
    randomise(theirs)
    ours = DiffusionTransformer3D(**params)
    ours.load_state_dict(theirs.state_dict())
    if dtype != torch.float32:  # from_pretrained is what keeps their time embedding and modulations in float32
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            theirs = TheirDiT.from_pretrained(folder, torch_dtype=dtype)
    ours.to(device, dtype).eval()
    theirs.to(device).eval()
    run_ours = torch.compile(ours) if compiled else ours
    run_theirs = torch.compile(theirs) if compiled else theirs

    def calls(size: tuple[int, int, int]) -> dict[str, Callable[[], Tensor]]:
        frames, height, width = size
        latents = torch.randn(1, *size, 33).to(device, dtype)
        text = torch.randn(1, sizes.text_tokens, 256).to(device, dtype)
        pooled = torch.randn(1, 64).to(device, dtype)
        timesteps = torch.tensor([723.4567], device=device)
        tables = ours.request_tables(size, sizes.text_tokens, SCALE_FACTOR, device)
        positions = [torch.arange(n, device=device) for n in (frames, height // 2, width // 2)]
        text_positions = torch.arange(sizes.text_tokens, device=device)
        return {
            "ours": lambda: run_ours(latents, text, pooled, timesteps, SCALE_FACTOR, tables=tables),
            "diffusers": lambda: run_theirs(
                hidden_states=latents,
                encoder_hidden_states=text,
                pooled_projections=pooled,
                timestep=timesteps,
                visual_rope_pos=positions,
                text_rope_pos=text_positions,
                scale_factor=SCALE_FACTOR,
                return_dict=False,
            ),
        }

    frames, height, width = sizes.latents
    title = (
        f"DiT forward, {'compiled' if compiled else 'eager'}: dim {sizes.model_dim}, 1 + {sizes.visual_blocks} blocks, "
        f"{frames * height * width // 4:,} tokens"
    )
    run = calls(sizes.latents)
    # Compiled code is made for one size: the warm-up is then the real call.
    return Case(title, run, run if compiled else calls((2, 8, 8)))


def vae_case(sizes: Sizes, device: torch.device, dtype: torch.dtype, latent_frames: int) -> Case:
    """Decoding: one window of 5 latent frames untiled, or more frames in windows of 5 with a stride of 2."""
    theirs = TheirVAE(block_out_channels=sizes.vae_channels).eval().requires_grad_(False)
    randomise(theirs)
    ours = AutoencoderKLHunyuanVideo(block_out_channels=sizes.vae_channels)
    ours.load_state_dict(theirs.state_dict())
    ours.to(device, dtype).eval().requires_grad_(False)
    theirs.to(device, dtype)
    ours.convolve_by_frame(device.type == "cpu")
    ours.to(memory_format=torch.channels_last_3d)  # as it is loaded
    windowed = latent_frames > 5
    theirs.use_framewise_decoding = windowed
    theirs.tile_sample_min_num_frames, theirs.tile_sample_stride_num_frames = 16, 8

    def calls(frames: int, height: int, width: int) -> dict[str, Callable[[], Tensor]]:
        latents = torch.randn(1, 16, frames, height, width).to(device, dtype)
        return {
            "ours": lambda: ours.decode(latents, WINDOWS if windowed else None),
            "diffusers": lambda: theirs.decode(latents, return_dict=False)[0],
        }

    height, width = sizes.vae_latents
    title = (
        f"VAE decode, {'windows of 17 frames' if windowed else 'one window'}: channels {sizes.vae_channels}, "
        f"{4 * latent_frames - 3} frames {8 * width}x{8 * height}"
    )
    run, warm_up = calls(latent_frames, height, width), calls(2, 4, 4)
    if not windowed:
        return Case(title, run, warm_up)
    # diffusers also decodes the windows that begin in the last 4 latent frames, cut short, and blends them in.
    shared = 4 * (latent_frames - 3) + 1
    note = f"compared on the first {shared} frames: diffusers cuts two more windows short at the end"
    return Case(title, run, warm_up, lambda result: result[:, :, :shared], note)


def image_vae_case(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
    """Decoding one picture, untiled; ours in the memory format that it is loaded in, diffusers as it ships."""
    structure = {
        "block_out_channels": sizes.vae_channels,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    theirs = TheirImageVAE(**structure).eval().requires_grad_(False)
    randomise(theirs)
    ours = AutoencoderKL(block_out_channels=sizes.vae_channels)
    ours.load_state_dict(theirs.state_dict())
    ours.to(device, dtype).eval().requires_grad_(False)
    theirs.to(device, dtype)
    if device.type == "cpu":
        ours.to(memory_format=torch.channels_last)

    def calls(height: int, width: int) -> dict[str, Callable[[], Tensor]]:
        latents = torch.randn(1, 16, height, width).to(device, dtype)
        return {
            "ours": lambda: ours.decode(latents),
            "diffusers": lambda: theirs.decode(latents, return_dict=False)[0],
        }

    height, width = sizes.image_latents
    title = f"image VAE decode: channels {sizes.vae_channels}, {8 * width}x{8 * height}"
    return Case(title, calls(height, width), calls(4, 4))


def build(name: str, device: torch.device, dtype: torch.dtype, compiled: bool = False) -> Case:
    sizes = CPU_SIZES if device.type == "cpu" else CUDA_SIZES
    if name == "dit":
        return dit_case(sizes, device, dtype, compiled)
    if name == "image vae":
        return image_vae_case(sizes, device, dtype)
    return vae_case(sizes, device, dtype, latent_frames=5 if name == "vae window" else 7)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def measure_times(case: Case, device: torch.device, repeats: int) -> tuple[dict[str, float], float]:
    """Median seconds of each implementation, and the largest difference of their results over its root mean square."""
    first = {name: case.comparable(case.run[name]()).float() for name in IMPLEMENTATIONS}  # also the warm-up
    scale = first["ours"].square().mean().sqrt()
    difference = ((first["ours"] - first["diffusers"]).abs().max() / scale).item()
    seconds: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(repeats):
        for name in IMPLEMENTATIONS:
            wait_for(device)
            begin = time.perf_counter()
            case.run[name]()
            wait_for(device)
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}, difference


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory on a CPU is measured on Linux only")


@torch.no_grad()
def measure_peak(case: Case, implementation: str, device: torch.device) -> int:
    """Bytes that one call needs at its peak, beyond what is there before it. On a CPU: once in a process."""
    case.warm_up[implementation]()
    gc.collect()
    if device.type == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.run[implementation]()
        wait_for(device)
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    case.run[implementation]()
    return resident("VmHWM") - before


def measure_peak_in_a_process(name: str, implementation: str, args: argparse.Namespace, compiled: bool) -> int:
    """`measure_peak` on a CPU, where memory that an earlier call left behind would hide the next one's."""
    command = [sys.executable, __file__, "--dtype", args.dtype, "--peak_of", name, implementation]
    command += ["--threads", str(args.threads)] + (["--compile"] if compiled else [])
    # glibc: give freed tensors back to the system at once, so that what is resident is what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(result.stdout.split()[-1])


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def print_comparison(name: str, args: argparse.Namespace, device: torch.device, compiled: bool) -> None:
    case = build(name, device, getattr(torch, args.dtype), compiled)
    repeats = args.repeats or (CPU_SIZES if device.type == "cpu" else CUDA_SIZES).repeats
    seconds, difference = measure_times(case, device, repeats)
    if device.type == "cuda":
        peaks = {side: measure_peak(case, side, device) for side in IMPLEMENTATIONS}
    else:
        peaks = {side: measure_peak_in_a_process(name, side, args, compiled) for side in IMPLEMENTATIONS}
    print(f"\n{case.title}\n  largest difference / rms {difference:.1e}{'; ' + case.note if case.note else ''}")
    print(f"  {'':10}{'ours':>12}{'diffusers':>12}{'ratio':>8}")
    for label, values, unit, scale in (("time", seconds, "s", 1.0), ("peak", peaks, "MiB", 2.0**20)):
        ours, theirs = (values[side] / scale for side in IMPLEMENTATIONS)
        digits = 3 if unit == "s" else 0
        print(f"  {label + ' ' + unit:10}{ours:12.{digits}f}{theirs:12.{digits}f}{ours / theirs:8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--part", choices=("dit", "vae", "image", "all"), default="all")
    parser.add_argument("--compile", action="store_true", help="also the DiT compiled by torch.compile")
    parser.add_argument("--repeats", type=int, help="timed calls of each implementation")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads on a CPU")
    parser.add_argument("--peak_of", nargs=2, metavar=("CASE", "IMPLEMENTATION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    diffusers_logging.set_verbosity_error()  # it advises from_pretrained, for modules that this model does not have
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)

    if args.peak_of:
        name, implementation = args.peak_of
        print(measure_peak(build(name, device, getattr(torch, args.dtype), args.compile), implementation, device))
        return

    print(f"python {' '.join(sys.argv)}")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{processor_name()}, {args.threads} threads"
    print(f"{machine}; torch {torch.__version__}; {args.dtype}")
    for name in CASES:
        if args.part != "all" and not name.startswith(args.part):
            continue
        print_comparison(name, args, device, compiled=False)
        if args.compile and name == "dit":
            print_comparison(name, args, device, compiled=True)


if __name__ == "__main__":
    main()
