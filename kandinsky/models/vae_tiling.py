"""Tiling: apply a function to overlapping tiles of a tensor and blend the results, along any axes.

Knows lengths, tiles and blends; knows nothing about VAEs. The memory of a decode is bounded by the size of a tile, and
a tile's size comes from the configuration alone, so the same settings give the same pixels on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor


@dataclass(frozen=True)
class TiledAxis:
    """How one axis is cut; lengths in input elements.

    Attributes:
        dim: the tensor dimension.
        tile, stride: length of a tile and distance between two starts; tiles are always complete, so the last one
            starts earlier than the stride says where the length does not divide.
        scale: output elements per input element.
        causal: n inputs make 1 + scale * (n - 1) outputs, as along time. The first output of every later tile has no
            history, is worth less than its neighbour's and is dropped.
    """

    dim: int
    tile: int
    stride: int
    scale: Fraction
    causal: bool = False

    def starts(self, length: int) -> list[int]:
        """Where the tiles of an axis of `length` begin; the last tile ends at its end."""
        if length <= self.tile:
            return [0]
        return [*range(0, length - self.tile, self.stride), length - self.tile]

    def output_length(self, length: int) -> int:
        """Output elements made from `length` input elements."""
        return 1 + int(self.scale * (length - 1)) if self.causal else int(self.scale * length)


def apply_tiled(function: Callable[[Tensor], Tensor], x: Tensor, axes: Sequence[TiledAxis]) -> Tensor:
    """`function(x)`, computed tile by tile along `axes` (the first is the outermost loop) and blended linearly.

    Neighbouring tiles are blended over exactly the outputs that both made, from the earlier to the later one.
    """
    if not axes:
        return function(x)
    axis, inner = axes[0], axes[1:]
    length = x.shape[axis.dim]
    starts = axis.starts(length)
    if len(starts) == 1:
        return apply_tiled(function, x, inner)

    result = x.new_empty(0)
    end = 0  # outputs of this axis that are written so far
    for start in starts:
        tile = apply_tiled(function, x.narrow(axis.dim, start, axis.tile), inner)
        if start == 0:
            shape = list(tile.shape)
            shape[axis.dim] = axis.output_length(length)
            result = tile.new_empty(shape)
        begin = int(axis.scale * start)
        if axis.causal and start > 0:
            tile = tile.narrow(axis.dim, 1, tile.shape[axis.dim] - 1)
            begin += 1
        overlap = end - begin
        if overlap > 0:
            _blend_into(result.narrow(axis.dim, begin, overlap), tile.narrow(axis.dim, 0, overlap), axis.dim)
        fresh = tile.shape[axis.dim] - overlap
        result.narrow(axis.dim, end, fresh).copy_(tile.narrow(axis.dim, overlap, fresh))
        end += fresh
    return result


def _blend_into(earlier: Tensor, later: Tensor, dim: int) -> None:
    """In place, earlier * (1 - x/n) + later * x/n for x = 0..n-1 along `dim`."""
    n = earlier.shape[dim]
    shape = [1] * earlier.dim()
    shape[dim] = n
    weight = (torch.arange(n, device=earlier.device, dtype=torch.float32) / n).view(shape)
    earlier.lerp_(later, weight.to(earlier.dtype))
