"""A table of embeddings that a model is built with before its numbers are read."""

from __future__ import annotations

import torch
from torch import nn


def embedding(count: int, dim: int) -> nn.Embedding:
    """`nn.Embedding`, drawn as PyTorch draws it. Without memory, on the meta device, nothing is drawn: to draw normal
    numbers that are nowhere PyTorch would load its compiler, most of a second."""
    weight = torch.empty(count, dim)
    return nn.Embedding.from_pretrained(weight if weight.is_meta else weight.normal_(), freeze=False)
