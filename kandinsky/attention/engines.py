"""Attention engines: interchangeable implementations of one function.

An engine is a callable `attention(q, k, v, mask=None) -> out`. The model calls whatever engine it was given and
knows nothing about kernels; this file knows nothing about the model.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attention(Protocol):
    """Scaled dot-product attention with scale 1/sqrt(head_dim).

    q (B, heads, N, d), k and v (B, heads, M, d), mask None or bool broadcastable to (B, heads, N, M), True = attend.
    Returns (B, heads, N, d).
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor: ...


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's scaled_dot_product_attention: runs on every device and takes every mask."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


ENGINES: dict[str, Attention] = {"sdpa": sdpa}


def resolve_engine(name: str, device: torch.device) -> Attention:
    """The engine called `name`; "auto" takes the best one for `device`. Called once, when a model is loaded.

    Raises ValueError for an unknown name, with the names that there are.
    """
    if name == "auto":
        return sdpa
    if name not in ENGINES:
        raise ValueError(f"attention engine {name!r} does not exist: choose one of auto, {', '.join(ENGINES)}")
    return ENGINES[name]
