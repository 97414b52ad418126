"""What settings cost in time, worked out from rates that are assumed and named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from kandinsky.coarse import coarse_steps, none_of
from kandinsky.config.schema import Config
from kandinsky.planning.activations import NABLA_DENSITY
from kandinsky.planning.machine import Machine
from kandinsky.planning.stages import (
    decoding_of,
    is_expanding,
    num_tokens,
    resident_blocks,
    shares,
    text_tokens,
    tile_size,
)
from kandinsky.planning.weights import Models
from kandinsky.planning.words import gb_text
from kandinsky.request import Request

# Assumed, not measured.
CHUNKS_SHARE = 0.01  # of an evaluation's time that feed-forwards in chunks of tokens cost
PASSES = 6  # over the hidden states for each group of heads: read, normalised, three projections
EXPANDED_TOKENS = 256  # that Qwen writes at most


@dataclass(frozen=True)
class Rates:
    """Seconds of what settings add to a request, on one machine."""

    evaluations: int
    computing: float  # of an evaluation
    blocks: int
    link: float  # of a block over the link, where it lies in pinned memory
    file: float  # of a block from its mapped file
    hidden: float  # of a passage over all hidden states on the device
    hidden_over_link: float
    heads: int
    prompts: int  # that are encoded
    qwen: float  # of reading Qwen once
    offloading: float  # of bringing all models but Qwen to the device once
    expansion: bool  # whether prompts are to be written out also where that takes long
    would_expand: bool  # whether they are written out where that does not

    def encoding(self, streamed: bool, offloaded: bool) -> float:
        if not streamed:
            return self.qwen if offloaded else 0.0
        return (self.prompts + self.expansion * EXPANDED_TOKENS) * self.qwen

    def streaming(self, blocks: int, from_file: bool) -> float:
        """Of an evaluation: copies hide behind the computation, where they are not from a file."""
        return blocks * self.file if from_file else max(0.0, blocks * self.link - self.computing)

    def in_parts(self, chunk_tokens: int | None, heads_at_once: int | None, on_host: bool) -> float:
        """Of an evaluation."""
        seconds = 0.0 if chunk_tokens is None else CHUNKS_SHARE * self.computing
        if heads_at_once is not None:
            seconds += self.blocks * ceil(self.heads / heads_at_once) * PASSES * self.hidden
            seconds += self.blocks * 2 * self.hidden_over_link * on_host
        return seconds


def rates_of(config: Config, request: Request, machine: Machine, models: Models) -> Rates:
    dit, has_gpu = config.model.dit_params, machine.gpu_memory is not None
    hidden = num_tokens(config, request) * dit.model_dim * models.element_size
    texts = {sample.text for sample in request.samples}
    if request.guidance_weight != 1:  # what the YAML says is kept on disk
        texts |= {s.negative_caption for s in request.samples} - {config.generation.negative_caption}
    asked = models.writer is not None and request.expand_prompts is True
    sequence, by_branch = shares(config, machine)[0], config.runtime.cfg_parallel > 1
    return Rates(
        evaluations=(request.num_steps if by_branch else num_evaluations(request)) * len(request.samples),
        computing=forward_flops(config, request) / (machine.flops if has_gpu else machine.host_flops) / sequence,
        blocks=models.dit_blocks,
        link=models.dit_block / machine.link,
        file=models.dit_block / machine.files,
        hidden=hidden / machine.memory,
        hidden_over_link=hidden / machine.link,
        heads=dit.num_heads,
        prompts=len(texts),
        qwen=models.qwen.read / machine.files,
        offloading=(models.clip.size + models.vae.size + models.dit.size) / machine.files,
        expansion=asked,
        would_expand=models.writer is not None and request.expand_prompts is None,
    )


def costs(config: Config, request: Request, machine: Machine, models: Models) -> Iterator[str]:
    """What the settings cost in time, in words, with the rates that it was worked out with."""
    runtime, rates = config.runtime, rates_of(config, request, machine, models)
    streams = runtime.stream_encoders == "on"
    if streams:
        yield (
            f"streaming Qwen: {gb_text(models.qwen.read)} GB are read from its file for each prompt, "
            f"{rates.qwen:.0f} s at {machine.files / 1e9:g} GB/s"
        )
    if (words := unexpanded(config, request, machine, models)) is not None:
        yield words
    if (coarse := coarse_steps(config, request.num_steps, request.width, request.height)) is not None:
        share = denoising_flops(config, request) / (num_evaluations(request) * forward_flops(config, request))
        yield (
            f"coarse steps: the first {coarse.steps} of {request.num_steps} at {coarse.width}x{coarse.height}; "
            f"{share:.2f} of the operations of all at full size"
        )
    elif (asked := config.generation.coarse_steps.share) > 0:
        yield f"coarse steps: what is asked for {none_of(asked, request.num_steps)}"
    if models.adapted.missing:
        yield f"not here, and so not counted: {', '.join(models.adapted.missing)}"
    yield from _moving(config, machine, models)
    if machine.gpu_memory is None:
        return
    streamed = models.dit_blocks - resident_blocks(runtime, models)
    if streamed:
        from_file = runtime.blocks_from == "file"
        copying = streamed * (rates.file if from_file else rates.link)
        rest = rates.streaming(streamed, from_file)
        size, evaluations = gb_text(streamed * models.dit_block), rates.evaluations
        source = (
            f"{machine.files / 1e9:g} GB/s from the mapped file, besides"
            if from_file
            else f"{machine.link / 1e9:g} GB/s (PCIe 4), behind"
        )
        yield (
            f"streaming {streamed} of {models.dit_blocks} blocks: {size} GB for each of "
            f"{evaluations} evaluations, {copying:.2f} s at {source} "
            f"{rates.computing:.2f} s of computing at {machine.flops / 1e12:g} TFLOP/s: "
            + (f"{rest * evaluations:.0f} s more in all" if rest else "no time lost")
        )
    if runtime.heads_at_once is not None:
        more = rates.in_parts(runtime.chunk_tokens, runtime.heads_at_once, runtime.attention_on_host)
        yield (
            f"blocks in parts: {runtime.heads_at_once} of {rates.heads} heads at a time"
            + (", whose attention waits on the host" if runtime.attention_on_host else "")
            + f": {more:.1f} s more for each of {rates.evaluations} evaluations at {machine.memory / 1e9:g} GB/s"
        )


def denoising_seconds(config: Config, request: Request, machine: Machine, models: Models) -> float:
    """All evaluations of a request, with what streaming and parts add to each; at rates that are assumed."""
    rates, runtime = rates_of(config, request, machine, models), config.runtime
    each = rates.computing
    if machine.gpu_memory is not None:
        each += rates.streaming(models.dit_blocks - resident_blocks(runtime, models), runtime.blocks_from == "file")
        each += rates.in_parts(runtime.chunk_tokens, runtime.heads_at_once, runtime.attention_on_host)
    return rates.evaluations * each


def unexpanded(config: Config, request: Request, machine: Machine, models: Models) -> str | None:
    """That prompts are not written out because Qwen streams, and how long that would take; None where they are."""
    rates = rates_of(config, request, machine, models)
    if not rates.would_expand or is_expanding(config, request, models):
        return None
    return (
        f"prompts are not written out: Qwen would be read again for every word of up to {EXPANDED_TOKENS}, about "
        f"{EXPANDED_TOKENS * rates.qwen:.0f} s a prompt; --expand_prompt on does it all the same"
    )


def _moving(config: Config, machine: Machine, models: Models) -> Iterator[str]:
    """What offload costs."""
    if config.runtime.offload != "on":
        return
    streamed = models.dit_blocks - resident_blocks(config.runtime, models)
    without = models.qwen if config.runtime.stream_encoders == "on" else None
    if machine.gpu_memory is None:
        total = models.all.read - (without.read if without else 0)
        seconds = f"{total / machine.files:.0f} s at {machine.files / 1e9:g} GB/s"
        yield f"offload: {gb_text(total)} GB are read again for every request, {seconds}"
        return
    total = models.all.size - streamed * models.dit_block - (without.size if without else 0)
    yield (
        f"offload: {gb_text(total)} GB go to the GPU for every request, {total / machine.files:.0f} s at "
        f"{machine.files / 1e9:g} GB/s from memory-mapped files"
    )


def num_evaluations(request: Request, first_steps: int | None = None) -> int:
    """Evaluations of the model for one sample: one a step, and of the guided steps each `guidance_every`-th another.

    first_steps: in so many steps, the first ones; None: in all.
    """
    begin, end = request.guidance_interval
    steps = request.num_steps if first_steps is None else first_steps
    is_guided = request.guidance_weight != 1
    guided = sum(begin <= step / request.num_steps < end for step in range(steps)) if is_guided else 0
    return steps + ceil(guided / request.guidance_every)


def denoising_flops(config: Config, request: Request) -> float:
    """Floating point operations of the visual blocks in all evaluations for one sample."""
    coarse = coarse_steps(config, request.num_steps, request.width, request.height)
    every = num_evaluations(request)
    if coarse is None:
        return every * forward_flops(config, request)
    early = num_evaluations(request, coarse.steps)
    small = replace(request, width=coarse.width, height=coarse.height)
    return early * forward_flops(config, small) + (every - early) * forward_flops(config, request)


def forward_flops(config: Config, request: Request) -> float:
    """Floating point operations of one evaluation of the visual blocks; NABLA's at the density that is assumed, of an
    average step."""
    dit, tokens, text = config.model.dit_params, num_tokens(config, request), text_tokens(config, request)
    how, steps = config.model.attention, range(request.num_steps)
    exact = [len(how.exact_numbers(dit.num_visual_blocks, step, request.num_steps)) for step in steps]
    share = sum(exact) / len(exact) / dit.num_visual_blocks
    density = share + (1 - share) * NABLA_DENSITY if how.type == "nabla" else 1
    linear = 2 * tokens * (6 * dit.model_dim**2 + 2 * dit.model_dim * dit.ff_dim) + 4 * text * dit.model_dim**2
    attention = 4 * tokens * dit.model_dim * (density * tokens + text)
    return dit.num_visual_blocks * (linear + attention)


def tiles_of(config: Config, request: Request, models: Models) -> str:
    """The VAE's tiles in words, and how much work their overlaps add."""
    if config.model.vae.decoder == "tiny":
        return "frame by frame, with the tiny decoder"
    tile = tile_size(config, request, models)
    work = decoding_of(config, request, models).work(tile)
    return "in one piece" if work == 1 else f"in tiles of {tile} pixels, {work:.2f} times the work of one piece"
