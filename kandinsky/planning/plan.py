"""What a request will take on a machine, and the settings with which it fits, before anything is loaded.

`make_plan` goes through the stages of a request (encode, denoise, decode, write), adds up what each takes by the
formulas of weights.py and activations.py, and takes the fastest of its choices (choices.py) that fits: everything on
the device; each model there only while its stage runs; Qwen's layers and visual blocks streamed from the host, or from
their files; blocks in chunks of tokens and parts of their heads. None of these changes more than rounding. What does is
never chosen: smaller tiles of the VAE and quantised weights are named in the plan, for a person to ask for. Where
nothing fits, `Plan.refusal` says why, and what the nearest is that would.

GB are 2^30 bytes here, as memory is sold. Knows numbers only: no torch, and not which device there is.
"""

from __future__ import annotations

import dataclasses
import logging
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from math import floor, prod
from pathlib import Path
from typing import Any

from kandinsky.checkpoints.files import part_folder, resolve_path, tiny_decoder_path
from kandinsky.config.reading import with_settings
from kandinsky.config.schema import Config, VAEConfig
from kandinsky.models.vae_memory import GB
from kandinsky.planning.adapters import adapter_files
from kandinsky.planning.choices import Choice, cost, families
from kandinsky.planning.costs import Rates, costs, rates_of, tiles_of, unexpanded
from kandinsky.planning.machine import GPU_SLACK, Machine
from kandinsky.planning.stages import Stage, decoding_of, estimate, tile_size
from kandinsky.planning.weights import Models, Weights
from kandinsky.planning.weights import models as models_of_files
from kandinsky.planning.words import gb_text, yaml_text
from kandinsky.request import FPS, Request, resolve_request

logger = logging.getLogger(__name__)

BUDGET_STEP = 0.25  # GB, to which a budget for the VAE is rounded down
ELEMENT_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
# What makes the model smaller and its results a little different, from the mildest on.
QUANTIZATIONS: tuple[dict[str, Any], ...] = (
    {"qwen_quantization": True},
    {"dit_quantization": "int8"},
    {"qwen_quantization": True, "dit_quantization": "int8"},
    {"qwen_quantization": True, "dit_quantization": "nf4"},
)


