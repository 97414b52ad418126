"""HunyuanVideo's causal 3-D VAE: pixels to latents and back, 8x smaller in space and 4x in time.

One frame is an image and 1 + 4n frames make 1 + n latent frames. Latents are handed out unscaled: multiply by
`scaling_factor` for the diffusion model. Knows no devices and no files; how a large input is cut into tiles is an
argument (`VAETiling`).

State-dict keys are those of the published file (HunyuanVideo, Tencent; 248 tensors).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kandinsky.models.causal_conv import (
    CausalConv3d,
    FrameOperation,
    convolve,
    new_video,
    padded_windows,
    unchanged,
)
from kandinsky.models.numerics import upcast
from kandinsky.models.vae_tiling import DiagonalGaussian, MapTiles, TiledAxis, VAETiling, apply_tiled

GROUP_NORM_EPS = 1e-6


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, T, C) of every channel in every frame of x (B, C, T, H, W), in float32.

    Where it can be by batch norm's kernel, which reads x once and leaves no copy of it in float32.
    """
    # Running statistics are asked for, and no use to us.
    running_mean, running_variance = (upcast(x.new_zeros(x.shape[1])) for _ in range(2))

    def of(frame: Tensor) -> tuple[Tensor, Tensor]:
        if x.device.type in ("cpu", "cuda"):
            return torch.batch_norm_update_stats(frame, running_mean, running_variance, momentum=0.0)
        variance, mean = torch.var_mean(upcast(frame), (0, 2, 3), correction=0)
        return mean, variance

    found = [of(frame) for sample in x.split(1) for frame in sample.unbind(2)]
    means, variances = (torch.stack(values).unflatten(0, (x.shape[0], -1)) for values in zip(*found, strict=True))
    return means, variances


def norm_and_silu(norm: nn.GroupNorm, x: Tensor) -> FrameOperation:
    """GroupNorm over all of x (B, C, T, H, W), then SiLU, as an operation that takes x's frames a few at a time."""
    if torch.is_grad_enabled():
        return lambda frames: F.silu(norm(frames))  # the frames are all of x

    groups = norm.num_groups, -1
    means, variances = (values.unflatten(2, groups) for values in channel_statistics(x))  # (B, T, groups, C / groups)
    mean = means.mean((1, 3)).unsqueeze(-1)
    variance = (variances.mean((1, 3)) + means.var((1, 3), correction=0)).unsqueeze(-1)
    factor = upcast(norm.weight).unflatten(0, groups) / torch.sqrt(variance + norm.eps)  # (B, groups, C / groups)
    offset = upcast(norm.bias).unflatten(0, groups) - factor * mean
    factor, offset = (value.flatten(1)[:, :, None, None, None] for value in (factor, offset))

    def normalise(frames: Tensor, out: Tensor) -> Tensor:
        if frames.device.type == "cpu" and frames.dtype != factor.dtype:
            # There operations of mixed dtypes make copies in the wider one: better one, in which all is done.
            wide = out.copy_(frames) if out.dtype == factor.dtype else upcast(frames)
            F.silu(torch.addcmul(offset, wide, factor, out=wide), inplace=True)
            return out if wide is out else out.copy_(wide)
        return F.silu(torch.addcmul(offset, frames, factor, out=out), inplace=True)

    return normalise


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
        def shortcut(begin: int, end: int) -> Tensor:
            frames = x[:, :, begin:end]
            return self.conv_shortcut(frames) if hasattr(self, "conv_shortcut") else frames

        hidden = self.conv1(x, norm_and_silu(self.norm1, x))
        return self.conv2(hidden, norm_and_silu(self.norm2, hidden), out=hidden, add=shortcut)


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
        frames, rows, columns = x.shape[2:]
        tokens_per_frame = rows * columns
        tokens = rearrange(self.group_norm(x), "b c t h w -> b 1 (t h w) c")
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        outs = []
        for frame in range(frames):
            begin, end = frame * tokens_per_frame, (frame + 1) * tokens_per_frame
            outs.append(F.scaled_dot_product_attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end]))
        out = self.to_out[0](torch.cat(outs, dim=2))
        return x + rearrange(out, "b 1 (t h w) c -> b c t h w", t=frames, h=rows, w=columns)


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


