"""What a variant is made of: the YAML file, checked, with every default filled in, as frozen dataclasses.

`load_config(path, overrides)` resolves each setting once: override > YAML > default. It is strict. An unknown key, a
wrong type and a value out of range are a ValueError that names the key, because a typo that is silently ignored
costs someone an hour of rendering.

The layout is that of the original repository's YAML files, which load unmodified. Three things are ours and optional:
`task`, `generation` and `model.hub_repo`. What an old file does not say is derived from what it does say (see
`_fill_defaults`); keys that never had an effect are accepted with one warning.

This module does not know torch, devices, or whether any file named here exists.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints

from kandinsky.common.given import as_number, as_whole, shortened, shown
from kandinsky.original_names import our_config
from kandinsky.yaml_files import read_yaml, with_overrides

logger = logging.getLogger(__name__)

VIDEO_NEGATIVE_CAPTION = (
    "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, deformed, "
    "walking backwards"
)

# (width, height) in pixels: the sizes that the published checkpoints were trained for.
SD_SIZES = ((512, 512), (768, 512), (512, 768))
HD_SIZES = ((1024, 1024), (1408, 640), (640, 1408), (1280, 768), (768, 1280), (1152, 896), (896, 1152))

# An image pixel is 8 x 8 to a latent cell and a patch is 2 x 2 cells; NABLA works on 8 x 8 patches.
PATCH_PIXELS = 16
NABLA_PIXELS = 128
# The rotary tables have 128 positions an axis and 1024 for text.
MAX_PATCHES = 128
MAX_TEXT_TOKENS = 1024
MAX_SECONDS = 21  # 24 fps, 4 frames to a latent frame: 21 s are 127 latent frames
MIN_SECONDS = 4 / 24  # the shortest video has 5 frames: the first one and those of one more latent frame
LARGEST_WHOLE = 10**15 - 1  # of a setting; what is computed from several of them still is a float's size

DEVICE_PRESETS = Path(__file__).resolve().parent.parent / "configs" / "devices"

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


@dataclass(frozen=True)
class Allowed:
    """Metadata of a field: which of its type's values it takes, and the same in words."""

    test: Callable[[Any], bool]
    words: str


def at_least(smallest: float, words: str = "") -> Allowed:
    """Of several numbers, each."""
    return Allowed(lambda value: _smallest(value) >= smallest, words or f"at least {smallest:g}")


def more_than_0(words: str = "more than 0") -> Allowed:
    return Allowed(lambda value: _smallest(value) > 0, words)


def between(lowest: float, highest: float, words: str) -> Allowed:
    return Allowed(lambda value: lowest <= value <= highest, words)


def _smallest(value: Any) -> Any:
    return min(value) if isinstance(value, tuple) else value


NOT_EMPTY = Allowed(lambda text: bool(text.strip()), "not empty")
OR_MORE = at_least(0, "0 or more")
SHARES = Allowed(lambda pair: 0 <= pair[0] <= pair[1] <= 1, "two shares of the steps, 0 to 1")
SECONDS = Allowed(
    lambda seconds: seconds == 0 or MIN_SECONDS <= seconds <= MAX_SECONDS,
    f"0 to {MAX_SECONDS} seconds; 0 is a picture, and the shortest video has {MIN_SECONDS:.2f}",
)
TILE = Allowed(lambda side: side >= 64 and side % 8 == 0, "a multiple of 8, at least 64 (pixels)")