@dataclass(frozen=True)
class Plan:
    config: Config  # with what `Choice` has of `runtime` settled
    request: Request
    machine: Machine
    stages: tuple[Stage, ...]
    reason: str  # why these settings
    costs: tuple[str, ...]  # what they cost in time
    overrides: tuple[str, ...]  # "key=value" that it also takes to fit, and that change pixels
    refusal: str | None = None  # why it cannot fit, and what can
    models: Models = field(kw_only=True, repr=False)  # what its files' headers say
    unexpanded: str | None = None  # that prompts are not written out, and what that would take

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen, all of it without effect on the results; None where it is as usual."""
        runtime, usual = self.config.runtime, {"stream_encoders": "off", "blocks_from": "memory"}
        values = {name: getattr(runtime, name) for name in (each.name for each in fields(Choice))}
        return {name: None if value in (False, "auto", usual.get(name)) else value for name, value in values.items()}


def weight_files(config: Config, cache_dir: str | Path = "./weights/") -> dict[str, Path]:
    """Where the files of "dit", "vae", "qwen" and "clip" would be, of "tiny" where a tiny decoder is used, and of
    adapters."""
    model = config.model
    paths = {
        "dit": ("dit", model.checkpoint_path),
        "vae": ("vae", model.vae.checkpoint_path),
        "qwen": ("text_encoder", model.text_embedder.qwen.checkpoint_path),
        "clip": ("text_encoder2", model.text_embedder.clip.checkpoint_path),
    }
    found = {name: part_folder(resolve_path(path, config, cache_dir), part) for name, (part, path) in paths.items()}
    tiny = tiny_decoder_path(config, cache_dir)
    return {**found, **({} if tiny is None else {"tiny": tiny}), **adapter_files(config, cache_dir)}


def default_request(config: Config) -> Request:
    """A request for what the config makes when it is asked for nothing else."""
    size = (config.generation.width, config.generation.height)
    return resolve_request(config, "a prompt", image_sizes=[size] if config.task in ("i2v", "i2i") else [], seed=0)


def resolve_runtime(
    config: Config, request: Request | None, machine: Machine, files: Mapping[str, Path], dtype: str
) -> Config:
    """The config with what `Choice` has of `runtime` decided, where it was left open.

    They are decided for `request`, or for the config's default sizes where it is None. No choice changes a result.
    Raises ValueError where no choice makes it fit, unless runtime.offload was set: then the most frugal one is taken.
    """
    plan = make_plan(config, request or default_request(config), machine, files, dtype)
    if plan.refusal is not None:
        if config.runtime.offload == "auto":
            raise ValueError(f"{plan.refusal}. To try it all the same: runtime.offload=on")
        logger.warning("%s", plan.refusal)
    chosen = ", ".join(f"{name} {yaml_text(value)}" for name, value in plan.settings.items() if value is not None)
    is_news = machine.gpu_memory is not None or plan.config.runtime.offload == "on"
    logger.log(logging.INFO if is_news else logging.DEBUG, "%s: %s", chosen, plan.reason)
    if plan.unexpanded is not None:
        logger.info("%s", plan.unexpanded)
    if plan.overrides and plan.refusal is None:
        logger.warning("decoding may run out of memory and start again with smaller tiles: %s", plan.overrides[0])
    return plan.config


def make_plan(config: Config, request: Request, machine: Machine, files: Mapping[str, Path], dtype: str) -> Plan:
    """The plan for a request; `files` as from `weight_files`, `dtype` a name like "bfloat16".

    Raises ValueError for files that are damaged, for a dtype that there isn't, and for a budget that is too small.
    """
    plan = _first_that_fits(config, request, machine, models_in(dtype, config, files, machine))
    if plan.refusal is None:
        return plan
    return dataclasses.replace(plan, refusal=f"{plan.refusal}. {nearest(config, request, machine, files, dtype)}")


def plan_decoding(config: Config, request: Request, machine: Machine, files: Mapping[str, Path], dtype: str) -> Plan:
    """The plan for finishing a request whose latents are there: only the VAE is loaded. Errors are `make_plan`'s."""
    runtime = dataclasses.replace(type(config.runtime)(), offload="off")
    settled, none = dataclasses.replace(config, runtime=runtime), Weights(0, 0, 0)
    models = models_in(dtype, settled, {name: files[name] for name in ("vae", "tiny") if name in files}, machine)
    models = dataclasses.replace(models, qwen=none, writer=None, clip=none, dit=none, dit_block=0)
    planned = _with_vae_budget(settled, request, machine, models)
    stages = tuple(s for s in estimate(planned, request, machine, models) if s.name in ("decode", "write"))
    refusal = "; ".join(_too_much(stage, machine) for stage in stages if excess(stage, machine) > 1)
    return Plan(
        config=settled,
        request=request,
        machine=machine,
        stages=stages,
        reason="only the VAE is loaded",
        costs=(f"decode: {tiles_of(planned, request, models)}",),
        overrides=_new_budget(planned, config),
        models=models,
        refusal=f"{refusal}. The latents can be decoded on another machine: all it takes is in their file"
        if refusal
        else None,
    )


def models_in(dtype: str, config: Config, files: Mapping[str, Path], machine: Machine) -> Models:
    """`weights.models` in a dtype, as this machine computes in it. Raises ValueError for a dtype that there isn't."""
    models = models_of_files(config, files, element_size(dtype))
    return dataclasses.replace(models, float32_convolutions=dtype in machine.float32_convolutions)


def element_size(dtype: str) -> int:
    """Bytes of a number. Raises ValueError for a dtype that there isn't."""
    if dtype not in ELEMENT_SIZES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(ELEMENT_SIZES)}")
    return ELEMENT_SIZES[dtype]


def _new_budget(planned: Config, config: Config) -> tuple[str, ...]:
    """The override that a plan takes beyond a config."""
    budget = planned.model.vae.memory_budget_gb
    return () if budget == config.model.vae.memory_budget_gb else (f"model.vae.memory_budget_gb={budget:g}",)


