"""Weights that are on their device for a stage only: what is there when, in which form, and after which accidents."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kandinsky.runtime.offload import Offloaded, OffloadPlacement, TextEncodersOnDemand, take_weights
from kandinsky.text.embeddings import TextEmbeddings

CPU = torch.device("cpu")


class Net(nn.Module):
    """Parameters of several kinds, and buffers, as a quantised layer has them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1).to(memory_format=torch.channels_last)
        self.register_buffer("weight_int8", torch.randint(-127, 128, (6, 6), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(()), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 6) -> (B, 6)"""
        x = self.conv(self.linear(x)[..., None, None])[..., 0, 0]
        return x @ (self.weight_int8.to(x.dtype) * self.scale.to(x.dtype))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


def tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def devices(model: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in tensors(model)}


def offloaded(net: Net, dtype: torch.dtype | None = None) -> tuple[Offloaded, dict[str, Tensor]]:
    """The net's weights stay as they are on the host; on the device its floats are of `dtype`."""
    weights = take_weights(net)
    if dtype is not None:
        net.to(dtype)
    return Offloaded(net, weights, CPU), weights


def test_values_are_the_same_and_are_gone_afterwards(net: Net) -> None:
    x = torch.randn(2, 6)
    expected, strides = net(x), [tensor.stride() for tensor in tensors(net)]
    part, weights = offloaded(net)
    for _ in range(2):
        assert devices(net) == {"meta"}
        part.begin()
        assert torch.equal(net(x), expected) and devices(net) == {"cpu"}
        assert [tensor.stride() for tensor in tensors(net)] == strides
        # A second copy: what is done to it does not reach the host.
        assert not {tensor.data_ptr() for tensor in tensors(net)} & {tensor.data_ptr() for tensor in weights.values()}
        assert not any(parameter.requires_grad for parameter in net.parameters())
        copies = [weakref.ref(tensor) for tensor in tensors(net)]
        with torch.no_grad():
            net.linear.weight.zero_()
        part.end()
        assert not any(copy() is not None for copy in copies)


def test_dtypes_are_those_of_the_device_at_any_time(net: Net) -> None:
    x = torch.randn(2, 6).bfloat16()
    half = Net().requires_grad_(False)
    half.load_state_dict(net.state_dict())
    half.scale = net.scale
    expected = half.bfloat16()(x)
    part, weights = offloaded(net, torch.bfloat16)
    assert {name: weight.dtype for name, weight in weights.items()}["linear.weight"] == torch.float32
    for stage in (lambda: None, part.begin, part.end):
        stage()
        assert [(tensor.dtype, tensor.shape) for tensor in tensors(net)] == [
            (tensor.dtype, tensor.shape) for tensor in tensors(half)
        ]
        assert net.weight_int8.dtype == torch.int8 and net.linear.weight.dtype == torch.bfloat16
    part.begin()
    assert torch.equal(net(x), expected)


def test_a_part_that_was_wrapped_later_is_found(net: Net) -> None:
    x = torch.randn(2, 6)
    expected = net(x)
    part, _ = offloaded(net)
    net.linear = nn.Sequential(net.linear)  # type: ignore[assignment]
    part.begin()
    assert torch.equal(net(x), expected)


def test_weights_of_somebody_else_are_left_alone(net: Net) -> None:
    weights = take_weights(net)
    del weights["linear.weight"]
    part = Offloaded(net, weights, CPU)
    part.begin()
    assert net.linear.weight.is_meta and not net.linear.bias.is_meta


@pytest.mark.gpu
def test_on_a_gpu_a_stage_takes_what_its_weights_take() -> None:
    device = torch.device("cuda:0")
    model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(8))).requires_grad_(False)
    expected = [layer.weight.bfloat16() for layer in model]
    weights = take_weights(model)
    model.bfloat16()
    part = Offloaded(model, weights, device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    part.begin()
    assert all(torch.equal(layer.weight.cpu(), weight) for layer, weight in zip(model, expected, strict=True))
    layer_bytes = 2 * 4096**2
    assert torch.cuda.memory_allocated(device) - before == 8 * layer_bytes
    # While a layer is cast it is there in float32 too, and once more where that is copied.
    assert torch.cuda.max_memory_allocated(device) - before <= (8 + 2 + 1) * layer_bytes
    part.end()
    assert torch.cuda.memory_allocated(device) == before


# --- the stages -------------------------------------------------------------------------------------------------------


class Recorded:
    def __init__(self, log: list[str], name: str, begin: Callable[[], None] | None = None) -> None:
        self.log, self.name, self._begin = log, name, begin

    def begin(self) -> None:
        self.log.append(f"+{self.name}")
        if self._begin is not None:
            self._begin()

    def end(self) -> None:
        self.log.append(f"-{self.name}")


def placement_of(log: list[str], **begin: Callable[[], None]) -> OffloadPlacement:
    names = {"dit": ("dit", "blocks"), "vae": ("vae",)}
    parts = {name: [Recorded(log, part, begin.get(part)) for part in those] for name, those in names.items()}
    return OffloadPlacement(dict.fromkeys(("dit", "vae", "text_embedder"), CPU), parts)


def test_a_component_is_there_within_its_stage() -> None:
    log: list[str] = []
    placement = placement_of(log)
    with placement.use("vae"):
        assert log == ["+vae"]
    with placement.use("text_embedder"):  # has nothing to bring
        pass
    with placement.use("dit"):
        assert log == ["+vae", "-vae", "+dit", "+blocks"]
    assert log[4:] == ["-dit", "-blocks"]
    assert placement.device("dit") == CPU


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_also_a_stage_that_fails_ends(error: type[BaseException]) -> None:
    log: list[str] = []
    placement = placement_of(log)
    with pytest.raises(error), placement.use("vae"):
        raise error()
    assert log == ["+vae", "-vae"]
    with placement.use("vae"):
        pass
    assert log == ["+vae", "-vae"] * 2


def test_also_a_stage_that_fails_to_begin_ends() -> None:
    def no_memory() -> None:
        raise torch.OutOfMemoryError("no memory")

    log: list[str] = []
    with pytest.raises(torch.OutOfMemoryError), placement_of(log, dit=no_memory).use("dit"):
        pytest.fail("the stage ran")
    assert log == ["+dit", "-dit", "-blocks"]


def test_weights_that_came_before_memory_ran_out_go_again(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 6)
    expected = net(x)
    part, _ = offloaded(net)
    placement = OffloadPlacement({"vae": CPU}, {"vae": [part]})
    calls = 0
    empty_strided = torch.empty_strided

    def limited(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            assert devices(net) == {"cpu", "meta"}
            raise torch.OutOfMemoryError("no memory")
        return empty_strided(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "empty_strided", limited)
        with placement.use("vae"):
            pytest.fail("the stage ran")
    assert devices(net) == {"meta"}
    with placement.use("vae"):
        assert torch.equal(net(x), expected)


def test_a_run_within_a_run_does_not_end_the_outer_stage() -> None:
    log: list[str] = []
    placement = placement_of(log)
    with placement.use("vae"):
        with placement.use("vae"):
            pass
        assert log == ["+vae"]
    assert log == ["+vae", "-vae"]


# --- text encoders ----------------------------------------------------------------------------------------------------


class OneEncoder:
    def encode(self, prompts: list[str], content: str, images: Any, max_length: int | None) -> TextEmbeddings:
        return TextEmbeddings(torch.full((len(prompts), 1, 2), float(max_length or 0)), torch.zeros(1, 2), None)


def test_text_encoders_are_loaded_for_the_first_prompt_and_forgotten() -> None:
    made: list[weakref.ref[OneEncoder]] = []

    def load() -> Any:
        encoder = OneEncoder()
        made.append(weakref.ref(encoder))
        return encoder

    on_demand = TextEncodersOnDemand(load)
    placement = OffloadPlacement({"text_embedder": CPU}, {"text_embedder": [on_demand]})
    with placement.use("text_embedder"):
        assert not made
    for stage in range(2):
        with placement.use("text_embedder"):
            for number in (3, 5):
                assert on_demand.encode(["a"], max_length=number).text_embeds[0, 0, 0] == number
            assert len(made) == stage + 1 and made[-1]() is not None
        assert made[-1]() is None
