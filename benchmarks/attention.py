"""Attention engines side by side, and NABLA's kernels beside dense attention: time and peak memory, as tables.

    python benchmarks/attention.py [--device cpu|cuda] [--dtype ...] [--part engines|nabla|map|all]
                                   [--head_dim 64 128] [--tokens ...] [--heads ...] [--densities ...]

Every engine that runs on the device is measured in one process, in turns; times are medians. With one thread on a CPU
they are the processor's time, in which what else runs on that core doesn't count. A share is that of the rate at which
this device multiplies two large matrices, measured in the same run. Maps for NABLA are random ones of a given density
(random queries and keys would make NABLA keep nearly everything); making a map from queries and keys is timed by
itself, and so is the choice of the heaviest blocks in it: by a threshold, and by the published sort. Peak memory is
what one call needs beyond its inputs: on CUDA the allocator's peak; on a CPU the peak of the resident set, in a process
of its own for each figure.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

from kandinsky.attention.block_sparse import BLOCK_SPARSE_ENGINES
from kandinsky.attention.engines import AUTO_ORDER, ENGINES, disagreement, obstacle
from kandinsky.attention.nabla import block_means, fast_sta_nabla, heaviest, nabla_block_map, sorted_heaviest
from kandinsky.common.limits import BLOCK_TOKENS

DENSITIES = (0.05, 0.1, 0.2, 0.4)
P = 0.9


@dataclass(frozen=True)
class Sizes:
    """What is measured on a kind of device unless told otherwise."""

    tokens: tuple[int, ...]
    heads: dict[int, int]  # by head_dim
    matrix: int  # rows and columns of the matrices whose product is the measure of all
    dtype: str
    repeats: int


# On a GPU the published models' heads; 47,616 and 93,696 tokens are 5 and 10 s of 768x512.
CPU_SIZES = Sizes((1024, 4096, 8192), {64: 4, 128: 4}, 2048, "float32", 5)
CUDA_SIZES = Sizes((4096, 16384, 47616, 93696), {64: 28, 128: 32}, 8192, "bfloat16", 5)


@dataclass(frozen=True)
class Inputs:
    q: Tensor  # (1, heads, tokens, head_dim), tokens first in memory, as the model makes them
    k: Tensor
    v: Tensor

    @property
    def flops(self) -> float:
        """Of dense attention: two products, a multiplication and an addition each."""
        _, heads, tokens, head_dim = self.q.shape
        return 4.0 * heads * tokens**2 * head_dim

    @property
    def num_blocks(self) -> int:
        return self.q.shape[2] // BLOCK_TOKENS


def make_inputs(heads: int, tokens: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(1, tokens, heads, head_dim, generator=generator, device=device).to(dtype).transpose(1, 2)

    return Inputs(normal(), normal(), normal())


def make_map(inputs: Inputs, density: float) -> Tensor:
    """A random map (1, heads, n, n) of about that density; rows differ in how much they keep, as NABLA's do."""
    blocks, device = inputs.num_blocks, inputs.q.device
    generator = torch.Generator(device).manual_seed(1)
    drawn = torch.rand(1, inputs.q.shape[1], blocks, blocks, generator=generator, device=device) < density
    return drawn | torch.eye(blocks, dtype=torch.bool, device=device)


def computations(inputs: Inputs, names: list[str]) -> dict[str, Callable[[], object]]:
    """By name: "dense NAME", "NAME at DENSITY" and "map"."""
    q, k, v = inputs.q, inputs.k, inputs.v

    def computation(name: str) -> Callable[[], object]:
        if name == "map":
            window = fast_sta_nabla(inputs.num_blocks, 1, 1, 11, 1, 1, q.device)
            return lambda: nabla_block_map(q, k, window, P)
        if name.startswith("dense "):
            engine = ENGINES[name.removeprefix("dense ")]
            return lambda: engine(q, k, v)
        kernel_name, density = name.split(" at ")
        kernel, block_map = BLOCK_SPARSE_ENGINES[kernel_name], make_map(inputs, float(density))
        return lambda: kernel(q, k, v, block_map)

    return {name: computation(name) for name in names}


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measures_processor_time(device: torch.device) -> bool:
    return device.type == "cpu" and torch.get_num_threads() == 1


