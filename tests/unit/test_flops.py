"""The benchmarks' formula for a DiT's floating-point operations says what PyTorch counts while it runs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from benchmarks._flops import counted_flops, dit_flops
from kandinsky.config import DiTConfig
from kandinsky.models.dit import DiffusionTransformer3D


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
