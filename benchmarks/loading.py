"""Weights of a file brought to the device through staging buffers (runtime/staging.py), beside a plain copy of each.

    python benchmarks/loading.py [--gb 4] [--device cpu|cuda] [--repeat 3] [--folder DIR]

Writes a file of random bytes, which is deleted afterwards, and reads it through both paths in turn, the system's file
cache warm. Every tensor must come out the same. On a CPU the staged path is a copy more than needed, and loading does
not take it there: the row says what the path costs, and no more.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

from kandinsky.runtime.staging import Staging

ROWS, COLUMNS = 8192, 8192  # of a tensor in bfloat16: 2^27 bytes


def write_file(path: Path, gb: float) -> int:
    """Tensors of random bits; how many."""
    count = max(1, round(gb * 2**30 / (2 * ROWS * COLUMNS)))
    bits = torch.randint(-(2**15), 2**15, (ROWS, COLUMNS), dtype=torch.int16)
    save_file({f"weight.{i}": bits.roll(i).view(torch.bfloat16) for i in range(count)}, path)
    return count


def read(path: Path) -> Iterator[Tensor]:
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            yield file.get_tensor(name)


def plainly(path: Path, device: torch.device) -> list[Tensor]:
    return [tensor.to(device, copy=True) for tensor in read(path)]


def staged(path: Path, device: torch.device) -> list[Tensor]:
    with Staging(device) as staging:
        return list(staging.bring((torch.empty_like(tensor, device=device), tensor) for tensor in read(path)))


def timed(load: Callable[[Path, torch.device], list[Tensor]], path: Path, device: torch.device) -> tuple[float, int]:
    """Seconds, and a sum over all bits."""
    begin = time.perf_counter()
    tensors = load(path, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begin
    return seconds, sum(int(tensor.view(torch.int16).long().sum()) * (i + 1) for i, tensor in enumerate(tensors))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gb", type=float, default=4.0, help="of 2^30 bytes (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=3, help="of each path (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the file is written (default: the system's for such)")
    args = parser.parse_args()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder, "model.safetensors")
        torch.manual_seed(0)
        count = write_file(path, args.gb)
        size = path.stat().st_size / 1e9
        seconds: dict[str, list[float]] = {"plain": [], "staged": []}
        sums = set()
        timed(plainly, path, device)  # the file is in the system's cache afterwards
        for _ in range(args.repeat):
            for name, load in (("plain", plainly), ("staged", staged)):
                took, total = timed(load, path, device)
                seconds[name].append(took)
                sums.add(total)
    if len(sums) != 1:
        sys.exit("the two paths gave different bits")
    best = {name: min(values) for name, values in seconds.items()}
    print(f"{count} tensors, {size:.2f} GB, {device}: the same bits")
    for name, value in best.items():
        print(f"{name:7} {value:.2f} s, {size / value:.1f} GB/s")
    print(f"staged / plain: {best['staged'] / best['plain']:.2f}")


if __name__ == "__main__":
    main()
