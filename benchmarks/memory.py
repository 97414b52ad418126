"""What a DiT takes of the host's and the device's memory: loaded whole, offloaded, and with its blocks streaming.

    python benchmarks/memory.py [--device cpu|cuda] [--model lite|pro] [--blocks 32] [--resident 24 16 8 2]
                                [--latents 31 64 96] [--folder DIR]

Writes a checkpoint of random weights at published widths (bfloat16, and for one row float32), which is deleted
afterwards, and measures each row in a process of its own. Every weight is read: by a forward where `--latents` gives a
size (latent frames, rows, columns), else by a sum.

Columns, all beyond what the process had before loading: `rss`, the peak of the resident set, which also counts pages of
the memory-mapped file, although the system may drop those at any time; `anon`, the peak of the memory that is the
process's own (RssAnon, sampled every 2 ms); `device`, the peak of CUDA's allocator; seconds of the second of two
forwards. Where the device is the CPU its copies count as `anon`.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

from kandinsky.checkpoints.dit_layout import expected_dit_shapes
from kandinsky.config.schema import DiTConfig
from kandinsky.loading.dit import dit_parts, load_dit
from kandinsky.loading.weights import host_weights
from kandinsky.models.dit import DiffusionTransformer3D, Execution
from kandinsky.runtime.lora import Adapters
from kandinsky.runtime.offload import OffloadPlacement

MODELS = {
    "lite": DiTConfig(visual_cond=True),
    "pro": DiTConfig(
        visual_cond=True, time_dim=1024, model_dim=4096, ff_dim=16384, num_text_blocks=4, num_visual_blocks=60,
        axes_dims=(32, 48, 48),
    ),
}  # fmt: skip
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
RANDOM_BYTES = 64 * 2**20  # what is written again and again


def write_checkpoint(path: Path, params: DiTConfig, dtype: str = "BF16") -> int:
    """A safetensors file of small random weights that repeat every 64 MiB; bytes of its tensors in bfloat16."""
    shapes = expected_dit_shapes(params)
    item = DTYPES[dtype].itemsize
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + item * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(0)
    values = 0.02 * torch.randn(RANDOM_BYTES // item, generator=generator)
    chunk = values.to(DTYPES[dtype]).view(torch.uint8).numpy().tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in range(0, end, len(chunk)):
            file.write(chunk[: end - begin])
    return end * torch.bfloat16.itemsize // item


def status(field: str) -> int:
    """A figure of /proc/self/status in bytes: VmRSS, VmHWM (its peak), RssAnon."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")


