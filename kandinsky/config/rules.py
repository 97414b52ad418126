"""What settings may be: the range that stands at each field, and rules between settings."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, get_type_hints

from kandinsky.common.given import shown
from kandinsky.common.limits import MAX_PATCHES, NABLA_PIXELS, PATCH_PIXELS
from kandinsky.config.schema import Config


def split_lora(text: str) -> tuple[str, float]:
    """An entry of model.loras as path and scale: "loras/dolly_in:0.8" -> ("loras/dolly_in", 0.8); left out it is 1.

    What stands behind the last colon is a part of the path where it is no number. ValueError for what has no path, or a
    scale that is not finite.
    """
    path, _, number = text.rpartition(":")
    try:
        scale = float(number)
    except ValueError:
        path, scale = text, 1.0
    if not path.strip() or not math.isfinite(scale):
        raise ValueError(f"{text!r} is not an adapter: give PATH or PATH:scale, like loras/dolly_in:0.8")
    return path, scale


def check_processes(config: Config, count: int) -> None:
    """Raise ValueError unless `count` processes can make one output together.

    Each of them computes attention for some of the heads; with cfg_parallel 2, for one of guidance's two branches.
    """
    heads, branches = config.model.dit_params.num_heads, config.runtime.cfg_parallel
    possible = [branches * n for n in range(1, heads + 1) if heads % n == 0]
    if count == 1 and (branches > 1 or config.runtime.shard_weights):
        key = f"cfg_parallel = {branches}" if branches > 1 else "shard_weights = true"
        raise ValueError(
            f"runtime.{key} divides the work among processes, and this is the only one: leave it out, or start "
            f"several, like torchrun --nproc-per-node {possible[min(1, len(possible) - 1)]} test.py ..."
        )
    if count > 1 and config.runtime.heads_at_once is not None:
        raise ValueError(
            f"runtime.heads_at_once is {config.runtime.heads_at_once}, and several processes share the heads: leave it "
            "out, or start one process"
        )
    if count not in possible:
        *most, last = map(str, possible)
        halves = "in two halves " if branches > 1 else ""
        raise ValueError(
            f"{count} processes cannot share this model's {heads} attention heads {halves}evenly: "
            f"start {', '.join(most)}{' or ' if most else ''}{last}"
        )


def join_key(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def not_allowed(key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{key} = {shown(value)} is not allowed: it must be {allowed}")


def check_config(config: Config) -> None:
    _check_ranges(config)
    for rule in (
        _check_model,
        _check_exact,
        _check_magcache,
        _check_coarse,
        _check_streaming,
        _check_parts,
        _check_shards,
        _check_task,
        _check_files,
        _check_sizes,
    ):
        rule(config)


@functools.cache
def hints_of(cls: type, include_extras: bool = False) -> Mapping[str, Any]:
    """typing.get_type_hints of a section's class: it compiles every annotation, most of the time of reading a file."""
    return get_type_hints(cls, include_extras=include_extras)


def _check_ranges(section: Any, key: str = "") -> None:
    """Every value against what its field allows; None where a field may be left out."""
    for name, hint in hints_of(section.__class__, include_extras=True).items():
        value, dotted = getattr(section, name), join_key(key, name)
        if dataclasses.is_dataclass(value):
            _check_ranges(value, dotted)
        for allowed in getattr(hint, "__metadata__", ()):
            _require(value is None or allowed.test(value), dotted, value, allowed.words)


def _require(ok: bool, key: str, value: Any, allowed: str) -> None:
    if not ok:
        raise not_allowed(key, value, allowed)


def _check_model(config: Config) -> None:
    model, dit, vae = config.model, config.model.dit_params, config.model.vae
    for text in model.loras:
        try:
            split_lora(text)
        except ValueError as error:
            raise ValueError(f"model.loras: {error}") from None

    even = all(axis % 2 == 0 for axis in dit.axes_dims)
    _require(
        even, "model.dit_params.axes_dims", dit.axes_dims, "even numbers: rotary embeddings turn pairs of channels"
    )
    _require(
        dit.model_dim % dit.head_dim == 0,
        "model.dit_params.axes_dims",
        dit.axes_dims,
        f"numbers whose sum divides model_dim = {dit.model_dim}: the sum, here {dit.head_dim}, is the size of a head",
    )
    tile, overlap = vae.spatial_tile, vae.spatial_overlap
    _require(
        0 <= overlap <= tile // 2 and overlap % 8 == 0,
        "model.vae.spatial_overlap",
        overlap,
        f"a multiple of 8 and at most half of spatial_tile = {tile} (pixels)",
    )
    same_as = "model.dit_params.{} = {}, which the DiT takes it as"
    encoders = model.text_embedder
    for section, size, name, dim in (
        ("qwen", encoders.qwen.emb_size, "in_text_dim", dit.in_text_dim),
        ("clip", encoders.clip.emb_size, "in_text_dim2", dit.in_text_dim2),
    ):
        _require(size == dim, f"model.text_embedder.{section}.emb_size", size, same_as.format(name, dim))


def _check_exact(config: Config) -> None:
    blocks, exact = config.model.dit_params.num_visual_blocks, config.model.attention.exact_blocks
    _require(
        all(-blocks <= block < blocks for block in exact),
        "model.attention.exact_blocks",
        list(exact),
        f"numbers of this model's {blocks} visual blocks: 0 to {blocks - 1}, or from the last one -1 to {-blocks}",
    )


