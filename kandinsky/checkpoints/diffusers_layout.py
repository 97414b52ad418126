"""A repository in diffusers' layout: which files of it are read, and which of our variants it is.

    model_index.json, scheduler/scheduler_config.json, transformer/, vae/, text_encoder/, text_encoder_2/, tokenizer/,
    tokenizer_2/

Its own JSON goes before our YAML: sizes and attention of the DiT, the shift, the text encoders' widths. From the YAML
comes what it does not say. Knows names and JSON; knows no torch, and reads no tensor.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kandinsky.checkpoints.dit_layout import check_dit_header
from kandinsky.checkpoints.files import FOLDERS, REPOSITORY, find_weights, folder_of
from kandinsky.checkpoints.formats import read_weights_header
from kandinsky.common.given import shown
from kandinsky.common.untrusted import is_plain_name, read_json
from kandinsky.config.reading import load_config
from kandinsky.config.schema import Config

logger = logging.getLogger(__name__)

# What is fetched: folder -> patterns, of which each is there in every published repository.
WEIGHTS = ("*.json", "*.safetensors")
FILES: dict[str, tuple[str, ...]] = {
    "": ("model_index.json",),
    "scheduler": ("scheduler_config.json",),
    "transformer": WEIGHTS,
    "vae": WEIGHTS,
    "text_encoder": WEIGHTS,
    "text_encoder_2": WEIGHTS,
    "tokenizer": ("*",),
    "tokenizer_2": ("*",),
}
BASES = {"t2v": "5s_sft", "i2v": "5s_i2v", "t2i": "t2i", "i2i": "i2i"}  # configs of repositories that are nobody's
SIZES = (
    *("in_visual_dim", "out_visual_dim", "in_text_dim", "in_text_dim2", "time_dim", "patch_size", "model_dim"),
    *("ff_dim", "num_text_blocks", "num_visual_blocks", "axes_dims"),
)
ATTENTION = ("P", "wT", "wH", "wW", "add_sta", "method")
VAES = {"AutoencoderKLHunyuanVideo": ("t2v", "i2v"), "AutoencoderKL": ("t2i", "i2i")}
# Settings of a scheduler that change its noise levels, and the value with which they don't.
SCHEDULER = {
    "use_dynamic_shifting": False, "shift_terminal": None, "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "use_beta_sigmas": False, "invert_sigmas": False, "stochastic_sampling": False, "num_train_timesteps": 1000,
}  # fmt: skip


def published_shift(path: str | Path) -> float | None:
    """The shift in scheduler/scheduler_config.json beside the folder of a DiT; None where there is none to read."""
    file = folder_of(Path(path)).parent / "scheduler" / "scheduler_config.json"
    try:
        shift = read_json(file).get("shift") if file.is_file() else None
    except ValueError:
        return None
    return float(shift) if isinstance(shift, int | float) and not isinstance(shift, bool) else None


def tell_shift(path: str | Path, config: Config) -> None:
    """Say so where the repository that a DiT lies in has another shift than the config."""
    shift, ours = published_shift(path), config.metrics.scheduler_scale
    if shift is not None and shift != ours:
        logger.info(
            "scheduler_config.json beside %s has the shift %g, and %s has %g, which is used: "
            "metrics.scheduler_scale=%g takes the other",
            *(path, shift, config.source, ours, shift),
        )


def is_complete(folder: Path) -> bool:
    """Whether every part of a repository has its weights there."""
    try:
        for names in FOLDERS.values():
            find_weights(folder / names[0])
    except ValueError:
        return False
    return True


def config_of(folder: str | Path, task: str, name: str = "", overrides: Sequence[str] = ()) -> Config:
    """What a repository on this machine is, as a config for `task`.

    name: what the hub calls it, where that is known; else the folder's name says which variant it may be. overrides go
    before all that the repository says.

    Raises ValueError where it is another task's, or asks for what isn't done here.
    """
    folder = Path(folder)
    dit, vae = _described(folder, "transformer"), _described(folder, "vae")
    kind = vae.get("_class_name")
    tasks = VAES.get(kind, (task,)) if isinstance(kind, str) else (task,)
    if tasks[0] == "t2i":
        tasks = ("i2i" if dit.get("visual_cond") else "t2i",)
    if task not in tasks:
        classes = " or ".join(f"Kandinsky5{one.upper()}Pipeline" for one in tasks)
        raise ValueError(f"{folder} is no repository for {task}: load it with {classes}")

    settings: dict[str, Any] = {f"model.dit_params.{key}": dit[key] for key in SIZES if key in dit}
    conditioned = bool(dit.get("visual_cond", False))
    settings["model.dit_params.visual_cond"] = conditioned and task != "i2i"
    settings["model.dit_params.instruct_type"] = "channel" if conditioned and task == "i2i" else None
    is_nabla = dit.get("attention_type") == "nabla"
    settings["model.attention.type"] = "nabla" if is_nabla else "full"
    if is_nabla:
        found = {key: dit[f"attention_{key}"] for key in ATTENTION if f"attention_{key}" in dit}
        settings |= {f"model.attention.{key}": value for key, value in found.items()}
    for key, encoder in (("in_text_dim", "qwen"), ("in_text_dim2", "clip")):
        if key in dit:
            settings[f"model.text_embedder.{encoder}.emb_size"] = dit[key]
    clip = _described(folder, "text_encoder_2")
    positions = (clip["text_config"] if isinstance(clip.get("text_config"), dict) else clip).get(
        "max_position_embeddings"
    )
    if isinstance(positions, int) and positions < 77:
        settings["model.text_embedder.clip.max_length"] = positions

    base = _base(task, name or folder.name, is_nabla)
    settings |= _scheduler(folder, base)
    settings |= {"generation.schedule": "diffusers", "generation.first_frame_statistics": "together"}
    texts = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    try:
        return load_config(base, [*texts, *overrides])
    except ValueError as error:
        raise ValueError(f"{folder} is no such repository as ours ({error})") from None


def _described(folder: Path, part: str) -> dict[str, Any]:
    try:
        return read_json(folder / part / "config.json")
    except ValueError as error:
        raise ValueError(
            f"{error}; a repository in diffusers' layout has it: give its name on the hub, or a folder of one"
        ) from None


def scheduler_shift(values: Mapping[str, Any], what: str | Path) -> Any:
    """The shift of a scheduler's config. Raises ValueError for schedulers that do more than shift."""
    kind = values.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    if kind != "FlowMatchEulerDiscreteScheduler":
        raise ValueError(f"{what} asks for {shown(kind)}; here is FlowMatchEulerDiscreteScheduler only")
    for key, value in SCHEDULER.items():
        if (found := values.get(key, value)) != value and not (value is False and found is None):
            raise ValueError(f"{what} has {key} = {shown(found)}; here it can only be {value}")
    return values.get("shift", 1.0)  # what that scheduler takes where nothing is said


