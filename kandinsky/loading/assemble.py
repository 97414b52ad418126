"""From a config to a working pipeline: the one place that knows files, devices, dtypes and components at once.

Models are built on the meta device and take over tensors that are read one at a time from memory-mapped safetensors
files, cast on the way: no second copy of the weights ever exists, but of float32 tensors that a CPU computes with (see
`aligned`). What a file is, is read from its header before anything is allocated. What is offloaded stays on the meta
device and gets its weights when its stage begins, from the same memory-mapped files.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn

from kandinsky.attention.block_sparse import resolve_block_sparse
from kandinsky.attention.engines import resolve_engine
from kandinsky.checkpoints.diffusers_layout import tell_shift
from kandinsky.checkpoints.dit_layout import (
    COMFY_PREFIX,
    check_dit_header,
    check_floats,
    quantization_from_header,
    strip_prefix,
)
from kandinsky.checkpoints.files import (
    REPOSITORY,
    find_weights,
    folder_of,
    missing_weights_message,
    part_folder,
    resolve_path,
)
from kandinsky.checkpoints.headers import open_tensors, read_header
from kandinsky.checkpoints.lora_file import configured_loras
from kandinsky.common.given import shown
from kandinsky.common.host_memory import host_memory
from kandinsky.common.untrusted import read_json
from kandinsky.config import Config, DiTConfig, check_processes, load_config, preset_file, with_settings
from kandinsky.models.dit import DiffusionTransformer3D, Execution
from kandinsky.models.numerics import aligned
from kandinsky.models.vae_flux import AutoencoderKL
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
from kandinsky.outputs.preview import load_latent_rgb
from kandinsky.pipelines.base import Pipeline, Placement
from kandinsky.pipelines.image_to_image import ImageToImagePipeline
from kandinsky.pipelines.image_to_video import ImageToVideoPipeline
from kandinsky.pipelines.text_to_image import TextToImagePipeline
from kandinsky.pipelines.text_to_video import TextToVideoPipeline
from kandinsky.planning.plan import CUDA_CONTEXT, Machine, num_evaluations, resolve_runtime
from kandinsky.request import Request
from kandinsky.runtime.block_swap import BlockSwap
from kandinsky.runtime.compile import is_wanted, keep_compiled_code, model_evaluations, with_compiled_blocks
from kandinsky.runtime.lora import Adapters
from kandinsky.runtime.magcache import cache_for_request
from kandinsky.runtime.offload import Offloaded, OffloadPlacement, Part, TextEncodersOnDemand, take_weights
from kandinsky.runtime.parallel import FirstProcessEncodes, Team
from kandinsky.runtime.placement import DeviceMap, FixedPlacement, parse_device_map
from kandinsky.runtime.processes import Processes
from kandinsky.runtime.prompt_cache import PromptCache, default_folder, fingerprint
from kandinsky.runtime.quantization import Convert, quantize_dit, quantize_qwen, require_scheme
from kandinsky.runtime.sharding import load_shards, shard
from kandinsky.text.embedder import TextEmbedder
from kandinsky.text.embeddings import PromptEncoder
from kandinsky.text.encoder_files import load_text_embedder, text_encoder_files
from kandinsky.text.expansion import PromptExpander
from kandinsky.text.generator import TextGenerator, can_generate, load_text_generator

logger = logging.getLogger(__name__)


DEFAULT_CONFIGS = {
    "t2v": REPOSITORY / "configs" / "config_5s_sft.yaml",
    "i2v": REPOSITORY / "configs" / "config_5s_i2v.yaml",
    "t2i": REPOSITORY / "configs" / "config_t2i.yaml",
    "i2i": REPOSITORY / "configs" / "config_i2i.yaml",
}
PIPELINES: dict[str, type[Pipeline]] = {
    "t2v": TextToVideoPipeline,
    "i2v": ImageToVideoPipeline,
    "t2i": TextToImagePipeline,
    "i2i": ImageToImagePipeline,
}
AnyPipeline = TypeVar("AnyPipeline", bound=Pipeline)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# These compute in float32 whatever the model's dtype, so they keep the precision that their file has.
KEEP_PRECISION = ("time_embeddings.", "modulation.")


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


def load_prompt_side(
    config: Config, qwen_path: Path, clip_path: Path, device: torch.device, dtype: torch.dtype
) -> tuple[PromptEncoder, PromptExpander | None, list[Part]]:
    """What makes embeddings of prompts, what writes prompts out (None: it can't), and what comes and goes with a stage.

    Raises ValueError for what is wrong with files or tokenizers, also where the encoders are loaded later.
    """
    load_encoders = functools.partial(load_text_encoders, config, qwen_path, clip_path, dtype=dtype)
    encoders: PromptEncoder
    parts: list[Part] = []
    if config.runtime.offload == "on" or config.runtime.cache_prompts:
        load_encoders(device="meta")
        encoders = on_demand = TextEncodersOnDemand(lambda: load_encoders(device=device))
        parts = [on_demand]
    else:
        encoders = load_encoders(device=device)
    wanted, is_possible = config.generation.expand_prompts, can_generate(qwen_path)
    if wanted and not is_possible:
        raise ValueError(f"generation.expand_prompts is on, but {qwen_path} has no lm_head: it reads and can't write")
    expander = None
    if wanted is not False and is_possible:
        expander = prompt_expander(encoders, config, qwen_path, device, dtype)
    return cache_prompts(encoders, config, qwen_path, clip_path, device, dtype), expander, parts


def connect(processes: Processes, config: Config, device: torch.device) -> Team:
    """The processes as a group that works together as the config says, once they all are here."""
    processes.connect(device)
    return Team(processes, config.runtime.cfg_parallel, device.type)


def no_text_encoders() -> TextEmbedder:
    """Stands where a pipeline was loaded for what comes after the text."""
    raise RuntimeError("this pipeline was loaded without text encoders")


def device_of_rank(local_rank: int) -> str:
    """Where the process of that number on this machine runs: on the GPU of that number, or the CPU without GPUs."""
    return f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"


def spread_over(gpus: int) -> dict[str, str]:
    """A device map for one pipeline on that many GPUs: the DiT has the first to itself, the others share what is left.

    Raises ValueError for numbers that can't be.
    """
    if not 1 <= gpus <= 3:
        raise ValueError(f"a pipeline on {gpus} GPUs: it has three models, so give 1 to 3")
    others = [f"cuda:{min(i, gpus - 1)}" for i in range(3)]
    return {"dit": others[0], "vae": others[1], "text_embedder": others[2]}


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


def _getter(task: str, pipeline: type[AnyPipeline]) -> Callable[..., AnyPipeline]:
    """`get_T2V_pipeline` and its three siblings: one signature, one docstring."""

    def get_pipeline(
        device_map: DeviceMap = None,
        cache_dir: str | Path = "./weights/",
        dit_path: str | Path | None = None,
        text_encoder_path: str | Path | None = None,
        text_encoder2_path: str | Path | None = None,
        vae_path: str | Path | None = None,
        conf_path: str | Path | None = None,
        offload: bool = False,
        magcache: bool = False,
        quantized_qwen: bool = False,
        text_token_padding: bool = True,
        attention_engine: str | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        overrides: Sequence[str] = (),
        device_preset: str | None = None,
        config: Config | None = None,
        processes: Processes | None = None,
        resolution: int | None = None,
        **runtime: Any,
    ) -> AnyPipeline:
        """Load a pipeline.

        Args:
            device_map: one device for all, {"dit": ..., "vae": ..., "text_embedder": ...}, or None: a GPU where there
                is one, else the CPU.
            cache_dir: the folder that `./weights/` in a config stands for.
            dit_path, text_encoder_path, text_encoder2_path, vae_path: instead of the config's paths: a file, a folder,
                or a whole repository in diffusers' layout, of which the part is taken.
            conf_path: the YAML; None takes the task's first one (see `DEFAULT_CONFIGS`).
            offload, magcache, quantized_qwen: True switches on what the YAML calls runtime.offload, magcache.enabled
                and runtime.qwen_quantization.
            text_token_padding: padding never reaches the model here, which is exact; accepted for compatibility.
            attention_engine: instead of the config's `model.attention.engine`.
            dtype: "bfloat16", "float32" or "float16"; None takes bfloat16 on a GPU and float32 on a CPU.
            overrides: "key.key=value" over the YAML and the preset.
            device_preset: a file of configs/devices/, over the YAML: "8gb" to "80gb", or "cpu".
            config: an already loaded config instead of `conf_path`, `device_preset` and `overrides`.
            processes: those that make one output together, from `Processes.join`, each of which calls this with the
                same arguments. Without a device_map each takes the GPU of its number on its machine.
            resolution: what the original's examples name; it has to be the config's `metrics.resolution`.
            runtime: any key of the YAML's section `runtime`, such as compile="off" or blocks_on_gpu=8.

        Raises:
            ValueError: a file is missing, damaged or of another variant, an argument is wrong, or what the config makes
                does not fit this machine; before weights are read.
        """
        presets = [] if device_preset is None else [preset_file(device_preset)]
        config = config or load_config(conf_path or DEFAULT_CONFIGS[task], overrides, presets)
        wishes = {**runtime, **({"offload": True} if offload else {})}
        wishes |= {"qwen_quantization": True} if quantized_qwen else {}
        config = with_settings(config, runtime=wishes, magcache={"enabled": True} if magcache else {})
        if config.task != task:
            raise ValueError(
                f"{config.source} is a config for {config.task}: load it with get_{config.task.upper()}_pipeline"
            )
        if resolution is not None and resolution != config.metrics.resolution:
            ours = config.metrics.resolution
            raise ValueError(f"resolution is {shown(resolution)}, and {config.source} is for {ours}: leave it out")
        loaded = load_pipeline(
            config,
            device_map,
            cache_dir,
            dit_path=dit_path,
            text_encoder_path=text_encoder_path,
            text_encoder2_path=text_encoder2_path,
            vae_path=vae_path,
            attention_engine=attention_engine,
            dtype=dtype,
            processes=processes,
        )
        assert isinstance(loaded, pipeline)
        return loaded

    get_pipeline.__name__ = get_pipeline.__qualname__ = f"get_{task.upper()}_pipeline"
    return get_pipeline


get_T2V_pipeline = _getter("t2v", TextToVideoPipeline)
get_I2V_pipeline = _getter("i2v", ImageToVideoPipeline)
get_T2I_pipeline = _getter("t2i", TextToImagePipeline)
get_I2I_pipeline = _getter("i2i", ImageToImagePipeline)


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype to compute in. Raises ValueError for one that models can't run in."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    name = dtype_name(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def convolves_in_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a VAE of this dtype is to convolve in float32, because this CPU has no arithmetic for it.

    Without, oneDNN leaves such convolutions to PyTorch's fallbacks, which for a video take a hundred times as long and
    three times the memory.
    """
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if device.type != "cpu" or asked is None:
        return False
    return not (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, asked)())


