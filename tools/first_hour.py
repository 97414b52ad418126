"""The first hour on a GPU: every figure that the code assumes, measured, in steps that can be gone on with.

    python tools/first_hour.py [--dry] [--again STEP ...] [--folder benchmarks/gpu]

Each step leaves a JSON file; one that is there is not measured again unless --again names it. The table at the end says
what was assumed, what was measured, and where to change it. --dry goes through every step on the CPU with tiny sizes,
and of other programs asks only for their help; its figures mean nothing and go into a folder of their own.
Nothing of this has ever run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

from kandinsky.attention.engines import AUTO_ORDER, ENGINES, disagreement, obstacle
from kandinsky.config.schema import DiTConfig
from kandinsky.models.dit import DiffusionTransformer3D, Execution
from kandinsky.planning.activations import dit_activations
from kandinsky.planning.machine import CUDA_CONTEXT, GPU_SLACK, Machine
from kandinsky.runtime.compile import BREAK_EVEN_EVALUATIONS, with_compiled_blocks

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 9 * 60  # seconds of a step
Figures = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What the steps of this file measure with."""

    device: torch.device
    num_bytes: int  # of a copy
    matrix: int
    tokens: int
    latents: tuple[int, int, int]
    dit: DiTConfig
    dtype: torch.dtype


