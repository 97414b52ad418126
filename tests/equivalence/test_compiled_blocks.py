"""Compiled visual blocks compute what they compute uncompiled, from one graph, however a run calls them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from kandinsky import get_T2I_pipeline, get_T2V_pipeline
from kandinsky.attention.block_sparse import masked_dense, sdpa_block_sparse
from kandinsky.attention.engines import sdpa
from kandinsky.attention.nabla import NablaConfig
from kandinsky.models.dit import BlockInputs, DiffusionTransformer3D
from kandinsky.runtime.compile import compile_blocks

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TOLERANCE = 1e-4
SAME = 1e-5  # where a graph is run as it is, uncompiled
LATENT_SIZE = (2, 16, 16)
SPARSE = NablaConfig(P=0.5, wT=1, wH=1, wW=1)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """What is compiled belongs to the code of the blocks, and so to the process."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build_dit() -> DiffusionTransformer3D:
    """Random weights; queries and keys are large, so that NABLA's map is peaked as a trained model's is."""
    dit = DiffusionTransformer3D(
        in_text_dim=24, in_text_dim2=12, time_dim=32, model_dim=128, ff_dim=256, num_text_blocks=1, num_visual_blocks=3
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(values / math.sqrt(parameter.shape[1]))
            elif name.endswith("norm.weight") and "self_attention" in name:
                parameter.copy_(2.5 + 0.2 * values)
            else:
                parameter.copy_(0.2 * values + (1 if name.endswith("norm.weight") else 0))
    return dit.eval().requires_grad_(False)


def make_inputs(text_length: int = 7, latent_size: tuple[int, int, int] = LATENT_SIZE) -> Inputs:
    generator = torch.Generator().manual_seed(text_length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return normal(1, *latent_size, 16), normal(1, text_length, 24), normal(1, 12), torch.tensor([723.4567])


def mask_of(length: int, real: int) -> Tensor:
    return torch.arange(length)[None] < real


def largest_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and 0.1 < b.std() < 10
    return (a - b).abs().max().item()


def assert_same(dit: DiffusionTransformer3D, plain: DiffusionTransformer3D, inputs: Inputs, **options: Any) -> None:
    with torch.no_grad():
        assert largest_difference(dit(*inputs, **options), plain(*inputs, **options)) <= SAME


# --- graphs, counted; they are run without being compiled -------------------------------------------------------------


def test_one_graph_for_all_blocks_and_texts() -> None:
    """Of any length; with a mask over them it is another one."""
    dit, plain, graphs = build_dit(), build_dit(), CompileCounter()
    compile_blocks(dit, graphs)
    for length in (7, 1, 23, 1, 256):
        assert_same(dit, plain, make_inputs(length))
        assert graphs.frame_count == 1
    for length, real in ((9, 5), (1, 1), (30, 12)):
        assert_same(dit, plain, make_inputs(length), text_mask=mask_of(length, real))
        assert_same(dit, plain, make_inputs(length))
        assert graphs.frame_count == 2


def test_a_second_size_is_the_last_graph() -> None:
    dit, plain, graphs = build_dit(), build_dit(), CompileCounter()
    compile_blocks(dit, graphs)
    for latent_size, expected in ((LATENT_SIZE, 1), ((1, 8, 8), 2), ((3, 16, 8), 2), (LATENT_SIZE, 2)):
        assert_same(dit, plain, make_inputs(5, latent_size))
        assert graphs.frame_count == expected


def test_a_cache_around_the_blocks_and_streamed_weights() -> None:
    """As block swapping does it: every block's parameters are views of one buffer, filled when it is the block's turn."""
    dit, plain, graphs = build_dit(), build_dit(), CompileCounter()
    compile_blocks(dit, graphs)
    weights = [[parameter.clone() for parameter in block.parameters()] for block in dit.visual_transformer_blocks]
    size = sum(parameter.numel() for parameter in weights[0])
    buffer, last_seen = torch.zeros(size), []
    for block in dit.visual_transformer_blocks[1:]:
        begin = 0
        for parameter in block.parameters():
            parameter.data = buffer[begin : begin + parameter.numel()].view(parameter.shape)
            begin += parameter.numel()

    def stream(blocks: nn.ModuleList) -> Iterator[nn.Module]:
        for block, tensors in zip(blocks, weights, strict=True):
            for parameter, tensor in zip(block.parameters(), tensors, strict=True):
                parameter.copy_(tensor)
            yield block

    def cached(hidden: Tensor, inputs: BlockInputs) -> Tensor:
        last_seen.append(dit.run_blocks(hidden, inputs) - hidden)
        return hidden + last_seen[-1]

    dit.stream_blocks = stream
    for length in (7, 12):
        assert_same(dit, plain, make_inputs(length))
        with torch.no_grad():
            assert largest_difference(dit(*make_inputs(length), run_blocks=cached), plain(*make_inputs(length))) <= SAME
    assert len(last_seen) == 2 and graphs.frame_count == 1


def test_other_engines_are_one_operation_of_the_graph() -> None:
    """What a compiler could not look into: it depends on the data."""
    calls = []

    def engine(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        calls.append(q.abs().max().item())
        return sdpa(q, k, v, mask)

    dit, plain, graphs = build_dit(), build_dit(), CompileCounter()
    dit.attention = engine
    compile_blocks(dit, graphs)
    assert dit.attention.__name__ == "engine"  # for the record beside the video
    for length in (7, 12):
        assert_same(dit, plain, make_inputs(length))
    assert graphs.frame_count == 1 and len(calls) == 2 * 3


def test_what_a_kernel_raises_is_not_taken_for_the_compilers_failure() -> None:
    def engine(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        raise torch.OutOfMemoryError("no memory left")

    dit = build_dit()
    dit.attention = engine
    compile_blocks(dit, CompileCounter())
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"), torch.no_grad():
        dit(*make_inputs())


def test_a_failure_says_what_to_do() -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        raise RuntimeError("there is no g++ here\nand more of it")

    dit = build_dit()
    compile_blocks(dit, broken)
    with pytest.raises(ValueError, match=r"could not be compiled .*no g\+\+ here.*--compile off") as error:
        dit(*make_inputs())
    assert "\n" not in str(error.value)


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("task", ["t2v", "t2i"])
def test_a_run_of_the_tiny_model(task: str) -> None:
    """Through the pipeline: two prompts of different lengths and the empty negative prompt, which is a single token."""
    get_pipeline = {"t2v": get_T2V_pipeline, "t2i": get_T2I_pipeline}[task]
    results = {}
    for setting in ("off", "on"):
        pipe = get_pipeline("cpu", conf_path=CONFIGS / f"config_tiny_{task}.yaml", compile=setting)
        prompts = ["a red circle moves left on a white background", "a blue square"]
        options = {"num_frames": 5} if task == "t2v" else {}
        results[setting] = pipe(prompts, num_steps=3, seed=1, output_type="latent", progress=False, **options)
        assert counters["stats"]["unique_graphs"] == (setting == "on")
    assert largest_difference(results["on"], results["off"]) <= TOLERANCE
    assert not counters["graph_break"] and not counters["recompiles"]


@pytest.mark.slow
def test_nabla() -> None:
    """The map is part of the graph, the kernel one operation of it."""
    maps = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor) -> Tensor:
        maps.append(block_map)
        return sdpa_block_sparse(q, k, v, block_map)

    dit, plain = build_dit(), build_dit()
    dit.block_sparse, plain.block_sparse = kernel, masked_dense
    compile_blocks(dit)
    for length in (7, 12):
        inputs = make_inputs(length, (3, 32, 48))
        with torch.no_grad():
            result = dit(*inputs, nabla=SPARSE)
            assert largest_difference(result, plain(*inputs, nabla=SPARSE)) <= TOLERANCE
            assert (result - dit(*inputs)).abs().max() > 0.01  # sparse attention is something else than dense
    sparse = [block_map.float().mean() for block_map in maps]
    assert len(maps) == 2 * 3 and all(0.1 < density < 0.9 for density in sparse)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]  # with NABLA and without