def _first_that_fits(config: Config, request: Request, machine: Machine, models: Models) -> Plan:
    """Of what fits the fastest; where nothing does, what is the least too much, and why that is."""

    @cache
    def alone() -> VAEConfig:
        """The VAE's settings where it is alone on the device: nothing else would help the decoder."""
        offloaded = with_settings(config, runtime={"offload": "on"})
        return _with_vae_budget(offloaded, request, machine, models).model.vae

    @cache
    def settle(choice: Choice) -> Config:
        settled = choice.applied_to(config)
        if config.runtime.offload == "off":
            return _with_vae_budget(settled, request, machine, models)
        if choice.offload == "off":
            return settled
        return dataclasses.replace(settled, model=dataclasses.replace(config.model, vae=alone()))

    @cache
    def stages_of(choice: Choice) -> tuple[Stage, ...]:
        return estimate(settle(choice), request, machine, models)

    all_families = list(families(config, models, machine))
    chosen = _fastest(all_families, rates_of(config, request, machine, models), stages_of, machine)
    too_large: list[Stage] = []
    if chosen is None:
        ends = [dataclasses.replace(f, blocks_on_gpu=counts[-1]) if counts else f for f, counts in all_families]

        def missing(choice: Choice) -> tuple[int, float]:
            too_much = [excess(stage, machine) for stage in stages_of(choice) if excess(stage, machine) > 1]
            return len(too_much), sum(too_much)

        chosen = min(ends, key=missing)
        too_large = [stage for stage in stages_of(chosen) if excess(stage, machine) > 1]

    settled = settle(chosen)
    # Why not all at once, and then why not one model at a time: what was the most too much.
    reasons = []
    for family, counts in all_families[: 0 if chosen == all_families[0][0] else 2]:
        worst = max(stages_of(family), key=lambda stage: excess(stage, machine))
        if not counts and excess(worst, machine) > 1:
            reasons.append(f"{'with' if family.offload == 'on' else 'without'} offload {_too_much(worst, machine)}")

    return Plan(
        config=dataclasses.replace(settled, model=config.model),
        request=request,
        machine=machine,
        stages=estimate(settled, request, machine, models),
        reason="; ".join(reasons)
        or ("of all that may be chosen it takes the least" if too_large else "everything fits"),
        costs=(*costs(settled, request, machine, models), f"decode: {tiles_of(settled, request, models)}"),
        overrides=_new_budget(settled, config),
        models=models,
        refusal="; ".join(_too_much(stage, machine) for stage in too_large) or None,
        unexpanded=unexpanded(settled, request, machine, models),
    )


def _fastest(
    all_families: Sequence[tuple[Choice, range]],
    rates: Rates,
    stages_of: Callable[[Choice], tuple[Stage, ...]],
    machine: Machine,
) -> Choice | None:
    """Of what fits, what costs the least; None where nothing fits."""

    def fits(choice: Choice, on_gpu: bool = False) -> bool:
        """On the GPU, or at all."""
        return all((excess_on_gpu if on_gpu else excess)(stage, machine) <= 1 for stage in stages_of(choice))

    most_frugal, counts = all_families[-1]
    if not fits(dataclasses.replace(most_frugal, blocks_on_gpu=0) if counts else most_frugal, on_gpu=True):
        return None
    best: tuple[tuple[bool, float, int], Choice] | None = None
    for family, counts in all_families:

        def candidate(index: int, family: Choice = family, counts: range = counts) -> Choice:
            return dataclasses.replace(family, blocks_on_gpu=counts[index]) if counts else family

        # The fewer blocks stay, the less it takes of the GPU and the more of the host: of all counts, the largest that
        # the GPU has room for is the one. None of them is faster than the first.
        if best is not None and cost(candidate(0), rates) >= best[0]:
            continue
        places = range(len(counts) or 1)
        index = bisect_left(places, True, key=lambda index: fits(candidate(index), on_gpu=True))
        if index < len(places) and fits(candidate(index)):
            found = cost(candidate(index), rates), candidate(index)
            best = found if best is None or found[0] < best[0] else best
    return None if best is None else best[1]


def excess(stage: Stage, machine: Machine) -> float:
    """How much of the machine a stage takes, of the GPU or of the host's memory; it fits up to 1."""
    return max(excess_on_gpu(stage, machine), stage.host / machine.host_memory)