Count = Annotated[int, at_least(1)]
Counts = Annotated[tuple[int, int, int], at_least(1)]
Name = Annotated[str, NOT_EMPTY]


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """The scale that the model works at."""

    resolution: Annotated[int, at_least(16, "at least 16 pixels")]  # 512 (SD) or 1024 (HD)
    # Rotary positions are divided by it: time, height, width.
    scale_factor: Annotated[tuple[float, float, float], more_than_0("three positive numbers")]
    scheduler_scale: Annotated[float, more_than_0()]  # shift of the flow-matching schedule


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Keyword arguments of DiffusionTransformer3D. The defaults are the 2B video model's."""

    in_visual_dim: Count = 16
    in_text_dim: Count = 3584
    in_text_dim2: Count = 768
    time_dim: Count = 512
    out_visual_dim: Count = 16
    patch_size: Counts = (1, 2, 2)
    model_dim: Count = 1792
    ff_dim: Count = 7168
    num_text_blocks: Count = 2
    num_visual_blocks: Count = 32
    axes_dims: Counts = (16, 24, 24)
    visual_cond: bool = False
    instruct_type: Literal["channel"] | None = None

    @property
    def head_dim(self) -> int:
        return sum(self.axes_dims)

    @property
    def num_heads(self) -> int:
        return self.model_dim // self.head_dim


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Visual self-attention: dense, or NABLA's adaptive block-sparse map joined with a sliding window."""

    type: Literal["full", "nabla"] = "full"
    engine: Name = "auto"  # names are checked where engines are known, in kandinsky.attention
    # Share of the attention mass that NABLA keeps in each row of blocks.
    P: Annotated[float, Allowed(lambda share: 0 < share <= 1, "more than 0 and at most 1")] = 0.9
    wT: Count = 11  # window in latent frames and in blocks of 8 patches
    wH: Count = 3
    wW: Count = 3
    add_sta: bool = True
    method: Literal["topcdf"] = "topcdf"


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    checkpoint_path: Name
    name: Literal["hunyuan", "flux"] = "hunyuan"
    spatial_tile: Annotated[int, TILE] = 768  # pixels
    spatial_overlap: int = 64  # pixels, at least
    # For decoding: tiles shrink until it is enough.
    memory_budget_gb: Annotated[float | None, more_than_0("more than 0 (GB of 2^30 bytes)")] = None


@dataclass(frozen=True, kw_only=True)
class QwenConfig:
    checkpoint_path: Name
    emb_size: int = 3584
    # Tokens of the prompt, without the template.
    max_length: Annotated[int, between(1, MAX_TEXT_TOKENS, f"1 to {MAX_TEXT_TOKENS} tokens")] = 256
    # Tokens of the template before the prompt; None: the published template's.
    crop: Annotated[int | None, at_least(0, "0 or more, or left out")] = None


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    checkpoint_path: Name
    emb_size: int = 768
    max_length: Annotated[int, at_least(2, "at least 2 tokens")] = 77


@dataclass(frozen=True, kw_only=True)
class TextEmbedderConfig:
    qwen: QwenConfig
    clip: ClipConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    checkpoint_path: Name
    hub_repo: str | None = None  # where download_models.py finds checkpoint_path
    num_steps: Count
    guidance_weight: Annotated[float, OR_MORE]  # 1: no classifier-free guidance, one model evaluation a step
    # Shares of the steps between which there is guidance.
    guidance_interval: Annotated[tuple[float, float], SHARES] = (0.0, 1.0)
    guidance_every: Count = 1  # of the steps with guidance, each n-th evaluates the negative prompt
    loras: tuple[str, ...] = ()  # adapters that are merged into the DiT, each "PATH" or "PATH:scale"
    dit_params: DiTConfig
    attention: AttentionConfig
    vae: VAEConfig
    text_embedder: TextEmbedderConfig


