"""Our Flux VAE against diffusers' AutoencoderKL: the same keys and numbers; its tiles and its gradients."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL as TheirVAE
from diffusers_reference import largest_difference, randomise, rms
from torch import Tensor

from kandinsky.models.vae_flux import AutoencoderKL, ResnetBlock, Upsample
from kandinsky.models.vae_tiling import VAETiling

TOLERANCE = 1e-5

# The published channels divided by 8, with its layers and latents.
PUBLISHED_STRUCTURE = {"block_out_channels": (16, 32, 64, 64), "layers_per_block": 2, "norm_num_groups": 8}
# Fewer levels, another number of layers, no attention, other pictures: what else the constructor takes.
SMALL = PUBLISHED_STRUCTURE | {"layers_per_block": 1, "latent_channels": 4}
THREE_LEVELS = SMALL | {"block_out_channels": (32, 32, 64), "layers_per_block": 3, "norm_num_groups": 4}
ONE_LEVEL = SMALL | {"block_out_channels": (24,), "in_channels": 1, "out_channels": 2}
NO_ATTENTION = SMALL | {"mid_block_add_attention": False}
CONFIGS = [
    pytest.param(PUBLISHED_STRUCTURE, id="published structure"),
    pytest.param(SMALL, id="four levels"),
    pytest.param(THREE_LEVELS, id="three levels"),
    pytest.param(ONE_LEVEL, id="one level"),
    pytest.param(NO_ATTENTION, id="no attention"),
]
LATENT_SIZES = [(8, 6), (5, 9), (1, 1), (3, 1)]  # height, width


def build_theirs(params: dict[str, Any]) -> TheirVAE:
    """diffusers' with our defaults, which are the published configuration's and not its own."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(AutoencoderKL).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    params = defaults | params
    levels = len(params["block_out_channels"])
    return TheirVAE(
        **params,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_pair(params: dict[str, Any], seed: int = 0) -> tuple[AutoencoderKL, TheirVAE]:
    """Ours and theirs with the same random weights, through a strict load."""
    theirs = build_theirs(params).eval()
    randomise(theirs, seed)
    ours = AutoencoderKL(**params).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_difference(a: Tensor, b: Tensor) -> float:
    return largest_difference(a, b) / b.abs().max().item()


# --- beside diffusers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", LATENT_SIZES)
@pytest.mark.parametrize("params", CONFIGS)
@torch.no_grad()
def test_encode(params: dict[str, Any], size: tuple[int, int]) -> None:
    ours, theirs = build_pair(params)
    ratio = ours.spatial_compression_ratio
    assert ratio == 2 ** (len(params["block_out_channels"]) - 1)
    picture = normal(2, params.get("in_channels", 3), ratio * size[0], ratio * size[1])
    distribution, reference = ours.encode(picture), theirs.encode(picture).latent_dist
    assert distribution.mean.shape == (2, params.get("latent_channels", 16), *size)
    assert 0.1 < rms(distribution.mean) < 10
    assert largest_difference(distribution.mean, reference.mean) <= TOLERANCE
    assert largest_difference(distribution.logvar, reference.logvar) <= TOLERANCE
    assert largest_difference(distribution.mode(), reference.mode()) <= TOLERANCE
    ours_drawn = distribution.sample(torch.Generator().manual_seed(4))
    assert largest_difference(ours_drawn, reference.sample(torch.Generator().manual_seed(4))) <= TOLERANCE
    assert largest_difference(ours_drawn, distribution.sample(torch.Generator().manual_seed(5))) > 0.1


@pytest.mark.parametrize("size", LATENT_SIZES)
@pytest.mark.parametrize("params", CONFIGS)
@torch.no_grad()
def test_decode(params: dict[str, Any], size: tuple[int, int]) -> None:
    ours, theirs = build_pair(params)
    latents = normal(2, params.get("latent_channels", 16), *size)
    pixels = ours.decode(latents)
    ratio = ours.spatial_compression_ratio
    assert pixels.shape == (2, params.get("out_channels", 3), ratio * size[0], ratio * size[1])
    assert 0.1 < rms(pixels) < 10
    assert largest_difference(pixels, theirs.decode(latents).sample) <= TOLERANCE


def test_published_keys_and_size() -> None:
    with torch.device("meta"):
        ours, theirs = AutoencoderKL(), build_theirs({})
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert len(shapes) == 244
    assert sum(p.numel() for p in ours.parameters()) == 83_819_683
    assert shapes == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert shapes["encoder.conv_out.weight"] == (32, 512, 3, 3)
    assert shapes["decoder.conv_in.weight"] == (512, 16, 3, 3)
    assert (ours.scaling_factor, ours.shift_factor) == (0.3611, 0.1159)


def test_state_dict_loads_into_theirs() -> None:
    ours, theirs = build_pair(PUBLISHED_STRUCTURE, seed=5)
    back = build_theirs(PUBLISHED_STRUCTURE)
    back.load_state_dict(ours.state_dict(), strict=True)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@torch.no_grad()
def test_neither_scale_nor_shift_is_applied() -> None:
    ours, theirs = build_pair(SMALL)
    assert (theirs.config.scaling_factor, theirs.config.shift_factor) == (0.3611, 0.1159)
    others = AutoencoderKL(**SMALL, scaling_factor=3.0, shift_factor=5.0).eval()
    others.load_state_dict(ours.state_dict())
    assert (others.scaling_factor, others.shift_factor) == (3.0, 5.0)
    picture, latents = normal(1, 3, 32, 32), normal(1, 4, 4, 4)
    assert torch.equal(others.encode(picture).mean, ours.encode(picture).mean)
    assert torch.equal(others.decode(latents), ours.decode(latents))


@pytest.mark.parametrize("channels_last", [False, True])
@torch.no_grad()
def test_bfloat16_is_as_close_to_float32_as_theirs(channels_last: bool) -> None:
    ours, theirs = build_pair(PUBLISHED_STRUCTURE)
    picture, latents = normal(1, 3, 64, 48), normal(1, 16, 8, 6)
    mean, pixels = ours.encode(picture).mean, ours.decode(latents)
    ours.bfloat16(), theirs.bfloat16()
    if channels_last:
        ours.to(memory_format=torch.channels_last)
    half_mean, half_pixels = ours.encode(picture.bfloat16()).mean, ours.decode(latents.bfloat16())
    assert half_mean.dtype == half_pixels.dtype == torch.bfloat16
    their_mean = theirs.encode(picture.bfloat16()).latent_dist.mean
    their_pixels = theirs.decode(latents.bfloat16()).sample
    for exact, half, reference in ((mean, half_mean, their_mean), (pixels, half_pixels, their_pixels)):
        error, their_error = rms(half - exact) / rms(exact), rms(reference - exact) / rms(exact)
        assert 1e-4 < error < 0.03
        assert error < 1.2 * their_error


def test_sides_that_do_not_divide() -> None:
    ours = AutoencoderKL(**SMALL)
    with pytest.raises(ValueError, match="60x32 pixels; the VAE takes sides in multiples of 8"):
        ours.encode(normal(1, 3, 32, 60))


@pytest.mark.parametrize("params", CONFIGS)
@torch.no_grad()
def test_channels_last(params: dict[str, Any]) -> None:
    ours, theirs = build_pair(params)
    ours.to(memory_format=torch.channels_last)
    ratio = ours.spatial_compression_ratio
    picture = normal(1, params.get("in_channels", 3), ratio * 5, ratio * 6)
    latents = normal(1, params.get("latent_channels", 16), 5, 6)
    assert largest_difference(ours.encode(picture).mean, theirs.encode(picture).latent_dist.mean) <= TOLERANCE
    assert largest_difference(ours.decode(latents), theirs.decode(latents).sample) <= TOLERANCE


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (7, 3)])
@torch.no_grad()
def test_upsampling_is_repeating_and_convolving(height: int, width: int) -> None:
    upsample, x = Upsample(8).double(), normal(2, 8, height, width).double()
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert largest_difference(upsample(x), upsample.conv(repeated)) <= 1e-12


