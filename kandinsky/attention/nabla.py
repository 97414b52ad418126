"""NABLA: neighbourhood-adaptive block-level attention (arXiv 2507.13546).

In every layer and head, blocks of 64 tokens (8 x 8 patches of one frame) look at the blocks that hold most of a
coarse attention map's mass, and at those within a window around them. This module makes the map and what belongs to
it: the window, and the order of tokens in which a block's tokens are neighbours. How attention under a map is computed
is block_sparse.py's business; models and requests it does not know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from kandinsky.attention.block_sparse import BlockSparseAttention, head_chunks
from kandinsky.common.limits import BLOCK_SIDE, BLOCK_TOKENS


@dataclass(frozen=True)
class NablaConfig:
    """What NABLA keeps. Defaults are those that most published models were trained with.

    P: the share of a row's attention mass, more than 0 and at most 1; the blocks of least mass are dropped as long as
    together they stay below 1 - P. wT, wH, wW: size of the window in blocks along frames, rows and columns: blocks up
    to wT // 2 frames away are kept whatever their mass, and so on.
    """

    P: float = 0.9
    wT: int = 11
    wH: int = 3
    wW: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.P <= 1:
            raise ValueError(f"NABLA's P is {self.P}; it is a share of attention mass, more than 0 and at most 1")
        for name in ("wT", "wH", "wW"):
            if getattr(self, name) < 1:
                raise ValueError(f"NABLA's {name} is {getattr(self, name)}; a window is at least 1 block wide")


PUBLISHED = NablaConfig()


@dataclass(frozen=True)
class NablaTables:
    """What depends only on a request's patch grid and its config: made once, used in every layer of every step."""

    config: NablaConfig
    order: Tensor  # (N,) row-major index of each token, block by block
    inverse: Tensor  # (N,) the way back
    window: Tensor  # (n, n) bool, n = N / 64

    def keeping(self, P: float) -> NablaTables:
        """The same for another share of the mass."""
        return self if P == self.config.P else replace(self, config=replace(self.config, P=P))


def nabla_tables(grid: tuple[int, int, int], config: NablaConfig, device: torch.device | str) -> NablaTables:
    """Tables for a grid of (frames, rows, columns) patches. Raises ValueError where it does not divide into blocks."""
    frames, rows, columns = block_grid(grid)
    order = block_order(grid, device)
    window = fast_sta_nabla(frames, rows, columns, config.wT, config.wH, config.wW, device)
    return NablaTables(config, order, order.argsort(), window)


