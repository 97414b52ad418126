"""What adapters make of one weight: the formulas of checkpoints/lora_tensors.py, in float32, rounded once at the end.

What is kept are the small matrices, never a second one of the weight's size, so that layers which are quantised, and
have their adapters added whenever they are dequantised, can have each kind.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """LoRA: adds up @ down."""

    up: Tensor  # (out, rank)
    down: Tensor  # (rank, in)


class Hadamard(NamedTuple):
    """LoHa: adds (a @ b) * (c @ d), by elements."""

    a: Tensor  # (out, rank)
    b: Tensor  # (rank, in)
    c: Tensor
    d: Tensor


class Kronecker(NamedTuple):
    """LoKr: adds kron(first, second)."""

    first: Tensor  # (l, m)
    second: Tensor  # (out / l, in / m)


class RowLengths(NamedTuple):
    """DoRA: scales what there is to rows, or columns where it is (1, in), of these lengths."""

    magnitude: Tensor  # (out, 1) or (1, in)


Change = LowRank | Hadamard | Kronecker | RowLengths


def change_weight(weight: Tensor, changes: tuple[Change, ...]) -> Tensor:
    """The weight (out, in) with the changes made to it one after the other, computed in float32, in its own dtype.

    changes: all of them float32, on the weight's device.
    """
    result = weight.float()
    for change in changes:
        if isinstance(change, LowRank):
            result = torch.addmm(result, change.up, change.down)
        elif isinstance(change, Hadamard):
            result = torch.addcmul(result, change.a @ change.b, change.c @ change.d)
        elif isinstance(change, Kronecker):
            result = result + torch.kron(change.first, change.second)
        else:
            lengths = torch.linalg.vector_norm(result, dim=1 if change.magnitude.shape[1] == 1 else 0, keepdim=True)
            result = result * torch.where(lengths > 0, change.magnitude / lengths, 0.0)  # rows of zeros stay so
    return result.to(weight.dtype)
