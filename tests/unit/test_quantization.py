"""Quantised linear layers: their error, their tensors, every file layout, and what is refused, naming what is wrong."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kandinsky.checkpoints.dit_layout import (
    COMFY_PREFIX,
    expected_dit_shapes,
    is_quantizable,
    quantization_from_header,
    quantized_parts,
)
from kandinsky.checkpoints.headers import read_header
from kandinsky.config.reading import load_config
from kandinsky.config.schema import DiTConfig
from kandinsky.loading import getters, weights
from kandinsky.loading.dit import load_dit
from kandinsky.models.dit import DiffusionTransformer3D
from kandinsky.runtime.quantization import (
    DTYPES,
    QuantizedLinear,
    quantize_linears,
    require_scheme,
    save_checkpoint,
)
from tools.quantize import main as quantize_main

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / "configs" / "config_tiny_t2v.yaml"
NEEDS_BITSANDBYTES = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
SCHEMES = ["int8", "fp8", pytest.param("nf4", marks=NEEDS_BITSANDBYTES)]
# Relative error (Frobenius) of a weight of normal numbers: half a step of 1/127 of a group's largest, three bits of
# mantissa, sixteen levels. A scale or a rounding that is a little wrong doubles them.
ERROR = {"int8": 0.0075, "fp8": 0.028, "nf4": 0.096}
State = dict[str, Tensor]

PARAMS = DiTConfig(
    in_text_dim=48,
    in_text_dim2=24,
    time_dim=32,
    model_dim=192,  # one group and a half of int8
    ff_dim=320,
    num_text_blocks=1,
    num_visual_blocks=2,
    axes_dims=(16, 24, 24),
    visual_cond=True,
)
TO_KEY = "visual_transformer_blocks.1.cross_attention.to_key"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def quantized_linear(scheme: str, weight: Tensor, bias: Tensor | None = None) -> QuantizedLinear:
    """The layer of a weight, made as loading makes it."""
    model = nn.ModuleDict({"a": nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")})
    convert = quantize_linears(model, ["a"], scheme)
    state = convert("a.weight", weight)
    if bias is not None:
        assert convert("a.bias", bias) == {}
        state["a.bias"] = bias
    model.load_state_dict(state, strict=True, assign=True)
    layer = model["a"]
    assert isinstance(layer, QuantizedLinear)
    return layer.requires_grad_(False)


# --- a layer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(600, 128), (64, 200), (7, 33), (96, 1)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_error(scheme: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, bias = normal(*shape).to(dtype), normal(shape[0], seed=1).to(dtype)
    x = normal(2, 40, shape[1], seed=2).to(dtype)
    layer = quantized_linear(scheme, weight, bias)
    out = layer(x)
    assert out.dtype == dtype and out.shape == (2, 40, shape[0])
    assert torch.equal(out, F.linear(x, layer.dequantize(dtype), bias))
    error = relative_error(layer.dequantize(torch.float32), weight)
    print(f"{scheme} {shape}: relative error {error:.4f}")
    small = min(shape) < 10  # the few weights of small groups are nearer to their own largest
    assert error <= ERROR[scheme] and (small or error >= 0.7 * ERROR[scheme])
    full = F.linear(x.double(), weight.double(), bias.double())
    assert relative_error(out, full) <= 1.2 * ERROR[scheme] + (0.004 if dtype == torch.bfloat16 else 0)


def test_int8_is_what_its_definition_says() -> None:
    """Against the same in NumPy, one group at a time: round to nearest, halves to even, of amax / 127."""
    weight = normal(5, 300).numpy()
    weight[2, :4] = [127.0, 0.5, 1.5, -2.5]  # of scale 1
    layer = quantized_linear("int8", torch.from_numpy(weight))
    for row in range(5):
        for group, start in enumerate(range(0, 300, 128)):
            values = weight[row, start : start + 128]
            scale = np.float32(np.abs(values).max()) / np.float32(127)
            assert layer.weight_scales[row, group] == scale
            assert np.array_equal(layer.weight_int8[row, start : start + 128].numpy(), np.rint(values / scale))
    assert layer.weight_int8[2, :4].tolist() == [127, 0, 2, -2]
    assert layer.weight_int8.abs().amax() == 127


def test_fp8_uses_the_whole_range_in_every_row() -> None:
    weight = normal(6, 100) * torch.logspace(-6, 4, 6)[:, None]
    layer = quantized_linear("fp8", weight)
    assert torch.equal(layer.weight_fp8.float().abs().amax(1), torch.full((6,), 448.0))
    assert relative_error(layer.dequantize(torch.float32)[0], weight[0]) < 0.03
    assert layer.dequantize(torch.float32).isfinite().all()


def test_nf4_levels_are_the_published_ones() -> None:
    """The sixteen numbers of QLoRA's appendix E, times the largest of 64 inputs."""
    pytest.importorskip("bitsandbytes")
    levels = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
              0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # fmt: skip
    weight = normal(4, 96)
    layer = quantized_linear("nf4", weight)
    for start in (0, 64):
        group = weight[:, start : start + 64]
        scales = group.abs().amax(1, keepdim=True)
        assert torch.equal(layer.weight_scales[:, start // 64, None], scales)
        choice = (group / scales)[..., None].sub(torch.tensor(levels)).abs().argmin(-1)
        torch.testing.assert_close(
            layer.dequantize(torch.float32)[:, start : start + 64], torch.tensor(levels)[choice] * scales
        )


def test_nf4_is_that_of_bitsandbytes() -> None:
    """The same weights as its own functions make where rows divide into groups: it knows no rows."""
    functional = pytest.importorskip("bitsandbytes").functional
    weight, x = normal(100, 192), normal(5, 192, seed=1)
    expected = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    layer = quantized_linear("nf4", weight)
    assert torch.equal(layer.dequantize(torch.float32), expected)
    assert torch.equal(layer(x), F.linear(x, expected))


@pytest.mark.parametrize("value", [0.0, 1e-44], ids=["zeros", "tiny"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_and_groups_of_nothing(scheme: str, value: float) -> None:
    weight, bias = normal(8, 256), normal(8, seed=1)
    weight[3], weight[5, 128:] = value, value
    layer = quantized_linear(scheme, weight, bias)
    dequantized = layer.dequantize(torch.float32)
    assert dequantized.isfinite().all()
    assert dequantized[3].abs().max() <= 2 * value and dequantized[5, 128:].abs().max() <= 2 * value
    assert relative_error(dequantized[:3], weight[:3]) <= 1.1 * ERROR[scheme]
    assert torch.equal(layer(torch.ones(1, 256))[0, 3], bias[3])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_that_are_not_finite_are_refused(scheme: str, bad: float) -> None:
    weight = normal(4, 128)
    weight[1, 70] = bad
    with pytest.raises(ValueError, match=r"a\.weight has NaN or infinite values"):
        quantized_linear(scheme, weight)


@pytest.mark.parametrize("shape", [(192, 512), (7, 33)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensors_are_those_of_the_layout(scheme: str, shape: tuple[int, int]) -> None:
    state = quantized_linear(scheme, normal(*shape)).state_dict()
    parts = quantized_parts(scheme, *shape)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == {
        name: (DTYPES[dtype], shape) for name, (dtype, shape) in parts.items()
    }
    assert all(t.is_contiguous() for t in state.values())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_casting_a_model_leaves_quantised_weights(scheme: str) -> None:
    layer = quantized_linear(scheme, normal(64, 128), normal(64))
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    layer.to(torch.bfloat16)
    assert layer.bias is not None and layer.bias.dtype == torch.bfloat16
    for name, tensor in layer.named_buffers():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor.float(), before[name].float()), name
    assert {tensor.device.type for tensor in layer.to("meta").state_dict().values()} == {"meta"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_may_lie_in_one_flat_buffer_of_bytes(scheme: str) -> None:
    """As swapping blocks has them: copied as bytes, and looked at there with their own dtypes."""
    layer = quantized_linear(scheme, normal(96, 200), normal(96))
    x = normal(3, 200, seed=1)
    expected = layer(x)
    flat = torch.zeros(10**6, dtype=torch.uint8)
    offset = 0
    for name, tensor in [*layer.named_buffers(), *layer.named_parameters()]:
        size = tensor.numel() * tensor.element_size()
        flat[offset : offset + size] = tensor.detach().flatten().view(torch.uint8)
        there = flat[offset : offset + size].view(tensor.dtype).view(tensor.shape)
        tensor.data = there
        assert getattr(layer, name).data_ptr() == flat.data_ptr() + offset
        offset += -(-size // 256) * 256
    assert torch.equal(layer(x), expected)
    flat.zero_()
    assert not layer(x).any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiles_as_one_graph(scheme: str) -> None:
    layer = quantized_linear(scheme, normal(96, 200), normal(96))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = normal(3, 200, seed=1)
    torch.testing.assert_close(compiled(x), layer(x))


def test_unknown_scheme() -> None:
    with pytest.raises(ValueError, match="quantization is 'int4'; choose one of int8, fp8, nf4"):
        require_scheme("int4")


# --- a DiT from a checkpoint in full precision ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def state() -> State:
    shapes = expected_dit_shapes(PARAMS)
    return {name: 0.1 * normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


@pytest.fixture(scope="module")
def checkpoint(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dit") / "dit.safetensors"
    save_file(state, path)
    return path


def velocity(dit: DiffusionTransformer3D) -> Tensor:
    dtype = dit.visual_embeddings.in_layer.weight.dtype
    latents, text, pooled = normal(1, 2, 4, 4, 33), normal(1, 5, 48, seed=1), normal(1, 24, seed=2)
    return dit(latents.to(dtype), text.to(dtype), pooled.to(dtype), torch.tensor([700.0]))


def load(path: Path, quantization: str | None = None, dtype: torch.dtype = torch.float32) -> DiffusionTransformer3D:
    return load_dit(path, PARAMS, "cpu", dtype, quantization)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_the_named_layers_change(checkpoint: Path, state: State, scheme: str, dtype: torch.dtype) -> None:
    full, quantized = load(checkpoint, None, dtype), load(checkpoint, scheme, dtype)
    modules, plain = dict(quantized.named_modules()), dict(full.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 6 * PARAMS.num_text_blocks + 10 * PARAMS.num_visual_blocks
    assert list(modules) == list(plain)
    for name, module in modules.items():
        if name not in layers:
            assert type(module) is type(plain[name]), name
    assert layers == [name for name in modules if is_quantizable(name)]
    remaining = quantized.state_dict()
    for name in layers:
        weight = state[f"{name}.weight"]  # as in the file, not as cast
        expected = quantized_linear(scheme, weight)
        for part, tensor in expected.state_dict().items():
            assert torch.equal(remaining.pop(f"{name}.{part}").view(torch.uint8), tensor.view(torch.uint8)), name
        error = relative_error(modules[name].dequantize(torch.float32), weight)
        assert error <= ERROR[scheme], name
    for name, tensor in remaining.items():
        assert tensor.dtype == full.state_dict()[name].dtype and torch.equal(tensor, full.state_dict()[name]), name
    assert set(remaining) == {name for name in state if name.removesuffix(".weight") not in layers}
    assert not quantized.training and not any(p.requires_grad for p in quantized.parameters())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_error_of_the_whole_model(checkpoint: Path, scheme: str) -> None:
    """Each block adds to what the last one made, so that errors grow a little, but not with the number of layers."""
    error = relative_error(velocity(load(checkpoint, scheme)), velocity(load(checkpoint)))
    print(f"{scheme}: relative error of the velocity {error:.4f}")
    assert 0.2 * ERROR[scheme] <= error <= 2 * ERROR[scheme]


def test_tensors_are_quantised_one_at_a_time(checkpoint: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a tensor is read, the original of the one before it is already gone."""
    alive: list[int] = []
    originals: list[weakref.ref[Tensor]] = []
    original = weights.read_tensors

    def recording(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in original(files):
            if is_quantizable(name.removesuffix(".weight")):
                originals.append(weakref.ref(tensor))
            alive.append(sum(reference() is not None for reference in originals))
            yield name, tensor

    monkeypatch.setattr(weights, "read_tensors", recording)
    load(checkpoint, "int8")
    assert len(originals) == 26 and max(alive) <= 2


def test_a_checkpoint_with_nan_is_refused(state: State, tmp_path: Path) -> None:
    bad = {**state, f"{TO_KEY}.weight": torch.full_like(state[f"{TO_KEY}.weight"], float("nan"))}
    save_file(bad, tmp_path / "dit.safetensors")
    with pytest.raises(ValueError) as error:
        load(tmp_path / "dit.safetensors", "int8")
    assert str(tmp_path / "dit.safetensors") in str(error.value) and f"{TO_KEY}.weight" in str(error.value)


# --- quantised checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.processor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_saved_and_loaded(checkpoint: Path, tmp_path: Path, scheme: str, dtype: torch.dtype) -> None:
    """With the flag and without, the same bytes and the same velocity as quantised while loading."""
    path = tmp_path / "quantised.safetensors"
    quantized = load(checkpoint, scheme, dtype)
    save_checkpoint(quantized, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert quantization_from_header(read_header(path)) == scheme
    for asked in (None, scheme):
        again = load(path, asked, dtype)
        for name, tensor in quantized.state_dict().items():
            other = again.state_dict()[name]
            assert other.dtype == tensor.dtype and torch.equal(other.view(torch.uint8), tensor.view(torch.uint8)), name
        assert torch.equal(velocity(again), velocity(quantized))


def test_what_fails_to_be_written_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def full_disk(path: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("kandinsky.common.writing._sync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(load(checkpoint, "int8"), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.processor
def test_an_int8_file_as_others_write_it(checkpoint: Path, state: State, tmp_path: Path) -> None:
    """Truncated towards zero, a zero group with scale 0; (out, in / 128) scales; ComfyUI's prefix; sharded or not."""
    params = dataclasses.replace(PARAMS, model_dim=256, ff_dim=384, axes_dims=(16, 24, 24))
    shapes = expected_dit_shapes(params)
    plain = {name: 0.1 * normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    plain[f"{TO_KEY}.weight"][7, 128:] = 0
    written: State = {}
    for name, tensor in plain.items():
        layer = name.removesuffix(".weight")
        if not is_quantizable(layer):
            written[COMFY_PREFIX + name] = tensor
            continue
        groups = tensor.view(len(tensor), -1, 128)
        scales = groups.abs().amax(-1) / 127
        integers = (groups / scales[..., None]).nan_to_num().trunc().to(torch.int8).view(tensor.shape)
        written[f"{COMFY_PREFIX}{layer}.weight_int8"], written[f"{COMFY_PREFIX}{layer}.weight_scales"] = (
            integers,
            scales,
        )
        plain[name] = (integers.view_as(groups).float() * scales[..., None]).view_as(tensor)
    save_file(written, tmp_path / "int8.safetensors")
    save_file(plain, tmp_path / "plain.safetensors")
    loaded = load_dit(tmp_path / "int8.safetensors", params, "cpu", torch.float32)
    expected = load_dit(tmp_path / "plain.safetensors", params, "cpu", torch.float32)
    assert sum(isinstance(module, QuantizedLinear) for module in loaded.modules()) == 26
    assert torch.equal(velocity(loaded), velocity(expected))


@pytest.mark.processor
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_an_fp8_file_as_others_write_it(state: State, tmp_path: Path, shape: tuple[int, ...]) -> None:
    """One scale for a whole weight."""
    written, plain = {}, dict(state)
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        if not is_quantizable(layer):
            written[name] = tensor
            continue
        scale = tensor.abs().amax() / 448
        written[f"{layer}.weight_fp8"] = (tensor / scale).to(torch.float8_e4m3fn)
        written[f"{layer}.weight_scale"] = scale.reshape(shape)
        plain[name] = written[f"{layer}.weight_fp8"].float() * scale
    save_file(written, tmp_path / "fp8.safetensors")
    save_file(plain, tmp_path / "plain.safetensors")
    loaded = load(tmp_path / "fp8.safetensors")
    assert torch.equal(velocity(loaded), velocity(load(tmp_path / "plain.safetensors")))
    layer = loaded.get_submodule(TO_KEY)
    assert layer.weight_scale.shape == (192, 1) and layer.weight_scale.is_contiguous()
    save_checkpoint(loaded, tmp_path / "again.safetensors")
    assert torch.equal(velocity(load(tmp_path / "again.safetensors")), velocity(loaded))


def quantised_state(checkpoint: Path, scheme: str) -> State:
    return dict(load(checkpoint, scheme).state_dict())


def test_some_layers_may_be_in_full_precision(checkpoint: Path, state: State, tmp_path: Path) -> None:
    """Files differ in which layers they spare; what is in the file is what runs."""
    mixed = quantised_state(checkpoint, "int8")
    for part in ("weight_int8", "weight_scales"):
        del mixed[f"{TO_KEY}.{part}"]
    mixed[f"{TO_KEY}.weight"] = state[f"{TO_KEY}.weight"]
    save_file(mixed, tmp_path / "mixed.safetensors")
    for asked in (None, "int8"):
        dit = load(tmp_path / "mixed.safetensors", asked)
        assert type(dit.get_submodule(TO_KEY)) is nn.Linear
        assert sum(isinstance(module, QuantizedLinear) for module in dit.modules()) == 25


@pytest.mark.parametrize(("found", "asked"), [("int8", "fp8"), ("fp8", "int8"), ("int8", "nf4")])
def test_a_flag_that_contradicts_the_file(checkpoint: Path, tmp_path: Path, found: str, asked: str) -> None:
    path = tmp_path / "quantised.safetensors"
    save_file(quantised_state(checkpoint, found), path)
    with pytest.raises(ValueError) as error:
        load(path, asked)
    message = str(error.value)
    assert f"{path}: the checkpoint is quantised to {found} already, and cannot be to {asked}" in message
    assert "leave dit_quantization out" in message


def test_a_scheme_that_is_not_known(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="quantization is 'int4'; choose one of int8, fp8, nf4"):
        load(checkpoint, "int4")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({f"{TO_KEY}.weight_scales": None}, ["quantised to int8", f"1 missing ({TO_KEY}.weight_scales)"]),
        (
            {f"{TO_KEY}.weight_int8": None},
            [f"1 missing ({TO_KEY}.weight)", f"1 unexpected ({TO_KEY}.weight_scales)"],
        ),
        ({f"{TO_KEY}.weight_scales": torch.ones(192, 3)}, [f"1 of another shape ({TO_KEY}.weight_scales)"]),
        ({f"{TO_KEY}.weight_scales": torch.ones(192, 2).int()}, [f"1 of another dtype ({TO_KEY}.weight_scales)"]),
        (
            {f"{TO_KEY}.weight_int8": torch.ones(192, 192, dtype=torch.uint8)},
            [f"1 of another dtype ({TO_KEY}.weight_int8)"],
        ),
        ({f"{TO_KEY}.weight": torch.ones(192, 192)}, [f"1 unexpected ({TO_KEY}.weight)"]),
        (
            {f"{TO_KEY}.weight_int8": None, f"{TO_KEY}.weight_fp8": torch.ones(192, 192)},
            ["mixes layers in fp8 and int8"],
        ),
        (
            {"out_layer.out_layer.weight_int8": torch.ones(64, 192, dtype=torch.int8)},
            ["1 unexpected (out_layer.out_layer.weight_int8)"],
        ),
        ({f"{TO_KEY}.weight_scales": torch.full((192, 2), float("nan"))}, [f"{TO_KEY}.weight_scales has NaN"]),
    ],
    ids=lambda value: "-".join(name.rpartition(".")[2] for name in value) if isinstance(value, dict) else "",
)
def test_quantised_files_are_loaded_strictly(
    checkpoint: Path, tmp_path: Path, change: dict[str, Tensor | None], parts: list[str]
) -> None:
    changed = {**quantised_state(checkpoint, "int8"), **change}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError) as error:
        load(tmp_path / "x.safetensors")
    for part in [str(tmp_path / "x.safetensors"), *parts]:
        assert part in str(error.value)


def test_without_bitsandbytes(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with the command that installs it, before any weight is read."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(weights, "read_tensors", lambda files: pytest.fail("a weight was read"))
    for attempt in (
        lambda: load(checkpoint, "nf4"),
        lambda: getters.get_T2V_pipeline("cpu", conf_path=TINY, quantized_qwen=True),
    ):
        with pytest.raises(ValueError) as error:
            attempt()
        assert "pip install bitsandbytes" in str(error.value) and "\n" not in str(error.value)


# --- the command ------------------------------------------------------------------------------------------------------


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny checkpoint is in bfloat16: its quantised file holds what loading with the flag gives."""
    config = load_config(TINY)
    output = tmp_path / "int8.safetensors"
    arguments = ["--config", str(TINY), "--dit_quantization", "int8", "--output", str(output)]
    assert quantize_main(arguments) == 0
    assert "% of what was read" in capsys.readouterr().out
    path = REPOSITORY / config.model.checkpoint_path
    expected = load_dit(path, config.model.dit_params, "cpu", torch.bfloat16, "int8").state_dict()
    written = load_file(output)
    assert set(written) == set(expected)
    for name, tensor in written.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("output", "overrides", "expected"),
    [
        ("there.safetensors", [], "exists"),
        ("x.pt", [], "not a .safetensors file"),
        ("nowhere/x.safetensors", [], "there is no folder"),
        ("x.safetensors", ["model.checkpoint_path=nowhere.safetensors"], "weights not found"),
    ],
)
def test_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str, overrides: list[str], expected: str
) -> None:
    (tmp_path / "there.safetensors").touch()
    arguments = ["--config", str(TINY), "--dit_quantization", "fp8", "--output", str(tmp_path / output), *overrides]
    assert quantize_main(arguments) == 2
    assert expected in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["there.safetensors"]


def bits(dit: DiffusionTransformer3D) -> State:
    return {name: tensor.view(torch.uint8) for name, tensor in dit.state_dict().items()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_on_another_device(checkpoint: Path, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies stand in for tensors there: each is gone when the next but one comes, and the bits are the host's.

    That they are on the device, and how much of it they take, is in tests/rehearsal.
    """
    there = torch.device("cpu", 0)
    copies: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def brought(tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        assert device is there
        for name, tensor in tensors:
            copy = tensor.clone()
            if is_quantizable(name.removesuffix(".weight")):
                copies.append(weakref.ref(copy))
            alive.append(sum(reference() is not None for reference in copies))
            yield name, copy

    expected = bits(load(checkpoint, scheme, torch.bfloat16))
    monkeypatch.setattr(weights, "on_device", brought)
    found = bits(load_dit(checkpoint, PARAMS, "cpu", torch.bfloat16, scheme, there))
    assert len(copies) == 26 and max(alive) <= 2
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_quantised_on_a_gpu(checkpoint: Path, scheme: str) -> None:
    expected = bits(load(checkpoint, scheme, torch.bfloat16))
    dit = load_dit(checkpoint, PARAMS, "cpu", torch.bfloat16, scheme, torch.device("cuda"))
    assert all(tensor.device.type == "cpu" for tensor in dit.state_dict().values())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in bits(dit).items())


# --- memory -----------------------------------------------------------------------------------------------------------

# Loads, and prints by how much anonymous memory (what is no page of a file) was at most above what imports had taken.
METER = """
import re, sys, threading, torch
from kandinsky.config import load_config
from kandinsky.config.schema import DiTConfig
from kandinsky.loading.dit import load_dit
from kandinsky.runtime.quantization import require_scheme
def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s*(\\d+)", open("/proc/self/status").read())[1])
path, params, dtype, scheme = sys.argv[1], eval(sys.argv[2]), getattr(torch, sys.argv[3]), sys.argv[4]
torch.ones(1000, 1000) @ torch.ones(1000, 1000)
peak = base = anonymous()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
dit = load_dit(path, params, "cpu", dtype, None if scheme == "none" else scheme)
done.set()
watcher.join()
print(max(peak, anonymous()) - base)
"""


@pytest.mark.processor
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's account of memory")
def test_memory_of_quantising_while_loading(tmp_path: Path) -> None:
    """Peak anonymous memory against the size of a bfloat16 file of half a gigabyte.

    Pages of the memory-mapped file are not counted: they are the system's to drop. The cast to float16, which copies
    all but modulation and time embeddings, shows that the meter sees what it should. What one layer takes while it is
    quantised is seen or not, as the meter's thread has its turns: layers are small enough that it does not matter.
    """
    params = DiTConfig(
        in_text_dim=256, time_dim=96, model_dim=1024, ff_dim=1024, num_text_blocks=1, num_visual_blocks=22,
        visual_cond=True,
    )  # fmt: skip
    path, pool = tmp_path / "dit.safetensors", normal(2**22).bfloat16()
    shapes = expected_dit_shapes(params)
    save_file({name: pool[: int(np.prod(shape))].view(shape).clone() for name, shape in shapes.items()}, path)
    size = path.stat().st_size
    assert 0.4e9 < size < 0.6e9

    def share(dtype: str, scheme: str) -> float:
        command = [sys.executable, "-c", METER, path, repr(params), dtype, scheme]
        # What is freed is given back at once, so that it is not counted.
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "MALLOC_MMAP_THRESHOLD_": "65536"}
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert run.returncode == 0, run.stderr
        result = int(run.stdout) / size
        print(f"{dtype} {scheme}: peak {result:.3f} of the file's {size / 1e6:.0f} MB")
        return result

    assert 0.85 <= share("float16", "none") <= 0.95
    assert 0.42 <= share("bfloat16", "int8") <= 0.6
