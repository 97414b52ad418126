"""What an adapter's file adds to which layers of a DiT, and whether it fits, from its header and its config.

    peft, the official ones    alpha is in a JSON beside
    diffusers                  alpha is in the metadata `lora_adapter_metadata`, or nowhere
    Kohya, LyCORIS, ComfyUI    LAYER.alpha, a tensor of one number

alpha is taken from the first that there is: the config, the metadata, the file's `.alpha`, the rank. Which kinds of
adapters there are, and how their tensors may be called: lora_tensors.py.

This module does not know torch, and reads no matrix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from kandinsky.checkpoints.files import find_weights, resolve_path
from kandinsky.checkpoints.headers import read_header, read_metadata
from kandinsky.checkpoints.layer_names import LayerNames
from kandinsky.checkpoints.lora_tensors import LOHA, LOKR, LORA, LoraLayer, lora_layers
from kandinsky.common.given import as_number, shortened, shown
from kandinsky.common.untrusted import parse_json, read_json
from kandinsky.config.rules import split_lora
from kandinsky.config.schema import Config, DiTConfig

# Names that folders have for an adapter's file, and for the config that belongs to it.
FILE_NAMES = {
    "lora.safetensors": "config_lora.json",
    "adapter_model.safetensors": "adapter_config.json",
    "pytorch_lora_weights.safetensors": "adapter_config.json",
}
METADATA_KEY = "lora_adapter_metadata"
MAX_TRIGGER = 1000  # characters
# Entries of a config that stand for more than the file's matrices, where they are neither empty nor false.
UNSUPPORTED = ("use_qalora", "lora_bias", "modules_to_save", "layer_replication", "target_parameters")
# Ways to begin training that change the model's own weights, which the adapter then counts on.
CHANGED_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class HasDict(Protocol):
    """A config as an object, like peft's LoraConfig."""

    def to_dict(self) -> dict[str, Any]: ...


# A JSON file, its content, or an object that has it; None: what lies beside the adapter's file, or is in it.
AdapterConfig: TypeAlias = "str | Path | Mapping[str, Any] | HasDict | None"


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
    belongs to another file, and for kinds of adapters other than those of lora_tensors.py.
    """
    file = find_lora(path)
    header = read_header(file)
    metadata = read_metadata(file)
    values, source = _config_values(file, adapter_config, metadata)
    try:
        layers = lora_layers(header, dit)
        if values is not None:
            _refuse_what_else_it_is(values, layers)
            ranks, alphas = (LayerNames(name, values.get(name) or {}) for name in ("rank_pattern", "alpha_pattern"))
            layers = {
                name: dataclasses.replace(layer, scale=_scale(values, ranks, alphas, name, layer.rank))
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
    """The config, with alpha as `lora_alpha` whatever its kind of adapter calls it."""
    values = dict(values) if isinstance(values, Mapping) else {}
    if values.get("peft_type") in (LOHA, LOKR) and values.get("lora_alpha") is None:
        values["lora_alpha"] = values.get("alpha")
    if values.get("lora_alpha") is None:
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
    return values


def _refuse_what_else_it_is(values: Mapping[str, Any], layers: Mapping[str, LoraLayer]) -> None:
    """Raise ValueError where the config means more than the file's tensors, or others."""
    kind = values.get("peft_type") or LORA
    kind = getattr(kind, "value", kind)  # of peft's enum
    if kind not in (LORA, LOHA, LOKR):
        raise ValueError(f"an adapter of the kind {_words(kind)}; only LoRA, LoHa, LoKr and DoRA are supported")
    if other := next((layer.kind for layer in layers.values() if layer.kind != kind), None):
        raise ValueError(
            f"its matrices are of the kind {other}, and {kind} by its config: that belongs to another file"
        )
    if values.get("use_dora") and (lacking := [n for n, layer in layers.items() if "magnitude" not in layer.parts]):
        raise ValueError(f"its config has use_dora = True, and {lacking[0]} has no magnitude: the file is incomplete")
    begin = values.get("init_lora_weights")
    begin = begin if isinstance(begin, str) and begin.lower().startswith(CHANGED_WEIGHTS) else None
    bias = values.get("bias") if values.get("bias") != "none" else None
    asked = {"init_lora_weights": begin, "bias": bias, **{name: values.get(name) for name in UNSUPPORTED}}
    found = [f"{name} = {_words(value)}" for name, value in asked.items() if value]
    if found:
        raise ValueError(f"its config has {', '.join(found)}, which is not supported: only what its matrices add")


def _words(value: object) -> str:
    return shortened(value) if isinstance(value, str) else shown(value)


def _scale(values: Mapping[str, Any], ranks: LayerNames, alphas: LayerNames, layer: str, rank: int | None) -> float:
    """alpha / rank of a layer, or alpha / sqrt(rank) for rank-stabilised LoRA (arXiv 2312.03732)."""
    told = ranks.value(layer, values.get("r"))
    if rank is not None and told is not None and told != rank:
        raise ValueError(f"{layer} has rank {rank}, and {shown(told)} by its config: that belongs to another file")
    divisor = told if rank is None else rank
    if divisor is None or not divisor >= 1:
        raise ValueError(f"the rank of {layer} is {shown(divisor)} by its config: give r, a whole number above 0")
    return float(
        alphas.value(layer, values["lora_alpha"]) / (math.sqrt(divisor) if values.get("use_rslora") else divisor)
    )