def block_grid(grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """(frames, rows, columns) of patches -> of blocks. Raises ValueError where rows or columns leave a rest."""
    frames, rows, columns = grid
    if rows % BLOCK_SIDE or columns % BLOCK_SIDE:
        raise ValueError(
            f"NABLA works on blocks of {BLOCK_SIDE}x{BLOCK_SIDE} patches, and {rows}x{columns} patches do not divide "
            "into them: width and height have to be multiples of 128 pixels"
        )
    return frames, rows // BLOCK_SIDE, columns // BLOCK_SIDE


def block_order(grid: tuple[int, int, int], device: torch.device | str) -> Tensor:
    """Indices (N,) that put the row-major tokens of a patch grid into blocks: row-major blocks, row-major inside."""
    frames, rows, columns = block_grid(grid)
    tokens = torch.arange(math.prod(grid), device=device)
    pattern, side = "(t h bh w bw) -> (t h w bh bw)", {"bh": BLOCK_SIDE, "bw": BLOCK_SIDE}
    return rearrange(tokens, pattern, t=frames, h=rows, w=columns, **side)


def fast_sta_nabla(
    T: int, H: int, W: int, wT: int = 3, wH: int = 3, wW: int = 3, device: torch.device | str = "cpu"
) -> Tensor:
    """The sliding window: bool (T*H*W, T*H*W), True where two blocks of a (T, H, W) grid are neighbours.

    Neighbours are at most wT // 2 frames, wH // 2 rows and wW // 2 columns of blocks apart. Name and arguments are
    those of the helper in diffusers.
    """

    def near(length: int, width: int) -> Tensor:
        positions = torch.arange(length, device=device)
        return (positions[:, None] - positions).abs() <= width // 2  # (length, length)

    in_time = near(T, wT)[:, None, None, :, None, None]
    in_height = near(H, wH)[None, :, None, None, :, None]
    in_width = near(W, wW)[None, None, :, None, None, :]
    return (in_time & in_height & in_width).reshape(T * H * W, T * H * W)


@torch.no_grad()
def nabla_block_map(q: Tensor, k: Tensor, sta: Tensor, P: float) -> Tensor:
    """Which blocks see which: bool (B, heads, n, n), the window `sta` (n, n) included.

    q and k (B, heads, N, d), normalised, rotated and in block order; n = N / 64. A row's blocks are sorted by the mass
    that attention between the blocks' means gives them, and those where the sum from the smallest on reaches 1 - P are
    kept (`heaviest`). Means, mass and sums are in float32 whatever the dtype of q and k.
    """
    num_blocks = q.shape[2] // BLOCK_TOKENS
    q_means, k_means = block_means(q), block_means(k)  # (B * heads, n, d)
    keep = torch.empty(len(q_means), num_blocks, num_blocks, dtype=torch.bool, device=q.device)
    for part in head_chunks(len(q_means), num_blocks):
        scores = q_means[part] @ k_means[part].transpose(-2, -1)
        mass = torch.softmax(scores / math.sqrt(q.shape[-1]), dim=-1)
        keep[part] = heaviest(mass.flatten(0, 1), P).view_as(mass)
    return keep.logical_or_(sta).view(*q.shape[:2], num_blocks, num_blocks)


def heaviest(mass: Tensor, P: float) -> Tensor:
    """Where mass (rows, n) is, of each row, not among the smallest that together stay below 1 - P; bool (rows, n).

    The published formula (`sorted_heaviest`) sorts masses with their columns. A CPU sorts bare numbers several times
    faster than such pairs, and the number where the sum reaches 1 - P is then one to compare with: the same map to the
    bit. Which of equal numbers stands first, only the sort of pairs knows: it is asked where that decides.
    """
    if mass.device.type != "cpu" or type(mass) is not Tensor or torch.compiler.is_compiling():
        # A stand-in without numbers is sorted as on a GPU, and a graph can't ask for numbers.
        return sorted_heaviest(mass, P)
    ordered = torch.from_numpy(np.sort(mass.numpy(), axis=-1))
    kept = (ordered.cumsum(-1) >= 1 - P).sum(-1, keepdim=True)  # (rows, 1): so many, the last ones in order
    first = mass.shape[-1] - kept
    smallest = ordered.gather(-1, first.clamp(max=mass.shape[-1] - 1)).masked_fill_(kept == 0, math.inf)
    keep = mass >= smallest
    tied = (keep.sum(-1) != kept[:, 0]).nonzero()[:, 0]
    if len(tied):
        keep[tied] = sorted_heaviest(mass[tied], P)
    return keep


def sorted_heaviest(mass: Tensor, P: float) -> Tensor:
    """What `heaviest` is, as it is published."""
    ordered, columns = mass.sort(dim=-1)
    return torch.empty_like(mass, dtype=torch.bool).scatter_(-1, columns, ordered.cumsum_(-1) >= 1 - P)


def block_means(x: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B * heads, N / 64, d): the mean over each block's tokens, in float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return rearrange(x, "b h (n k) d -> (b h) n k d", k=BLOCK_TOKENS).mean(dim=-2, dtype=dtype)


def nabla_attention(q: Tensor, k: Tensor, v: Tensor, *, tables: NablaTables, kernel: BlockSparseAttention) -> Tensor:
    """Self-attention of tokens in block order: q, k, v and the result are (B, heads, N, d)."""
    return kernel(q, k, v, nabla_block_map(q, k, tables.window, tables.config.P))


def get_sparse_params(
    sample: Tensor,
    device: torch.device | str,
    config: NablaConfig | None = PUBLISHED,
    patch_size: Sequence[int] = (1, 2, 2),
) -> dict[str, Any] | None:
    """NABLA's parameters for latents `sample` (B, T, H, W, C), under the names that diffusers' helper gives them.

    `sta_mask` is the window (1, 1, n, n); `visual_shape` the patch grid. None where `config` is None: dense attention.
    """
    if config is None:
        return None
    t, h, w = (size // p for size, p in zip(sample.shape[1:4], patch_size, strict=True))
    window = fast_sta_nabla(*block_grid((t, h, w)), config.wT, config.wH, config.wW, device)
    return {
        "sta_mask": window[None, None],
        "attention_type": "nabla",
        "to_fractal": True,
        "P": config.P,
        "wT": config.wT,
        "wW": config.wW,
        "wH": config.wH,
        "add_sta": True,
        "visual_shape": (t, h, w),
        "method": "topcdf",
    }
