"""LoHa, LoKr and DoRA: merged weights against their formulas in float64, and against peft where it has the method."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_reference import LITE, build_pair
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from kandinsky.checkpoints.inspect import inspect
from kandinsky.config.schema import DiTConfig
from kandinsky.models.dit import DiffusionTransformer3D
from kandinsky.runtime.lora import Adapters
from kandinsky.runtime.quantization import QuantizedLinear, quantize_dit

PARAMS = DiTConfig(**LITE)
TOLERANCE = 1e-5
QUERY = "visual_transformer_blocks.1.self_attention.to_query"
WIDE = "visual_transformer_blocks.0.feed_forward.in_layer"
TARGETS = r".*(attention|feed_forward)\..*(to_query|to_key|to_value|in_layer|out_layer)|visual_embeddings\.in_layer"
Parts = dict[str, Tensor]


@pytest.fixture(scope="module")
def dit() -> DiffusionTransformer3D:
    ours, _ = build_pair(LITE)
    return ours


def adapters_of(dit: nn.Module) -> Adapters:
    own = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    adapters = Adapters(dit, PARAMS, lambda: own, torch.device("cpu"))
    adapters.begin()
    return adapters


def random(*shape: int, seed: int) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the formulas, in float64 -----------------------------------------------------------------------------------------


def lora_parts(outputs: int, inputs: int) -> tuple[Parts, Tensor]:
    up, down = random(outputs, 3, seed=1), random(3, inputs, seed=2)
    return {"lora_up.weight": up, "lora_down.weight": down}, up.double() @ down.double() / 3


def loha_parts(outputs: int, inputs: int) -> tuple[Parts, Tensor]:
    a, b, c, d = (random(*s, seed=i) for i, s in enumerate(2 * [(outputs, 3), (3, inputs)]))
    delta = (a.double() @ b.double()) * (c.double() @ d.double()) / 3
    return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}, delta


def kron(one: Tensor, other: Tensor) -> Tensor:
    """Written out: blocks of the second, one for each number of the first."""
    return torch.cat([torch.cat([number * other for number in row], dim=1) for row in one.double()])


def lokr_parts(outputs: int, inputs: int) -> tuple[Parts, Tensor]:
    """A whole first factor, and a second one of rank 3."""
    one, a, b = random(4, 2, seed=1), random(outputs // 4, 3, seed=2), random(3, inputs // 2, seed=3)
    return {"lokr_w1": one, "lokr_w2_a": a, "lokr_w2_b": b}, kron(one, a.double() @ b.double()) / 3


def lokr_both_parts(outputs: int, inputs: int) -> tuple[Parts, Tensor]:
    a, b = random(4, 2, seed=1), random(2, 2, seed=2)
    c, d = random(outputs // 4, 3, seed=3), random(3, inputs // 2, seed=4)
    parts = {"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2_a": c, "lokr_w2_b": d}
    return parts, kron(a.double() @ b.double(), c.double() @ d.double()) / 3


def lokr_whole_parts(outputs: int, inputs: int) -> tuple[Parts, Tensor]:
    """Two whole factors have no rank, and alpha is of no account."""
    one, other = random(4, 2, seed=1), random(outputs // 4, inputs // 2, seed=2)
    return {"lokr_w1": one, "lokr_w2": other}, kron(one, other) / 6


KINDS = [lora_parts, loha_parts, lokr_parts, lokr_both_parts, lokr_whole_parts]
ALPHA = 6.0
LENGTHS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda w: torch.ones(0),
    "rows": lambda w: 1.5 + random(len(w), seed=7),
    "rows of others": lambda w: 1.5 + random(len(w), 1, seed=7),
    "columns": lambda w: 1.5 + random(1, w.shape[1], seed=7),
}


def with_lengths(weight: Tensor, lengths: Tensor) -> Tensor:
    """DoRA: each row, or column, of that length."""
    if lengths.numel() == 0:
        return weight
    if lengths.ndim == 2 and len(lengths) == 1:
        return with_lengths(weight.T, lengths[0]).T
    rows = [row * length / row.dot(row).sqrt() for row, length in zip(weight, lengths.double().flatten(), strict=True)]
    return torch.stack(rows)


def write(path: Path, dit: nn.Module, kind: Callable[..., Any], lengths: str, prefix: str) -> dict[str, Any]:
    """A file for two layers; what their weights become for a scale, in float64."""
    tensors, expected = {}, {}
    for layer in (QUERY, WIDE):
        weight = dit.get_submodule(layer).weight
        parts, delta = kind(*weight.shape)
        magnitude = LENGTHS[lengths](weight)
        if magnitude.numel():
            parts = parts | {"dora_scale": magnitude}
        name = f"{prefix}{layer.replace('.', '_') if prefix.endswith('_') else layer}"
        tensors |= {f"{name}.{part}": tensor for part, tensor in (parts | {"alpha": torch.tensor(ALPHA)}).items()}
        expected[layer] = lambda scale, w=weight, d=delta, m=magnitude: with_lengths(w.double() + scale * ALPHA * d, m)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return expected


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_formula(kind: Callable[..., Any], lengths: str, dit: DiffusionTransformer3D, tmp_path: Path) -> None:
    for prefix in ("lora_unet_", "lycoris_", "diffusion_model."):
        path = tmp_path / f"{prefix}.safetensors"
        expected = write(path, dit, kind, lengths, prefix)
        ours = copy.deepcopy(dit)
        adapters = adapters_of(ours)
        adapters.load(None, path, "a")
        for scale in (1.0, 0.5, -2.0):
            adapters.activate({"a": scale})
            for layer, weight in expected.items():
                merged = ours.get_submodule(layer).weight
                torch.testing.assert_close(merged.double(), weight(scale), rtol=0, atol=TOLERANCE)
                assert (merged - dit.get_submodule(layer).weight).abs().max() > 0.03  # it is there at all
        adapters.activate({"a": 0.0})
        assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in dit.state_dict().items())
    described = inspect(path).variant
    assert ("DoRA" in described) == (lengths != "plain")
    assert ("LoKr" in described, "LoHa" in described) == ("lokr" in kind.__name__, kind is loha_parts)


@torch.no_grad()
def test_one_after_the_other(dit: DiffusionTransformer3D, tmp_path: Path) -> None:
    """Sums, and lengths of what is there by then; undone to the last bit in any order."""
    expected = {name: write(tmp_path / name, dit, *what, "transformer.") for name, what in {
        "lora.safetensors": (lora_parts, "plain"),
        "loha.safetensors": (loha_parts, "plain"),
        "dora.safetensors": (lokr_parts, "rows"),
    }.items()}  # fmt: skip
    ours = copy.deepcopy(dit)
    adapters = adapters_of(ours)
    for name in expected:
        adapters.load(None, tmp_path / name, name)
    adapters.activate({"lora.safetensors": 0.5, "dora.safetensors": 1.0, "loha.safetensors": 2.0})
    for layer in (QUERY, WIDE):
        weight = dit.get_submodule(layer).weight.double()
        sums = {kind: kind(*weight.shape)[1] * ALPHA for kind in (lora_parts, loha_parts, lokr_parts)}
        lengths = LENGTHS["rows"](weight)
        wanted = with_lengths(weight + 0.5 * sums[lora_parts] + sums[lokr_parts], lengths) + 2 * sums[loha_parts]
        torch.testing.assert_close(ours.get_submodule(layer).weight.double(), wanted, rtol=0, atol=TOLERANCE)
    adapters.activate({})
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in dit.state_dict().items())


@torch.no_grad()
def test_rows_of_zeros_stay_so(dit: DiffusionTransformer3D, tmp_path: Path) -> None:
    ours = copy.deepcopy(dit)
    ours.get_submodule(QUERY).weight[3] = 0.0
    tensors = {"lora_up.weight": random(*(len(dit.get_submodule(QUERY).weight), 2), seed=1)}
    tensors["lora_up.weight"][3] = 0.0
    tensors["lora_down.weight"] = random(2, dit.get_submodule(QUERY).weight.shape[1], seed=2)
    tensors["dora_scale"] = torch.ones(len(dit.get_submodule(QUERY).weight), 1)
    save_file({f"{QUERY}.{part}": tensor for part, tensor in tensors.items()}, tmp_path / "a.safetensors")
    adapters_of(ours).load(None, tmp_path / "a.safetensors")
    lengths = torch.linalg.vector_norm(ours.get_submodule(QUERY).weight, dim=1)
    assert lengths[3] == 0
    torch.testing.assert_close(lengths[4:], torch.ones(len(lengths) - 4), rtol=0, atol=TOLERANCE)


# --- peft -------------------------------------------------------------------------------------------------------------


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_dora=True, **options)


def loha(**options: Any) -> LoHaConfig:
    return LoHaConfig(r=4, alpha=6, target_modules=TARGETS, **options)


def lokr(**options: Any) -> LoKrConfig:
    return LoKrConfig(r=4, alpha=6, target_modules=TARGETS, **options)


PEFT: dict[str, Callable[[], Any]] = {
    "DoRA": lora,
    "DoRA, rank-stabilised": lambda: lora(use_rslora=True),
    "DoRA, patterns": lambda: lora(rank_pattern={"to_key": 2}, alpha_pattern={"in_layer": 3}),
    "LoHa": loha,
    "LoHa, patterns": lambda: loha(rank_pattern={"to_key": 2}, alpha_pattern={"in_layer": 3}),
    "LoKr": lokr,
    "LoKr of whole factors": lambda: lokr(decompose_factor=8, rank_pattern={"to_key": 16}),
    "LoKr of products": lambda: lokr(decompose_both=True, rank_pattern={"to_query": 1}),
}


@pytest.mark.parametrize("what", PEFT)
@torch.no_grad()
def test_as_peft_merges_it(what: str, dit: DiffusionTransformer3D, tmp_path: Path) -> None:
    """From the folder that peft writes, with its config of that kind."""
    model = get_peft_model(copy.deepcopy(dit), PEFT[what]())  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in ("lora_A", "lora_B", "hada_", "lokr_")):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        elif "magnitude" in name:
            parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
    model.save_pretrained(str(tmp_path))
    ours = copy.deepcopy(dit)
    adapters = adapters_of(ours)
    adapters.load(None, tmp_path)
    merged = model.merge_and_unload().state_dict()  # type: ignore[operator]
    changed = 0
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=TOLERANCE)
        changed += not torch.equal(tensor, dit.state_dict()[name])
    assert changed > 20
    adapters.activate({})
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in dit.state_dict().items())


# --- quantised layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "lengths"), [(lora_parts, "rows"), (loha_parts, "plain"), (lokr_parts, "columns")])
@torch.no_grad()
def test_quantised(kind: Callable[..., Any], lengths: str, dit: DiffusionTransformer3D, tmp_path: Path) -> None:
    """What a layer computes with is what comes of the numbers that it stands for; no matrix of its size is kept."""
    with torch.device("meta"):
        ours = DiffusionTransformer3D(**{name: getattr(PARAMS, name) for name in LITE})
    convert = quantize_dit(ours, {}, "int8")
    assert convert is not None
    state: dict[str, Tensor] = {}
    for name, tensor in dit.state_dict().items():
        state |= convert(name, tensor) or {name: tensor.clone()}
    ours.load_state_dict(state, assign=True)
    plain = copy.deepcopy(dit)
    for name, module in ours.named_modules():
        if isinstance(module, QuantizedLinear):
            plain.get_submodule(name).weight.data = module.dequantize(torch.float32)
    expected = write(tmp_path / "a.safetensors", plain, kind, lengths, "lora_transformer_")
    adapters = adapters_of(ours)
    adapters.load(None, tmp_path / "a.safetensors")
    for layer, weight in expected.items():
        module = ours.get_submodule(layer)
        assert isinstance(module, QuantizedLinear)
        x = random(5, module.in_features, seed=9)
        wanted = x.double() @ weight(1.0).T + (0.0 if module.bias is None else module.bias.double())
        torch.testing.assert_close(module(x).double(), wanted, rtol=0, atol=20 * TOLERANCE)
        assert (module(x) - plain.get_submodule(layer)(x)).abs().max() > 0.1
        kept = [tensor.numel() for change in module.changes for tensor in change]
        assert kept and sum(kept) < plain.get_submodule(layer).weight.numel()
    adapters.activate({})
    assert all(not module.changes for module in ours.modules() if isinstance(module, QuantizedLinear))
