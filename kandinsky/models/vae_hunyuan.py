"""HunyuanVideo's causal 3-D VAE: pixels to latents and back, 8x smaller in space and 4x in time.

Convolutions are causal in time (frame t sees frames <= t), so one frame is an image and 1 + 4n frames make 1 + n
latent frames. Latents are handed out unscaled: multiply by `scaling_factor` for the diffusion model. Knows no devices
and no files; how a large input is cut into tiles is an argument (`VAETiling`).

State-dict keys are those of the published file (HunyuanVideo, Tencent; 248 tensors).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky.models.vae_tiling import TiledAxis, apply_tiled

GROUP_NORM_EPS = 1e-6


@dataclass(frozen=True)
class VAETiling:
    """How pixels are cut: time windows of `frames` every `frame_stride`, squares of `size` overlapping by `overlap`.

    Frames are 4n + 1 and `frame_stride` a multiple of 4; `size` and `overlap` are pixels, multiples of 8. The default
    windows (17, 8) are the ones the published pipeline decodes with.
    """

    frames: int = 17
    frame_stride: int = 8
    size: int = 768
    overlap: int = 64


class DiagonalGaussian:
    """The encoder's output distribution; `moments` (B, 2C, T, H, W) are mean and log-variance."""

    def __init__(self, moments: Tensor) -> None:
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Noise is drawn in float32 where the generator lives, so that a CPU seed means the same on every device."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=torch.float32)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)


