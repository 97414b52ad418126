"""What settings cost in time, worked out from rates that are assumed and named."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from kandinsky.config.schema import Config
from kandinsky.planning.activations import NABLA_DENSITY
from kandinsky.planning.machine import Machine
from kandinsky.planning.stages import decoding_of, num_tokens, text_tokens, tile_size
from kandinsky.planning.weights import Models
from kandinsky.planning.words import gb_text
from kandinsky.request import Request


def costs(config: Config, request: Request, machine: Machine, models: Models) -> Iterator[str]:
    """What the settings cost in time, in words, with the rates that it was worked out with."""
    runtime = config.runtime
    if runtime.stream_encoders == "on":
        reading = models.qwen.read / machine.files
        yield (
            f"streaming Qwen: {gb_text(models.qwen.read)} GB are read from its file for each prompt, {reading:.0f} s "
            f"at {machine.files / 1e9:g} GB/s"
        )
    if machine.gpu_memory is None:
        if runtime.offload == "on":
            total = models.all.read
            seconds = f"{total / machine.files:.0f} s at {machine.files / 1e9:g} GB/s"
            yield f"offload: {gb_text(total)} GB are read again for every request, {seconds}"
        return
    resident = min(runtime.blocks_on_gpu or models.dit_blocks, models.dit_blocks)
    streamed = models.dit_blocks - resident
    if runtime.offload == "on":
        total = models.all.size - streamed * models.dit_block
        yield (
            f"offload: {gb_text(total)} GB go to the GPU for every request, {total / machine.files:.0f} s at "
            f"{machine.files / 1e9:g} GB/s from memory-mapped files"
        )
    if streamed:
        copying = streamed * models.dit_block / machine.link
        computing = forward_flops(config, request) / machine.flops
        evaluations = num_evaluations(request)
        rest = max(0.0, copying - computing)
        size = gb_text(streamed * models.dit_block)
        yield (
            f"streaming {streamed} of {models.dit_blocks} blocks: {size} GB for each of "
            f"{evaluations} evaluations, {copying:.2f} s at {machine.link / 1e9:g} GB/s (PCIe 4), behind "
            f"{computing:.2f} s of computing at {machine.flops / 1e12:g} TFLOP/s: "
            + (f"{rest * evaluations:.0f} s more in all" if rest else "no time lost")
        )


def num_evaluations(request: Request) -> int:
    """Evaluations of the model for one sample: one a step, and of the guided steps each `guidance_every`-th another."""
    begin, end = request.guidance_interval
    steps = request.num_steps
    guided = sum(begin <= step / steps < end for step in range(steps)) if request.guidance_weight != 1 else 0
    return steps + ceil(guided / request.guidance_every)


def forward_flops(config: Config, request: Request) -> float:
    """Floating point operations of one evaluation of the visual blocks; NABLA's at the density that is assumed."""
    dit, tokens, text = config.model.dit_params, num_tokens(config, request), text_tokens(config, request)
    density = NABLA_DENSITY if config.model.attention.type == "nabla" else 1
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
