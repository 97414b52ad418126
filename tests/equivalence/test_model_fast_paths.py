"""The models' fast paths give what their plain ones give: a few frames at a time, phases of an upsampling, rotation."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kandinsky.models import causal_conv
from kandinsky.models.layers import gated_residual, modulated_norm
from kandinsky.models.rope import apply_rotary, visual_rotary_table
from kandinsky.models.vae_flux import AutoencoderKL
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo, ResnetBlock, Upsample

TOLERANCE = 1e-5


def build_vae() -> AutoencoderKLHunyuanVideo:
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=(16, 32, 32, 64), layers_per_block=1, norm_num_groups=8, latent_channels=4
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(values / math.sqrt(math.prod(parameter.shape[1:])))
            else:
                parameter.copy_(0.2 * values + (1 if "norm" in name and name.endswith("weight") else 0))
    return vae.eval()


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def rms(a: Tensor, b: Tensor) -> float:
    """Root mean square of the difference, over that of b."""
    return ((a.float() - b).square().mean() / b.square().mean()).sqrt().item()


def video(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("by_frame", [False, True])
@pytest.mark.parametrize(("batch", "frames"), [(1, 1), (1, 5), (2, 9), (1, 17)])
@torch.no_grad()
def test_a_few_frames_at_a_time(monkeypatch: pytest.MonkeyPatch, batch: int, frames: int, by_frame: bool) -> None:
    vae = build_vae()
    vae.convolve_by_frame(by_frame)
    pixels = video(batch, 3, frames, 32, 48)
    latents = vae.encode(pixels).mean
    decoded = vae.decode(latents)
    for frames_at_once in (2, 3):
        monkeypatch.setattr(causal_conv, "frames_at_once", lambda x, n=frames_at_once: n)
        assert difference(vae.encode(pixels).mean, latents) <= TOLERANCE
        assert difference(vae.decode(latents), decoded) <= TOLERANCE


@torch.no_grad()
def test_large_tensors_are_streamed_and_small_ones_are_not() -> None:
    frames = 17
    small = torch.empty(1, 8, frames, 16, 16, device="meta")
    large = torch.empty(1, 128, frames, 512, 768, device="meta")
    assert causal_conv.frames_at_once(small) >= frames
    assert causal_conv.frames_at_once(large) == causal_conv.LEAST_FRAMES_AT_ONCE
    with torch.enable_grad():
        assert causal_conv.frames_at_once(large) == frames


@pytest.mark.parametrize("factor", [(1, 2, 2), (2, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("by_frame", [False, True])
def test_phases_of_an_upsampling(factor: tuple[int, int, int], frames: int, by_frame: bool) -> None:
    upsample = Upsample(8, factor)
    upsample.conv.by_frame = by_frame
    x = video(2, 8, frames, 5, 6)
    plain = upsample(x)
    assert plain.requires_grad  # the plain path is the one that autograd takes
    assert plain.shape[2:] == (factor[0] * (frames - 1) + 1, factor[1] * 5, factor[2] * 6)
    with torch.no_grad():
        assert difference(upsample(x), plain) <= TOLERANCE


@pytest.mark.parametrize("frames", [1, 5])
def test_decoding_with_autograd(frames: int) -> None:
    vae = build_vae()
    latents = video(1, 4, frames, 4, 6)
    with torch.no_grad():
        fast = vae.decode(latents)
    plain = vae.decode(latents)
    assert difference(fast, plain.detach()) <= TOLERANCE
    plain.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.decoder.parameters())


@pytest.mark.processor
@pytest.mark.parametrize("kind", ["video", "picture"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_convolutions_in_float32_of_what_is_stored_in_less(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No convolution of 3x3 is left in the smaller dtype, results keep it, and they are as near to float32's."""
    vae: AutoencoderKLHunyuanVideo | AutoencoderKL
    if kind == "video":
        vae, pixels = build_vae(), video(1, 3, 9, 32, 48)
        vae.convolve_by_frame(True)
    else:
        vae, pixels = (
            AutoencoderKL(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8),
            video(1, 3, 32, 48),
        )
    vae = vae.to(dtype)
    pixels = pixels.to(dtype)
    wide = copy.deepcopy(vae).float()
    latents = vae.encode(pixels).mean
    decoded = vae.decode(latents)

    vae.convolve_in_float32()
    dtypes = set()
    for name in ("conv2d", "conv3d", "conv_transpose2d"):
        original = getattr(F, name)

        def watched(x: Tensor, weight: Tensor, *rest: Any, original: Any = original, **named: Any) -> Tensor:
            if weight.shape[-1] > 1:
                dtypes.update((x.dtype, weight.dtype))
            return original(x, weight, *rest, **named)

        monkeypatch.setattr(F, name, watched)
    found = vae.encode(pixels).mean, vae.decode(latents)
    assert dtypes == {torch.float32} and found[0].dtype == found[1].dtype == dtype
    exact = wide.encode(pixels.float()).mean, wide.decode(latents.float())
    for in_float32, plain, expected in zip(found, (latents, decoded), exact, strict=True):
        assert rms(in_float32, expected) <= 1.05 * rms(plain, expected) < 0.03


@torch.no_grad()
def test_a_block_leaves_its_input_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_conv, "frames_at_once", lambda x: 2)
    x = video(1, 16, 5, 6, 6)
    before = x.clone()
    ResnetBlock(16, 16, groups=8)(x)
    Upsample(16, (2, 2, 2))(x)
    assert torch.equal(x, before)


def test_rotation_as_complex_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    table = visual_rotary_table((2, 3, 4), (16, 24, 24), (1.0, 2.0, 2.0), "cpu")
    x = video(2, 24, 3, 64).transpose(1, 2)  # (B, heads, tokens, head_dim), as attention has it: not contiguous
    rotated = apply_rotary(x, table)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert difference(rotated, apply_rotary(x, table)) <= TOLERANCE
    assert difference(rotated, x) > 0.1


def test_modulation_of_one_and_of_several_samples() -> None:
    x, update, shift, scale = video(2, 7, 16), 3 * video(2, 7, 16), video(2, 1, 16), 0.5 * video(2, 1, 16)
    together = modulated_norm(x, shift, scale)
    for i in range(2):
        alone = slice(i, i + 1)
        assert difference(modulated_norm(x[alone], shift[alone], scale[alone]), together[alone]) <= TOLERANCE
    half = gated_residual(x.bfloat16(), update.bfloat16(), scale)
    assert half.dtype == torch.bfloat16
    exact = (x.bfloat16().float() + scale * update.bfloat16().float()).bfloat16()
    assert torch.equal(half, exact)  # float32 inside, one rounding
