"""Noise from seeds, and what each task shows the model besides text."""

from __future__ import annotations

import pytest
import torch

from kandinsky.sampling.conditioning import (
    Conditioning,
    draw_noise,
    from_first_frame,
    from_source,
    from_text,
    normalize_first_frames,
)

SHAPE = (3, 4, 6, 16)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_seed_decides() -> None:
    first, again, other = (draw_noise(seeded(seed), SHAPE) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.5
    assert first.shape == SHAPE and first.dtype == torch.float32


def test_global_random_state_neither_matters_nor_changes() -> None:
    torch.manual_seed(1)
    expected_next = torch.rand(4)
    torch.manual_seed(1)
    first = draw_noise(seeded(7), SHAPE)
    assert torch.equal(torch.rand(4), expected_next)
    torch.manual_seed(2)
    assert torch.equal(draw_noise(seeded(7), SHAPE), first)


def test_noise_is_standard_normal() -> None:
    sample = draw_noise(seeded(0), (31, 64, 96, 16))
    assert abs(sample.mean()) < 0.005 and abs(sample.std() - 1) < 0.005


def test_bfloat16_noise_is_handed_out_in_float32() -> None:
    """Drawing in bfloat16 is another draw, and every value of it is a bfloat16 number."""
    sample = draw_noise(seeded(7), SHAPE, torch.bfloat16)
    assert sample.dtype == torch.float32
    assert torch.equal(sample, sample.bfloat16().float())
    assert torch.equal(sample, torch.randn(SHAPE, generator=seeded(7), dtype=torch.bfloat16).float())
    assert not torch.equal(sample, draw_noise(seeded(7), SHAPE))


def test_model_without_a_visual_condition_gets_the_latents_alone() -> None:
    noise = draw_noise(seeded(7), (1, *SHAPE))
    conditioning = from_text(noise, in_channels=16)
    assert conditioning.extra is None and conditioning.noise is noise
    assert conditioning.model_input(noise) is noise


def test_model_with_a_visual_condition_gets_zeros() -> None:
    noise = draw_noise(seeded(7), (2, *SHAPE))
    conditioning = from_text(noise, in_channels=33)
    latents = 2 * noise
    model_input = conditioning.model_input(latents)
    assert model_input.shape == (2, 3, 4, 6, 33)
    assert torch.equal(model_input[..., :16], latents)
    assert model_input[..., 16:].count_nonzero() == 0


def test_condition_follows_the_latents() -> None:
    """Order of the channels and their dtype: latents, then condition and mask, all as the latents are."""
    noise = torch.zeros(1, 1, 2, 2, 16)
    conditioning = Conditioning(noise, torch.ones(1, 1, 2, 2, 17))
    model_input = conditioning.model_input(noise.bfloat16())
    assert model_input.dtype == torch.bfloat16
    assert model_input[..., :16].count_nonzero() == 0 and (model_input[..., 16:] == 1).all()


def test_first_frame_is_held_and_marked() -> None:
    noise, picture = draw_noise(seeded(7), (2, *SHAPE)), draw_noise(seeded(8), (2, *SHAPE[1:]))
    conditioning = from_first_frame(noise, picture)
    held = conditioning.hold(noise)
    assert torch.equal(held[:, 0], picture) and torch.equal(held[:, 1:], noise[:, 1:])
    model_input = conditioning.model_input(held)
    assert model_input.shape == (2, *SHAPE[:3], 33)
    assert torch.equal(model_input[..., :16], held)
    assert model_input[..., 16:32].count_nonzero() == 0  # published: the mask is enough
    assert (model_input[:, 0, ..., 32] == 1).all() and model_input[:, 1:, ..., 32].count_nonzero() == 0


def test_source_fills_the_condition() -> None:
    noise, picture = draw_noise(seeded(7), (2, 1, 4, 6, 16)), draw_noise(seeded(8), (2, 4, 6, 16))
    conditioning = from_source(noise, picture)
    assert conditioning.hold(noise) is noise
    model_input = conditioning.model_input(noise)
    assert torch.equal(model_input[..., :16], noise)
    assert torch.equal(model_input[:, 0, ..., 16:32], picture)
    assert (model_input[..., 32] == 1).all()


def test_first_frames_move_towards_the_others_within_limits() -> None:
    """Each of the first four by itself: as far as the limits let it, and exactly there where they do."""
    frames = draw_noise(seeded(3), (2, 9, 8, 8, 16))
    frames[:, 0] = frames[:, 0] * 0.5 + 1.0  # far off: limited on both counts
    later_std, later_mean = torch.std_mean(frames[:, 4:9], dim=(1, 2, 3, 4), keepdim=True)
    std, mean = torch.std_mean(frames[:, 1:2], dim=(1, 2, 3, 4), keepdim=True)
    frames[:, 1:2] = (frames[:, 1:2] - mean) / std * (later_std - 0.1) + later_mean + 0.03  # near: gets the others'
    out = normalize_first_frames(frames)
    assert torch.equal(out[:, 4:], frames[:, 4:])
    for sample in range(2):
        later = frames[sample, 4:9]
        far, far_before = out[sample, 0], frames[sample, 0]
        assert abs(far.mean() - (far_before.mean() - 0.05)) < 1e-5
        assert abs(far.std() - (far_before.std() + 0.25)) < 1e-5
        assert abs(out[sample, 1].mean() - later.mean()) < 1e-5 and abs(out[sample, 1].std() - later.std()) < 1e-5


@pytest.mark.parametrize("num_frames", [1, 2, 4])
def test_short_videos_are_left_alone(num_frames: int) -> None:
    frames = draw_noise(seeded(3), (1, num_frames, 4, 4, 16))
    assert normalize_first_frames(frames) is frames


def test_normalisation_makes_no_nan() -> None:
    frames = torch.zeros(1, 7, 4, 4, 16)
    assert normalize_first_frames(frames).isfinite().all()