@dataclass(frozen=True, kw_only=True)
class MagCacheConfig:
    # Calibrated magnitude ratios in the order of model evaluations: conditional, unconditional, conditional, ...
    mag_ratios: tuple[float, ...] | None = None
    enabled: bool = False
    threshold: Annotated[float, OR_MORE] = 0.12  # error that skipped evaluations in a row may add up to
    max_skips: Annotated[int, OR_MORE] = 2  # in a row
    # Share of the evaluations, the first ones, that are never skipped.
    retention: Annotated[float, between(0, 1, "0 to 1")] = 0.2


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """What makes a run fast or small and changes nothing else, or little and in known ways."""

    compile: Literal["auto", "on", "off"] = "auto"
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"  # torch.compile's: how long it searches
    cache_prompts: bool = False  # keep embeddings on disk; those of the default negative prompt are kept in any case
    offload: Literal["auto", "on", "off"] = "auto"  # a model is on its device only while its stage runs
    # Visual blocks that stay there, the others stream in; None: as many as fit.
    blocks_on_gpu: Annotated[int | None, at_least(1, "at least 1, or left out")] = None
    dit_quantization: Literal["int8", "fp8", "nf4"] | None = None  # of the DiT's linear layers, weights only
    qwen_quantization: bool = False  # NF4
    # Feed-forward and QKV run over as many tokens at a time; None: over all at once.
    chunk_tokens: Annotated[int | None, at_least(64, "at least 64, or left out")] = None
    # Write a small preview beside the output after every n-th step.
    preview: Annotated[int | None, at_least(1, "at least 1 step, or left out")] = None
    save_latents: bool = False  # keep what was denoised beside the output; while decoding it lies there in any case
    # 2: of several processes, one half evaluates the prompt, the other the negative prompt.
    cfg_parallel: Annotated[int, between(1, 2, "1 or 2")] = 1
    shard_weights: bool = False  # each process keeps a part of the DiT's weights, and gathers a block when it runs


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What a request gets that does not say otherwise."""

    width: int
    height: int
    # Seconds; 0: one image.
    time_length: Annotated[float, SECONDS]
    # (width, height), the sizes that the checkpoint was trained at; i2v: some of them.
    resolutions: Annotated[tuple[tuple[int, int], ...], Allowed(bool, "one [width, height] or more")]
    negative_caption: str
    noise_device: Literal["cpu", "cuda"] = "cpu"  # cpu + float32: a seed gives the same video on every machine
    noise_dtype: Literal["float32", "bfloat16"] = "float32"
    expand_prompts: bool | None = None  # have Qwen write the prompt out; None: where this Qwen can write
    schedule: Literal["original", "diffusers"] = "original"  # whose noise levels: see kandinsky.sampler.flow_timesteps
    first_frame_normalization: bool = True  # i2v: the first frames get the mean and contrast of those after them
    first_frame_statistics: Literal["each", "together"] = (
        "each"  # each of the first frames by itself; all, as diffusers
    )
    visual_cond: Literal["zeros", "image"] = "zeros"  # i2v: what stands in the condition channels of the first frame


@dataclass(frozen=True, kw_only=True)
class Config:
    task: Literal["t2v", "i2v", "t2i", "i2i"]
    metrics: MetricsConfig
    model: ModelConfig
    magcache: MagCacheConfig
    runtime: RuntimeConfig
    generation: GenerationConfig
    source: Path | None = dataclasses.field(default=None, metadata={"in_yaml": False})


def load_config(path: str | Path, overrides: Sequence[str] = (), presets: Sequence[str | Path] = ()) -> Config:
    """Read and check a YAML file.

    presets: YAML files with some of the keys, laid over the file one after the other (see `preset_file`).
    overrides: "dotted.key=value" strings, value in YAML syntax, applied over all files ("model.num_steps=20").
    Raises ValueError, naming file, key, value and what is allowed, for anything that is not as it should be.
    """
    path = our_config(Path(path))
    try:
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
    _fill_defaults(values)
    values["source"] = source
    config = _construct(Config, values, "")
    _check(config)
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
        _check(config)
    except ValueError as error:
        raise ValueError(f"{config.source}: {error}") from None
    return config


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
    if count > 1 and config.runtime.compile == "on":
        raise ValueError(
            "runtime.compile is on, and blocks whose attention goes over several processes are not compiled: "
            "leave it out"
        )
    if count not in possible:
        *most, last = map(str, possible)
        halves = "in two halves " if branches > 1 else ""
        raise ValueError(
            f"{count} processes cannot share this model's {heads} attention heads {halves}evenly: "
            f"start {', '.join(most)}{' or ' if most else ''}{last}"
        )


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
    hints = get_type_hints(cls)
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
        dotted = _join(key, str(name))
        if name not in fields:
            raise ValueError(f"unknown key {shortened(dotted)}; did you mean {_nearest_key(dotted, cls, key)}?")
        hint = fields[name]
        values[name] = _parse_section(hint, value, dotted) if _is_section(hint) else _convert(value, hint, dotted)
    return values


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _all_keys(cls: type, key: str = "") -> Iterator[str]:
    for name, hint in _yaml_fields(cls).items():
        yield _join(key, name)
        if _is_section(hint):
            yield from _all_keys(hint, _join(key, name))


def _nearest_key(dotted: str, cls: type, section: str) -> str:
    """A similar name in the same section, else the same name elsewhere, else whatever is most alike."""
    name = dotted.rsplit(".", 1)[-1]
    names = {field.lower(): field for field in _yaml_fields(cls)}
    in_section = difflib.get_close_matches(name.lower()[:100], names, n=1)
    if in_section:
        return _join(section, names[in_section[0]])
    everything = list(_all_keys(Config))
    elsewhere = [key for key in everything if key.rsplit(".", 1)[-1] == name]
    return elsewhere[0] if elsewhere else difflib.get_close_matches(dotted[:100], everything, n=1, cutoff=0.0)[0]


def _convert(value: Any, hint: Any, key: str) -> Any:
    """The value as the type that the dataclass declares, or a ValueError. Numbers are never made from strings."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return None if value is None else _convert(value, next(a for a in args if a is not type(None)), key)
    if origin is Literal:
        if key == "model.attention.type" and value in DENSE_ATTENTION_ALIASES:
            return "full"
        if type(value) is bool and "on" in args:  # what YAML makes of a bare on or off
            return "on" if value else "off"
        if value not in args:
            raise _not_allowed(key, value, " or ".join(map(str, args)))
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _not_allowed(key, value, f"a list, each value {_describe(args[0])}")
        item_hints = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(item_hints) != len(value):
            raise _not_allowed(key, value, f"a list of {len(item_hints)} values, each {_describe(args[0])}")
        return tuple(_convert(v, h, f"{key}[{i}]") for i, (v, h) in enumerate(zip(value, item_hints, strict=True)))
    if hint is int and (whole := as_whole(value)) is not None:
        if abs(whole) > LARGEST_WHOLE:
            raise _not_allowed(key, value, "a whole number of at most 15 digits")
        return whole
    if hint is float and math.isfinite(number := as_number(value)):
        return number
    if hint in (int, float) or type(value) is not hint:  # bool is a subclass of int, yet `num_steps: true` is a mistake
        raise _not_allowed(key, value, _describe(hint))
    return value


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
    return names.get(hint, "a pair [width, height]")


