"""What a request will take on a machine, and the settings with which it fits, before anything is loaded.

`make_plan` goes through the stages of a request (encode, denoise, decode, write), adds up what each takes by the
formulas of memory.py, and takes the first of its choices that fits, from the fastest to the slowest: everything on the
device; each model there only while its stage runs; visual blocks streamed from the host; tokens in chunks. None of
these changes a pixel. What does is never chosen: smaller tiles of the VAE and quantised weights are named in the plan,
for a person to ask for. Where nothing fits, `Plan.refusal` says why, and what the nearest is that would.

GB are 2^30 bytes here, as memory is sold. Knows numbers only: no torch, and not which device there is.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil, floor, prod
from pathlib import Path
from typing import Any

from kandinsky.checkpoints.files import part_folder, resolve_path
from kandinsky.config import Config, with_settings
from kandinsky.models.vae_memory import GB, RGB, Decoding
from kandinsky.planning import memory
from kandinsky.planning.memory import Models, Weights
from kandinsky.request import FPS, Request, resolve_request

logger = logging.getLogger(__name__)


# Assumed, not measured.
CUDA_CONTEXT = int(0.5 * GB)
GPU_SLACK = 0.1  # share of the activations that PyTorch's allocator and the kernels take on a GPU besides them
HOST_OF_GPU_RUN = int(3 * GB)  # of the process besides weights: Python, torch, CUDA's libraries
# Measured: what is resident with everything imported.
HOST_OF_CPU_RUN = int(0.4 * GB)

STREAM_BUFFERS = 2  # see runtime/block_swap.py
CHUNK_TOKENS = 8192
TEMPLATE_TOKENS = 129  # of the video template, the longest
EXPANSION_TOKENS = 1024  # of the instruction to write a prompt out, with the answer
PIXELS_PER_TOKEN = 28**2  # of a picture that Qwen sees
EDIT_TOKENS = 1024  # of a prompt with its picture, at most
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
class Machine:
    """What there is to fit into, in bytes, and how fast it is taken to be, a second."""

    host_memory: float
    gpu_memory: float | None = None  # None: everything runs on the CPU
    link: float = 22e9  # bytes from pinned memory to the GPU: PCIe 4 with 16 lanes
    files: float = 3e9  # bytes from memory-mapped files
    flops: float = 100e12  # bfloat16, of a fast consumer card
    float32_convolutions: tuple[str, ...] = ()  # dtypes in whose place this CPU's VAE convolves in float32

    @property
    def words(self) -> str:
        host = f"{self.host_memory / GB:.1f} GB of host memory"
        return host if self.gpu_memory is None else f"{self.gpu_memory / GB:.1f} GB on the GPU, {host}"


@dataclass(frozen=True)
class Stage:
    """Bytes that a stage takes: of weights and besides them on the device that computes, and at its peak in all."""

    name: str
    weights: int
    activations: int
    gpu: int  # 0 where there is none
    host: int
    mapped: int  # besides `host`, of weight files: what may be resident of them until the system needs the room


@dataclass(frozen=True)
class Plan:
    config: Config  # with runtime.offload, blocks_on_gpu and chunk_tokens settled
    request: Request
    machine: Machine
    stages: tuple[Stage, ...]
    reason: str  # why these settings
    costs: tuple[str, ...]  # what they cost in time
    overrides: tuple[str, ...]  # "key=value" that it also takes to fit, and that change pixels
    refusal: str | None = None  # why it cannot fit, and what can

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen, all of it without effect on the results."""
        runtime = self.config.runtime
        return {name: getattr(runtime, name) for name in ("offload", "blocks_on_gpu", "chunk_tokens")}


def weight_files(config: Config, cache_dir: str | Path = "./weights/") -> dict[str, Path]:
    """Where the files of "dit", "vae", "qwen" and "clip" would be."""
    model = config.model
    paths = {
        "dit": ("dit", model.checkpoint_path),
        "vae": ("vae", model.vae.checkpoint_path),
        "qwen": ("text_encoder", model.text_embedder.qwen.checkpoint_path),
        "clip": ("text_encoder2", model.text_embedder.clip.checkpoint_path),
    }
    return {name: part_folder(resolve_path(path, config, cache_dir), part) for name, (part, path) in paths.items()}