def dtype_name(dtype: str | torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16 and its other spellings."""
    return str(dtype).removeprefix("torch.")


def machine_memory(device: torch.device) -> Machine:
    """What there is to fit into: the host's memory, and what is free on the GPU if `device` is one.

    Free is also what PyTorch keeps without using it: of a pipeline that is gone, in a notebook that loads another.
    """
    if device.type == "cpu":
        slow = tuple(name for name, dtype in DTYPES.items() if convolves_in_float32(dtype, device))
        return Machine(host_memory(), float32_convolutions=slow)
    free, total = torch.cuda.mem_get_info(device)  # makes the context, if there was none
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Machine(host_memory(), min(free + CUDA_CONTEXT, total))


def load_dit(
    path: str | Path,
    params: DiTConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    quantization: str | None = None,
) -> DiffusionTransformer3D:
    """The DiT from a safetensors file or folder. Raises ValueError for damaged files and for other variants' files.

    quantization: "int8", "fp8" or "nf4", which weights are brought to as they are read. None leaves them as they are in
        the file, which may be quantised itself; a file that is quantised otherwise is a ValueError.
    """
    files = find_weights(path)
    header = {name: entry for file in files for name, entry in read_header(file).items()}
    try:
        check_dit_header(header, params)
        with torch.device("meta"):
            dit = DiffusionTransformer3D(**dataclasses.asdict(params))
        convert = quantize_dit(dit, strip_prefix(header), quantization)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

    def dtype_of(name: str, tensor: Tensor) -> torch.dtype:
        return tensor.dtype if any(part in name for part in KEEP_PRECISION) else dtype

    load_weights(dit, files, device, dtype_of, COMFY_PREFIX, convert)
    return dit


def load_sharded_dit(
    path: str | Path, params: DiTConfig, device: torch.device, dtype: torch.dtype, team: Team
) -> DiffusionTransformer3D:
    """A DiT of which each process of a sequence has a part of the weights. Errors are those of `load_dit`."""
    files = find_weights(path)
    header = {name: entry for file in files for name, entry in read_header(file).items()}
    try:
        check_dit_header(header, params)
        if quantization_from_header(strip_prefix(header)) is not None:
            raise ValueError("runtime.shard_weights = true takes checkpoints that are not quantised: leave it out")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    with torch.device("meta"):
        dit = DiffusionTransformer3D(**dataclasses.asdict(params))
    mesh = team.mesh["sequence"]
    shard(dit, mesh)

    def dtype_of(name: str, tensor: Tensor) -> torch.dtype:
        return tensor.dtype if any(part in name for part in KEEP_PRECISION) else dtype

    load_shards(dit, files, mesh, device, dtype_of, COMFY_PREFIX)
    return dit


def load_dit_on_host(
    path: Path, params: DiTConfig, dtype: torch.dtype, quantization: str | None
) -> tuple[DiffusionTransformer3D, dict[str, Tensor]]:
    """A DiT on the meta device, and its weights by name on the host. Arguments and errors are those of `load_dit`.

    The weights stay in their files, but for those that are quantised as they are read: these lie in memory.
    """
    if quantization is None and scheme_of(path) is None:
        return load_dit(path, params, "meta", dtype), host_weights(path, COMFY_PREFIX)
    dit = load_dit(path, params, "cpu", dtype, quantization)
    return dit, take_weights(dit)


def scheme_of(path: Path) -> str | None:
    """How the weights of a DiT's checkpoint are quantised; None: they are not."""
    header = {name: entry for file in find_weights(path) for name, entry in read_header(file).items()}
    return quantization_from_header(strip_prefix(header))


def dit_parts(
    dit: DiffusionTransformer3D,
    weights: dict[str, Tensor],
    resident: int | None,
    device: torch.device,
    adapters: Adapters,
) -> tuple[list[Part], Callable[[nn.ModuleList], Iterable[nn.Module]]]:
    """What brings a DiT on the meta device to its device, with only `resident` of its visual blocks (None: all); and
    what hands out its visual blocks.

    `weights` are its tensors on the host by name. Those of blocks that stream are taken out.
    """
    if resident is None:
        return [Offloaded(dit, weights, device, adapters.merge), adapters], iter
    adapters.swap = swap = BlockSwap(
        dit.visual_transformer_blocks, weights, "visual_transformer_blocks.", resident, device
    )
    blocks = len(dit.visual_transformer_blocks)
    logger.info("%d of %d visual blocks stream from %.1f GB of host memory", len(swap.streamed), blocks, swap.host_gb)
    return [Offloaded(dit, weights, device, adapters.merge), swap, adapters], swap


def reread(path: Path) -> Callable[[], dict[str, Tensor]]:
    """What gives a DiT checkpoint's tensors a second time, as `host_weights` does, opened when it is first called.

    It raises ValueError where the checkpoint is gone by then, or not the same any more.
    """
    before = fingerprint(find_weights(path))

    @functools.cache
    def read() -> dict[str, Tensor]:
        try:
            same = fingerprint(find_weights(path)) == before
        except (ValueError, OSError):
            same = False
        if not same:
            raise ValueError(
                f"{path} has changed since it was loaded, and adapters need it again: load the pipeline anew"
            )
        return host_weights(path, COMFY_PREFIX)

    return read


def load_vae(
    path: str | Path, device: torch.device | str, dtype: torch.dtype, name: str = "hunyuan", read: bool = True
) -> AutoencoderKLHunyuanVideo | AutoencoderKL:
    """A VAE from a folder, or a file with config.json beside it: the video VAE ("hunyuan") or the image one ("flux").

    read: False leaves the weights in the checked file and the VAE on the meta device, made for `device` in all else.

    Raises ValueError for damaged files and for the other VAE's.
    """
    path = Path(path)
    files = find_weights(path)
    for file in files:
        check_floats(file, read_header(file))
    model = AutoencoderKL if name == "flux" else AutoencoderKLHunyuanVideo
    with torch.device("meta"):
        vae: AutoencoderKLHunyuanVideo | AutoencoderKL = model(
            **known_arguments(model, folder_of(path) / "config.json")
        )
    load_weights(vae, files, device if read else "meta", lambda name, tensor: dtype)
    # The layout that convolutions are fastest in: measured on CPUs, by cuDNN's documentation on GPUs with tensor cores.
    memory_format = torch.channels_last if name == "flux" else torch.channels_last_3d
    vae.to(memory_format=memory_format)  # type: ignore[call-overload]
    if isinstance(vae, AutoencoderKLHunyuanVideo) and torch.device(device).type == "cpu":
        vae.convolve_by_frame()  # CPUs have fast kernels for 2-D convolutions only, GPUs for both
    vae.convolve_in_float32(convolves_in_float32(dtype, torch.device(device)))
    return vae


def load_text_encoders(
    config: Config, qwen_path: str | Path, clip_path: str | Path, device: torch.device | str, dtype: torch.dtype
) -> TextEmbedder:
    """Both text encoders as the config's task uses them. Errors are those of `load_text_embedder`."""
    encoders = config.model.text_embedder
    quantized = config.runtime.qwen_quantization and torch.device(device).type != "meta"  # there only checked
    return load_text_embedder(
        qwen_path,
        clip_path,
        qwen_max_length=encoders.qwen.max_length,
        clip_max_length=encoders.clip.max_length,
        crop=encoders.qwen.crop,
        device=device,
        dtype=dtype,
        content={"t2i": "image", "i2i": "image_edit"}.get(config.task, "video"),
        vision=config.task == "i2i",  # the only task in which the text encoder sees the picture
        quantize=quantize_qwen if quantized else None,
    )


def prompt_expander(
    embedder: PromptEncoder, config: Config, qwen_path: Path, device: torch.device, dtype: torch.dtype
) -> PromptExpander:
    """Writes prompts out with the embedder's Qwen; keeps what it wrote on disk with `runtime.cache_prompts`."""

    def generator() -> TextGenerator:
        encoders = embedder.loaded() if isinstance(embedder, TextEncodersOnDemand) else embedder
        assert isinstance(encoders, TextEmbedder)
        return load_text_generator(encoders, qwen_path, vision=config.task in ("i2v", "i2i"))

    if not config.runtime.cache_prompts:
        return PromptExpander(generator)
    identity = encoder_identity(config, qwen_path, device, dtype)
    return PromptExpander(generator, identity, default_folder().with_name("captions"))


def encoder_identity(config: Config, qwen_path: Path, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What Qwen's answers depend on besides what it is given."""
    return {
        "files": fingerprint(find_weights(qwen_path)),
        "dtype": str(dtype),
        "quantization": config.runtime.qwen_quantization,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "versions": [torch.__version__, transformers.__version__],
    }


def cache_prompts(
    embedder: PromptEncoder, config: Config, qwen_path: Path, clip_path: Path, device: torch.device, dtype: torch.dtype
) -> PromptCache:
    """The embedder behind a cache on disk, of the default negative prompt or, with `runtime.cache_prompts`, of all."""
    encoders = config.model.text_embedder
    identity = {
        "files": fingerprint(text_encoder_files(qwen_path, clip_path)),
        "limits": [encoders.qwen.max_length, encoders.qwen.crop, encoders.clip.max_length],
        "dtype": str(dtype),
        "quantization": config.runtime.qwen_quantization,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }
    return PromptCache(
        embedder,
        default_folder(),
        identity,
        device,
        always=[config.generation.negative_caption],
        everything=config.runtime.cache_prompts,
        widths=(config.model.dit_params.in_text_dim, config.model.dit_params.in_text_dim2),
    )


def known_arguments(model: Callable[..., Any], config_file: Path) -> dict[str, Any]:
    """The entries of a published config.json that are arguments of `model`; the rest is other software's business."""
    try:
        values = read_json(config_file)
    except ValueError as error:
        raise ValueError(f"{error}; download it again") from None
    return {name: values[name] for name in inspect.signature(model).parameters if name in values}


def load_weights(
    model: nn.Module,
    files: Sequence[Path],
    device: torch.device | str,
    dtype_of: Callable[[str, Tensor], torch.dtype],
    prefix: str = "",
    convert: Convert | None = None,
) -> None:
    """Give a model on the meta device the tensors of `files`, one at a time; ready for inference afterwards.

    dtype_of(name, tensor) says what a tensor is cast to; `prefix` is dropped from names that have it; `convert` makes
    tensors into quantised ones. Raises ValueError where names or shapes are not exactly the model's.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in read_tensors(files):
        name = name.removeprefix(prefix)
        try:
            parts = convert(name, tensor.to(device)) if convert else {}
        except ValueError as error:
            raise ValueError(f"{files[0]}: {error}") from None
        state |= parts or {name: aligned(tensor.to(device=device, dtype=dtype_of(name, tensor)))}
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = [name for name in {*expected, *state} if name not in state or expected.get(name) != state[name].shape]
    if wrong:
        raise ValueError(
            f"{files[0]}: {len(wrong)} tensors are missing, unknown or of another shape, like {sorted(wrong)[0]}: "
            "this is another model's file, or its config is"
        )
    model.load_state_dict(state, strict=True, assign=True)
    model.eval().requires_grad_(False)


def host_weights(path: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of a file or folder by name, without `prefix`: memory-mapped, so nothing is read yet."""
    return {name.removeprefix(prefix): tensor for name, tensor in read_tensors(find_weights(path))}


def read_tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of safetensors files, memory-mapped. Raises ValueError for damaged files, naming them."""
    for file in files:
        with open_tensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is not a mapping)
                yield name, tensors.get_tensor(name)
