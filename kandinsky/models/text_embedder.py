"""The two text encoders: Qwen2.5-VL for a sequence of text embeddings, CLIP for one pooled vector.

Qwen reads the prompt inside its chat template and hands over the last hidden state (after the final RMSNorm) without
the template's prefix. CLIP reads the bare prompt, and its state at the first end-of-text token, without projection, is
the pooled embedding. Both come from transformers; only their text parts are built, and only the tensors of those are
read: no lm_head (1.1 GB) and no vision tower.

Files: a folder with config.json and safetensors (one file, or shards with an index), never pickle. Keys may be
`model.layers.*` as published, `model.language_model.*` or `language_model.*` as newer transformers write them, or the
text model's own; for CLIP `text_model.*` (a full CLIPModel or a text model alone) or its own. The tokenizer lies in the
same folder, or beside it as in a diffusers repository (`tokenizer`, `tokenizer_2`).

This module does not know which device there is, where files come from, or what the embeddings are used for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
)
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

from kandinsky.prompts import check_prefix, get_template, prefix_length, tokenize_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What may stand before a text tensor's own name in a file; the longest match wins.
_QWEN_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
_CLIP_PREFIXES = ("text_model.",)


@dataclass(frozen=True)
class TextEmbeddings:
    """What the DiT is told, for a batch of prompts."""

    text_embeds: Tensor  # (B, L, in_text_dim)
    pooled_embeds: Tensor  # (B, in_text_dim2)
    text_mask: Tensor | None  # (B, L) bool, True for a real token; None: all are real

    def split(self, n: int) -> tuple[TextEmbeddings, TextEmbeddings]:
        """The first n prompts and the others, each without the padding that only the other half needed."""
        if not 0 < n < len(self.text_embeds):
            raise ValueError(f"cannot split {len(self.text_embeds)} prompts after the first {n}")
        return self._rows(slice(None, n)), self._rows(slice(n, None))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextEmbeddings:
        """The same on another device; `dtype` is for the embeddings, the mask stays bool."""
        return TextEmbeddings(
            self.text_embeds.to(device=device, dtype=dtype),
            self.pooled_embeds.to(device=device, dtype=dtype),
            None if self.text_mask is None else self.text_mask.to(device=device),
        )

    def _rows(self, rows: slice) -> TextEmbeddings:
        text_embeds, mask = self.text_embeds[rows], self.text_mask
        if mask is not None:
            mask = mask[rows]
            longest = int(mask.sum(dim=1).max())
            text_embeds, mask = text_embeds[:, :longest], mask[:, :longest]
        return TextEmbeddings(text_embeds, self.pooled_embeds[rows], None if mask is None or mask.all() else mask)


class TextEmbedder(nn.Module):
    """Prompts in, `TextEmbeddings` out.

    Move it with `.to(device)`, never to another dtype: Qwen's rotary frequencies and all of CLIP stay float32.

    Args:
        qwen: Qwen2.5-VL's language model without its head.
        clip: CLIP's text model.
        qwen_max_length: tokens of a prompt after the crop; None for no limit.
        clip_max_length: tokens that CLIP reads, padding included.
        crop: None for the templates' published crops. A number (for encoders with a tokenizer of their own) is checked
            against the template of `content`; the other templates are then cut at their measured prefix.
    """

    def __init__(
        self,
        qwen: Qwen2_5_VLTextModel,
        clip: CLIPTextModel,
        qwen_tokenizer: PreTrainedTokenizerBase,
        clip_tokenizer: PreTrainedTokenizerBase,
        *,
        qwen_max_length: int | None,
        clip_max_length: int,
        crop: int | None = None,
        content: str = "video",
    ) -> None:
        super().__init__()
        if clip_max_length > clip.config.max_position_embeddings:
            raise ValueError(
                f"model.text_embedder.clip.max_length is {clip_max_length}, but this CLIP has "
                f"{clip.config.max_position_embeddings} positions; use at most that many"
            )
        _check_vocabulary("Qwen", qwen_tokenizer, qwen)
        _check_vocabulary("CLIP", clip_tokenizer, clip)
        template = get_template(content)
        check_prefix(qwen_tokenizer, template, crop)
        self.qwen = qwen
        self.clip = clip
        self.qwen_tokenizer = qwen_tokenizer
        self.clip_tokenizer = clip_tokenizer
        self.clip_tokenizer.padding_side = "right"  # the pooled state is the one at the first end-of-text token
        self.qwen_max_length = qwen_max_length
        self.clip_max_length = clip_max_length
        self._custom_crop = None if crop in (None, template.crop) else crop
        self._crops = {content: template.crop if crop is None else crop}

    def crop(self, content: str) -> int:
        """How many leading hidden states are dropped with this template (checked the first time)."""
        if content not in self._crops:
            template = get_template(content)
            if self._custom_crop is None:
                check_prefix(self.qwen_tokenizer, template)
                self._crops[content] = template.crop
            else:
                self._crops[content] = prefix_length(self.qwen_tokenizer, template)
        return self._crops[content]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], content: str = "video") -> TextEmbeddings:
        """Embed prompts in one batch; negative prompts belong into the same call (see `TextEmbeddings.split`).

        Embeddings come in each encoder's own dtype (CLIP: float32). Padded positions of `text_embeds` hold states that
        mean nothing; `text_mask` says which ones. CLIP cuts what does not fit into its positions.

        Raises:
            ValueError: no prompts, or an unknown content.
        """
        return self(prompts, content)

    def forward(self, prompts: Sequence[str], content: str = "video") -> TextEmbeddings:
        """`encode` with gradients, for training."""
        crop = self.crop(content)
        tokens = tokenize_prompts(self.qwen_tokenizer, prompts, get_template(content), self.qwen_max_length, crop)
        device = self.qwen.embed_tokens.weight.device
        # No attention mask: the model is causal and padding stands behind, so that no real token sees it.
        qwen_ids = torch.tensor(tokens.input_ids, device=device)  # (B, prefix + L)
        text_embeds = self.qwen(input_ids=qwen_ids, use_cache=False).last_hidden_state[:, crop:]  # (B, L, in_text_dim)
        text_mask = torch.tensor(tokens.attention_mask, dtype=torch.bool)[:, crop:]  # (B, L)

        clip_rows = self.clip_tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.clip_max_length
        )["input_ids"]
        clip_ids = torch.tensor(clip_rows, device=device)  # (B, clip_max_length)
        pooled_embeds = self.clip(input_ids=clip_ids).pooler_output  # (B, in_text_dim2)
        return TextEmbeddings(text_embeds, pooled_embeds, None if text_mask.all() else text_mask.to(device))


def load_text_embedder(
    qwen_path: str | Path,
    clip_path: str | Path,
    *,
    qwen_max_length: int | None,
    clip_max_length: int,
    crop: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    content: str = "video",
) -> TextEmbedder:
    """Build both encoders from their folders, frozen and in evaluation mode.

    The models are built without memory and every tensor is read, cast and assigned by itself: there is never a float32
    copy of Qwen. `dtype` is Qwen's; CLIP is always float32, the precision it is published in, because it is small.

    Raises:
        ValueError: a folder, weights, tensors or a tokenizer are missing or do not belong together; only pickle files.
    """
    qwen_path, clip_path = Path(qwen_path), Path(clip_path)
    for folder in (qwen_path, clip_path):
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} is not a text encoder's folder: it has no config.json")
    device = torch.device(device)

    # Tokenizers first: they are quick to read and quick to be found wrong.
    qwen_tokenizer = _load_tokenizer(qwen_path, "tokenizer")
    clip_tokenizer = _load_tokenizer(clip_path, "tokenizer_2")
    check_prefix(qwen_tokenizer, get_template(content), crop)

    qwen_config = Qwen2_5_VLConfig.from_pretrained(qwen_path, local_files_only=True).text_config
    assert isinstance(qwen_config, Qwen2_5_VLTextConfig)
    qwen_config._attn_implementation = "sdpa"
    with torch.device("meta"):
        qwen = Qwen2_5_VLTextModel(qwen_config)
    _assign_weights(qwen, qwen_path, _QWEN_PREFIXES, device, dtype)
    # Rotary frequencies are no part of a checkpoint and still on meta; whatever the dtype, they are float32.
    qwen.rotary_emb = Qwen2_5_VLRotaryEmbedding(qwen_config).to(device)  # type: ignore[arg-type]

    clip_config = CLIPTextConfig.from_pretrained(clip_path, local_files_only=True)
    clip_config._attn_implementation = "sdpa"
    with torch.device("meta"):
        clip = CLIPTextModel(clip_config)
    _assign_weights(clip, clip_path, _CLIP_PREFIXES, device, torch.float32)
    for module in clip.modules():
        if isinstance(module, CLIPTextEmbeddings):
            positions = torch.arange(clip_config.max_position_embeddings, device=device)[None]
            module.register_buffer("position_ids", positions, persistent=False)

    embedder = TextEmbedder(
        qwen,
        clip,
        qwen_tokenizer,
        clip_tokenizer,
        qwen_max_length=qwen_max_length,
        clip_max_length=clip_max_length,
        crop=crop,
        content=content,
    )
    return embedder.eval().requires_grad_(False)


def _check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the {name} tokenizer knows {len(tokenizer)} tokens, but its model only {model.config.vocab_size}; "
            "the two do not belong together"
        )


def _load_tokenizer(folder: Path, sibling: str) -> PreTrainedTokenizerBase:
    """The tokenizer in the encoder's folder or, as diffusers repositories have it, in a folder beside it."""
    for candidate in (folder, folder.parent / sibling):
        if (candidate / "tokenizer.json").is_file() or (candidate / "vocab.json").is_file():
            try:
                return AutoTokenizer.from_pretrained(candidate, local_files_only=True)
            except Exception as error:  # a damaged file shows as any of a dozen types, none of which names the file
                raise ValueError(
                    f"the tokenizer in {candidate} is damaged ({error}); download its files again"
                ) from None
    raise ValueError(
        f"no tokenizer for {folder}: neither it nor {folder.parent / sibling} has a tokenizer.json or a vocab.json; "
        "download the model's tokenizer files into one of them"
    )


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: the shards that the index names, or the one file."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        shards = set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / name for name in sorted(shards)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which {indices[0].name} names; download them")
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        raise ValueError(
            f"{folder} has {len(files)} safetensors files, but neither an index nor a model.safetensors: which one is "
            f"meant? ({', '.join(file.name for file in files)})"
        )
    if not files:
        pickles = sorted(file.name for suffix in ("bin", "pt", "pth", "ckpt") for file in folder.glob(f"*.{suffix}"))
        hint = f"; {', '.join(pickles)} will not be read, because pickle can run any code" if pickles else ""
        raise ValueError(f"{folder} has no *.safetensors file{hint}. Download the model's safetensors files")
    return files