def default_request(config: Config) -> Request:
    """A request for what the config makes when it is asked for nothing else."""
    size = (config.generation.width, config.generation.height)
    return resolve_request(config, "a prompt", image_sizes=[size] if config.task in ("i2v", "i2i") else [], seed=0)


def resolve_runtime(
    config: Config, request: Request | None, machine: Machine, files: Mapping[str, Path], dtype: str
) -> Config:
    """The config with runtime.offload, blocks_on_gpu and chunk_tokens decided, where they were left open.

    They are decided for `request`, or for the config's default sizes where it is None. No choice changes a result.
    Raises ValueError where no choice makes it fit, unless runtime.offload was set: then the most frugal one is taken.
    """
    plan = make_plan(config, request or default_request(config), machine, files, dtype)
    if plan.refusal is not None:
        if config.runtime.offload == "auto":
            raise ValueError(f"{plan.refusal}. To try it all the same: runtime.offload=on")
        logger.warning("%s", plan.refusal)
    chosen = ", ".join(f"{name} {_yaml(value)}" for name, value in plan.settings.items() if value is not None)
    is_news = machine.gpu_memory is not None or plan.config.runtime.offload == "on"
    logger.log(logging.INFO if is_news else logging.DEBUG, "%s: %s", chosen, plan.reason)
    if plan.overrides and plan.refusal is None:
        logger.warning("decoding may run out of memory and start again with smaller tiles: %s", plan.overrides[0])
    return plan.config


# --- the choice -------------------------------------------------------------------------------------------------------


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
    models = models_in(dtype, settled, {"vae": files["vae"]}, machine)
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
        refusal=f"{refusal}. The latents can be decoded on another machine: all it takes is in their file"
        if refusal
        else None,
    )


def models_in(dtype: str, config: Config, files: Mapping[str, Path], machine: Machine) -> Models:
    """`memory.models` in a dtype, as this machine computes in it. Raises ValueError for a dtype that there isn't."""
    models = memory.models(config, files, element_size(dtype))
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
    tried: list[tuple[Config, tuple[Stage, ...], list[Stage]]] = []  # settings, what they come to, what is too much
    for settled in choices(config, models, machine):
        if settled.runtime.offload == "on" or config.runtime.offload == "off":  # nothing else would help the decoder
            settled = _with_vae_budget(settled, request, machine, models)
        stages = estimate(settled, request, machine, models)
        tried.append((settled, stages, [stage for stage in stages if excess(stage, machine) > 1]))
        if not tried[-1][2]:
            break

    settled, stages, too_large = min(
        tried, key=lambda one: (len(one[2]), sum(excess(stage, machine) for stage in one[2]))
    )

    # Why not all at once, and then why not one model at a time: what was the most too much.
    whole = [one for one in tried if one[2] and one[0].runtime.blocks_on_gpu == config.runtime.blocks_on_gpu]
    reasons = [
        f"{'with' if other.runtime.offload == 'on' else 'without'} offload "
        + _too_much(max(stages, key=lambda stage: excess(stage, machine)), machine)
        for other, _, stages in whole[:2]
    ]

    return Plan(
        config=dataclasses.replace(settled, model=config.model),
        request=request,
        machine=machine,
        stages=stages,
        reason="; ".join(reasons) or "everything fits",
        costs=(*costs(settled, request, machine, models), f"decode: {tiles_of(settled, request, models)}"),
        overrides=_new_budget(settled, config),
        refusal="; ".join(_too_much(stage, machine) for stage in too_large) or None,
    )


def choices(config: Config, models: Models, machine: Machine) -> Iterator[Config]:
    """Configs with nothing left open, the fastest first. What somebody has set stays as it is."""
    runtime = config.runtime

    def settled(**settings: Any) -> Config:
        return dataclasses.replace(config, runtime=dataclasses.replace(runtime, **settings))

    offloads = ("off", "on") if runtime.offload == "auto" else (runtime.offload,)
    for chunk in (None, CHUNK_TOKENS) if runtime.chunk_tokens is None else (runtime.chunk_tokens,):
        for offload in offloads:
            yield settled(offload=offload, chunk_tokens=chunk)
        if runtime.blocks_on_gpu is None and machine.gpu_memory is not None:
            for blocks in range(models.dit_blocks - STREAM_BUFFERS - 1, 0, -1):  # of more the buffers eat the gain
                yield settled(offload=offloads[-1], chunk_tokens=chunk, blocks_on_gpu=blocks)


