"""The settings that a plan chooses among, and how long each takes by the rates that are assumed for the machine.

None of them changes a result by more than rounding. They are whether models wait on the host between their stages, how
Qwen's layers get to where they run, how many of the DiT's blocks stream and from where, and in how many parts a block
is computed. Knows numbers only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from kandinsky.common.limits import CHUNK_TOKENS, STREAM_BUFFERS
from kandinsky.config.schema import Config, RuntimeConfig
from kandinsky.planning.costs import Rates
from kandinsky.planning.machine import Machine
from kandinsky.planning.weights import Models


@dataclass(frozen=True)
class Choice:
    """Settings of `runtime`, under their names, with nothing left open."""

    offload: str
    blocks_on_gpu: int | None
    blocks_from: str
    chunk_tokens: int | None
    heads_at_once: int | None
    attention_on_host: bool
    stream_encoders: str

    def applied_to(self, config: Config) -> Config:
        return dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, **vars(self)))


def families(config: Config, models: Models, machine: Machine) -> Iterator[tuple[Choice, range]]:
    """Choices that differ in how many blocks stay alone: each as if all of them stayed, and how many may, most first.

    An empty range: none streams, or as many stay as somebody has set. What somebody has set stays as it is.
    """
    runtime = config.runtime
    on_gpu = machine.gpu_memory is not None
    streaming: tuple[str, ...] = ("off", "on") if models.qwen_quantization is None else ("off",)
    sources: tuple[str, ...] = ("memory", "file") if runtime.dit_quantization is None else ("memory",)
    offloads: tuple[str, ...] = ("off", "on")
    if runtime.stream_encoders != "auto":
        streaming = (runtime.stream_encoders,)
    if runtime.blocks_from != "auto":
        sources = (runtime.blocks_from,)
    if runtime.offload != "auto":
        offloads = (runtime.offload,)
    if runtime.shard_weights:  # they are on the device for good
        offloads = ("off",)
    num_heads = config.model.dit_params.num_heads if machine.processes == 1 else 1  # which processes share
    for chunk, heads, on_host in parts(runtime, num_heads, on_gpu):
        for encoders in streaming:
            for offload in offloads:
                # Where all blocks stay, or as many as were set, their source says nothing unless some stream.
                for source in sources if runtime.blocks_on_gpu is not None else sources[:1]:
                    yield Choice(offload, runtime.blocks_on_gpu, source, chunk, heads, on_host, encoders), range(0)
            if runtime.blocks_on_gpu is None and on_gpu and not runtime.shard_weights:
                counts = range(models.dit_blocks - STREAM_BUFFERS - 1, -1, -1)  # of more the buffers eat the gain
                for source in sources:
                    yield Choice(offloads[-1], None, source, chunk, heads, on_host, encoders), counts


def parts(runtime: RuntimeConfig, num_heads: int, on_gpu: bool) -> Iterator[tuple[int | None, int | None, bool]]:
    """(chunk_tokens, heads_at_once, attention_on_host): whole blocks, chunks of tokens, and ever fewer heads."""
    chunks = (None, CHUNK_TOKENS) if runtime.chunk_tokens is None else (runtime.chunk_tokens,)
    if runtime.heads_at_once is not None:
        yield from ((chunk, runtime.heads_at_once, runtime.attention_on_host) for chunk in chunks[-1:])
        return
    yield from ((chunk, None, False) for chunk in chunks)
    if runtime.compile == "on":
        return
    for on_host in (False, True) if on_gpu else (False,):
        heads = num_heads
        while heads > 1:
            heads = -(-heads // 2)
            yield chunks[-1], heads, on_host


def cost(choice: Choice, rates: Rates) -> tuple[bool, float, int]:
    """What decides between two choices that fit: the smaller one is taken.

    Whether prompts go unexpanded that would not have to, the seconds of a request, and how many blocks stream.
    """
    streamed = rates.blocks - min(rates.blocks, rates.blocks if choice.blocks_on_gpu is None else choice.blocks_on_gpu)
    seconds = rates.encoding(choice.stream_encoders == "on", choice.offload == "on")
    seconds += rates.evaluations * (
        rates.streaming(streamed, choice.blocks_from == "file")
        + rates.in_parts(choice.chunk_tokens, choice.heads_at_once, choice.attention_on_host)
    )
    if choice.offload == "on":
        seconds += rates.offloading
    return rates.would_expand and choice.stream_encoders == "on", seconds, streamed
