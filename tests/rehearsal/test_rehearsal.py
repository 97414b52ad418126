"""The rehearsal finds what would go wrong on a GPU: planted faults, one a kind; and a published request has none.

`make rehearse` goes through all variants.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kandinsky.attention.block_sparse import resolve_block_sparse
from kandinsky.attention.nabla import NablaConfig
from kandinsky.checkpoints.dit_layout import expected_dit_shapes
from kandinsky.config.reading import load_config
from kandinsky.config.schema import Config
from kandinsky.loading import weights
from kandinsky.loading.dit import load_dit_on_host
from kandinsky.models import layers
from kandinsky.models.dit import DiffusionTransformer3D, Execution
from kandinsky.planning import plan
from kandinsky.planning.activations import dit_activations
from kandinsky.planning.plan import default_request
from kandinsky.planning.stages import Stage
from kandinsky.runtime import block_swap, parallel, staging
from kandinsky.runtime.block_swap import BlockSwap
from kandinsky.runtime.compile import CompileError
from kandinsky.runtime.quantization import LINEARS
from tests.rehearsal import elementwise, fake_gpu
from tests.rehearsal.decoding import planned_bytes, rehearse_decoding
from tests.rehearsal.fake_gpu import FakeGPU
from tests.rehearsal.graphs import rehearse_graphs
from tests.rehearsal.whole_requests import (
    CONFIGS,
    DEVICE,
    Rehearsed,
    hollow_files,
    published,
    rehearse,
    without_numbers,
    write_hollow_lora,
)
from tests.rehearsal.words import rehearse_encoders

SMALL = {
    "model.dit_params.model_dim": 512, "model.dit_params.ff_dim": 2048, "model.dit_params.num_text_blocks": 1,
    "model.dit_params.num_visual_blocks": 4, "generation.width": 384, "generation.height": 256,
    "generation.resolutions": "[[384,256]]", "generation.time_length": 1, "generation.expand_prompts": "false",
}  # fmt: skip
STREAMED = {"runtime.offload": "on", "runtime.blocks_on_gpu": 1}


def small(**more: Any) -> Config:
    overrides = [f"{key}={value}" for key, value in (SMALL | more).items()]
    return load_config(CONFIGS / "config_5s_sft.yaml", overrides)


def around_forward(before: Callable[[list[Any]], None]) -> Callable[[FakeGPU, Any], None]:
    """A change that does something with the arguments of every forward of the DiT."""

    def change(gpu: FakeGPU, pipeline: Any) -> None:
        forward = pipeline.dit.forward

        def changed(*args: Any, **kwargs: Any) -> Tensor:
            given = list(args)
            before(given)
            return forward(*given, **kwargs)

        pipeline.dit.forward = changed

    return change


def run(folder: Path, change: Any = None, steps: int = 2, scheme: str | None = None, **overrides: Any) -> Rehearsed:
    return rehearse(small(**overrides), folder, steps=steps, change=change, output_type="latent", scheme=scheme)


@pytest.mark.parametrize("overrides", [
    {}, pytest.param(STREAMED, marks=pytest.mark.exhaustive),
    pytest.param({"runtime.dit_quantization": "int8"}, marks=pytest.mark.exhaustive),
    {"runtime.chunk_tokens": 1024}, {"magcache.enabled": "true"},
], ids=["plain", "streamed", "int8", "chunks", "magcache"])  # fmt: skip
def test_nothing_is_found_where_nothing_is_wrong(overrides: dict[str, Any], tmp_path: Path) -> None:
    result = run(tmp_path, **overrides)
    assert result.faults == [] and result.evaluations == 4


def test_weights_in_blocks_stream(tmp_path: Path) -> None:
    """As a GGUF file has them: the blocks' bytes go over, and are made into numbers on the device."""
    result = run(tmp_path, scheme="q4_k", **STREAMED)
    assert result.faults == [] and result.kernels["bitwise_and"] > 0


@pytest.mark.parametrize("settings", [STREAMED, {"runtime.dit_quantization": "nf4"}], ids=["streamed", "nf4"])
def test_an_adapter(settings: dict[str, Any], tmp_path: Path) -> None:
    """Its products are made once where blocks stream, and in every evaluation where weights are quantised."""
    write_hollow_lora(tmp_path / "lora.safetensors", small().model.dit_params)
    config = small(**settings)
    config = replace(config, model=replace(config.model, loras=(str(tmp_path / "lora.safetensors"),)))
    result = rehearse(config, tmp_path, steps=1, output_type="latent")
    layers = 4 * 10 + 8  # of visual blocks and of a text block
    assert result.faults == [] and result.kernels["addmm"] >= layers


