"""The sampler on flows whose solution is known, without any model."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from kandinsky.sampling.sampler import euler_sample, flow_timesteps, guided_steps, uses_guidance


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape or (2, 3, 4, 4, 16), generator=torch.Generator().manual_seed(seed))


# --- schedule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 16, 50])
@pytest.mark.parametrize("scheduler_scale", [0.5, 1.0, 3.0, 5.0, 10.0])
def test_schedule_is_the_shifted_line(num_steps: int, scheduler_scale: float) -> None:
    sigmas = flow_timesteps(num_steps, scheduler_scale)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (num_steps + 1,)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    for i, sigma in enumerate(sigmas.tolist()):
        s = 1 - i / num_steps
        assert sigma == pytest.approx(scheduler_scale * s / (1 + (scheduler_scale - 1) * s), abs=1e-6)


def test_last_noise_level_is_the_published_one() -> None:
    assert flow_timesteps(50, 5.0)[-2] == pytest.approx(0.09259, abs=1e-5)
    assert flow_timesteps(16, 10.0)[-2] == pytest.approx(0.4, abs=1e-6)


def test_larger_scale_spends_more_steps_on_noise() -> None:
    assert (flow_timesteps(20, 10.0)[1:-1] > flow_timesteps(20, 3.0)[1:-1]).all()


@pytest.mark.parametrize(
    ("num_steps", "scheduler_scale", "message"),
    [
        (0, 5.0, "num_steps is 0.*at least 1"),
        (-3, 5.0, "num_steps is -3.*at least 1"),
        (10, 0.0, r"scheduler_scale is 0\.0.*above 0"),
        (10, -1.0, r"scheduler_scale is -1\.0.*above 0"),
    ],
)
def test_impossible_schedules(num_steps: int, scheduler_scale: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flow_timesteps(num_steps, scheduler_scale)


# --- guidance ---------------------------------------------------------------------------------------------------------


class RecordingVelocity:
    """A constant velocity for each branch that remembers what it was asked."""

    def __init__(self, cond: Tensor, uncond: Tensor) -> None:
        self.values = {"cond": cond, "uncond": uncond}
        self.calls: list[tuple[str, float, torch.dtype]] = []

    def __call__(self, latents: Tensor, timestep: Tensor, branch: str) -> Tensor:
        assert timestep.shape == () and timestep.dtype == torch.float32
        self.calls.append((branch, timestep.item(), latents.dtype))
        return self.values[branch].expand_as(latents)


def one_step(velocity: RecordingVelocity, weight: float) -> Tensor:
    """The velocity that the sampler makes of the branches': what one step from 1 to 0 takes away from zero."""
    return -euler_sample(velocity, torch.zeros(2, 3), torch.tensor([1.0, 0.0]), weight)


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0, 5.0])
def test_guidance_formula(weight: float) -> None:
    velocity = RecordingVelocity(torch.tensor(3.0), torch.tensor(1.0))
    assert torch.allclose(one_step(velocity, weight), torch.full((2, 3), 1 + weight * 2))
    assert [call[0] for call in velocity.calls] == ["cond", "uncond"]


@pytest.mark.parametrize("weight", [1.0, 1 + 1e-7, 1 - 1e-7])
def test_no_unconditional_evaluation_at_guidance_one(weight: float) -> None:
    velocity = RecordingVelocity(torch.tensor(3.0), torch.tensor(1.0))
    assert not uses_guidance(weight)
    assert torch.equal(one_step(velocity, weight), torch.full((2, 3), 3.0))
    assert [call[0] for call in velocity.calls] == ["cond"]


def test_guidance_below_one_runs() -> None:
    assert uses_guidance(0.0) and uses_guidance(0.99) and uses_guidance(1.01)


# --- guidance that costs less -----------------------------------------------------------------------------------------