def _scheduler(folder: Path, base: Path) -> dict[str, Any]:
    """The shift that a repository asks for; nothing where it has no scheduler."""
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return {}
    shift, ours = scheduler_shift(read_json(file), file), load_config(base).metrics.scheduler_scale
    if shift != ours:
        logger.info("%s has the shift %s, which is used; our %s has %g", file, shown(shift), base.name, ours)
    return {"metrics.scheduler_scale": shift}


def _base(task: str, name: str, is_nabla: bool) -> Path:
    """Our config of the repository that is called `name`; of several the one with its attention."""
    wanted = _plain(name)
    found = []
    for path in sorted((REPOSITORY / "configs").glob("config_*.yaml")):
        text = path.read_text(encoding="utf-8")
        repo = next((line.split()[1] for line in text.splitlines() if line.startswith("  hub_repo: ")), "")
        if repo and _plain(repo) == wanted and f"\ntask: {task}\n" in text:
            found.append(("type: nabla" in text, path))
    fitting = [path for nabla, path in found if nabla == is_nabla] or [path for _, path in found]
    return fitting[0] if fitting else REPOSITORY / "configs" / f"config_{BASES[task]}.yaml"


def _plain(name: str) -> str:
    """Of a repository's name what tells variants apart: fine-tuned image models are called with and without sft."""
    return name.rstrip("/").rpartition("/")[2].lower().removesuffix("-diffusers").replace("i-lite-sft", "i-lite")


# --- weights ----------------------------------------------------------------------------------------------------------


def part_paths(folder: Path, variant: str | None = None) -> dict[str, Path]:
    """Where each part's weights are; with a variant those with this infix, where a part has such.

    Raises ValueError where the transformer has none.
    """
    paths = {part: folder / names[0] for part, names in FOLDERS.items()}
    if variant is None:
        return paths
    if not is_plain_name(variant):
        raise ValueError(f"variant is {shown(variant)}; it must be an infix like 'fp16'")
    for part, path in paths.items():
        named = [*path.glob(f"*.safetensors.index.{variant}.json"), *path.glob(f"*.{variant}.safetensors")]
        if len(named) == 1:
            paths[part] = named[0]
        elif part == "dit":
            raise ValueError(f"{path} has {len(named)} weights of the variant {variant}: leave it out")
    return paths


def check_weights(paths: Mapping[str, Path], config: Config) -> None:
    """Raise ValueError where weights are missing or damaged, or the transformer's not what its config.json says."""
    for part, path in paths.items():
        header = {name: entry for file in find_weights(path) for name, entry in read_weights_header(file).items()}
        if part == "dit":
            try:
                check_dit_header(header, config.model.dit_params)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