@pytest.mark.parametrize("channels", [16, 32])
def test_a_block_without_autograd(channels: int) -> None:
    """What is written in place is not the input."""
    block, x = ResnetBlock(16, channels, groups=8), normal(2, 16, 5, 6)
    before = x.clone()
    plain = block(x)
    assert plain.requires_grad
    with torch.no_grad():
        assert largest_difference(block(x), plain) <= TOLERANCE
    assert torch.equal(x, before)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_training_step() -> None:
    """Every parameter has a gradient, and steps along it reconstruct the picture better."""
    torch.manual_seed(0)
    vae, picture = AutoencoderKL(**SMALL), normal(2, 3, 16, 24)
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (vae.decode(vae.encode(picture).sample(torch.Generator().manual_seed(0))) - picture).square().mean()
        loss.backward()
        for name, parameter in vae.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_gradients_are_theirs() -> None:
    ours, theirs = build_pair(SMALL)
    picture = normal(1, 3, 16, 24).requires_grad_()
    ours.decode(ours.encode(picture).mode()).square().mean().backward()
    gradient, picture.grad = picture.grad, None
    theirs.decode(theirs.encode(picture).latent_dist.mode()).sample.square().mean().backward()
    assert gradient is not None and picture.grad is not None
    assert relative_difference(gradient, picture.grad) <= TOLERANCE
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        if name.endswith("to_k.bias"):
            continue  # zero but for rounding: the same for all keys, so softmax does not see it
        assert parameter.grad is not None
        assert relative_difference(parameter.grad, their_gradients[name]) <= 1e-4, name


