"""Rotary position embeddings: tables for text (1-D) and video (3-D) positions, and their application.

Knows positions and head dimensions; knows nothing about models, tokens' contents or devices other than the one asked
for. Published formula: interleaved pairs, angle = position / scale * 10000^(-i / (d / 2)) in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kandinsky.common.limits import MAX_PATCHES, MAX_TEXT_TOKENS
from kandinsky.models.numerics import has_complex, upcast


@dataclass(frozen=True)
class RotaryTable:
    """cos and sin of every token's angles, each (tokens, head_dim / 2), float32."""

    cos: Tensor
    sin: Tensor

    def reordered(self, order: Tensor) -> RotaryTable:
        """The table of the same tokens in another order: row i is that of token order[i]."""
        return RotaryTable(self.cos[order], self.sin[order])

    @cached_property
    def rotations(self) -> Tensor:
        """The same as complex numbers of length 1, made once."""
        return torch.complex(self.cos, self.sin)

    @cached_property
    def _parts(self) -> dict[tuple[int, int], RotaryTable]:
        return {}

    def of(self, tokens: slice) -> RotaryTable:
        """The part of the table that belongs to some of the tokens: views, made once, so that its `rotations` are too.

        tokens: from one to another, like slice(0, 64); their numbers are what the part is remembered by.
        """
        if torch.compiler.is_compiling():  # nothing to be remembered: a graph has no state
            return RotaryTable(self.cos[tokens], self.sin[tokens])
        begin, end, _ = tokens.indices(len(self.cos))
        if (begin, end) == (0, len(self.cos)):
            return self
        if (begin, end) not in self._parts:
            part = RotaryTable(self.cos[tokens], self.sin[tokens])
            if has_complex(self.cos.device):
                vars(part)["rotations"] = self.rotations[tokens]
            self._parts[begin, end] = part
        return self._parts[begin, end]


def axis_angles(length: int, dim: int, device: torch.device | str, scale: float = 1.0) -> Tensor:
    """Angles (length, dim / 2) of positions 0..length-1 for `dim` rotary channels; positions are divided by `scale`."""
    half = dim // 2
    frequencies = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(half, dtype=torch.float32) / half)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return (angles / scale).to(device)


def text_rotary_table(length: int, head_dim: int, device: torch.device | str) -> RotaryTable:
    """Table of `length` text tokens. Raises ValueError beyond the 1,024 positions that the models were built for."""
    if length > MAX_TEXT_TOKENS:
        raise ValueError(f"the text has {length} tokens; the model takes at most {MAX_TEXT_TOKENS}: shorten it")
    angles = axis_angles(length, head_dim, device)
    return RotaryTable(angles.cos(), angles.sin())


def visual_rotary_table(
    grid: tuple[int, int, int], axes_dims: Sequence[int], scale_factor: Sequence[float], device: torch.device | str
) -> RotaryTable:
    """Table of a (frames, rows, columns) grid of patches, row-major.

    `axes_dims` says how many of a head's channels belong to time, height and width; `scale_factor` divides the
    positions of each axis. Raises ValueError where an axis is longer than the 128 patches the models were built for.
    """
    for name, length in zip(("time", "height", "width"), grid, strict=True):
        if length > MAX_PATCHES:
            raise ValueError(f"{length} patches along {name}; the model takes at most {MAX_PATCHES} an axis")
    angles = []
    for axis, (length, dim, scale) in enumerate(zip(grid, axes_dims, scale_factor, strict=True)):
        shape = [1, 1, 1, dim // 2]
        shape[axis] = length
        angles.append(axis_angles(length, dim, device, scale).view(shape).expand(*grid, -1))
    all_angles = torch.cat(angles, dim=-1).flatten(0, 2)  # (T*H*W, head_dim / 2)
    return RotaryTable(all_angles.cos(), all_angles.sin())


def apply_rotary(x: Tensor, table: RotaryTable, dtype: torch.dtype | None = None) -> Tensor:
    """Rotate pairs (x[2i], x[2i+1]) of x (..., tokens, head_dim) by the table's angles; in float32, result in `dtype`,
    or as x."""
    dtype = dtype or x.dtype
    pairs = upcast(x).unflatten(-1, (-1, 2))  # (..., tokens, head_dim / 2, 2)
    if torch.compiler.is_compiling() or not has_complex(x.device):
        even, odd = pairs.unbind(-1)
        # Rounded before they are put together: afterwards it is another pass over memory, compiled too.
        halves = even * table.cos - odd * table.sin, odd * table.cos + even * table.sin
        rotated = torch.stack([half.to(dtype) for half in halves], dim=-1)
    else:
        # The same as one product of complex numbers: one pass over memory. The compiler makes one of the lines above
        # by itself, and makes nothing of complex numbers.
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * table.rotations)
    return rotated.flatten(-2).to(dtype)