def _check_magcache(config: Config) -> None:
    ratios = config.magcache.mag_ratios
    if ratios is not None:
        _require(len(ratios) % 2 == 0, "the length of magcache.mag_ratios", len(ratios), "even: pairs of cond, uncond")
        _require(min(ratios) >= 0, "the smallest of magcache.mag_ratios", min(ratios), "0 or more")
    enabled, kind = config.magcache.enabled, config.cache.kind
    for key, value, is_wanted, allowed in (
        ("magcache.enabled", True, enabled, "false"),
        ("cache.kind", kind, kind == "magcache", "another one, auto or off"),
    ):
        _require(
            ratios is not None or not is_wanted,
            key,
            value,
            f"{allowed}, as there are no magcache.mag_ratios to go by; measure them, and write them into the file, "
            f"with: python tools/calibrate_magcache.py --config {config.source} --prompt '...' --write",
        )
    allowed = "magcache, auto, off or left out with magcache.enabled: a request has one cache"
    _require(not enabled or kind in (None, "magcache", "auto", "off"), "cache.kind", kind, allowed)
    divided = config.runtime.cfg_parallel > 1 and config.block_cache is not None and not config.uses_magcache
    allowed = "magcache or off with runtime.cfg_parallel = 2: one branch decides for both, which one process has to see"
    _require(not divided, "cache.kind", kind, allowed)


def _check_coarse(config: Config) -> None:
    share, cache = config.generation.coarse_steps.share, config.block_cache
    setting = "magcache.enabled" if config.magcache.enabled else "cache.kind"
    allowed = f"0 with {setting}: what a cache keeps is of one size; take one of the two"
    _require(share == 0 or cache is None, "generation.coarse_steps.share", share, allowed)


def _check_streaming(config: Config) -> None:
    is_wanted, allowed = config.runtime.stream_encoders == "on", "auto or off with runtime.qwen_quantization"
    _require(not (is_wanted and config.runtime.qwen_quantization), "runtime.stream_encoders", "on", allowed)


def _check_parts(config: Config) -> None:
    runtime, heads = config.runtime, config.model.dit_params.num_heads
    at_once, allowed = runtime.heads_at_once, f"1 to {heads}, as many heads as there are"
    _require(at_once is None or at_once <= heads, "runtime.heads_at_once", at_once, allowed)
    allowed = "auto or off with runtime.heads_at_once: whole blocks are what is compiled"
    _require(at_once is None or runtime.compile != "on", "runtime.compile", "on", allowed)
    allowed = "false without runtime.heads_at_once"
    _require(at_once is not None or not runtime.attention_on_host, "runtime.attention_on_host", True, allowed)


def _check_shards(config: Config) -> None:
    runtime = config.runtime
    if not runtime.shard_weights:
        return
    for key, is_used in (
        ("offload = on", runtime.offload == "on"),
        (f"blocks_on_gpu = {runtime.blocks_on_gpu}", runtime.blocks_on_gpu is not None),
        (f"heads_at_once = {runtime.heads_at_once}", runtime.heads_at_once is not None),
        (f"dit_quantization = {runtime.dit_quantization}", runtime.dit_quantization is not None),
        ("compile = on", runtime.compile == "on"),
    ):
        _require(not is_used, "runtime.shard_weights", True, f"false with runtime.{key}: take one of the two")
    allowed = "false with model.loras: adapters are merged into whole weights"
    _require(not config.model.loras, "runtime.shard_weights", True, allowed)


def _check_task(config: Config) -> None:
    task, dit, vae = config.task, config.model.dit_params, config.model.vae
    vae_name = "flux" if task in ("t2i", "i2i") else "hunyuan"
    _require(vae.name == vae_name, "model.vae.name", vae.name, f"{vae_name} for task {task}")
    if task == "i2v":
        _require(dit.visual_cond, "model.dit_params.visual_cond", dit.visual_cond, "true for task i2v")
    visual_cond = config.generation.visual_cond
    _require(task == "i2v" or visual_cond == "zeros", "generation.visual_cond", visual_cond, f"zeros for task {task}")
    if task == "i2i":
        key, channel = "model.dit_params.instruct_type", dit.instruct_type
        _require(channel == "channel", key, channel, "channel for task i2i")


def _check_files(config: Config) -> None:
    runtime, makes_pictures = config.runtime, config.task in ("t2i", "i2i")
    allowed = f"left out for task {config.task}: pictures have no frames a second"
    _require(runtime.fps is None or not makes_pictures, "runtime.fps", runtime.fps, allowed)
    allowed = "left out, or with runtime.upscale = 2 or 4"
    _require(runtime.upscaler is None or runtime.upscale > 1, "runtime.upscaler", runtime.upscaler, allowed)


def _check_sizes(config: Config) -> None:
    attention, generation = config.model.attention, config.generation
    multiple = NABLA_PIXELS if attention.type == "nabla" else PATCH_PIXELS
    for pair in generation.resolutions:
        _require(
            all(0 < side <= MAX_PATCHES * PATCH_PIXELS and side % multiple == 0 for side in pair),
            "generation.resolutions",
            pair,
            f"multiples of {multiple} up to {MAX_PATCHES * PATCH_PIXELS} (attention type {attention.type})",
        )
    _require(
        (generation.width, generation.height) in generation.resolutions,
        "generation.width x generation.height",
        f"{generation.width}x{generation.height}",
        "one of generation.resolutions: " + ", ".join(f"{w}x{h}" for w, h in generation.resolutions),
    )