class CausalConv3d(nn.Module):
    """Convolution that pads by repeating the border: both sides in space, only the past in time.

    With `by_frame` every time tap is a 2-D convolution and the taps are added up: the same sum in another order. On a
    CPU that is several times faster, because 2-D convolutions have kernels there that 3-D ones lack.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: tuple[int, int, int] = (1, 1, 1)):
        super().__init__()
        self.border = kernel // 2
        self.history = kernel - 1  # how many earlier frames an output frame sees
        self.by_frame = False
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C', ceil(T / stride), ...)."""
        if self.by_frame:
            return self._forward_by_frame(x)
        border = (self.border,) * 4
        if self.history:
            x = F.pad(x, (*border, self.history, 0), mode="replicate")
        return self.conv(x)

    def _forward_by_frame(self, x: Tensor) -> Tensor:
        batch, _, frames = x.shape[:3]
        stride_time, *stride = self.conv.stride
        x = x.transpose(1, 2).flatten(0, 1)  # (B*T, C, H, W), without a copy where x is channels-last
        if self.border:
            x = F.pad(x, (self.border,) * 4, mode="replicate")
        if frames == 1:
            # The only frame is its own past: all taps see the same picture, so their sum is one convolution.
            out = F.conv2d(x, self.conv.weight.sum(2), self.conv.bias, stride)
            return out.unsqueeze(2)
        x = x.unflatten(0, (batch, frames))
        # Before the first frame there is the first frame.
        x = torch.cat((*[x[:, :1]] * self.history, x), dim=1)  # (B, history + T, C, H, W)
        taps = self.conv.weight.unbind(2)
        parts = []
        for tap, weight in enumerate(taps):
            pictures = x[:, tap : tap + frames : stride_time].flatten(0, 1)
            bias = self.conv.bias if tap == self.history else None
            parts.append(F.conv2d(pictures, weight, bias, stride))
        return sum(parts[1:], parts[0]).unflatten(0, (batch, -1)).transpose(1, 2)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=GROUP_NORM_EPS)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=GROUP_NORM_EPS)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        if in_channels != out_channels:
            self.conv_shortcut = CausalConv3d(in_channels, out_channels, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class FrameCausalAttention(nn.Module):
    """Single-head attention in which a frame sees itself and every earlier frame.

    Computed frame by frame over a growing set of keys: the same result as one masked attention over all T*H*W tokens,
    without its (T*H*W)^2 mask.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=GROUP_NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list only because the key is `to_out.0`

    def forward(self, x: Tensor) -> Tensor:
        frames, tokens_per_frame = x.shape[2], x.shape[3] * x.shape[4]
        tokens = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, T*H*W, C)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        outs = []
        for frame in range(frames):
            begin, end = frame * tokens_per_frame, (frame + 1) * tokens_per_frame
            outs.append(F.scaled_dot_product_attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end]))
        out = self.to_out[0](torch.cat(outs, dim=2))
        return x + out.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int, add_attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([FrameCausalAttention(channels, groups)] if add_attention else [])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    def __init__(self, channels: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by `factor`, then a convolution; the first frame is not repeated in time."""

    def __init__(self, channels: int, factor: tuple[int, int, int]) -> None:
        super().__init__()
        self.factor = factor
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        time, height, width = self.factor
        if time > 1:
            x = torch.cat((x[:, :, :1], x[:, :, 1:].repeat_interleave(time, dim=2)), dim=2)
        batch = x.shape[0]
        pictures = x.transpose(1, 2).flatten(0, 1)
        pictures = F.interpolate(pictures, scale_factor=(height, width), mode="nearest")
        return self.conv(pictures.unflatten(0, (batch, -1)).transpose(1, 2))


class DownBlock(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, layers: int, groups: int, stride: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(layers)
        )
        self.downsamplers = nn.ModuleList([Downsample(out_channels, stride)] if max(stride) > 1 else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, layers: int, groups: int, factor: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(layers)
        )
        self.upsamplers = nn.ModuleList([Upsample(out_channels, factor)] if max(factor) > 1 else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


def level_factors(levels: int, spatial: int, temporal: int) -> list[tuple[int, int, int]]:
    """(time, height, width) factors of each level: space first at the pixels' end, time last, none at the deepest.

    For the published 4 levels, 8x in space and 4x in time, the encoder's are (1,2,2), (2,2,2), (2,2,2), (1,1,1) and
    the decoder's, counted from the latents, the same.
    """
    num_space, num_time = int(math.log2(spatial)), int(math.log2(temporal))
    factors = []
    for level in range(levels):
        last = level == levels - 1
        space = 2 if level < num_space else 1
        time = 2 if level >= levels - 1 - num_time and not last else 1
        factors.append((time, space, space))
    return factors


class Encoder(nn.Module):
    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        channels: Sequence[int],
        layers: int,
        groups: int,
        factors: Sequence[tuple[int, int, int]],
        mid_attention: bool,
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(in_channels, channels[0])
        self.down_blocks = nn.ModuleList(
            DownBlock(channels[max(i - 1, 0)], channels[i], layers, groups, factors[i]) for i in range(len(channels))
        )
        self.mid_block = MidBlock(channels[-1], groups, mid_attention)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=GROUP_NORM_EPS)
        self.conv_out = CausalConv3d(channels[-1], 2 * latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(
        self,
        out_channels: int,
        latent_channels: int,
        channels: Sequence[int],
        layers: int,
        groups: int,
        factors: Sequence[tuple[int, int, int]],
        mid_attention: bool,
    ) -> None:
        super().__init__()
        deep_first = list(reversed(channels))
        self.conv_in = CausalConv3d(latent_channels, deep_first[0])
        self.mid_block = MidBlock(deep_first[0], groups, mid_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(deep_first[max(i - 1, 0)], deep_first[i], layers + 1, groups, factors[i])
            for i in range(len(channels))
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[0], eps=GROUP_NORM_EPS)
        self.conv_out = CausalConv3d(channels[0], out_channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKLHunyuanVideo(nn.Module):
    """The VAE; arguments are the keys of the published `vae/config.json`."""

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
        scaling_factor: float = 0.476986,
        spatial_compression_ratio: int = 8,
        temporal_compression_ratio: int = 4,
    ) -> None:
        super().__init__()
        self.scaling_factor = scaling_factor
        self.spatial_compression_ratio = spatial_compression_ratio
        self.temporal_compression_ratio = temporal_compression_ratio
        factors = level_factors(len(block_out_channels), spatial_compression_ratio, temporal_compression_ratio)
        shared = (latent_channels, block_out_channels, layers_per_block, norm_num_groups)
        self.encoder = Encoder(in_channels, *shared, factors, mid_block_add_attention)
        self.decoder = Decoder(out_channels, *shared, factors, mid_block_add_attention)
        self.quant_conv = nn.Conv3d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv3d(latent_channels, latent_channels, 1)

    def encode(self, x: Tensor, tiling: VAETiling | None = None) -> DiagonalGaussian:
        """x (B, 3, T, H, W) in [-1, 1], T = 4n + 1 -> distribution over latents (B, C, n + 1, H / 8, W / 8)."""
        if (x.shape[2] - 1) % self.temporal_compression_ratio:
            ratio = self.temporal_compression_ratio
            raise ValueError(
                f"{x.shape[2]} frames; the VAE takes {ratio}n + 1 of them (1, {1 + ratio}, {1 + 2 * ratio}...)"
            )
        axes = self._tiled_axes(tiling, decoding=False)
        return DiagonalGaussian(apply_tiled(lambda tile: self.quant_conv(self.encoder(tile)), x, axes))

    def decode(self, z: Tensor, tiling: VAETiling | None = None) -> Tensor:
        """z (B, C, n + 1, h, w) unscaled latents -> pixels (B, 3, 4n + 1, 8h, 8w), about [-1, 1], not clamped."""
        axes = self._tiled_axes(tiling, decoding=True)
        return apply_tiled(lambda tile: self.decoder(self.post_quant_conv(tile)), z, axes)

    def convolve_by_frame(self, enabled: bool = True) -> None:
        """Compute every 3-D convolution as 2-D ones (see `CausalConv3d`), in channels-last memory: for CPUs."""
        self.to(memory_format=torch.channels_last_3d if enabled else torch.contiguous_format)  # type: ignore[call-overload]
        for module in self.modules():
            if isinstance(module, CausalConv3d):
                module.by_frame = enabled

    def _tiled_axes(self, tiling: VAETiling | None, decoding: bool) -> list[TiledAxis]:
        if tiling is None:
            return []
        time, space = self.temporal_compression_ratio, self.spatial_compression_ratio
        frames, frame_stride = tiling.frames, tiling.frame_stride
        size, stride = tiling.size, tiling.size - tiling.overlap
        if decoding:
            frames, frame_stride = (frames - 1) // time + 1, frame_stride // time
            size, stride = size // space, stride // space
        time_scale, space_scale = Fraction(time), Fraction(space)
        if not decoding:
            time_scale, space_scale = 1 / time_scale, 1 / space_scale
        return [
            TiledAxis(2, frames, frame_stride, time_scale, causal=True),
            TiledAxis(3, size, stride, space_scale),
            TiledAxis(4, size, stride, space_scale),
        ]
