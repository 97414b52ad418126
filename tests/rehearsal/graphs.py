"""The graphs that `--compile` makes of a visual block at its published size, run on a GPU that is not there.

    python -m tests.rehearsal.graphs [5s_sft ...]

Dynamo looks at the blocks while two prompts of different lengths go through them, on PyTorch's meta device: tensors of
the published sizes that take no memory. What it captures is then run by itself with tensors of the fake GPU, so that
devices, dtypes, kernels and operations are those of the graph and not of the code that it was captured from. What a
compiler makes of the graph is not seen here: see kernels.py.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx import GraphModule

from kandinsky.attention.block_sparse import flex_block_sparse
from kandinsky.attention.nabla import NablaConfig
from kandinsky.config.schema import Config
from kandinsky.models.dit import DiffusionTransformer3D, Execution
from kandinsky.planning.plan import default_request
from kandinsky.runtime.compile import with_compiled_blocks
from tests.rehearsal.fake_gpu import FakeGPU, _contiguous
from tests.rehearsal.whole_requests import CASES, DEVICE, WITHIN_FLOPS, published, size_of

META = torch.device("meta")
BLOCKS = 2  # that a graph is to serve; all others are like them
LENGTHS = 224, 1, 77  # of the prompts, in tokens


@dataclass
class Graph:
    """What dynamo has captured, and what it was last called with. calls: how many blocks have run in it."""

    module: GraphModule
    inputs: list[Any] = field(default_factory=list)
    calls: int = 0

    def run(self, *inputs: Any) -> Any:
        self.inputs, self.calls = list(inputs), self.calls + 1
        return self.module(*inputs)

    def move_to_gpu(self) -> None:
        """Have it make tensors on the fake GPU, where on the meta device it made them on that."""
        for node in self.module.graph.nodes:
            node.kwargs = {name: DEVICE if value == META else value for name, value in node.kwargs.items()}
        self.module.recompile()


@dataclass
class Captured:
    """graphs: how many were made; the rest is of the last one, run once. faults: a sentence each."""

    graphs: int
    operations: int = 0
    kernels: dict[str, int] = field(default_factory=dict)
    flops: int = 0
    faults: list[str] = field(default_factory=list)


def capture(config: Config) -> list[Graph]:
    """The graphs of a config's visual blocks, which several blocks and prompts have run in.

    Raises CompileError where not all of a block can be in one graph.
    """
    params = dataclasses.replace(config.model.dit_params, num_text_blocks=1, num_visual_blocks=BLOCKS)
    graphs: list[Graph] = []

    def keep(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(Graph(module))
        return graphs[-1].run

    given = config.model.attention
    nabla = NablaConfig(given.P, given.wT, given.wH, given.wW) if given.type == "nabla" else None
    torch._dynamo.reset()
    try:
        with META:
            dit = DiffusionTransformer3D(**dataclasses.asdict(params)).bfloat16().requires_grad_(False)
            latents = torch.empty(1, *default_request(config).latent_size, dit.in_channels)
            pooled, timesteps = torch.empty(1, params.in_text_dim2), torch.empty(1)
            prompts = [torch.empty(1, length, params.in_text_dim, dtype=torch.bfloat16) for length in LENGTHS]
        execution = with_compiled_blocks(Execution(block_sparse=flex_block_sparse), keep)
        with torch.no_grad():
            for prompt in prompts:
                dit(latents, prompt, pooled, timesteps, nabla=nabla, execution=execution)
    finally:
        torch._dynamo.reset()
    return graphs


def rehearse_graphs(config: Config) -> Captured:
    graphs = capture(config)
    result = Captured(len(graphs), sum(node.op.startswith("call_") for node in graphs[-1].module.graph.nodes))
    if len(graphs) != 1 or graphs[0].calls != BLOCKS * len(LENGTHS):
        result.faults.append(f"{len(graphs)} graphs for {BLOCKS} blocks and {len(LENGTHS)} prompts: one is enough")
    graph = graphs[-1]
    graph.move_to_gpu()
    with FakeGPU() as gpu, methods_for_cuda():
        inputs = [on_gpu(value) if isinstance(value, Tensor) else value for value in graph.inputs]
        gpu.kernels.clear()
        gpu.label = "a graph"
        outputs = graph.module(*inputs)
        for out in outputs:
            if out.device != DEVICE or out.dtype != torch.bfloat16:
                gpu.fault(f"what comes out is {out.dtype} on {out.device}, and hidden states are bfloat16 on {DEVICE}")
        del inputs, outputs
    counted, wide = sum(gpu.flops.values()), gpu.flops["torch.float32"]
    if wide > WITHIN_FLOPS * counted:
        gpu.fault(f"{wide / 1e12:.1f} of {counted / 1e12:.1f} TFLOP are in float32")
    result.kernels, result.flops, result.faults = dict(gpu.kernels), counted, [*result.faults, *gpu.faults]
    return result


def methods_for_cuda() -> Any:
    """A CPU build's own refuses such tensors where no mode sees it: in what our operations say of their results."""
    return mock.patch.object(Tensor, "contiguous", _contiguous)


def on_gpu(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)


HEAD = "variant | size | graphs | operations | kernels | TFLOP a block | attention | found"


def main() -> None:
    """A row for all variants of a size; exit with 1 where anything was found. Names given limit it to those."""
    names = sys.argv[1:] or list(dict.fromkeys(case.name for case in CASES))
    is_clean, seen = True, set()
    print(f"| {HEAD} |\n|{'---|' * (HEAD.count('|') + 1)}", flush=True)
    for name in names:
        config = published(name)
        case = config.model.dit_params, config.model.attention, default_request(config).latent_size
        if case in seen:
            continue
        seen.add(case)
        result = rehearse_graphs(config)
        is_clean = is_clean and not result.faults
        engines = ", ".join(kernel for kernel in result.kernels if "attention" in kernel or "flex" in kernel)
        cells = [name, size_of(config), result.graphs, result.operations, sum(result.kernels.values()),
                 f"{result.flops / 1e12:.2f}", engines, "; ".join(result.faults) or "none"]  # fmt: skip
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    sys.exit(not is_clean)


if __name__ == "__main__":
    main()