def seconds(run: Callable[[], object], device: torch.device) -> float:
    clock = time.process_time if measures_processor_time(device) else time.perf_counter
    wait_for(device)
    begin = clock()
    run()
    wait_for(device)
    return clock() - begin


@torch.no_grad()
def median_seconds(runs: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Of each; they take turns, after a first call that isn't counted."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_flops(size: int, device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Operations a second in the product of two square matrices: what a share is a share of. The best of a few."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, b), device) for _ in range(2 * repeats))


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory on a CPU is measured on Linux only")


@torch.no_grad()
def peak_bytes(name: str, inputs: Inputs, small: Inputs) -> int:
    """What a call needs at its peak beyond its inputs. On a CPU: once in a process, after a call with small inputs."""
    (run,) = computations(inputs, [name]).values()
    if inputs.q.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    (warm_up,) = computations(small, [name]).values()
    warm_up()
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    run()
    return resident("VmHWM") - before


def peak_bytes_in_a_process(name: str, inputs: Inputs, args: argparse.Namespace) -> int:
    """`peak_bytes` on a CPU, where memory that an earlier call left behind would hide the next one's."""
    _, heads, tokens, head_dim = inputs.q.shape
    command = [sys.executable, __file__, "--dtype", args.dtype, "--threads", str(args.threads), "--peak_of", name]
    command += ["--heads", str(heads), "--tokens", str(tokens), "--head_dim", str(head_dim)]
    # glibc: give freed tensors back to the system at once, so that what is resident is what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(result.stdout.split()[-1])


def peak_mib(name: str, inputs: Inputs, args: argparse.Namespace) -> float:
    on_gpu = inputs.q.device.type == "cuda"
    return (peak_bytes(name, inputs, inputs) if on_gpu else peak_bytes_in_a_process(name, inputs, args)) / 2**20


def print_engines(inputs: Inputs, names: list[str], args: argparse.Namespace, peak_flops: float) -> None:
    runs = computations(inputs, [f"dense {name}" for name in names])
    for name, time_taken in median_seconds(runs, inputs.q.device, args.repeats).items():
        rate = inputs.flops / time_taken
        print(
            f"  {inputs.q.shape[2]:>8,} {name.removeprefix('dense '):18} {1e3 * time_taken:10.1f} {rate / 1e12:9.3f}"
            f" {rate / peak_flops:8.0%} {peak_mib(name, inputs, args):9.0f}",
            flush=True,
        )


def print_nabla(inputs: Inputs, dense: str, kernels: list[str], args: argparse.Namespace) -> None:
    names = [f"{kernel} at {density}" for kernel in kernels for density in args.densities]
    runs = computations(inputs, ["map", f"dense {dense}", *names])
    times = median_seconds(runs, inputs.q.device, args.repeats)
    map_time, dense_time = times["map"], times[f"dense {dense}"]
    for name in names:
        density = make_map(inputs, float(name.split(" at ")[1])).float().mean().item()
        saved = dense_time - times[name]
        share = f"{map_time / saved:7.1%}" if saved > 0 else "      -"
        print(
            f"  {inputs.q.shape[2]:>8,} {name.split(' at ')[0]:8} {density:8.3f} {1e3 * times[name]:10.1f}"
            f" {dense_time / times[name]:9.2f} {times[name] / (density * dense_time):10.2f}"
            f" {1e3 * map_time:8.1f} {share} {peak_mib(name, inputs, args):9.0f}",
            flush=True,
        )


@torch.no_grad()
def print_map(inputs: Inputs, args: argparse.Namespace) -> None:
    """Of all heads and rows at once; both choose the same."""
    scores = block_means(inputs.q) @ block_means(inputs.k).transpose(-2, -1)  # (heads, n, n)
    mass = torch.softmax(scores / inputs.q.shape[-1] ** 0.5, dim=-1).flatten(0, 1)
    assert torch.equal(heaviest(mass, P), sorted_heaviest(mass, P))
    runs: dict[str, Callable[[], object]] = {
        "threshold": lambda: heaviest(mass, P),
        "sort": lambda: sorted_heaviest(mass, P),
    }
    times = median_seconds(runs, inputs.q.device, args.repeats)
    cells = "".join(f"{1e3 * times[name]:11.2f}" for name in runs)
    print(f"  {inputs.q.shape[2]:>8,}{cells}{times['sort'] / times['threshold']:9.2f}", flush=True)


def runs_here(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the engine can run; says why not."""
    reason = obstacle(name, device, dtype, head_dim) or disagreement(name, device, dtype, head_dim)
    if reason is not None:
        print(f"  without {name}: {reason}")
    return reason is None


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="float32 on a CPU, else bfloat16")
    parser.add_argument("--part", choices=("engines", "nabla", "map", "all"), default="all")
    parser.add_argument("--head_dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--tokens", type=int, nargs="+", help="multiples of 64; up to 8,192 on a CPU, 93,696 on a GPU")
    parser.add_argument("--heads", type=int, help="4 on a CPU, else the published models' 28 and 32")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--kernels", nargs="+", choices=BLOCK_SPARSE_ENGINES, help="sdpa on a CPU, else flex")
    parser.add_argument("--repeats", type=int, help="timed calls of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads on a CPU")
    parser.add_argument("--peak_of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = CPU_SIZES if args.device == "cpu" else CUDA_SIZES
    args.tokens = args.tokens or list(sizes.tokens)
    args.dtype = args.dtype or sizes.dtype
    args.repeats = args.repeats or sizes.repeats
    args.kernels = args.kernels or (["sdpa"] if args.device == "cpu" else ["flex"])
    if wrong := [n for n in args.tokens if n % BLOCK_TOKENS or n < BLOCK_TOKENS]:
        parser.error(f"--tokens {wrong[0]}: a multiple of {BLOCK_TOKENS} is needed")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    sizes = CPU_SIZES if device.type == "cpu" else CUDA_SIZES

    def inputs_of(tokens: int, head_dim: int) -> Inputs:
        heads = args.heads or sizes.heads.get(head_dim, 4)
        return make_inputs(heads, tokens, head_dim, device, dtype)

    if args.peak_of:
        inputs = inputs_of(args.tokens[0], args.head_dim[0])
        print(peak_bytes(args.peak_of, inputs, inputs_of(4 * BLOCK_TOKENS, args.head_dim[0])))
        return

    print(f"python {' '.join(sys.argv)}")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{processor_name()}, {args.threads} threads"
    peak_flops = matmul_flops(sizes.matrix, device, dtype, args.repeats)
    print(f"{machine}; torch {torch.__version__}; {args.dtype}; matmul {peak_flops / 1e12:.3f} TFLOP/s")
    print(f"times: {'of the processor' if measures_processor_time(device) else 'by the clock'}")
    for head_dim in args.head_dim:
        heads = inputs_of(BLOCK_TOKENS, head_dim).q.shape[1]
        print(f"\nhead_dim {head_dim}, {heads} heads")
        # What emulates an engine is not measured: its time is nobody's.
        names = [name for name in ENGINES if name != "sage_emulated" and runs_here(name, device, dtype, head_dim)]
        if args.part in ("map", "all"):
            print("  NABLA's choice of the heaviest blocks, ms\n    tokens  threshold       sort x faster")
            for tokens in args.tokens:
                print_map(inputs_of(tokens, head_dim), args)
        if args.part in ("engines", "all"):
            print(f"  {'tokens':>8} {'engine':18} {'ms':>10} {'TFLOP/s':>9} {'of peak':>8} {'peak MiB':>9}")
            for tokens in args.tokens:
                print_engines(inputs_of(tokens, head_dim), names, args, peak_flops)
        if args.part in ("nabla", "all"):
            dense = next(name for name in AUTO_ORDER if name in names)
            print(f"  NABLA beside dense attention ({dense}); time / (density x dense) is 1 where nothing is lost")
            print(
                f"  {'tokens':>8} {'kernel':8} {'density':>8} {'ms':>10} {'x faster':>9} {'t/(d*den.)':>10}"
                f" {'map ms':>8} {'of saved':>7} {'peak MiB':>9}"
            )
            for tokens in args.tokens:
                print_nabla(inputs_of(tokens, head_dim), dense, args.kernels, args)


if __name__ == "__main__":
    main()
