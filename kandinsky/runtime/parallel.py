"""One video over several processes: sequence parallelism in the manner of DeepSpeed-Ulysses (arXiv 2309.14509).

Every process holds the same request and the whole model, or its shards of the weights. The visual blocks see a slice of
the tokens each. Around self-attention two all-to-all exchanges turn slices of tokens with all heads into all tokens of
some heads, and back, so that every attention engine, and NABLA, works inside as it is; cross-attention and feed-forward
need no exchange. After the blocks the slices are gathered, and everything else runs on every process alike.

Wrapped around a DiT's `run_blocks` from outside: the model knows nothing of it. Knows process groups; knows no files,
requests or devices.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kandinsky.attention.engines import Attention
from kandinsky.models.dit import BlockInputs, DiffusionTransformer3D, RunBlocks
from kandinsky.models.rope import RotaryTable


def check_world_size(num_heads: int, world_size: int) -> None:
    """Raise ValueError unless `num_heads` attention heads divide among `world_size` processes."""
    if num_heads % world_size:
        possible = [str(n) for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise ValueError(
            f"{world_size} processes cannot share this model's {num_heads} attention heads evenly: "
            f"start {', '.join(possible[:-1])} or {possible[-1]}"
        )


@dataclass(frozen=True)
class SequenceParallel:
    """Shards tokens over a process group; `apply` puts it around a DiT's visual blocks."""

    group: dist.ProcessGroup

    @property
    def size(self) -> int:
        return self.group.size()

    def apply(self, dit: DiffusionTransformer3D) -> None:
        """Raises ValueError where the heads don't divide among the processes."""
        check_world_size(dit.num_heads, self.size)
        # An attribute of this one object: the class's method stays what it is.
        dit.run_blocks = functools.partial(self.run_blocks, dit.run_blocks)  # type: ignore[method-assign]

    def run_blocks(self, run_blocks: RunBlocks, hidden: Tensor, inputs: BlockInputs) -> Tensor:
        """`run_blocks` on this process's slice of the tokens (B, N, D); returns all of them, the same everywhere."""
        length = hidden.shape[1]
        rope = inputs.tables.visual_rope
        local = replace(
            inputs,
            tables=replace(inputs.tables, visual_rope=RotaryTable(self.shard(rope.cos, 0), self.shard(rope.sin, 0))),
            attention=functools.partial(self.attend, inputs.attention, length),
        )
        return self.gather(run_blocks(self.shard(hidden, 1), local), length)

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This process's slice of `x` along `dim`, padded with zeros so that all slices are equally long."""
        length = x.shape[dim]
        per_rank = -(-length // self.size)
        begin = min(per_rank * self.group.rank(), length)
        own = x.narrow(dim, begin, min(per_rank, length - begin))
        padding = [0, 0] * (x.dim() - 1 - dim) + [0, per_rank - own.shape[dim]]
        return F.pad(own, padding) if padding[-1] else own

    def gather(self, x: Tensor, length: int) -> Tensor:
        """Slices (B, n, D) of all processes -> (B, length, D), the padding cut off."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), self.group)
        return torch.cat(parts, dim=1)[:, :length]

    def attend(self, attention: Attention, length: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attention` over all `length` tokens. q, k, v and the result: (B, heads, n, d), this process's tokens."""
        batch, heads, tokens, dim = q.shape
        # (3, B, heads, n, d) -> (process, 3, B, heads of it, n, d): one exchange for all three.
        qkv = torch.stack((q, k, v)).unflatten(2, (self.size, -1)).movedim(2, 0)
        qkv = self.exchange(qkv)  # now the first axis is the process that the tokens come from
        qkv = qkv.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)  # (3, B, heads / processes, all tokens, d)
        out = attention(*qkv[..., :length, :].unbind())
        out = F.pad(out, (0, 0, 0, tokens * self.size - length))
        out = out.unflatten(2, (self.size, tokens)).movedim(2, 0)  # (process, B, heads / processes, n, d)
        out = self.exchange(out)  # now the first axis is the process that the heads come from
        return out.movedim(0, 1).reshape(batch, heads, tokens, dim)

    def exchange(self, x: Tensor) -> Tensor:
        """x (processes, ...): part i goes to process i; returns what came from each."""
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=self.group)
        return received
