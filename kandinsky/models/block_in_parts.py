"""A visual block in less memory: attention for some heads at a time, everything else for some tokens at a time.

`VisualBlock.forward` holds about eight tensors of the size of all hidden states at its peak. Here there is one, the
hidden states themselves, which are written over; and the queries, keys, values and result of a few heads. What
attention gives for those heads waits for the other heads' beside it, or wherever `aside` takes it: to the host, for
the longest videos. Every number is the sum of the same products as in the whole block; what the normalisation before
attention gives is computed again for each group of heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky.attention.engines import Attention
from kandinsky.common.limits import CHUNK_TOKENS
from kandinsky.models.layers import EAGER, Elementwise, MultiheadAttention, VisualBlock, by_chunks
from kandinsky.models.rope import RotaryTable


def stay(result: Tensor) -> Tensor:
    return result


def run_block_in_parts(
    block: VisualBlock,
    x: Tensor,
    text: Tensor,
    time_embed: Tensor,
    rope: RotaryTable,
    text_mask: Tensor | None,
    attention: Attention,
    chunk_tokens: int | None = None,
    *,
    heads_at_once: int,
    aside: Callable[[Tensor], Tensor] = stay,
    elementwise: Elementwise = EAGER,
) -> Tensor:
    """What `VisualBlock.forward` returns, written over x (B, N, D), which is also returned.

    heads_at_once: of the heads, as many as attention is computed for at a time; the last group may be smaller.
    aside: takes the attention of a group (B, N, group * d) to where it waits; it comes back by `Tensor.to`.
    """
    assert not torch.is_grad_enabled(), "hidden states are written over"
    size = chunk_tokens or CHUNK_TOKENS
    modulated_norm, gated_residual, norm_and_rotate = elementwise
    own, cross, ff = block.visual_modulation.of_parts(time_embed)
    layer = block.self_attention

    def normed(rows: Tensor) -> Tensor:
        return modulated_norm(rows, own.shift, own.scale)

    attended = [
        aside(attend(layer, x, normed, slice(first, first + heads_at_once), rope, attention, size, norm_and_rotate))
        for first in range(0, layer.num_heads, heads_at_once)
    ]
    for start in range(0, x.shape[1], size):
        tokens = slice(start, start + size)
        heads = torch.cat([group[:, tokens].to(x.device, non_blocking=True) for group in attended], dim=-1)
        rows = gated_residual(x[:, tokens], layer.out_layer(heads), own.gate)
        del heads
        seen = block.cross_attention(
            modulated_norm(rows, cross.shift, cross.scale), context=text, mask=text_mask, elementwise=elementwise
        )
        rows = gated_residual(rows, seen, cross.gate)
        del seen
        x[:, tokens] = gated_residual(rows, block.feed_forward(modulated_norm(rows, ff.shift, ff.scale)), ff.gate)
    return x


def attend(
    layer: MultiheadAttention,
    x: Tensor,
    normed: Callable[[Tensor], Tensor],
    heads: slice,
    rope: RotaryTable,
    attention: Attention,
    chunk_tokens: int,
    norm_and_rotate: Callable[..., Tensor],
) -> Tensor:
    """Self-attention of some heads to normed(x), before the layer that brings heads together: (B, N, group * d)."""
    head_dim = layer.to_query.out_features // layer.num_heads
    rows = slice(heads.start * head_dim, heads.stop * head_dim)  # of the layers' weights
    query, key, value = (rows_of(linear, rows, x.dtype) for linear in (layer.to_query, layer.to_key, layer.to_value))

    def project(x: Tensor, tokens: slice) -> Tensor:
        x, table = normed(x), rope.of(tokens)
        q, k, v = (
            F.linear(x, *weights).unflatten(-1, (-1, head_dim)).transpose(1, 2) for weights in (query, key, value)
        )  # (B, h, n, d)
        q = norm_and_rotate(q, layer.query_norm, table)
        k = norm_and_rotate(k, layer.key_norm, table)
        return torch.stack((q, k, v)).permute(1, 3, 0, 2, 4)  # (B, n, 3, h, d)

    q, k, v = (x.transpose(1, 2) for x in by_chunks(project, x, chunk_tokens).unbind(2))  # (B, h, N, d)
    return attention(q, k, v).transpose(1, 2).flatten(2)


def rows_of(layer: nn.Module, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of some of a linear layer's outputs; of a quantised layer, made into numbers of `dtype`."""
    weight_in: Callable[[torch.dtype], Tensor] | None = getattr(layer, "weight_in", None)
    weight = layer.weight if weight_in is None else weight_in(dtype)
    assert isinstance(weight, Tensor)
    bias = layer.bias
    assert bias is None or isinstance(bias, Tensor)
    return weight[rows], None if bias is None else bias[rows]
