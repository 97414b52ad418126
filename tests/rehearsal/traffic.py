"""Bytes that an operation moves: what it reads, once each, and what it writes.

That is the least that a kernel for it alone can do, whatever its caches hold, and what limits everything but large
products on a GPU: a step that is fused away disappears from the count, one that is made twice counts twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
MOVING_NOTHING = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
FILLING = {aten.new_zeros, aten.zeros_like, aten.full_like}  # of what they are given only the shape counts
WRITING_ONLY = {aten.copy_, aten.fill_, aten.zero_}  # the tensor that they change
PICKING = {aten.index, aten.index_select, aten.gather, aten.embedding}  # as much of their first tensor as comes out


def bytes_of(x: Tensor) -> int:
    """Of its numbers, those that several places share (stride 0) counted once."""
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or size == 0)
    numbers = 1
    for size in sizes:
        numbers *= size
    return numbers * x.element_size()


def _format_of(operands: list[Tensor]) -> torch.memory_format:
    """What a convolution of these is computed in."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(operands[0].dim(), torch.contiguous_format)
    return wanted if wanted in map(suggest_memory_format, operands) else torch.contiguous_format


def bytes_moved(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Read and written by one call of an operation of ATen; a view moves nothing."""
    packet = func._overloadpacket
    if func.is_view or func.namespace == "prim" or packet in MOVING_NOTHING:
        return 0
    given = list({id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}.values())
    changed = []  # those in `given` that it writes to, among them what it's told to put its result into
    arguments = func._schema.arguments
    named = [*zip(arguments, args, strict=False), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
    for argument, value in named:
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed += [(x, argument.is_out or packet in WRITING_ONLY) for x in tree_leaves(value)]
    only_written = {id(x) for x, only in changed if only}
    before = {id(x) for x in given}
    results = [x for x in tree_leaves(out) if isinstance(x, Tensor) and id(x) not in before]
    written = sum(bytes_of(x) for x in results) + sum(bytes_of(x) for x, _ in changed)
    if packet is aten.convolution:
        # cuDNN wants both operands dense, channels last as soon as one of them is.
        written += 2 * sum(bytes_of(x) for x in given[:2] if not x.is_contiguous(memory_format=_format_of(given[:2])))
    if packet in FILLING:
        return written
    if packet in PICKING:
        return 2 * written + sum(bytes_of(x) for x in given[1:])
    return written + sum(bytes_of(x) for x in given if id(x) not in only_written)
