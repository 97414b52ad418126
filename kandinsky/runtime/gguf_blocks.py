"""GGUF's blocks of weights, made into numbers in torch, on whatever device they are.

A block is some weights of a row (32, or 256 with scales of 16 or 32 among them) with one float16 scale, and for some
a float16 minimum (https://github.com/ggml-org/ggml, ggml-common.h). Every product and difference is a float32 one, in
the order of the format's reference, so that the numbers are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kandinsky.checkpoints.gguf_file import BLOCKS

# Where the float16 scales, and minima, of a block are: their first byte and the byte after them.
SCALES = {"q8_0": (0, 2), "q4_0": (0, 2), "q4_k": (0, 4), "q5_k": (0, 4), "q6_k": (208, 210)}


def dequantize_blocks(packed: Tensor, scheme: str) -> Tensor:
    """uint8 (rows, bytes) -> float32 (rows, weights of a row)."""
    _, size = BLOCKS[scheme]
    return _DEQUANTIZE[scheme](packed.unflatten(1, (-1, size))).flatten(1)


def scales_of_blocks(packed: Tensor, scheme: str) -> Tensor:
    """The float16 scales and minima of uint8 (rows, bytes): what of it can be NaN or infinite."""
    _, size = BLOCKS[scheme]
    begin, end = SCALES[scheme]
    return packed.unflatten(1, (-1, size))[..., begin:end].contiguous().view(torch.float16)


def _half(blocks: Tensor, begin: int) -> Tensor:
    """The float16 at a byte of each block, in float32: (rows, blocks, 1)."""
    return blocks[..., begin : begin + 2].contiguous().view(torch.float16).float()


def _low_then_high(packed: Tensor) -> Tensor:
    """Bytes of two weights each (..., n) -> the weights' four bits (..., 2, n), the lower ones first."""
    return torch.stack((packed & 15, packed >> 4), dim=-2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[..., 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _q4_0(blocks: Tensor) -> Tensor:
    weights = _low_then_high(blocks[..., 2:]).flatten(-2)
    return weights.float().sub_(8).mul_(_half(blocks, 0))


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: a scale and a minimum for each 32 weights of a block, (rows, blocks, 8, 1) both.

    They have six bits each, in 12 bytes: four with the first four scales, four with the first four minima, and four
    with the lower four bits of the other four of both, whose upper two are those that the first eight bytes leave.
    """
    first, second, third = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat((first & 63, (third & 15) | ((first >> 2) & 48)), dim=-1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 2) & 48)), dim=-1)
    return (_half(blocks, 0) * scales.float())[..., None], (_half(blocks, 2) * minima.float())[..., None]


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks)
    weights = _low_then_high(blocks[..., 16:].unflatten(-1, (4, 32))).flatten(-3, -2)  # (rows, blocks, 8, 32)
    return weights.float().mul_(scales).sub_(minima).flatten(-2)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks)
    weights = _low_then_high(blocks[..., 48:].unflatten(-1, (4, 32))).flatten(-3, -2)
    fifth = blocks[..., None, 16:48] >> _shifts(8, 1, blocks)  # bit i of byte j belongs to weight j of the i-th 32
    weights |= (fifth & 1) << 4
    return weights.float().mul_(scales).sub_(minima).flatten(-2)


def _q6_k(blocks: Tensor) -> Tensor:
    scales = _half(blocks, 208) * blocks[..., 192:208].view(torch.int8).float()  # one for each 16 weights
    weights = _low_then_high(blocks[..., :128].unflatten(-1, (2, 64))).unflatten(-1, (2, 32)).flatten(-4, -2)
    upper = blocks[..., 128:192].unflatten(-1, (2, 1, 32)) >> _shifts(4, 2, blocks)  # (rows, blocks, 2, 4, 32)
    weights |= ((upper & 3) << 4).flatten(-3, -2)
    return weights.flatten(-2).unflatten(-1, (16, 16)).float().sub_(32).mul_(scales[..., None]).flatten(-2)


def _shifts(count: int, bits: int, like: Tensor) -> Tensor:
    return torch.arange(0, count * bits, bits, dtype=torch.uint8, device=like.device)[:, None]


_DEQUANTIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "q8_0": _q8_0,
    "q6_k": _q6_k,
    "q5_k": _q5_k,
    "q4_k": _q4_k,
    "q4_0": _q4_0,
}
