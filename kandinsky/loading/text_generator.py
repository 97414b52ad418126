"""What Qwen lacks as a text encoder to be a writer: its head (1.1 GB), and where pictures are seen its vision tower."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from kandinsky.checkpoints.encoder_config import QWEN, encoder_config
from kandinsky.checkpoints.files import find_weights, folder_of, has_tied_head
from kandinsky.checkpoints.formats import read_weights_header
from kandinsky.loading.text_encoders import assign_weights
from kandinsky.loading.text_files import load_image_processor, read_config
from kandinsky.models.qwen import Qwen, QwenConfig
from kandinsky.models.qwen_vision import QwenVision
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
    config = read_config(QwenConfig, path)
    sizes = config.text_config
    with torch.device("meta"):
        head = nn.ModuleDict({"lm_head": nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)})
    if config.tie_word_embeddings:
        table = language_model.embed_tokens.weight
        is_shared = isinstance(table, nn.Parameter)  # of an encoder that streams it lies on the host, in the file
        shared = table if is_shared else nn.Parameter(table.to(weight.device, weight.dtype), False)
        head["lm_head"].weight = shared
    else:
        assign_weights(
            head, path, (), weight.device, weight.dtype
        )  # and another module where the file has it quantised
    visual = embedder.qwen.visual if isinstance(embedder.qwen, Qwen) else None
    if visual is None and vision:
        with torch.device("meta"):
            visual = QwenVision(config.vision_config)
        assign_weights(visual, path, VISION_PREFIXES, weight.device, weight.dtype)
        visual.eval().requires_grad_(False)
    processor = embedder.image_processor or (load_image_processor(folder_of(path)) if vision else None)
    head.eval().requires_grad_(False)
    return TextGenerator(config, language_model, head["lm_head"], visual, embedder.qwen_tokenizer, processor)