@pytest.mark.parametrize("stream", [False, True], ids=["resident", "streamed"])
def test_encoders_as_planned(stream: bool, tmp_path: Path) -> None:
    """Qwen's published width, with two of its layers; that all 28 are as planned is in `make rehearse`'s table."""
    peak, planned, gpu = rehearse_encoders(published("5s_sft"), tmp_path, stream, layers=2)
    assert gpu.faults == [] and peak == pytest.approx(planned, rel=0.15)
    assert gpu.kernels["_scaled_dot_product_flash_attention"] == 2


def test_published_request_as_planned(tmp_path: Path) -> None:
    """Lite at 5 s: operations as by the formula, the peak of denoising as planned, blocks streaming."""
    config = published("5s_sft", offload="on", blocks_on_gpu=8)
    result = rehearse(config, tmp_path, 24, steps=1, output_type="latent")
    assert result.faults == []
    assert result.flops[0] == pytest.approx(2 * 660e12, rel=0.01)
    assert result.kernels["_scaled_dot_product_flash_attention"] >= 2 * 64


@pytest.mark.parametrize(("name", "kernel"), [("5s_sft", "_scaled_dot_product_flash_attention"), ("10s_sft", "flex")])
def test_graphs_of_compiled_blocks(name: str, kernel: str) -> None:
    """One for all blocks and lengths of prompts, at the published size, with attention as one kernel."""
    captured = rehearse_graphs(published(name))
    assert captured.faults == [] and captured.graphs == 1
    assert sum(count for found, count in captured.kernels.items() if kernel in found) >= 1
    assert captured.kernels["addmm"] + captured.kernels["mm"] == 11  # attention twice, feed-forward, modulation


@pytest.mark.parametrize("scheme", ["int8", "fp8", "nf4"])
def test_quantised_on_the_device_one_tensor_at_a_time(scheme: str, tmp_path: Path) -> None:
    """For weights that are to lie on the host: the device has a tensor, and those that are on their way to it."""
    if scheme == "nf4":
        pytest.importorskip("bitsandbytes")
    config = load_config(CONFIGS / "config_5s_sft.yaml", ["model.dit_params.num_visual_blocks=2"])
    path, params = hollow_files(config, tmp_path)["dit"], config.model.dit_params
    seen: Counter[str] = Counter()
    quantize = LINEARS[scheme].quantize

    def watched(weight: Tensor) -> tuple[Tensor, Tensor]:
        seen[weight.device.type] += 1
        return quantize(weight)

    with FakeGPU() as gpu, mock.patch.object(weights, "read_tensors", without_numbers), \
            mock.patch.object(LINEARS[scheme], "quantize", watched):  # fmt: skip
        _, on_host = load_dit_on_host(path, params, DEVICE, torch.bfloat16, scheme)
        assert all(tensor.device.type == "cpu" for tensor in on_host.values())
        assert gpu.live == 0 and gpu.faults == [] and set(seen) == {"cuda"}
    shapes = expected_dit_shapes(params)
    largest, whole = (2 * of(math.prod(shape) for shape in shapes.values()) for of in (max, sum))
    rows = 256 * params.ff_dim * 4  # in float32, of which quantising makes a few
    assert largest < gpu.peak < staging.AHEAD + 2 * largest + 4 * rows < 0.5 * whole


def test_sequence_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward of one of four processes: tokens that don't divide, exchanges of tensors on the device alone."""
    group = mock.Mock(size=lambda: 4, rank=lambda: 3)

    def exchanged(received: Any, sent: Tensor, *_: Any, **__: Any) -> None:
        parts = received if isinstance(received, list) else [received]
        assert all(part.device.type == "cuda" and part.is_contiguous() for part in (*parts, sent))

    monkeypatch.setattr(parallel.dist, "all_to_all_single", exchanged)
    monkeypatch.setattr(parallel.dist, "all_gather", exchanged)
    monkeypatch.setattr(parallel, "meet", lambda group: None)
    params = small().model.dit_params
    with FakeGPU() as gpu:
        with torch.device("meta"):
            dit = DiffusionTransformer3D(**asdict(params)).bfloat16()
        state = {name: torch.empty(x.shape, dtype=x.dtype, device=DEVICE) for name, x in dit.state_dict().items()}
        dit.load_state_dict(state, assign=True)
        with torch.device(DEVICE):
            inputs = torch.empty(1, 7, 10, 6, dit.in_channels), torch.empty(1, 20, 3584), torch.empty(1, 768)
            timesteps = torch.empty(1)
        alone = dit(*inputs, timesteps)
        whole, gpu.flops = gpu.flops, gpu.flops.__class__()
        shared = dit(*inputs, timesteps, execution=Execution(around=parallel.SequenceParallel(group).around))
        assert shared.shape == alone.shape and shared.dtype == alone.dtype and gpu.faults == []
        assert sum(gpu.flops.values()) < 0.6 * sum(whole.values())