def phase_kernels(weight: Tensor, dim: int, factor: int) -> tuple[Tensor, ...]:
    """Kernels along `dim` for each of the `factor` outputs that nearest-neighbour upsampling makes of one input.

    Upsampled by 2, the three taps (a, b, c) of an output see only two different inputs: (a, b + c) the one before and
    its own, or (a + b, c), depending on which of the two outputs it is.
    """
    if factor == 1:
        return (weight,)
    a, b, c = weight.unbind(dim)
    return torch.stack((a, b + c), dim), torch.stack((a + b, c), dim)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by `factor` (each 1 or 2), then a convolution; the first frame isn't repeated.

    Without autograd the upsampled tensor is never made: every phase of the output is a convolution of the input with
    its own, smaller kernel, which is the same sum with less than a third of the products.
    """

    def __init__(self, channels: int, factor: tuple[int, int, int]) -> None:
        super().__init__()
        self.factor = factor
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self._repeat_and_convolve(x) if torch.is_grad_enabled() else self._convolve_phases(x)

    def _repeat_and_convolve(self, x: Tensor) -> Tensor:
        time, height, width = self.factor
        if time > 1:
            x = torch.cat((x[:, :, :1], x[:, :, 1:].repeat_interleave(time, dim=2)), dim=2)
        pictures = rearrange(x, "b c t h w -> (b t) c h w")
        pictures = F.interpolate(pictures, scale_factor=(height, width), mode="nearest")
        return self.conv(rearrange(pictures, "(b t) c h w -> b c t h w", t=x.shape[2]))

    def _convolve_phases(self, x: Tensor) -> Tensor:
        batch, channels, frames, rows, columns = x.shape
        time, height, width = self.factor
        conv, dtype = self.conv.conv, self.conv.dtype_inside(x)
        weight = upcast(conv.weight)
        if frames == 1:
            time, weight = 1, weight.sum(2, keepdim=True)
        kernels = {}
        for i, by_row in enumerate(phase_kernels(weight, 3, height)):
            for j, by_column in enumerate(phase_kernels(by_row, 4, width)):
                # Both phases of time see the same frames: one convolution with twice the output channels.
                kernels[i, j] = torch.cat(phase_kernels(by_column, 2, time)).to(dtype)
        taps = next(iter(kernels.values())).shape[2]
        bias = None if conv.bias is None else conv.bias.repeat(time).to(dtype)

        out = None
        for begin, end, window in padded_windows(x, unchanged, border=1, taps=taps, dtype=dtype):
            for (i, j), kernel in kernels.items():
                if self.conv.for_cpu:
                    view = window[..., i : i + rows + kernel.shape[3] - 1, j : j + columns + kernel.shape[4] - 1]
                    phases = convolve(view, kernel, bias, conv.stride, self.conv.is_by_frame(view))
                else:
                    # A GPU's kernels copy a view that has gaps: a row and a column of results too many cost less.
                    phases = convolve(window, kernel, bias, conv.stride, self.conv.is_by_frame(window))
                    phases = phases[..., i : i + rows, j : j + columns]
                own, *earlier = phases.chunk(time, dim=1)
                if out is None:
                    size = (time * (frames - 1) + 1, height * rows, width * columns)
                    out = new_video(own, (batch, channels, *size), x.dtype)
                pixels = out[..., i::height, j::width]
                pixels[:, :, time * begin : time * (end - 1) + 1 : time] = own
                for phase in earlier:  # input frame n > 0 makes the output frames 2n - 1 and 2n
                    first = max(begin, 1)
                    pixels[:, :, time * first - 1 : time * (end - 1) : time] = phase[:, :, first - begin :]
                    del phase
                del phases, own, earlier  # before the next ones are made
        assert out is not None
        return out


class DownBlock(nn.Module):
    """A level of the encoder; `layers_of` runs its layers."""

    def __init__(
        self, in_channels: int, out_channels: int, layers: int, groups: int, stride: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(layers)
        )
        self.downsamplers = nn.ModuleList([Downsample(out_channels, stride)] if max(stride) > 1 else [])


class UpBlock(nn.Module):
    """A level of the decoder; `layers_of` runs its layers."""

    def __init__(
        self, in_channels: int, out_channels: int, layers: int, groups: int, factor: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(layers)
        )
        self.upsamplers = nn.ModuleList([Upsample(out_channels, factor)] if max(factor) > 1 else [])


def layers_of(blocks: nn.ModuleList) -> Iterator[nn.Module]:
    """The blocks' layers in order: run one by one, so that nothing holds a block's input while its later layers run."""
    for block in blocks:
        for layers in block.children():
            assert isinstance(layers, nn.ModuleList)
            yield from layers


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
        for layer in layers_of(self.down_blocks):
            x = layer(x)
        x = self.mid_block(x)
        return self.conv_out(x, norm_and_silu(self.conv_norm_out, x))


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
        for layer in layers_of(self.up_blocks):
            x = layer(x)
        return self.conv_out(x, norm_and_silu(self.conv_norm_out, x))


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
        self.block_out_channels = tuple(block_out_channels)
        self.float32_convolutions = False
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

    def decode(self, z: Tensor, tiling: VAETiling | None = None, map_tiles: MapTiles = map) -> Tensor:
        """z (B, C, n + 1, h, w) unscaled latents -> pixels (B, 3, 4n + 1, 8h, 8w), about [-1, 1], not clamped."""
        axes = self._tiled_axes(tiling, decoding=True)
        return apply_tiled(lambda tile: self.decoder(self.post_quant_conv(tile)), z, axes, map_tiles)

    def convolve_by_frame(self, enabled: bool = True) -> None:
        """For CPUs: channels-last memory, and 2-D convolutions (see `CausalConv3d`) wherever 3-D ones are slow there.

        oneDNN's 3-D kernels are as fast as its 2-D ones for input channels in multiples of 32, several times slower
        for others; for 1x1x1 there are none at all, and small inputs PyTorch doesn't hand to it in 3-D. Their gradients
        in bfloat16 take minutes, so training is 2-D.
        """
        self.to(memory_format=torch.channels_last_3d if enabled else torch.contiguous_format)  # type: ignore[call-overload]
        for module in self.modules():
            if isinstance(module, CausalConv3d):
                narrow = module.conv.in_channels % 32 != 0
                module.by_frame = enabled and (narrow or module.conv.kernel_size == (1, 1, 1))
                module.for_cpu = enabled

    def convolve_in_float32(self, enabled: bool = True) -> None:
        """For CPUs that have no arithmetic in the VAE's dtype, where its convolutions take a hundred times as long."""
        self.float32_convolutions = enabled
        for module in self.modules():
            if isinstance(module, CausalConv3d):
                module.in_float32 = enabled

    def _tiled_axes(self, tiling: VAETiling | None, decoding: bool) -> list[TiledAxis]:
        if tiling is None:
            return []
        ratio, frames, stride = self.temporal_compression_ratio, tiling.frames, tiling.frame_stride
        if decoding:
            time = TiledAxis(2, (frames - 1) // ratio + 1, stride // ratio, Fraction(ratio), causal=True)
        else:
            time = TiledAxis(2, frames, stride, Fraction(1, ratio), causal=True)
        return [time, *tiling.spatial_axes(self.spatial_compression_ratio, decoding)]
