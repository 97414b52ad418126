"""What this machine's matrix products do to last bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def depend_on_rows(model: nn.Module, tokens: int) -> bool:
    """Whether a linear layer of the model makes other last bits of some of the tokens than of all of them.

    MKL does on Intel processors where it uses AVX2 and nothing later; elsewhere a product's bits are its row's own.
    """
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            x = torch.randn(tokens, layer.in_features, generator=generator)
            weight, bias = (None if p is None else p.detach().float() for p in (layer.weight, layer.bias))
            whole = nn.functional.linear(x, weight, bias)
            for rows in (64, 100):
                parts = [nn.functional.linear(part, weight, bias) for part in x.split(rows)]
                if not torch.equal(torch.cat(parts), whole):
                    return True
    return False


def assert_the_same(found: Tensor, expected: Tensor, bits: bool, what: object) -> None:
    """Equal; or, where products differ in their last bits, no further apart than those."""
    if bits:
        assert torch.equal(found, expected), what
    else:
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), what
