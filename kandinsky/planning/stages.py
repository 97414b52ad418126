"""What each stage of a request takes, with settings that leave nothing open.

In bytes, by the formulas of weights.py and activations.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from kandinsky.common.limits import STREAM_BUFFERS
from kandinsky.config.schema import Config, RuntimeConfig
from kandinsky.models.vae_memory import GB, RGB, WINDOW_FRAMES, Decoding
from kandinsky.planning.activations import (
    FLOAT32,
    cache_bytes,
    denoising_state,
    dit_activations,
    encode_bytes,
    text_activations,
    tiny_bytes,
)
from kandinsky.planning.machine import CUDA_CONTEXT, GPU_SLACK, HOST_OF_CPU_RUN, HOST_OF_GPU_RUN, Machine
from kandinsky.planning.weights import Models
from kandinsky.request import Request

TEMPLATE_TOKENS = 129  # of the video template, the longest
EXPANSION_TOKENS = 1024  # of the instruction to write a prompt out, with the answer
PIXELS_PER_TOKEN = 28**2  # of a picture that Qwen sees
EDIT_TOKENS = 1024  # of a prompt with its picture, at most
GATHERED_BLOCKS = 2  # of weights in shards: the one that runs, and the next one, or the copy that it is made from
PINNED = 2  # what pinned memory may take: torch rounds it up to powers of two


@dataclass(frozen=True)
class Stage:
    """Bytes that a stage takes: of weights and besides them on the device that computes, and at its peak in all."""

    name: str
    weights: int
    activations: int
    gpu: int  # 0 where there is none
    host: int
    mapped: int  # besides `host`, of weight files: what may be resident of them until the system needs the room


def estimate(config: Config, request: Request, machine: Machine, models: Models) -> tuple[Stage, ...]:
    """What every stage takes with the settings of `config`, where offload is "on" or "off".

    On the host, what counts is what must be there: copies of weights, and on a CPU what is computed with straight from
    the mapped files; blocks that stream, because their memory is pinned; a DiT that was quantised on the way, from
    which it is copied when its stage begins. What else is mapped, `Stage.mapped`, costs nothing but reading it again.

    Of several processes, the device is that of the first one, which has the text encoders besides; the host's memory is
    what all of them take that run on it.

    Text encoders are counted whether or not their embeddings are in a cache. Raises ValueError where the VAE's budget
    is too small for any tile.
    """
    runtime, dit, samples = config.runtime, config.model.dit_params, len(request.samples)
    sequence, is_sharded = shares(config, machine)
    others = machine.on_host - 1
    is_offloaded, on_gpu = runtime.offload == "on", machine.gpu_memory is not None
    resident = resident_blocks(runtime, models)
    streamed = models.dit_blocks - resident
    streamed_bytes = streamed * models.dit_block
    dit_weights = models.dit.size - streamed_bytes + min(STREAM_BUFFERS, streamed) * models.dit_block
    dit_weights += models.adapted.on_device
    gathered = 0
    if is_sharded:  # while it runs also what is in no block, and two blocks, of which one is on its way
        dit_weights //= sequence
        gathered = models.dit_rest + GATHERED_BLOCKS * models.dit_block
    text_weights = models.text.size
    if runtime.stream_encoders == "on":
        text_weights = models.qwen_streamed + models.clip.size
    everything = text_weights + models.vae.size + dit_weights
    of_text = text_weights
    # Pages of a file that a CPU computes with are there once for all processes.
    in_place = 0 if is_offloaded or streamed or is_sharded else models.dit.mapped + models.vae.mapped
    tiny = models.tiny_size  # which stays on its device

    # What lies on the host all the time, and what of the files stays mapped without being needed.
    from_file = runtime.blocks_from == "file"
    waiting, mapped = 0 if from_file else streamed_bytes, 0
    # Adapters are merged into what streams, and into what is on the device for good, from the file read once more; and
    # into what comes to the device for a stage on its way there.
    in_streamed = models.adapted.in_blocks * streamed // models.dit_blocks
    waiting += models.adapted.matrices + (in_streamed if from_file else 0)
    # All of the file is then mapped a second time, and as measured the system reads on beyond what is asked for.
    read_again = models.dit.read if (in_streamed if is_offloaded else models.adapted.merged) else 0
    if is_offloaded:
        mapped = models.dit.read + models.vae.read + read_again
        if models.dit_quantization is not None:
            waiting += int((models.dit.size - models.dit.mapped) * resident / models.dit_blocks)
    elif not on_gpu:
        mapped = models.qwen.left_mapped + models.clip.left_mapped + models.vae.left_mapped
        mapped += 0 if is_sharded or (streamed and not from_file) else models.dit.left_mapped
        mapped += read_again

    output = 2 * RGB * samples * request.num_frames * request.width * request.height  # uint8, frames and their stack
    stages: list[Stage] = []

    def add(name: str, weights: int, activations: int, on_host: int = 0, files: int = 0, text: bool = False) -> None:
        """text: whether it is the first process's alone, as text encoders are."""
        of_others = tiny + (0 if text and is_offloaded else weights if is_offloaded else everything - of_text)
        weights = tiny + (weights if is_offloaded else everything)
        gpu = CUDA_CONTEXT + weights + int((1 + GPU_SLACK) * activations) if on_gpu else 0
        host = HOST_OF_GPU_RUN if on_gpu else HOST_OF_CPU_RUN + weights + activations
        host += waiting + on_host
        if others:
            of_each = (
                HOST_OF_GPU_RUN if on_gpu else HOST_OF_CPU_RUN + of_others - in_place + (0 if text else activations)
            )
            host += others * (of_each + waiting + on_host)
        stages.append(Stage(name, weights, activations, gpu, host, mapped + files))

    # The text encoders' files are mapped for as long as there are text encoders.
    text_files = models.clip.left_mapped if is_offloaded and not on_gpu else 0
    text_files += models.qwen.left_mapped if text_files and runtime.stream_encoders != "on" else 0
    if is_expanding(config, request, models):
        writer = models.writer
        assert writer is not None
        weights = text_weights + writer.size
        everything, of_text = everything + writer.size, of_text + writer.size
        expanding = _expanding(config, request, models)
        add("expand prompt", weights, expanding, files=text_files + writer.left_mapped, text=True)
        everything, of_text = everything - writer.size, text_weights
    add("encode text", text_weights, _encoding(config, request, models), files=text_files, text=True)
    if config.task in ("i2v", "i2i"):
        work = FLOAT32 if models.float32_convolutions else models.element_size
        of_vae = (config.model.vae.name, models.vae_channels)
        picture = encode_bytes(*of_vae, request.width, request.height, models.element_size, work)
        add("encode image", models.vae.size, picture)
    aside = num_tokens(config, request) * dit.model_dim * models.element_size if runtime.attention_on_host else 0
    add("denoise", dit_weights, gathered + _denoising(config, request, models, machine), PINNED * aside)
    latents = denoising_state(dit, num_tokens(config, request), samples)
    if config.model.vae.decoder == "tiny":
        add("decode", 0, _tiny_decoding(request, models) + latents, output)
    else:
        pixels = decoding_of(config, request, models).peak_bytes(tile_size(config, request, models))
        if machine.processes > 1 and _is_divided(config, request, models):  # each has all tiles of one round
            pixels += machine.processes * _tile_pixels(config, request, models) * models.element_size
        add("decode", models.vae.size, pixels + latents, output)
    add("write", 0, 0, output)
    return tuple(stages)