def excess(stage: Stage, machine: Machine) -> float:
    """How much of the machine a stage takes, of the GPU or of the host's memory; it fits up to 1."""
    on_gpu = 0.0 if machine.gpu_memory is None else stage.gpu / machine.gpu_memory
    return max(on_gpu, stage.host / machine.host_memory)


def _too_much(stage: Stage, machine: Machine) -> str:
    if machine.gpu_memory is None:
        takes, there_are = f"{_gb(stage.host)} GB of host memory", _gb(machine.host_memory)
    else:
        takes = f"{_gb(stage.gpu)} GB on the GPU ({_gb(stage.weights)} of it weights) and {_gb(stage.host)} on the host"
        there_are = f"{_gb(machine.gpu_memory)} and {_gb(machine.host_memory)}"
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
            changed = with_settings(config, runtime=runtime, generation=generation)
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


# --- the stages -------------------------------------------------------------------------------------------------------


def estimate(config: Config, request: Request, machine: Machine, models: Models) -> tuple[Stage, ...]:
    """What every stage takes with the settings of `config`, where offload is "on" or "off".

    On the host, what counts is what must be there: copies of weights, and on a CPU what is computed with straight from
    the mapped files; blocks that stream, because their memory is pinned; a DiT that was quantised on the way, from
    which it is copied when its stage begins. What else is mapped, `Stage.mapped`, costs nothing but reading it again.

    Text encoders are counted whether or not their embeddings are in a cache. Raises ValueError where the VAE's budget
    is too small for any tile.
    """
    runtime, dit, samples = config.runtime, config.model.dit_params, len(request.samples)
    is_offloaded, on_gpu = runtime.offload == "on", machine.gpu_memory is not None
    resident = min(runtime.blocks_on_gpu or models.dit_blocks, models.dit_blocks)
    streamed = models.dit_blocks - resident
    streamed_bytes = streamed * models.dit_block
    dit_weights = models.dit.size - streamed_bytes + min(STREAM_BUFFERS, streamed) * models.dit_block
    everything = models.text.size + models.vae.size + dit_weights

    # What lies on the host all the time, and what of the files stays mapped without being needed.
    waiting, mapped = streamed_bytes, 0
    if is_offloaded:
        mapped = models.dit.read + models.vae.read
        if models.dit_quantization is not None:
            waiting += int((models.dit.size - models.dit.mapped) * resident / models.dit_blocks)
    elif not on_gpu:
        mapped = models.qwen.left_mapped + models.clip.left_mapped + models.vae.left_mapped
        mapped += 0 if streamed else models.dit.left_mapped

    output = 2 * RGB * samples * request.num_frames * request.width * request.height  # uint8, frames and their stack
    stages: list[Stage] = []

    def add(name: str, weights: int, activations: int, on_host: int = 0, files: int = 0) -> None:
        weights = weights if is_offloaded else everything
        gpu = CUDA_CONTEXT + weights + int((1 + GPU_SLACK) * activations) if on_gpu else 0
        host = HOST_OF_GPU_RUN if on_gpu else HOST_OF_CPU_RUN + weights + activations
        stages.append(Stage(name, weights, activations, gpu, waiting + host + on_host, mapped + files))

    # The text encoders' files are mapped for as long as there are text encoders.
    text_files = models.qwen.left_mapped + models.clip.left_mapped if is_offloaded and not on_gpu else 0
    writer = models.writer if request.expand_prompts is not False else None
    if writer is not None:
        weights = models.text.size + writer.size
        everything += writer.size
        add("expand prompt", weights, _expanding(config, request, models), files=text_files + writer.left_mapped)
        everything -= writer.size
    add("encode text", models.text.size, _encoding(config, request, models), files=text_files)
    if config.task in ("i2v", "i2i"):
        work = memory.FLOAT32 if models.float32_convolutions else models.element_size
        picture = memory.encode_bytes(models.vae_channels, request.width, request.height, models.element_size, work)
        add("encode image", models.vae.size, picture)
    add("denoise", dit_weights, _denoising(config, request, models, machine))
    pixels = _decoding(config, request, models).peak_bytes(tile_size(config, request, models))
    latents = memory.denoising_state(dit, _tokens(config, request), samples)
    add("decode", models.vae.size, pixels + latents, output)
    add("write", 0, 0, output)
    return tuple(stages)


