"""Which precision a computation runs in: float32 inside, whatever dtype a model is stored in."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """x in float32, or as it is where it already is float64."""
    return x if x.dtype == torch.float64 else x.float()
