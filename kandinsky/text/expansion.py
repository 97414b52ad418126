"""From a short prompt to the longer caption that the models were trained on, written by the text encoder's own Qwen.

The models learned from captions of a paragraph; a few words leave them much to guess. What Qwen is asked for is in
`expansion_instructions.json`. An answer that is empty, a refusal, or one phrase over and over is not used: the user's
words are then taken as they are, and a warning says so. The same words, picture and seed give the same caption, and
a folder may keep it. Knows a `generate(text, images, seed=...)` and no models.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kandinsky.common.writing import atomic_path, remove_leftovers

if TYPE_CHECKING:
    from PIL import Image


logger = logging.getLogger(__name__)


MAX_NEW_TOKENS = 256
MAX_SHARE_OF_ONE_PHRASE = 0.2
PHRASE = 3  # words
REFUSALS = ("i'm sorry", "i am sorry", "i cannot", "i can't", "as an ai", "sorry,")
LABEL = re.compile(r"^(?:\**(?:caption|instruction|rewritten request|answer)\**\s*:\**\s*)", re.IGNORECASE)


class Generator(Protocol):
    """Writes an answer to a message with pictures, and says whether it came to an end."""

    def generate(
        self, text: str, images: Sequence[Image.Image] = (), *, seed: int = 0, max_new_tokens: int = 256
    ) -> tuple[str, bool]: ...


@functools.cache
def instructions() -> Mapping[str, str]:
    """What Qwen is asked for, by task."""
    source = importlib.resources.files("kandinsky.text").joinpath("expansion_instructions.json")
    return json.loads(source.read_text(encoding="utf-8"))


def expand_prompt(
    generator: Generator, prompt: str, task: str, images: Sequence[Image.Image] = (), seed: int = 0
) -> str:
    """The caption for a prompt, or the prompt itself where the answer is of no use."""
    message = instructions()[task].replace("{prompt}", prompt)
    answer, is_whole = generator.generate(message, images, seed=seed, max_new_tokens=MAX_NEW_TOKENS)
    caption = clean(answer, is_whole)
    if fault := fault_of(caption):
        logger.warning("the prompt could not be expanded (%s) and is taken as it is: %r", fault, answer[:80])
        return prompt
    return caption


def clean(answer: str, is_whole: bool = True) -> str:
    """An answer without label, quotation marks and line breaks, and without its last sentence where that has no end."""
    text = LABEL.sub("", " ".join(answer.split()))
    if not is_whole:
        end = max(text.rfind(mark) for mark in (". ", "! ", "? "))
        text = text[: end + 1] if end > 0 else text
    if len(text) > 1 and text[0] == text[-1] == '"' and text.count('"') == 2:
        text = text[1:-1].strip()
    return text


def fault_of(caption: str) -> str | None:
    """Why a caption is of no use; None where nothing speaks against it."""
    words = caption.lower().split()
    if not any(character.isalpha() for character in caption):
        return "the answer is empty"
    if caption.lower().startswith(REFUSALS):
        return "the answer is a refusal"
    phrases = Counter(zip(*(words[i:] for i in range(PHRASE)), strict=False))
    if len(words) > 4 * PHRASE and max(phrases.values()) > max(2, MAX_SHARE_OF_ONE_PHRASE * len(phrases)):
        return "the answer repeats itself"
    return None


class PromptExpander:
    """Expands prompts, and keeps what it wrote in a folder where there is one.

    Args:
        generator: makes the one who writes; called when it is needed, and what it made is forgotten afterwards.
        identity: all that a caption depends on besides words, pictures and seed; JSON values.
    """

    def __init__(
        self,
        generator: Callable[[], Generator],
        identity: Mapping[str, Any] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.generator = generator
        self.identity = dict(identity or {})
        self.folder = folder

    def expand(
        self, prompts: Sequence[str], task: str, images: Sequence[Image.Image | None], seeds: Sequence[int]
    ) -> list[str]:
        """The caption for each prompt with its picture and seed; see `expand_prompt`."""
        generator = functools.cache(self.generator)
        if self.folder is not None:
            remove_leftovers(self.folder)
        return [
            self._expand(generator, prompt, task, [] if image is None else [image], seed)
            for prompt, image, seed in zip(prompts, images, seeds, strict=True)
        ]

    def _expand(
        self, generator: Callable[[], Generator], prompt: str, task: str, images: Sequence[Image.Image], seed: int
    ) -> str:
        entry = None if self.folder is None else self.folder / f"{self._key(prompt, task, images, seed)}.txt"
        if entry is not None and entry.is_file():
            try:
                return entry.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                logger.debug("%s is damaged and is made again", entry)
        caption = expand_prompt(generator(), prompt, task, images, seed)
        if entry is not None:
            try:
                with atomic_path(entry) as temporary:
                    temporary.write_text(caption, encoding="utf-8")
            except OSError as error:
                logger.warning("the expanded prompt can't be kept (%s)", error)
        return caption

    def _key(self, prompt: str, task: str, images: Sequence[Image.Image], seed: int) -> str:
        pictures = [hashlib.sha256(image.tobytes() + repr(image.size).encode()).hexdigest() for image in images]
        values = [self.identity, instructions()[task], prompt, pictures, seed]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