@pytest.mark.parametrize(("name", "processes"), [("5s_sft", 2), ("5s_sft", 4), ("10s_sft", 4)])
def test_memory_of_one_of_several_processes(name: str, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plan counts for a forward at a published size, of two blocks: 10s_sft's attention is NABLA's."""
    config = published(name)
    params, request = replace(config.model.dit_params, num_visual_blocks=2), default_request(config)
    group = mock.Mock(size=lambda: processes, rank=lambda: 0)
    monkeypatch.setattr(parallel.dist, "all_to_all_single", lambda *_, **__: None)
    monkeypatch.setattr(parallel.dist, "all_gather", lambda *_: None)
    monkeypatch.setattr(parallel, "meet", lambda group: None)
    attention = config.model.attention
    nabla = None if attention.type == "full" else NablaConfig(attention.P, attention.wT, attention.wH, attention.wW)
    with FakeGPU() as gpu:
        with torch.device("meta"):
            dit = DiffusionTransformer3D(**asdict(params)).bfloat16()
        state = {name: torch.empty(x.shape, dtype=x.dtype, device=DEVICE) for name, x in dit.state_dict().items()}
        dit.load_state_dict(state, assign=True)
        kernel = resolve_block_sparse("flex", DEVICE, torch.bfloat16, params.head_dim)
        with torch.device(DEVICE):
            inputs = (
                torch.empty(1, *request.latent_size, dit.in_channels),
                torch.empty(1, 256, params.in_text_dim, dtype=torch.bfloat16),
                torch.empty(1, params.in_text_dim2),
                torch.empty(1),
            )
        before = gpu.live
        gpu.reset_peak()
        execution = Execution(block_sparse=kernel, around=parallel.SequenceParallel(group).around)
        dit(*inputs, nabla=nabla, execution=execution)
    tokens = math.prod(request.latent_size) // 4
    planned = dit_activations(
        params, tokens, 256, 2, nabla=nabla is not None, flex=True, on_gpu=True, processes=processes
    )
    assert gpu.peak - before == pytest.approx(planned, rel=0.15)
    assert planned < 0.7 * dit_activations(params, tokens, 256, 2, nabla=nabla is not None, flex=True, on_gpu=True)


def test_memory_has_an_end() -> None:
    with FakeGPU(2**20) as gpu:
        kept = torch.empty(2**19, dtype=torch.uint8, device=DEVICE)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**20, dtype=torch.uint8, device=DEVICE)
        assert gpu.live == len(kept) and gpu.out_of_memory == 1


# --- planted faults ---------------------------------------------------------------------------------------------------


def test_a_mix_of_devices(tmp_path: Path) -> None:
    def change(gpu: FakeGPU, pipeline: Any) -> None:
        tables = pipeline.dit.request_tables
        pipeline.dit.request_tables = lambda size, text, scale, device, nabla: tables(size, text, scale, "cpu", nabla)

    with pytest.raises(RuntimeError, match="cuda:0"):
        run(tmp_path, change)


def test_a_copy_that_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockSwap, "_wait_for", lambda self, turn: None)
    assert any("read before what writes it" in fault for fault in run(tmp_path, **STREAMED).faults)


def test_a_buffer_that_is_overwritten_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_gpu.Stream, "wait_stream", lambda self, other: None)
    assert any("written before who reads it" in fault for fault in run(tmp_path, **STREAMED).faults)


def test_pinned_memory_that_is_freed_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = block_swap._copy_pieces

    def through_a_copy(pieces: Any, target: Tensor) -> None:
        copy([torch.empty_like(piece, pin_memory=True) for piece in pieces], target)

    monkeypatch.setattr(block_swap, "_copy_pieces", through_a_copy)
    assert any("pinned memory is freed" in fault for fault in run(tmp_path, **STREAMED).faults)


def test_a_timestep_in_bfloat16(tmp_path: Path) -> None:
    def rounded(given: list[Any]) -> None:
        given[3] = given[3].to(torch.bfloat16)

    assert any("timestep in torch.bfloat16" in fault for fault in run(tmp_path, around_forward(rounded)).faults)


def test_float64_on_the_device(tmp_path: Path) -> None:
    def widened(given: list[Any]) -> None:
        given[0] = given[0].double().float()

    assert any("float64 on the device" in fault for fault in run(tmp_path, around_forward(widened)).faults)


def test_waiting_for_the_device_between_steps(tmp_path: Path) -> None:
    def looked_at(given: list[Any]) -> None:
        given[0].sum().item()

    assert any("waits for the device" in fault for fault in run(tmp_path, around_forward(looked_at)).faults)


def test_weights_of_the_wrong_dtype(tmp_path: Path) -> None:
    result = run(tmp_path, lambda gpu, pipeline: pipeline.dit.float())
    assert any("wrong dtype" in fault for fault in result.faults)


def test_memory_that_is_kept_from_step_to_step(tmp_path: Path) -> None:
    kept: list[Tensor] = []
    result = run(tmp_path, around_forward(lambda given: kept.append(given[0].clone())), steps=3)
    assert any("grows from step to step" in fault for fault in result.faults)


def test_a_plan_that_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = plan.estimate

    def too_much(*given: Any) -> tuple[Stage, ...]:
        return tuple(
            replace(stage, weights=int(1.3 * stage.weights), activations=int(1.3 * stage.activations))
            for stage in estimate(*given)
        )

    monkeypatch.setattr(plan, "estimate", too_much)
    assert any(fault.startswith("denoise takes") for fault in run(tmp_path, **STREAMED).faults)


def test_a_block_that_is_left_out(tmp_path: Path) -> None:
    def change(gpu: FakeGPU, pipeline: Any) -> None:
        del pipeline.dit.visual_transformer_blocks[-1]

    assert any("the formula says" in fault for fault in run(tmp_path, change).faults)


def test_a_block_that_is_not_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = layers.FeedForward.forward

    def looked_at(*args: Any) -> Tensor:
        torch._dynamo.graph_break()
        return forward(*args)

    monkeypatch.setattr(layers.FeedForward, "forward", looked_at)
    with pytest.raises(CompileError, match="could not be compiled"):
        rehearse_graphs(small())


def test_a_graph_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def wide(self: layers.FeedForward, x: Tensor, chunk_tokens: int | None = None) -> Tensor:
        return F.linear(F.linear(x.float(), self.in_layer.weight.float()), self.out_layer.weight.float()).to(x.dtype)

    monkeypatch.setattr(layers.FeedForward, "forward", wide)
    assert any("float32" in fault for fault in rehearse_graphs(small()).faults)


def test_the_gpu_is_gone_afterwards(tmp_path: Path) -> None:
    with FakeGPU():
        assert torch.cuda.is_available()
        assert isinstance(torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE), FakeTensorMode)
    assert not torch.empty(1).is_cuda and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None


def test_bytes_that_are_moved() -> None:
    """Of operations whose bytes are plain: by hand what the count says."""
    with FakeGPU() as gpu:
        a, b = (torch.empty(64, 32, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        column = torch.empty(64, 1, dtype=torch.bfloat16, device=DEVICE)
        assert not gpu.moved
        a + column.expand(64, 32)  # what is shared is read once
        a.mul_(b)
        a.copy_(b)
        a.float()
        a.t()
        b[torch.empty(4, dtype=torch.int64, device=DEVICE)]  # four of its rows
        a @ b.t()
    size = 64 * 32 * 2
    assert gpu.moved == {
        "add": 2 * size + 128, "mul_": 3 * size, "copy_": 2 * size, "_to_copy": 3 * size,
        "index": 2 * 4 * 32 * 2 + 4 * 8, "mm": 2 * size + 64 * 64 * 2,
    }  # fmt: skip
    assert gpu.calls.total() == 6


def test_elementwise_stretches_are_counted() -> None:
    """Uncompiled, a gate alone makes a float32 copy of all tokens, 4 bytes a number beside the three tensors of 2."""
    config = load_config(CONFIGS / "config_5s_sft.yaml")
    numbers = 31 * 32 * 48 * 1792
    found = elementwise.count(config)
    gate = found["gated_residual"]
    assert gate.calls == 2 * 3
    assert gate.moved == 3 * (numbers * (2 + 2 + 4 + 4 + 2) + 1792 * 4)
    assert gate.fused == 3 * (numbers * (2 + 2 + 2) + 1792 * 4)
    assert all(row.fused < 0.5 * row.moved and row.times < row.calls for row in found.values())


def test_decoding_as_planned() -> None:
    """HunyuanVideo's decoder at 256 pixels: within 15 % of the formula's peak, bytes counted for each frame."""
    config = load_config(CONFIGS / "config_5s_sft.yaml", [f"{key}={value}" for key, value in SMALL.items()])
    gpu, frames = rehearse_decoding(config)
    assert gpu.peak == pytest.approx(planned_bytes(config), rel=0.15) and gpu.faults == []
    assert frames == 25 and gpu.moved["convolution"] > gpu.calls["convolution"] > 0
