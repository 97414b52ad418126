"""The diffusion transformer's building blocks: embeddings, modulation, attention, feed-forward, transformer blocks.

Attribute names are the published checkpoints' keys, so that a state dict loads without any renaming. Norms, rotary
embeddings, modulation and gated residuals compute in float32 (float64 for a float64 model) and return the compute
dtype; everything else runs in the dtype of the weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kandinsky.attention.engines import Attention, sdpa
from kandinsky.models.numerics import upcast
from kandinsky.models.rope import RotaryTable, apply_rotary

LAYER_NORM_EPS = 1e-5
RMS_NORM_EPS = torch.finfo(torch.float32).eps


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift for x (B, N, D), shift and scale (B, 1, D); result as x."""
    width = x.shape[-1:]
    if len(x) == 1:  # all rows share one modulation: layer_norm's own weight and bias, a pass over memory less
        return F.layer_norm(upcast(x), width, (scale + 1).view(width), shift.view(width), LAYER_NORM_EPS).to(x.dtype)
    normed = F.layer_norm(upcast(x), width, eps=LAYER_NORM_EPS)
    return torch.addcmul(shift, normed, scale + 1).to(x.dtype)


def gated_residual(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + gate * update for x, update (B, N, D) and gate (B, 1, D); in the gate's float32, result as x."""
    return torch.addcmul(x, gate, update).to(x.dtype)


def norm_and_rotate(x: Tensor, norm: nn.RMSNorm, rope: RotaryTable | None) -> Tensor:
    """RMS norm over head_dim and rotary embedding of x (B, h, N, d) in one float32 stretch; result as x."""
    wide = upcast(x)
    # One buffer for both products, unless autograd has to keep what is in it. It also puts the tokens of a head next to
    # each other in memory, where x has them apart: attention on a CPU is up to a tenth faster so.
    buffer = None if torch.is_grad_enabled() else wide.new_empty(wide.shape)
    # Written out because F.rms_norm on a CPU first copies what is not contiguous, and makes twice as many passes.
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]
    normed = torch.mul(wide, torch.rsqrt(mean_square + RMS_NORM_EPS), out=buffer)
    normed = torch.mul(normed, upcast(norm.weight), out=buffer)
    return normed.to(x.dtype) if rope is None else apply_rotary(normed, rope, x.dtype)


class Elementwise(NamedTuple):
    """What passes over all tokens and computes little for each: in place of these functions a block may be given such
    as compute the same in fewer passes over memory."""

    modulated_norm: Callable[[Tensor, Tensor, Tensor], Tensor] = modulated_norm
    gated_residual: Callable[[Tensor, Tensor, Tensor], Tensor] = gated_residual
    norm_and_rotate: Callable[[Tensor, nn.RMSNorm, RotaryTable | None], Tensor] = norm_and_rotate


EAGER = Elementwise()


def by_chunks(function: Callable[[Tensor, slice], Tensor], x: Tensor, chunk_tokens: int | None) -> Tensor:
    """function(x[:, tokens], tokens) for `chunk_tokens` tokens of x (B, N, D) at a time, as one (B, N, ...).

    What the function makes on its way then exists for one chunk only. None: for all tokens at once.
    """
    num_tokens = x.shape[1]
    if chunk_tokens is None or num_tokens <= chunk_tokens:
        return function(x, slice(num_tokens))
    chunk = function(x[:, :chunk_tokens], slice(chunk_tokens))
    result = chunk.new_empty(len(x), num_tokens, *chunk.shape[2:])
    result[:, :chunk_tokens] = chunk
    del chunk
    for start in range(chunk_tokens, num_tokens, chunk_tokens):
        tokens = slice(start, start + chunk_tokens)
        result[:, tokens] = function(x[:, tokens], tokens)  # not named: no chunk is there while the next is made
    return result


class TimeEmbeddings(nn.Module):
    """Sinusoidal embedding of the timestep, then a two-layer perceptron; float32 whatever the model's dtype."""

    def __init__(self, model_dim: int, time_dim: int) -> None:
        super().__init__()
        self.model_dim = model_dim
        self.in_layer = nn.Linear(model_dim, time_dim)
        self.out_layer = nn.Linear(time_dim, time_dim)

    def forward(self, timesteps: Tensor) -> Tensor:
        """timesteps (B,) in [0, 1000] -> (B, time_dim). Rounding them to bfloat16 is a known, large error: don't."""
        half = self.model_dim // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
        args = torch.outer(upcast(timesteps), torch.exp(-math.log(10000.0) * exponents))
        embedding = torch.cat((args.cos(), args.sin()), dim=-1)  # (B, D)
        hidden = F.silu(float32_linear(self.in_layer, embedding))
        return float32_linear(self.out_layer, hidden)


