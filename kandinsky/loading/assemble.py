"""From a config to a working pipeline: each step in its order, over one record of what was settled before the first.

What is offloaded stays on the meta device and gets its weights when its stage begins, from memory-mapped files.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kandinsky.attention.block_sparse import resolve_block_sparse
from kandinsky.attention.engines import APPROXIMATE, resolve_engine
from kandinsky.checkpoints.diffusers_layout import tell_shift
from kandinsky.checkpoints.files import (
    TINY_DECODERS,
    missing_weights_message,
    part_folder,
    resolve_path,
    tiny_decoder_path,
)
from kandinsky.checkpoints.gguf_file import is_gguf, require_gguf
from kandinsky.checkpoints.headers import read_header, why_absent
from kandinsky.checkpoints.lora_file import LoraFile, configured_loras
from kandinsky.checkpoints.tiny_decoder import KINDS, tiny_layout
from kandinsky.config import reading
from kandinsky.config.reading import with_settings
from kandinsky.config.rules import check_processes
from kandinsky.config.schema import Config
from kandinsky.loading.device_map import DeviceMap, parse_device_map
from kandinsky.loading.devices import dtype_name, machine_memory, machine_of_all, resolve_dtype
from kandinsky.loading.dit import dit_parts, load_dit, load_dit_on_host, load_sharded_dit, reread, scheme_of
from kandinsky.loading.text import load_prompt_side, no_text_encoders
from kandinsky.loading.vae import load_tiny_decoder, load_vae
from kandinsky.loading.weights import host_weights
from kandinsky.models.dit import DiffusionTransformer3D, Execution, HandOut
from kandinsky.models.vae_flux import AutoencoderKL
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
from kandinsky.models.vae_tiny import TinyDecoder
from kandinsky.outputs.post import check_upscaler
from kandinsky.outputs.preview import load_latent_rgb
from kandinsky.pipelines.base import Pipeline
from kandinsky.pipelines.image_to_image import ImageToImagePipeline
from kandinsky.pipelines.image_to_video import ImageToVideoPipeline
from kandinsky.pipelines.parts import Parts, Placement
from kandinsky.pipelines.text_to_image import TextToImagePipeline
from kandinsky.pipelines.text_to_video import TextToVideoPipeline
from kandinsky.planning.adapters import adapter_files
from kandinsky.planning.costs import num_evaluations
from kandinsky.planning.frugal import more_frugal
from kandinsky.planning.machine import Machine
from kandinsky.planning.plan import default_request, models_in, resolve_runtime
from kandinsky.request import Request
from kandinsky.runtime.block_parts import with_blocks_in_parts
from kandinsky.runtime.caches import cache_maker
from kandinsky.runtime.compile import (
    is_wanted,
    keep_compiled_code,
    model_evaluations,
    with_compiled_blocks,
    with_compiled_elementwise,
)
from kandinsky.runtime.lora import Adapters
from kandinsky.runtime.offload import Offloaded, OffloadPlacement, Part, TextEncodersOnDemand
from kandinsky.runtime.parallel import DistributedTeam, FirstProcessEncodes
from kandinsky.runtime.placement import FixedPlacement
from kandinsky.runtime.processes import Processes
from kandinsky.runtime.quantization import LINEARS, require_scheme
from kandinsky.text.embeddings import PromptEncoder
from kandinsky.text.expansion import PromptExpander

logger = logging.getLogger(__name__)

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
    evaluations: int | None = None,
    read_text_encoders: bool = True,
    processes: Processes | None = None,
) -> Pipeline:
    """The pipeline of a config's task. Arguments and errors are those of `get_T2V_pipeline`.

    request: what it is loaded for, if that is known: settings that are left open are decided so that this fits, and so
        that its number of evaluations is worth it; evaluations: of more requests than this one, that of all.
    read_text_encoders: False for `Pipeline.resume`, which needs none.
    """
    given = {"dit": dit_path, "vae": vae_path, "qwen": text_encoder_path, "clip": text_encoder2_path}
    settled = settle(config, device_map, cache_dir, given, dtype, request, evaluations, processes)
    attention = chosen_attention(settled, attention_engine)
    team = None if processes is None else team_of(processes, settled.config, settled.devices["dit"])
    return put_together(settled, attention, team, read_text_encoders)


def put_together(
    settled: Settled,
    attention: Execution,
    team: DistributedTeam | None,
    read_text_encoders: bool = True,
    before: Parts | None = None,
) -> Pipeline:
    """`load_pipeline` where all is decided. before: a pipeline whose adapters it gets, in place of the config's."""
    config, devices = settled.config, settled.devices

    # The DiT first: its header says at once whether it is the variant that the config means. What gets its weights
    # later is only checked now.
    originals = reread(settled.paths["dit"])
    dit, on_host = load_transformer(settled, team)
    vae = load_vae(settled.paths["vae"], devices["vae"], settled.dtype, config.model.vae.name, read=not settled.offload)
    text_embedder, expander, text_parts = load_prompts(settled, team, read_text_encoders)

    adapters: Adapters | None = None
    transformer_parts: list[Part] = []
    hand_out: HandOut = iter
    if not settled.is_sharded_over(team):
        adapters = Adapters(dit, config.model.dit_params, originals, devices["dit"])
        if before is not None and isinstance(before.adapters, Adapters):
            adapters.take_over(before.adapters)
        else:
            for name, (file, _) in settled.loras.items():
                adapters.add(name, file)
        transformer_parts = [adapters]
        if on_host is not None:  # last, because it may read a model of 77 GB
            from_file = config.runtime.blocks_from == "file"
            transformer_parts, hand_out = dit_parts(dit, on_host, settled.resident, devices["dit"], adapters, from_file)
    execution = dataclasses.replace(attention, chunk_tokens=config.runtime.chunk_tokens, hand_out=hand_out)
    if team is not None and team.sequence.size > 1:
        sequence = team.sequence.for_graphs() if settled.compiles_blocks else team.sequence
        execution = dataclasses.replace(execution, around=sequence.around)
    if (heads := config.runtime.heads_at_once) is not None:  # whole blocks are what is compiled
        execution = with_blocks_in_parts(execution, heads, config.runtime.attention_on_host)
    elif settled.compiles_blocks:
        required, mode = config.runtime.compile == "on", config.runtime.compile_mode
        execution = with_compiled_blocks(execution, required=required, mode=mode)
    if settled.compiled and not settled.compiles_blocks:
        execution = with_compiled_elementwise(execution)

    placement = place(settled, vae, {"text_embedder": text_parts, "dit": transformer_parts})
    if adapters is not None:
        scales = {name: scale for name, (_, scale) in settled.loras.items()}
        adapters.activate(scales if before is None else {one["name"]: one["scale"] for one in before.active_adapters()})
    return PIPELINES[config.task](
        config,
        dit,
        text_embedder,
        vae,
        placement,
        execution=execution,
        make_cache=cache_maker(config) if team is None else cache_maker(config, team.all_in_sequence),
        team=team,
        latent_rgb=load_latent_rgb(settled.paths["vae"], config.model.vae.name) if config.runtime.preview else None,
        tiny_decoder=None if before else load_tiny(config, settled.paths.get("tiny"), devices["vae"], settled.dtype),
        expander=expander,
        adapters=adapters,
        frugality=None if adapters is None else FrugalLoading(settled, attention, team, read_text_encoders),
    )


