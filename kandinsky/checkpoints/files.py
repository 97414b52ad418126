"""Which weight files a variant needs, and where they are.

What a file's header says is headers.py's business, whether it is the right model dit_layout.py's. This module does not
know torch and opens no weights.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kandinsky.checkpoints.gguf_file import is_gguf
from kandinsky.checkpoints.headers import BITS as BITS
from kandinsky.checkpoints.headers import PICKLE_SUFFIXES, refuse_pickle, why_absent
from kandinsky.common.given import MISSING, why_no_file
from kandinsky.common.untrusted import home_path, is_plain_name, read_json
from kandinsky.config.schema import Config

REPOSITORY = Path(__file__).resolve().parents[2]
WEIGHTS_PREFIX = "weights"  # paths in configs start with ./weights/, which the user's cache_dir stands for
# Where the parts of a model are in a published repository, in diffusers' layout and in the original's.
FOLDERS = {
    "dit": ("transformer", "model"),
    "vae": ("vae",),
    "text_encoder": ("text_encoder",),
    "text_encoder2": ("text_encoder_2", "text_encoder2"),
}
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")
_INDEX = re.compile(r".+\.safetensors\.index(\.[^.]+)?\.json")  # diffusers puts a variant's infix behind "index"

# The published tiny decoders, as download_models.py calls them, by the name of the VAE that they stand for.
TINY_DECODERS = {"hunyuan": "taehv", "flux": "taef1"}

TINY_COMMAND = "python test.py --config configs/config_tiny_t2v.yaml"


def find_weights(path: str | Path) -> list[Path]:
    """The files behind a path: a file, or a folder with one safetensors file or with an index of shards.

    Names may have a variant's infix (model.fp16.safetensors); where a folder has the same without it, that one is it.
    Raises ValueError where there are none, only pickles, missing shards, or several files to choose from.
    """
    path = Path(path)
    refuse_pickle(path)
    if path.is_file():
        if _INDEX.fullmatch(path.name):
            return _shards(path)
        if path.suffix != ".safetensors" and not is_gguf(path):
            raise ValueError(f"{path}: not a .safetensors file")
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: {why_absent(path, 'file or folder')}")

    for stem in ("diffusion_pytorch_model", "model"):
        if os.path.lexists(path / f"{stem}.safetensors"):  # what is wrong with a link is told by who opens it
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


def tiny_decoder_path(config: Config, cache_dir: str | Path = "./weights/") -> Path | None:
    """The file of the tiny decoder that a run with this config uses; None where it uses none.

    It decodes the result where the config says so, whether or not its file is there, and makes the previews where
    there are previews and its file is there. Raises ValueError where the config names none, and for a pickle.
    """
    vae = config.model.vae
    decodes = vae.decoder == "tiny"
    if vae.tiny_path is None:
        if decodes:
            raise ValueError("model.vae.decoder is tiny, and the config has no model.vae.tiny_path: name a file there")
        return None
    path = resolve_path(vae.tiny_path, config, cache_dir)
    if not decodes and (config.runtime.preview is None or not path.is_file()):
        return None
    if path.suffix.lower() in PICKLE_SUFFIXES:
        code = "import sys, torch, safetensors.torch as s; s.save_file(torch.load(sys.argv[1]), sys.argv[2])"
        words = shlex.join([str(path), str(path.with_suffix(".safetensors"))])
        raise ValueError(
            f"{path}: safetensors only; a {path.suffix} file is a pickle. Convert it, and name the result in "
            f"model.vae.tiny_path: python -c '{code}' {words}"
        )
    return path


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
