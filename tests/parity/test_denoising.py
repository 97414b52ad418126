"""Schedules, and denoising loops of sampler and model together, against diffusers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers_reference import LITE, PRO, Inputs, build_pair, largest_difference, random_text, rms, run_theirs
from torch import Tensor

from kandinsky.sampling.sampler import euler_sample, flow_timesteps

LATENT_SIZE = (3, 8, 12)


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


@pytest.mark.parametrize("num_steps", [1, 2, 16, 50])
@pytest.mark.parametrize("scheduler_scale", [1.0, 3.0, 5.0, 10.0])
def test_their_own_schedule(num_steps: int, scheduler_scale: float) -> None:
    """What their scheduler makes by itself of a number of steps."""
    theirs = FlowMatchEulerDiscreteScheduler(shift=scheduler_scale)
    theirs.set_timesteps(num_steps)
    sigmas = flow_timesteps(num_steps, scheduler_scale, "diffusers")
    assert sigmas.dtype == torch.float32 and largest_difference(sigmas, theirs.sigmas) <= 1e-6
    if num_steps > 2 and scheduler_scale > 1:
        assert (sigmas - flow_timesteps(num_steps, scheduler_scale)).abs().max() > 0.04


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