def with_magcache(pipeline: Pipeline, wanted: bool) -> Pipeline:
    """The same models, with MagCache or without. Raises ValueError where the config has no ratios for it."""
    if wanted == pipeline.config.uses_magcache:
        return pipeline
    tuned = pipeline.under(reading.with_magcache(pipeline.config, wanted))
    tuned.make_cache = cache_maker(tuned.config, pipeline.team.all_in_sequence)
    return tuned


@dataclass(frozen=True)
class Settled:
    """What is decided before any weights are read."""

    config: Config  # of `runtime` nothing is open that makes a difference
    devices: dict[str, torch.device]
    dtype: torch.dtype
    paths: dict[str, Path]  # of "dit", "vae", "qwen", "clip", of "tiny" where there is a tiny decoder, and of adapters
    loras: Mapping[str, tuple[LoraFile, float]]  # files and scales
    compiled: bool  # whole blocks, or what `runtime.compile` names
    machine: Machine  # of several processes, what all of them have

    @property
    def offload(self) -> bool:
        return self.config.runtime.offload == "on"  # "auto" is off

    @property
    def compiles_blocks(self) -> bool:
        return self.compiled and self.config.runtime.compile != "elementwise"

    @property
    def resident(self) -> int | None:
        """How many visual blocks stay on the device where others stream; None: nothing streams."""
        blocks = self.config.runtime.blocks_on_gpu
        return None if blocks is None or blocks >= self.config.model.dit_params.num_visual_blocks else blocks

    def is_sharded_over(self, team: DistributedTeam | None) -> bool:
        return team is not None and self.config.runtime.shard_weights and team.sequence.size > 1