REAL = Sizes(torch.device("cuda", 0), 2**30, 8192, 47616, (31, 64, 96), DiTConfig(), torch.bfloat16)
DRY = Sizes(
    torch.device("cpu"), 2**20, 64, 128, (1, 4, 4),
    DiTConfig(model_dim=64, ff_dim=64, num_text_blocks=1, num_visual_blocks=2, in_text_dim=16, in_text_dim2=16,
              time_dim=16), torch.float32,
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
    """What CUDA takes before there are tensors, if nobody else is on the GPU."""
    if sizes.device.type != "cuda":
        return {"context": 0, "device": "cpu"}
    torch.zeros(1, device=sizes.device)
    free, total = torch.cuda.mem_get_info(sizes.device)
    taken = total - free - torch.cuda.memory_reserved(sizes.device)
    return {"context": taken, "device": torch.cuda.get_device_name(sizes.device), "memory": total}


def rates(sizes: Sizes) -> Figures:
    """Bytes a second from pinned memory and from a mapped file; operations a second; a copy hidden by computing."""
    device, on_gpu = sizes.device, sizes.device.type == "cuda"
    host = torch.empty(sizes.num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
    target = torch.empty_like(host, device=device, pin_memory=False)
    copying = seconds(lambda: target.copy_(host, non_blocking=True), device)
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(sizes.num_bytes)
        mapped = torch.from_file(file.name, shared=False, size=sizes.num_bytes, dtype=torch.uint8)
        reading = seconds(lambda: target.copy_(mapped), device)
    a = torch.randn(sizes.matrix, sizes.matrix, device=device, dtype=sizes.dtype)
    computing = seconds(lambda: a @ a, device)
    figures = {"link": sizes.num_bytes / copying, "files": sizes.num_bytes / reading}
    figures["flops"] = 2 * sizes.matrix**3 / computing
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


@torch.no_grad()
def engines(sizes: Sizes) -> Figures:
    """Seconds of each attention engine that runs here, for both head dimensions; why the others don't."""
    figures: Figures = {}
    for heads, head_dim in ((28, 64), (32, 128)) if sizes is REAL else ((2, 64),):
        q = torch.randn(1, heads, sizes.tokens, head_dim, device=sizes.device, dtype=sizes.dtype)
        for name in ENGINES:
            given = (name, sizes.device, sizes.dtype, head_dim)
            reason = obstacle(*given) or disagreement(*given)
            attention = ENGINES[name]
            figures[f"{name} {head_dim}"] = reason or seconds(lambda a=attention, q=q: a(q, q, q), sizes.device)  # type: ignore[misc]
    for head_dim in (64, 128):
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
    execution = with_compiled_blocks(Execution(), backend="inductor" if device.type == "cuda" else "eager")
    begin = time.perf_counter()
    dit(*inputs, tables=tables, execution=execution)
    wait(device)
    figures["first"] = time.perf_counter() - begin
    figures["compiled"] = seconds(lambda: dit(*inputs, tables=tables, execution=execution), device, 3)
    gain = figures["eager"] - figures["compiled"]
    figures["break even, nothing on disk"] = figures["first"] / gain if gain > 0 else None
    return figures


STEPS: dict[str, Callable[[Sizes], Figures]] = {
    "context": context, "rates": rates, "engines": engines, "forward": forward,
}  # fmt: skip
SPEED = ("benchmarks/speed.py", "--device", "cuda", "--part")
PROGRAMS: dict[str, tuple[str, ...]] = {
    "tests": ("-m", "pytest", "-q", "-m", "gpu", "tests"),
    "attention": ("benchmarks/attention.py", "--device", "cuda", "--part", "engines"),
    "nabla": ("benchmarks/attention.py", "--device", "cuda", "--part", "nabla"),
    "memory": ("benchmarks/memory.py", "--device", "cuda", "--latents", "31", "64", "96"),
    **{f"speed_{part}": (*SPEED, part) for part in ("forward", "vae", "text")},
    **{
        f"run_{path.stem.removeprefix('config_')}": (*SPEED, "generation", "--configs", str(path.relative_to(ROOT)))
        for path in sorted((ROOT / "configs").glob("config_*.yaml"))
        if "tiny" not in path.stem
    },
}
# What is assumed, its value, step and name of the figure, and where it stands.
ASSUMED: tuple[tuple[str, Any, str, str, str], ...] = (
    ("CUDA_CONTEXT, bytes", CUDA_CONTEXT, "context", "context", "kandinsky/planning/machine.py"),
    ("Machine.link, bytes/s", Machine.link, "rates", "link", "kandinsky/planning/machine.py"),
    ("Machine.files, bytes/s", Machine.files, "rates", "files", "kandinsky/planning/machine.py"),
    ("Machine.flops", Machine.flops, "rates", "flops", "kandinsky/planning/machine.py"),
    ("copies hide behind computing", 1, "rates", "overlap", "kandinsky/runtime/block_swap.py"),
    ("GPU_SLACK", GPU_SLACK, "forward", "slack", "kandinsky/planning/machine.py"),
    ("BREAK_EVEN_EVALUATIONS", BREAK_EVEN_EVALUATIONS, "forward", "break even, nothing on disk",
     "kandinsky/runtime/compile.py"),
    ("AUTO_ORDER, head_dim 64", AUTO_ORDER, "engines", "order 64", "kandinsky/attention/engines.py"),
    ("AUTO_ORDER, head_dim 128", AUTO_ORDER, "engines", "order 128", "kandinsky/attention/engines.py"),
)  # fmt: skip


def run_program(words: tuple[str, ...], dry: bool) -> Figures:
    """A program's status, seconds and last lines; ended after `LIMIT`."""
    words = (*words[: 2 if words[0] == "-m" else 1], "--help") if dry else words
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {LIMIT} s", "command": words}
    figures = {"command": words, "seconds": time.perf_counter() - begin, "output": done.stdout[-20000:]}
    if done.returncode:
        figures["error"] = f"ended with {done.returncode}: {done.stderr[-2000:]}"
    return figures


def take_steps(folder: Path, dry: bool, again: list[str], programs: dict[str, tuple[str, ...]] = PROGRAMS) -> None:
    """Every step that has no figures yet."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = DRY if dry else REAL
    for name in [*STEPS, *programs]:
        file = folder / f"{name}.json"
        if file.exists() and name not in again and "error" not in json.loads(file.read_text()):
            continue
        print(f"{name} ...", flush=True)
        try:
            figures = STEPS[name](sizes) if name in STEPS else run_program(programs[name], dry)
        except Exception as error:  # the next step may well work
            figures = {"error": f"{type(error).__name__}: {error}"}
        file.write_text(json.dumps(figures, indent=1))


def table(folder: Path) -> str:
    """What was assumed beside what was measured, and what failed."""
    lines = ["| what | assumed | measured | where |", "|---|---|---|---|"]
    found = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    for what, assumed, step, name, where in ASSUMED:
        value = found.get(step, {}).get(name, "not measured")
        lines.append(f"| {what} | {assumed} | {value} | {where} |")
    failed = [f"{name}: {figures['error']}" for name, figures in found.items() if "error" in figures]
    return "\n".join([*lines, *failed])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--again", nargs="+", default=[], choices=[*STEPS, *PROGRAMS], help="measure these once more")
    parser.add_argument("--folder", type=Path, help="of the figures; default: benchmarks/gpu")
    args = parser.parse_args()
    dry = args.dry or not torch.cuda.is_available()
    folder = args.folder or ROOT / ("outputs/gpu_dry" if dry else "benchmarks/gpu")
    take_steps(folder, dry, args.again)
    (folder / "table.md").write_text(table(folder) + "\n")
    print(table(folder))


if __name__ == "__main__":
    main()
