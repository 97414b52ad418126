"""Qwen2.5-VL as a writer: the text encoder's own language model, with the head that it otherwise does without.

Only what the encoder lacks is read: the head (1.1 GB), and the vision tower (1.4 GB) where a picture is to be seen and
the encoder has none. Generation itself is transformers'. Knows folders of weights as models/text_embedder does; knows
nothing of what is written and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from kandinsky.checkpoints.files import find_weights, folder_of, has_tied_head
from kandinsky.checkpoints.headers import read_header
from kandinsky.common.untrusted import read_json
from kandinsky.text.embedder import TextEmbedder
from kandinsky.text.encoder_files import assign_weights, load_image_processor, read_config, set_vision_frequencies
from kandinsky.text.prompts import IMAGE_TOKEN

HEAD = "lm_head.weight"
VISION_PREFIXES = ("model.visual.", "visual.")
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{images}{text}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
IMAGE = f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>"
# As the published pipelines sample: all but greedy.
TEMPERATURE = 1e-6
REPETITION_PENALTY = 1.05


def can_generate(path: str | Path) -> bool:
    """Whether a Qwen at this path has a head: of its own, or that of its embeddings. Reads headers only."""
    path = Path(path)
    if has_tied_head(read_json(folder_of(path) / "config.json")):
        return True
    return any(HEAD in read_header(file) for file in find_weights(path))


class TextGenerator:
    """Writes an answer to a message, with pictures or without."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor

    @torch.no_grad()
    def generate(
        self, text: str, images: Sequence[Image.Image] = (), *, seed: int = 0, max_new_tokens: int = 256
    ) -> tuple[str, bool]:
        """The answer to `text`, and whether it came to its end within `max_new_tokens`.

        Args:
            images: RGB pictures that the message begins with.
            seed: of the sampling; the global generators are left as they are.
        """
        device = self.model.device
        inputs: dict[str, Any] = {}
        slots = ""
        if images:
            pixels = self.image_processor(images=list(images), return_tensors="pt")
            inputs = {name: pixels[name].to(device) for name in ("pixel_values", "image_grid_thw")}
            for grid in pixels["image_grid_thw"]:
                tokens = int(grid.prod()) // self.image_processor.merge_size**2
                slots += IMAGE.replace(IMAGE_TOKEN, IMAGE_TOKEN * tokens)
        message = CHAT.format(images=slots, text=text.replace(IMAGE_TOKEN, ""))
        input_ids = torch.tensor(self.tokenizer([message])["input_ids"], device=device)
        inputs |= {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if images:
            inputs["mm_token_type_ids"] = (input_ids == self.model.config.image_token_id).int()
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=TEMPERATURE,
            repetition_penalty=REPETITION_PENALTY,
            eos_token_id=end,
            pad_token_id=end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
        )
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            output = self.model.generate(**inputs, generation_config=settings)[0, input_ids.shape[1] :]
        answer = self.tokenizer.decode(output, skip_special_tokens=True)
        return str(answer), bool(output[-1] == end)


def load_text_generator(embedder: TextEmbedder, path: str | Path, *, vision: bool = False) -> TextGenerator:
    """A generator on top of an embedder's Qwen, which it shares; `path` is where that came from.

    vision: whether it shall see pictures.

    Raises ValueError where there is no head, or its files are not as they should be.
    """
    path = Path(path)
    if not can_generate(path):
        raise ValueError(f"{path} has no {HEAD}: this Qwen can read but not write, so it expands no prompts")
    language_model = embedder.language_model
    weight = language_model.embed_tokens.weight
    config: Any = read_config(Qwen2_5_VLConfig, path)
    for section in (config, config.text_config, config.vision_config):
        section._attn_implementation = "sdpa"
    with torch.device("meta"):
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
    model.model.language_model = language_model
    if model.config.tie_word_embeddings:
        model.lm_head.weight = weight
    else:
        head = nn.ModuleDict({"lm_head": model.lm_head})
        assign_weights(head, path, (), weight.device, weight.dtype)
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
