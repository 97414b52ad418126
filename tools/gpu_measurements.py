"""What `tools/first_hour.py` measures in Python: each step gives figures, a dictionary that is written down as JSON.

With `REAL` sizes on a GPU, with `DRY` ones on a CPU, where the figures mean nothing and only the way is gone.
Knows nothing of files, of the other programs, or of what the figures are compared with.
"""

from __future__ import annotations

import math
import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kandinsky.attention.engines import AUTO_ORDER, ENGINES, disagreement, obstacle
from kandinsky.attention.nabla import sorted_heaviest
from kandinsky.common.limits import LEAST_FRAMES_ON_GPU, STAGING_BYTES
from kandinsky.config.schema import DiTConfig
from kandinsky.models import causal_conv
from kandinsky.models.dit import DiffusionTransformer3D, Execution
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
from kandinsky.planning.activations import dit_activations
from kandinsky.runtime import staging
from kandinsky.runtime.compile import CACHE_VARIABLE, with_compiled_blocks

Figures = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What the steps of this file measure with."""

    device: torch.device
    num_bytes: int  # of a copy
    matrix: int
    heads: tuple[tuple[int, int], ...]  # how many, of which dimension
    tokens: int
    map_rows: tuple[int, int]  # of NABLA's map: rows that are worked on at once, blocks
    latents: tuple[int, int, int]
    dit: DiTConfig
    vae_channels: tuple[int, ...]
    vae_window: tuple[int, int, int]  # latent frames, rows, columns that are decoded in one piece
    dtype: torch.dtype


REAL = Sizes(
    torch.device("cuda", 0), 2**30, 8192, ((28, 64), (32, 128)), 47616, (2**24 // 744, 744), (31, 64, 96), DiTConfig(),
    (128, 256, 512, 512), (5, 64, 64), torch.bfloat16,
)  # fmt: skip
DRY = Sizes(
    torch.device("cpu"), 2**20, 64, ((2, 64),), 128, (64, 32), (1, 4, 4),
    DiTConfig(model_dim=64, ff_dim=64, num_text_blocks=1, num_visual_blocks=2, in_text_dim=16, in_text_dim2=16,
              time_dim=16), (8, 8, 8, 8), (2, 2, 2), torch.float32,
)  # fmt: skip


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The shortest of some calls, after one that isn't counted."""
    times = []
    for _ in range(repeats + 1):
        wait(device)
        begin = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def context(sizes: Sizes) -> Figures:
    """What CUDA takes before there are weights, if nobody else is on the GPU; on the host too, with all of Python."""
    torch.ones(16, 16, device=sizes.device) @ torch.ones(16, 16, device=sizes.device)  # cuBLAS belongs to it
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if sizes.device.type != "cuda":
        return {"context": 0, "host": host, "device": "cpu"}
    free, total = torch.cuda.mem_get_info(sizes.device)
    taken = total - free - torch.cuda.memory_reserved(sizes.device)
    return {"context": taken, "host": host, "device": torch.cuda.get_device_name(sizes.device), "memory": total}


