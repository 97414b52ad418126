"""What a LoRA file adds to which layers of a DiT, and whether it fits, from its header and its config.

A LoRA (arXiv 2106.09685) changes linear layers by the product of two thin matrices each:

    weight + alpha / rank * up @ down          weight (out, in), up (out, rank), down (rank, in)

Files differ in what they call them and in where alpha is:

    peft, the official ones   base_model.model.LAYER.lora_A.weight (down), .lora_B.weight (up), alpha in a JSON beside
    diffusers                 transformer.LAYER.lora_A.weight, alpha in the metadata `lora_adapter_metadata` or nowhere
    ComfyUI and others        diffusion_model.LAYER.lora_down.weight, .lora_up.weight, .alpha (a number)

Any of the prefixes may go with any of the names, or be left out, and `.default`, peft's name of an adapter, be in
between. alpha is taken from the first that there is: the config, the metadata, the file's `.alpha`, the rank.

This module does not know torch, and reads no matrix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from kandinsky.checkpoints.dit_layout import FLOATS, expected_dit_shapes
from kandinsky.checkpoints.files import find_weights, resolve_path
from kandinsky.checkpoints.headers import read_header, read_metadata
from kandinsky.checkpoints.layer_names import LayerNames
from kandinsky.common.given import as_number, shortened, shown
from kandinsky.common.untrusted import parse_json, read_json
from kandinsky.config.rules import split_lora
from kandinsky.config.schema import Config, DiTConfig

PREFIXES = ("base_model.model.", "transformer.", "model.diffusion_model.", "diffusion_model.")
# Names that folders have for an adapter's file, and for the config that belongs to it.
FILE_NAMES = {
    "lora.safetensors": "config_lora.json",
    "adapter_model.safetensors": "adapter_config.json",
    "pytorch_lora_weights.safetensors": "adapter_config.json",
}
METADATA_KEY = "lora_adapter_metadata"
MAX_TRIGGER = 1000  # characters
_TENSOR = re.compile(r"(?P<layer>.+)\.(?:(?P<down>lora_A|lora_down)|(?P<up>lora_B|lora_up))\.weight")
_ALPHA = re.compile(r"(?P<layer>.+)\.alpha")
# Entries of a config that stand for more than the product of two matrices, where they are neither empty nor false.
UNSUPPORTED = ("use_dora", "use_qalora", "lora_bias", "modules_to_save", "layer_replication", "target_parameters")
# Ways to begin training that change the model's own weights, which the adapter then counts on.
CHANGED_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class HasDict(Protocol):
    """A config as an object, like peft's LoraConfig."""

    def to_dict(self) -> dict[str, Any]: ...


# A JSON file, its content, or an object that has it; None: what lies beside the adapter's file, or is in it.
AdapterConfig: TypeAlias = "str | Path | Mapping[str, Any] | HasDict | None"


@dataclass(frozen=True)
class LoraLayer:
    """Names of a layer's tensors in the file. The scale is alpha / rank, None where `alpha` names alpha's tensor."""

    up: str
    down: str
    rank: int
    scale: float | None
    alpha: str | None = None


@dataclass(frozen=True)
class LoraFile:
    path: Path
    layers: dict[str, LoraLayer]  # by the layer's name in the DiT
    trigger: str  # what its makers want before the prompt
    alpha_from: str  # for people


def configured_loras(config: Config, cache_dir: str | Path = "./weights/") -> dict[str, tuple[LoraFile, float]]:
    """The config's `model.loras` with their scales, each by the name of its folder or file. Errors: `read_lora`'s."""
    found: dict[str, tuple[LoraFile, float]] = {}
    for text in config.model.loras:
        given, scale = split_lora(text)
        file = read_lora(resolve_path(given, config, cache_dir), config.model.dit_params)
        name = base = file.path.parent.name if file.path.name in FILE_NAMES else file.path.stem
        while name in found:  # the same name in two folders, or one adapter twice
            name = f"{base}_{len(found) + 1}"
        found[name] = file, scale
    return found


