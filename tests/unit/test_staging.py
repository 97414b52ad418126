"""Copies through staging buffers: the same bytes, an order that a GPU would keep, and no thread that outlives them."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kandinsky.runtime import staging as staging_module
from kandinsky.runtime.layer_stream import LayersFromFile
from kandinsky.runtime.offload import Offloaded, take_weights
from kandinsky.runtime.staging import Arriving, Staging, on_device
from tests.rehearsal.fake_gpu import FakeGPU

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BYTES = 1024


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that a tensor takes several; and no thread is left by any test."""
    monkeypatch.setattr(staging_module, "STAGING_BYTES", BYTES)
    monkeypatch.setattr(staging_module, "AHEAD", 4 * BYTES)
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("staging")] == []


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (100 * torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))).to(dtype)


def test_the_same_bytes() -> None:
    """One piece and many, whole buffers and rests, other dtypes and memory formats, views, scalars, nothing."""
    pairs = [
        (torch.empty(3, 700), random(3, 700)),
        (torch.empty(512, dtype=torch.float16), random(512, dtype=torch.float16)),
        (torch.empty(37, 41, dtype=torch.bfloat16), random(37, 41)),
        (torch.empty(8, 6, 5, 5).to(memory_format=torch.channels_last), random(8, 6, 5, 5)),
        (torch.empty(40, 30), random(30, 40).t()),
        (torch.empty(2000, dtype=torch.int8), random(2000, dtype=torch.int8)),
        (torch.empty(()), random()),
        (torch.empty(0, 4), random(0, 4)),
        (torch.empty(1, 1), random(1, 1, dtype=torch.float64)),
    ]
    with Staging(CPU) as staging:
        arrived = list(staging.bring(pairs))
        again = [torch.empty_like(target) for target, _ in pairs]
        staging.copy((b, functools.partial(lambda x: x, x)) for b, (_, x) in zip(again, pairs, strict=True)).wait()
    for (target, source), tensor, second in zip(pairs, arrived, again, strict=True):
        assert tensor is target and torch.equal(target, source.to(target.dtype)) and torch.equal(second, target)
        assert second.stride() == target.stride()


def test_it_runs_ahead_but_not_far() -> None:
    made: list[int] = []

    def places() -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(50):
            made.append(i)
            yield torch.empty(BYTES, dtype=torch.uint8), torch.full((BYTES,), i, dtype=torch.uint8)

    with Staging(CPU) as staging:
        for i, tensor in enumerate(staging.bring(places())):
            assert int(tensor.sum()) == i * BYTES
            assert i + 4 <= len(made) + (i > 46) * 4 and len(made) <= i + 4


def test_an_error_while_reading_surfaces_and_ends_the_thread() -> None:
    """A file that breaks in the middle; what was asked for before is whole, and the same staging goes on after it."""
    target, other = torch.zeros(BYTES), torch.zeros(BYTES)

    def broken() -> Tensor:
        raise ValueError("a.safetensors: truncated")

    with Staging(CPU) as staging:
        first = staging.copy([(target, lambda: torch.ones(BYTES))])
        second = staging.copy([(other, lambda: torch.ones(BYTES)), (other, broken)])
        first.wait()
        with pytest.raises(ValueError, match="truncated"):
            second.wait()
        staging.copy([(other, lambda: torch.full((BYTES,), 2.0))]).wait()
    assert target.eq(1).all() and other.eq(2).all()

    def of_file() -> Iterator[tuple[str, Tensor]]:
        yield "whole", torch.ones(3)
        raise OSError("I/O error")

    with FakeGPU() as gpu, pytest.raises(OSError, match="I/O error"):
        list(on_device(of_file(), GPU))
    assert gpu.faults == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_who_stops_does_not_wait_for_what_is_left(error: type[BaseException]) -> None:
    reads: list[int] = []

    def read(i: int) -> Tensor:
        reads.append(i)
        time.sleep(0.01)
        return torch.ones(BYTES)

    with pytest.raises(error), Staging(CPU) as staging:
        arriving = [staging.copy([(torch.empty(BYTES), functools.partial(read, i))]) for i in range(1000)]
        arriving[0].wait()
        raise error
    assert 1 <= len(reads) < 500


# --- on a GPU that is not there ---------------------------------------------------------------------------------------


def offloaded_twice(gpu: FakeGPU) -> None:
    """Two stages of a model whose weights are cast, staged, and changed when they come."""
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 40))
    weights = take_weights(model)
    model.bfloat16()
    part = Offloaded(model, weights, GPU, lambda name, tensor: tensor + 1)
    for _ in range(2):
        part.begin()
        model(torch.empty(3, 40, dtype=torch.bfloat16, device=GPU))
        part.end()


def layers_from_file(gpu: FakeGPU) -> None:
    layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(5))
    weights = take_weights(layers)
    swap = LayersFromFile(layers, weights.__getitem__, "", GPU)
    swap.begin()
    x = torch.empty(3, 32, device=GPU)
    for _ in range(2):
        for layer in swap(layers):
            x = layer(x)
    swap.end()


def loaded(gpu: FakeGPU) -> None:
    for _, tensor in on_device(((i, torch.empty(300)) for i in range(20)), GPU):
        tensor.half()


WORK = [offloaded_twice, layers_from_file, loaded]


def faults_of(work: Callable[[FakeGPU], None]) -> str:
    with FakeGPU() as gpu:
        work(gpu)
        torch.cuda.synchronize()
        assert gpu.live == 0
    return "; ".join(gpu.faults)


@pytest.mark.parametrize("work", WORK)
def test_nothing_is_found_where_nothing_is_wrong(work: Callable[[FakeGPU], None]) -> None:
    assert faults_of(work) == ""


@pytest.mark.parametrize("work", WORK)
def test_a_buffer_that_is_written_before_its_copy_is_over(
    work: Callable[[FakeGPU], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_once(self: Staging) -> Any:
        return self._buffers.popleft() if len(self._buffers) == 4 else next_buffer(self)

    next_buffer = Staging._next_buffer
    monkeypatch.setattr(Staging, "_next_buffer", at_once)
    assert "pinned memory is written before who reads it is done" in faults_of(work)


@pytest.mark.parametrize("work", WORK)
def test_a_tensor_that_is_used_before_it_has_come(
    work: Callable[[FakeGPU], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Arriving, "wait", lambda self: None)
    assert "device memory is read before what writes it is waited for" in faults_of(work)


def test_a_layer_that_is_overwritten_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Staging._copy
    monkeypatch.setattr(Staging, "_copy", lambda self, pairs, before: copy(self, pairs, None))
    assert "device memory is written before who reads it is done" in faults_of(layers_from_file)


def test_buffers_that_are_freed_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Staging, "close", lambda self: self._buffers.clear())
    assert "pinned memory is freed while a copy out of it may still be under way" in faults_of(loaded)
