"""Which weight files a variant needs, where they are, and whether they are what the config says, before loading any.

What a file's header says is kandinsky.headers' business; here it is compared with what a variant has to be.

    python -m kandinsky.checkpoints PATH

says what a file or a folder is and what is wrong with it. This module does not know torch and reads no tensor.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from kandinsky.command_line import show_every_character
from kandinsky.config import Config, DiTConfig, load_config
from kandinsky.given import MISSING, shortened, why_no_file
from kandinsky.headers import BITS as BITS
from kandinsky.headers import Header, read_header, refuse_pickle, why_absent
from kandinsky.untrusted import home_path, is_plain_name, read_json

REPOSITORY = Path(__file__).resolve().parent.parent
WEIGHTS_PREFIX = "weights"  # paths in configs start with ./weights/, which the user's cache_dir stands for
FLOATS = ("F32", "F16", "BF16")

COMFY_PREFIX = "model.diffusion_model."
# Where the parts of a model are in a published repository, in diffusers' layout and in the original's.
FOLDERS = {
    "dit": ("transformer", "model"),
    "vae": ("vae",),
    "text_encoder": ("text_encoder",),
    "text_encoder2": ("text_encoder_2", "text_encoder2"),
}
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")
_INDEX = re.compile(r".+\.safetensors\.index(\.[^.]+)?\.json")  # diffusers puts a variant's infix behind "index"
# head_dim -> its split over time, height and width. A checkpoint says the sum only; these are the published splits.
AXES_DIMS = {64: (16, 24, 24), 128: (32, 48, 48)}

# Inputs of a linear layer that share a scale.
INT8_GROUP = 128
NF4_GROUP = 64
_TRANSFORMER_LINEAR = re.compile(
    r"(text|visual)_transformer_blocks\.\d+\."
    r"((self|cross)_attention\.(to_query|to_key|to_value|out_layer)|feed_forward\.(in_layer|out_layer))"
)
_QUANTIZED_WEIGHT = re.compile(r"(?P<layer>.+)\.weight_(?P<scheme>int8|fp8|nf4)")

TINY_COMMAND = "python test.py --config configs/config_tiny_t2v.yaml"


# --- files ------------------------------------------------------------------------------------------------------------


def find_weights(path: str | Path) -> list[Path]:
    """The safetensors files behind a path: a file, or a folder with one file or with an index of shards.

    Names may have a variant's infix (model.fp16.safetensors); where a folder has the same without it, that one is it.
    Raises ValueError where there are none, only pickles, missing shards, or several files to choose from.
    """
    path = Path(path)
    refuse_pickle(path)
    if path.is_file():
        if _INDEX.fullmatch(path.name):
            return _shards(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: not a .safetensors file")
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: {why_absent(path, 'file or folder')}")

    for stem in ("diffusion_pytorch_model", "model"):
        if (path / f"{stem}.safetensors").is_file():
            return [path / f"{stem}.safetensors"]
        if (path / f"{stem}.safetensors.index.json").is_file():
            return _shards(path / f"{stem}.safetensors.index.json")
    files = sorted(path.glob("*.safetensors"))
    whole = [file for file in files if not _SHARD.fullmatch(file.name)]
    choices = whole + sorted(file for file in path.iterdir() if _INDEX.fullmatch(file.name))
    if len(choices) == 1:
        return whole or _shards(choices[0])
    if choices:
        names = ", ".join(file.name for file in choices[:4])
        raise ValueError(f"{path}: {len(choices)} .safetensors files ({names}): name the one that you mean")
    if files:
        raise ValueError(f"{path}: {len(files)} shards without their .safetensors.index.json: download it too")
    for file in sorted(path.iterdir()):
        refuse_pickle(file)
    raise ValueError(f"{path}: no .safetensors file in this folder")


def part_folder(path: str | Path, part: str) -> Path:
    """The folder of a part (see FOLDERS) where `path` is a whole repository, and else `path` itself."""
    path = Path(path)
    return next((path / name for name in FOLDERS[part] if (path / name).is_dir()), path)


def folder_of(path: Path) -> Path:
    """Where config.json and its like are that belong to the weights at `path`: in it, or beside the file."""
    return path if path.is_dir() else path.parent


def has_tied_head(config: Mapping[str, Any]) -> bool:
    """Whether a Qwen writes with its embeddings, by its config.json."""
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    return bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = read_json(index, "it").get("weight_map")
    except ValueError as error:
        raise ValueError(f"{index}: damaged, {error}: download it again") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: damaged, it has no weight_map: download it again")
    if not all(map(is_plain_name, weight_map.values())):
        raise ValueError(f"{index}: damaged, a weight_map names files beside it: download it again")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    for file in files:
        refuse_pickle(file)
    missing = [file for file in files if not file.is_file()]
    if missing:
        what = why_no_file(missing[0])
        why = "" if what == MISSING else f" ({what})"
        raise ValueError(f"{index}: {len(missing)} of {len(files)} shards are missing, like {missing[0].name}{why}")
    return files


def resolve_path(path: str | Path, config: Config | None = None, cache_dir: str | Path = "./weights/") -> Path:
    """Where a path from a config is on this machine. What is missing is returned as first expected.

    A leading ./weights/ stands for cache_dir. Other relative paths are taken from the working directory, else from
    the repository's root, so that the tiny checkpoint is found from anywhere. Raises ValueError for ~somebody who isn't
    known here.
    """
    path = home_path(path)
    if path.parts[:1] == (WEIGHTS_PREFIX,):
        path = home_path(cache_dir).joinpath(*path.parts[1:])
    if path.is_absolute() or path.exists():
        return path
    roots = [REPOSITORY]
    if config is not None and config.source is not None:
        roots.insert(0, config.source.resolve().parent.parent)  # configs/x.yaml -> the folder that holds configs/
    return next((root / path for root in roots if (root / path).exists()), path)


def missing_weights_message(path: str | Path, config: Config) -> str:
    """One line for whoever lacks a file: which, the command that gets it, and what runs without any download."""
    if not (why := why_absent(Path(path), "file")).startswith("no such"):
        return f"{path}: {why}"
    if "assets" in Path(path).parts:
        return f"weights not found: {path}. They are part of this repository: restore them with git checkout -- assets"
    known = config.source is not None and config.source.name.startswith("config_") and config.model.hub_repo is not None
    name = model_name(config.source) if known and config.source is not None else "list"
    return (
        f"weights not found: {path}. Get them with: python download_models.py --models {name}. "
        f"test.py --download does it too. Without any download: {TINY_COMMAND}"
    )


def model_name(config_path: str | Path) -> str:
    """The name that download_models.py has for a config: configs/config_5s_sft.yaml -> 5s_sft."""
    return Path(config_path).stem.removeprefix("config_")


# --- quantised layers -------------------------------------------------------------------------------------------------


def quantized_parts(scheme: str, outputs: int, inputs: int) -> Header:
    """What a quantised checkpoint has in the place of a linear layer's `weight` (outputs, inputs).

    int8 and fp8 are laid out as in the files that others have published, but for one thing: our fp8 has a scale for
    every row, theirs one for the whole weight, of shape () or (1,). nf4, two values to a byte, is our own layout; rows
    are filled up with zeros to whole groups.
    """
    if scheme == "int8":
        groups = -(-inputs // INT8_GROUP)
        return {"weight_int8": ("I8", (outputs, inputs)), "weight_scales": ("F32", (outputs, groups))}
    if scheme == "fp8":
        return {"weight_fp8": ("F8_E4M3", (outputs, inputs)), "weight_scale": ("F32", (outputs, 1))}
    assert scheme == "nf4", scheme
    groups = -(-inputs // NF4_GROUP)
    return {"weight_nf4": ("U8", (outputs, groups * NF4_GROUP // 2)), "weight_scales": ("F32", (outputs, groups))}


def is_quantizable(layer: str) -> bool:
    """Whether a module of the DiT is one of those that are quantised: the linear layers of attention and feed-forward.

    Embeddings, norms, modulation and the output layer are few of the weights and much of the precision.
    """
    return _TRANSFORMER_LINEAR.fullmatch(layer) is not None


def quantized_layers(header: Header) -> dict[str, str]:
    """Layer -> scheme (int8, fp8, nf4) of the DiT's linear layers that a checkpoint holds quantised."""
    found = (_QUANTIZED_WEIGHT.fullmatch(name) for name in strip_prefix(header))
    return {match["layer"]: match["scheme"] for match in found if match and is_quantizable(match["layer"])}


