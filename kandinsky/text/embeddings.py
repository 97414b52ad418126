"""What the text encoders hand to the DiT, for a batch of prompts, in memory and on disk.

Knows tensors and safetensors files; knows no encoders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kandinsky.checkpoints.dit_layout import check_floats
from kandinsky.checkpoints.headers import open_tensors, read_header, read_metadata
from kandinsky.common.given import shortened
from kandinsky.common.writing import save_tensors
from kandinsky.models.numerics import aligned, is_finite

_CHECKSUM = "sha256"  # metadata of saved embeddings


@dataclass(frozen=True)
class TextEmbeddings:
    """What the DiT is told, for a batch of prompts."""

    text_embeds: Tensor  # (B, L, in_text_dim)
    pooled_embeds: Tensor  # (B, in_text_dim2)
    text_mask: Tensor | None  # (B, L) bool, True for a real token; None: all are real

    def unbind(self) -> list[TextEmbeddings]:
        """Every prompt by itself (batch 1), without padding and so without a mask."""
        masks = [slice(None)] * len(self.text_embeds) if self.text_mask is None else self.text_mask
        return [
            TextEmbeddings(text_embeds[mask][None], pooled_embeds[None], None)
            for text_embeds, pooled_embeds, mask in zip(self.text_embeds, self.pooled_embeds, masks, strict=True)
        ]

    @classmethod
    def join(cls, parts: Sequence[TextEmbeddings]) -> TextEmbeddings:
        """All prompts of `parts` as one batch, padded with zeros to the longest; `unbind` takes it apart again."""
        rows = [row for part in parts for row in part.unbind()]
        text_embeds = pad_sequence([row.text_embeds[0] for row in rows], batch_first=True)  # (B, L, in_text_dim)
        lengths = torch.tensor([row.text_embeds.shape[1] for row in rows], device=text_embeds.device)
        mask = torch.arange(text_embeds.shape[1], device=text_embeds.device) < lengths[:, None]  # (B, L)
        pooled_embeds = torch.cat([row.pooled_embeds for row in rows])
        return cls(text_embeds, pooled_embeds, None if mask.all() else mask)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that `load` reads, with a checksum. It appears whole or not at all (WriteError)."""
        named = {"text_embeds": self.text_embeds, "pooled_embeds": self.pooled_embeds, "text_mask": self.text_mask}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items() if tensor is not None}
        save_tensors(path, tensors, {_CHECKSUM: _checksum(tensors)})

    @classmethod
    def load(cls, path: str | Path) -> TextEmbeddings:
        """What `save` wrote, on the CPU.

        Raises:
            ValueError: there is no such file, it is damaged, it has NaN or infinite values, or it holds something else.
        """
        try:
            header, checksum = read_header(path), read_metadata(path).get(_CHECKSUM)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no file of saved text embeddings ({error})") from None
        if not {"text_embeds", "pooled_embeds"} <= set(header) <= {"text_embeds", "pooled_embeds", "text_mask"}:
            raise ValueError(
                f"{path} has {shortened(', '.join(sorted(header)[:5])) or 'nothing'} in it, not text_embeds and "
                "pooled_embeds as text embeddings have; give a file that TextEmbeddings.save wrote"
            )
        check_floats(path, {name: entry for name, entry in header.items() if name != "text_mask"})
        with open_tensors(path) as file:
            tensors = {name: file.get_tensor(name) for name in header}
        text_embeds, pooled_embeds, mask = tensors["text_embeds"], tensors["pooled_embeds"], tensors.get("text_mask")
        mask_fits = mask is None or (mask.dtype == torch.bool and mask.shape == text_embeds.shape[:2])
        if not (text_embeds.ndim == 3 and pooled_embeds.ndim == 2 and len(text_embeds) == len(pooled_embeds)) or (
            not mask_fits
        ):
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            raise ValueError(
                f"{path} has {shapes}, but text embeddings have text_embeds (B, L, D), pooled_embeds (B, D2) and at "
                "most a bool text_mask (B, L); give a file that TextEmbeddings.save wrote"
            )
        if checksum not in (None, _checksum(tensors)):  # none: of a file that somebody else wrote
            raise ValueError(f"{path} is damaged: its text embeddings are not those that were saved; encode them again")
        if not (is_finite(text_embeds) and is_finite(pooled_embeds)):
            raise ValueError(f"{path} has NaN or infinite values in its text embeddings: encode them again")
        return cls(text_embeds, pooled_embeds, mask)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextEmbeddings:
        """The same on another device, `aligned`; `dtype` is for the embeddings, the mask stays bool."""
        return TextEmbeddings(
            aligned(self.text_embeds.to(device=device, dtype=dtype)),
            aligned(self.pooled_embeds.to(device=device, dtype=dtype)),
            None if self.text_mask is None else self.text_mask.to(device=device),
        )


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class PromptEncoder(Protocol):
    """Words in, embeddings out: a `TextEmbedder`, or what stands in front of one (a cache, one that loads late)."""

    def encode(
        self,
        prompts: Sequence[str],
        content: str = "video",
        images: Sequence[Image.Image] | None = None,
        max_length: int | None = None,
    ) -> TextEmbeddings: ...
