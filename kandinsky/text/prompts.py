"""Prompt templates as data, and the way from words to token ids.

The DiT never sees the bare prompt: it was trained on Qwen2.5-VL's hidden states of a chat whose system message asks for
a description of the video (or image), with the states of that fixed prefix cut off. `prompt_templates.json` holds the
published wordings; here they are rendered, tokenised and truncated, and the length of the prefix is checked against the
tokenizer, because a prefix of another length would silently shift the text that the model sees.

This module knows neither torch nor the models: token ids are plain lists, and `embedder.py` makes tensors.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from kandinsky.text.tokenizer import Tokenizer


logger = logging.getLogger(__name__)


_PROMPT_SLOT = "{}"
IMAGE_TOKEN = "<|image_pad|>"  # stands for a picture in a template, and as often as it makes tokens in front of Qwen


@dataclass(frozen=True)
class PromptTemplate:
    """One published template; `text` has one `{}` where the prompt goes."""

    name: str
    text: str
    per_image: str  # follows the text once for every image that Qwen is shown
    end: str  # closes the message where `text` does not
    crop: int  # how many leading tokens are dropped
    prefix_tokens: int  # how many tokens come before the prompt with Qwen2.5-VL's tokenizer
    sha256: str  # of `text`

    @property
    def prefix(self) -> str:
        return self.text.partition(_PROMPT_SLOT)[0]


class TokenizedPrompts(NamedTuple):
    """Token ids of whole rendered prompts (prefix included), padded on the right to the longest of the batch."""

    input_ids: list[list[int]]  # (B, L)
    attention_mask: list[list[int]]  # (B, L), 1 for a real token, 0 for padding


@functools.cache
def _prompt_data() -> Mapping[str, Any]:
    source = importlib.resources.files("kandinsky.text").joinpath("prompt_templates.json")
    return json.loads(source.read_text(encoding="utf-8"))


def get_template(content: str) -> PromptTemplate:
    """The template for "video", "image" or "image_edit".

    Raises:
        ValueError: there is no template of this name.
    """
    templates = _prompt_data()["templates"]
    if content not in templates:
        raise ValueError(f"there is no prompt template for content {content!r}; choose one of {', '.join(templates)}")
    return PromptTemplate(name=content, **templates[content])


def default_negative_caption(content: str = "video") -> str:
    """What the release steers away from when the caller names nothing: a caption for videos, nothing for images."""
    return _prompt_data()["negative_captions"].get(content, "")


def render(template: PromptTemplate, prompt: str, image_tokens: Sequence[int] = ()) -> str:
    """The template with the prompt in its slot and room for its pictures, each of so many tokens.

    Braces in the prompt stay what they are.
    """
    before, _, after = template.text.partition(_PROMPT_SLOT)
    images = "".join(template.per_image.replace(IMAGE_TOKEN, IMAGE_TOKEN * n) for n in image_tokens)
    return before + prompt + after + images + template.end


def prefix_length(tokenizer: Tokenizer, template: PromptTemplate) -> int:
    """How many tokens this tokenizer puts before the prompt."""
    return len(tokenizer([template.prefix])["input_ids"][0])


def check_prefix(tokenizer: Tokenizer, template: PromptTemplate, crop: int | None = None) -> None:
    """Check that cutting `crop` tokens cuts what the checkpoint was trained without.

    With the published crop (None) the prefix must have its published length; with one from a config, exactly that one.

    Raises:
        ValueError: the tokenizer makes another number of tokens of the prefix.
    """
    published = crop is None or crop == template.crop
    expected = template.prefix_tokens if published else crop
    found = prefix_length(tokenizer, template)
    if found != expected:
        raise ValueError(
            f"the {template.name!r} prompt template has {found} tokens before the prompt, but "
            f"{expected} are expected{'' if published else ' (model.text_embedder.qwen.crop)'}. This is another "
            "tokenizer than the one the checkpoint was trained with, or a changed template, and the model would see "
            "shifted text. Use the tokenizer files that belong to the checkpoint; if it was trained with this "
            f"tokenizer, set model.text_embedder.qwen.crop to {found}"
        )


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise a ValueError where there are no prompts, or where a bare string stands instead of a list."""
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a non-empty list of strings, not {prompts!r}")


def tokenize_prompts(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    template: PromptTemplate,
    max_length: int | None,
    crop: int,
    image_tokens: Sequence[int] | None = None,
) -> TokenizedPrompts:
    """Render and tokenise prompts; the prefix is still in front, so that the caller can crop the hidden states.

    `image_tokens` says how many tokens the picture of each prompt makes (None: there are no pictures). Pictures stand
    behind the words, so that `max_length` cannot apply: nothing is cut off then.

    Without pictures, a prompt longer than `max_length` tokens after the crop (None: no limit) loses its tail, closing
    token included, as in the release, and a warning says how much. Padding goes to the longest prompt only: behind the
    last real token of a causal model it changes nothing before it, and the caller masks or drops it.

    Raises:
        ValueError: no prompts, a bare string instead of a sequence, nothing left of a prompt after the crop, or a
            prompt with the token that stands for a picture.
    """
    check_prompts(prompts)
    pictures: list[tuple[int, ...]] = [()] * len(prompts) if image_tokens is None else [(n,) for n in image_tokens]
    for prompt in prompts:
        if image_tokens is not None and IMAGE_TOKEN in prompt:
            raise ValueError(f"the prompt {prompt!r} has {IMAGE_TOKEN} in it, which stands for a picture; leave it out")
    # Closing <|im_end|> and the prompt are tokenised together: how words merge depends on their neighbours.
    rows = tokenizer([render(template, *both) for both in zip(prompts, pictures, strict=True)])["input_ids"]
    if max_length is not None and image_tokens is None:
        for index, row in enumerate(rows):
            surplus = len(row) - (crop + max_length)
            if surplus > 0:
                # One of them closes the message; the prompt itself loses the others.
                logger.warning(
                    "prompt %d is too long: %d of its %d tokens were cut off (%r ...)",
                    index, surplus, len(row) - crop, prompts[index][:60],
                )  # fmt: skip
        rows = [row[: crop + max_length] for row in rows]
    for row, prompt in zip(rows, prompts, strict=True):
        if len(row) <= crop:
            raise ValueError(
                f"nothing is left of the prompt {prompt!r}: the {template.name!r} template makes {len(row)} tokens of "
                f"it and the first {crop} are cut off. Use a longer prompt"
            )
    longest = max(map(len, rows))
    pad = tokenizer.pad_token_id or 0  # any id will do: no real token looks at it
    return TokenizedPrompts(
        input_ids=[[*row, *[pad] * (longest - len(row))] for row in rows],
        attention_mask=[[1] * len(row) + [0] * (longest - len(row)) for row in rows],
    )
