"""The benchmarks' formula for a DiT's floating-point operations says what PyTorch counts while it runs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from benchmarks._flops import counted_flops, dit_flops
from kandinsky.config.schema import DiTConfig
from kandinsky.models.dit import DiffusionTransformer3D


def test_nabla_saves_its_share_of_the_visual_scores() -> None:
    """Nothing else gets cheaper: per layer, two products of tokens x tokens x width, of two operations each."""
    params, latents, tokens = DiTConfig(num_visual_blocks=3), (5, 32, 48), 5 * 16 * 24
    saved = dit_flops(params, latents, 100) - dit_flops(params, latents, 100, density=0.25)
    assert saved == 0.75 * 3 * 2 * 2 * tokens**2 * params.model_dim


@pytest.mark.parametrize("options", [{}, {"visual_cond": True}, {"instruct_type": "channel"}])
def test_dit(options: dict[str, Any]) -> None:
    params = DiTConfig(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=24,
        in_text_dim2=12,
        time_dim=32,
        model_dim=128,
        ff_dim=200,
        num_text_blocks=1,
        num_visual_blocks=3,
        **options,
    )
    with torch.device("meta"):
        dit = DiffusionTransformer3D(**asdict(params))
        latents = torch.empty(1, 3, 8, 6, dit.in_channels)
        text, pooled, timesteps = torch.empty(1, 7, 24), torch.empty(1, 12), torch.empty(1)
    tables = dit.request_tables((3, 8, 6), 7, (1.0, 2.0, 2.0), "meta")
    counted = counted_flops(lambda: dit(latents, text, pooled, timesteps, tables=tables))
    assert dit_flops(params, (3, 8, 6), 7) == counted


def test_attention_on_a_cpu_is_counted() -> None:
    """PyTorch's own counter leaves it out."""
    q, k = torch.ones(1, 2, 16, 8), torch.ones(1, 2, 24, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert counted_flops(lambda: attend(q, k, k)) == 2 * 2 * (2 * 16 * 24 * 8)
    mask = torch.ones(16, 24, dtype=torch.bool)
    assert counted_flops(lambda: attend(q, k, k, attn_mask=mask)) == 2 * 2 * (2 * 16 * 24 * 8)