def _not_allowed(key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{key} = {shown(value)} is not allowed: it must be {allowed}")


def _construct(cls: type, values: dict[str, Any], key: str) -> Any:
    """The dataclass from its checked values; a section that is missing is one with nothing in it."""
    arguments = dict(values)
    for field in dataclasses.fields(cls):
        hint = get_type_hints(cls)[field.name]
        dotted = _join(key, field.name)
        if _is_section(hint):
            arguments[field.name] = _construct(hint, values.get(field.name, {}), dotted)
        elif field.name not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"the key {dotted} is missing: it has no default, add it to the file")
    return cls(**arguments)


# --- defaults that depend on other settings ---------------------------------------------------------------------------


def _fill_defaults(values: dict[str, Any]) -> None:
    """Derive what an old YAML file does not say. What a file says is never changed."""
    metrics = values.setdefault("metrics", {})
    model = values.setdefault("model", {})
    generation = values.setdefault("generation", {})
    if not values.get("magcache", {}).get("mag_ratios"):  # an empty list says the same as none
        values.get("magcache", {}).pop("mag_ratios", None)
    name = _variant_name(model.get("checkpoint_path", ""))

    if "task" not in values:
        if model.get("vae", {}).get("name") == "flux":
            values["task"] = "i2i" if model.get("dit_params", {}).get("instruct_type") == "channel" else "t2i"
        else:
            values["task"] = "i2v" if "i2v" in name else "t2v"
    task = values["task"]
    is_image = task in ("t2i", "i2i")
    is_sd = metrics.get("resolution", 512) < 1024
    is_10s = "10s" in name
    is_nabla = model.get("attention", {}).get("type") == "nabla"

    if "scheduler_scale" not in metrics:
        # What the published variants are run with: images 3; all 10 s models, and SD image-to-video, 10; the rest 5.
        # NABLA at SD is what tells a 10 s model whose file has been renamed.
        ten = is_10s or (is_sd and (is_nabla or task == "i2v"))
        metrics["scheduler_scale"] = 3.0 if is_image else 10.0 if ten else 5.0
        logger.info("metrics.scheduler_scale is not set: using %g, as published", metrics["scheduler_scale"])
    model.setdefault("num_steps", 16 if "distil" in name else 50)
    without_cfg = "distil" in name or "nocfg" in name
    model.setdefault("guidance_weight", 1.0 if without_cfg else 3.5 if is_image else 5.0)

    if model.get("vae", {}).get("name") == "flux":
        model["vae"].setdefault("spatial_tile", max(max(size) for size in HD_SIZES))  # published without tiles

    resolution = metrics.get("resolution", 512)
    sizes = {512: SD_SIZES, 1024: HD_SIZES}.get(resolution, ((resolution, resolution),))
    sizes = generation.setdefault("resolutions", sizes)
    default_size = (resolution, resolution) if is_image else {512: (768, 512), 1024: (1280, 768)}.get(resolution)
    if default_size not in sizes and sizes:
        default_size = sizes[0]
    if default_size:
        generation.setdefault("width", default_size[0])
        generation.setdefault("height", default_size[1])
    generation.setdefault("time_length", 0.0 if is_image else 10.0 if is_10s else 5.0)
    generation.setdefault("negative_caption", "" if is_image else VIDEO_NEGATIVE_CAPTION)


