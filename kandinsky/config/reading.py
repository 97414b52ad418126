"""From a YAML file to a checked `Config`: each setting is resolved once, override > YAML > default.

Strict: an unknown key, a wrong type and a value out of range are a ValueError that names the key, because a typo that
is silently ignored costs someone an hour of rendering. Keys that never had an effect are accepted with one warning.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

from kandinsky.common.given import as_number, as_whole, shortened, shown
from kandinsky.config.defaults import fill_defaults
from kandinsky.config.original_names import our_config
from kandinsky.config.rules import check_config, hints_of, join_key, not_allowed
from kandinsky.config.schema import Config
from kandinsky.config.yaml_files import CONFIGS, read_yaml, with_overrides

logger = logging.getLogger(__name__)

LARGEST_WHOLE = 10**15 - 1  # of a setting; what is computed from several of them still is a float's size

DEVICE_PRESETS = CONFIGS / "devices"

# Keys seen in other people's YAML files that do nothing here. Most of them never did anything anywhere.
IGNORED_KEYS = (
    "model.attention.causal",
    "model.attention.local",
    "model.attention.glob",
    "model.attention.window",
    "model.attention.chunk",
    "model.attention.chunk_len",
    "model.vae.is_parallel",
    "model.text_embedder.qwen.processor_path",
    "model.text_embedder.clip.tokenizer_path",
    "block_swap",
)
# Names that other files have for dense attention. Which kernel computes it is `engine`, not `type`.
DENSE_ATTENTION_ALIASES = ("flash", "regular", "sdpa")


def load_config(path: str | Path, overrides: Sequence[str] = (), presets: Sequence[str | Path] = ()) -> Config:
    """Read and check a YAML file.

    presets: YAML files with some of the keys, laid over the file one after the other (see `preset_file`).
    overrides: "dotted.key=value" strings, value in YAML syntax, applied over all files ("model.num_steps=20").
    Raises ValueError, naming file, key, value and what is allowed, for anything that is not as it should be.
    """
    path = our_config(Path(path))
    try:
        if path.parent.absolute() == DEVICE_PRESETS:
            raise ValueError(f"it has a machine's settings alone: name a model's file, and --device_preset {path.stem}")
        return _from_raw(read_yaml(path, overrides, [Path(preset) for preset in presets]), path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def config_from_dict(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The config that `config_to_dict` made `values` of, overrides applied. Errors are those of `load_config`."""
    raw = dict(values)
    source = Path(raw.pop("source", None) or "a recorded config")
    return _from_raw(with_overrides(raw, overrides), source)


def _from_raw(raw: dict[str, Any], source: Path) -> Config:
    _drop_ignored_keys(raw, source)
    values = _parse_section(Config, raw, "")
    fill_defaults(values)
    values["source"] = source
    config = _construct(Config, values, "")
    check_config(config)
    assert isinstance(config, Config)
    return config


def with_settings(config: Config, **sections: Mapping[str, Any]) -> Config:
    """The config with other values of top-level sections: with_settings(config, runtime={"offload": True}).

    They are checked as those of a YAML file are; ValueError for what is not as it should be.
    """
    for name, given in sections.items():
        section = getattr(config, name)
        values = _parse_section(type(section), dict(given), name)
        config = dataclasses.replace(config, **{name: dataclasses.replace(section, **values)})
    try:
        check_config(config)
    except ValueError as error:
        raise ValueError(f"{config.source}: {error}") from None
    return config


def with_magcache(config: Config, wanted: bool) -> Config:
    """The config with MagCache in place of any other cache, or without it where it has it.

    Raises ValueError where it has no ratios for it.
    """
    if wanted == config.uses_magcache:
        return config
    return with_settings(config, cache={"kind": None}, magcache={"enabled": wanted})


def config_to_dict(config: Config) -> dict[str, Any]:
    """The config as plain dicts, lists, numbers and strings, for JSON."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# --- reading ----------------------------------------------------------------------------------------------------------


def preset_file(name: str) -> Path:
    """The file of a preset in configs/devices/: "12gb" or "cpu". Raises ValueError for one that there isn't."""
    path = DEVICE_PRESETS / f"{name}.yaml"
    if not path.is_file():
        names = sorted(
            (file.stem for file in DEVICE_PRESETS.glob("*.yaml")), key=lambda stem: (stem.isalpha(), len(stem), stem)
        )
        raise ValueError(f"there is no device preset {shown(name)}: choose one of {', '.join(names)}")
    return path


def _drop_ignored_keys(raw: dict[str, Any], path: Path) -> None:
    """Remove what has no effect, with one warning, and move what moved."""
    ignored = [key for key in IGNORED_KEYS if _pop(raw, key)]
    if _has(raw, "model.dit_params.attention_engine"):
        engine = raw["model"]["dit_params"].pop("attention_engine")
        attention = raw["model"].get("attention")
        if attention is None:
            attention = raw["model"]["attention"] = {}
        if isinstance(attention, dict):
            attention.setdefault("engine", engine)
    if ignored:
        logger.warning("%s: these keys are not used here and are ignored: %s", path, ", ".join(ignored))


