"""Compiled visual blocks compute what they compute uncompiled, from one graph, however a run calls them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from kandinsky import get_T2V_pipeline
from kandinsky.attention.engines import sdpa
from kandinsky.attention.nabla import NablaConfig
from kandinsky.checkpoints.dit_layout import KEEP_PRECISION
from kandinsky.config.schema import CacheConfig, MagCacheConfig
from kandinsky.models.dit import BlockInputs, DiffusionTransformer3D, Execution, RunBlocks
from kandinsky.runtime.block_parts import with_blocks_in_parts
from kandinsky.runtime.caches import cache_maker
from kandinsky.runtime.compile import CACHE_VARIABLE, with_compiled_blocks, with_compiled_elementwise
from kandinsky.runtime.quantization import FP8Linear, Int8Linear, NF4Linear
from tests.unit.small_pipelines import build, latents_of, randomised

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TOLERANCE = 1e-4
PLAIN = Execution()
SAME = 1e-5  # where a graph is run as it is, uncompiled
LATENT_SIZE = (2, 16, 16)
MOST_STRETCHES = 12  # graphs, of three functions
SPARSE = NablaConfig(P=0.5, wT=1, wH=1, wW=1)
BLOCKS = 5  # of the small pipelines: first, middle and last ones for every cache
# Random models tell little of their residuals: with these thresholds some evaluations are skipped, not all that may be.
CACHES = [
    CacheConfig(kind="magcache"),
    CacheConfig(kind="firstblock", threshold=1.1, order=0),
    CacheConfig(kind="dbcache", threshold=1.1, order=0),
    CacheConfig(kind="taylorseer", threshold=2.5, order=1),
    CacheConfig(kind="tracked", threshold=2.5, order=1),
]
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


def compiled(dit: DiffusionTransformer3D, backend: Any, execution: Execution = PLAIN) -> Callable[..., Tensor]:
    return functools.partial(dit, execution=with_compiled_blocks(execution, backend))


def assert_same(dit: Callable[..., Tensor], plain: DiffusionTransformer3D, inputs: Inputs, **options: Any) -> None:
    with torch.no_grad():
        ours = dit(*inputs, **options)
        options.pop("execution", None)
        assert largest_difference(ours, plain(*inputs, **options)) <= SAME


# --- graphs, counted; they are run without being compiled -------------------------------------------------------------


def test_one_graph_for_all_blocks_and_texts() -> None:
    """Of any length; with a mask over them it is another one."""
    plain, graphs = build_dit(), CompileCounter()
    dit = compiled(build_dit(), graphs)
    for length in (7, 1, 23, 1, 256):
        assert_same(dit, plain, make_inputs(length))
        assert graphs.frame_count == 1
    for length, real in ((9, 5), (1, 1), (30, 12)):
        assert_same(dit, plain, make_inputs(length), text_mask=mask_of(length, real))
        assert_same(dit, plain, make_inputs(length))
        assert graphs.frame_count == 2


def test_a_second_size_is_the_last_graph() -> None:
    plain, graphs = build_dit(), CompileCounter()
    dit = compiled(build_dit(), graphs)
    for latent_size, expected in ((LATENT_SIZE, 1), ((1, 8, 8), 2), ((3, 16, 8), 2), (LATENT_SIZE, 2)):
        assert_same(dit, plain, make_inputs(5, latent_size))
        assert graphs.frame_count == expected


def test_a_cache_around_the_blocks_and_streamed_weights() -> None:
    """As block swapping does it: blocks' parameters are views of one buffer, filled when it is the block's turn."""
    dit, plain, graphs = build_dit(), build_dit(), CompileCounter()
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

    def around(run_blocks: RunBlocks) -> RunBlocks:
        def cached(hidden: Tensor, inputs: BlockInputs) -> Tensor:
            last_seen.append(run_blocks(hidden, inputs) - hidden)
            return hidden + last_seen[-1]

        return cached

    execution = with_compiled_blocks(Execution(hand_out=stream), graphs)
    for length in (7, 12):
        assert_same(dit, plain, make_inputs(length), execution=execution)
        with torch.no_grad():
            cached = dit(*make_inputs(length), execution=execution.within(around))
            assert largest_difference(cached, plain(*make_inputs(length))) <= SAME
    assert len(last_seen) == 2 and graphs.frame_count == 1


def test_other_engines_are_one_operation_of_the_graph() -> None:
    """What a compiler could not look into: it depends on the data."""
    calls = []

    def engine(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        calls.append(q.abs().max().item())
        return sdpa(q, k, v, mask)

    plain, graphs = build_dit(), CompileCounter()
    execution = with_compiled_blocks(Execution(attention=engine), graphs)
    assert execution.attention.__name__ == "engine"  # for the record beside the video
    for length in (7, 12):
        assert_same(functools.partial(build_dit(), execution=execution), plain, make_inputs(length))
    assert graphs.frame_count == 1 and len(calls) == 2 * 3


def test_a_share_that_changes_and_exact_blocks_take_two_more_graphs() -> None:
    """However many shares there are: from the second on it is a number that the graph is given."""
    plain, dit, graphs = build_dit(), build_dit(), CompileCounter()
    execution = with_compiled_blocks(PLAIN, graphs)
    tables = dit.request_tables(LATENT_SIZE, 7, (1.0, 2.0, 2.0), "cpu", SPARSE)
    assert tables.nabla is not None
    for P, exact, expected in (
        (0.5, (), 1),
        (0.6, (), 2),
        (0.7, (), 2),
        (0.7, (1,), 3),
        (0.8, (0, 2), 3),
        (0.9, (), 3),
    ):
        of_step = dataclasses.replace(tables, nabla=tables.nabla.keeping(P))
        blocks = frozenset(exact)
        with torch.no_grad():
            ours = dit(*make_inputs(), tables=of_step, execution=dataclasses.replace(execution, exact_blocks=blocks))
            reference = plain(*make_inputs(), tables=of_step, execution=Execution(exact_blocks=blocks))
        assert largest_difference(ours, reference) <= SAME
        assert graphs.frame_count == expected


def test_what_a_kernel_raises_is_not_taken_for_the_compilers_failure() -> None:
    def engine(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        raise torch.OutOfMemoryError("no memory left")

    dit = compiled(build_dit(), CompileCounter(), Execution(attention=engine))
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"), torch.no_grad():
        dit(*make_inputs())


def test_a_failure_says_what_to_do() -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        raise RuntimeError("there is no g++ here\nand more of it")

    dit = compiled(build_dit(), broken)
    with pytest.raises(ValueError, match=r"could not be compiled .*no g\+\+ here.*--compile off") as error:
        dit(*make_inputs())
    assert "\n" not in str(error.value)


def test_what_nobody_asked_for_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    attempts: list[int] = []

    def broken(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        attempts.append(1)
        raise RuntimeError("there is no g++ here")

    dit, inputs = build_dit(), make_inputs()
    with torch.no_grad():
        expected = dit(*inputs)
        execution = with_compiled_blocks(Execution(), broken, required=False)
        for _ in range(2):
            assert torch.equal(dit(*inputs, execution=execution), expected)
    assert len(attempts) == 1
    assert caplog.text.count("could not be compiled") == 1 and "no g++ here" in caplog.text


# --- only what lies between products ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, SAME), (torch.bfloat16, 0.05)])
def test_elementwise_stretches(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    """Of whole blocks, of chunks of tokens, and of blocks in parts; a few graphs for all sizes and texts."""
    dit = build_dit().to(dtype)
    if dtype == torch.bfloat16:
        for name, parameter in dit.named_parameters():
            parameter.data = parameter.float() if any(part in name for part in KEEP_PRECISION) else parameter
    inputs = [[x.to(dtype) for x in given[:3]] + [given[3]] for given in (make_inputs(7), make_inputs(30, (3, 8, 16)))]
    in_parts = with_blocks_in_parts(PLAIN, heads_at_once=1, on_host=False)
    ways = [PLAIN, dataclasses.replace(PLAIN, chunk_tokens=64), in_parts]
    graphs = []
    with torch.no_grad():
        for given in inputs + inputs:
            for way in ways:
                ours = dit(*given, execution=with_compiled_elementwise(way, backend))
                assert ours.dtype == dtype
                assert largest_difference(ours, dit(*given, execution=way)) <= tolerance
            graphs.append(counters["stats"]["unique_graphs"])
        for length, latent_size in ((9, (1, 16, 8)), (256, (2, 24, 16)), (31, (3, 8, 8))):
            given = [x.to(dtype) for x in make_inputs(length, latent_size)[:3]] + [inputs[0][3]]
            dit(*given, execution=with_compiled_elementwise(PLAIN, backend))
    assert graphs[0] > 0 and counters["stats"]["unique_graphs"] == graphs[1] <= MOST_STRETCHES


def test_elementwise_stretches_that_fail(caplog: pytest.LogCaptureFixture) -> None:
    """All of them run as they are from the first failure on, with one warning."""
    attempts: list[int] = []

    def broken(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        attempts.append(1)
        raise RuntimeError("there is no g++ here")

    dit, inputs = build_dit(), make_inputs()
    with torch.no_grad():
        execution = with_compiled_elementwise(PLAIN, broken)
        for _ in range(2):
            assert torch.equal(dit(*inputs, execution=execution), dit(*inputs))
    assert len(attempts) == 1
    assert caplog.text.count("could not be compiled") == 1 and "no g++ here" in caplog.text


# --- whole runs of the tiny models ------------------------------------------------------------------------------------


def generate(config: str, compiled: bool, spared: list[int] | None = None, **options: Any) -> Tensor:
    """Latents of two prompts of different lengths. The empty negative prompt is a third length: a single token.

    `spared` gets the number of evaluations that a cache spared.
    """
    options = {"compile": "on" if compiled else "off", "overrides": ["magcache.threshold=1"], **options}
    pipe = get_T2V_pipeline("cpu", conf_path=CONFIGS / config, **options)
    prompts = ["a red circle moves left on a white background", "a blue square"]
    make_cache, caches = pipe.make_cache, []
    if make_cache is not None:
        pipe.make_cache = lambda *steps: caches.append(make_cache(*steps)) or caches[-1]
    latents = pipe(prompts, num_steps=4, num_frames=5, seed=1, output_type="latent", progress=False)
    if spared is not None:
        spared.extend(block_cache.skipped for block_cache in caches)
    return latents


def assert_one_graph() -> None:
    """By the compiler's own counters, which count what is compiled again, too."""
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize(
    "options",
    [
        {"offload": "on", "blocks_on_gpu": 1, "magcache": True, "dit_quantization": "int8"},
        {"dit_quantization": "fp8"},
        {"dit_quantization": "nf4"},
    ],
    ids=lambda options: " ".join(options) + " " + str(options.get("dit_quantization", "")),
)
def test_with_what_else_is_switched_on(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The graph is run without being compiled further."""
    spared: list[int] = []
    monkeypatch.setattr(
        "kandinsky.loading.assemble.with_compiled_blocks", functools.partial(with_compiled_blocks, backend="aot_eager")
    )
    expected = generate("config_tiny_t2v.yaml", False, **options)
    assert not counters["stats"]
    with caplog.at_level("INFO", logger="kandinsky"):
        latents = generate("config_tiny_t2v.yaml", True, spared, **options)
    assert largest_difference(latents, expected) <= TOLERANCE
    assert_one_graph()
    assert ("visual blocks stream" in caplog.text) == ("blocks_on_gpu" in options)
    assert any(spared) == ("magcache" in options)


def test_with_nabla_and_streamed_quantised_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The map is part of the graph, the kernel one operation of it."""
    monkeypatch.setattr(
        "kandinsky.loading.assemble.with_compiled_blocks", functools.partial(with_compiled_blocks, backend="aot_eager")
    )
    options: dict[str, Any] = {"blocks_on_gpu": 2, "dit_quantization": "int8"}
    expected = generate("config_tiny_t2v_10s.yaml", False, **options)
    latents = generate("config_tiny_t2v_10s.yaml", True, **options)
    assert largest_difference(latents, expected) <= TOLERANCE
    assert_one_graph()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_with_every_cache_of_blocks(backend: str) -> None:
    """All are around the same compiled block, which is compiled once; what is left out is what uncompiled is."""
    execution = with_compiled_blocks(Execution(), backend)
    plain: Any = build("t2v")
    dit = dataclasses.replace(plain.config.model.dit_params, num_visual_blocks=BLOCKS)
    plain.config = dataclasses.replace(plain.config, model=dataclasses.replace(plain.config.model, dit_params=dit))
    plain.dit = randomised(DiffusionTransformer3D(**dataclasses.asdict(dit)))
    steps = 6
    ratios = MagCacheConfig(mag_ratios=(1.0, 1.01) * (steps - 1), retention=0.3)
    for cache in CACHES:
        found, spared = [], []
        for how in (plain.execution, execution):
            pipe = copy.copy(plain)
            pipe.execution = how
            pipe.config = dataclasses.replace(plain.config, cache=cache, magcache=ratios)
            make_cache: Any = cache_maker(pipe.config)
            caches: list[Any] = []
            pipe.make_cache = lambda *of, make=make_cache, made=caches: made.append(make(*of)) or made[-1]
            found.append(latents_of(pipe, num_steps=steps, guidance_weight=3.0))
            spared.append(caches[0].skipped_of(0))
        assert 0 < spared[0] < 2 * steps and spared[1] == spared[0], cache.kind
        assert largest_difference(found[1], found[0]) <= TOLERANCE, cache.kind
    assert_one_graph()


# What a second process does; the first one is the test's own.
AGAIN = """
import sys, torch
from torch._dynamo.utils import counters
from tests.equivalence.test_compiled_blocks import generate
torch.set_num_threads(int(sys.argv[1]))
latents = generate("config_tiny_t2v.yaml", True)
torch.save((latents, dict(counters["inductor"])), sys.argv[2])
"""


@pytest.mark.slow
def test_compiled_now_and_found_by_the_next_process(tmp_path: Path) -> None:
    expected = generate("config_tiny_t2v.yaml", False)
    latents = generate("config_tiny_t2v.yaml", True)
    assert largest_difference(latents, expected) <= TOLERANCE
    assert_one_graph()
    assert counters["inductor"]["fxgraph_cache_miss"] == 1 and not counters["inductor"]["fxgraph_cache_hit"]

    command = [sys.executable, "-c", AGAIN, str(torch.get_num_threads()), str(tmp_path / "again.pt")]
    environment = {name: value for name, value in os.environ.items() if name != CACHE_VARIABLE}  # what PyTorch set
    subprocess.run(command, check=True, cwd=CONFIGS.parent, env=environment)
    again, found = torch.load(tmp_path / "again.pt")
    assert torch.equal(again, latents)
    assert found["fxgraph_cache_hit"] == 1 and not found.get("fxgraph_cache_miss")


@pytest.mark.slow
def test_quantised_weights_compiled() -> None:
    """Of as many inputs as the tiny models have, too, which whole groups of weights do not make up."""
    pytest.importorskip("bitsandbytes")
    layers, generator = nn.ModuleList(), torch.Generator().manual_seed(0)
    for in_features in (192, 256):
        for kind in (Int8Linear, FP8Linear, NF4Linear):
            layer = kind(in_features, 40)
            weight = torch.randn(40, in_features, generator=generator)
            for (name, _), part in zip(list(layer.named_buffers()), kind.quantize(weight), strict=True):
                setattr(layer, name, part)
            layers.append(layer)

    def weights() -> list[Tensor]:
        return [layer.dequantize(torch.float32) for layer in layers]

    with torch.no_grad():
        for compiled, expected in zip(torch.compile(weights, fullgraph=True)(), weights(), strict=True):
            assert largest_difference(compiled, expected) <= SAME
