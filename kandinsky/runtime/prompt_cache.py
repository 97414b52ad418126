"""Embeddings of prompts kept on disk, so that the same words are encoded once and not in every run.

An entry's name is a hash of all that its embeddings depend on: the encoders, the template, the words, the picture where
there is one, the limits, the dtype, the device, and the versions of the software. What changes gets another name, so
entries can't go stale, and one that is damaged or can't be written costs a computation, never an error. Entries hold
embeddings and no words, and are safe to delete at any time; nothing here ever deletes one.

The encoders weigh 17 GB, too much to be hashed in every run: `fingerprint` takes of each weight file its size, its time
of change, its header and pages spread over its length. Knows neither what is in those files nor who encodes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch

from kandinsky import __version__
from kandinsky.common.writing import remove_leftovers
from kandinsky.text.embeddings import PromptEncoder, TextEmbeddings
from kandinsky.text.prompts import check_prompts, get_template

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

FORMAT = 1  # of the entries; another number forgets all that there are
SAMPLED_PAGES = 64  # of a weight file
PAGE = 4096  # bytes


def default_folder() -> Path:
    """`kandinsky5/prompts` in the folder where this user's programs keep what can be computed again."""
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "kandinsky5" / "prompts"


def fingerprint(files: Iterable[Path]) -> str:
    """What tells these files from others: of safetensors size, time of change, header and pages, of others all bytes.

    Their folder doesn't count: files that were moved are the same files.
    """
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} ".encode())
        with path.open("rb") as file:
            if path.suffix != ".safetensors":
                digest.update(file.read())
                continue
            digest.update(f"{status.st_mtime_ns} ".encode())
            header_bytes = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header_bytes, status.st_size)))
            for i in range(SAMPLED_PAGES):
                file.seek(max(0, status.st_size - PAGE) * i // (SAMPLED_PAGES - 1))
                digest.update(file.read(PAGE))
    return digest.hexdigest()


class PromptCache:
    """A text embedder that asks another one only for what is not in a folder.

    Each prompt is encoded by itself and never in a batch with others, so that its embeddings are the same to the last
    bit, whether they were kept or not and whatever else was asked for with them.

    Args:
        embedder: who encodes. It is not touched where the folder has everything.
        folder: is made when the first entry is written.
        identity: all that embeddings depend on besides what is given to `encode`; JSON values.
        device: where embeddings are handed out, whether computed or kept.
        always: prompts that are kept although `everything` is False, where they come without a picture: with one,
            even a default negative prompt is an entry (of megabytes) for every picture.
        everything: keep every prompt.
        widths: of text and pooled embeddings; entries of others are made again. None: whatever they are.
    """

    def __init__(
        self,
        embedder: PromptEncoder,
        folder: Path,
        identity: Mapping[str, Any],
        device: torch.device,
        *,
        always: Collection[str] = (),
        everything: bool = False,
        widths: tuple[int, int] | None = None,
    ) -> None:
        self.embedder = embedder
        self.folder = folder
        self.identity = dict(identity)
        self.device = device
        self.always = frozenset(always)
        self.everything = everything
        self.widths = widths
        self._has_warned = False

    def encode(
        self,
        prompts: Sequence[str],
        content: str = "video",
        images: Sequence[Image.Image] | None = None,
        max_length: int | None = None,
    ) -> TextEmbeddings:
        """What `TextEmbedder.encode` returns for each prompt alone, joined. Raises what that raises."""
        check_prompts(prompts)
        if images is None:
            parts = [self._encode_one(prompt, content, None, max_length) for prompt in prompts]
        elif len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures for {len(prompts)} prompts: give one each")
        else:
            pairs = zip(prompts, images, strict=True)
            parts = [self._encode_one(prompt, content, image, max_length) for prompt, image in pairs]
        return parts[0] if len(parts) == 1 else TextEmbeddings.join(parts)

    def path(self, prompt: str, content: str, image: Image.Image | None = None, max_length: int | None = None) -> Path:
        """Where the embeddings of a prompt are kept, if they are."""
        template = get_template(content)
        facts = {
            **self.identity,
            "format": FORMAT,
            "versions": [__version__, torch.__version__, tokenizers.__version__],
            # How a sum is split over threads moves its last bits.
            "device": [self.device.type, torch.get_num_threads() if self.device.type == "cpu" else None],
            "template": [template.text, template.per_image, template.end, template.crop],
            "prompt": prompt,
            "max_length": max_length,
            "image": None if image is None else [image.mode, *image.size, hashlib.sha256(image.tobytes()).hexdigest()],
        }
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{name}.safetensors"

    def _encode_one(
        self, prompt: str, content: str, image: Image.Image | None, max_length: int | None
    ) -> TextEmbeddings:
        path = None
        if self.everything or (prompt in self.always and image is None):
            path = self.path(prompt, content, image, max_length)
            try:
                return self._checked(TextEmbeddings.load(path), path).to(self.device)
            except ValueError as error:
                if path.exists():
                    logger.warning("cached embeddings are not readable and are computed again: %s", error)
        embeddings = self.embedder.encode([prompt], content, None if image is None else [image], max_length)
        if path is not None:
            self._keep(embeddings, path)
        return embeddings.to(self.device)

    def _checked(self, embeddings: TextEmbeddings, path: Path) -> TextEmbeddings:
        prompts, tokens, width = embeddings.text_embeds.shape
        widths = width, embeddings.pooled_embeds.shape[-1]
        if prompts != 1 or tokens < 1 or self.widths not in (None, widths):
            raise ValueError(f"{path} holds embeddings of {prompts} prompts, {tokens} tokens, {widths} wide")
        return embeddings

    def _keep(self, embeddings: TextEmbeddings, path: Path) -> None:
        try:
            remove_leftovers(self.folder)
            embeddings.save(path)
        except OSError as error:  # a full disk, a folder that belongs to somebody else
            if not self._has_warned:
                logger.warning("embeddings of prompts can't be kept (%s); going on without", error)
            self._has_warned = True
