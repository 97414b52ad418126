"""Our HunyuanVideo VAE against diffusers': the same keys and numbers untiled, and the published time windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo as TheirVAE
from diffusers_reference import largest_difference, randomise, rms
from torch import Tensor

from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
from kandinsky.models.vae_tiling import VAETiling

TOLERANCE = 1e-5

SMALL = {
    "block_out_channels": (16, 32, 64, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
}
# Fewer levels, another number of layers, no attention: what else the constructor takes.
THREE_LEVELS = SMALL | {"block_out_channels": (16, 32, 32), "layers_per_block": 2, "spatial_compression_ratio": 4}
TWO_LEVELS = SMALL | {"block_out_channels": (32, 64), "spatial_compression_ratio": 2}
NO_ATTENTION = SMALL | {"mid_block_add_attention": False}
CONFIGS = [
    pytest.param(SMALL, id="four levels"),
    pytest.param(THREE_LEVELS, id="three levels"),
    pytest.param(TWO_LEVELS, id="two levels"),
    pytest.param(NO_ATTENTION, id="no attention"),
]


def build_theirs(params: dict[str, Any]) -> TheirVAE:
    levels = len(params.get("block_out_channels", (128, 256, 512, 512)))
    theirs = TheirVAE(
        **params,
        down_block_types=("HunyuanVideoDownBlock3D",) * levels,
        up_block_types=("HunyuanVideoUpBlock3D",) * levels,
    )
    theirs.use_framewise_encoding = theirs.use_framewise_decoding = False  # untiled: else 17 frames are cut in two
    return theirs


def build_pair(params: dict[str, Any], seed: int = 0) -> tuple[AutoencoderKLHunyuanVideo, TheirVAE]:
    """Ours and theirs with the same random weights, through a strict load."""
    theirs = build_theirs(params).eval()
    randomise(theirs, seed)
    ours = AutoencoderKLHunyuanVideo(**params).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def random_video(frames: int, height: int = 32, width: int = 48, batch: int = 1, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn((batch, channels, frames, height, width), generator=generator)


@pytest.mark.parametrize("frames", [1, 5, 17])
@pytest.mark.parametrize("params", CONFIGS)
@torch.no_grad()
def test_encode(params: dict[str, Any], frames: int) -> None:
    ours, theirs = build_pair(params)
    video = random_video(frames)
    distribution, reference = ours.encode(video), theirs.encode(video).latent_dist
    if len(params["block_out_channels"]) > 2:  # two levels have room for one halving of time only
        assert distribution.mean.shape[2] == (frames - 1) // 4 + 1
    assert 0.1 < rms(distribution.mean) < 10
    assert largest_difference(distribution.mean, reference.mean) <= TOLERANCE
    assert largest_difference(distribution.logvar, reference.logvar) <= TOLERANCE
    assert torch.equal(distribution.mode(), distribution.mean)


@pytest.mark.parametrize("latent_frames", [1, 2, 5])
@pytest.mark.parametrize("params", CONFIGS)
@torch.no_grad()
def test_decode(params: dict[str, Any], latent_frames: int) -> None:
    ours, theirs = build_pair(params)
    latents = random_video(latent_frames, 4, 6, channels=params["latent_channels"])
    pixels = ours.decode(latents)
    assert 0.1 < rms(pixels) < 10
    assert largest_difference(pixels, theirs.decode(latents).sample) <= TOLERANCE


@torch.no_grad()
def test_batch_of_two() -> None:
    ours, theirs = build_pair(SMALL)
    video, latents = random_video(5, batch=2), random_video(2, 4, 6, batch=2, channels=4)
    assert largest_difference(ours.encode(video).mean, theirs.encode(video).latent_dist.mean) <= TOLERANCE
    assert largest_difference(ours.decode(latents), theirs.decode(latents).sample) <= TOLERANCE


@torch.no_grad()
def test_sample_is_mean_plus_scaled_noise() -> None:
    ours, _ = build_pair(SMALL)
    distribution = ours.encode(random_video(5))
    noise = torch.randn(distribution.mean.shape, generator=torch.Generator().manual_seed(4))
    expected = distribution.mean + (0.5 * distribution.logvar).exp() * noise
    assert torch.equal(distribution.sample(torch.Generator().manual_seed(4)), expected)
    assert not torch.equal(distribution.sample(torch.Generator().manual_seed(5)), expected)


def test_published_keys_and_size() -> None:
    with torch.device("meta"):
        ours, theirs = AutoencoderKLHunyuanVideo(), build_theirs({})
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert len(shapes) == 248
    assert sum(p.numel() for p in ours.parameters()) == 246_478_803
    assert shapes == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert ours.scaling_factor == theirs.config.scaling_factor == 0.476986


def test_state_dict_loads_into_theirs() -> None:
    ours, theirs = build_pair(SMALL, seed=5)
    back = build_theirs(SMALL)
    back.load_state_dict(ours.state_dict(), strict=True)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


# --- convolutions by frame --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 5, 17])
@torch.no_grad()
def test_convolving_by_frame_is_the_same_sum(frames: int) -> None:
    """In float32 up to the order of summation: 1e-5 of the output's largest value."""
    ours, theirs = build_pair(SMALL)
    video = random_video(frames, batch=2)
    encoded = ours.encode(video).mean
    decoded = ours.decode(encoded)
    ours.convolve_by_frame(True)
    assert largest_difference(ours.encode(video).mean, encoded) <= 1e-5 * encoded.abs().max().item()
    assert largest_difference(ours.decode(encoded), decoded) <= 1e-5 * decoded.abs().max().item()
    latents, pixels = theirs.encode(video).latent_dist.mean, theirs.decode(encoded).sample
    assert largest_difference(ours.encode(video).mean, latents) <= 1e-5 * latents.abs().max().item()
    assert largest_difference(ours.decode(encoded), pixels) <= 1e-5 * pixels.abs().max().item()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    ours.convolve_by_frame(False)
    assert torch.equal(ours.encode(video).mean, encoded)