def rates(sizes: Sizes) -> Figures:
    """Bytes a second from pinned memory and from a mapped file; operations a second; a copy hidden by computing."""
    device, on_gpu = sizes.device, sizes.device.type == "cuda"
    host = torch.empty(sizes.num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
    target = torch.empty_like(host, device=device, pin_memory=False)
    copying = seconds(lambda: target.copy_(host, non_blocking=True), device)
    figures = {"link": sizes.num_bytes / copying, "files": sizes.num_bytes / _seconds_from_a_file(target)}
    a = torch.randn(sizes.matrix, sizes.matrix, device=device, dtype=sizes.dtype)
    computing = seconds(lambda: a @ a, device)
    figures["flops"] = 2 * sizes.matrix**3 / computing
    twin = torch.empty_like(target)
    figures["memory"] = 2 * sizes.num_bytes / seconds(lambda: twin.copy_(target), device)  # read and written
    on_host = torch.randn(sizes.matrix // 4, sizes.matrix // 4)
    figures["host flops"] = 2 * len(on_host) ** 3 / seconds(lambda: on_host @ on_host, torch.device("cpu"))
    if on_gpu:
        stream, products = torch.cuda.Stream(device), max(1, round(copying / computing))

        def both() -> None:
            with torch.cuda.stream(stream):
                target.copy_(host, non_blocking=True)
            for _ in range(products):
                a @ a
            stream.synchronize()

        # 1: the copy is hidden altogether; 0: one after the other.
        figures["overlap"] = (copying + products * computing - seconds(both, device)) / copying
    return figures


def _seconds_from_a_file(target: Tensor) -> float:
    """The shortest of some copies from a mapped file that the system has, where it can, forgotten before each."""
    times = []
    with tempfile.NamedTemporaryFile(dir=Path.cwd()) as file:  # not where temporary files may lie in memory
        file.write(os.urandom(len(target)))
        file.flush()
        os.fsync(file.fileno())
        for _ in range(3):
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            mapped = torch.from_file(file.name, shared=False, size=len(target), dtype=torch.uint8)
            wait(target.device)
            begin = time.perf_counter()
            target.copy_(mapped)
            wait(target.device)
            times.append(time.perf_counter() - begin)
            del mapped  # pages that are mapped are not forgotten
    return min(times)


@torch.no_grad()
def engines(sizes: Sizes) -> Figures:
    """Seconds of each attention engine that runs here, for both head dimensions; why the others don't."""
    figures: Figures = {}
    for heads, head_dim in sizes.heads:
        q = torch.randn(1, heads, sizes.tokens, head_dim, device=sizes.device, dtype=sizes.dtype)
        for name in ENGINES:
            given = (name, sizes.device, sizes.dtype, head_dim)
            reason = obstacle(*given) or disagreement(*given)
            attention = ENGINES[name]
            figures[f"{name} {head_dim}"] = reason or seconds(lambda a=attention, q=q: a(q, q, q), sizes.device)  # type: ignore[misc]
    for _, head_dim in sizes.heads:
        timed = [name for name in AUTO_ORDER if isinstance(figures.get(f"{name} {head_dim}"), float)]
        figures[f"order {head_dim}"] = sorted(timed, key=lambda name: figures[f"{name} {head_dim}"])
    return figures


@torch.no_grad()
def forward(sizes: Sizes) -> Figures:
    """Lite's forward: what PyTorch's allocator takes beside the plan, and what compiling costs and brings."""
    device, params = sizes.device, sizes.dit
    with torch.device(device):
        dit = DiffusionTransformer3D(**asdict(params)).to(sizes.dtype)
        inputs = (
            torch.randn(1, *sizes.latents, params.in_visual_dim), torch.randn(1, 256, params.in_text_dim),
            torch.randn(1, params.in_text_dim2), torch.full((1,), 500.0),
        )  # fmt: skip
    tables = dit.request_tables(sizes.latents, 256, (1.0, 2.0, 2.0), device)
    figures: Figures = {"eager": 0.0}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        dit(*inputs, tables=tables)
        tokens = sizes.latents[0] * sizes.latents[1] * sizes.latents[2] // 4
        planned = dit_activations(params, tokens, 256, 2, on_gpu=True)
        figures |= {"planned": planned, "allocated": torch.cuda.max_memory_allocated(device) - before}
        figures["slack"] = (torch.cuda.max_memory_reserved(device) - before) / planned - 1
    figures["eager"] = seconds(lambda: dit(*inputs, tables=tables), device, 3)
    backend = "inductor" if device.type == "cuda" else "eager"
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {CACHE_VARIABLE: folder}):
        for name in ("nothing on disk", "kernels on disk"):  # the second finds what the first has left there
            torch.compiler.reset()
            execution = with_compiled_blocks(Execution(), backend=backend)
            begin = time.perf_counter()
            dit(*inputs, tables=tables, execution=execution)
            wait(device)
            figures[f"first, {name}"] = time.perf_counter() - begin
        figures["compiled"] = seconds(lambda: dit(*inputs, tables=tables, execution=execution), device, 3)
    gain = figures["eager"] - figures["compiled"]
    for name in ("nothing on disk", "kernels on disk"):
        cost = figures[f"first, {name}"] - figures["compiled"]
        figures[f"break even, {name}"] = math.ceil(cost / gain) if gain > 0 else "never"
    return figures


@torch.no_grad()
def staged_copies(sizes: Sizes) -> Figures:
    """Seconds of bringing tensors from a mapped file to the device: plainly, and through buffers of some sizes."""
    device, pieces = sizes.device, 8
    with tempfile.NamedTemporaryFile() as file:
        file.write(os.urandom(2**16))
        file.truncate(sizes.num_bytes)
        mapped = torch.from_file(file.name, shared=False, size=sizes.num_bytes, dtype=torch.uint8)
        sources = [piece for piece in mapped.split(sizes.num_bytes // pieces)]
        targets = [torch.empty_like(piece, device=device) for piece in sources]

        def plain() -> None:
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)

        def through_buffers() -> None:
            with staging.Staging(device) as copies:
                for _ in copies.bring(zip(targets, sources, strict=True)):
                    pass

        figures: Figures = {"plain": seconds(plain, device)}
        staged = {}
        for size in (STAGING_BYTES // 4, STAGING_BYTES, 4 * STAGING_BYTES):
            with mock.patch.object(staging, "STAGING_BYTES", size):
                staged[size] = figures[f"staged by {size}"] = seconds(through_buffers, device)
        assert all(torch.equal(target.cpu(), source) for target, source in zip(targets, sources, strict=True))
    figures["best bytes"] = min(staged, key=lambda size: staged[size])
    figures["times as fast as plain"] = figures["plain"] / staged[STAGING_BYTES]
    return figures


def bisected_heaviest(mass: Tensor, P: float, rounds: int = 24) -> Tensor:
    """NABLA's selection without sorting: the largest mass below which everything together stays below 1 - P.

    Of equal masses all are kept, where the published formula may drop some: what this costs is to be known before an
    exact one is written.
    """
    low, high = torch.zeros_like(mass[:, :1]), mass.amax(-1, keepdim=True)
    for _ in range(rounds):
        middle = (low + high) / 2
        is_below = torch.where(mass <= middle, mass, 0).sum(-1, keepdim=True) < 1 - P
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return mass > low


@torch.no_grad()
def nabla_map(sizes: Sizes) -> Figures:
    """Seconds of choosing NABLA's blocks: by the published sort, and by bisection; the share of both's differences."""
    mass = torch.softmax(3 * torch.randn(*sizes.map_rows, device=sizes.device), dim=-1)
    by_sort, by_bisection = sorted_heaviest(mass, 0.9), bisected_heaviest(mass, 0.9)
    figures: Figures = {"different": float((by_sort != by_bisection).float().mean())}
    figures["sort"] = seconds(lambda: sorted_heaviest(mass, 0.9), sizes.device)
    figures["bisection"] = seconds(lambda: bisected_heaviest(mass, 0.9), sizes.device)
    figures["faster"] = min(("sort", "bisection"), key=lambda name: figures[name])
    return figures


@torch.no_grad()
def vae_chunks(sizes: Sizes) -> Figures:
    """Decoding a window of a video in chunks of several lengths, and in the other memory format: seconds a frame, and
    on a GPU the allocator's peak."""
    device = sizes.device
    vae = AutoencoderKLHunyuanVideo(block_out_channels=sizes.vae_channels, norm_num_groups=min(32, *sizes.vae_channels))
    vae = vae.to(device, sizes.dtype)
    latents = torch.randn(1, 16, *sizes.vae_window, device=device, dtype=sizes.dtype)
    frames = 4 * sizes.vae_window[0] - 3
    figures: Figures = {}

    def measure(name: str, at_once: int) -> None:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        with mock.patch.object(causal_conv, "frames_at_once", lambda x: at_once):
            figures[name] = seconds(lambda: vae.decode(latents), device, 3) / frames
        if device.type == "cuda":
            figures[f"peak {name}"] = torch.cuda.max_memory_allocated(device)

    measure("contiguous", LEAST_FRAMES_ON_GPU)
    vae.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    lengths = (2, LEAST_FRAMES_ON_GPU, frames)
    for at_once in lengths:
        measure(str(at_once), at_once)
    figures["fastest"] = min(lengths, key=lambda at_once: figures[str(at_once)])
    figures["channels last, times as fast"] = figures["contiguous"] / figures[str(LEAST_FRAMES_ON_GPU)]
    return figures


STEPS: dict[str, Callable[[Sizes], Figures]] = {
    "context": context, "rates": rates, "engines": engines, "forward": forward, "staging": staged_copies,
    "nabla_map": nabla_map, "vae_chunks": vae_chunks,
}  # fmt: skip
