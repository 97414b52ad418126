"""Qwen2.5-VL as a writer: an answer to a message, with pictures or without. Generation itself is transformers'.

Knows nothing of files, nor of what is written and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig

from kandinsky.text.prompts import IMAGE_TOKEN

CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{images}{text}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
IMAGE = f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>"
# As the published pipelines sample: all but greedy.
TEMPERATURE = 1e-6
REPETITION_PENALTY = 1.05


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
        device = self.model.model.language_model.norm.weight.device
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
        forked = (
            {"devices": [device], "device_type": device.type} if device.type in ("cuda", "xpu") else {"devices": []}
        )
        with torch.random.fork_rng(**forked):
            torch.manual_seed(seed)
            output = self.model.generate(**inputs, generation_config=settings)[0, input_ids.shape[1] :]
        answer = self.tokenizer.decode(output, skip_special_tokens=True)
        return str(answer), bool(output[-1] == end)