@dataclass(frozen=True)
class FrugalLoading:
    """A `Frugality`: the pipeline that was put together of the same is so again, with what the plan says takes less.

    Not with weights in shards, which processes could not put together anew before the old ones are gone.
    """

    settled: Settled
    attention: Execution
    team: DistributedTeam | None
    read_text_encoders: bool

    def settings(self, config: Config, request: Request | None, stage: str, on_host: bool) -> dict[str, Any]:
        machine = self.settled.machine
        models = models_in(dtype_name(self.settled.dtype), config, self.settled.paths, machine)
        return more_frugal(config, request or default_request(config), machine, models, stage, on_host)

    def load(self, config: Config, before: Parts) -> Pipeline:
        settled = dataclasses.replace(self.settled, config=config)
        return put_together(settled, self.attention, self.team, self.read_text_encoders, before)


def settle(
    config: Config,
    device_map: DeviceMap,
    cache_dir: str | Path,
    given: Mapping[str, str | Path | None],
    dtype: str | torch.dtype | None,
    request: Request | None,
    evaluations: int | None,
    processes: Processes | None,
) -> Settled:
    """Devices, dtype, files, and the settings that were left open. Raises ValueError for what can't be had here.

    given: paths in place of the config's.
    """
    check_processes(config, processes.size if processes else 1)
    devices = parse_device_map(device_map, processes.local_rank if processes else 0)
    if processes and devices["dit"].type == "cuda" and devices["dit"].index != processes.local_rank:
        raise ValueError(f"every process has a GPU of its own, and not all can have {devices['dit']}: give cuda")
    if config.generation.noise_device == "cuda" and not torch.cuda.is_available():
        raise ValueError("generation.noise_device is cuda, and this machine has none: set generation.noise_device=cpu")
    resolved_dtype = resolve_dtype(dtype, devices["dit"])
    if config.runtime.qwen_quantization:
        require_scheme("nf4", devices["text_embedder"])
    if processes and devices["dit"].type not in ("cpu", "cuda"):
        raise ValueError(f"several processes share CUDA devices or CPUs, not {devices['dit']}: start one process")

    model, encoders = config.model, config.model.text_embedder
    paths = {
        name: locate_weights(part, given[name], stored, config, cache_dir)
        for name, part, stored in (
            ("dit", "dit", model.checkpoint_path),
            ("vae", "vae", model.vae.checkpoint_path),
            ("qwen", "text_encoder", encoders.qwen.checkpoint_path),
            ("clip", "text_encoder2", encoders.clip.checkpoint_path),
        )
    }
    if (tiny := checked_tiny_path(config, cache_dir)) is not None:
        paths["tiny"] = tiny
    tell_shift(paths["dit"], config)
    if evaluations is None:
        evaluations = model_evaluations(model) if request is None else num_evaluations(request) * len(request.samples)
    for path in filter(is_gguf, (paths["dit"], paths["qwen"])):
        require_gguf(path)
    scheme = config.runtime.dit_quantization or scheme_of(paths["dit"])
    if scheme in LINEARS:
        require_scheme(scheme, devices["dit"])
    compiled = is_wanted(config.runtime.compile, devices["dit"], evaluations, scheme)
    # By itself: asked for it is refused (config/rules.py). What lies between products needs none of the weights.
    if compiled and config.runtime.shard_weights and config.runtime.compile != "elementwise":
        compiled = False
        logger.info("not compiled: each process has a part of the weights, and a block asks for the others' as it runs")
    if compiled:
        keep_compiled_code()
    loras = configured_loras(config, cache_dir)
    paths |= adapter_files(config, cache_dir)
    check_upscaler(config.runtime.upscaler)
    machine = machine_memory(devices["dit"])
    if processes is not None:
        processes.connect(devices["dit"])
        machine = machine_of_all(machine, processes)
    # Whoever spreads the models over devices has a plan.
    if len(set(devices.values())) == 1:
        config = resolve_runtime(config, request, machine, paths, dtype_name(resolved_dtype))
    return Settled(config, devices, resolved_dtype, paths, loras, compiled, machine)


def checked_tiny_path(config: Config, cache_dir: str | Path) -> Path | None:
    """`tiny_decoder_path`, its file's header looked at. Raises ValueError for a file that is missing, or is none."""
    path, name = tiny_decoder_path(config, cache_dir), config.model.vae.name
    if path is None:
        return None
    if not path.is_file():
        raise ValueError(
            f"{path}: {why_absent(path, 'file')}, and the tiny decoder is to decode. Get it with: python "
            f"download_models.py --models {TINY_DECODERS[name]}, or leave out --vae tiny"
        )
    tiny_layout(read_header(path), KINDS[name], path)
    return path


def load_tiny(config: Config, path: Path | None, device: torch.device, dtype: torch.dtype) -> TinyDecoder | None:
    """The tiny decoder at `path`. It stays on its device: it is small, and previews want it between two steps."""
    return None if path is None else load_tiny_decoder(path, device, dtype, config.model.vae.name)


