"""Our classes of diffusers' names against diffusers' own, from one repository: the same call gives the same latents.

At their defaults but for size and number of steps: their noise levels, rotary scale, normalisation of first frames and
way with pictures. Prompts are handed over as embeddings, because diffusers has other words around them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers_reference import largest_difference, rms
from PIL import Image
from torch import Tensor

import kandinsky
from tests.diffusers_repositories import NABLA, build_parts, crop, write_repository

TASKS = ("t2v", "i2v", "t2i", "i2i")
TOLERANCE = 1e-4
SIZE = {"width": 96, "height": 64}
PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (70, 110, 3), dtype=np.uint8))

pytestmark = pytest.mark.usefixtures("exact_diffusers")


def name_of(task: str) -> str:
    return f"Kandinsky5{task.upper()}Pipeline"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Any, Any]]]:
    """For each task our pipeline and theirs."""
    found = {}
    for task in TASKS:
        parts = build_parts(task, shift=3.0 if task.endswith("2i") else 7.0)  # whatever a repository says
        folder = write_repository(tmp_path_factory.mktemp(task) / "repository", task, parts)
        ours = getattr(kandinsky, name_of(task)).from_pretrained(folder, overrides=crop(task))
        missing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        theirs = getattr(diffusers, name_of(task))(**parts, **missing)
        for pipe in (ours, theirs):
            pipe.set_progress_bar_config(disable=True)
            if task.endswith("2i"):
                pipe.resolutions = [(96, 64), (64, 96)]
        found[task] = ours, theirs
    yield found


def embeds(batch: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    found = {}
    for begin, length in (("", 9), ("negative_", 6)):
        found[f"{begin}prompt_embeds_qwen"] = torch.randn((batch, length, 128), generator=generator)
        found[f"{begin}prompt_embeds_clip"] = torch.randn((batch, 128), generator=generator)
        found[f"{begin}prompt_cu_seqlens"] = (torch.arange(batch + 1) * length).to(torch.int32)
    return found


def arguments(task: str, **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {**SIZE, "num_inference_steps": 4, "output_type": "latent", **embeds()}
    given |= {"num_frames": 17} if task.endswith("v") else {}  # five latent frames: normalisation has work to do
    given |= {"image": PICTURE} if task.startswith("i") else {}
    return given | more


def both(pair: tuple[Any, Any], given: dict[str, Any], seeds: tuple[int, ...] = (11,)) -> tuple[Any, Any]:
    results = []
    for pipe in pair:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        results.append(pipe(**given, generator=generators[0] if len(seeds) == 1 else generators)[0])
    return results[0], results[1]


@pytest.mark.parametrize("task", TASKS)
def test_latents(task: str, pairs: dict[str, tuple[Any, Any]]) -> None:
    ours, theirs = both(pairs[task], arguments(task))
    assert ours.shape == theirs.shape == (1, 5 if task.endswith("v") else 1, 8, 12, 16) and rms(ours) > 0.1
    assert largest_difference(ours, theirs) <= TOLERANCE


def test_latents_at_a_size_of_sd(pairs: dict[str, tuple[Any, Any]]) -> None:
    """Where both sides are between 480 and 854 the rotary scale is another one."""
    given = arguments("t2v", width=480, height=512, num_frames=5, num_inference_steps=2, guidance_scale=1.0)
    ours, theirs = both(pairs["t2v"], given)
    assert largest_difference(ours, theirs) <= TOLERANCE
    assert pairs["t2v"][0].pipeline.config.metrics.scale_factor == (1, 2, 2)


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5])
def test_guidance(scale: float, pairs: dict[str, tuple[Any, Any]]) -> None:
    """Below 1 there is none, as there."""
    ours, theirs = both(pairs["t2i"], arguments("t2i", guidance_scale=scale))
    assert largest_difference(ours, theirs) <= TOLERANCE


def test_shapes_and_frames_are_rounded_as_theirs(pairs: dict[str, tuple[Any, Any]]) -> None:
    ours, theirs = both(pairs["t2i"], arguments("t2i", width=100, height=160))
    assert ours.shape == theirs.shape == (1, 1, 12, 8, 16)
    assert largest_difference(ours, theirs) <= TOLERANCE
    ours, theirs = both(pairs["t2v"], arguments("t2v", num_frames=12))
    assert ours.shape == theirs.shape == (1, 4, 8, 12, 16)
    assert largest_difference(ours, theirs) <= TOLERANCE
    given = arguments("i2i")
    del given["width"], given["height"]
    ours, theirs = both(pairs["i2i"], given)
    assert largest_difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("seeds", [(11,), (11, 23)])
def test_several_outputs(seeds: tuple[int, ...], pairs: dict[str, tuple[Any, Any]]) -> None:
    """One generator draws for all of them at once; of a list each draws for its own."""
    for task in ("t2v", "t2i"):
        given = arguments(task, guidance_scale=1.0, **embeds(2))
        ours, theirs = both(pairs[task], given, seeds)
        assert len(ours) == 2 and rms(ours[0] - ours[1]) > 0.1
        assert largest_difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("task", TASKS)
def test_prepared_latents(task: str, pairs: dict[str, tuple[Any, Any]]) -> None:
    """The same from both, and both take what the other has prepared."""
    ours, theirs = pairs[task]
    options: dict[str, Any] = {"batch_size": 1, **SIZE, "dtype": torch.float32, "device": "cpu"}
    options |= {"num_frames": 17} if task.endswith("v") else {}
    options |= {"image": PICTURE} if task.startswith("i") else {}
    mine, yours = (pipe.prepare_latents(**options, generator=torch.Generator().manual_seed(2)) for pipe in pairs[task])
    assert mine.shape == yours.shape and mine.shape[-1] == (16 if task == "t2i" else 33)
    assert largest_difference(mine, yours) <= 1e-5
    given = arguments(task)
    result = ours(**given, latents=yours.clone())[0]
    expected = theirs(**given, latents=mine.clone())[0]
    assert largest_difference(result, expected) <= TOLERANCE


@pytest.mark.parametrize("visual_cond", ["zeros", "image"])
def test_visual_cond(
    visual_cond: str, pairs: dict[str, tuple[Any, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """zeros is the pinned diffusers, image what it did up to 0.39: the picture in the condition channels too."""
    _, theirs = pairs["i2v"]
    parts = {name: getattr(theirs, name) for name in ("transformer", "vae", "scheduler")}
    folder = write_repository(tmp_path / "repository", "i2v", parts)
    overrides = [*crop("i2v"), f"generation.visual_cond={visual_cond}"]
    ours = kandinsky.Kandinsky5I2VPipeline.from_pretrained(folder, overrides=overrides)
    if visual_cond == "image":
        prepare = type(theirs).prepare_latents

        def with_picture(self: Any, **options: Any) -> Tensor:
            latents = prepare(self, **options)
            latents[:, 0:1, ..., 16:32] = latents[:, 0:1, ..., :16]
            return latents

        monkeypatch.setattr(type(theirs), "prepare_latents", with_picture)
    result, expected = both((ours, theirs), arguments("i2v"))
    assert largest_difference(result, expected) <= TOLERANCE
    zeros, _ = both(pairs["i2v"], arguments("i2v"))
    assert (rms(result - zeros) > 1e-3) == (visual_cond == "image")


def test_callbacks(pairs: dict[str, tuple[Any, Any]]) -> None:
    """Both see the same at the same steps, and take what is returned."""
    seen: list[list[Any]] = []

    def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        own.append((step, float(timestep), {name: tensor.clone() for name, tensor in tensors.items()}))
        assert pipe.num_timesteps == 4 and pipe.guidance_scale == 5.0
        if step == 1:
            latents = tensors["latents"].clone()
            latents[:, 1:, ..., :16] *= 0.5
            return {"latents": latents, "prompt_embeds_clip": tensors["prompt_embeds_clip"] + 1}
        return {}

    results = []
    for pipe in pairs["i2v"]:
        own: list[Any] = []
        seen.append(own)
        names = ["latents", "prompt_embeds_qwen", "prompt_embeds_clip", "negative_prompt_embeds_qwen"]
        results.append(
            pipe(
                **arguments("i2v"),
                generator=torch.Generator().manual_seed(1),
                callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=names,
            )[0]
        )
    assert largest_difference(*results) <= TOLERANCE
    for (step, timestep, ours), (their_step, their_timestep, theirs) in zip(*seen, strict=True):
        assert step == their_step and timestep == pytest.approx(their_timestep, abs=1e-3) and set(ours) == set(theirs)
        for name in ours:
            assert largest_difference(ours[name], theirs[name]) <= TOLERANCE, name


def test_interrupted(pairs: dict[str, tuple[Any, Any]]) -> None:
    def stop(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return {}

    ours, theirs = both(pairs["t2i"], arguments("t2i", callback_on_step_end=stop))
    whole, _ = both(pairs["t2i"], arguments("t2i"))
    assert largest_difference(ours, theirs) <= TOLERANCE and rms(ours - whole) > 0.01


def test_pictures(pairs: dict[str, tuple[Any, Any]]) -> None:
    """Decoded: float arrays, tensors and PIL pictures alike."""
    for output_type in ("np", "pt", "pil"):
        given = arguments("t2i", num_inference_steps=2, output_type=output_type)
        ours, theirs = both(pairs["t2i"], given)
        assert type(ours) is type(theirs)
        assert np.abs(np.asarray(ours[0], dtype=float) - np.asarray(theirs[0], dtype=float)).max() <= (
            1 if output_type == "pil" else 1e-4
        )


def test_sparse_parameters(tmp_path: Path, pairs: dict[str, tuple[Any, Any]]) -> None:
    parts = build_parts("t2v", attention=NABLA)
    folder = write_repository(tmp_path / "repository", "t2v", parts)
    ours = kandinsky.Kandinsky5T2VPipeline.from_pretrained(folder, overrides=crop("t2v"))
    missing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    theirs = diffusers.Kandinsky5T2VPipeline(**parts, **missing)
    sample = torch.zeros(1, 5, 32, 48, 16)
    mine, yours = ours.get_sparse_params(sample, "cpu"), theirs.get_sparse_params(sample, "cpu")
    assert mine is not None and mine.keys() == yours.keys()
    assert torch.equal(mine.pop("sta_mask"), yours.pop("sta_mask")) and mine == yours
    assert torch.equal(ours.fast_sta_nabla(3, 4, 2, device="cpu"), theirs.fast_sta_nabla(3, 4, 2, device="cpu"))
    assert pairs["t2v"][0].get_sparse_params(sample, "cpu") is None
    for name, value in vars(ours.transformer.config).items():
        their_value = theirs.transformer.config[name]
        assert value == (tuple(their_value) if isinstance(value, tuple) else their_value), name