@contextmanager
def peaks(result: dict[str, float]) -> Iterator[None]:
    """Puts into `result` by how much `rss` and `anon` rose at most while the body ran."""
    gc.collect()
    rss, anon = status("VmRSS"), status("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    highest, done = anon, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        result["rss"] = status("VmHWM") - rss
        result["anon"] = max(highest, status("RssAnon")) - anon


def touch(dit: DiffusionTransformer3D, execution: Execution) -> None:
    """Read every weight, of streamed blocks when it is their turn."""
    for name, tensor in dit.named_parameters():
        if not name.startswith("visual_transformer_blocks."):
            tensor.sum()
    for block in execution.hand_out(dit.visual_transformer_blocks):
        for tensor in block.parameters():
            tensor.sum()


def forwards(dit: DiffusionTransformer3D, execution: Execution, size: Sequence[int], device: torch.device) -> float:
    """Seconds of the second of two forwards at latents of (T, H, W)."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    width, pooled = dit.text_embeddings.in_layer.in_features, dit.pooled_text_embeddings.in_layer.in_features
    inputs = normal(1, *size, dit.in_channels), normal(1, 256, width), normal(1, pooled), normal(1).abs() * 500
    t, h, w = size
    tables = dit.request_tables((t, h, w), 256, (1.0, 2.0, 2.0), device)
    seconds = 0.0
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        dit(*inputs, tables=tables, execution=execution)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return seconds


@torch.no_grad()
def measure(case: str, path: Path, params: DiTConfig, device: torch.device, size: Sequence[int]) -> dict[str, float]:
    """One row: "whole", "offload", or a number of blocks that stay on the device. Bytes and seconds.

    `anon_after` is what is left of `anon` when the stage has ended.
    """
    result: dict[str, float] = {}
    if device.type == "cuda":
        torch.zeros(1, device=device)  # what CUDA itself takes of the host is not the model's
    before = status("RssAnon")
    with peaks(result):
        if case == "whole":
            dit, parts, execution = load_dit(path, params, device, torch.bfloat16), [], Execution()
        else:
            dit = load_dit(path, params, "meta", torch.bfloat16)
            resident = None if case == "offload" else int(case)
            adapters = Adapters(dit, params, dict, device)
            parts, hand_out = dit_parts(dit, host_weights(path), resident, device, adapters)
            execution = Execution(hand_out=hand_out)
        placement = OffloadPlacement({"dit": device}, {"dit": parts})
        with placement.use("dit"):
            if size:
                result["seconds"] = forwards(dit, execution, size, device)
            else:
                touch(dit, execution)
        result["anon_after"] = status("RssAnon") - before
    if device.type == "cuda":
        result["device"] = torch.cuda.max_memory_allocated(device)
    return result


def measure_in_a_process(
    cases: Sequence[tuple[str, Path]], params: DiTConfig, device: str = "cpu", size: Sequence[int] = ()
) -> list[dict[str, float]]:
    """`measure` for one (case, checkpoint) after the other, in a fresh interpreter."""
    named = [(case, str(path)) for case, path in cases]
    request = {"cases": named, "params": dataclasses.asdict(params), "device": device, "size": size}
    # glibc: give freed tensors back to the system at once, so that what is resident is what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--measure", json.dumps(request)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{named} failed: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def answer(request: dict[str, Any]) -> list[dict[str, float]]:
    """The other end of `measure_in_a_process`."""
    params, device = DiTConfig(**request["params"]), torch.device(request["device"])
    return [measure(case, Path(path), params, device, request["size"]) for case, path in request["cases"]]


def print_row(label: str, result: dict[str, float], weights: int) -> None:
    columns = []
    for name in ("rss", "anon", "device"):
        value = result.get(name)
        columns.append(f"{'':>15}" if value is None else f"{value / 1e9:8.2f} ({value / weights:4.2f})")
    seconds = f"{result['seconds']:9.3f}" if "seconds" in result else ""
    print(f"  {label:26}{''.join(columns)}{seconds}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=tuple(MODELS), default="lite")
    parser.add_argument("--blocks", type=int, help="visual blocks, in place of all")
    parser.add_argument("--resident", type=int, nargs="*", default=[24, 16, 8, 2], help="blocks on the device")
    parser.add_argument("--latents", type=int, nargs=3, default=[], help="latent frames, rows, columns of a forward")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written; default: the system's for that")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(answer(json.loads(args.measure))))
        return

    params = MODELS[args.model]
    params = dataclasses.replace(params, num_visual_blocks=args.blocks or params.num_visual_blocks)
    print(f"python {' '.join(sys.argv)}\ntorch {torch.__version__}; {params.num_visual_blocks} visual blocks")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "dit.safetensors"
        weights = write_checkpoint(path, params)
        print(f"{weights / 1e9:.2f} GB in bfloat16. GB (share of that):")
        print(f"  {'':26}{'rss':>15}{'anon':>15}{'device':>15}{'seconds' if args.latents else '':>9}")
        labels = {"whole": "whole", "offload": "offload"}
        labels |= {str(n): f"{n} blocks stay" for n in args.resident if n < params.num_visual_blocks}
        for case, label in labels.items():
            (result,) = measure_in_a_process([(case, path)], params, args.device, args.latents)
            print_row(label, result, weights)
        write_checkpoint(path, params, "F32")
        (result,) = measure_in_a_process([("whole", path)], params, args.device, args.latents)
        print_row("whole, from a float32 file", result, weights)


if __name__ == "__main__":
    main()
