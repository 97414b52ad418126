"""The prompt side of a pipeline: what embeds prompts, what keeps embeddings, and what writes prompts out."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import tokenizers
import torch

from kandinsky.checkpoints.files import find_weights
from kandinsky.config.schema import Config
from kandinsky.loading.text_encoders import load_text_embedder, text_encoder_files
from kandinsky.loading.text_generator import can_generate, load_text_generator
from kandinsky.runtime.offload import Part, TextEncodersOnDemand
from kandinsky.runtime.prompt_cache import PromptCache, default_folder, fingerprint
from kandinsky.runtime.quantization import quantize_qwen
from kandinsky.text.embedder import TextEmbedder
from kandinsky.text.embeddings import PromptEncoder
from kandinsky.text.expansion import PromptExpander
from kandinsky.text.generator import TextGenerator


def load_prompt_side(
    config: Config, qwen_path: Path, clip_path: Path, device: torch.device, dtype: torch.dtype
) -> tuple[PromptEncoder, PromptExpander | None, list[Part]]:
    """What makes embeddings of prompts, what writes prompts out (None: it can't), and what comes and goes with a stage.

    Raises ValueError for what is wrong with files or tokenizers, also where the encoders are loaded later.
    """
    load_encoders = functools.partial(load_text_encoders, config, qwen_path, clip_path, dtype=dtype)
    encoders: PromptEncoder
    parts: list[Part] = []
    if config.runtime.offload == "on" or config.runtime.cache_prompts or config.runtime.stream_encoders == "on":
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


def no_text_encoders() -> TextEmbedder:
    """Stands where a pipeline was loaded for what comes after the text."""
    raise RuntimeError("this pipeline was loaded without text encoders")


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
        stream=config.runtime.stream_encoders == "on",
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
        "versions": [torch.__version__, tokenizers.__version__],
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
