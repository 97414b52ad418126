"""Qwen2.5-VL's vision tower: patches of pictures in, tokens of the language model out; and what both are built from.

Patches attend within windows of 8 x 8, in some blocks within the whole picture; then four neighbours become a token.
State-dict keys are the checkpoints'. Knows no files, tokenizers or devices. Paper: Qwen2.5-VL (arXiv 2502.13923).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

MERGER_EPS = NORM_EPS = 1e-6
ROTARY_BASE = 10000.0


@dataclass(frozen=True)
class QwenVisionConfig:
    """Sizes of the tower; window_size in pixels, patch_size too; fullatt_block_indexes see the whole picture."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int
    window_size: int
    out_hidden_size: int
    fullatt_block_indexes: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(f"{self.hidden_size} channels and {self.num_heads} heads: a head needs a multiple of 4")
        if self.window_size < self.patch_size * self.spatial_merge_size:
            raise ValueError(f"a window of {self.window_size} pixels is smaller than a token")


class RMSNorm(nn.Module):
    """In float32 but for the weight, which is multiplied in the tensor's own dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class SwiGLU(nn.Module):
    def __init__(self, dim: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, inner, bias)
        self.up_proj = nn.Linear(dim, inner, bias)
        self.down_proj = nn.Linear(inner, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a), the halves of the last dimension: with cos and sin a rotation of pairs that lie half apart."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class VisionAttention(nn.Module):
    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, lengths: Sequence[int], cos: Tensor, sin: Tensor) -> Tensor:
        """x (N, D), of which stretches of `lengths` attend to themselves."""
        q, k, v = rearrange(self.qkv(x), "n (three h d) -> three n h d", three=3, h=self.num_heads)
        q, k = ((wide * cos[:, None] + rotate_half(wide) * sin[:, None]).to(v.dtype) for wide in (q.float(), k.float()))
        stretches = zip(*(rearrange(tokens, "n h d -> 1 h n d").split(lengths, 2) for tokens in (q, k, v)), strict=True)
        out = torch.cat([F.scaled_dot_product_attention(*stretch) for stretch in stretches], dim=2)
        return self.proj(rearrange(out, "1 h n d -> n (h d)"))


class VisionBlock(nn.Module):
    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, NORM_EPS)
        self.norm2 = RMSNorm(config.hidden_size, NORM_EPS)
        self.attn = VisionAttention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, lengths: Sequence[int], cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), lengths, cos, sin)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, kernel, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """(N, channels * frames * rows * columns) -> (N, D)."""
        return self.proj(patches.view(-1, *self.proj.weight.shape[1:])).flatten(1)


class PatchMerger(nn.Module):
    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, MERGER_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.out_hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.mlp[0].in_features))


class QwenVision(nn.Module):
    """The tower."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, patches: Tensor, grids: Sequence[Sequence[int]]) -> Tensor:
        """Patches (N, pixels of one) of pictures with `grids` (time, rows, columns) -> (N / 4, D of the text).

        The four patches of a token follow each other.
        """
        config, group = self.config, self.config.spatial_merge_size**2
        order, windows = window_order(grids, config)
        order, inverse = order.to(patches.device), order.argsort().to(patches.device)
        pictures = [h * w for t, h, w in grids for _ in range(t)]

        def in_windows(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, group))[order].flatten(0, 1)

        x = in_windows(self.patch_embed(patches))
        angles = in_windows(rotary_angles(grids, config).to(patches.device))
        cos, sin = angles.cos(), angles.sin()
        for number, block in enumerate(self.blocks):
            x = block(x, pictures if number in config.fullatt_block_indexes else windows, cos, sin)
        return self.merger(x)[inverse]


def rotary_angles(grids: Sequence[Sequence[int]], config: QwenVisionConfig) -> Tensor:
    """Angles (N, head_dim) of all patches: a quarter turns with the row, a quarter with the column, and again."""
    channels = config.hidden_size // config.num_heads // 2
    frequencies = 1.0 / ROTARY_BASE ** (torch.arange(0, channels, 2, dtype=torch.float32) / channels)
    merge, positions = config.spatial_merge_size, []
    for t, h, w in grids:
        axes = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), dim=-1)
        positions += [rearrange(axes, "(h a) (w b) two -> (h w a b) two", a=merge, b=merge)] * t
    angles = (torch.cat(positions)[..., None].float() * frequencies).flatten(1)  # (N, head_dim / 2)
    return torch.cat((angles, angles), dim=-1)


def window_order(grids: Sequence[Sequence[int]], config: QwenVisionConfig) -> tuple[Tensor, list[int]]:
    """The order of tokens (groups of patches) in which windows are stretches, and how many patches each has."""
    merge = config.spatial_merge_size
    side = config.window_size // merge // config.patch_size  # tokens
    parts: list[Tensor] = []
    first = 0
    for t, h, w in grids:
        rows, columns = h // merge, w // merge
        numbers = torch.arange(first, first + t * rows * columns).view(t, rows, columns)
        parts += [
            part.flatten()
            for frame in numbers
            for row_of_windows in frame.split(side, 0)
            for part in row_of_windows.split(side, 1)
        ]
        first += t * rows * columns
    return torch.cat(parts), [len(part) * merge**2 for part in parts]