def read_lora(path: str | Path, dit: DiTConfig, adapter_config: AdapterConfig = None) -> LoraFile:
    """What a file, or the one in a folder, adds to the DiT that `dit` describes.

    Raises ValueError, naming the tensors, unless all of it can be added; also for a damaged file or config, one that
    belongs to another file, and for kinds of adapters other than LoRA.
    """
    file = find_lora(path)
    header = read_header(file)
    metadata = read_metadata(file)
    values, source = _config_values(file, adapter_config, metadata)
    try:
        layers = _layers(header, dit)
        _refuse_other_kinds(values or {})
        if values is not None:
            ranks, alphas = (LayerNames(name, values.get(name) or {}) for name in ("rank_pattern", "alpha_pattern"))
            layers = {
                name: LoraLayer(layer.up, layer.down, layer.rank, _scale(values, ranks, alphas, name, layer.rank))
                for name, layer in layers.items()
            }
        elif any(layer.alpha for layer in layers.values()):
            source = "the file's alpha"
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    trigger = metadata.get("trigger", "")
    if len(trigger) > MAX_TRIGGER:
        raise ValueError(f"{file}: its trigger, which would stand before each prompt, has {len(trigger):,} characters")
    return LoraFile(file, layers, trigger, source or "the rank")


def find_lora(path: str | Path) -> Path:
    """The safetensors file itself, or the one of a folder. Raises ValueError where there is none, or several."""
    path = Path(path)
    usual = [path / name for name in FILE_NAMES if (path / name).is_file()]
    if usual:
        return usual[0]
    files = find_weights(path)
    if len(files) > 1:
        raise ValueError(f"{path}: {len(files)} files; an adapter is a single one: name it")
    return files[0]


# --- config and metadata ----------------------------------------------------------------------------------------------


def _config_values(
    file: Path, given: AdapterConfig, metadata: Mapping[str, str]
) -> tuple[dict[str, Any] | None, str | None]:
    """The adapter's config, None where there is none, and for people where it is from."""
    if given is None:
        given = _config_beside(file)
    if isinstance(given, str | Path):
        try:
            values = read_json(given)
        except ValueError as error:
            raise ValueError(f"{error}, so it is not readable as the JSON config of an adapter") from None
        return _checked_values(values, str(given)), Path(given).name
    if given is not None:
        if not isinstance(given, Mapping) and not hasattr(given, "to_dict"):
            raise ValueError(f"adapter_config is {shown(given)}; give a JSON file, a dict, or peft's LoraConfig")
        return _checked_values(given if isinstance(given, Mapping) else given.to_dict(), "adapter_config"), "its config"
    if METADATA_KEY not in metadata:
        return None, None
    values = parse_json(metadata[METADATA_KEY], f"{file}: its {METADATA_KEY}")
    values = values if isinstance(values, dict) else {}
    own = {
        name.removeprefix("transformer."): value for name, value in values.items() if name.startswith("transformer.")
    }
    return (_checked_values(own, f"{file}, {METADATA_KEY}"), METADATA_KEY) if own else (None, None)


def _config_beside(file: Path) -> Path | None:
    """The config of a file in its folder. With other adapters in the same folder it could be any one's."""
    own = FILE_NAMES.get(file.name)
    alone = len(list(file.parent.glob("*.safetensors"))) == 1
    names = dict.fromkeys([*([own] if own else []), *(FILE_NAMES.values() if alone else ())])
    return next((file.parent / name for name in names if (file.parent / name).is_file()), None)


def _checked_values(values: object, source: str) -> dict[str, Any]:
    if not isinstance(values, Mapping) or values.get("lora_alpha") is None:
        raise ValueError(f"{source}: not the config of a LoRA, it has no lora_alpha")
    for name, kinds in (
        ("lora_alpha", (int, float)),
        ("r", int),
        ("alpha_pattern", Mapping),
        ("rank_pattern", Mapping),
    ):
        value = values.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
            raise ValueError(f"{source}: {name} is {shown(value)}, which it cannot be")
        for number in value.values() if isinstance(value, Mapping) else () if value is None else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise ValueError(f"{source}: {name} has {shown(number)} in it, which is not a number")
            if not math.isfinite(as_number(number)):
                raise ValueError(f"{source}: {name} is {shown(number)}; it must be finite")
    return dict(values)