# --- tiles ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_tile_is_the_whole_picture() -> None:
    ours, _ = build_pair(SMALL)
    picture, latents = normal(1, 3, 64, 40), normal(1, 4, 8, 5)
    tiling = VAETiling(size=64, overlap=16)
    assert torch.equal(ours.decode(latents, tiling), ours.decode(latents))
    assert torch.equal(ours.encode(picture, tiling).mean, ours.encode(picture).mean)
    assert torch.equal(ours.encode(picture, tiling).logvar, ours.encode(picture).logvar)


@pytest.mark.parametrize(("height", "width"), [(8, 9), (13, 8), (11, 17), (24, 5)])
@torch.no_grad()
def test_tiled_decode(height: int, width: int) -> None:
    """Written out: tiles of 8 latents every 6, the last at the end; two tiles share outputs in proportion."""
    ours, _ = build_pair(SMALL)
    latents = normal(1, 4, height, width)
    tiled = ours.decode(latents, VAETiling(size=64, overlap=16))
    assert tiled.shape == (1, 3, 8 * height, 8 * width)

    def starts(length: int) -> list[int]:
        return [0] if length <= 8 else [*range(0, length - 8, 6), length - 8]

    def blend(tiles: list[Tensor], begins: list[int], dim: int) -> Tensor:
        out = tiles[0]
        for begin, tile in zip(begins[1:], tiles[1:], strict=True):
            out, tile = out.movedim(dim, 0), tile.movedim(dim, 0)
            shared = len(out) - 8 * begin
            mixed = [out[8 * begin + n] * (1 - n / shared) + tile[n] * (n / shared) for n in range(shared)]
            out = torch.cat((out[: 8 * begin], torch.stack(mixed), tile[shared:])).movedim(0, dim)
        return out

    rows = []
    for top in starts(height):
        tiles = [ours.decode(latents[:, :, top : top + 8, left : left + 8]) for left in starts(width)]
        rows.append(blend(tiles, starts(width), 3))
    assert largest_difference(tiled, blend(rows, starts(height), 2)) <= TOLERANCE


@torch.no_grad()
def test_tiled_encode_covers_everything() -> None:
    ours, _ = build_pair(SMALL)
    picture = normal(1, 3, 72, 104)
    mean = ours.encode(picture, VAETiling(size=64, overlap=16)).mean
    assert mean.shape == (1, 4, 9, 13)
    corner = ours.encode(picture[:, :, -64:, -64:]).mean  # the last tile's own latents are at the bottom right
    assert largest_difference(mean[:, :, 8:, 11:], corner[:, :, 7:, 6:]) <= TOLERANCE


@torch.no_grad()
def test_seams_do_not_show() -> None:
    """Steps between neighbouring columns and rows are as large as without tiles; without an overlap they are not."""
    ours, _ = build_pair(PUBLISHED_STRUCTURE)
    latents = normal(1, 16, 16, 28)
    whole = ours.decode(latents)

    def largest_step(pixels: Tensor) -> float:
        """Of any column's or row's steps to the next, root mean square, how large it is beside the whole picture's."""
        ratios = []
        for dim, others in ((2, (0, 1, 3)), (3, (0, 1, 2))):
            steps, expected = (picture.diff(dim=dim).square().mean(others).sqrt() for picture in (pixels, whole))
            ratios.append((steps / expected).max().item())
        return max(ratios)

    blended = ours.decode(latents, VAETiling(size=96, overlap=48))
    assert rms(blended - whole) < 0.25 * rms(whole)  # tiles have other GroupNorm statistics and another attention
    assert largest_step(blended) < 1.2
    assert largest_step(ours.decode(latents, VAETiling(size=96, overlap=0))) > 1.3
