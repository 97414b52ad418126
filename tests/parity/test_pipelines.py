"""Our four pipelines against diffusers' as a person would compare them: same weights, embeddings, seed and picture.

What is made equal by hand is what the two differ in on purpose. diffusers gets the published models' noise levels
(`OurSigmas`), no rounding to bfloat16 (`exact_diffusers`), and no normalisation of a video's first frames, which the
two define differently; pictures have the size of the result already, because the two resize and crop differently. All
else is each pipeline's own: noise, order of random draws, image latents, conditioning, guidance, steps, decoding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2IPipeline,
    Kandinsky5I2VPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5T2VPipeline,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers_reference import (
    I2I,
    LITE,
    PRO,
    T2I,
    build_image_vae_pair,
    build_pair,
    build_video_vae_pair,
    largest_difference,
    random_text,
    rms,
)
from PIL import Image
from torch import Tensor

from kandinsky.config.reading import load_config
from kandinsky.config.schema import Config, DiTConfig
from kandinsky.pipelines.base import Pipeline
from kandinsky.pipelines.decode import to_uint8
from kandinsky.pipelines.image_to_image import ImageToImagePipeline
from kandinsky.pipelines.image_to_video import ImageToVideoPipeline
from kandinsky.pipelines.text_to_image import TextToImagePipeline
from kandinsky.pipelines.text_to_video import TextToVideoPipeline
from kandinsky.runtime.placement import FixedPlacement
from kandinsky.sampling.conditioning import normalize_first_frames
from kandinsky.text.embeddings import TextEmbeddings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SIZE = (96, 64)  # width, height
NUM_STEPS = 5
TOLERANCE = 1e-4  # on latents after all steps
LATENTS, CONDITION, MASK = slice(0, 16), slice(16, 32), 32  # channels of what the model sees

Text = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    config: str
    params: dict[str, Any]
    ours: type[Pipeline]
    theirs: type[DiffusionPipeline]


TEXT_TO_VIDEO = Task("config_5s_sft.yaml", LITE, TextToVideoPipeline, Kandinsky5T2VPipeline)
IMAGE_TO_VIDEO = Task("config_5s_i2v.yaml", LITE, ImageToVideoPipeline, Kandinsky5I2VPipeline)
TEXT_TO_IMAGE = Task("config_t2i.yaml", T2I, TextToImagePipeline, Kandinsky5T2IPipeline)
IMAGE_TO_IMAGE = Task("config_i2i.yaml", I2I, ImageToImagePipeline, Kandinsky5I2IPipeline)


class OurSigmas(FlowMatchEulerDiscreteScheduler):
    """Their scheduler, asked for N steps, takes the published models' points instead of its own."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        super().set_timesteps(sigmas=torch.linspace(1, 0, num_inference_steps + 1)[:-1].tolist(), device=device)


def small_config(task: Task, size: tuple[int, int] = SIZE, first_frame_normalization: bool = False) -> Config:
    """The task's published config around a small DiT."""
    config = load_config(CONFIGS / task.config)
    generation = dataclasses.replace(
        config.generation,
        width=size[0],
        height=size[1],
        resolutions=(size,),
        first_frame_normalization=first_frame_normalization,
    )
    metrics = config.metrics
    if config.task in ("t2v", "i2v") and min(size) < 480:
        metrics = dataclasses.replace(metrics, scale_factor=(1.0, 3.16, 3.16))  # what diffusers takes for these sizes
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dit_params=DiTConfig(**task.params)),
        metrics=metrics,
        generation=generation,
    )