def excess_on_gpu(stage: Stage, machine: Machine) -> float:
    return 0.0 if machine.gpu_memory is None else stage.gpu / machine.gpu_memory


def _too_much(stage: Stage, machine: Machine) -> str:
    if machine.gpu_memory is None:
        takes, there_are = f"{gb_text(stage.host)} GB of host memory", gb_text(machine.host_memory)
    else:
        weights, host = gb_text(stage.weights), gb_text(stage.host)
        takes = f"{gb_text(stage.gpu)} GB on the GPU ({weights} of it weights) and {host} on the host"
        there_are = f"{gb_text(machine.gpu_memory)} and {gb_text(machine.host_memory)}"
    return f"{stage.name} takes {takes}, and there are {there_are}"


def nearest(config: Config, request: Request, machine: Machine, files: Mapping[str, Path], dtype: str) -> str:
    """What would fit instead, in words: the same with weights in fewer bits; smaller; shorter."""
    lighter: list[tuple[str, Config, Models]] = []
    as_stored = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, dit_quantization=None))
    in_file = models_in(dtype, as_stored, files, machine).dit_quantization
    can_write = models_in(dtype, config, files, machine).writer is not None
    for runtime in ({}, *QUANTIZATIONS):
        if in_file is not None and "dit_quantization" in runtime:  # what is quantised already stays so
            continue
        flags = [f"--{name}" if value is True else f"--{name} {value}" for name, value in runtime.items()]
        for generation in ({}, {"expand_prompts": False}) if can_write else ({},):
            try:
                changed = with_settings(config, runtime=runtime, generation=generation)
            except ValueError:  # it does not go with what else is set, and so is no advice
                continue
            of_changed = models_in(dtype, changed, files, machine)
            lighter.append((" ".join(flags + ["--expand_prompt off"] * bool(generation)), changed, of_changed))
    if dtype == "float32":
        lighter.insert(1, ("--dtype bfloat16", config, models_in("bfloat16", config, files, machine)))

    area, seconds = request.width * request.height, range((request.num_frames - 2) // FPS, 0, -1)
    sizes = sorted((size for size in config.generation.resolutions if prod(size) < area), key=prod, reverse=True)
    wishes: tuple[list[tuple[str, Request]], ...] = (
        [("", request)],
        [(f"--width {w} --height {h}", dataclasses.replace(request, width=w, height=h)) for w, h in sizes],
        [(f"--video_duration {s}", dataclasses.replace(request, num_frames=s * FPS + 1)) for s in seconds],
    )
    found: list[str] = []
    for wish in wishes:
        for i, (words, changed, models) in enumerate(lighter):
            fitting = (w for w, other in wish if _first_that_fits(changed, other, machine, models).refusal is None)
            hit = next(fitting, None)
            if hit is not None:
                found.append(f"{hit} {words}".strip())
                if not hit:  # less of a picture is for those who want to change the weights less
                    lighter = lighter[:i]
                break
    return f"What fits: {', or '.join(found)}" if found else "Nothing that this model makes fits"


def _with_vae_budget(config: Config, request: Request, machine: Machine, models: Models) -> Config:
    """With tiles of the VAE for which decoding fits, where it does not and there are such."""
    decode = next(stage for stage in estimate(config, request, machine, models) if stage.name == "decode")
    if config.model.vae.decoder == "tiny":  # which has no tiles
        return config
    if excess(decode, machine) <= 1:
        return config
    pixels = decoding_of(config, request, models).peak_bytes(tile_size(config, request, models))
    spare = machine.host_memory - decode.host
    if machine.gpu_memory is not None:
        spare = (machine.gpu_memory - decode.gpu) / (1 + GPU_SLACK)
    budget = floor((pixels + spare) / GB / BUDGET_STEP) * BUDGET_STEP
    vae = dataclasses.replace(config.model.vae, memory_budget_gb=budget)
    smaller = dataclasses.replace(config, model=dataclasses.replace(config.model, vae=vae))
    try:
        tile_size(smaller, request, models)
    except ValueError:  # not even the smallest
        return config
    return smaller
