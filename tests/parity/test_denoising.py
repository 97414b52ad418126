"""Whole denoising loops against diffusers: schedule, guidance, Euler steps and model together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5T2VPipeline
from diffusers_reference import LITE, PRO, Inputs, build_pair, largest_difference, rms, run_theirs
from torch import Tensor

from kandinsky.config import Config, DiTConfig, load_config
from kandinsky.models.text_embedder import TextEmbeddings
from kandinsky.pipelines.text_to_video import TextToVideoPipeline
from kandinsky.request import resolve_request
from kandinsky.runtime.placement import FixedPlacement
from kandinsky.sampler import euler_sample, flow_timesteps

REPOSITORY = Path(__file__).resolve().parents[2]
LATENT_SIZE = (3, 8, 12)
TEXT_LENGTHS = {"cond": 9, "uncond": 6}


def their_scheduler(num_steps: int, scheduler_scale: float) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' scheduler with the published models' own points: N + 1 from 1 to 0, of which the last is the end."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=scheduler_scale)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, num_steps + 1)[:-1].tolist())
    return scheduler


@pytest.mark.parametrize("num_steps", [16, 50])
@pytest.mark.parametrize("scheduler_scale", [3.0, 5.0, 10.0])
def test_schedule_is_the_schedulers(num_steps: int, scheduler_scale: float) -> None:
    sigmas = flow_timesteps(num_steps, scheduler_scale)
    theirs = their_scheduler(num_steps, scheduler_scale)
    assert largest_difference(sigmas, theirs.sigmas) <= 1e-6
    assert largest_difference(1000 * sigmas[:-1], theirs.timesteps) <= 1e-3


def random_text(params: dict[str, Any], seed: int = 7) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        branch: (
            torch.randn((1, length, params["in_text_dim"]), generator=generator),
            torch.randn((1, params["in_text_dim2"]), generator=generator),
        )
        for branch, length in TEXT_LENGTHS.items()
    }


@pytest.mark.parametrize(
    ("params", "scale_factor", "scheduler_scale"),
    [
        pytest.param(LITE, (1.0, 2.0, 2.0), 5.0, id="lite"),
        pytest.param(PRO, (1.0, 3.16, 3.16), 10.0, id="pro"),
    ],
)
@pytest.mark.usefixtures("exact_diffusers")
def test_denoising_loop(
    params: dict[str, Any], scale_factor: tuple[float, float, float], scheduler_scale: float
) -> None:
    num_steps, guidance = 8, 5.0
    ours, theirs = build_pair(params)
    text = random_text(params)
    noise = torch.randn((1, *LATENT_SIZE, 16), generator=torch.Generator().manual_seed(3))
    extra = torch.zeros((1, *LATENT_SIZE, 17))

    def velocity(latents: Tensor, timestep: Tensor, branch: str) -> Tensor:
        text_embeds, pooled = text[branch]
        latents = torch.cat((latents, extra), dim=-1)
        return ours(latents, text_embeds, pooled, timestep.expand(1), scale_factor=scale_factor)

    with torch.no_grad():
        result = euler_sample(velocity, noise, flow_timesteps(num_steps, scheduler_scale), guidance)

    scheduler = their_scheduler(num_steps, scheduler_scale)
    latents = noise
    for timestep in scheduler.timesteps:
        branches = {}
        for branch, (text_embeds, pooled) in text.items():
            inputs = Inputs(torch.cat((latents, extra), dim=-1), text_embeds, pooled, timestep.expand(1), scale_factor)
            branches[branch] = run_theirs(theirs, inputs)
        guided = branches["uncond"] + guidance * (branches["cond"] - branches["uncond"])
        latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]

    assert rms(result - noise) > 0.5  # it went somewhere
    assert largest_difference(result, latents) <= 1e-4


# --- pipeline against pipeline ----------------------------------------------------------------------------------------


def small_config(params: dict[str, Any]) -> Config:
    """The published config around a small DiT, with the rotary scale that diffusers takes for sizes this small."""
    config = load_config(REPOSITORY / "configs" / "config_5s_sft.yaml")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dit_params=DiTConfig(**params)),
        metrics=dataclasses.replace(config.metrics, scale_factor=(1.0, 3.16, 3.16)),
    )


class OurSigmas(FlowMatchEulerDiscreteScheduler):
    """Their scheduler, asked for N steps, takes the published models' points instead of its own."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        super().set_timesteps(sigmas=torch.linspace(1, 0, num_inference_steps + 1)[:-1].tolist(), device=device)


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.usefixtures("exact_diffusers")
def test_pipeline_denoises_as_theirs(guidance: float) -> None:
    """The same seed and embeddings through both pipelines, noise included."""
    ours, theirs = build_pair(LITE)
    text = random_text(LITE)
    config = small_config(LITE)
    request = resolve_request(
        config, "a cat", width=96, height=64, time_length=0.4, seed=11, num_steps=4, guidance_weight=guidance
    )
    assert request.latent_size == LATENT_SIZE

    devices = dict.fromkeys(("dit", "vae", "text_embedder"), torch.device("cpu"))
    pipeline = TextToVideoPipeline(config, ours, SimpleNamespace(), SimpleNamespace(), FixedPlacement(devices))
    embeddings = {branch: TextEmbeddings(*tensors, None) for branch, tensors in text.items()}
    with torch.no_grad():
        uncond = embeddings["uncond"] if guidance > 1 else None
        result = pipeline.denoise(request, embeddings["cond"], uncond, progress=False)

    reference = Kandinsky5T2VPipeline(
        transformer=theirs,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=OurSigmas(shift=request.scheduler_scale),
    )
    reference.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {}
    for prefix, branch in (("", "cond"), ("negative_", "uncond")):
        arguments[f"{prefix}prompt_embeds_qwen"], arguments[f"{prefix}prompt_embeds_clip"] = text[branch]
        arguments[f"{prefix}prompt_cu_seqlens"] = torch.tensor([0, TEXT_LENGTHS[branch]], dtype=torch.int32)
    frames = reference(
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        num_inference_steps=request.num_steps,
        guidance_scale=guidance,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="latent",
        **arguments,
    ).frames
    assert rms(result) > 0.1
    assert largest_difference(result, frames) <= 1e-4
