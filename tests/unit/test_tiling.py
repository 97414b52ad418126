"""Tiling: every output is made, weights sum to one, and a function that needs no neighbours does not notice."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kandinsky.config.defaults import HD_SIZES, SD_SIZES
from kandinsky.models import vae_hunyuan
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
from kandinsky.models.vae_tiling import TiledAxis, VAETiling, apply_tiled

PUBLISHED_SIZES = (*SD_SIZES, *HD_SIZES)
# (tile, overlap) in pixels
TILES = [(256, 64), (256, 128), (384, 32), (512, 64), (576, 0), (768, 64), (1024, 128)]


def decoding_axes(tiling: VAETiling) -> list[TiledAxis]:
    """How the published VAE's latents are cut."""
    with torch.device("meta"):
        vae = AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    return vae._tiled_axes(tiling, decoding=True)


def upsample(z: Tensor) -> Tensor:
    """A decoder that looks at one latent for each output: 8x in space, 1 + 4 * (n - 1) frames."""
    z = torch.cat((z[:, :, :1], z[:, :, 1:].repeat_interleave(4, dim=2)), dim=2)
    return z.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)


def downsample(x: Tensor) -> Tensor:
    """The encoder that goes with it."""
    return x[:, :, ::4, ::8, ::8]


@pytest.mark.parametrize(("tile", "overlap"), TILES)
@pytest.mark.parametrize(("width", "height"), PUBLISHED_SIZES)
def test_published_sizes_are_covered_with_weights_that_sum_to_one(
    width: int, height: int, tile: int, overlap: int
) -> None:
    """Tiles of ones blend to ones; what no tile covers would be left over from uninitialised memory."""
    axes = decoding_axes(VAETiling(size=tile, overlap=overlap))
    calls = []

    def ones(z: Tensor) -> Tensor:
        calls.append(tuple(z.shape[3:]))
        assert max(calls[-1]) * 8 <= tile
        return torch.ones_like(upsample(z))

    pixels = apply_tiled(ones, torch.zeros(1, 1, 1, height // 8, width // 8), axes)
    assert pixels.shape == (1, 1, 1, height, width)
    assert (pixels - 1).abs().max() <= 1e-6
    assert len(calls) == len(axes[1].starts(height // 8)) * len(axes[2].starts(width // 8))
    if tile < max(width, height):
        assert len(calls) > 1


@pytest.mark.parametrize(("tile", "overlap"), TILES)
@pytest.mark.parametrize(("width", "height"), PUBLISHED_SIZES)
def test_pointwise_decoder_does_not_notice(width: int, height: int, tile: int, overlap: int) -> None:
    axes = decoding_axes(VAETiling(size=tile, overlap=overlap))
    z = torch.randn(1, 1, 1, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    assert (apply_tiled(upsample, z, axes) - upsample(z)).abs().max() <= 1e-5


@pytest.mark.parametrize("latent_frames", [1, 2, 5, 6, 7, 8, 31])
def test_pointwise_decoder_does_not_notice_time_windows(latent_frames: int) -> None:
    axes = decoding_axes(VAETiling(size=256, overlap=64))
    z = torch.randn(2, 1, latent_frames, 36, 40, generator=torch.Generator().manual_seed(0))
    tiled = apply_tiled(upsample, z, axes)
    assert tiled.shape == (2, 1, 4 * (latent_frames - 1) + 1, 288, 320)
    assert (tiled - upsample(z)).abs().max() <= 1e-5


@pytest.mark.parametrize("frames", [1, 17, 25, 121])
def test_pointwise_encoder_does_not_notice(frames: int) -> None:
    scale_time, scale_space = Fraction(1, 4), Fraction(1, 8)
    axes = [TiledAxis(2, 17, 8, scale_time, causal=True)]
    axes += [TiledAxis(dim, 64, 48, scale_space) for dim in (3, 4)]
    x = torch.randn(1, 2, frames, 96, 144, generator=torch.Generator().manual_seed(0))
    tiled = apply_tiled(downsample, x, axes)
    assert tiled.shape == (1, 2, (frames - 1) // 4 + 1, 12, 18)
    assert (tiled - downsample(x)).abs().max() <= 1e-5


@pytest.mark.parametrize(("tile", "overlap"), [(256, 64), (576, 0), (768, 64)])
@pytest.mark.parametrize(("width", "height"), [(1024, 1024), (640, 1408), (1000, 1016), (8, 1544)])
def test_pictures_are_covered_in_both_directions(width: int, height: int, tile: int, overlap: int) -> None:
    """Pixels and latents of (batch, channels, height, width): values that need no neighbours come out unchanged."""
    tiling = VAETiling(size=tile, overlap=overlap)
    z = torch.randn(1, 2, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    decoded = apply_tiled(lambda z: z.repeat_interleave(8, 2).repeat_interleave(8, 3), z, tiling.spatial_axes(8, True))
    assert decoded.shape == (1, 2, height, width)
    assert (decoded[:, :, 3::8, 5::8] - z).abs().max() <= 1e-5
    encoded = apply_tiled(lambda x: x[:, :, ::8, ::8], decoded, tiling.spatial_axes(8, False))
    assert encoded.shape == z.shape
    assert (encoded - z).abs().max() <= 1e-5


def test_frames_are_cut_as_pictures_are() -> None:
    assert decoding_axes(VAETiling())[1:] == VAETiling().spatial_axes(8, decoding=True)


def test_what_the_vaes_share_has_one_definition() -> None:
    assert vae_hunyuan.VAETiling is VAETiling
    assert vae_hunyuan.DiagonalGaussian.__module__ == "kandinsky.models.vae_tiling"


def test_blend_is_linear_over_the_actual_overlap() -> None:
    """Two tiles of constant values 0 and 1: the last tile starts early, so the overlap is longer than asked for."""
    axis = TiledAxis(0, tile=8, stride=6, scale=Fraction(2))
    values = iter([0.0, 1.0])
    result = apply_tiled(lambda tile: torch.full((16,), next(values)), torch.zeros(11), [axis])
    # Tiles begin at 0 and 3 and make outputs 0..15 and 6..21: ten outputs are blended.
    expected = torch.tensor([0.0] * 6 + [x / 10 for x in range(10)] + [1.0] * 6)
    assert torch.allclose(result, expected, atol=1e-6)


def test_first_output_of_later_causal_tiles_is_dropped() -> None:
    """The published time windows with tiles of constant values 0 and 1: eight outputs are blended, not nine."""
    axis = TiledAxis(0, tile=5, stride=2, scale=Fraction(4), causal=True)
    values = iter([0.0, 1.0])
    result = apply_tiled(lambda tile: torch.full((17,), next(values)), torch.zeros(7), [axis])
    # The second tile makes outputs 8..24; without its first one the blend runs over 9..16.
    expected = torch.tensor([0.0] * 9 + [x / 8 for x in range(8)] + [1.0] * 8)
    assert torch.allclose(result, expected, atol=1e-6)


def test_one_tile_is_the_function_itself() -> None:
    axes = decoding_axes(VAETiling())
    z = torch.randn(1, 4, 5, 64, 96)
    seen = []

    def function(tile: Tensor) -> Tensor:
        seen.append(tile)
        return tile

    assert apply_tiled(function, z, axes) is z and len(seen) == 1
    assert torch.equal(apply_tiled(function, z, []), z)


def test_default_cut_of_a_decode() -> None:
    """17 frames every 8 are 5 latent frames every 2; 768 pixels with 64 shared are 96 latents every 88."""
    time, rows, columns = decoding_axes(VAETiling())
    assert (time.dim, time.tile, time.stride, time.scale, time.causal) == (2, 5, 2, 4, True)
    for axis, dim in ((rows, -2), (columns, -1)):
        assert (axis.dim, axis.tile, axis.stride, axis.scale, axis.causal) == (dim, 96, 88, 8, False)
    assert time.starts(31) == list(range(0, 27, 2))
    assert columns.starts(176) == [0, 80]  # 1408 pixels: the overlap is what the width leaves


@given(
    length=st.integers(1, 400),
    tile=st.integers(1, 128),
    overlap_share=st.floats(0, 0.99),
    scale=st.sampled_from([1, 4, 8]),
)
def test_starts(length: int, tile: int, overlap_share: float, scale: int) -> None:
    stride = max(1, tile - int(tile * overlap_share))
    axis = TiledAxis(0, tile, stride, Fraction(scale))
    starts = axis.starts(length)
    assert starts[0] == 0
    if length <= tile:
        assert starts == [0]
        return
    assert starts[-1] == length - tile  # the last tile ends at the end, so every tile is complete
    for earlier, later in pairwise(starts):
        assert 0 < later - earlier <= stride  # consecutive tiles share at least tile - stride
    assert axis.output_length(length) == scale * length


@given(length=st.integers(1, 60), tile=st.integers(2, 20), stride=st.integers(1, 19), causal=st.booleans())
def test_any_cut_of_a_pointwise_function(length: int, tile: int, stride: int, causal: bool) -> None:
    # A causal tile's first output is dropped, so neighbours must share an element for nothing to be missing.
    stride = min(stride, tile - 1)
    axis = TiledAxis(0, tile, stride, Fraction(4), causal=causal)

    def function(x: Tensor) -> Tensor:
        return x.repeat_interleave(4)[3 if causal else 0 :]

    x = torch.arange(1.0, length + 1)
    assert torch.allclose(apply_tiled(function, x, [axis]), function(x), rtol=1e-6)
