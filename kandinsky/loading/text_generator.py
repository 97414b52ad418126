"""What Qwen lacks as a text encoder to be a writer: its head (1.1 GB), and where pictures are seen its vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from kandinsky.checkpoints.encoder_config import QWEN, encoder_config
from kandinsky.checkpoints.files import find_weights, folder_of, has_tied_head
from kandinsky.checkpoints.formats import read_weights_header
from kandinsky.loading.text_encoders import assign_weights, load_image_processor, read_config, set_vision_frequencies
from kandinsky.text.embedder import TextEmbedder
from kandinsky.text.generator import TextGenerator

HEAD = "lm_head.weight"
VISION_PREFIXES = ("model.visual.", "visual.")


def can_generate(path: str | Path) -> bool:
    """Whether a Qwen at this path has a head: of its own, or that of its embeddings. Reads headers only."""
    path = Path(path)
    if has_tied_head(encoder_config(path, QWEN)):
        return True
    return any(name.startswith(HEAD) for file in find_weights(path) for name in read_weights_header(file))


def load_text_generator(embedder: TextEmbedder, path: str | Path, *, vision: bool = False) -> TextGenerator:
    """A generator on top of an embedder's Qwen, which it shares; `path` is where that came from.

    vision: whether it shall see pictures.

    Raises ValueError where there is no head, or its files are not as they should be.
    """
    path = Path(path)
    if not can_generate(path):
        raise ValueError(f"{path} has no {HEAD}: this Qwen can read but not write, so it expands no prompts")
    language_model = embedder.language_model
    weight = language_model.norm.weight  # the embeddings may lie on the host
    config: Any = read_config(Qwen2_5_VLConfig, path)
    for section in (config, config.text_config, config.vision_config):
        section._attn_implementation = "sdpa"
    with torch.device("meta"):
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
    model.model.language_model = language_model
    if model.config.tie_word_embeddings:
        table = language_model.embed_tokens.weight
        is_shared = isinstance(table, nn.Parameter)  # of an encoder that streams it lies on the host, in the file
        model.lm_head.weight = table if is_shared else nn.Parameter(table.to(weight.device, weight.dtype), False)
    else:
        head = nn.ModuleDict({"lm_head": model.lm_head})
        assign_weights(head, path, (), weight.device, weight.dtype)
        model.lm_head = head["lm_head"]  # another one where the file has it quantised
    own_visual = getattr(embedder.qwen, "visual", None)
    if own_visual is not None:
        model.model.visual = own_visual
    elif vision:
        assign_weights(model.model.visual, path, VISION_PREFIXES, weight.device, weight.dtype)
        set_vision_frequencies(model.model.visual, config.vision_config, weight.device)
    else:
        model.model.visual = None
    processor = embedder.image_processor or (load_image_processor(folder_of(path)) if vision else None)
    return TextGenerator(model.eval().requires_grad_(False), embedder.qwen_tokenizer, processor)
