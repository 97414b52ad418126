"""Noise from seeds, and the channels that text to video leaves empty."""

from __future__ import annotations

import pytest
import torch

from kandinsky.conditioning import Conditioning, draw_noise, text_to_video

SHAPE = (3, 4, 6, 16)


def test_seed_decides() -> None:
    first, again, other = (draw_noise([seed], SHAPE, "cpu") for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.5
    assert first.shape == (1, *SHAPE) and first.dtype == torch.float32


def test_global_random_state_neither_matters_nor_changes() -> None:
    torch.manual_seed(1)
    expected_next = torch.rand(4)
    torch.manual_seed(1)
    first = draw_noise([7], SHAPE, "cpu")
    assert torch.equal(torch.rand(4), expected_next)
    torch.manual_seed(2)
    assert torch.equal(draw_noise([7], SHAPE, "cpu"), first)


def test_sample_depends_on_its_own_seed_only() -> None:
    batch = draw_noise([7, 8, 9], SHAPE, "cpu")
    for i, seed in enumerate([7, 8, 9]):
        assert torch.equal(batch[i], draw_noise([seed], SHAPE, "cpu")[0])
    assert torch.equal(draw_noise([8, 7], SHAPE, "cpu"), batch[[1, 0]])


def test_noise_is_standard_normal() -> None:
    sample = draw_noise([0], (31, 64, 96, 16), "cpu")
    assert abs(sample.mean()) < 0.005 and abs(sample.std() - 1) < 0.005


def test_bfloat16_noise_is_handed_out_in_float32() -> None:
    """Drawing in bfloat16 is another draw, and every value of it is a bfloat16 number."""
    sample = draw_noise([7], SHAPE, "cpu", noise_dtype=torch.bfloat16)
    assert sample.dtype == torch.float32
    assert torch.equal(sample, sample.bfloat16().float())
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(sample[0], torch.randn(SHAPE, generator=generator, dtype=torch.bfloat16).float())
    assert not torch.equal(sample, draw_noise([7], SHAPE, "cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_noise_on_a_gpu() -> None:
    assert torch.equal(draw_noise([7], SHAPE, "cuda").cpu(), draw_noise([7], SHAPE, "cpu"))


def test_model_without_a_visual_condition_gets_the_latents_alone() -> None:
    noise = draw_noise([7], SHAPE, "cpu")
    conditioning = text_to_video(noise, in_channels=16)
    assert conditioning.extra is None and conditioning.noise is noise
    assert conditioning.model_input(noise) is noise


def test_model_with_a_visual_condition_gets_zeros() -> None:
    noise = draw_noise([7, 8], SHAPE, "cpu")
    conditioning = text_to_video(noise, in_channels=33)
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
