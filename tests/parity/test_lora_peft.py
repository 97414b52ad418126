"""LoRA adapters merged into the weights, against the same adapters unmerged in peft, from files that others wrote."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import KandinskyLoraLoaderMixin
from diffusers_reference import LITE, build_pair, largest_difference, make_inputs, rms, run_ours
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kandinsky.config.schema import DiTConfig
from kandinsky.models.dit import DiffusionTransformer3D
from kandinsky.runtime.lora import Adapters
from kandinsky.runtime.quantization import QuantizedLinear, quantize_dit

PARAMS = DiTConfig(**LITE)
CPU = torch.device("cpu")
SCALE_FACTOR = (1.0, 2.0, 2.0)
TOLERANCE = 1e-5
# Everything linear but what computes with `layer.weight` itself, which peft's wrapper does not change.
TARGETS = r".*(attention|feed_forward)\..*(to_query|to_key|to_value|in_layer|out_layer)|visual_embeddings\.in_layer"


@pytest.fixture(scope="module")
def dit() -> DiffusionTransformer3D:
    ours, _ = build_pair(LITE)
    return ours


def with_peft(dit: nn.Module, **configs: LoraConfig) -> PeftModel:
    """A copy with adapters of these names, whose numbers are large enough to be seen."""
    (first, config), *others = configs.items()
    model = get_peft_model(copy.deepcopy(dit), config, adapter_name=first)  # type: ignore[arg-type]
    for name, other in others:
        model.add_adapter(name, other)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def config(rank: int = 4, alpha: int = 8, **options: Any) -> LoraConfig:
    return LoraConfig(**{"r": rank, "lora_alpha": alpha, "target_modules": TARGETS, **options})


def velocity(model: nn.Module) -> Tensor:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, DiffusionTransformer3D)
    with torch.no_grad():
        return run_ours(inner, make_inputs(inner, SCALE_FACTOR, 1))


def adapters_of(dit: nn.Module) -> Adapters:
    own = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    adapters = Adapters(dit, PARAMS, lambda: own, CPU)
    adapters.begin()
    return adapters


# --- the same file in each layout: path and config of the written one -------------------------------------------------

Written = tuple[Path, Any]


def as_peft(model: PeftModel, folder: Path) -> Written:
    model.save_pretrained(str(folder))
    return folder, None  # adapter_config.json lies beside it


def as_official(model: PeftModel, folder: Path) -> Written:
    """lora.safetensors with the name of the adapter still in it, and config_lora.json, asked for by its path."""
    as_peft(model, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key.replace(".weight", ".default.weight"): t for key, t in tensors.items()}, folder / "lora.safetensors")
    (folder / "adapter_config.json").rename(folder / "config_lora.json")
    (folder / "adapter_model.safetensors").unlink()
    return folder / "lora.safetensors", folder / "config_lora.json"


def as_peft_object(model: PeftModel, folder: Path) -> Written:
    as_peft(model, folder)
    (folder / "adapter_config.json").unlink()
    return folder / "adapter_model.safetensors", model.peft_config["default"]


def layers_of(model: PeftModel) -> dict[str, Tensor]:
    state = get_peft_model_state_dict(model)
    return {key.removeprefix("base_model.model."): tensor.contiguous() for key, tensor in state.items()}


def as_diffusers(model: PeftModel, folder: Path) -> Written:
    KandinskyLoraLoaderMixin.save_lora_weights(
        str(folder),
        transformer_lora_layers=layers_of(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    return folder / "pytorch_lora_weights.safetensors", None


def as_comfy(model: PeftModel, folder: Path) -> Written:
    tensors = {}
    for key, tensor in layers_of(model).items():
        layer, part = re.fullmatch(r"(.+)\.(lora_[AB])\.weight", key).groups()  # type: ignore[union-attr]
        tensors[f"diffusion_model.{layer}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = tensor
        scale = model.get_submodule(f"base_model.model.{layer}").scaling["default"]  # type: ignore[operator, index]
        if part == "lora_A":
            tensors[f"diffusion_model.{layer}.alpha"] = torch.tensor(scale * len(tensor))
    save_file(tensors, folder / "effect.safetensors")
    return folder / "effect.safetensors", None


LAYOUTS = [as_peft, as_official, as_peft_object, as_diffusers, as_comfy]


@pytest.mark.parametrize("write", LAYOUTS)
def test_merged_is_unmerged(write: Callable[..., Written], dit: DiffusionTransformer3D, tmp_path: Path) -> None:
    """alpha is twice the rank, and for some layers rank and alpha are others: who misses either is far off."""
    reference = with_peft(dit, default=config(rank_pattern={"to_key": 2}, alpha_pattern={"1.feed_forward.in_layer": 3}))
    expected = velocity(reference)
    assert rms(expected - velocity(dit)) > 0.05
    ours = copy.deepcopy(dit)
    adapters = adapters_of(ours)
    path, adapter_config = write(reference, tmp_path)
    adapters.load(adapter_config, path)
    assert largest_difference(velocity(ours), expected) <= TOLERANCE
    adapters.activate({})
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in dit.state_dict().items())


def test_rank_stabilised(dit: DiffusionTransformer3D, tmp_path: Path) -> None:
    reference = with_peft(dit, default=config(alpha=4, use_rslora=True))
    ours = copy.deepcopy(dit)
    adapters_of(ours).load(None, as_peft(reference, tmp_path)[0])
    assert largest_difference(velocity(ours), velocity(reference)) <= TOLERANCE


def test_without_a_config_alpha_is_the_rank_as_in_diffusers(dit: DiffusionTransformer3D, tmp_path: Path) -> None:
    reference = with_peft(dit, default=config(rank=4, alpha=8))
    KandinskyLoraLoaderMixin.save_lora_weights(str(tmp_path), transformer_lora_layers=layers_of(reference))
    for module in reference.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] = 1.0
    ours = copy.deepcopy(dit)
    adapters_of(ours).load(None, tmp_path)
    assert largest_difference(velocity(ours), velocity(reference)) <= TOLERANCE


def test_several_with_scales(dit: DiffusionTransformer3D, tmp_path: Path) -> None:
    """Of other ranks, partly of other layers; switched without a look back."""
    configs = {"a": config(), "b": config(rank=3, alpha=3, target_modules=r".*feed_forward\.(in|out)_layer")}
    reference = with_peft(dit, **configs)
    reference.save_pretrained(str(tmp_path))  # a folder each
    ours = copy.deepcopy(dit)
    adapters = adapters_of(ours)
    for name in configs:
        adapters.load(None, tmp_path / name, name)
    seen = []
    for scales in ({"b": 1.0}, {"a": 0.5, "b": -1.5}, {"a": 1.0, "b": 0.0}, {"b": 0.25}):
        adapters.activate(scales)
        reference.base_model.set_adapter(list(scales))  # type: ignore[operator]
        for module in reference.modules():
            if isinstance(module, LoraLayer):
                for name, scale in scales.items():
                    if name in module.scaling:
                        module.set_scale(name, scale)
        seen.append(velocity(ours))
        assert largest_difference(seen[-1], velocity(reference)) <= TOLERANCE
    assert min(rms(one - other) for one, other in itertools.pairwise(seen)) > 0.01


def test_layers_that_peft_does_not_reach(dit: DiffusionTransformer3D, tmp_path: Path) -> None:
    """All linear layers, modulations and time embedding among them: the weights are as peft merges them."""
    reference = with_peft(dit, default=config(target_modules="all-linear"))
    ours = copy.deepcopy(dit)
    adapters_of(ours).load(None, as_peft(reference, tmp_path)[0])
    merged = reference.merge_and_unload().state_dict()  # type: ignore[operator]
    changed = [name for name, tensor in ours.state_dict().items() if not torch.equal(tensor, dit.state_dict()[name])]
    assert len(changed) == sum(isinstance(module, nn.Linear) for module in dit.modules())
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("scheme", ["int8", "fp8", "nf4"])
def test_quantised(scheme: str, dit: DiffusionTransformer3D, tmp_path: Path) -> None:
    """peft on linear layers with the numbers that the quantised ones stand for."""
    if scheme == "nf4":
        pytest.importorskip("bitsandbytes")
    with torch.device("meta"):
        ours = DiffusionTransformer3D(**dataclasses.asdict(PARAMS))
    convert = quantize_dit(ours, {}, scheme)
    assert convert is not None
    state: dict[str, Tensor] = {}
    for name, tensor in dit.state_dict().items():
        state |= convert(name, tensor) or {name: tensor.clone()}
    ours.load_state_dict(state, assign=True)
    ours.eval().requires_grad_(False)

    plain = copy.deepcopy(dit)
    for name, module in ours.named_modules():
        if isinstance(module, QuantizedLinear):
            plain.get_submodule(name).weight.data = module.dequantize(torch.float32)
    reference = with_peft(plain, default=config())
    before = velocity(ours)
    adapters = adapters_of(ours)
    adapters.load(None, as_peft(reference, tmp_path)[0])
    assert rms(velocity(ours) - before) > 0.05
    assert largest_difference(velocity(ours), velocity(reference)) <= TOLERANCE
    assert ours.state_dict().keys() == state.keys()  # still the file
    quantised = [module for module in ours.modules() if isinstance(module, QuantizedLinear)]
    assert all(module.changes for module in quantised)
    adapters.end()  # as after a stage of an offloaded model: nothing of it stays on the device
    assert all(not module.changes for module in quantised)
    adapters.begin()
    assert largest_difference(velocity(ours), velocity(reference)) <= TOLERANCE
    adapters.activate({})
    assert torch.equal(velocity(ours), before)


def test_metadata_is_what_diffusers_writes(dit: DiffusionTransformer3D, tmp_path: Path) -> None:
    """That the diffusers file above is one with metadata in it, which the JSON beside others is not."""
    from safetensors import safe_open

    path, _ = as_diffusers(with_peft(dit, default=config()), tmp_path)
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