def _refuse_other_kinds(values: Mapping[str, Any]) -> None:
    kind = values.get("peft_type") or "LORA"
    if kind != "LORA":
        raise ValueError(f"an adapter of the kind {shortened(str(kind))}; only LoRA is supported")
    begin = values.get("init_lora_weights")
    begin = begin if isinstance(begin, str) and begin.lower().startswith(CHANGED_WEIGHTS) else None
    bias = values.get("bias") if values.get("bias") != "none" else None
    asked = {"init_lora_weights": begin, "bias": bias, **{name: values.get(name) for name in UNSUPPORTED}}
    found = [f"{name} = {shortened(str(value))}" for name, value in asked.items() if value]
    if found:
        raise ValueError(f"its config has {', '.join(found)}, which is not supported: plain LoRA only")


def _scale(values: Mapping[str, Any], ranks: LayerNames, alphas: LayerNames, layer: str, rank: int) -> float:
    """alpha / rank of a layer, or alpha / sqrt(rank) for rank-stabilised LoRA (arXiv 2312.03732)."""
    told = ranks.value(layer, values.get("r"))
    if told is not None and told != rank:
        raise ValueError(f"{layer} has rank {rank}, and {shown(told)} by its config: that belongs to another file")
    return float(alphas.value(layer, values["lora_alpha"]) / (math.sqrt(rank) if values.get("use_rslora") else rank))


# --- tensors ----------------------------------------------------------------------------------------------------------


def _layers(header: Mapping[str, tuple[str, tuple[int, ...]]], dit: DiTConfig) -> dict[str, LoraLayer]:
    """The adapted layers with the scales of a file that has no config. Raises ValueError unless all tensors fit."""
    shapes = {
        name.removesuffix(".weight"): shape
        for name, shape in expected_dit_shapes(dit).items()
        if name.endswith(".weight") and len(shape) == 2
    }
    parts: dict[str, dict[str, str]] = {}  # layer -> "up", "down" or "alpha" -> the tensor's name in the file
    unknown, twice = [], []
    for key in header:
        layer, part = _parse(key)
        if not layer:
            unknown.append(key)
        elif part in parts.setdefault(layer, {}):
            twice.append(key)
        else:
            parts[layer][part] = key
    if dora := [key for key in unknown if "dora_scale" in key or "lora_magnitude_vector" in key]:
        raise ValueError(f"this is a DoRA ({_some(dora)}), which is not supported: plain LoRA only")
    if not parts:
        raise ValueError(f"this is not a LoRA file: none of its {len(header)} tensors is a layer's ({_some(unknown)})")

    foreign = [key for layer, names in parts.items() if layer not in shapes for key in names.values()]
    incomplete = [key for names in parts.values() if not {"up", "down"} <= set(names) for key in names.values()]
    misshapen, integers = [], []
    layers = {}
    for layer, names in parts.items():
        if layer not in shapes or not {"up", "down"} <= set(names):
            continue
        up, down = header[names["up"]][1], header[names["down"]][1]
        outputs, inputs = shapes[layer]
        rank = down[0] if down else 0
        if down != (rank, inputs) or up != (outputs, rank) or not rank:
            misshapen.append(f"{names['down']} {down} and {names['up']} {up}, the layer is {(outputs, inputs)}")
        if "alpha" in names and math.prod(header[names["alpha"]][1]) != 1:
            misshapen.append(f"{names['alpha']} {header[names['alpha']][1]}, not one number")
        integers += [names[part] for part in ("up", "down") if header[names[part]][0] not in FLOATS]
        alpha = names.get("alpha")
        layers[layer] = LoraLayer(names["up"], names["down"], rank, None if alpha else 1.0, alpha)

    problems = [
        f"{len(keys)} {what} ({_some(keys)})"
        for what, keys in (
            ("tensors of no known kind", unknown),
            ("of layers that this model does not have", foreign),
            ("without the other one of their pair", incomplete),
            ("of the same part of a layer as another", twice),
            ("of another shape", misshapen),
            (f"of another dtype than {', '.join(FLOATS)}", integers),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f"this LoRA does not fit the model, nothing of it is used: of {len(header)} tensors {'; '.join(problems)}. "
            "Is it made for another variant?"
        )
    return layers


def _parse(key: str) -> tuple[str, str]:
    """A tensor's layer, and which of its parts it is: "up", "down" or "alpha". Empty where it is none of these."""
    name = key.replace(".default", "")
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    if match := _TENSOR.fullmatch(name):
        return match["layer"], "down" if match["down"] else "up"
    if match := _ALPHA.fullmatch(name):
        return match["layer"], "alpha"
    return "", ""


def _some(names: list[str]) -> str:
    return ", ".join(shortened(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
