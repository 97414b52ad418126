"""Floating-point operations of a DiT forward by formula, and of anything else by counting its matrix products.

Only products count (two operations each): they are what a processor's peak rate is about. Norms, activations and
rotations are the overhead that a share of the floor shows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from kandinsky.config.schema import DiTConfig


def dit_flops(params: DiTConfig, latents: tuple[int, int, int], text_tokens: int, density: float = 1) -> int:
    """One forward of one sample, latents (T, H, W).

    density: the share of its blocks that NABLA keeps in visual self-attention; 1: dense. Its map is not counted: that
    is a 64^2-th of the dense scores.
    """
    patch = params.patch_size[0] * params.patch_size[1] * params.patch_size[2]
    n = latents[0] * latents[1] * latents[2] // patch
    m, d, ff, e = text_tokens, params.model_dim, params.ff_dim, params.time_dim
    extra = params.in_visual_dim + 1 if params.visual_cond or params.instruct_type == "channel" else 0

    def attention(queries: int, keys: int, kept: float = 1) -> int:
        """Query and output projections, key and value projections, scores and weighted sums."""
        return 2 * queries * d * d + 2 * keys * d * d + round(2 * queries * keys * d * kept)

    feed_forward = 2 * d * ff
    text_block = attention(m, m) + m * feed_forward + 6 * d * e
    visual_block = attention(n, n, density) + attention(n, m) + n * feed_forward + 9 * d * e
    ends = (
        n * d * patch * (params.in_visual_dim + extra + params.out_visual_dim)  # patches in and out
        + m * params.in_text_dim * d
        + params.in_text_dim2 * e
        + d * e  # time embedding, both layers
        + e * e
        + 2 * d * e  # the last modulation
    )
    return 2 * (params.num_text_blocks * text_block + params.num_visual_blocks * visual_block + ends)


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object) -> int:
    """Of scores and weighted sums, shapes (B, heads, N, d)."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


# PyTorch's counter knows the attention of GPUs, and not this one of CPUs.
UNKNOWN_TO_PYTORCH = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@torch.no_grad()
def counted_flops(run: Callable[[], object]) -> int:
    """Of the matrix products, convolutions and attention that a call makes, as it makes them."""
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_PYTORCH) as counter:
        run()
    return counter.get_total_flops()