def float32_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer` applied in float32, whatever dtype its weights are stored in (exact for bfloat16 storage)."""
    weight = upcast(layer.weight)  # once: a quantised layer makes it anew
    return F.linear(upcast(x).to(weight.dtype), weight, upcast(layer.bias))


class TextProjection(nn.Module):
    """A text encoder's output brought to the model's width: Linear, then LayerNorm."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.in_layer(x.to(self.in_layer.weight.dtype))
        weight, bias = upcast(self.norm.weight), upcast(self.norm.bias)
        return F.layer_norm(upcast(hidden), hidden.shape[-1:], weight, bias, LAYER_NORM_EPS).to(hidden.dtype)


class VisualEmbeddings(nn.Module):
    """Latents cut into patches, each patch projected to the model's width."""

    def __init__(self, in_dim: int, model_dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.in_layer = nn.Linear(math.prod(patch_size) * in_dim, model_dim)

    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        """(B, T, H, W, C) -> (B, N, D), row-major, or with the patch order[i] as token i.

        A patch's features are ordered (pt, ph, pw, channel).
        """
        pt, ph, pw = self.patch_size
        patches = rearrange(x, "b (t pt) (h ph) (w pw) c -> b (t h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw)
        # Put into order while they are small.
        return self.in_layer(patches if order is None else patches.index_select(1, order))


class Modulation(nn.Module):
    """Shifts, scales and gates from the time embedding: SiLU, then Linear, in float32. Starts as the identity."""

    def __init__(self, time_dim: int, model_dim: int, num_params: int) -> None:
        super().__init__()
        self.num_params = num_params
        self.out_layer = nn.Linear(time_dim, num_params * model_dim)
        nn.init.zeros_(self.out_layer.weight)
        nn.init.zeros_(self.out_layer.bias)

    def forward(self, time_embed: Tensor) -> tuple[Tensor, ...]:
        """time_embed (B, E) -> `num_params` tensors (B, 1, D)."""
        params = float32_linear(self.out_layer, F.silu(time_embed))
        return params.unsqueeze(1).chunk(self.num_params, dim=-1)

    def of_parts(self, time_embed: Tensor) -> list[Modulated]:
        """Of a block: for each of its parts, in the order in which they run, shift, scale and gate."""
        params = self(time_embed)
        return [Modulated(*params[i : i + 3]) for i in range(0, self.num_params, 3)]


class Modulated(NamedTuple):
    """What the timestep does to one part of a block, each (B, 1, D): to its input (`modulated_norm`) and its update
    (`gated_residual`)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class MultiheadAttention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys; self-attention where `context` is None."""

    def __init__(self, model_dim: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = model_dim // head_dim
        self.to_query = nn.Linear(model_dim, model_dim)
        self.to_key = nn.Linear(model_dim, model_dim)
        self.to_value = nn.Linear(model_dim, model_dim)
        self.query_norm = nn.RMSNorm(head_dim, eps=RMS_NORM_EPS)
        self.key_norm = nn.RMSNorm(head_dim, eps=RMS_NORM_EPS)
        self.out_layer = nn.Linear(model_dim, model_dim)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        rope: RotaryTable | None = None,
        mask: Tensor | None = None,
        attention: Attention = sdpa,
        chunk_tokens: int | None = None,
        elementwise: Elementwise = EAGER,
    ) -> Tensor:
        """x (B, N, D), context (B, M, D); `rope` rotates queries and keys; `mask` (B, 1, 1, M) is True on real keys.

        `chunk_tokens` is for how many tokens at a time queries, keys and values are made: the same, in less memory.
        """
        context = x if context is None else context

        def normed(norm: nn.RMSNorm, heads: Tensor, tokens: slice) -> Tensor:
            return elementwise.norm_and_rotate(heads, norm, rope and rope.of(tokens))

        q = self._split(self.to_query, x, chunk_tokens, functools.partial(normed, self.query_norm))  # (B, h, N, d)
        k = self._split(self.to_key, context, chunk_tokens, functools.partial(normed, self.key_norm))  # (B, h, M, d)
        v = self._split(self.to_value, context, chunk_tokens)  # (B, h, M, d)
        out = attention(q, k, v, mask) if mask is not None else attention(q, k, v)
        return self.out_layer(out.transpose(1, 2).flatten(2))  # heads side by side again: (B, N, D)

    def _split(
        self,
        layer: nn.Module,
        x: Tensor,
        chunk_tokens: int | None,
        normed: Callable[[Tensor, slice], Tensor] | None = None,
    ) -> Tensor:
        """One projection of x (B, N, D) as heads (B, h, N, d), as `normed` of some tokens makes them."""

        def project(x: Tensor, tokens: slice) -> Tensor:
            heads = layer(x).unflatten(-1, (self.num_heads, -1))  # (B, n, h, d)
            return heads if normed is None else normed(heads.transpose(1, 2), tokens).transpose(1, 2)

        return by_chunks(project, x, chunk_tokens).transpose(1, 2)


class FeedForward(nn.Module):
    """Linear, exact GELU, Linear; no biases. Over `chunk_tokens` tokens at a time it takes less memory."""

    def __init__(self, model_dim: int, ff_dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(model_dim, ff_dim, bias=False)
        self.out_layer = nn.Linear(ff_dim, model_dim, bias=False)

    def forward(self, x: Tensor, chunk_tokens: int | None = None) -> Tensor:
        def rows_through(rows: Tensor, _: object) -> Tensor:
            # (B, n, ff_dim), the largest tensor there is: once in memory, without autograd.
            hidden = self.in_layer(rows)
            return self.out_layer(F.gelu(hidden) if torch.is_grad_enabled() else torch.ops.aten.gelu_(hidden))

        return by_chunks(rows_through, x, chunk_tokens)


class TextBlock(nn.Module):
    """Transformer block of the text stream: self-attention, feed-forward."""

    def __init__(self, model_dim: int, time_dim: int, ff_dim: int, head_dim: int) -> None:
        super().__init__()
        self.text_modulation = Modulation(time_dim, model_dim, 6)
        self.self_attention = MultiheadAttention(model_dim, head_dim)
        self.feed_forward = FeedForward(model_dim, ff_dim)

    def forward(
        self,
        x: Tensor,
        time_embed: Tensor,
        rope: RotaryTable,
        mask: Tensor | None,
        chunk_tokens: int | None = None,
    ) -> Tensor:
        """x (B, L, D), mask None or (B, 1, 1, L)."""
        own, ff = self.text_modulation.of_parts(time_embed)
        normed = modulated_norm(x, own.shift, own.scale)
        x = gated_residual(x, self.self_attention(normed, rope=rope, mask=mask, chunk_tokens=chunk_tokens), own.gate)
        return gated_residual(x, self.feed_forward(modulated_norm(x, ff.shift, ff.scale), chunk_tokens), ff.gate)


class VisualBlock(nn.Module):
    """Transformer block of the visual stream: self-attention, cross-attention to the text, feed-forward."""

    def __init__(self, model_dim: int, time_dim: int, ff_dim: int, head_dim: int) -> None:
        super().__init__()
        self.visual_modulation = Modulation(time_dim, model_dim, 9)
        self.self_attention = MultiheadAttention(model_dim, head_dim)
        self.cross_attention = MultiheadAttention(model_dim, head_dim)
        self.feed_forward = FeedForward(model_dim, ff_dim)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        time_embed: Tensor,
        rope: RotaryTable,
        text_mask: Tensor | None,
        attention: Attention,
        chunk_tokens: int | None = None,
        elementwise: Elementwise = EAGER,
    ) -> Tensor:
        """x (B, N, D), text (B, L, D), text_mask None or (B, 1, 1, L); `attention` is the self-attention's engine."""
        modulated_norm, gated_residual, _ = elementwise
        own, cross, ff = self.visual_modulation.of_parts(time_embed)
        # No name for the updates: it would keep one in memory while the next is computed.
        normed = modulated_norm(x, own.shift, own.scale)
        x = gated_residual(
            x,
            self.self_attention(
                normed, rope=rope, attention=attention, chunk_tokens=chunk_tokens, elementwise=elementwise
            ),
            own.gate,
        )
        normed = modulated_norm(x, cross.shift, cross.scale)
        x = gated_residual(
            x,
            self.cross_attention(
                normed, context=text, mask=text_mask, chunk_tokens=chunk_tokens, elementwise=elementwise
            ),
            cross.gate,
        )
        normed = modulated_norm(x, ff.shift, ff.scale)
        return gated_residual(x, self.feed_forward(normed, chunk_tokens), ff.gate)


class OutLayer(nn.Module):
    """Modulated norm, then a projection of every token back to its patch of latents."""

    def __init__(self, model_dim: int, time_dim: int, out_dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.modulation = Modulation(time_dim, model_dim, 2)
        self.out_layer = nn.Linear(model_dim, math.prod(patch_size) * out_dim)

    def forward(
        self,
        x: Tensor,
        time_embed: Tensor,
        grid: tuple[int, int, int],
        order: Tensor | None = None,
        chunk_tokens: int | None = None,
    ) -> Tensor:
        """x (B, N, D) on a (T', H', W') grid -> (B, T, H, W, C); here the channel is a patch's slowest index.

        order: which token is which patch of the grid, where they are not row-major.
        """
        shift, scale = self.modulation(time_embed)
        x = by_chunks(lambda rows, _: self.out_layer(modulated_norm(rows, shift, scale)), x, chunk_tokens)
        x = x if order is None else x.index_select(1, order)  # put into order when they are small again
        (t, h, w), (pt, ph, pw) = grid, self.patch_size
        pattern = "b (t h w) (c pt ph pw) -> b (t pt) (h ph) (w pw) c"
        return rearrange(x, pattern, t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)