def build_pipelines(
    task: Task, config: Config, vaes: tuple[Any, Any] = (None, None)
) -> tuple[Pipeline, DiffusionPipeline]:
    """Ours and theirs around DiTs of the same random weights, without text encoders."""
    our_dit, their_dit = build_pair(task.params)
    devices = dict.fromkeys(("dit", "vae", "text_embedder"), torch.device("cpu"))
    ours = task.ours(config, our_dit, SimpleNamespace(), vaes[0] or SimpleNamespace(), FixedPlacement(devices))
    theirs = task.theirs(
        transformer=their_dit,
        vae=vaes[1],
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=OurSigmas(shift=config.metrics.scheduler_scale),
    )
    theirs.set_progress_bar_config(disable=True)
    if hasattr(theirs, "resolutions"):  # image pipelines snap to the sizes in it
        theirs.resolutions = list(config.generation.resolutions)
    return ours, theirs


def call_ours(
    pipeline: Pipeline,
    text: Text,
    *,
    seeds: Sequence[int] = (11,),
    num_steps: int = NUM_STEPS,
    guidance: float | None = None,
    **arguments: Any,
) -> tuple[Any, Tensor]:
    """What the pipeline returns, and all that its model saw: (evaluations, samples, T, H, W, C_in)."""
    seen: list[Tensor] = []
    hook = pipeline.dit.register_forward_pre_hook(lambda _, positional: seen.append(positional[0].clone()))
    result = pipeline(
        prompt_embeds=TextEmbeddings(*text["cond"], None),
        negative_prompt_embeds=TextEmbeddings(*text["uncond"], None),
        seed=list(seeds),
        num_steps=num_steps,
        guidance_weight=guidance,
        progress=False,
        **arguments,
    )
    hook.remove()
    return result, torch.cat(seen).unflatten(0, (-1, len(seeds)))  # sample after sample within an evaluation


def call_theirs(
    pipeline: DiffusionPipeline,
    text: Text,
    *,
    size: tuple[int, int] = SIZE,
    seeds: Sequence[int] = (11,),
    num_steps: int = NUM_STEPS,
    guidance: float | None = None,
    **arguments: Any,
) -> tuple[Any, Tensor]:
    """As `call_ours`."""
    if guidance is not None:  # else each its own default
        arguments["guidance_scale"] = guidance
    for prefix, branch in (("", "cond"), ("negative_", "uncond")):
        embeds, pooled = text[branch]
        lengths = torch.tensor([0] + [embeds.shape[1]] * len(embeds), dtype=torch.int32)
        arguments[f"{prefix}prompt_embeds_qwen"] = embeds
        arguments[f"{prefix}prompt_embeds_clip"] = pooled
        arguments[f"{prefix}prompt_cu_seqlens"] = lengths.cumsum(0, dtype=torch.int32)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    seen: list[Tensor] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["hidden_states"].clone()), with_kwargs=True
    )
    result = pipeline(
        width=size[0],
        height=size[1],
        num_inference_steps=num_steps,
        generator=generators if len(seeds) > 1 else generators[0],
        return_dict=False,
        **arguments,
    )[0]
    hook.remove()
    return result, torch.stack(seen)


