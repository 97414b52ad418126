"""Qwen2.5-VL as a writer: an answer to a message, with pictures or without, a token at a time.

Knows nothing of files, nor of what is written and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from kandinsky.models.qwen import KeysValues, QwenConfig, QwenText, with_pictures
from kandinsky.models.qwen_vision import QwenVision
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
    """Writes an answer to a message, with pictures or without.

    Args:
        head: hidden states -> a number for each token of the vocabulary.
        visual: the vision tower; None where it is shown no pictures.
    """

    def __init__(
        self,
        config: QwenConfig,
        language_model: QwenText,
        head: nn.Module,
        visual: QwenVision | None,
        tokenizer: Any,
        image_processor: Any,
    ) -> None:
        self.config = config
        self.language_model = language_model
        self.head = head
        self.visual = visual
        self.tokenizer = tokenizer
        self.image_processor = image_processor

    @torch.no_grad()
    def generate(
        self, text: str, images: Sequence[Image.Image] = (), *, seed: int = 0, max_new_tokens: int = 256
    ) -> tuple[str, bool]:
        """The answer to `text`, and whether it came to its end within `max_new_tokens`.

        Args:
            images: RGB pictures that the message begins with.
            seed: of the sampling, which decides between tokens that are equally likely; the global generators are left
                as they are.
        """
        device = self.language_model.norm.weight.device
        pixels, slots = {}, ""
        if images:
            pixels = self.image_processor(images=list(images), return_tensors="pt")
            for grid in pixels["image_grid_thw"]:
                tokens = int(grid.prod()) // self.image_processor.merge_size**2
                slots += IMAGE.replace(IMAGE_TOKEN, IMAGE_TOKEN * tokens)
        message = CHAT.format(images=slots, text=text.replace(IMAGE_TOKEN, ""))
        ids = torch.tensor(self.tokenizer([message])["input_ids"], device=device)  # (1, N)
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        forked = (
            {"devices": [device], "device_type": device.type} if device.type in ("cuda", "xpu") else {"devices": []}
        )
        with torch.random.fork_rng(**forked):
            torch.manual_seed(seed)
            answer = self._write(ids, {name: tensor.to(device) for name, tensor in pixels.items()}, end, max_new_tokens)
        return str(self.tokenizer.decode(answer, skip_special_tokens=True)), answer[-1] == end

    def _write(self, ids: Tensor, pixels: dict[str, Tensor], end: int, max_new_tokens: int) -> list[int]:
        """Tokens (at least one) that follow ids (1, N), up to `end`."""
        if pixels:
            assert self.visual is not None
            x, positions = with_pictures(self.language_model, self.visual, self.config, ids, **pixels)
        else:
            x = self.language_model.embed_tokens(ids)
            positions = torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
        following = positions.max() + 1
        cache, answer = KeysValues(), []
        for turn in range(max_new_tokens):
            states = self.language_model.run(x, positions, cache)
            scores = self.head(states[:, -1]).float()  # (1, vocabulary)
            said = scores.gather(1, ids)
            scores = scores.scatter(1, ids, torch.where(said < 0, said * REPETITION_PENALTY, said / REPETITION_PENALTY))
            token = torch.multinomial((scores / TEMPERATURE).softmax(-1), 1)  # (1, 1)
            answer.append(int(token))
            if answer[-1] == end:
                break
            ids = torch.cat((ids, token), dim=1)
            x = self.language_model.embed_tokens(token)
            positions = (following + turn).expand(3, 1, 1)
        return answer
