"""Flow-matching sampler: schedule, classifier-free guidance, Euler steps.

Knows torch and a `velocity(latents, timestep, branch)` callable, nothing else: no models, no text, no devices. The
state between steps is float32 whatever the model's dtype; rounding it to bfloat16 costs about 16 dB.

Guidance can cost less than a second evaluation at every step: it can be left out at both ends of the schedule, where
it does little good (Kynkäänniemi et al. 2024, arXiv 2404.07724), and what it adds can be kept for some steps.
`guided_steps` says which step does what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
GUIDANCE_OFF = 1e-6  # guidance this close to 1 runs one model evaluation a step instead of two

Branch = Literal["cond", "uncond"]
Guidance = Literal["off", "new", "kept"]  # cond alone; cond and uncond; cond, and the last difference between the two


@dataclass
class SamplerState:
    """Where sampling is after `step` steps: all that the next one takes from those before it. Tensors float32."""

    latents: Tensor  # (B, T, H, W, C)
    step: int = 0
    difference: Tensor | None = None  # cond - uncond, the last one computed


class Velocity(Protocol):
    """A model with its conditioning bound: latents (B, T, H, W, C), timestep () in [0, 1000] -> velocity as latents."""

    def __call__(self, latents: Tensor, timestep: Tensor, branch: Branch) -> Tensor: ...


def flow_timesteps(num_steps: int, scheduler_scale: float, schedule: str = "original") -> Tensor:
    """Noise levels of the flow, (num_steps + 1,) float32, from 1 (noise) to 0 (data).

    Evenly spaced points s, shifted: k * s / (1 + (k - 1) * s) for k = `scheduler_scale`; k > 1 spends more steps on
    high noise. The model's timestep is 1000 times the level. Raises ValueError for num_steps < 1 or a scale <= 0.

    schedule: "original" has num_steps + 1 points from 1 to 0, "diffusers" num_steps from 1 to the shifted 0.001, and 0
    behind them: its FlowMatchEulerDiscreteScheduler's, whose last step is shorter.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    if scheduler_scale <= 0:
        raise ValueError(f"scheduler_scale is {scheduler_scale}; it must be above 0 (published values: 3, 5, 10)")

    def shifted(level: Tensor) -> Tensor:
        return scheduler_scale * level / (1 + (scheduler_scale - 1) * level)

    if schedule == "original":
        return shifted(torch.linspace(1, 0, num_steps + 1, dtype=torch.float32))
    assert schedule == "diffusers", schedule
    lowest = shifted(torch.tensor(1 / NUM_TRAIN_TIMESTEPS)).item()
    levels = torch.from_numpy(np.linspace(1, lowest, num_steps))
    return torch.cat((shifted(levels), levels.new_zeros(1))).float()


def uses_guidance(guidance_weight: float) -> bool:
    """Whether classifier-free guidance runs, that is whether an unconditional evaluation is needed at all."""
    return abs(guidance_weight - 1.0) > GUIDANCE_OFF


def guided_steps(
    num_steps: int,
    guidance_weight: float,
    interval: tuple[float, float] = (0.0, 1.0),
    every: int = 1,
    first_step: int = 0,
) -> tuple[Guidance, ...]:
    """What guidance does in each of the steps; an unconditional evaluation happens in those that say "new".

    Step i is guided where interval[0] <= i / num_steps < interval[1]: shares of the steps, not of the noise level.
    Of the guided steps, the first and each `every`-th after it are "new". Steps before `first_step`
    are not taken: "off".
    """
    begin, end = interval
    plan: list[Guidance] = []
    guided = 0
    for step in range(num_steps):
        if step < first_step or not uses_guidance(guidance_weight) or not begin <= step / num_steps < end:
            plan.append("off")
        else:
            plan.append("new" if guided % every == 0 else "kept")
            guided += 1
    return tuple(plan)


def euler_sample(
    velocity: Velocity,
    noise: Tensor,
    sigmas: Tensor,
    guidance_weight: float,
    steps: Callable[[range], Iterable[int]] = lambda steps: steps,
    on_step_end: Callable[[int, Tensor], Tensor] = lambda step, latents: latents,
    *,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_every: int = 1,
    first_step: int = 0,
    state: SamplerState | None = None,
) -> Tensor:
    """Integrate from `noise` at sigmas[0] to sigmas[-1]; latents come back in float32.

    A guided step's velocity is uncond + guidance_weight * (cond - uncond), in float32.

    Args:
        noise: (B, T, H, W, C).
        sigmas: (num_steps + 1,), decreasing, as from `flow_timesteps`.
        steps: wraps the iteration over steps: for a progress bar, or to end it early.
        on_step_end: (step, latents after it) -> the latents to go on with.
        guidance_interval, guidance_every: as in `guided_steps`.
        first_step: which one is the first that is taken, from latents of that noise level.
        state: where to go on in place of beginning with `noise`; kept up to date, so that an end before the last step
            can be gone on from.
    """
    state = state or SamplerState(noise.to(torch.float32), first_step)
    sigmas = sigmas.to(device=noise.device, dtype=torch.float32)
    plan = guided_steps(len(sigmas) - 1, guidance_weight, guidance_interval, guidance_every, first_step)
    for step in steps(range(state.step, len(sigmas) - 1)):
        latents, sigma, next_sigma = state.latents, sigmas[step], sigmas[step + 1]
        timestep = sigma * NUM_TRAIN_TIMESTEPS
        v = velocity(latents, timestep, "cond").to(torch.float32)
        if plan[step] == "new":
            uncond = velocity(latents, timestep, "uncond").to(torch.float32)
            state.difference = v - uncond
            v = uncond + guidance_weight * state.difference
        elif plan[step] == "kept":
            assert state.difference is not None  # the first guided step is "new"
            v = v + (guidance_weight - 1) * state.difference
        state.latents = on_step_end(step, latents + (next_sigma - sigma) * v)
        state.step = step + 1
    return state.latents
