"""Which weights a node loads: the config's in this clone, or files in ComfyUI's model folders."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from kandinsky.checkpoints.files import REPOSITORY, WEIGHTS_PREFIX, resolve_path
from kandinsky.config.schema import Config

CONFIGS = REPOSITORY / "configs"
CACHE_DIR = REPOSITORY / "weights"  # what ./weights/ in a config stands for, wherever ComfyUI was started
AUTO = "auto"
# ComfyUI's folder for each argument of load_pipeline.
FOLDERS = {
    "dit_path": "diffusion_models",
    "text_encoder_path": "text_encoders",
    "text_encoder2_path": "text_encoders",
    "vae_path": "vae",
}


def config_names() -> list[str]:
    """The variants that there are, by the names of their YAMLs."""
    return sorted(path.stem.removeprefix("config_") for path in CONFIGS.glob("config_*.yaml"))


def config_path(name: str) -> Path:
    return CONFIGS / f"config_{name}.yaml"


def choices(argument: str) -> list[str]:
    """What a person may choose for a part: AUTO, or a file in ComfyUI's folder for it."""
    return [AUTO, *folder_paths.get_filename_list(FOLDERS[argument])]


def find(argument: str, choice: str, config: Config) -> Path | None:
    """Where a part is, None: where the config says.

    AUTO takes what the config names, and where that is not in the clone, the same file or folder in ComfyUI's folder.
    Raises ValueError for a choice that is gone.
    """
    folder = FOLDERS[argument]
    if choice != AUTO:
        return _part(argument, _full_path(folder, choice))
    model = config.model
    stored = {
        "dit_path": model.checkpoint_path,
        "text_encoder_path": model.text_embedder.qwen.checkpoint_path,
        "text_encoder2_path": model.text_embedder.clip.checkpoint_path,
        "vae_path": model.vae.checkpoint_path,
    }[argument]
    path = resolve_path(stored, config, CACHE_DIR)
    if path.exists():
        return None
    parts = Path(stored).parts
    wanted = Path(*parts[1:]) if parts[0] == WEIGHTS_PREFIX else Path(*parts)
    for name in map(Path, folder_paths.get_filename_list(folder)):
        if name.name == wanted.name or name.parent == wanted:
            return _part(argument, _full_path(folder, str(name)))
    return None


def lora_path(name: str) -> Path:
    """A file in ComfyUI's `loras`. Raises ValueError where it is gone."""
    return _full_path("loras", name)


def fingerprint(*paths: Path) -> str:
    """What changes when one of the files does."""
    facts = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths if path.exists()]
    return repr(facts)


def _full_path(folder: str, name: str) -> Path:
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise ValueError(f"there is no {name} in ComfyUI's folder {folder} any more: choose another file")
    return Path(path)


def _part(argument: str, file: Path) -> Path:
    """The file; of encoders and VAEs in a folder of their own, that folder, where their config.json and shards are."""
    is_folder = argument != "dit_path" and (file.parent / "config.json").is_file()
    return file.parent if is_folder else file