def shares(config: Config, machine: Machine) -> tuple[int, bool]:
    """How many processes share the tokens of one evaluation; and whether they share the DiT's weights, too."""
    sequence = max(1, machine.processes // config.runtime.cfg_parallel)
    return sequence, config.runtime.shard_weights and sequence > 1


def _is_divided(config: Config, request: Request, models: Models) -> bool:
    """Whether decoding is of several tiles or windows, which processes share."""
    tiles = decoding_of(config, request, models).num_tiles(tile_size(config, request, models))
    return tiles > 1 or request.num_frames > WINDOW_FRAMES


def _tile_pixels(config: Config, request: Request, models: Models) -> int:
    """Numbers of a decoded tile, of one window."""
    tile = tile_size(config, request, models)
    return RGB * min(tile, request.width) * min(tile, request.height) * min(request.num_frames, WINDOW_FRAMES)


def resident_blocks(runtime: RuntimeConfig, models: Models) -> int:
    """How many of the DiT's blocks stay on the device."""
    blocks = models.dit_blocks
    return blocks if runtime.blocks_on_gpu is None else min(runtime.blocks_on_gpu, blocks)


def is_expanding(config: Config, request: Request, models: Models) -> bool:
    """Whether Qwen writes the prompts out: where its layers stream only if that was asked for."""
    wanted = request.expand_prompts
    if wanted is None:
        wanted = config.runtime.stream_encoders != "on"
    return wanted and models.writer is not None


def decoding_of(config: Config, request: Request, models: Models) -> Decoding:
    vae, size = config.model.vae, (request.width, request.height, request.num_frames)
    of_vae = (models.vae_channels, models.element_size)
    return Decoding(vae.name, *of_vae, *size, vae.spatial_overlap, models.float32_convolutions)


def tile_size(config: Config, request: Request, models: Models) -> int:
    """The side of the tiles that are decoded, in pixels, as the pipeline will have it.

    Raises ValueError where there is a budget and it is too small for any.
    """
    vae, decoding = config.model.vae, decoding_of(config, request, models)
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


def _tiny_decoding(request: Request, models: Models) -> int:
    if models.tiny is None:
        return 0
    return tiny_bytes(models.tiny, request.width, request.height, models.tiny_element_size)


def _encoding(config: Config, request: Request, models: Models) -> int:
    """Every prompt is read by itself."""
    return text_activations(
        config.model.text_embedder.qwen.emb_size,
        models.qwen_intermediate,
        TEMPLATE_TOKENS + text_tokens(config, request),
        models.element_size,
        quantization=models.qwen_quantization,
    )


def _expanding(config: Config, request: Request, models: Models) -> int:
    """Reading the instruction, which is more than writing takes; what is kept of the tokens is little beside it."""
    share = {"i2v": 1.0, "i2i": 0.25}.get(config.task, 0.0)  # what is edited is shown in half its width and height
    picture = int(share * request.width * request.height / PIXELS_PER_TOKEN)
    return text_activations(
        config.model.text_embedder.qwen.emb_size,
        models.qwen_intermediate,
        EXPANSION_TOKENS + picture,
        models.element_size,
        quantization=models.qwen_quantization,
    )


def _denoising(config: Config, request: Request, models: Models, machine: Machine) -> int:
    dit, runtime, samples = config.model.dit_params, config.runtime, len(request.samples)
    tokens = num_tokens(config, request)
    activations = dit_activations(
        dit,
        tokens,
        text_tokens(config, request),
        models.element_size,
        nabla=config.model.attention.type == "nabla",
        flex=machine.gpu_memory is not None and config.model.attention.engine != "sdpa",
        on_gpu=machine.gpu_memory is not None,
        chunk_tokens=runtime.chunk_tokens,
        quantization=models.dit_quantization,
        heads_at_once=runtime.heads_at_once,
        attention_on_host=runtime.attention_on_host and machine.gpu_memory is not None,
        adapted=models.adapted.on_device > 0,
        processes=shares(config, machine)[0],
    )
    if runtime.preview is not None:  # between two steps
        activations = max(activations, _tiny_decoding(request, models))
    activations += denoising_state(dit, tokens, samples)
    if (cache := config.block_cache) is not None:
        branches = 1 + (request.guidance_weight != 1 and runtime.cfg_parallel == 1)
        writes_over = runtime.heads_at_once is not None
        activations += cache_bytes(dit, tokens, cache, samples, branches, models.element_size, writes_over)
    return activations


def num_tokens(config: Config, request: Request) -> int:
    return prod(size // p for size, p in zip(request.latent_size, config.model.dit_params.patch_size, strict=True))


def text_tokens(config: Config, request: Request) -> int:
    longest = request.max_sequence_length or config.model.text_embedder.qwen.max_length
    return EDIT_TOKENS if config.task == "i2i" else longest
