"""Has visual blocks run in parts (models/block_in_parts.py), where a whole one takes more memory than there is."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from kandinsky.models.block_in_parts import run_block_in_parts, stay
from kandinsky.models.dit import Execution


def with_blocks_in_parts(execution: Execution, heads_at_once: int, on_host: bool) -> Execution:
    """The same with visual blocks whose self-attention is of `heads_at_once` heads at a time.

    on_host: what attention gives for some heads waits for the others' on the host, pinned where there is a GPU.
    """
    run = functools.partial(run_block_in_parts, heads_at_once=heads_at_once, aside=to_host if on_host else stay)
    return dataclasses.replace(execution, run_block=run, writes_over=True)


def to_host(result: Tensor) -> Tensor:
    """A copy on the host. Only later work on the same stream may read it: the copy may still be under way."""
    host = torch.empty(result.shape, dtype=result.dtype, pin_memory=result.is_cuda)
    return host.copy_(result, non_blocking=True)
