"""What lies in a file that a run left behind, as it comes back: whole, of this version, and what its tensors are of.

A run that was stopped and latents that wait to be decoded are safetensors files with JSON in their metadata. Hours of
work are in them, they may be of another version of this software, cut by a full disk, or a stranger's. So all of it is
checked from the header alone, before anything is loaded: each entry and its type, the config as a YAML file's is, the
request as a person's is, and the name, dtype and shape of each tensor as they follow from these two. Whoever reads
on can rely on it.

This module does not know torch, and reads no tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kandinsky.checkpoints.dit_layout import FLOATS
from kandinsky.checkpoints.headers import Header, read_metadata
from kandinsky.coarse import coarse_steps
from kandinsky.common.given import as_number, shortened, shown
from kandinsky.common.limits import MAX_TEXT_TOKENS
from kandinsky.common.untrusted import parse_json
from kandinsky.config.reading import config_from_dict
from kandinsky.config.schema import Config
from kandinsky.request import FPS, Request, Sample, recorded_request
from kandinsky.run_state import CACHE_NUMBERS, CACHE_TENSORS

Kinds = type | tuple[type, ...]
TensorKind = tuple[tuple[str, ...], tuple[int, ...]]  # dtypes that are allowed, shape
NOTHING = type(None)
ADVICE = "it is damaged, or of another version of this software: the run has to be repeated"
# Of an output, besides what its request and its sample say.
OUTPUT: dict[str, Kinds] = {
    "task": str, "prompt": (str, NOTHING), "expanded_prompt": (str, NOTHING), "negative_prompt": (str, NOTHING),
    "image": (str, NOTHING), "seed": (int, NOTHING), "fps": int, "attention_engine": str, "devices": dict,
    "processes": int, "dtype": str, "adapters": list, "config": dict, "versions": dict, "evaluations": dict,
    "seconds": dict, "conditions": list,
}  # fmt: skip
STOPPED: dict[str, Kinds] = {
    "request": dict, "config": dict, "dtype": str, "step": int, "branches": list, "image_names": list,
    "evaluations": int, "skipped": list, "spared_blocks": int, "attention_calls": dict, "seconds": dict,
    "adapters": list, "items": list,
}  # fmt: skip
ITEM: dict[str, Kinds] = {  # of a condition, see sampling/conditioning.py
    "name": str, "frame": int, "frames": int, "hold": str, "from_step": int, "starts": bool, "marked": bool,
    "shown": bool, "everywhere": bool, "origin": str,
}  # fmt: skip
MAX_ITEMS = 100
DTYPES = ("float32", "bfloat16", "float16")
# What a run that is gone on with has settled: overrides of these would change nothing but the record.
SETTLED = (
    *("task", "metrics.resolution", "metrics.scheduler_scale", "model.num_steps", "model.guidance_weight"),
    *("model.guidance_interval", "model.guidance_every", "model.text_embedder", "generation.width"),
    *("generation.height", "generation.time_length", "generation.resolutions", "generation.negative_caption"),
    *("generation.noise_device", "generation.noise_dtype", "generation.expand_prompts", "generation.schedule"),
    *("generation.visual_cond", "generation.coarse_steps"),
)
# What latents that are decoded have not settled.
USED_IN_DECODING = ("model.vae", "runtime")


def read_record(path: str | Path, key: str) -> Any:
    """The JSON in a file's metadata; None where there is none under `key`. Raises ValueError for damaged files."""
    text = read_metadata(path).get(key)
    return None if text is None else parse_json(text, f"{path}: its record")


