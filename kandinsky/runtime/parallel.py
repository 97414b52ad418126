"""One output over several processes: its tokens, guidance's two branches, and the VAE's tiles are divided.

Tokens, in the manner of DeepSpeed-Ulysses (arXiv 2309.14509): every process holds the same request and the whole model,
or its shards of the weights. The visual blocks see a slice of the tokens each. Around self-attention two all-to-all
exchanges turn slices of tokens with all heads into all tokens of some heads, and back, so that every attention engine,
and NABLA, works inside as it is; cross-attention and feed-forward need no exchange. After the blocks the slices are
gathered, and everything else runs on every process alike.

Branches: one half of the processes evaluates the prompt, the other the negative prompt, and they tell each other.

All of it is put around the models from outside: they know nothing of it. Knows process groups; knows no files, requests
or devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from kandinsky.attention.engines import Attention
from kandinsky.common.limits import BLOCK_TOKENS
from kandinsky.common.out_of_memory import of_the_host, ran_out_of_memory
from kandinsky.models.dit import BlockInputs, RunBlocks
from kandinsky.models.rope import RotaryTable
from kandinsky.runtime.compile import operation
from kandinsky.runtime.processes import Processes, Value
from kandinsky.sampling.sampler import Branch, Guidance, Velocity
from kandinsky.text.embeddings import PromptEncoder, TextEmbeddings

if TYPE_CHECKING:
    from PIL import Image

BRANCHES: tuple[Branch, ...] = ("cond", "uncond")


class OutOfMemorySomewhere(torch.OutOfMemoryError):
    """Raised in all processes of a group (None: of all) at once, where one of them ran out of memory."""

    def __init__(self, group: dist.ProcessGroup | None, words: str, on_host: bool) -> None:
        super().__init__(words)
        self.group, self.on_host = group, on_host


def meet(group: dist.ProcessGroup | None, flag: bool = False, failure: BaseException | None = None) -> bool:
    """Whether any process of a group has set the flag. To be called by all of them in the same places.

    A process that has run out of memory comes with that failure, from wherever it was, and meets the others in the
    place where they are next: in all of them it is then raised as OutOfMemorySomewhere.
    """
    on_host = failure is not None and of_the_host(failure)
    words = torch.tensor([flag, failure is not None, on_host], dtype=torch.uint8)  # on the CPU: nobody waits for a GPU
    dist.all_reduce(words, dist.ReduceOp.MAX, group)
    any_flag, any_failure, any_on_host = words.tolist()
    if any_failure:
        raise OutOfMemorySomewhere(group, str(failure or "in another process"), bool(any_on_host))
    return bool(any_flag)


def together(group: dist.ProcessGroup | None, attempt: Callable[[], Value]) -> Value:
    """What `attempt` returns; or OutOfMemorySomewhere, in all processes of a group, where one has run out of memory.

    Within it, processes may wait for each other in `meet` alone, or behind a `meet` after which nothing can run out of
    memory before they do.
    """
    try:
        result = attempt()
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error) or (isinstance(error, OutOfMemorySomewhere) and error.group is group):
            raise  # what ends all of them, or what they all have
        failure = error.with_traceback(None)  # and without what its frames hold
    else:
        meet(group)
        return result
    meet(group, failure=failure)
    raise AssertionError("a failure is raised where it is met")


@dataclass(frozen=True)
class SequenceParallel:
    """Shards tokens over a process group, around a DiT's visual blocks (see `Execution.around`).

    The group's size has to divide the number of heads (see `config.check_processes`).
    """

    group: dist.ProcessGroup
    meets: bool = True  # whether processes meet before each exchange, in case that memory ran out in one
    operation: Callable[[Tensor], Tensor] | None = None  # what `exchange` is within a compiled graph

    @property
    def size(self) -> int:
        return self.group.size()

    def for_graphs(self) -> SequenceParallel:
        """The same, around blocks that are compiled: to a compiler an exchange is one operation."""

        def fake(x: Tensor) -> Tensor:
            return torch.empty_like(x, memory_format=torch.contiguous_format)

        return replace(self, operation=operation("exchange", self.exchange, fake, "(Tensor x) -> Tensor"))

    def around(self, run_blocks: RunBlocks) -> RunBlocks:
        """`run_blocks` of which this process computes its part."""
        return functools.partial(self.run_blocks, run_blocks)

    def run_blocks(self, run_blocks: RunBlocks, hidden: Tensor, inputs: BlockInputs) -> Tensor:
        """`run_blocks` on this process's slice of the tokens (B, N, D); returns all of them, the same everywhere."""
        length, tables = hidden.shape[1], inputs.tables
        whole = 1 if tables.nabla is None else BLOCK_TOKENS  # a block of NABLA's is not split
        cos, sin = (self.shard(x, 0, whole) for x in (tables.visual_rope.cos, tables.visual_rope.sin))
        local = replace(
            inputs,
            tables=replace(tables, visual_rope=RotaryTable(cos, sin)),
            attention=functools.partial(self.attend, inputs.attention, length),
            exact=functools.partial(self.attend, inputs.exact, length),
        )
        return self.gather(run_blocks(self.shard(hidden, 1, whole), local), length)

    def meet(self) -> None:
        """Raise OutOfMemorySomewhere where another process of the group has run out of memory."""
        if self.meets:
            meet(self.group)

    def together(self, velocity: Velocity) -> Velocity:
        """`velocity` that raises OutOfMemorySomewhere in all processes of the group, or in none."""
        if not self.meets or self.size == 1:
            return velocity
        return lambda *inputs: together(self.group, functools.partial(velocity, *inputs))

    def shard(self, x: Tensor, dim: int, whole: int = 1) -> Tensor:
        """This process's slice of `x` along `dim`, padded with zeros so that all slices are equally long.

        Their length is a multiple of `whole`.
        """
        length = x.shape[dim]
        per_rank = -(-length // (self.size * whole)) * whole
        begin = min(per_rank * self.group.rank(), length)
        own = x.narrow(dim, begin, min(per_rank, length - begin))
        padding = [0, 0] * (x.dim() - 1 - dim) + [0, per_rank - own.shape[dim]]
        return F.pad(own, padding) if padding[-1] else own

    def gather(self, x: Tensor, length: int) -> Tensor:
        """Slices (B, n, D) of all processes -> (B, length, D), the padding cut off."""
        x, parts = x.contiguous(), [torch.empty_like(x) for _ in range(self.size)]
        self.meet()
        dist.all_gather(parts, x, self.group)
        return torch.cat(parts, dim=1)[:, :length]

    def attend(self, attention: Attention, length: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attention` over all `length` tokens. q, k, v and the result: (B, heads, n, d), this process's tokens."""
        tokens = q.shape[2]
        # One exchange for all three: to each process (p) its heads, from each its tokens. Stacked as they are sent: a
        # copy that `exchange` makes lies beside the stack for as long as Python holds its argument, which is until it
        # returns, once anything was compiled in this process.
        shares = [rearrange(x, "b (p h) n d -> p b h n d", p=self.size) for x in (q, k, v)]
        qkv = self.exchange(torch.stack(shares, dim=1))
        qkv = rearrange(qkv, "p three b h n d -> three b h (p n) d")
        out = attention(*qkv[..., :length, :].unbind())  # (B, heads of this process, all tokens, d)
        out = F.pad(out, (0, 0, 0, tokens * self.size - length))
        out = self.exchange(rearrange(out, "b h (p n) d -> p b h n d", p=self.size))
        return rearrange(out, "p b h n d -> b (p h) n d")

    def exchange(self, x: Tensor) -> Tensor:
        """x (processes, ...): part i goes to process i; returns what came from each."""
        if self.operation is not None:
            return self.operation(x)
        x = x.contiguous()
        received = torch.empty_like(x)
        self.meet()
        dist.all_to_all_single(received, x, group=self.group)
        return received


@dataclass(frozen=True)
class GuidanceParallel:
    """Gives the two branches of guidance to the two processes of a group."""

    group: dist.ProcessGroup
    meets: bool = True  # as in SequenceParallel

    def split(self, velocity: Velocity, plan: Sequence[Guidance]) -> Velocity:
        """`velocity` of which the group's first process computes the "cond" branch only, the second the "uncond".

        The branches of one step are computed at once, when the first of them is asked for. So a cache that follows a
        branch from step to step finds all of its evaluations in one process. In steps without an unconditional
        evaluation the second process only waits.

        plan: what guidance does in each of the steps, which have to come in their order.
        """
        mine = BRANCHES[self.group.rank()]
        steps = iter(plan)
        uncond: Tensor | None = None

        def shared(latents: Tensor, timestep: Tensor, branch: Branch) -> Tensor:
            nonlocal uncond
            if branch == "uncond":
                assert uncond is not None, "the conditional branch comes first in every step"
                return uncond
            is_guided = next(steps) == "new"

            def own_and_both() -> tuple[Tensor, list[Tensor]]:
                own = torch.zeros_like(latents)
                if mine == "cond" or is_guided:
                    own = velocity(latents, timestep, mine).to(own.dtype).contiguous()
                return own, [torch.empty_like(own) for _ in BRANCHES]

            own, both = together(self.group, own_and_both) if self.meets else own_and_both()
            dist.all_gather(both, own, self.group)
            cond, uncond = both[0], both[1] if is_guided else None
            return cond

        return shared


@dataclass(frozen=True)
class TileParallel:
    """Divides the VAE's tiles among all processes: a `MapTiles` (kandinsky/models/vae_tiling.py)."""

    processes: Processes

    def __call__(self, function: Callable[[Tensor], Tensor], tiles: Sequence[Tensor]) -> Iterator[Tensor]:
        """function(tile) for all tiles in their order, each computed by one process; the same everywhere.

        Where one runs out of memory, all raise OutOfMemorySomewhere.
        """
        rank, size = self.processes.rank, self.processes.size
        if len(tiles) == 1:
            yield function(tiles[0])
            return
        for begin in range(0, len(tiles), size):
            # Who has none left computes the last one again: the others take as long for theirs.
            tile = tiles[min(begin + rank, len(tiles) - 1)]

            def own_and_all(tile: Tensor = tile) -> tuple[Tensor, list[Tensor]]:
                own = function(tile).contiguous()
                return own, [torch.empty_like(own) for _ in range(size)]

            own, results = together(None, own_and_all)
            dist.all_gather(results, own)
            yield from results[: len(tiles) - begin]


@dataclass(frozen=True)
class FirstProcessEncodes:
    """A text embedder that only the first process has; the others get its embeddings."""

    embedder: PromptEncoder | None  # None in all other processes
    processes: Processes
    device: torch.device  # where embeddings are handed out

    def encode(
        self,
        prompts: Sequence[str],
        content: str = "video",
        images: Sequence[Image.Image] | None = None,
        max_length: int | None = None,
    ) -> TextEmbeddings:
        """To be called in all processes at once. A ValueError is raised in all of them, and so is want of memory."""
        result: TextEmbeddings | ValueError | None = None

        def encoded() -> None:
            nonlocal result
            if self.embedder is not None:
                try:
                    result = self.embedder.encode(prompts, content, images, max_length).to(torch.device("cpu"))
                except ValueError as error:
                    result = error

        together(None, encoded)
        result = self.processes.agree(result)
        if isinstance(result, ValueError):
            raise result
        assert result is not None
        return together(None, functools.partial(result.to, self.device))


class DistributedTeam:
    """All processes as a pipeline sees them: who writes, what they agree on, and how guidance is divided.

    Args:
        processes: connected.
        cfg_parallel: 2 gives each branch of guidance to one half of them.
        device_type: where the models are, "cpu" or "cuda".
        meets: whether all can take a step again in which one of them runs out of memory. Not with weights in shards,
            which are gathered without asking: there one's failure is the end of all.
    """

    def __init__(self, processes: Processes, cfg_parallel: int, device_type: str, meets: bool = True) -> None:
        self.processes = processes
        self.is_first, self.size = processes.is_first, processes.size
        # Neighbours in the numbering share a sequence, which is what most is sent for: they are likely on one machine.
        shape = (cfg_parallel, processes.size // cfg_parallel)
        self.mesh: DeviceMesh = init_device_mesh(device_type, shape, mesh_dim_names=("guidance", "sequence"))
        self.sequence = SequenceParallel(self.mesh["sequence"].get_group(), meets)
        self.guidance = GuidanceParallel(self.mesh["guidance"].get_group(), meets) if cfg_parallel > 1 else None
        self.map_tiles = TileParallel(processes)

    def agree(self, value: Value) -> Value:
        """The first process's value."""
        return self.processes.agree(value)

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return meet(None, flag)

    def all_in_sequence(self, flag: bool) -> bool:
        """Whether all processes say so that share this one's sequence. Those of the other half may be elsewhere."""
        return flag if self.sequence.size == 1 else not meet(self.sequence.group, not flag)

    def together(self, attempt: Callable[[], Value]) -> Value:
        """What it returns; or OutOfMemorySomewhere in all processes, where one of them has run out of memory."""
        return together(None, attempt)

    def split_guidance(self, velocity: Velocity, plan: Sequence[Guidance]) -> Velocity:
        """The same velocity, its two branches computed side by side where there are two halves."""
        velocity = self.sequence.together(velocity)
        return velocity if self.guidance is None else self.guidance.split(velocity, plan)

    def over_branches(self, counts: Sequence[int]) -> list[int]:
        """The sums of what was counted in the two halves."""
        if self.guidance is None:
            return list(counts)
        sums = torch.tensor(counts, device=self.mesh.device_type)
        dist.all_reduce(sums, group=self.guidance.group)
        return [int(count) for count in sums]

    def from_branches(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the two halves hold of their branches, whose names begin with the branch's, on the CPU."""
        if self.guidance is None:
            return tensors
        halves: list[dict[str, Tensor]] = [{}, {}]
        # A half that went on with a run still holds of the other branch what there was then.
        mine = f"{BRANCHES[self.guidance.group.rank()]}."
        own = {name: tensor.cpu() for name, tensor in tensors.items() if name.startswith(mine)}
        dist.all_gather_object(halves, own, self.guidance.group)
        return halves[0] | halves[1]
