"""Every published repository, with tiny tensors, from a hub on this machine: fetched, inspected, run, in all layouts.

diffusers writes its own layouts, and is here nothing but the oracle for them. Weights are multiples of 1/128, which
float32, float16 and bfloat16 all hold: so all layouts have to give the same numbers to the last bit.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import json
import logging
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file
from torch import Tensor

import download_models
from kandinsky.checkpoints import hub
from kandinsky.checkpoints.diffusers_layout import FILES
from kandinsky.checkpoints.dit_layout import COMFY_PREFIX, expected_dit_shapes
from kandinsky.checkpoints.inspect import inspect
from kandinsky.config.reading import load_config
from kandinsky.config.schema import Config
from kandinsky.loading.assemble import load_pipeline
from kandinsky.loading.dit import load_dit
from kandinsky.pipelines.base import Pipeline
from tests.hub_stand_in import TOKEN, HubStandIn, Repo, point_client_at, running_hub

diffusers = pytest.importorskip("diffusers")

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem.removeprefix("config_") for path in (REPOSITORY / "configs").glob("config_*.yaml"))
NAMES = [name for name in NAMES if not name.startswith("tiny")]
FLUX, VIDEO_VAE = "black-forest-labs/FLUX.1-dev", "hunyuanvideo-community/HunyuanVideo"
QWEN, CLIP = "Qwen/Qwen2.5-VL-7B-Instruct", "openai/clip-vit-large-patch14"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
# How diffusers may have saved a transformer: arguments of save_pretrained, and the dtype.
SAVED: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "one file": ({}, torch.float32),
    "shards": ({"max_shard_size": "300KB"}, torch.float32),
    "bf16": ({"variant": "bf16"}, torch.bfloat16),
    "fp16 shards": ({"variant": "fp16", "max_shard_size": "150KB"}, torch.float16),
}
State = dict[str, Tensor]


def config_of(name: str, *more: str) -> Config:
    """The published config, but for sizes: those of the tiny encoders, and a small DiT."""
    tiny = load_config(REPOSITORY / "configs" / f"config_tiny_{name[:3] if is_image(name) else 't2v'}.yaml")
    encoders = tiny.model.text_embedder
    dit = {"in_text_dim": 128, "in_text_dim2": 128, "time_dim": 32, "model_dim": 64, "ff_dim": 64}
    dit |= {"num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": "[8,12,12]"}
    settings = {f"model.dit_params.{key}": value for key, value in dit.items()} | {
        "model.num_steps": 1,
        "model.text_embedder.qwen.emb_size": 128,
        "model.text_embedder.qwen.crop": encoders.qwen.crop,
        "model.text_embedder.clip.emb_size": 128,
        "model.text_embedder.clip.max_length": encoders.clip.max_length,
        "generation.width": 128,
        "generation.height": 128,
        "generation.resolutions": "[[128,128],[32,32]]" if name.startswith("t2i") else "[[128,128]]",
    }
    overrides = [*(f"{key}={value}" for key, value in settings.items()), *more]
    return load_config(REPOSITORY / "configs" / f"config_{name}.yaml", overrides)


def is_image(name: str) -> bool:
    return name.startswith(("t2i", "i2i"))


def family_of(name: str) -> str:
    return "image" if is_image(name) else "t2v"


def weights_of(config: Config) -> State:
    """Random, of each repository others, bfloat16."""
    generator = torch.Generator().manual_seed(sum(str(config.model.hub_repo).encode()))
    shapes = expected_dit_shapes(config.model.dit_params)
    return {
        name: (0.1 * torch.randn(shape, generator=generator)).mul(128).round().div(128).bfloat16()
        for name, shape in shapes.items()
    }


def save_with_diffusers(state: State, config: Config, folder: Path, style: str) -> None:
    arguments = dataclasses.asdict(config.model.dit_params)
    arguments["visual_cond"] = arguments.pop("instruct_type") == "channel" or arguments["visual_cond"]
    options, dtype = SAVED[style]
    model = diffusers.Kandinsky5Transformer3DModel(**arguments)
    model.load_state_dict(state)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder, **options)


def files_in(folder: Path, prefix: str = "") -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {prefix + path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def shards(state: State) -> dict[str, bytes]:
    """As Qwen is published: two files and their index."""
    halves = {f"model-0000{i}-of-00002.safetensors": sorted(state)[i - 1 :: 2] for i in (1, 2)}
    index = {"metadata": {}, "weight_map": {name: file for file, half in halves.items() for name in half}}
    files = {file: save({name: state[name] for name in half}) for file, half in halves.items()}
    return files | {"model.safetensors.index.json": json.dumps(index).encode()}


def shared_repositories(family: str) -> dict[str, Repo]:
    """What all models of a family need besides their own file, as published."""
    tiny = REPOSITORY / "assets" / "tiny" / family
    qwen = files_in(tiny / "text_encoder")
    qwen |= shards(load_file(tiny / "text_encoder" / "model.safetensors")) | {"generation_config.json": b"{}"}
    qwen.setdefault("preprocessor_config.json", b"{}")
    del qwen["model.safetensors"]
    vae = Repo(files_in(tiny / "vae", "vae/"), gated=family == "image")
    repos = {QWEN: Repo(qwen), CLIP: Repo(files_in(tiny / "text_encoder2"))}
    return repos | {FLUX if family == "image" else VIDEO_VAE: vae}


def diffusers_repository(name: str, state: State, config: Config, folder: Path, style: str) -> Repo:
    """As diffusers has it: encoders with the names of transformers 5, tokenizers in folders of their own."""
    save_with_diffusers(state, config, folder, style)
    files = files_in(folder, "transformer/")
    tiny = REPOSITORY / "assets" / "tiny" / family_of(name)
    for part, tokenizer, source in (
        ("text_encoder", "tokenizer", "text_encoder"),
        ("text_encoder_2", "tokenizer_2", "text_encoder2"),
    ):
        for path, content in files_in(tiny / source).items():
            files[f"{part if path in ('config.json', 'model.safetensors') else tokenizer}/{path}"] = content
        renamed = {}
        for key, tensor in load_file(tiny / source / "model.safetensors").items():
            new = f"model.{key}" if key.startswith("visual.") else key.replace("model.", "model.language_model.", 1)
            renamed[key.removeprefix("text_model.") if part == "text_encoder_2" else new] = tensor
        files[f"{part}/model.safetensors"] = save(renamed)
    files |= files_in(tiny / "vae", "vae/")
    files["scheduler/scheduler_config.json"] = b'{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0}'
    folders = {path.split("/")[0]: ["library", "Class"] for path in files}
    return Repo(files | {"model_index.json": json.dumps({"_class_name": "Kandinsky5T2VPipeline", **folders}).encode()})


def generate(config: Config, folder: Path) -> tuple[Pipeline, Tensor]:
    """A pipeline and latents that it makes."""
    pipe: Any = load_pipeline(config, "cpu", folder)
    side = 128 if pipe.uses_nabla else 32
    given: dict[str, Any] = {"image": PICTURE} if config.task in ("i2v", "i2i") else {}
    given |= {"time_length": 0.2} if config.task in ("t2v", "i2v") else {}
    if config.task != "i2i":  # which has the config's sizes only
        given |= {"width": side, "height": side}
    return pipe, pipe("a red circle", seed=3, progress=False, output_type="latent", **given)


@pytest.fixture(scope="module")
def server() -> Iterator[HubStandIn]:
    with running_hub() as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def configs_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "known_models", functools.cache(hub.known_models))
        yield


@pytest.fixture(scope="module")
def shared() -> dict[str, dict[str, Repo]]:
    return {family: shared_repositories(family) for family in ("t2v", "image")}


def family_name(name: str) -> str:
    images = {"t2i": "Text to Image Lite", "i2i": "Image to Image Lite"}
    return images.get(name[:3], "Pro" if "pro" in name else "Lite")


def in_turn() -> list[Any]:
    """(name, style): one name of each kind for every run of the tests, each saved in another way, then the others."""
    kinds = {}
    for name in NAMES:
        repo = str(config_of(name).model.hub_repo)
        kinds.setdefault((family_name(name), "i2v" in name, repo.endswith("-Diffusers")), name)
    first = list(kinds.values())
    others = [name for name in NAMES if name not in first]
    rows = zip([*first, *others], itertools.cycle(SAVED))
    return [pytest.param(*row, marks=[pytest.mark.exhaustive] * (row[0] in others)) for row in rows]


@pytest.mark.processor
@pytest.mark.parametrize(("name", "style"), in_turn())
def test_downloaded_inspected_and_run_in_all_layouts(
    name: str,
    style: str,
    server: HubStandIn,
    shared: dict[str, dict[str, Repo]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    config = config_of(name)
    state, repo = weights_of(config), str(config.model.hub_repo)
    file = config.model.checkpoint_path.removeprefix("./weights/")
    only_diffusers = repo.endswith("-Diffusers")
    in_diffusers = repo if only_diffusers else repo + ("-sft" if is_image(name) else "") + "-Diffusers"
    server.repos = shared[family_of(name)] | {
        in_diffusers: diffusers_repository(name, state, config, tmp_path / "saved", style)
    }
    if not only_diffusers:
        server.repos[repo] = Repo({file: save(state)})
    point_client_at(server.url, monkeypatch, tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = tmp_path / "weights"

    # The original's layout, as download_models.py fetches it.
    with redirect_stdout(io.StringIO()):
        assert download_models.main(["--models", name, "--cache_dir", str(weights), "--hf_token", TOKEN]) == 0
    report = inspect(weights / file)
    assert report.kind == "DiT" and report.format.startswith("diffusers" if only_diffusers else "original")
    assert only_diffusers or report.dtype == "BF16"
    (problem,) = report.problems  # the name is the published model's, the tensors are small
    assert "a model of its own (2 visual blocks, dim 64)" in problem and f"config says {family_name(name)} (" in problem
    pipe, expected = generate(config, weights)
    # The shift of the repository's scheduler, where it is not the config's, is named.
    assert ("has the shift 5" in caplog.text) == (only_diffusers and config.metrics.scheduler_scale != 5)
    pixels = pipe.decode(expected[:, :1, :4, :4])
    assert expected.isfinite().all() and pixels.shape == (1, 3, 1, 32, 32)

    # A repository of diffusers', given for every part.
    local = tmp_path / in_diffusers.split("/")[1]
    parts = FILES.items()
    hub.download([hub.Source(in_diffusers, folder, names, local / folder) for folder, names in parts], tmp_path)
    report = inspect(local)
    assert [part.kind.split()[-1] for part in report.parts] == ["DiT", "VAE", "Qwen2.5-VL", "CLIP"]
    assert report.format == report.parts[0].format.split(",")[0] == "diffusers"
    assert all(part.kind == "DiT" or not part.problems for part in report.parts)
    paths = ("model.checkpoint_path", "model.vae.checkpoint_path")
    paths += ("model.text_embedder.qwen.checkpoint_path", "model.text_embedder.clip.checkpoint_path")
    from_diffusers = config_of(name, *(f"{path}={local}" for path in paths))
    assert hub.sources(from_diffusers, tmp_path / "nowhere", only_missing=True) == []
    _, found = generate(from_diffusers, tmp_path / "nowhere")
    assert torch.equal(found, expected)

    # Every other layout of the DiT alone.
    save_file({COMFY_PREFIX + key: tensor for key, tensor in state.items()}, tmp_path / "comfy.safetensors")
    assert inspect(tmp_path / "comfy.safetensors").format == "ComfyUI"
    layouts = [tmp_path / "comfy.safetensors", local / "transformer"]
    for other in SAVED.keys() - {style}:
        save_with_diffusers(state, config, tmp_path / other, other)
        layouts.append(tmp_path / other)
        report = inspect(tmp_path / other)
        assert not report.problems and report.format.startswith("diffusers")
        assert ("shards" in report.format) == ("shards" in other) and ("variant" in report.format) == ("16" in other)
    for path in layouts:
        dit = load_dit(path, config.model.dit_params, "cpu", torch.bfloat16)
        assert all(torch.equal(tensor.bfloat16(), state[key]) for key, tensor in dit.state_dict().items()), path