def _decoding(config: Config, request: Request, models: Models) -> Decoding:
    vae, size = config.model.vae, (request.width, request.height, request.num_frames)
    of_vae = (models.vae_channels, models.element_size)
    return Decoding(vae.name, *of_vae, *size, vae.spatial_overlap, models.float32_convolutions)


def tile_size(config: Config, request: Request, models: Models) -> int:
    """The side of the tiles that are decoded, in pixels, as the pipeline will have it.

    Raises ValueError where there is a budget and it is too small for any.
    """
    vae, decoding = config.model.vae, _decoding(config, request, models)
    if vae.memory_budget_gb is None:
        return vae.spatial_tile
    tile = decoding.tile_within(vae.memory_budget_gb * GB, vae.spatial_tile)
    if decoding.peak_bytes(tile) > vae.memory_budget_gb * GB:
        raise ValueError(
            f"model.vae.memory_budget_gb is {vae.memory_budget_gb:g}, but to decode {request.num_frames} frames of "
            f"{request.width}x{request.height} takes {decoding.peak_bytes(tile) / GB:.2f} GB in the smallest tiles "
            f"({tile} pixels): raise it, or ask for something smaller or shorter"
        )
    return tile


def _encoding(config: Config, request: Request, models: Models) -> int:
    """Every prompt is read by itself."""
    return memory.text_activations(
        config.model.text_embedder.qwen.emb_size,
        models.qwen_intermediate,
        TEMPLATE_TOKENS + _text_tokens(config, request),
        models.element_size,
        nf4=config.runtime.qwen_quantization,
    )


def _expanding(config: Config, request: Request, models: Models) -> int:
    """Reading the instruction, which is more than writing takes; what is kept of the tokens is little beside it."""
    share = {"i2v": 1.0, "i2i": 0.25}.get(config.task, 0.0)  # what is edited is shown in half its width and height
    picture = int(share * request.width * request.height / PIXELS_PER_TOKEN)
    return memory.text_activations(
        config.model.text_embedder.qwen.emb_size,
        models.qwen_intermediate,
        EXPANSION_TOKENS + picture,
        models.element_size,
        nf4=config.runtime.qwen_quantization,
    )


def _denoising(config: Config, request: Request, models: Models, machine: Machine) -> int:
    dit, runtime, samples = config.model.dit_params, config.runtime, len(request.samples)
    tokens = _tokens(config, request)
    activations = memory.dit_activations(
        dit,
        tokens,
        _text_tokens(config, request),
        models.element_size,
        nabla=config.model.attention.type == "nabla",
        flex=machine.gpu_memory is not None and config.model.attention.engine != "sdpa",
        on_gpu=machine.gpu_memory is not None,
        chunk_tokens=runtime.chunk_tokens,
        quantization=models.dit_quantization,
    )
    activations += memory.denoising_state(dit, tokens, samples)
    if config.magcache.enabled:
        branches = 1 + (request.guidance_weight != 1)
        activations += memory.magcache_bytes(dit, tokens, samples, branches, models.element_size)
    return activations


