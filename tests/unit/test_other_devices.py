"""Devices besides CPUs and CUDA: accepted where PyTorch has them, refused in words where something can't work there.

None of them is here. What they lack, float64 and complex numbers, is looked for in every operation of whole requests on
the CPU, with the one choice that asks the device made as it is made there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kandinsky import get_I2I_pipeline, get_T2V_pipeline
from kandinsky.attention.block_sparse import resolve_block_sparse
from kandinsky.config import load_config
from kandinsky.loading.assemble import load_pipeline
from kandinsky.loading.device_map import parse_device_map
from kandinsky.models import numerics, rope
from kandinsky.runtime.compile import is_wanted
from kandinsky.runtime.processes import Processes

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PICTURE = CONFIGS.parent / "assets" / "test_image.jpg"
LACKING = (torch.float64, torch.complex64, torch.complex128)


@pytest.fixture
def apples_and_intels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)


@pytest.mark.parametrize("name", ["mps", "xpu", "xpu:1"])
def test_accepted_where_they_are(name: str, apples_and_intels: None) -> None:
    assert set(parse_device_map(name).values()) == {torch.device(name)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mps", "this machine has no mps: 0 MPS devices found; use cpu"),
        ("xpu", "this machine has no xpu: 0 XPU devices found; use cpu"),
        ("hpu", "hpu is not a device this runs on: use cpu, cuda or cuda:0, mps, xpu or xpu:0"),
    ],
)
def test_refused_where_they_are_not(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        parse_device_map(name)


def test_a_second_mps_or_third_xpu_is_refused(apples_and_intels: None) -> None:
    for name in ("mps:1", "xpu:2"):
        with pytest.raises(ValueError, match=f"this machine has no {name}"):
            parse_device_map(name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dit_quantization": "nf4"}, "nf4 quantization needs a CUDA device or the CPU, not mps: choose int8"),
        ({"dit_quantization": "fp8"}, "fp8 quantization needs a CUDA device or the CPU, not mps: choose int8"),
        ({"qwen_quantization": "nf4"}, "nf4 quantization needs a CUDA device or the CPU, not mps"),
        ({"compile": "on"}, "blocks are not compiled for mps: run with --compile off"),
    ],
)
def test_said_before_anything_loads(
    settings: dict[str, Any], message: str, apples_and_intels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(CONFIGS / "config_tiny_t2i.yaml")
    config = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, **settings))
    monkeypatch.setattr("kandinsky.loading.assemble.load_dit", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        load_pipeline(config, "mps")


def test_several_processes_and_flex(apples_and_intels: None) -> None:
    config = load_config(CONFIGS / "config_tiny_t2i.yaml")
    store = dist.HashStore()
    two = Processes(0, 2, 0, store)
    with pytest.raises(ValueError, match="several processes share CUDA devices or CPUs, not xpu"):
        load_pipeline(config, "xpu", processes=two)
    dist.PrefixStore("kandinsky", store).set("left/1", "1")
    two.leave()  # else it would miss the other one after five minutes and end this process, others' tests and all
    with pytest.raises(ValueError, match="'flex' is compiled for CPUs and CUDA devices, not for mps: choose sdpa"):
        resolve_block_sparse("flex", torch.device("mps"))
    assert resolve_block_sparse("auto", torch.device("mps")) is resolve_block_sparse("sdpa", torch.device("cpu"))
    assert not is_wanted("auto", torch.device("mps"), 1000)


class Without(TorchDispatchMode):
    """Finds operations that give or take what some devices have not."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            if isinstance(value, torch.Tensor) and value.dtype in LACKING:
                self.found.add(f"{func}: {value.dtype}")
        return out


@pytest.fixture(scope="module")
def pipelines() -> Iterator[dict[str, Any]]:
    yield {
        "t2v": get_T2V_pipeline("cpu", conf_path=str(CONFIGS / "config_tiny_t2v.yaml")),
        "i2i": get_I2I_pipeline("cpu", conf_path=str(CONFIGS / "config_tiny_i2i.yaml")),
    }


def request(pipelines: dict[str, Any], task: str) -> None:
    if task == "t2v":
        pipelines[task]("a red circle", time_length=0.4, width=64, height=64, seed=1, num_steps=1, progress=False)
    else:
        pipelines[task]("make it red", image=str(PICTURE), seed=1, num_steps=1, progress=False)


@pytest.mark.parametrize("task", ["t2v", "i2i"])
def test_no_float64_and_no_complex_numbers(
    task: str, pipelines: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rope, "has_complex", lambda device: False)
    with Without() as without:
        request(pipelines, task)
    assert not without.found


def test_the_search_finds_something(pipelines: dict[str, Any]) -> None:
    """On a CPU rotations are products of complex numbers."""
    with Without() as without:
        request(pipelines, "t2v")
    assert any("complex64" in found for found in without.found)


def test_rotations_are_the_same_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    table = rope.visual_rotary_table((2, 3, 4), (4, 6, 6), (1, 2, 2), "cpu")
    x = torch.randn(1, 2, 24, 16, generator=torch.Generator().manual_seed(0))
    expected = rope.apply_rotary(x, table)
    monkeypatch.setattr(rope, "has_complex", lambda device: False)
    torch.testing.assert_close(rope.apply_rotary(x, table), expected, atol=1e-6, rtol=0)
    assert [numerics.has_complex(torch.device(name)) for name in ("cpu", "cuda", "mps", "xpu")] == [
        True,
        True,
        False,
        False,
    ]