def _variant_name(checkpoint_path: str) -> str:
    """The part of a path that says which variant it is: the file, or a folder where the file has a general name."""
    parts = Path(checkpoint_path.lower()).parts
    for part in reversed(parts):
        if re.search("t2v|i2v|t2i|i2i", part):
            return part
    return parts[-1] if parts else ""


# --- ranges, and rules between settings -------------------------------------------------------------------------------


def _check(config: Config) -> None:
    _check_ranges(config)
    for rule in (_check_model, _check_magcache, _check_shards, _check_task, _check_sizes):
        rule(config)


def _check_ranges(section: Any, key: str = "") -> None:
    """Every value against what its field allows; None where a field may be left out."""
    for name, hint in get_type_hints(type(section), include_extras=True).items():
        value, dotted = getattr(section, name), _join(key, name)
        if dataclasses.is_dataclass(value):
            _check_ranges(value, dotted)
        for allowed in getattr(hint, "__metadata__", ()):
            _require(value is None or allowed.test(value), dotted, value, allowed.words)


def _require(ok: bool, key: str, value: Any, allowed: str) -> None:
    if not ok:
        raise _not_allowed(key, value, allowed)


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


def _check_magcache(config: Config) -> None:
    ratios = config.magcache.mag_ratios
    if ratios is not None:
        _require(len(ratios) % 2 == 0, "the length of magcache.mag_ratios", len(ratios), "even: pairs of cond, uncond")
        _require(min(ratios) >= 0, "the smallest of magcache.mag_ratios", min(ratios), "0 or more")
    _require(
        ratios is not None or not config.magcache.enabled,
        "magcache.enabled",
        True,
        "false, as there are no magcache.mag_ratios to go by; measure them, and write them into the file, with: "
        f"python tools/calibrate_magcache.py --config {config.source} --prompt '...' --write",
    )


def _check_shards(config: Config) -> None:
    runtime = config.runtime
    if not runtime.shard_weights:
        return
    for key, is_used in (
        ("offload = on", runtime.offload == "on"),
        (f"blocks_on_gpu = {runtime.blocks_on_gpu}", runtime.blocks_on_gpu is not None),
        (f"dit_quantization = {runtime.dit_quantization}", runtime.dit_quantization is not None),
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
