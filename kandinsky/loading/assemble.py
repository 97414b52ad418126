"""From a config to a working pipeline: each step in its order, over one record of what was settled before the first.

What is offloaded stays on the meta device and gets its weights when its stage begins, from memory-mapped files.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path

import torch
from torch import Tensor

from kandinsky.attention.block_sparse import resolve_block_sparse
from kandinsky.attention.engines import resolve_engine
from kandinsky.checkpoints.diffusers_layout import tell_shift
from kandinsky.checkpoints.files import (
    missing_weights_message,
    part_folder,
    resolve_path,
)
from kandinsky.checkpoints.lora_file import configured_loras
from kandinsky.config.reading import with_settings
from kandinsky.config.rules import check_processes
from kandinsky.config.schema import Config
from kandinsky.loading.device_map import DeviceMap, parse_device_map
from kandinsky.loading.devices import dtype_name, machine_memory, resolve_dtype
from kandinsky.loading.dit import dit_parts, load_dit, load_dit_on_host, load_sharded_dit, reread, scheme_of
from kandinsky.loading.text import load_prompt_side, no_text_encoders
from kandinsky.loading.vae import load_vae
from kandinsky.loading.weights import host_weights
from kandinsky.models.dit import DiffusionTransformer3D, Execution
from kandinsky.outputs.preview import load_latent_rgb
from kandinsky.pipelines.base import Pipeline
from kandinsky.pipelines.image_to_image import ImageToImagePipeline
from kandinsky.pipelines.image_to_video import ImageToVideoPipeline
from kandinsky.pipelines.parts import Placement
from kandinsky.pipelines.text_to_image import TextToImagePipeline
from kandinsky.pipelines.text_to_video import TextToVideoPipeline
from kandinsky.planning.costs import num_evaluations
from kandinsky.planning.plan import resolve_runtime
from kandinsky.request import Request
from kandinsky.runtime.compile import is_wanted, keep_compiled_code, model_evaluations, with_compiled_blocks
from kandinsky.runtime.lora import Adapters
from kandinsky.runtime.magcache import cache_for_request
from kandinsky.runtime.offload import Offloaded, OffloadPlacement, Part, TextEncodersOnDemand
from kandinsky.runtime.parallel import FirstProcessEncodes, Team
from kandinsky.runtime.placement import FixedPlacement
from kandinsky.runtime.processes import Processes
from kandinsky.runtime.quantization import require_scheme
from kandinsky.text.embeddings import PromptEncoder
from kandinsky.text.expansion import PromptExpander

PIPELINES: dict[str, type[Pipeline]] = {
    "t2v": TextToVideoPipeline,
    "i2v": ImageToVideoPipeline,
    "t2i": TextToImagePipeline,
    "i2i": ImageToImagePipeline,
}


def load_pipeline(
    config: Config,
    device_map: DeviceMap = None,
    cache_dir: str | Path = "./weights/",
    *,
    dit_path: str | Path | None = None,
    text_encoder_path: str | Path | None = None,
    text_encoder2_path: str | Path | None = None,
    vae_path: str | Path | None = None,
    attention_engine: str | None = None,
    dtype: str | torch.dtype | None = None,
    request: Request | None = None,
    read_text_encoders: bool = True,
    processes: Processes | None = None,
) -> Pipeline:
    """The pipeline of a config's task. Arguments and errors are those of `get_T2V_pipeline`.

    request: what it is loaded for, if that is known: settings that are left open are decided so that this fits, and so
        that its number of evaluations is worth it.
    read_text_encoders: False for `Pipeline.resume`, which needs none.
    """
    check_processes(config, processes.size if processes else 1)
    devices = parse_device_map(device_map, processes.local_rank if processes else 0)
    if processes and devices["dit"].type == "cuda" and devices["dit"].index != processes.local_rank:
        raise ValueError(f"every process has a GPU of its own, and not all can have {devices['dit']}: give cuda")
    if config.generation.noise_device == "cuda" and not torch.cuda.is_available():
        raise ValueError("generation.noise_device is cuda, and this machine has none: set generation.noise_device=cpu")
    model, encoders = config.model, config.model.text_embedder
    resolved_dtype = resolve_dtype(dtype, devices["dit"])
    if config.runtime.qwen_quantization:
        require_scheme("nf4")

    locate = functools.partial(locate_weights, config=config, cache_dir=cache_dir)
    dit_path = locate("dit", dit_path, model.checkpoint_path)
    tell_shift(dit_path, config)
    vae_path = locate("vae", vae_path, model.vae.checkpoint_path)
    qwen_path = locate("text_encoder", text_encoder_path, encoders.qwen.checkpoint_path)
    clip_path = locate("text_encoder2", text_encoder2_path, encoders.clip.checkpoint_path)
    # Of one output: what a row of a file of prompts comes to does not depend on how many rows there are.
    evaluations = model_evaluations(model) if request is None else num_evaluations(request)
    scheme = config.runtime.dit_quantization or scheme_of(dit_path)
    compiled = processes is None and is_wanted(config.runtime.compile, devices["dit"], evaluations, scheme)
    if compiled:
        keep_compiled_code()
    loras = configured_loras(config, cache_dir)
    files = {"dit": dit_path, "vae": vae_path, "qwen": qwen_path, "clip": clip_path}
    # Whoever spreads the models over devices or processes has a plan.
    if processes is None and len(set(devices.values())) == 1:
        config = resolve_runtime(config, request, machine_memory(devices["dit"]), files, dtype_name(resolved_dtype))

    # What visual self-attention is computed with, dense or block by block.
    execution = Execution(chunk_tokens=config.runtime.chunk_tokens)
    engine = attention_engine or model.attention.engine, devices["dit"], resolved_dtype, model.dit_params.head_dim
    try:
        if model.attention.type == "nabla":
            execution = dataclasses.replace(execution, block_sparse=resolve_block_sparse(*engine))
        else:
            execution = dataclasses.replace(execution, attention=resolve_engine(*engine))
    except RuntimeError as error:  # a kernel that does not compile: the message says what to take instead
        raise ValueError(str(error)) from error

    offload = config.runtime.offload == "on"  # "auto" is off
    resident = config.runtime.blocks_on_gpu
    if resident is not None and resident >= model.dit_params.num_visual_blocks:
        resident = None  # all of them: nothing streams

    team = connect(processes, config, devices["dit"]) if processes else None
    is_first = team is None or team.is_first
    is_sharded = team is not None and config.runtime.shard_weights and team.sequence.size > 1

    # The DiT first: its header says at once whether it is the variant that the config means. What gets its weights
    # later is only checked now.
    parts: dict[str, list[Part]] = {}
    quantization = config.runtime.dit_quantization
    originals = reread(dit_path)
    on_host: dict[str, Tensor] | None = None
    if team is not None and is_sharded:
        dit = load_sharded_dit(dit_path, model.dit_params, devices["dit"], resolved_dtype, team)
    elif not offload and resident is None:
        dit = load_dit(dit_path, model.dit_params, devices["dit"], resolved_dtype, quantization)
    else:
        dit, on_host = load_dit_on_host(dit_path, model.dit_params, resolved_dtype, quantization)
    if compiled:
        required, mode = config.runtime.compile == "on", config.runtime.compile_mode
        execution = with_compiled_blocks(execution, required=required, mode=mode)
    vae = load_vae(vae_path, devices["vae"], resolved_dtype, model.vae.name, read=not offload)
    if team is not None and team.sequence.size > 1:
        execution = dataclasses.replace(execution, around=team.sequence.around)

    expander: PromptExpander | None = None
    text_embedder: PromptEncoder = TextEncodersOnDemand(no_text_encoders)
    if read_text_encoders and is_first:
        text_embedder, expander, parts["text_embedder"] = load_prompt_side(
            config, qwen_path, clip_path, devices["text_embedder"], resolved_dtype
        )
    if read_text_encoders and processes is not None:
        text_embedder = FirstProcessEncodes(text_embedder if is_first else None, processes, devices["text_embedder"])

    adapters = None
    if not is_sharded:
        adapters = Adapters(dit, model.dit_params, originals, devices["dit"])
        for name, (file, _) in loras.items():
            adapters.add(name, file)
        parts["dit"] = [adapters]
        if on_host is not None:  # last, because it may read a model of 77 GB
            parts["dit"], hand_out = dit_parts(dit, on_host, resident, devices["dit"], adapters)
            execution = dataclasses.replace(execution, hand_out=hand_out)
    placement: Placement
    if offload:
        parts["vae"] = [Offloaded(vae, host_weights(vae_path), devices["vae"])]
        placement = OffloadPlacement(devices, parts)
    else:
        for part in itertools.chain(*parts.values()):
            part.begin()  # and stay
        placement = FixedPlacement(devices)
    if adapters is not None:
        adapters.activate({name: scale for name, (_, scale) in loras.items()})
    make_cache = functools.partial(cache_for_request, config.magcache) if config.magcache.enabled else None
    latent_rgb = None if config.runtime.preview is None else load_latent_rgb(vae_path, model.vae.name)
    return PIPELINES[config.task](
        config,
        dit,
        text_embedder,
        vae,
        placement,
        execution=execution,
        make_cache=make_cache,
        team=team,
        latent_rgb=latent_rgb,
        expander=expander,
        adapters=adapters,
    )


def connect(processes: Processes, config: Config, device: torch.device) -> Team:
    """The processes as a group that works together as the config says, once they all are here."""
    processes.connect(device)
    return Team(processes, config.runtime.cfg_parallel, device.type)


def load_for_decoding(
    config: Config,
    device_map: DeviceMap = None,
    cache_dir: str | Path = "./weights/",
    *,
    vae_path: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    processes: Processes | None = None,
) -> Pipeline:
    """A pipeline of which the VAE alone has weights, for `Pipeline.finish`. Errors are those of `load_pipeline`."""
    devices = parse_device_map(device_map, processes.local_rank if processes else 0)
    vae_path = locate_weights("vae", vae_path, config.model.vae.checkpoint_path, config, cache_dir)
    with torch.device("meta"):
        dit = DiffusionTransformer3D(**dataclasses.asdict(config.model.dit_params))
    vae = load_vae(vae_path, devices["vae"], resolve_dtype(dtype, devices["vae"]), config.model.vae.name)
    encoders, placement = TextEncodersOnDemand(no_text_encoders), FixedPlacement(devices)
    team = connect(processes, with_settings(config, runtime={"cfg_parallel": 1}), devices["vae"]) if processes else None
    return PIPELINES[config.task](config, dit, encoders, vae, placement, team=team)


def locate_weights(
    part: str, given: str | Path | None, from_config: str, config: Config, cache_dir: str | Path
) -> Path:
    """Where a part of the model is on this machine: at the path that was given, or else at the config's.

    Of a whole repository (see `checkpoints.FOLDERS`) it is the part's folder. Raises ValueError where there is none.
    """
    path = Path(given) if given is not None else resolve_path(from_config, config, cache_dir)
    if not path.exists():
        raise ValueError(missing_weights_message(path, config))
    return part_folder(path, part)