def _tokens(config: Config, request: Request) -> int:
    return prod(size // p for size, p in zip(request.latent_size, config.model.dit_params.patch_size, strict=True))


def _text_tokens(config: Config, request: Request) -> int:
    longest = request.max_sequence_length or config.model.text_embedder.qwen.max_length
    return EDIT_TOKENS if config.task == "i2i" else longest


def _with_vae_budget(config: Config, request: Request, machine: Machine, models: Models) -> Config:
    """With tiles of the VAE for which decoding fits, where it does not and there are such."""
    decode = next(stage for stage in estimate(config, request, machine, models) if stage.name == "decode")
    if excess(decode, machine) <= 1:
        return config
    pixels = _decoding(config, request, models).peak_bytes(tile_size(config, request, models))
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


# --- time -------------------------------------------------------------------------------------------------------------


def costs(config: Config, request: Request, machine: Machine, models: Models) -> Iterator[str]:
    """What the settings cost in time, in words, with the rates that it was worked out with."""
    runtime = config.runtime
    if machine.gpu_memory is None:
        if runtime.offload == "on":
            total = models.all.read
            seconds = f"{total / machine.files:.0f} s at {machine.files / 1e9:g} GB/s"
            yield f"offload: {_gb(total)} GB are read again for every request, {seconds}"
        return
    resident = min(runtime.blocks_on_gpu or models.dit_blocks, models.dit_blocks)
    streamed = models.dit_blocks - resident
    if runtime.offload == "on":
        total = models.all.size - streamed * models.dit_block
        yield (
            f"offload: {_gb(total)} GB go to the GPU for every request, {total / machine.files:.0f} s at "
            f"{machine.files / 1e9:g} GB/s from memory-mapped files"
        )
    if streamed:
        copying = streamed * models.dit_block / machine.link
        computing = forward_flops(config, request) / machine.flops
        evaluations = num_evaluations(request)
        rest = max(0.0, copying - computing)
        yield (
            f"streaming {streamed} of {models.dit_blocks} blocks: {_gb(streamed * models.dit_block)} GB for each of "
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
    dit, tokens, text = config.model.dit_params, _tokens(config, request), _text_tokens(config, request)
    density = memory.NABLA_DENSITY if config.model.attention.type == "nabla" else 1
    linear = 2 * tokens * (6 * dit.model_dim**2 + 2 * dit.model_dim * dit.ff_dim) + 4 * text * dit.model_dim**2
    attention = 4 * tokens * dit.model_dim * (density * tokens + text)
    return dit.num_visual_blocks * (linear + attention)


def tiles_of(config: Config, request: Request, models: Models) -> str:
    """The VAE's tiles in words, and how much work their overlaps add."""
    tile = tile_size(config, request, models)
    work = _decoding(config, request, models).work(tile)
    return "in one piece" if work == 1 else f"in tiles of {tile} pixels, {work:.2f} times the work of one piece"


# --- words ------------------------------------------------------------------------------------------------------------


def report(plan: Plan) -> str:
    """The plan as a person reads it: a table of the stages, the settings, and their costs."""
    request, runtime = plan.request, plan.config.runtime
    frames = "1 picture" if request.is_image else f"{request.num_frames} frames"
    source = plan.config.source.name if plan.config.source else plan.config.task
    lines = [
        f"{source}: {frames} of {request.width}x{request.height}, {_tokens(plan.config, request):,} tokens, "
        f"{request.num_steps} steps; {plan.machine.words}; GB of 2^30 bytes",
        "",
        f"{'stage':14}{'weights':>9}{'besides':>9}{'GPU, peak':>11}{'host, peak':>12}",
    ]
    for stage in plan.stages:
        numbers = (stage.weights, stage.activations, stage.gpu, stage.host)
        cells = ["-" if not number else _gb(number) for number in numbers]
        lines.append(f"{stage.name:14}{cells[0]:>9}{cells[1]:>9}{cells[2]:>11}{cells[3]:>12}")
    if mapped := max(stage.mapped for stage in plan.stages):
        lines.append(f"and up to {_gb(mapped)} GB of mapped weight files, which the host drops where it needs the room")
    lines += ["", f"settings: {' '.join(f'runtime.{n}={_yaml(v)}' for n, v in plan.settings.items() if v is not None)}"]
    lines.append(f"  because {plan.reason}")
    lines += [f"  {cost}" for cost in plan.costs]
    if plan.overrides:
        lines.append(f"it also takes, and changes some pixels: {' '.join(plan.overrides)}")
    quantized = [f"{name}={_yaml(value)}" for name, value in vars(runtime).items() if "quantization" in name and value]
    if quantized:
        lines.append(f"as asked for, and changes results: {' '.join(f'runtime.{word}' for word in quantized)}")
    return "\n".join(lines)


def _gb(count: float) -> str:
    return f"{count / GB:.1f}"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