class CurvedVelocity:
    """Depends on latents, timestep and branch; remembers in which order the branches were asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, latents: Tensor, timestep: Tensor, branch: str) -> Tensor:
        self.calls.append(branch)
        return torch.sin(latents * (3 if branch == "cond" else 2) + timestep / 700)


def plan_letters(num_steps: int, interval: tuple[float, float] = (0.0, 1.0), every: int = 1) -> str:
    """n, k or - for new, kept and off."""
    plan = guided_steps(num_steps, 5.0, interval, every)
    assert len(plan) == num_steps
    return "".join({"new": "n", "kept": "k", "off": "-"}[step] for step in plan)


@pytest.mark.parametrize(
    ("num_steps", "interval", "every", "expected"),
    [
        (10, (0.0, 1.0), 1, "nnnnnnnnnn"),
        (10, (0.3, 0.7), 1, "---nnnn---"),  # 3 / 10 is in, 7 / 10 is not
        (10, (0.31, 0.71), 1, "----nnnn--"),
        (10, (0.5, 0.5), 1, "----------"),
        (10, (0.0, 1.0), 3, "nkknkknkkn"),
        (10, (0.2, 0.9), 2, "--nknknkn-"),  # counted from the first guided step
        (3, (0.0, 1.0), 5, "nkk"),
        (1, (0.0, 1.0), 1, "n"),
        (1, (0.1, 1.0), 1, "-"),
        (50, (0.14, 0.58), 1, "-" * 7 + "n" * 22 + "-" * 21),  # where rounding errors could move an end
    ],
)
def test_which_steps_are_guided(num_steps: int, interval: tuple[float, float], every: int, expected: str) -> None:
    assert plan_letters(num_steps, interval, every) == expected


@pytest.mark.parametrize("weight", [1.0, 1 + 1e-7])
def test_nothing_is_guided_at_weight_one(weight: float) -> None:
    assert guided_steps(4, weight, (0.0, 1.0), 2) == ("off",) * 4


@pytest.mark.parametrize("weight", [0.0, 4.0])
def test_guidance_in_an_interval_and_kept_is_the_loop_by_hand(weight: float) -> None:
    sigmas, start = flow_timesteps(8, 3.0), noise(2, 1, 2, 2, 4)
    plain, velocity = CurvedVelocity(), CurvedVelocity()
    latents, kept, expected_calls = start, None, []
    for step, letter in enumerate("-nkknkk-"):
        timestep = 1000 * sigmas[step]
        cond = plain(latents, timestep, "cond")
        expected_calls.append("cond")
        if letter == "n":
            kept = cond - plain(latents, timestep, "uncond")
            expected_calls.append("uncond")
        guided = cond if letter == "-" else cond + (weight - 1) * kept
        latents = latents + (sigmas[step + 1] - sigmas[step]) * guided
    result = euler_sample(velocity, start, sigmas, weight, guidance_interval=(1 / 8, 7 / 8), guidance_every=3)
    assert velocity.calls == expected_calls
    assert torch.allclose(result, latents, atol=1e-5)
    full = euler_sample(velocity, start, sigmas, weight)
    assert not torch.allclose(result, full, atol=1e-2)


def test_guidance_in_full_is_bit_for_bit_the_published_loop() -> None:
    sigmas, start, velocity = flow_timesteps(8, 3.0), noise(2, 1, 2, 2, 4), CurvedVelocity()
    latents = start
    for step in range(8):
        timestep = sigmas[step] * 1000
        cond, uncond = velocity(latents, timestep, "cond"), velocity(latents, timestep, "uncond")
        latents = latents + (sigmas[step + 1] - sigmas[step]) * (uncond + 4.0 * (cond - uncond))
    assert torch.equal(euler_sample(velocity, start, sigmas, 4.0), latents)


# --- Euler ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 7, 50])
@pytest.mark.parametrize("scheduler_scale", [1.0, 10.0])
def test_straight_flow_is_solved_exactly(num_steps: int, scheduler_scale: float) -> None:
    """Velocity noise - data leads from the noise to the data in any number of steps."""
    start, data = noise(seed=1), noise(seed=2)
    result = euler_sample(lambda *_: start - data, start, flow_timesteps(num_steps, scheduler_scale), 1.0)
    assert torch.allclose(result, data, atol=1e-5)


def test_steps_of_a_curved_flow() -> None:
    """Velocity x: every step multiplies by 1 + (next - now)."""
    sigmas = flow_timesteps(6, 3.0)
    start = noise(1, 1, 2, 2, 4)
    factor = torch.prod(1 + sigmas.double().diff())
    result = euler_sample(lambda latents, *_: latents, start, sigmas, 1.0)
    assert torch.allclose(result.double(), start.double() * factor, atol=1e-6)


def test_model_sees_a_thousand_times_the_noise_level() -> None:
    velocity = RecordingVelocity(torch.tensor(0.5), torch.tensor(0.0))
    sigmas = flow_timesteps(4, 5.0)
    euler_sample(velocity, noise(), sigmas, 2.0)
    assert [call[0] for call in velocity.calls] == ["cond", "uncond"] * 4
    assert [call[1] for call in velocity.calls[::2]] == pytest.approx((1000 * sigmas[:-1]).tolist())
    assert [call[1] for call in velocity.calls[1::2]] == pytest.approx((1000 * sigmas[:-1]).tolist())


def test_state_stays_float32_with_a_bfloat16_model() -> None:
    """Steps too small for bfloat16 still add up; with a bfloat16 state they would be lost."""
    velocity = RecordingVelocity(torch.tensor(-0.125, dtype=torch.bfloat16), torch.tensor(0.0, dtype=torch.bfloat16))
    start = torch.full((1, 1, 2, 2, 4), 3.0, dtype=torch.bfloat16)
    result = euler_sample(velocity, start, flow_timesteps(50, 1.0), 1.0)
    assert result.dtype == torch.float32
    assert all(dtype == torch.float32 for _, _, dtype in velocity.calls)
    assert torch.allclose(result, torch.full_like(result, 3.125), atol=1e-5)


def test_noise_is_not_written_to() -> None:
    start = noise()
    before = start.clone()
    euler_sample(lambda latents, *_: latents.clone(), start, flow_timesteps(3, 5.0), 1.0)
    assert torch.equal(start, before)


def test_progress_wraps_the_steps() -> None:
    seen: list[int] = []

    def progress(steps: Iterable[int]) -> Iterable[int]:
        for step in steps:
            seen.append(step)
            yield step

    euler_sample(lambda latents, *_: latents, noise(), flow_timesteps(5, 5.0), 1.0, progress)
    assert seen == [0, 1, 2, 3, 4]


def test_steps_may_end_early() -> None:
    ends: list[Tensor] = []

    def remember(step: int, latents: Tensor) -> Tensor:
        ends.append(latents)
        return latents

    result = euler_sample(
        lambda latents, *_: latents, noise(), flow_timesteps(5, 5.0), 1.0, lambda steps: steps[:2], remember
    )
    assert len(ends) == 2 and torch.equal(result, ends[1])


def test_what_a_step_ends_with_is_what_the_next_begins_with() -> None:
    begins: list[Tensor] = []

    def velocity(latents: Tensor, timestep: Tensor, branch: str) -> Tensor:
        begins.append(latents)
        return torch.zeros_like(latents)

    result = euler_sample(
        velocity, noise(), flow_timesteps(3, 5.0), 1.0, on_step_end=lambda step, latents: latents + step + 1
    )
    assert torch.equal(begins[1], noise() + 1) and torch.equal(begins[2], noise() + 1 + 2)
    assert torch.equal(result, noise() + 1 + 2 + 3)