# --- published time windows -------------------------------------------------------------------------------------------


def decode_in_windows(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Tensor:
    """The published rule written out frame by frame: windows of 5 latent frames, a new one every 2.

    Each makes 17 frames. A later window's first frame is dropped, and its next 8 are blended with the last 8 made so
    far: frame x of them is (1 - x / 8) old + x / 8 new.
    """
    frames: list[Tensor] = []
    for start in range(0, latents.shape[2] - 4, 2):
        window = list(vae.decode(latents[:, :, start : start + 5]).unbind(2))
        assert len(window) == 17
        if start == 0:
            frames = window
            continue
        window = window[1:]
        for x in range(8):
            frames[x - 8] = frames[x - 8] * (1 - x / 8) + window[x] * (x / 8)
        frames += window[8:]
    return torch.stack(frames, dim=2)


@pytest.mark.parametrize("by_frame", [False, True])
@pytest.mark.parametrize("latent_frames", [5, 7, 31])
@torch.no_grad()
def test_windows_are_the_published_ones(latent_frames: int, by_frame: bool) -> None:
    ours, _ = build_pair(SMALL)
    ours.convolve_by_frame(by_frame)
    latents = random_video(latent_frames, 2, 3, channels=4)
    tiled = ours.decode(latents, VAETiling())
    assert tiled.shape == (1, 3, 4 * (latent_frames - 1) + 1, 16, 24)
    assert largest_difference(tiled, decode_in_windows(ours, latents)) <= TOLERANCE
    untiled = ours.decode(latents)
    if latent_frames == 5:
        assert torch.equal(tiled, untiled)
    else:
        assert largest_difference(tiled, untiled) > 1e-3  # windows do change the result: the comparison can fail


@pytest.mark.parametrize("latent_frames", [6, 8, 10])
@torch.no_grad()
def test_lengths_that_windows_do_not_divide(latent_frames: int) -> None:
    """The published rule would drop the last frames; ours ends with a complete window at the end."""
    ours, _ = build_pair(SMALL)
    latents = random_video(latent_frames, 2, 3, channels=4)
    tiled = ours.decode(latents, VAETiling())
    assert tiled.shape[2] == 4 * (latent_frames - 1) + 1
    last = ours.decode(latents[:, :, -5:])
    assert largest_difference(tiled[:, :, -4:], last[:, :, -4:]) <= TOLERANCE


@torch.no_grad()
def test_encoding_in_windows() -> None:
    """25 frames: windows 0..16 and 8..24; the 3 + 2 latent frames that only one of them made are that one's."""
    ours, _ = build_pair(SMALL)
    video = random_video(25)
    tiled = ours.encode(video, VAETiling()).mean
    first, second = ours.encode(video[:, :, :17]).mean, ours.encode(video[:, :, 8:]).mean
    assert tiled.shape == (1, 4, 7, 4, 6)
    assert largest_difference(tiled[:, :, :3], first[:, :, :3]) <= TOLERANCE
    assert largest_difference(tiled[:, :, 5:], second[:, :, 3:]) <= TOLERANCE
    middle = [first[:, :, 3] * 1 + second[:, :, 1] * 0, first[:, :, 4] * 0.5 + second[:, :, 2] * 0.5]
    assert largest_difference(tiled[:, :, 3:5], torch.stack(middle, dim=2)) <= TOLERANCE