def recorded_config(record: Mapping[str, Any], overrides: Sequence[str], path: str | Path, *, decoding: bool) -> Config:
    """The config that a run goes on with: the recorded one under overrides.

    Raises ValueError for overrides without an effect, for what no config has, and for what can't be read.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        used = key.startswith(tuple(f"{name}." for name in USED_IN_DECODING))
        if not used if decoding else any(key == name or key.startswith(f"{name}.") for name in SETTLED):
            raise ValueError(f"{shortened(override)}: {path} goes on with what its run began with: leave {key} out")
    config = config_from_dict(record["config"], overrides)
    before = config_from_dict(record["config"])
    for name in SETTLED:  # a whole section may have been overridden
        if _value(config, name) != _value(before, name):
            raise ValueError(f"{name} is settled by {path}, which goes on with what its run began with: leave it out")
    if not decoding:
        _check_cache(config, before, path)
    return config


def _check_cache(config: Config, before: Config, path: str | Path) -> None:
    """Raise ValueError unless blocks are left out as in the steps before, or no longer at all."""
    now, then = config.block_cache, before.block_cache
    if now is None:
        return
    if then is None:
        raise ValueError(f"the cache is {now.kind}, and the run of {path} began without one: leave it out")
    advice = "give that, or leave blocks out no longer: --cache off"
    for name, value in now._asdict().items():
        if value != (began := getattr(then, name)):
            what = "the cache" if name == "kind" else f"cache.{name}"
            raise ValueError(f"{what} is {value}, and the run of {path} began with {began}: {advice}")
    for name in ("mag_ratios", "retention"):
        if config.uses_magcache and _value(config.magcache, name) != _value(before.magcache, name):
            raise ValueError(f"magcache.{name} is another one than the run of {path} began with: {advice}")


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


# --- latents ----------------------------------------------------------------------------------------------------------


def check_outputs(records: Any, header: Header, what: str | Path) -> None:
    """Raise ValueError unless `records` are of one request's outputs, and the tensors of `header` are their latents."""
    about = f"{what}: its record"
    if not isinstance(records, list) or not records:
        raise ValueError(f"{about} is {shown(records)}, and not one for each output: {ADVICE}")
    first = _checked_record(records[0], OUTPUT, about)
    config = _config(first, about)
    names = [field.name for field in dataclasses.fields(Request) if field.name != "samples"]
    samples = []
    for i, record in enumerate(records):
        _checked_record(record, {**OUTPUT, **dict.fromkeys(names, object)}, about)
        if different := [name for name in (*names, "task", "config") if record[name] != first[name]]:
            raise ValueError(f"{about} has two values of {different[0]} for outputs of one run: {ADVICE}")
        words = {"text": record["prompt"], "negative_caption": record["negative_prompt"]}
        samples.append(Sample(**words, seed=record["seed"], prompt=i, expanded=record["expanded_prompt"]))
        if set(record["evaluations"]) != {"all", "skipped"} or record["fps"] != FPS or record["task"] != config.task:
            raise ValueError(f"{about} has other evaluations, fps or task than it can have: {ADVICE}")
        _check_seconds(record["seconds"], about)
        _check_adapters(record["adapters"], about)
    values = {name: first[name] for name in names} | {"samples": list(map(dataclasses.asdict, samples))}
    request = _request(values, config, about)
    _check_items(first["conditions"], request, about)
    shape = (len(records), *request.latent_size, config.model.dit_params.in_visual_dim)
    _check_tensors({"latents": (("F32",), shape)}, {}, header, what)


# --- runs that were stopped -------------------------------------------------------------------------------------------


def check_stopped(record: Any, header: Header, what: str | Path) -> Request:
    """The request of a run that was stopped. Raises ValueError unless record and tensors belong to one run."""
    about = f"{what}: its record"
    record = _checked_record(record, STOPPED, about)
    config = _config(record, about)
    request = _request(record["request"], config, about)
    guided, calls = abs(request.guidance_weight - 1) > 1e-6, record["attention_calls"]
    for name, ok in (
        ("step", request.first_step <= record["step"] < request.num_steps),
        ("dtype", record["dtype"] in DTYPES),
        ("branches", record["branches"] == (["cond", "uncond"] if guided else ["cond"])),
        ("image_names", all(isinstance(one, str) for one in record["image_names"])),
        ("evaluations", 0 <= record["evaluations"] <= 2 * request.num_steps),
        (
            "skipped",
            len(record["skipped"]) in (0, len(request.samples))
            and all(type(one) is int and 0 <= one <= record["evaluations"] for one in record["skipped"]),
        ),
        ("spared_blocks", 0 <= record["spared_blocks"] <= config.model.dit_params.num_visual_blocks),
        (
            "attention_calls",
            set(calls) <= {"engine", "exact"} and all(type(one) is int and one >= 0 for one in calls.values()),
        ),
    ):
        if not ok:
            raise ValueError(f"{about} has {name} = {shown(record[name])}, which it can't have: {ADVICE}")
    _check_seconds(record["seconds"], about)
    _check_adapters(record["adapters"], about)

    dit, count = config.model.dit_params, len(request.samples)
    shape = (count, *request.latent_size, dit.in_visual_dim)
    at_step = (count, *latent_size_at(config, request, record["step"]), dit.in_visual_dim)
    needed: dict[str, TensorKind] = {"latents": (("F32",), at_step), "conditioning.noise": (("F32",), shape)}
    possible: dict[str, TensorKind] = {"difference": (("F32",), at_step)}
    if dit.visual_cond or dit.instruct_type == "channel":
        needed["conditioning.extra"] = (("F32",), (*shape[:-1], dit.in_visual_dim + 1))
    _check_items(record["items"], request, about)
    for i, item in enumerate(record["items"]):
        needed[f"item.{i}.latents"] = (("F32",), (count, item["frames"], *shape[2:]))
        if not item["everywhere"]:
            needed[f"item.{i}.region"] = (("F32",), (1, item["frames"], *shape[2:4], 1))
    tokens = math.prod(request.latent_size) // math.prod(dit.patch_size)
    for branch in record["branches"]:
        for i in range(count):
            text = f"text.{branch}.{i}"
            length = next(iter(header.get(f"{text}.text_embeds", ("", (0, 0)))[1][1:2]), 0)
            length = length if 1 <= length <= MAX_TEXT_TOKENS else 1
            needed[f"{text}.text_embeds"] = (FLOATS, (1, length, dit.in_text_dim))
            needed[f"{text}.pooled_embeds"] = (FLOATS, (1, dit.in_text_dim2))
            possible[f"{text}.text_mask"] = (("BOOL",), (1, length))
            cached = f"residual.{branch}.{i}"
            for name in (cached, f"{cached}.probe", *(f"{cached}.{number}" for number in range(CACHE_TENSORS))):
                possible[name] = (FLOATS, (1, tokens, dit.model_dim))
            for number in range(CACHE_TENSORS):
                possible[f"{cached}.velocity.{number}"] = (FLOATS, (1, *request.latent_size, dit.out_visual_dim))
            possible[f"{cached}.numbers"] = (("F64",), (CACHE_NUMBERS,))
    _check_tensors(needed, possible, header, what)
    return request