def _has(raw: Any, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(raw, dict) or name not in raw:
            return False
        raw = raw[name]
    return True


def _pop(raw: dict[str, Any], key: str) -> bool:
    if not _has(raw, key):
        return False
    *sections, name = key.split(".")
    for section in sections:
        raw = raw[section]
    del raw[name]
    return True


# --- from YAML values to typed values ---------------------------------------------------------------------------------


def _is_section(hint: Any) -> TypeGuard[type]:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _yaml_fields(cls: type) -> dict[str, Any]:
    """Name -> type of the fields that a YAML file may set."""
    hints = hints_of(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.metadata.get("in_yaml", True)}


def _parse_section(cls: type, raw: Any, key: str) -> dict[str, Any]:
    """Check names and types of what is there. Nested dataclasses stay dicts: defaults are still to be filled in."""
    if raw is None:  # a section with nothing in it
        raw = {}
    if not isinstance(raw, Mapping):
        raise ValueError(
            f"{key} = {shown(raw)} is not allowed: it is a section with the keys {', '.join(_yaml_fields(cls))}"
        )
    fields = _yaml_fields(cls)
    values = {}
    for name, value in raw.items():
        dotted = join_key(key, str(name))
        if name not in fields:
            raise ValueError(f"unknown key {shortened(dotted)}; did you mean {_nearest_key(dotted, cls, key)}?")
        hint = fields[name]
        values[name] = _parse_section(hint, value, dotted) if _is_section(hint) else _convert(value, hint, dotted)
    return values


def _all_keys(cls: type, key: str = "") -> Iterator[str]:
    for name, hint in _yaml_fields(cls).items():
        yield join_key(key, name)
        if _is_section(hint):
            yield from _all_keys(hint, join_key(key, name))


def _nearest_key(dotted: str, cls: type, section: str) -> str:
    """A similar name in the same section, else the same name elsewhere, else whatever is most alike."""
    name = dotted.rsplit(".", 1)[-1]
    names = {field.lower(): field for field in _yaml_fields(cls)}
    in_section = difflib.get_close_matches(name.lower()[:100], names, n=1)
    if in_section:
        return join_key(section, names[in_section[0]])
    everything = list(_all_keys(Config))
    elsewhere = [key for key in everything if key.rsplit(".", 1)[-1] == name]
    return elsewhere[0] if elsewhere else difflib.get_close_matches(dotted[:100], everything, n=1, cutoff=0.0)[0]


def _convert(value: Any, hint: Any, key: str) -> Any:
    """The value as the type that the dataclass declares, or a ValueError. Numbers are never made from strings."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        lists = [a for a in args if get_origin(a) is tuple]  # of a number or a list of numbers
        kinds = lists if lists and isinstance(value, list | tuple) else [a for a in args if a is not type(None)]
        return _convert(value, kinds[0], key)
    if origin is Literal:
        if key == "model.attention.type" and value in DENSE_ATTENTION_ALIASES:
            return "full"
        if type(value) is bool and (word := "on" if value else "off") in args:  # what YAML makes of a bare on or off
            return word
        if value not in args:
            raise not_allowed(key, value, " or ".join(map(str, args)))
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise not_allowed(key, value, f"a list, each value {_describe(args[0])}")
        item_hints = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(item_hints) != len(value):
            raise not_allowed(key, value, f"a list of {len(item_hints)} values, each {_describe(args[0])}")
        return tuple(_convert(v, h, f"{key}[{i}]") for i, (v, h) in enumerate(zip(value, item_hints, strict=True)))
    if hint is int and (whole := as_whole(value)) is not None:
        if abs(whole) > LARGEST_WHOLE:
            raise not_allowed(key, value, "a whole number of at most 15 digits")
        return whole
    if hint is float and math.isfinite(number := as_number(value)):
        return number
    if hint in (int, float) or type(value) is not hint:  # bool is a subclass of int, yet `num_steps: true` is a mistake
        raise not_allowed(key, value, _describe(hint))
    return value


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
    return names.get(hint, "a pair [width, height]")


def _construct(cls: type, values: dict[str, Any], key: str) -> Any:
    """The dataclass from its checked values; a section that is missing is one with nothing in it."""
    arguments = dict(values)
    for field in dataclasses.fields(cls):
        hint = hints_of(cls)[field.name]
        dotted = join_key(key, field.name)
        if _is_section(hint):
            arguments[field.name] = _construct(hint, values.get(field.name, {}), dotted)
        elif field.name not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"the key {dotted} is missing: it has no default, add it to the file")
    return cls(**arguments)
