"""With which settings a stage takes less memory than with those that it ran out of memory with.

Knows numbers only, as all of planning. None of what is proposed changes a result by more than rounding; what changes no
bit comes first: models that wait on the host, encoders and blocks that stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from kandinsky.config.schema import Config
from kandinsky.planning.choices import Choice, cost, families
from kandinsky.planning.costs import rates_of
from kandinsky.planning.machine import CUDA_CONTEXT, HOST_OF_CPU_RUN, HOST_OF_GPU_RUN, Machine
from kandinsky.planning.stages import Stage, estimate, is_expanding
from kandinsky.planning.weights import Models
from kandinsky.request import Request

ENOUGH = 0.8  # of what a stage takes by the plan, which may be 15 % off: how far it is to come down at once
LESS = 0.98  # and where nothing brings it so far: what still is a difference


def more_frugal(
    config: Config, request: Request, machine: Machine, models: Models, stage: str, on_host: bool = False
) -> dict[str, Any]:
    """Settings of `runtime`, those that change, under which a stage takes less than under `config`; none: nothing does.

    Of those with which it takes a fifth less the fastest, else what takes the least. No other stage then takes more
    than it does now, on the GPU; on the host it may take what there is.

    config: with settings as they are in use, of which none is open.
    stage: a name as in `estimate`, or another one, which is then taken to be the VAE's.
    on_host: whether it was the host's memory that ran out, where there is a GPU.
    """
    # That prompts are written out stays so: it was decided before.
    request = dataclasses.replace(request, expand_prompts=is_expanding(config, request, models))
    on_gpu = machine.gpu_memory is not None
    now = {each.name: each for each in estimate(config, request, machine, models)}
    stage = stage if stage in now else "decode"

    def needs(each: Stage) -> float:
        """Bytes that settings can do something about."""
        if on_gpu and not on_host:
            return each.gpu - CUDA_CONTEXT
        return each.host - (HOST_OF_GPU_RUN if on_gpu else HOST_OF_CPU_RUN)

    def is_possible(after: dict[str, Stage]) -> bool:
        return all(
            each.gpu <= now[name].gpu and each.host <= max(now[name].host, machine.host_memory)
            for name, each in after.items()
        )

    rates = rates_of(config, request, machine, models)
    best: tuple[float, Choice] | None = None
    for in_parts in (False, True):
        found: list[tuple[tuple[bool, float, int], Choice]] = []
        for choice in _choices(config, models, machine, in_parts):
            after = {each.name: each for each in estimate(choice.applied_to(config), request, machine, models)}
            if not is_possible(after):
                continue
            share = needs(after[stage]) / needs(now[stage])
            if share <= ENOUGH:
                found.append((cost(choice, rates), choice))
            best = min(best or (share, choice), (share, choice), key=lambda pair: pair[0])
        if found:
            return _changes(config, min(found, key=lambda pair: pair[0])[1])
    return {} if best is None or best[0] > LESS else _changes(config, best[1])


def _choices(config: Config, models: Models, machine: Machine, in_parts: bool) -> Iterator[Choice]:
    """All of them with offload, so that nothing is on the device while the models are put together anew; with blocks in
    the parts in which they run now, or in others, too."""
    opened: dict[str, Any] = {"offload": "on", "blocks_on_gpu": None, "blocks_from": "auto"}
    if models.qwen_quantization is None:
        opened["stream_encoders"] = "auto"
    if in_parts:
        opened |= {"chunk_tokens": None, "heads_at_once": None, "attention_on_host": False}
    as_now = (config.runtime.chunk_tokens, config.runtime.heads_at_once, config.runtime.attention_on_host)
    runtime = dataclasses.replace(config.runtime, **opened)
    for family, counts in families(dataclasses.replace(config, runtime=runtime), models, machine):
        if not in_parts and (family.chunk_tokens, family.heads_at_once, family.attention_on_host) != as_now:
            continue
        for count in counts or (family.blocks_on_gpu,):
            yield dataclasses.replace(family, blocks_on_gpu=count)


def _changes(config: Config, choice: Choice) -> dict[str, Any]:
    return {name: value for name, value in vars(choice).items() if value != getattr(config.runtime, name)}