def quantization_from_header(header: Header) -> str | None:
    """The scheme that a DiT checkpoint is quantised with, None for none. Raises ValueError where there are several."""
    schemes = sorted(set(quantized_layers(header).values()))
    if len(schemes) > 1:
        raise ValueError(f"the checkpoint mixes layers in {' and '.join(schemes)}: use one that has a single scheme")
    return schemes[0] if schemes else None


# --- which DiT is it? -------------------------------------------------------------------------------------------------


def strip_prefix(header: Header) -> Header:
    """The header with the names that our modules have (ComfyUI files put model.diffusion_model. before each)."""
    return {name.removeprefix(COMFY_PREFIX): entry for name, entry in header.items()}


def dit_params_from_header(header: Header) -> dict[str, Any]:
    """What a DiT checkpoint says about its own shape, as a dict with fields of DiTConfig.

    In place of visual_cond and instruct_type, which look alike in the weights, there is `extra_channels`, true where
    the model takes a condition and a mask beside the latents. axes_dims is absent, and head_dim there, where the size
    of a head is none of the published ones. patch_size is known in its product only, and taken as (1, 2, 2).
    A quantised checkpoint says the same; `quantization_from_header` tells its scheme.
    Raises ValueError where the file is not a Kandinsky 5 DiT.
    """
    shapes = {_QUANTIZED_WEIGHT.sub(r"\1.weight", name): shape for name, (_, shape) in strip_prefix(header).items()}

    def size(name: str, axis: int = 0) -> int:
        try:
            return shapes[name][axis]
        except (KeyError, IndexError):
            raise ValueError(f"not a Kandinsky 5 DiT checkpoint: it has no fitting {name}") from None

    def count(name: str) -> int:
        found = (re.match(rf"{name}\.(\d+)\.", key) for key in shapes)
        return 1 + max((block_index(match[1], len(shapes)) for match in found if match), default=-1)

    patch = 4
    out_visual_dim = size("out_layer.out_layer.bias") // patch
    visual_in = size("visual_embeddings.in_layer.weight", 1) // patch  # C, or C + C + 1 with condition and mask
    extra_channels = visual_in == 2 * out_visual_dim + 1
    head_dim = size("visual_transformer_blocks.0.self_attention.query_norm.weight")
    params: dict[str, Any] = {
        "in_visual_dim": out_visual_dim if extra_channels else visual_in,
        "in_text_dim": size("text_embeddings.in_layer.weight", 1),
        "in_text_dim2": size("pooled_text_embeddings.in_layer.weight", 1),
        "time_dim": size("time_embeddings.in_layer.bias"),
        "out_visual_dim": out_visual_dim,
        "model_dim": size("visual_embeddings.in_layer.bias"),
        "ff_dim": size("visual_transformer_blocks.0.feed_forward.in_layer.weight"),
        "num_text_blocks": count("text_transformer_blocks"),
        "num_visual_blocks": count("visual_transformer_blocks"),
        "head_dim": head_dim,
        "extra_channels": extra_channels,
    }
    if head_dim in AXES_DIMS:
        params["axes_dims"] = AXES_DIMS[head_dim]
    return params


