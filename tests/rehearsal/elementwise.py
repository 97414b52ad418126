"""What `--compile elementwise` spares a GPU that is not there: bytes and calls of what is elementwise in a block.

    python -m tests.rehearsal.elementwise [5s_sft ...]

Counted is what PyTorch's operations read and write on the fake GPU, at the published number of tokens. Compiled, a
stretch is one kernel, as kernels.py sees it being made; counted is then that it reads what it is given and writes its
result, each once. A norm that looks at its row twice finds it in a cache.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kandinsky.config.schema import Config
from kandinsky.models.layers import EAGER
from kandinsky.models.rope import RotaryTable
from kandinsky.planning.plan import default_request
from tests.rehearsal.fake_gpu import FakeGPU
from tests.rehearsal.traffic import bytes_of
from tests.rehearsal.whole_requests import DEVICE, published, size_of


@dataclass
class Stretch:
    """One of the functions with what a block calls it with, and how often it does."""

    run: Callable[..., Tensor]
    inputs: list[Tensor]
    times: int


def stretches(config: Config) -> dict[str, Stretch]:
    """Those over a block's visual tokens; to be made where there is a GPU, or what stands for one."""
    params = config.model.dit_params
    tokens = math.prod(default_request(config).latent_size) // math.prod(params.patch_size)
    dim, heads = params.model_dim, params.model_dim // params.head_dim

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=DEVICE)

    def normed(x: Tensor, weight: Tensor, *angles: Tensor) -> Tensor:
        norm: Any = SimpleNamespace(weight=weight)
        return EAGER.norm_and_rotate(x, norm, table_of(*angles) if angles else None)

    table_of = functools.cache(RotaryTable)  # its complex numbers are made once for a request
    x, update = empty(1, tokens, dim), empty(1, tokens, dim)
    shift, scale = (empty(1, 1, dim, dtype=torch.float32) for _ in range(2))
    queries = [empty(1, tokens, heads, params.head_dim).transpose(1, 2), empty(params.head_dim)]
    angles = [empty(tokens, params.head_dim // 2, dtype=torch.float32) for _ in range(2)]
    return {
        "modulated_norm": Stretch(EAGER.modulated_norm, [x, shift, scale], 3),
        "gated_residual": Stretch(EAGER.gated_residual, [x, update, scale], 3),
        "norm_and_rotate": Stretch(normed, [*queries, *angles], 2),  # queries and keys of self-attention
        "norm_and_rotate, norm alone": Stretch(normed, queries, 1),  # queries of cross-attention
    }


@dataclass
class Traffic:
    """Of all calls of a stretch in a block: bytes read and written, and operations; and bytes if it is one kernel."""

    moved: int
    calls: int
    fused: int
    times: int


def count(config: Config) -> dict[str, Traffic]:
    found: dict[str, Traffic] = {}
    with FakeGPU() as gpu, torch.no_grad():
        for name, stretch in stretches(config).items():
            stretch.run(*stretch.inputs)  # a first time: what is kept from then on is not counted
            gpu.moved.clear()
            gpu.calls.clear()
            result = stretch.run(*stretch.inputs)
            fused = sum(map(bytes_of, [*stretch.inputs, result]))
            n = stretch.times
            found[name] = Traffic(n * gpu.moved.total(), n * gpu.calls.total(), n * fused, n)
            del result
    return found


HEAD = "variant | stretch | in a block | calls | GB | as kernels | GB"


def main() -> None:
    print(f"| {HEAD} |\n|{'---|' * (HEAD.count('|') + 1)}")
    for name in sys.argv[1:] or ["5s_sft", "5s_t2v_pro", "t2i"]:
        config = published(name)
        rows = count(config)
        every = list(rows.values())
        rows["all"] = Traffic(
            *(sum(getattr(row, key) for row in every) for key in ("moved", "calls", "fused", "times"))
        )
        for stretch, row in rows.items():
            cells = [f"{name}, {size_of(config)}", stretch, row.times, row.calls, f"{row.moved / 1e9:.2f}",
                     row.times, f"{row.fused / 1e9:.2f}"]  # fmt: skip
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
