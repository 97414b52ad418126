"""What a file or a folder of weights is and what is wrong with it, in words: `python -m kandinsky.checkpoints PATH`.

Reads headers and configs; knows no torch and reads no tensor.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kandinsky.checkpoints.dit_layout import (
    COMFY_PREFIX,
    _describe_dit,
    _family,
    block_index,
    check_dit_header,
    check_floats,
    dit_params_from_header,
    packed_weight,
    quantization_from_header,
    unpacked_shapes,
)
from kandinsky.checkpoints.encoder_config import CLIP, QWEN, encoder_config
from kandinsky.checkpoints.files import _SHARD, FOLDERS, REPOSITORY, find_weights, folder_of
from kandinsky.checkpoints.formats import read_weights_header
from kandinsky.checkpoints.gguf_file import BLOCKS, is_gguf
from kandinsky.checkpoints.headers import BITS as BITS
from kandinsky.checkpoints.headers import Header, read_header
from kandinsky.checkpoints.lora_tensors import describe_lora
from kandinsky.checkpoints.tiny_decoder import Kind, tiny_layout
from kandinsky.common.command_line import show_every_character
from kandinsky.common.given import shortened
from kandinsky.common.untrusted import home_path, read_json
from kandinsky.config.reading import load_config
from kandinsky.config.schema import DiTConfig

# What a tensor of it is called -> what a file is; the first that fits.
KINDS = {
    "LoRA": r"\.(lora_(A|B|up|down)|hada_w\d_[ab]|lokr_w\d)|[._]lora(_linear_layer)?\.(up|down)\.",
    "DiT": rf"^({re.escape(COMFY_PREFIX)})?visual_transformer_blocks\.",
    "video VAE": r"^decoder\.conv_in\.conv\.weight$",
    "image VAE": r"^decoder\.conv_in\.weight$",
    "tiny decoder": r"^(decoder\.(layers\.)?)?\d+\.conv\.\d\.weight$",
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
                header |= read_weights_header(file)
                size += file.stat().st_size
            except (ValueError, OSError) as error:
                problems.append(str(error))
    except (ValueError, OSError) as error:
        return Report(path, "unknown", problems=(str(error),))

    # A packed weight by its own name; what scales it is none of its own.
    shapes = unpacked_shapes(header)
    plain = {name: (header.get(name, ("F32", ()))[0], shape) for name, shape in shapes.items()}
    kind = next((kind for kind, mark in KINDS.items() if any(re.search(mark, name) for name in plain)), "unknown")
    facts: dict[str, Any] = {}
    try:
        if kind == "DiT":
            facts = _inspect_dit(path, header)
        elif kind == "LoRA":
            facts = {"variant": describe_lora(header)}
        elif kind == "tiny decoder":
            facts = _inspect_tiny(path, header)
        elif kind != "unknown":
            facts = _inspect_vae(path, kind, header) if "VAE" in kind else _inspect_encoder(path, kind, plain)
            if "VAE" in kind:  # which is read as it is in the file, see loading/vae.py
                plain = {name: entry for file in files for name, entry in read_header(file).items()}
            # Old files of CLIP have the numbers of its positions in them, which nobody reads.
            check_floats(path, {name: entry for name, entry in plain.items() if not name.endswith("position_ids")})
        elif header:
            problems.append(
                f"{path}: no part of Kandinsky 5; it has tensors like {shortened(', '.join(list(header)[:3]))}"
            )
    except ValueError as error:
        problems.append(str(error))
    dtypes = Counter(_stored_dtype(name, dtype) for name, (dtype, _) in header.items()).most_common()
    infix = re.match(r"(?:diffusion_pytorch_)?model\.([^.-]+)(?:-\d|\.safetensors)", files[0].name)
    words = [
        "GGUF" if is_gguf(files[0]) else facts.pop("format", "safetensors"),
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
        **{name: value for name, value in facts.items() if name != "format"},
    )


def _stored_dtype(name: str, dtype: str) -> str:
    """What a tensor is in, for people: of GGUF's blocks which they are, and not that they are bytes."""
    _, scheme = packed_weight(name) or ("", "")
    return scheme.upper() if scheme in BLOCKS else dtype


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
        names = re.findall(keys, file.read_text(encoding="utf-8"), re.MULTILINE)
        if words & {name.removesuffix("-Diffusers") for name in names}:
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


def _inspect_tiny(path: Path, header: Header) -> dict[str, Any]:
    """Of videos if one of its blocks sees two frames, as only a video's do."""
    first = next((header[name][1] for name in header if re.search(r"\b3\.conv\.0\.weight$", name)), ())
    kind: Kind = "video" if len(first) == 4 and first[1] == 2 * first[0] else "image"
    layout = tiny_layout(header, kind, path)
    task = "t2v or i2v" if kind == "video" else "t2i or i2i"
    return {"variant": f"{kind}, {layout.parameters / 1e6:.1f} M parameters", "task": task}


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
        try:
            encoder_config(path, QWEN if kind == "Qwen2.5-VL" else CLIP)
        except ValueError:
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
    parser = argparse.ArgumentParser(
        prog="python -m kandinsky.checkpoints", description="Say what weights are and what is wrong with them."
    )
    parser.add_argument("path", nargs="+", type=Path, help="a .safetensors or .gguf file, or a folder")
    reports = [inspect(path) for path in parser.parse_args(arguments).path]
    sys.stdout.write("".join(f"{report}\n" for report in reports))
    return 1 if any(report.problems for report in reports) else 0
