"""What the VAEs share: tiling, and the distribution that an encoder makes.

`apply_tiled` applies a function to overlapping tiles of a tensor and blends the results, along any axes. It knows
lengths, tiles and blends; it knows nothing about VAEs, nor who computes which tile (`MapTiles`). The memory of a decode
is bounded by the size of a tile, and a tile's size comes from the configuration alone, so the same settings give the
same pixels on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

# (function, tiles, which all have one shape) -> the results in the order of the tiles, each when it is asked for.
# Python's own `map` computes them one after the other.
MapTiles = Callable[[Callable[[Tensor], Tensor], Sequence[Tensor]], Iterable[Tensor]]


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


def apply_tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, axes: Sequence[TiledAxis], map_tiles: MapTiles = map
) -> Tensor:
    """`function(x)`, computed tile by tile along `axes` (the first is the outermost loop) and blended linearly.

    Neighbouring tiles are blended over exactly the outputs that both made, from the earlier to the later one.
    """
    return _blended(iter(map_tiles(function, list(tiles_of(x, axes)))), x.shape, axes)


def tiles_of(x: Tensor, axes: Sequence[TiledAxis]) -> Iterator[Tensor]:
    """Views of x: its tiles, the first axis being the outermost loop."""
    if not axes:
        yield x
        return
    axis, inner = axes[0], axes[1:]
    starts = axis.starts(x.shape[axis.dim])
    for start in starts:
        yield from tiles_of(x if len(starts) == 1 else x.narrow(axis.dim, start, axis.tile), inner)


def _blended(tiles: Iterator[Tensor], lengths: Sequence[int], axes: Sequence[TiledAxis]) -> Tensor:
    """Results of `tiles_of` as one tensor; `lengths` are those of the input."""
    if not axes:
        return next(tiles)
    axis, inner = axes[0], axes[1:]
    length = lengths[axis.dim]
    starts = axis.starts(length)
    if len(starts) == 1:
        return _blended(tiles, lengths, inner)

    result = torch.empty(0)
    end = 0  # outputs of this axis that are written so far
    for start in starts:
        tile = _blended(tiles, lengths, inner)
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

    def spatial_axes(self, ratio: int, decoding: bool) -> list[TiledAxis]:
        """How a VAE with `ratio` pixels to a latent cuts its input (..., H, W): latents if `decoding`, else pixels."""
        size, stride = self.size, self.size - self.overlap
        if decoding:
            size, stride = size // ratio, stride // ratio
        scale = Fraction(ratio) if decoding else Fraction(1, ratio)
        return [TiledAxis(dim, size, stride, scale) for dim in (-2, -1)]


class DiagonalGaussian:
    """The encoder's output distribution; `moments` (B, 2C, ...) are mean and log-variance."""

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
