"""FLUX.1's image VAE: pixels to latents and back, 8x smaller on both sides.

Latents are handed out unscaled: multiply by `scaling_factor` for the diffusion model. Knows no devices and no files;
how a large picture is cut into tiles is an argument (`VAETiling`).

On a CPU, `vae.to(memory_format=torch.channels_last)` makes everything faster, in bfloat16 several times.

State-dict keys are those of the published file (FLUX.1-dev, Black Forest Labs; 244 tensors).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky.models.numerics import upcast
from kandinsky.models.vae_hunyuan import FrameCausalAttention, layers_of
from kandinsky.models.vae_tiling import DiagonalGaussian, MapTiles, VAETiling, apply_tiled

GROUP_NORM_EPS = 1e-6


def silu(x: Tensor) -> Tensor:
    """SiLU, in x's own memory where autograd does not need it."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class Conv2d(nn.Conv2d):
    """With `in_float32` products are float32's; what comes in, what goes out and the weights keep their dtype."""

    in_float32 = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.in_float32:
            return super().forward(x)
        assert self.bias is not None
        return self._conv_forward(x.float(), self.weight.float(), self.bias.float()).to(x.dtype)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=GROUP_NORM_EPS)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=GROUP_NORM_EPS)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Identity() if in_channels == out_channels else Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(silu(self.norm1(x)))
        hidden = self.conv2(silu(self.norm2(hidden)))
        shortcut = self.conv_shortcut(x)
        return hidden + shortcut if torch.is_grad_enabled() else hidden.add_(shortcut)


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int, add_attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([FrameCausalAttention(channels, groups)] if add_attention else [])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x[:, :, None])[:, :, 0]  # a picture is a video of one frame
        return self.resnets[1](x)


class Downsample(nn.Module):
    """Convolution of stride 2, padded with zeros at the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a convolution, as one transposed convolution with a 4x4 kernel.

    The same sum, but the upsampled tensor is never made, and every output pixel takes 4 products a channel instead of
    9: along a side the three taps (a, b, c) of an output see only two different inputs, so two of them add up first.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        kernel = upcast(self.conv.weight)  # (C out, C in, 3, 3)
        for dim in (2, 3):
            a, b, c = kernel.unbind(dim)
            kernel = torch.stack((c, b + c, a + b, a), dim)
        dtype = torch.float32 if self.conv.in_float32 else x.dtype
        kernel = kernel.transpose(0, 1).to(dtype)  # (C in, C out, 4, 4)
        assert self.conv.bias is not None
        return F.conv_transpose2d(x.to(dtype), kernel, self.conv.bias.to(dtype), stride=2, padding=1).to(x.dtype)


class DownBlock(nn.Module):
    """A level of the encoder; `layers_of` runs its layers."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, downsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(layers)
        )
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if downsample else [])


class UpBlock(nn.Module):
    """A level of the decoder; `layers_of` runs its layers."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, upsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(layers)
        )
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])


class Encoder(nn.Module):
    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        channels: Sequence[int],
        layers: int,
        groups: int,
        mid_attention: bool,
    ) -> None:
        super().__init__()
        last = len(channels) - 1
        self.conv_in = Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(channels[max(i - 1, 0)], channels[i], layers, groups, i < last) for i in range(len(channels))
        )
        self.mid_block = MidBlock(channels[-1], groups, mid_attention)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=GROUP_NORM_EPS)
        self.conv_out = Conv2d(channels[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for layer in layers_of(self.down_blocks):
            x = layer(x)
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(
        self,
        out_channels: int,
        latent_channels: int,
        channels: Sequence[int],
        layers: int,
        groups: int,
        mid_attention: bool,
    ) -> None:
        super().__init__()
        last = len(channels) - 1
        deep_first = list(reversed(channels))
        self.conv_in = Conv2d(latent_channels, deep_first[0], 3, padding=1)
        self.mid_block = MidBlock(deep_first[0], groups, mid_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(deep_first[max(i - 1, 0)], deep_first[i], layers + 1, groups, i < last)
            for i in range(len(channels))
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[0], eps=GROUP_NORM_EPS)
        self.conv_out = Conv2d(channels[0], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for layer in layers_of(self.up_blocks):
            x = layer(x)
        return self.conv_out(silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """The VAE; arguments are the keys of the published `vae/config.json`.

    `shift_factor` is kept because the file has it. The Kandinsky image models were trained without it: latents are
    scaled and not shifted.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 16,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        scaling_factor: float = 0.3611,
        shift_factor: float = 0.1159,
    ) -> None:
        super().__init__()
        self.scaling_factor = scaling_factor
        self.block_out_channels = tuple(block_out_channels)
        self.float32_convolutions = False
        self.shift_factor = shift_factor
        self.spatial_compression_ratio = 2 ** (len(block_out_channels) - 1)
        shared = (latent_channels, block_out_channels, layers_per_block, norm_num_groups, mid_block_add_attention)
        self.encoder = Encoder(in_channels, *shared)
        self.decoder = Decoder(out_channels, *shared)

    def encode(self, x: Tensor, tiling: VAETiling | None = None) -> DiagonalGaussian:
        """x (B, 3, H, W) in [-1, 1], sides in multiples of 8 -> distribution over latents (B, C, H / 8, W / 8)."""
        ratio, (height, width) = self.spatial_compression_ratio, x.shape[2:]
        if height % ratio or width % ratio:
            raise ValueError(f"{width}x{height} pixels; the VAE takes sides in multiples of {ratio}")
        axes = tiling.spatial_axes(ratio, decoding=False) if tiling else []
        return DiagonalGaussian(apply_tiled(self.encoder, x, axes))

    def decode(self, z: Tensor, tiling: VAETiling | None = None, map_tiles: MapTiles = map) -> Tensor:
        """z (B, C, h, w) unscaled latents -> pixels (B, 3, 8h, 8w), about [-1, 1], not clamped."""
        axes = tiling.spatial_axes(self.spatial_compression_ratio, decoding=True) if tiling else []
        return apply_tiled(self.decoder, z, axes, map_tiles)

    def convolve_in_float32(self, enabled: bool = True) -> None:
        """For CPUs that have no arithmetic in the VAE's dtype, where its convolutions take several times as long."""
        self.float32_convolutions = enabled
        for module in self.modules():
            if isinstance(module, Conv2d):
                module.in_float32 = enabled