def chosen_attention(settled: Settled, name: str | None) -> Execution:
    """What visual self-attention is computed with, dense or block by block. Raises ValueError where it can't run."""
    model = settled.config.model
    engine = name or model.attention.engine, settled.devices["dit"], settled.dtype, model.dit_params.head_dim
    try:
        if model.attention.type == "nabla":
            execution = Execution(block_sparse=resolve_block_sparse(*engine))
        else:
            execution = Execution(attention=resolve_engine(*engine))
        if not model.attention.is_ever_exact:
            return execution
        exact_anyway = model.attention.type == "full" and engine[0] not in APPROXIMATE
        if exact_anyway:
            logger.warning(
                "model.attention.exact_steps and exact_blocks change nothing: attention is exact everywhere, as it is "
                "neither of type nabla nor computed by %s",
                " or ".join(APPROXIMATE),
            )
        exact = execution.attention if exact_anyway else resolve_engine("auto", *engine[1:])
        return dataclasses.replace(execution, exact=exact)
    except RuntimeError as error:  # a kernel that does not compile: the message says what to take instead
        raise ValueError(str(error)) from error


def load_transformer(
    settled: Settled, team: DistributedTeam | None
) -> tuple[DiffusionTransformer3D, dict[str, torch.Tensor] | None]:
    """The DiT on its device, whole or this process's shards; or on the meta device, with its weights on the host."""
    params, runtime = settled.config.model.dit_params, settled.config.runtime
    path, device = settled.paths["dit"], settled.devices["dit"]
    if team is not None and settled.is_sharded_over(team):
        return load_sharded_dit(path, params, device, settled.dtype, team), None
    if not settled.offload and settled.resident is None:
        return load_dit(path, params, device, settled.dtype, runtime.dit_quantization), None
    return load_dit_on_host(path, params, device, settled.dtype, runtime.dit_quantization)


def load_prompts(
    settled: Settled, team: DistributedTeam | None, wanted: bool
) -> tuple[PromptEncoder, PromptExpander | None, list[Part]]:
    """`load_prompt_side`, of several processes in the first one alone; nothing where it is not wanted."""
    nobody: tuple[PromptEncoder, None, list[Part]] = (TextEncodersOnDemand(no_text_encoders), None, [])
    if not wanted:
        return nobody
    device, is_first = settled.devices["text_embedder"], team is None or team.is_first
    side: tuple[PromptEncoder, PromptExpander | None, list[Part]] = nobody
    if is_first:
        side = load_prompt_side(settled.config, settled.paths["qwen"], settled.paths["clip"], device, settled.dtype)
    if team is None:
        return side
    return FirstProcessEncodes(side[0] if is_first else None, team.processes, device), *side[1:]


def place(
    settled: Settled, vae: AutoencoderKLHunyuanVideo | AutoencoderKL, parts: Mapping[str, Sequence[Part]]
) -> Placement:
    """Models on their devices: for the length of their stages, or from now on."""
    if settled.offload:
        offloaded = Offloaded(vae, host_weights(settled.paths["vae"]), settled.devices["vae"])
        return OffloadPlacement(settled.devices, {**parts, "vae": [offloaded]})
    for part in itertools.chain(*parts.values()):
        part.begin()  # and stay
    return FixedPlacement(settled.devices)


def team_of(processes: Processes, config: Config, device: torch.device) -> DistributedTeam:
    """Connected processes as a group that works together as the config says."""
    branches = config.runtime.cfg_parallel
    is_sharded = config.runtime.shard_weights and processes.size > branches
    return DistributedTeam(processes, branches, device.type, meets=not is_sharded)


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
    resolved_dtype = resolve_dtype(dtype, devices["vae"])
    tiny = load_tiny(config, checked_tiny_path(config, cache_dir), devices["vae"], resolved_dtype)
    vae = load_vae(vae_path, devices["vae"], resolved_dtype, config.model.vae.name)
    encoders, placement = TextEncodersOnDemand(no_text_encoders), FixedPlacement(devices)
    team = None
    if processes:
        processes.connect(devices["vae"])
        team = team_of(processes, with_settings(config, runtime={"cfg_parallel": 1}), devices["vae"])
    return PIPELINES[config.task](config, dit, encoders, vae, placement, team=team, tiny_decoder=tiny)


def locate_weights(
    part: str, given: str | Path | None, from_config: str, config: Config, cache_dir: str | Path
) -> Path:
    """Where a part of the model is on this machine: at the path that was given, or else at the config's.

    Of a whole repository (see `FOLDERS` in checkpoints/files.py) it is the part's folder. Raises ValueError where there
    is none.
    """
    path = Path(given) if given is not None else resolve_path(from_config, config, cache_dir)
    if not path.exists():
        raise ValueError(missing_weights_message(path, config))
    return part_folder(path, part)