def block_index(digits: str, tensors: int) -> int:
    """A block's number in a tensor's name. Raises ValueError where there can't be as many blocks before it.

    What a file's names say decides how long lists are that are made from it, and names are cheap.
    """
    if int(digits) >= tensors:
        raise ValueError(f"it names a block {shortened(digits)}, and has {tensors} tensors in all: damaged, or a fake")
    return int(digits)


def expected_dit_shapes(dit: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter: 18 + 14 to a text block + 24 to a visual block."""
    dim, ff, time, head = dit.model_dim, dit.ff_dim, dit.time_dim, dit.head_dim
    patch = prod(dit.patch_size)
    extra = dit.in_visual_dim + 1 if dit.visual_cond or dit.instruct_type == "channel" else 0
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def attention(name: str) -> None:
        for layer in ("to_query", "to_key", "to_value", "out_layer"):
            linear(f"{name}.{layer}", dim, dim)
        shapes[f"{name}.query_norm.weight"] = shapes[f"{name}.key_norm.weight"] = (head,)

    def feed_forward(name: str) -> None:
        shapes[f"{name}.in_layer.weight"], shapes[f"{name}.out_layer.weight"] = (ff, dim), (dim, ff)

    linear("time_embeddings.in_layer", time, dim)
    linear("time_embeddings.out_layer", time, time)
    linear("text_embeddings.in_layer", dim, dit.in_text_dim)
    shapes["text_embeddings.norm.weight"] = shapes["text_embeddings.norm.bias"] = (dim,)
    linear("pooled_text_embeddings.in_layer", time, dit.in_text_dim2)
    shapes["pooled_text_embeddings.norm.weight"] = shapes["pooled_text_embeddings.norm.bias"] = (time,)
    linear("visual_embeddings.in_layer", dim, patch * (dit.in_visual_dim + extra))
    for i in range(dit.num_text_blocks):
        block = f"text_transformer_blocks.{i}"
        linear(f"{block}.text_modulation.out_layer", 6 * dim, time)
        attention(f"{block}.self_attention")
        feed_forward(f"{block}.feed_forward")
    for i in range(dit.num_visual_blocks):
        block = f"visual_transformer_blocks.{i}"
        linear(f"{block}.visual_modulation.out_layer", 9 * dim, time)
        attention(f"{block}.self_attention")
        attention(f"{block}.cross_attention")
        feed_forward(f"{block}.feed_forward")
    linear("out_layer.modulation.out_layer", 2 * dim, time)
    linear("out_layer.out_layer", patch * dit.out_visual_dim, dim)
    return shapes


# (model_dim, extra_channels) -> the name of the family and the config to use with it. Text to video and image to video
# look alike in the weights.
FAMILIES = {
    (1792, True): ("Lite", "configs/config_5s_sft.yaml"),
    (4096, True): ("Pro", "configs/config_5s_t2v_pro.yaml"),
    (2560, False): ("Text to Image Lite", "configs/config_t2i.yaml"),
    (2560, True): ("Image to Image Lite", "configs/config_i2i.yaml"),
}


def check_floats(path: str | Path, header: Header) -> None:
    """Raise ValueError where a tensor is not in a dtype that weights are in."""
    for name, (dtype, _) in header.items():
        if dtype not in FLOATS:
            raise ValueError(
                f"{path}: {shortened(name)} is in {dtype}; weights are in {', '.join(FLOATS)}: take another file"
            )


def check_dit_header(header: Header, dit: DiTConfig) -> None:
    """Raise one ValueError unless a checkpoint has exactly the parameters that a config asks for.

    Linear layers may be quantised, as `quantized_parts` has it, all of them or some.
    """
    header = strip_prefix(header)
    found = dit_params_from_header(header)
    scheme = quantization_from_header(header)
    wanted = {name: getattr(dit, name) for name in found if name not in ("extra_channels", "axes_dims")}
    wanted["extra_channels"] = dit.visual_cond or dit.instruct_type == "channel"
    different = [name for name, value in wanted.items() if value != found[name]]
    if different:
        details = ", ".join(f"{name} {found[name]} (config: {wanted[name]})" for name in different)
        raise ValueError(f"{_describe_variants(found, wanted, scheme)}. Different: {details}")

    shapes = expected_dit_shapes(dit)
    dtypes: dict[str, tuple[str, ...]] = dict.fromkeys(shapes, FLOATS)  # what is allowed
    for layer in [layer for layer in quantized_layers(header) if f"{layer}.weight" in shapes]:
        assert scheme is not None
        for part, (dtype, shape) in quantized_parts(scheme, *shapes.pop(f"{layer}.weight")).items():
            name = f"{layer}.{part}"
            one_scale = part == "weight_scale" and header.get(name, ("", shape))[1] in ((), (1,))
            shapes[name] = header[name][1] if one_scale else shape
            dtypes[name] = FLOATS if dtype == "F32" else (dtype,)
    problems = []
    for what, names in (
        ("missing", [name for name in shapes if name not in header]),
        ("unexpected", [name for name in header if name not in shapes]),
        ("of another shape", [name for name, shape in shapes.items() if name in header and header[name][1] != shape]),
        ("of another dtype", [name for name, ok in dtypes.items() if name in header and header[name][0] not in ok]),
    ):
        if names:
            some = ", ".join(map(shortened, names[:3])) + (", ..." if len(names) > 3 else "")
            problems.append(f"{len(names)} {what} ({some})")
    if problems:
        model = "model" if scheme is None else f"model, quantised to {scheme}"
        raise ValueError(
            f"the checkpoint does not have the {len(shapes)} parameters of this config's {model}: {'; '.join(problems)}"
        )


def _family(params: Mapping[str, Any]) -> tuple[str, str]:
    return FAMILIES.get((params["model_dim"], params["extra_channels"]), ("a model of its own", ""))


def _describe_dit(params: Mapping[str, Any], scheme: str | None = None) -> str:
    """ "Pro (60 visual blocks, dim 4096)" """
    quantised = f", quantised to {scheme}" if scheme else ""
    return f"{_family(params)[0]} ({params['num_visual_blocks']} visual blocks, dim {params['model_dim']}{quantised})"


def _describe_variants(found: Mapping[str, Any], wanted: Mapping[str, Any], scheme: str | None) -> str:
    """ "this file is Pro (60 visual blocks, dim 4096); the config says Lite (32 visual blocks, dim 1792): use ..." """
    config = _family(found)[1]
    if not config or _family(found) == _family(wanted):  # within a family it is some other number that is wrong
        advice = "the config of that checkpoint"
    else:
        advice = f"a config like {config}"
    return (
        f"this file is {_describe_dit(found, scheme)}; the config says {_describe_dit(wanted)}: use {advice}, or "
        "another checkpoint"
    )


# --- what is this? ----------------------------------------------------------------------------------------------------

# What a tensor of it is called -> what a file is; the first that fits.
KINDS = {
    "LoRA": r"\.lora_(A|B|up|down)\.",
    "DiT": rf"^({re.escape(COMFY_PREFIX)})?visual_transformer_blocks\.",
    "video VAE": r"^decoder\.conv_in\.conv\.weight$",
    "image VAE": r"^decoder\.conv_in\.weight$",
    "CLIP": r"(^|\.)embeddings\.token_embedding\.weight$",
    "Qwen2.5-VL": r"(^|\.)embed_tokens\.weight$",
}
_LAYER = re.compile(r"(?P<row>.*\b(layers|blocks))\.(?P<index>\d+)\.(?P<name>.+)")
# How many tensors a published VAE has.
VAE_TENSORS = {"video VAE": 248, "image VAE": 244}


@dataclass(frozen=True)
class Report:
    """What weights are, from their headers alone. `str` of it is for people."""

    path: Path
    kind: str  # one of KINDS, "unknown", or "repository" for a folder of several, which are its `parts`
    variant: str = ""
    task: str = ""
    format: str = ""
    dtype: str = ""
    size: int = 0  # bytes
    configs: tuple[str, ...] = ()  # to use it with
    problems: tuple[str, ...] = ()  # of the parts too
    parts: tuple[Report, ...] = ()

    def __str__(self) -> str:
        lines = [str(self.path)]
        facts = {
            "what": ", ".join(word for word in (self.kind, self.variant) if word),
            "task": self.task,
            "format": self.format,
            "dtype": self.dtype,
            "size": size_text(self.size) if self.size else "",
            "use with": ", ".join(self.configs),
        }
        lines += [f"  {name:9} {value}" for name, value in facts.items() if value]
        told = {problem for part in self.parts for problem in part.problems}
        lines += [f"  WRONG     {problem}" for problem in self.problems if problem not in told]
        return "\n".join([*lines, *(str(part) for part in self.parts)])


def inspect(path: str | Path) -> Report:
    """What a file, a folder or a whole repository of weights is and what is wrong with it. Reads headers only.

    Never raises for what is there: a file that is damaged or missing is a problem in the report. Values are not looked
    at, so a file without problems may still have NaN in it, which shows when it is first used.
    """
    path = home_path(path)
    folders = [path / name for names in FOLDERS.values() for name in names if (path / name).is_dir()]
    parts = tuple(_inspect_weights(place) for folder in folders or [path] for place in _models_in(folder))
    if not folders and len(parts) == 1:
        return parts[0]
    index = _known_json(path / "model_index.json")
    named = [name for name, value in index.items() if isinstance(value, list) and any(value) and name != "scheduler"]
    problems = [f"{path}: no {name}/, which model_index.json names" for name in named if not (path / name).is_dir()]
    return Report(
        path,
        "repository",
        format="diffusers" if index else "",
        size=sum(part.size for part in parts),
        problems=(*problems, *(problem for part in parts for problem in part.problems)),
        parts=parts,
    )


def _models_in(folder: Path) -> list[Path]:
    """The files of a folder that are a model each, as in weights/model/; else the folder, or whatever it is."""
    files = [file for file in sorted(folder.glob("*.safetensors")) if not _SHARD.fullmatch(file.name)]
    usual = any(file.stem in ("model", "diffusion_pytorch_model") for file in files)
    return files if len(files) > 1 and not usual else [folder]


def _inspect_weights(path: Path) -> Report:
    header: Header = {}
    size, problems = 0, []
    try:
        files = find_weights(path)
        for file in files:
            try:
                header |= read_header(file)
                size += file.stat().st_size
            except (ValueError, OSError) as error:
                problems.append(str(error))
    except (ValueError, OSError) as error:
        return Report(path, "unknown", problems=(str(error),))

    kind = next((kind for kind, mark in KINDS.items() if any(re.search(mark, name) for name in header)), "unknown")
    facts: dict[str, Any] = {}
    try:
        if kind == "DiT":
            facts = _inspect_dit(path, header)
        elif kind == "LoRA":
            downs = [shape for name, (_, shape) in header.items() if re.search(r"lora_(A|down)\.", name)]
            ranks = sorted({shape[0] for shape in downs if shape})
            facts = {"variant": f"rank {', '.join(map(str, ranks))}"}
        elif kind != "unknown":
            facts = _inspect_vae(path, kind, header) if "VAE" in kind else _inspect_encoder(path, kind, header)
            # Old files of CLIP have the numbers of its positions in them, which nobody reads.
            check_floats(path, {name: entry for name, entry in header.items() if not name.endswith("position_ids")})
        elif header:
            problems.append(
                f"{path}: no part of Kandinsky 5; it has tensors like {shortened(', '.join(list(header)[:3]))}"
            )
    except ValueError as error:
        problems.append(str(error))
    dtypes = Counter(dtype for dtype, _ in header.values()).most_common()
    infix = re.match(r"(?:diffusion_pytorch_)?model\.([^.-]+)(?:-\d|\.safetensors)", files[0].name)
    words = [
        facts.pop("format", "safetensors"),
        f"{len(files)} shards" if len(files) > 1 else "",
        f"variant {infix[1]}" if infix else "",
    ]
    return Report(
        path,
        kind,
        format=", ".join(word for word in words if word),
        dtype=dtypes[0][0] if len(dtypes) == 1 else ", ".join(f"{dtype} ({count} tensors)" for dtype, count in dtypes),
        size=size,
        problems=(*problems, *facts.pop("problems", ())),
        **facts,
    )


def _inspect_dit(path: Path, header: Header) -> dict[str, Any]:
    params = dit_params_from_header(header)
    problems = []
    try:
        scheme = quantization_from_header(header)
    except ValueError as error:
        scheme = None
        problems.append(f"{path}: {error}")

    # What it has to be: what its name says, else what its weights look like.
    configs = _published_configs(path)
    published = [load_config(REPOSITORY / config) for config in configs]
    config = configs[0] if configs else _family(params)[1]
    if config:
        dit = (published or [load_config(REPOSITORY / config)])[0].model.dit_params
    else:
        own = {name: value for name, value in params.items() if name not in ("head_dim", "extra_channels", "axes_dims")}
        if not all(own.values()) or not params["head_dim"]:
            raise ValueError(f"{path}: a size of 0 in it: damaged, or no DiT")
        dit = DiTConfig(**own, axes_dims=(params["head_dim"], 0, 0), visual_cond=params["extra_channels"])
    try:
        check_dit_header(header, dit)
    except ValueError as error:
        if str(error) not in "".join(problems):
            problems.append(f"{path}: {error}")

    names = " ".join(path.absolute().parts[-3:]).lower()
    task: str
    if published and not problems:
        task = " or ".join(sorted({one.task for one in published}, reverse=True))
    elif "Image" in _family(params)[0]:
        task = "i2i" if params["extra_channels"] else "t2i"
    elif config and (word := re.search("t2v|i2v", names)):
        task = word[0]
    else:
        task = "t2v or i2v" if config else "t2v, i2v or i2i" if params["extra_channels"] else "t2v or t2i"

    written = _known_json(folder_of(path) / "config.json")
    told = {**params, "visual_cond": params["extra_channels"]}
    for name in written.keys() & told.keys():
        value = tuple(written[name]) if isinstance(written[name], list) else written[name]
        if value != told[name]:
            problems.append(
                f"{path}: config.json says {name} {shortened(str(written[name]))}, the weights say {told[name]}"
            )
    comfy = any(name.startswith(COMFY_PREFIX) for name in header)
    return {
        "variant": _describe_dit(params, scheme),
        "task": task,
        "format": "ComfyUI" if comfy else "diffusers" if "_class_name" in written else "original",
        "configs": tuple(configs if configs and not problems else filter(None, [_family(params)[1]])),
        "problems": problems,
    }


def _published_configs(path: Path) -> list[str]:
    """Configs whose checkpoint or repository has a name that is in `path`, also as the hub's cache writes it."""
    words = {part.rpartition("--")[2].removesuffix("-Diffusers") for part in path.absolute().parts[-5:]}
    found = []
    for file in sorted((REPOSITORY / "configs").glob("config_*.yaml")):
        keys = r"^  (?:checkpoint_path|hub_repo): \S*?([^/\s]+)$"
        if words & set(re.findall(keys, file.read_text(encoding="utf-8"), re.MULTILINE)):
            found.append(f"configs/{file.name}")
    return found


def _inspect_vae(path: Path, kind: str, header: Header) -> dict[str, Any]:
    if any(name.startswith("decoder.mid.") for name in header):
        problem = "Flux's original names; what loads is the folder vae/ of black-forest-labs/FLUX.1-dev"
        return {"format": "original", "problems": [f"{path}: {problem}"]}
    conv = "conv_in.conv.weight" if kind == "video VAE" else "conv_in.weight"
    width, latents = (header.get(f"{name}.{conv}", ("", ()))[1] or (0, 0) for name in ("encoder", "decoder"))
    if len(latents) < 2:
        raise ValueError(f"{path}: decoder.{conv} has {len(latents)} axes, which no convolution has")
    problems = [] if (folder_of(path) / "config.json").is_file() else [f"{path}: no config.json beside it"]
    if latents[1] != 16:
        problems.append(f"{path}: {latents[1]} latent channels; Kandinsky 5 has 16")
    if width[0] == 128 and len(header) != VAE_TENSORS[kind]:
        problems.append(f"{path}: {len(header)} tensors; the published one has {VAE_TENSORS[kind]}")
    name = "HunyuanVideo" if kind == "video VAE" else "FLUX.1"
    return {"variant": name if width[0] == 128 else "a small one", "format": "diffusers", "problems": problems}


def _inspect_encoder(path: Path, kind: str, header: Header) -> dict[str, Any]:
    folder, problems = folder_of(path), []
    mark = "embed_tokens.weight" if kind == "Qwen2.5-VL" else "token_embedding.weight"
    embedding = next(name for name in header if name.endswith(mark))
    rows: dict[str, dict[int, set[str]]] = {}
    for match in filter(None, map(_LAYER.fullmatch, header)):
        index = block_index(match["index"], len(header))
        rows.setdefault(match["row"], {}).setdefault(index, set()).add(match["name"])
    layers = 0
    for row, names in rows.items():
        count = 1 + max(names)
        layers = count if "vis" not in row else layers
        every = set().union(*names.values())
        missing = [(i, every - names.get(i, set())) for i in range(count)]
        if number := sum(len(of_block) for _, of_block in missing):
            i, of_block = next(one for one in missing if one[1])
            like = f"{row}.{i}.{min(of_block)}"
            problems.append(f"{path}: {number} tensors are missing, like {shortened(like)}")
    width = header[embedding][1][-1] if header[embedding][1] else 0

    written = _known_json(folder / "config.json")
    text = written["text_config"] if isinstance(written.get("text_config"), dict) else written
    if not written:
        problems.append(f"{path}: no readable config.json beside it")
    for name, value in (("hidden_size", width), ("num_hidden_layers", layers)):
        if text.get(name, value) != value:
            problems.append(f"{path}: config.json says {name} {shortened(str(text[name]))}, the weights say {value}")
    sibling = folder.parent / ("tokenizer" if kind == "Qwen2.5-VL" else "tokenizer_2")
    if not any((place / name).is_file() for place in (folder, sibling) for name in ("tokenizer.json", "vocab.json")):
        problems.append(f"{path}: no tokenizer, neither in {folder} nor in {sibling}")

    published = {("Qwen2.5-VL", 28, 3584): "7B", ("CLIP", 12, 768): "ViT-L/14"}.get((kind, layers, width))
    if kind == "CLIP":
        style = "the whole model" if any(name.startswith("vision_model.") for name in header) else "text model"
    else:
        style = f"names of transformers {5 if 'language_model.' in embedding else 4}"
    return {"variant": published or f"{layers} layers, dim {width}", "format": style, "problems": problems}


def _known_json(path: Path) -> dict[str, Any]:
    """What is in it; empty where there is no such file, or something else in it."""
    try:
        return read_json(path)
    except ValueError:
        return {}


def size_text(size: int) -> str:
    """168000000 -> "168.0 MB", in the units of disks: 1 GB is 1000 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def main(arguments: Sequence[str] | None = None) -> int:
    """python -m kandinsky.checkpoints PATH ...: prints the reports; 1 where something is wrong."""
    show_every_character()
    parser = argparse.ArgumentParser(description="Say what weights are and what is wrong with them.")
    parser.add_argument("path", nargs="+", type=Path, help="a .safetensors file, a folder, or a whole repository")
    reports = [inspect(path) for path in parser.parse_args(arguments).path]
    sys.stdout.write("".join(f"{report}\n" for report in reports))
    return 1 if any(report.problems for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