def random_picture(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def without_their_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' I2V pipeline hands out its latents as they leave the loop."""
    monkeypatch.setattr(Kandinsky5I2VPipeline, "normalize_first_frame", lambda self, latents: latents)


# --- latents ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [None, 1.0])
@pytest.mark.parametrize("params", [pytest.param(LITE, id="lite"), pytest.param(PRO, id="pro")])
@pytest.mark.usefixtures("exact_diffusers")
def test_text_to_video(params: dict[str, Any], guidance: float | None) -> None:
    task = dataclasses.replace(TEXT_TO_VIDEO, params=params)
    ours, theirs = build_pipelines(task, small_config(task))
    text = random_text(params)
    arguments: dict[str, Any] = {"num_frames": 9, "guidance": guidance, "output_type": "latent"}
    result, inputs = call_ours(ours, text, **arguments)
    expected, their_inputs = call_theirs(theirs, text, **arguments)
    assert result.shape == (1, 3, 8, 12, 16) and rms(result) > 0.1
    assert largest_difference(result, expected) <= TOLERANCE
    assert len(inputs) == (NUM_STEPS if guidance else 2 * NUM_STEPS)
    assert torch.equal(inputs[0], their_inputs[0])  # the very noise
    assert largest_difference(inputs, their_inputs) <= TOLERANCE


@pytest.mark.usefixtures("exact_diffusers")
def test_text_to_video_of_two_prompts() -> None:
    """Of one length, because diffusers lets a shorter prompt's padding be attended to."""
    ours, theirs = build_pipelines(TEXT_TO_VIDEO, small_config(TEXT_TO_VIDEO))
    text = random_text(LITE, batch=2)
    arguments: dict[str, Any] = {"num_frames": 5, "seeds": (11, 23), "output_type": "latent"}
    result, inputs = call_ours(ours, text, **arguments)
    expected, their_inputs = call_theirs(theirs, text, **arguments)
    assert rms(result[0] - result[1]) > 0.1
    assert largest_difference(result, expected) <= TOLERANCE
    assert torch.equal(inputs[0], their_inputs[0])


@pytest.mark.usefixtures("exact_diffusers")
def test_text_to_video_at_a_trained_size() -> None:
    """At 512x512 diffusers takes the rotary scale that the config has."""
    size = (512, 512)
    config = small_config(TEXT_TO_VIDEO, size)
    assert config.metrics.scale_factor == (1.0, 2.0, 2.0)
    ours, theirs = build_pipelines(TEXT_TO_VIDEO, config)
    text = random_text(LITE)
    arguments: dict[str, Any] = {"num_frames": 5, "num_steps": 2, "guidance": 1.0, "output_type": "latent"}
    result, _ = call_ours(ours, text, **arguments)
    expected, _ = call_theirs(theirs, text, size=size, **arguments)
    assert result.shape == (1, 2, 64, 64, 16) and rms(result) > 0.1
    assert largest_difference(result, expected) <= TOLERANCE


@pytest.mark.parametrize("seeds", [(11,), (11, 23)])
@pytest.mark.usefixtures("exact_diffusers", "without_their_normalisation")
def test_image_to_video(seeds: tuple[int, ...]) -> None:
    """Both draw a video's noise first and its image latent from the same generator after it."""
    ours, theirs = build_pipelines(IMAGE_TO_VIDEO, small_config(IMAGE_TO_VIDEO), build_video_vae_pair())
    text = random_text(LITE, batch=len(seeds))
    # Five latent frames: enough for normalisation to do something, were it not switched off.
    arguments: dict[str, Any] = {
        "image": [random_picture(seed) for seed in seeds],
        "num_frames": 17,
        "seeds": seeds,
        "output_type": "latent",
    }
    result, inputs = call_ours(ours, text, **arguments)
    expected, their_inputs = call_theirs(theirs, text, **arguments)
    assert result.shape == (len(seeds), 5, 8, 12, 16) and rms(result[:, 1:]) > 0.1
    assert largest_difference(result, expected) <= TOLERANCE

    assert inputs.shape == (2 * NUM_STEPS, *result.shape[:-1], 33)
    assert torch.equal(inputs[0][:, 1:], their_inputs[0][:, 1:])  # noise
    assert largest_difference(inputs, their_inputs) <= TOLERANCE
    assert torch.equal(inputs[..., 16:], their_inputs[..., 16:])
    first_frames = inputs[:, :, 0, ..., LATENTS]
    assert rms(first_frames[0]) > 0.1
    assert torch.equal(first_frames, result[:, 0].expand_as(first_frames))  # the picture, at every step and at the end
    assert largest_difference(result[:, 0], expected[:, 0]) <= 1e-5


@pytest.mark.usefixtures("exact_diffusers")
def test_text_to_image() -> None:
    ours, theirs = build_pipelines(TEXT_TO_IMAGE, small_config(TEXT_TO_IMAGE))
    text = random_text(T2I)
    result, inputs = call_ours(ours, text, output_type="latent")
    expected, their_inputs = call_theirs(theirs, text, output_type="latent")
    assert result.shape == (1, 1, 8, 12, 16) and rms(result) > 0.1
    assert largest_difference(result, expected) <= TOLERANCE
    assert inputs.shape[-1] == 16 and torch.equal(inputs[0], their_inputs[0])


@pytest.mark.usefixtures("exact_diffusers")
def test_image_to_image() -> None:
    """Both show the model noise, the picture's latents and a mask of ones; noise is drawn before the latents."""
    ours, theirs = build_pipelines(IMAGE_TO_IMAGE, small_config(IMAGE_TO_IMAGE), build_image_vae_pair())
    text = random_text(I2I)
    arguments: dict[str, Any] = {"image": random_picture(5), "output_type": "latent"}
    result, inputs = call_ours(ours, text, **arguments)
    expected, their_inputs = call_theirs(theirs, text, **arguments)
    assert result.shape == (1, 1, 8, 12, 16) and rms(result) > 0.1
    assert largest_difference(result, expected) <= TOLERANCE

    assert inputs.shape == (2 * NUM_STEPS, *result.shape[:-1], 33)
    assert torch.equal(inputs[0][..., LATENTS], their_inputs[0][..., LATENTS])
    assert largest_difference(inputs, their_inputs) <= TOLERANCE
    source, their_source = inputs[..., CONDITION], their_inputs[..., CONDITION]
    assert rms(source[0]) > 0.1 and torch.equal(source, source[:1].expand_as(source))
    assert largest_difference(source, their_source) <= 1e-5
    assert (inputs[..., MASK] == 1).all() and (their_inputs[..., MASK] == 1).all()


# --- normalisation of a video's first frames --------------------------------------------------------------------------


def normalised_by_hand(latents: Tensor) -> Tensor:
    """The published rule for one video (T, H, W, C), frame by frame in float64."""
    frames = latents.double().numpy().copy()
    later = frames[4 : 4 + min(5, len(frames) - 1)]
    for frame in frames[:4]:
        mean, std = frame.mean(), frame.std(ddof=1)
        new_mean = min(max(later.mean(), mean - 0.05), mean + 0.1)
        new_std = min(max(later.std(ddof=1), std - 0.1), std + 0.25)
        frame[:] = (frame - mean) / std * new_std + new_mean
    return torch.from_numpy(frames)


@pytest.mark.parametrize("num_frames", [5, 7, 9, 13])
def test_normalisation_frame_by_frame(num_frames: int) -> None:
    """Two videos whose first frames meet every limit from both sides, and none."""
    latents = torch.randn((2, num_frames, 8, 12, 16), generator=torch.Generator().manual_seed(2))
    for frame, (mean, std) in enumerate([(0.8, 1.5), (-0.8, 0.4), (0.02, 1.03), (0.5, 0.5)]):
        latents[0, frame] = latents[0, frame] * std + mean
    latents[1, :4] = latents[1, :4] * 1.05 + 0.03  # within the limits: all of it goes
    latents[:, 9:] += 3  # frames that are not looked at
    result = normalize_first_frames(latents)
    assert rms(result - latents) > 0.01
    for video, normalised in zip(latents, result, strict=True):
        assert largest_difference(normalised, normalised_by_hand(video)) <= 1e-5


def test_normalisation_is_theirs_where_the_first_frames_are_alike() -> None:
    """diffusers takes the statistics of the first four frames together.

    That is the same where they all have the same, but for the count in an unbiased spread: here 2e-6 of it.
    """
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn((1, 9, 64, 96, 16), generator=generator)
    values = latents[0, 0].flatten() * 1.4 + 0.3
    for frame in range(4):
        latents[0, frame] = values[torch.randperm(len(values), generator=generator)].view(latents.shape[2:])
    expected = Kandinsky5I2VPipeline.normalize_first_frame(Kandinsky5I2VPipeline, latents)
    assert rms(expected[:, :4] - latents[:, :4]) > 0.05
    assert largest_difference(normalize_first_frames(latents), expected) <= 5e-5


def test_image_to_video_normalises_last() -> None:
    """Switched on in the config, as published, it changes what comes out and nothing that the model sees."""
    vaes = build_video_vae_pair()
    arguments: dict[str, Any] = {"image": random_picture(5), "num_frames": 17, "num_steps": 2, "output_type": "latent"}
    plain, normalising = (
        build_pipelines(IMAGE_TO_VIDEO, small_config(IMAGE_TO_VIDEO, first_frame_normalization=on), vaes)[0]
        for on in (False, True)
    )
    latents, inputs = call_ours(plain, random_text(LITE), **arguments)
    normalised, same_inputs = call_ours(normalising, random_text(LITE), **arguments)
    assert load_config(CONFIGS / IMAGE_TO_VIDEO.config).generation.first_frame_normalization
    assert torch.equal(inputs, same_inputs)
    assert rms(normalised[:, 0] - latents[:, 0]) > 0.01
    assert largest_difference(normalised[0], normalised_by_hand(latents[0])) <= 1e-5


# --- pixels -----------------------------------------------------------------------------------------------------------


def assert_rounded(levels: np.ndarray, pixels: np.ndarray) -> None:
    """`levels` 0..255 are `pixels` in [0, 1], rounded; within float32's error either neighbour of a half will do."""
    assert levels.dtype == np.uint8 and levels.shape == pixels.shape
    assert len(np.unique(levels)) == 256  # pixels of all kinds, not two colours
    assert np.abs(levels - pixels.astype(np.float64) * 255).max() <= 0.5 + 0.01
    assert (levels == np.round(pixels * 255)).mean() > 0.999


@pytest.mark.usefixtures("exact_diffusers")
def test_decoded_picture() -> None:
    """From embeddings to pixels, all of it."""
    ours, theirs = build_pipelines(TEXT_TO_IMAGE, small_config(TEXT_TO_IMAGE), build_image_vae_pair())
    text = random_text(T2I)
    expected, _ = call_theirs(theirs, text, num_steps=2, output_type="np")
    pixels, _ = call_ours(ours, text, num_steps=2, output_type="np")
    assert pixels.shape == expected.shape == (1, 64, 96, 3) and pixels.dtype == np.float32
    assert np.abs(pixels - expected).max() <= 1e-5
    levels, _ = call_ours(ours, text, num_steps=2, output_type="uint8")
    assert_rounded(levels.permute(0, 2, 3, 1).numpy(), expected)


@pytest.mark.usefixtures("exact_diffusers")
def test_decoded_video() -> None:
    """Two latent frames, which neither side cuts into windows."""
    ours, theirs = build_pipelines(TEXT_TO_VIDEO, small_config(TEXT_TO_VIDEO), build_video_vae_pair())
    text = random_text(LITE)
    expected, _ = call_theirs(theirs, text, num_frames=5, num_steps=2, output_type="np")
    pixels, _ = call_ours(ours, text, num_frames=5, num_steps=2, output_type="np")
    assert pixels.shape == expected.shape == (1, 5, 64, 96, 3)
    assert np.abs(pixels - expected).max() <= 1e-5
    levels, _ = call_ours(ours, text, num_frames=5, num_steps=2)
    assert_rounded(levels.permute(0, 2, 3, 4, 1).numpy(), expected)


def test_rounding_is_theirs() -> None:
    """Pixel for pixel, from the same decoded values: those of all levels, and random ones that partly overflow."""
    exact = (torch.arange(768, dtype=torch.float32) / 3 / 127.5 - 1)[:, None].expand(-1, 32)
    random = torch.randn((768, 32), generator=torch.Generator().manual_seed(4))
    pixels = torch.stack((exact, random, 0.3 * random))[None]
    theirs = VaeImageProcessor().postprocess(pixels.clone(), output_type="np")
    expected = torch.from_numpy((theirs * 255).round().astype("uint8")).permute(0, 3, 1, 2)
    assert len(expected.unique()) == 256
    assert torch.equal(to_uint8(pixels.clone()), expected)