def latent_size_at(config: Config, request: Request, step: int) -> tuple[int, int, int]:
    """(latent frames, rows, columns) of what enters a step, which may be one on a smaller grid."""
    coarse = coarse_steps(config, request.num_steps, request.width, request.height)
    if coarse is None or step >= coarse.steps:
        return request.latent_size
    return dataclasses.replace(request, width=coarse.width, height=coarse.height).latent_size


def _check_items(items: list[Any], request: Request, about: str) -> None:
    for item in items[: MAX_ITEMS + 1]:
        fits = isinstance(item, dict) and set(item) == set(ITEM) and len(items) <= MAX_ITEMS
        fits = fits and all(type(item[name]) is kind for name, kind in ITEM.items())
        if fits:
            fits = item["hold"] in ("clean", "noised", "no") and 0 <= item["from_step"] <= request.num_steps
            fits = fits and item["frame"] >= 0 and 1 <= item["frames"] <= request.latent_size[0] - item["frame"]
        if not fits:
            raise ValueError(f"{about} has a condition {shown(item)}: {ADVICE}")


# --- both -------------------------------------------------------------------------------------------------------------


def _checked_record(record: Any, kinds: Mapping[str, Kinds], about: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"{about} is {shown(record)}, and not a set of entries: {ADVICE}")
    for name, kind in kinds.items():
        if name not in record:
            raise ValueError(f"{about} has no {name}: {ADVICE}")
        if not isinstance(record[name], kind) or (isinstance(record[name], bool) and kind is not object):
            raise ValueError(f"{about} has {name} = {shown(record[name])}, which it can't have: {ADVICE}")
    return record


def _config(record: Mapping[str, Any], about: str) -> Config:
    source = record["config"].get("source")
    if not isinstance(source, str | None):
        raise ValueError(f"{about} has a config from {shown(source)}: {ADVICE}")
    try:
        return config_from_dict(record["config"])
    except ValueError as error:
        raise ValueError(f"{about} has a config that is none ({error}): {ADVICE}") from None


def _request(values: Mapping[str, Any], config: Config, about: str) -> Request:
    try:
        return recorded_request(values, config)
    except ValueError as error:
        raise ValueError(f"{about} has a request that is none ({error}): {ADVICE}") from None


def _check_seconds(seconds: Mapping[str, Any], about: str) -> None:
    for stage, value in seconds.items():
        if not 0 <= as_number(value) < math.inf:
            raise ValueError(f"{about} has {shown(value)} seconds for {shown(stage)}: {ADVICE}")


def _check_adapters(adapters: list[Any], about: str) -> None:
    for one in adapters:
        texts = [one.get(name) for name in ("name", "path", "trigger")] if isinstance(one, dict) else [None]
        if not all(isinstance(text, str) for text in texts) or not math.isfinite(as_number(one.get("scale"))):
            raise ValueError(f"{about} has an adapter {shown(one)}: {ADVICE}")


def _check_tensors(
    needed: Mapping[str, TensorKind],
    possible: Mapping[str, TensorKind],
    header: Header,
    what: str | Path,
) -> None:
    known = {**possible, **needed}
    if missing := [name for name in needed if name not in header]:
        raise ValueError(f"{what}: there is no {missing[0]} in it: {ADVICE}")
    for name in dict.fromkeys((*needed, *header)):
        dtype, shape = header[name]
        dtypes, expected = known.get(name, ((), ()))
        if dtype not in dtypes or shape != expected:
            of = f"; of its record's run it would be {expected}" if dtypes else ", which no such run has"
            raise ValueError(f"{what}: {shortened(name)} in it is {dtype} {shown(list(shape))}{of}: {ADVICE}")