def _own_name(key: str, prefixes: Sequence[str]) -> str:
    for prefix in prefixes:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def _assign_weights(
    model: nn.Module, folder: Path, prefixes: Sequence[str], device: torch.device, dtype: torch.dtype
) -> None:
    """Give a model on the meta device its tensors from the folder, reading none that it does not have."""
    # Whether the model's own names carry a prefix depends on the transformers version, so both sides lose it.
    wanted = {_own_name(name, prefixes): (name, parameter.shape) for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors_in_file:
                for key in tensors_in_file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    if (own_name := _own_name(key, prefixes)) not in wanted:
                        continue  # vision tower, lm_head, projections
                    name, shape = wanted[own_name]
                    found = tuple(tensors_in_file.get_slice(key).get_shape())
                    if found != tuple(shape):
                        raise ValueError(
                            f"{key} in {file} has shape {found}, but config.json beside it makes it {tuple(shape)}; "
                            "the two do not belong together"
                        )
                    tensors[name] = tensors_in_file.get_tensor(key).to(device=device, dtype=dtype)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or not complete ({error}); download it again") from error
    missing = [name for name, _ in wanted.values() if name not in tensors]
    if missing:
        shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(wanted)} tensors of {type(model).__name__}: {shown}. "
            "Download the folder again; its files may be of another model"
        )
    model.load_state_dict(tensors, strict=True, assign=True)
