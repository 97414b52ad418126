"""Kandinsky 5's diffusion transformer: latents, text and a timestep in, velocity out.

`forward` is embed -> run_blocks -> head. Two records are handed to it: `RequestTables`, what depends on the request's
sizes alone, computed once by `request_tables`; and `Execution`, how the blocks are run: which attention, compiled,
streamed, cached, over several processes. The module knows no devices, files or schedules, and keeps no state.

Paper: Kandinsky 5.0 (CrossDiT); state-dict keys are the published checkpoints'.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kandinsky.attention.block_sparse import BlockSparseAttention, sdpa_block_sparse
from kandinsky.attention.engines import Attention, sdpa
from kandinsky.attention.nabla import NablaConfig, NablaTables, nabla_attention, nabla_tables
from kandinsky.models.layers import (
    OutLayer,
    TextBlock,
    TextProjection,
    TimeEmbeddings,
    VisualBlock,
    VisualEmbeddings,
)
from kandinsky.models.rope import RotaryTable, text_rotary_table, visual_rotary_table

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class RequestTables:
    """What depends only on a request's sizes: the patch grid, the rotary tables, and NABLA's window and token order."""

    grid: Grid
    visual_rope: RotaryTable  # of tokens in NABLA's order, where there is NABLA
    text_rope: RotaryTable
    nabla: NablaTables | None = None  # None: visual self-attention is dense


@dataclass(frozen=True)
class BlockInputs:
    """What every visual block sees besides the hidden states, constant over the blocks of one forward."""

    text: Tensor  # (B, L, D)
    text_mask: Tensor | None  # (B, 1, 1, L)
    time_embed: Tensor  # (B, E)
    tables: RequestTables
    attention: Attention  # visual self-attention, dense or NABLA's
    exact: Attention  # the same in `Execution.exact_blocks`
    execution: Execution


# The visual blocks one after the other, each ready to run until the next one is asked for.
HandOut = Callable[[nn.ModuleList], Iterable[nn.Module]]
# Visual tokens (B, N, D) before the visual blocks -> after them.
RunBlocks = Callable[[Tensor, BlockInputs], Tensor]


def unchanged(run_blocks: RunBlocks) -> RunBlocks:
    return run_blocks


@dataclass(frozen=True)
class Execution:
    """How the DiT is run, never what it computes: made where a model is loaded, handed to `forward`.

    attention, block_sparse: what computes visual self-attention, dense or under NABLA's map. run_block: calls a visual
    block with what its forward takes, compiled perhaps. hand_out: the visual blocks one after the other, each ready
    to run until the next one is asked for. chunk_tokens: queries, keys, values and feed-forwards are computed for so
    many tokens at a time; None: for all. around: what wraps the passage through all visual blocks. writes_over: whether
    blocks write over the hidden states that they are given. exact: what computes visual self-attention, densely, in the
    blocks numbered in exact_blocks. calls: where blocks are counted by that, as "exact" or "engine".
    """

    attention: Attention = sdpa
    block_sparse: BlockSparseAttention = sdpa_block_sparse
    run_block: Callable[..., Tensor] = VisualBlock.__call__
    hand_out: HandOut = iter
    chunk_tokens: int | None = None
    around: Callable[[RunBlocks], RunBlocks] = unchanged
    writes_over: bool = False
    exact: Attention = sdpa
    exact_blocks: frozenset[int] = frozenset()
    calls: Counter[str] | None = None

    def within(self, wrap: Callable[[RunBlocks], RunBlocks]) -> Execution:
        """The same, with `wrap` around all that is around the blocks already."""
        return replace(self, around=lambda run_blocks: wrap(self.around(run_blocks)))


class DiffusionTransformer3D(nn.Module):
    """The DiT of every variant (video Lite and Pro, images, image editing); arguments are the YAML's `dit_params`."""

    def __init__(
        self,
        *,
        in_visual_dim: int = 16,
        in_text_dim: int = 3584,
        in_text_dim2: int = 768,
        time_dim: int = 512,
        out_visual_dim: int = 16,
        patch_size: Sequence[int] = (1, 2, 2),
        model_dim: int = 1792,
        ff_dim: int = 7168,
        num_text_blocks: int = 2,
        num_visual_blocks: int = 32,
        axes_dims: Sequence[int] = (16, 24, 24),
        visual_cond: bool = False,
        instruct_type: str | None = None,
    ) -> None:
        super().__init__()
        head_dim = sum(axes_dims)
        if model_dim % head_dim:
            raise ValueError(
                f"model_dim {model_dim} is not a multiple of the head dimension {head_dim}, sum(axes_dims)"
            )
        pt, ph, pw = patch_size
        # Conditioned variants see [latents, condition latents, mask] along the channels.
        conditioned = visual_cond or instruct_type == "channel"
        self.in_channels = 2 * in_visual_dim + 1 if conditioned else in_visual_dim
        self.patch_size = (pt, ph, pw)
        self.axes_dims = tuple(axes_dims)
        self.head_dim = head_dim
        self.num_heads = model_dim // head_dim

        self.time_embeddings = TimeEmbeddings(model_dim, time_dim)
        self.text_embeddings = TextProjection(in_text_dim, model_dim)
        self.pooled_text_embeddings = TextProjection(in_text_dim2, time_dim)
        self.visual_embeddings = VisualEmbeddings(self.in_channels, model_dim, self.patch_size)
        self.text_transformer_blocks = nn.ModuleList(
            TextBlock(model_dim, time_dim, ff_dim, head_dim) for _ in range(num_text_blocks)
        )
        self.visual_transformer_blocks = nn.ModuleList(
            VisualBlock(model_dim, time_dim, ff_dim, head_dim) for _ in range(num_visual_blocks)
        )
        self.out_layer = OutLayer(model_dim, time_dim, out_visual_dim, self.patch_size)

    def request_tables(
        self,
        latent_size: tuple[int, int, int],
        text_length: int,
        scale_factor: Sequence[float],
        device: torch.device | str,
        nabla: NablaConfig | None = None,
    ) -> RequestTables:
        """Tables for latents of (T, H, W) and `text_length` text tokens, with NABLA or (None) dense attention.

        Raises ValueError for sizes it can't take.
        """
        if any(size % p for size, p in zip(latent_size, self.patch_size, strict=True)):
            raise ValueError(f"latents of size {latent_size} do not divide into patches of {self.patch_size}")
        t, h, w = (size // p for size, p in zip(latent_size, self.patch_size, strict=True))
        blocks = None if nabla is None else nabla_tables((t, h, w), nabla, device)
        visual_rope = visual_rotary_table((t, h, w), self.axes_dims, scale_factor, device)
        return RequestTables(
            grid=(t, h, w),
            visual_rope=visual_rope if blocks is None else visual_rope.reordered(blocks.order),
            text_rope=text_rotary_table(text_length, self.head_dim, device),
            nabla=blocks,
        )

    def embed(
        self,
        latents: Tensor,
        text_embeds: Tensor,
        pooled_embeds: Tensor,
        timesteps: Tensor,
        tables: RequestTables,
        text_mask: Tensor | None,
        execution: Execution = Execution(),
    ) -> tuple[Tensor, BlockInputs]:
        """Patch tokens (B, N, D), in NABLA's order if any, and what blocks see besides them; runs the text blocks."""
        mask = None if text_mask is None else text_mask[:, None, None, :]
        time_embed = self.time_embeddings(timesteps) + self.pooled_text_embeddings(pooled_embeds)
        text = self.text_embeddings(text_embeds)  # (B, L, D)
        for block in self.text_transformer_blocks:
            text = block(text, time_embed, tables.text_rope, mask, execution.chunk_tokens)
        order = None if tables.nabla is None else tables.nabla.order
        hidden = self.visual_embeddings(latents.to(text.dtype), order)  # (B, N, D)
        attention = execution.attention
        if tables.nabla is not None:
            attention = functools.partial(nabla_attention, tables=tables.nabla, kernel=execution.block_sparse)
        return hidden, BlockInputs(text, mask, time_embed, tables, attention, execution.exact, execution)

    def run_blocks(self, hidden: Tensor, inputs: BlockInputs) -> Tensor:
        """All visual blocks, (B, N, D) -> (B, N, D)."""
        execution, rope = inputs.execution, inputs.tables.visual_rope
        shared = (inputs.text, inputs.time_embed, rope, inputs.text_mask)
        exact = [self.visual_transformer_blocks[number] for number in execution.exact_blocks]
        for block in execution.hand_out(self.visual_transformer_blocks):  # all of them, or those that a cache asks for
            is_exact = block in exact
            attention = inputs.exact if is_exact else inputs.attention
            hidden = execution.run_block(block, hidden, *shared, attention, execution.chunk_tokens)
            if execution.calls is not None:
                execution.calls["exact" if is_exact else "engine"] += 1
        return hidden

    def head(self, hidden: Tensor, inputs: BlockInputs) -> Tensor:
        """(B, N, D) -> velocity (B, T, H, W, out_visual_dim)."""
        tables = inputs.tables
        order = None if tables.nabla is None else tables.nabla.inverse
        return self.out_layer(hidden, inputs.time_embed, tables.grid, order, inputs.execution.chunk_tokens)

    def named_weights(self, hand_out: HandOut = iter) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and buffer by name, each to be looked at before the next: visual blocks may stream."""
        blocks = "visual_transformer_blocks."
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if not name.startswith(blocks):
                yield name, tensor
        for i, block in enumerate(hand_out(self.visual_transformer_blocks)):
            for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
                yield f"{blocks}{i}.{name}", tensor

    def forward(
        self,
        latents: Tensor,
        text_embeds: Tensor,
        pooled_embeds: Tensor,
        timesteps: Tensor,
        scale_factor: Sequence[float] = (1.0, 2.0, 2.0),
        nabla: NablaConfig | None = None,
        text_mask: Tensor | None = None,
        *,
        tables: RequestTables | None = None,
        execution: Execution = Execution(),
    ) -> Tensor:
        """Velocity at `latents`.

        Args:
            latents: (B, T, H, W, C_in), C_in = 33 for conditioned variants ([latents, condition, mask]), else 16.
            text_embeds: (B, L, in_text_dim), right-padded where `text_mask` says so.
            pooled_embeds: (B, in_text_dim2).
            timesteps: (B,) in [0, 1000]; keep them in float32.
            scale_factor: divides rotary positions along time, height and width.
            nabla: visual self-attention is block-sparse, with this config; None: dense, or as `tables` say.
            text_mask: (B, L) bool, True on real tokens; None where all are real.
            tables: this request's `request_tables`; computed here when None.
            execution: how the blocks are run; the default is plain PyTorch, all at once.

        Returns:
            (B, T, H, W, out_visual_dim) in the model's dtype.
        """
        if latents.shape[-1] != self.in_channels:
            raise ValueError(f"latents have {latents.shape[-1]} channels; this model takes {self.in_channels}")
        if tables is None:
            t, h, w = latents.shape[1:4]
            tables = self.request_tables((t, h, w), text_embeds.shape[1], scale_factor, latents.device, nabla)
        elif nabla is not None and (tables.nabla is None or tables.nabla.config != nabla):
            raise ValueError(f"nabla is {nabla}, but the tables were made for another config: hand in one of the two")
        hidden, inputs = self.embed(latents, text_embeds, pooled_embeds, timesteps, tables, text_mask, execution)
        hidden = execution.around(self.run_blocks)(hidden, inputs)
        return self.head(hidden, inputs)
