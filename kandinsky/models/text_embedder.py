"""The two text encoders: Qwen2.5-VL for a sequence of text embeddings, CLIP for one pooled vector.

Qwen reads the prompt inside its chat template and hands over the last hidden state (after the final RMSNorm) without
the template's prefix. To edit a picture it also sees that picture: its vision tower turns it into tokens that stand
behind the words. CLIP reads the bare prompt, and its state at the first end-of-text token, without projection, is the
pooled embedding. Both come from transformers; only the parts in use are built, and only the tensors of those are read:
no lm_head (1.1 GB), and the vision tower (1.4 GB) only where pictures are to be seen.

Files: a folder with config.json and safetensors (one file, or shards with an index), or a file with config.json beside
it; never pickle. Keys may be
`model.layers.*` as published, `model.language_model.*` or `language_model.*` as newer transformers write them, or the
text model's own; for CLIP `text_model.*` (a full CLIPModel or a text model alone) or its own. The tokenizer lies in the
same folder, or beside it as in a diffusers repository (`tokenizer`, `tokenizer_2`), and Qwen's
preprocessor_config.json, which says how a picture is cut into patches, likewise.

This module does not know which device there is, where files come from, or what the embeddings are used for.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
)
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

from kandinsky.checkpoints import check_floats, find_weights, folder_of
from kandinsky.given import shortened
from kandinsky.headers import open_tensors, read_header, read_metadata
from kandinsky.models.numerics import aligned, is_finite, require_finite
from kandinsky.models.rope import MAX_TEXT_POSITIONS
from kandinsky.prompts import IMAGE_TOKEN, check_prefix, check_prompts, get_template, prefix_length, tokenize_prompts
from kandinsky.untrusted import read_json, reason
from kandinsky.writing import save_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2VLImageProcessorPil

# What may stand before a tensor's own name in a file; the longest match wins. Names of the vision tower keep `visual.`.
_QWEN_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
_CLIP_PREFIXES = ("text_model.",)
AnyConfig = TypeVar("AnyConfig", bound=PreTrainedConfig)
AnyModel = TypeVar("AnyModel", bound=PreTrainedModel)
# A model -> (name, tensor as read) -> tensors in its place by name, none where it is to stay as it is.
Quantize = Callable[[nn.Module], Callable[[str, Tensor], dict[str, Tensor]]]
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


class TextEmbedder(nn.Module):
    """Prompts (and pictures) in, `TextEmbeddings` out.

    Move it with `.to(device)`, never to another dtype: Qwen's rotary frequencies and all of CLIP stay float32.

    Args:
        qwen: Qwen2.5-VL without its head: the language model alone, or with its vision tower.
        clip: CLIP's text model.
        qwen_max_length: tokens of a prompt after the crop; None for no limit.
        clip_max_length: tokens that CLIP reads, padding included.
        crop: None for the templates' published crops. A number (for encoders with a tokenizer of their own) is checked
            against the template of `content`; the other templates are then cut at their measured prefix.
        image_processor: cuts pictures into patches; needed with a vision tower, and only then.
    """

    def __init__(
        self,
        qwen: Qwen2_5_VLTextModel | Qwen2_5_VLModel,
        clip: CLIPTextModel,
        qwen_tokenizer: PreTrainedTokenizerBase,
        clip_tokenizer: PreTrainedTokenizerBase,
        *,
        qwen_max_length: int | None,
        clip_max_length: int,
        crop: int | None = None,
        content: str = "video",
        image_processor: Qwen2VLImageProcessorPil | None = None,
    ) -> None:
        super().__init__()
        if clip_max_length > clip.config.max_position_embeddings:
            raise ValueError(
                f"model.text_embedder.clip.max_length is {clip_max_length}, but this CLIP has "
                f"{clip.config.max_position_embeddings} positions; use at most that many"
            )
        self.qwen = qwen
        self.clip = clip
        _check_vocabulary("Qwen", qwen_tokenizer, self.language_model)
        _check_vocabulary("CLIP", clip_tokenizer, clip)
        if isinstance(qwen, Qwen2_5_VLModel):
            _check_vision(qwen.config, qwen_tokenizer, image_processor)
        template = get_template(content)
        check_prefix(qwen_tokenizer, template, crop)
        self.image_processor = image_processor
        self.qwen_tokenizer = qwen_tokenizer
        self.clip_tokenizer = clip_tokenizer
        self.clip_tokenizer.padding_side = "right"  # the pooled state is the one at the first end-of-text token
        self.qwen_max_length = qwen_max_length
        self.clip_max_length = clip_max_length
        self._custom_crop = None if crop in (None, template.crop) else crop
        self._crops = {content: template.crop if crop is None else crop}

    @property
    def language_model(self) -> Qwen2_5_VLTextModel:
        """Qwen without its vision tower, whether it has one or not."""
        return self.qwen.language_model if isinstance(self.qwen, Qwen2_5_VLModel) else self.qwen

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
    def encode(
        self,
        prompts: Sequence[str],
        content: str = "video",
        images: Sequence[Image.Image] | None = None,
        max_length: int | None = None,
    ) -> TextEmbeddings:
        """Embed prompts in one batch. To the last bits a prompt's embeddings depend on what else is in its batch.

        Embeddings come in each encoder's own dtype (CLIP: float32). Padded positions of `text_embeds` hold states that
        mean nothing; `text_mask` says which ones. CLIP cuts what does not fit into its positions.

        Args:
            images: for "image_edit", and only there: one RGB picture a prompt, of the size that Qwen should see. Its
                processor rounds the sides to multiples of 28 px, and 28 x 28 px make a token.
            max_length: tokens of a prompt after the crop, None for what the embedder was built with. It does not apply
                with pictures, which stand behind the words: those are never cut, but refused beyond 1024 tokens.

        Raises:
            ValueError: no prompts, an unknown content, pictures missing, not wanted or not one a prompt, no vision
                tower to see them, or too many tokens with them; weights that are not finite.
        """
        embeddings = self(prompts, content, images, max_length)
        require_finite("Qwen2.5-VL", embeddings.text_embeds, self.qwen.named_parameters)
        require_finite("CLIP", embeddings.pooled_embeds, self.clip.named_parameters)
        return embeddings

    def forward(
        self,
        prompts: Sequence[str],
        content: str = "video",
        images: Sequence[Image.Image] | None = None,
        max_length: int | None = None,
    ) -> TextEmbeddings:
        """`encode` with gradients, for training."""
        check_prompts(prompts)
        template, crop = get_template(content), self.crop(content)
        max_length = self.qwen_max_length if max_length is None else max_length
        device = self.language_model.embed_tokens.weight.device
        # No attention mask: the model is causal and padding stands behind, so that no real token sees it.
        if content == "image_edit":
            pixels, image_tokens = self._preprocess(prompts, images)
            tokens = tokenize_prompts(self.qwen_tokenizer, prompts, template, max_length, crop, image_tokens)
            _check_length(tokens.attention_mask, image_tokens, crop)
            qwen_ids = torch.tensor(tokens.input_ids, device=device)  # (B, prefix + L)
            hidden_states = self._see(qwen_ids, pixels)
        else:
            if images is not None:
                raise ValueError(f"the {content!r} prompt template takes no pictures; give none, or edit an image")
            tokens = tokenize_prompts(self.qwen_tokenizer, prompts, template, max_length, crop)
            qwen_ids = torch.tensor(tokens.input_ids, device=device)  # (B, prefix + L)
            hidden_states = self.language_model(input_ids=qwen_ids, use_cache=False).last_hidden_state
        text_embeds = hidden_states[:, crop:]  # (B, L, in_text_dim)
        text_mask = torch.tensor(tokens.attention_mask, dtype=torch.bool)[:, crop:]  # (B, L)

        clip_rows = self.clip_tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.clip_max_length
        )["input_ids"]
        clip_ids = torch.tensor(clip_rows, device=device)  # (B, clip_max_length)
        pooled_embeds = self.clip(input_ids=clip_ids).pooler_output  # (B, in_text_dim2)
        return TextEmbeddings(text_embeds, pooled_embeds, None if text_mask.all() else text_mask.to(device))

    def _preprocess(
        self, prompts: Sequence[str], images: Sequence[Image.Image] | None
    ) -> tuple[dict[str, Tensor], list[int]]:
        """The patches of all pictures in one row, with the grid of each, and how many tokens each makes."""
        if self.image_processor is None:
            raise ValueError("these text encoders cannot see pictures: load them with vision=True to edit images")
        if isinstance(images, Image.Image) or not images or len(images) != len(prompts):
            given = "none" if images is None else "a bare one" if isinstance(images, Image.Image) else len(images)
            raise ValueError(f"editing images takes a list of one picture a prompt: {len(prompts)}, not {given}")
        for image in images:
            if not isinstance(image, Image.Image) or image.mode != "RGB":
                raise ValueError(f"pictures must be PIL images in RGB, not {image!r}; convert them")
        pixels = self.image_processor(images=list(images), return_tensors="pt")
        grid = pixels["image_grid_thw"]  # (B, 3), patches
        tokens_each = grid.prod(dim=1) // self.image_processor.merge_size**2
        return {"pixel_values": pixels["pixel_values"], "image_grid_thw": grid}, tokens_each.tolist()

    def _see(self, qwen_ids: Tensor, pixels: dict[str, Tensor]) -> Tensor:
        """Hidden states (B, L, D) of text with pictures in it."""
        assert isinstance(self.qwen, Qwen2_5_VLModel)
        inputs = {name: tensor.to(qwen_ids.device) for name, tensor in pixels.items()}
        if "mm_token_type_ids" in inspect.signature(self.qwen.forward).parameters:  # which transformers 4 works out
            inputs["mm_token_type_ids"] = (qwen_ids == self.qwen.config.image_token_id).int()
        return self.qwen(input_ids=qwen_ids, use_cache=False, **inputs).last_hidden_state


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
    vision: bool = False,
    quantize: Quantize | None = None,
) -> TextEmbedder:
    """Build both encoders from their folders or files (see the module), frozen and in evaluation mode.

    The models are built without memory and every tensor is read, cast and assigned by itself: there is never a float32
    copy of Qwen. `dtype` is Qwen's; CLIP is always float32, the precision it is published in, because it is small.
    `vision` adds Qwen's vision tower, which content "image_edit" needs. `quantize` is given Qwen without memory, and
    returns what makes each tensor that is read into those that the model then takes. On the device "meta" everything is
    checked, from the tokenizers to the name and shape of every tensor, but no weights are read.

    Raises:
        ValueError: a folder, weights, tensors or a tokenizer are missing or do not belong together; only pickle files.
    """
    qwen_path, clip_path = Path(qwen_path), Path(clip_path)
    qwen_folder, clip_folder = folder_of(qwen_path), folder_of(clip_path)
    for folder in (qwen_folder, clip_folder):
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder} is not a text encoder's folder: it has no config.json; download it and the tokenizer"
            )
    device = torch.device(device)

    # Tokenizers first: they are quick to read and quick to be found wrong.
    qwen_tokenizer = _load_tokenizer(qwen_folder, "tokenizer")
    clip_tokenizer = _load_tokenizer(clip_folder, "tokenizer_2")
    check_prefix(qwen_tokenizer, get_template(content), crop)
    image_processor = load_image_processor(qwen_folder) if vision else None

    qwen = _load_qwen(qwen_path, vision, device, dtype, quantize)

    clip_config = read_config(CLIPTextConfig, clip_path)
    clip_config._attn_implementation = "sdpa"
    clip = _build(clip_path, lambda: CLIPTextModel(clip_config))
    assign_weights(clip, clip_path, _CLIP_PREFIXES, device, torch.float32)
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
        image_processor=image_processor,
    )
    return embedder.eval().requires_grad_(False)


def text_encoder_files(qwen_path: str | Path, clip_path: str | Path) -> list[Path]:
    """Every file that decides what the two encoders make of a prompt: weights, configs and tokenizers.

    Raises ValueError where there are no weights.
    """
    files: list[Path] = []
    for path, sibling in ((Path(qwen_path), "tokenizer"), (Path(clip_path), "tokenizer_2")):
        files += find_weights(path)
        folder = folder_of(path)
        for place in (folder, folder.parent / sibling):
            if place.is_dir():
                files += sorted(file for file in place.iterdir() if file.suffix in (".json", ".txt", ".jinja"))
    return files


def _load_qwen(
    path: Path, vision: bool, device: torch.device, dtype: torch.dtype, quantize: Quantize | None
) -> Qwen2_5_VLTextModel | Qwen2_5_VLModel:
    config = read_config(Qwen2_5_VLConfig, path)
    text_config, vision_config = config.text_config, config.vision_config
    assert isinstance(text_config, Qwen2_5_VLTextConfig) and isinstance(vision_config, Qwen2_5_VLVisionConfig)
    for section in (config, text_config, vision_config):
        section._attn_implementation = "sdpa"
    qwen = _build(path, lambda: Qwen2_5_VLModel(config) if vision else Qwen2_5_VLTextModel(text_config))
    assign_weights(qwen, path, _QWEN_PREFIXES, device, dtype, quantize)

    # Rotary frequencies are no part of a checkpoint and still on meta; whatever the dtype, they are float32.
    language_model = qwen.language_model if isinstance(qwen, Qwen2_5_VLModel) else qwen
    rotary_emb = Qwen2_5_VLRotaryEmbedding(text_config).to(device)  # type: ignore[arg-type]
    for module in list(language_model.modules()):
        if hasattr(module, "rotary_emb"):  # transformers 4 has one in every layer too, which nothing uses
            module.rotary_emb = rotary_emb
    if isinstance(qwen, Qwen2_5_VLModel):
        set_vision_frequencies(qwen.visual, vision_config, device)
    return qwen


def read_config(kind: type[AnyConfig], path: Path) -> AnyConfig:
    """A published config.json as transformers has it. Raises ValueError for one that it can't be, naming the file."""
    file = folder_of(path) / "config.json"
    values = read_json(file)
    tensors = sum(len(read_header(weights)) for weights in find_weights(path))
    for section in (values, *(part for part in values.values() if isinstance(part, dict))):
        for name in ("num_hidden_layers", "depth"):
            if isinstance(number := section.get(name), int) and number > tensors:
                raise ValueError(
                    f"{file}: {name} is {shortened(str(number))}, and the weights have {tensors} tensors in all"
                )
    try:
        return kind.from_pretrained(file.parent, local_files_only=True)
    except Exception as error:  # wrong values show as any of a dozen types
        raise ValueError(f"{file}: damaged, or another model's ({reason(error)}); download it again") from None


def _build(path: Path, make: Callable[[], AnyModel]) -> AnyModel:
    """A model of transformers without memory. Raises ValueError where its config has sizes that can't be."""
    try:
        with torch.device("meta"):
            return make()
    except Exception as error:
        raise ValueError(
            f"{folder_of(path) / 'config.json'}: no model can be built from it ({reason(error)}); download it again"
        ) from None


def set_vision_frequencies(visual: nn.Module, config: Qwen2_5_VLVisionConfig, device: torch.device) -> None:
    """Give a vision tower its rotary frequencies, which are no part of a checkpoint.

    Half of a head's channels turn with the row of a patch, half with its column. No published config names the base,
    and what the module wants to be built from depends on the transformers version: so the numbers are set.
    """
    channels = config.hidden_size // config.num_heads // 2
    frequencies = 1 / 10000 ** (torch.arange(0, channels, 2, dtype=torch.float32) / channels)
    rotary: Any = visual.rotary_pos_emb
    for name, _ in list(rotary.named_buffers()):
        rotary.register_buffer(name, frequencies.to(device, copy=True), persistent=False)


def _check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the {name} tokenizer knows {len(tokenizer)} tokens, but its model only {model.config.vocab_size}; "
            "the two do not belong together"
        )


def _check_vision(
    config: Qwen2_5_VLConfig, tokenizer: PreTrainedTokenizerBase, processor: Qwen2VLImageProcessorPil | None
) -> None:
    assert processor is not None, "a vision tower needs an image processor"
    vision = config.vision_config
    assert isinstance(vision, Qwen2_5_VLVisionConfig)
    expected = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    found = (processor.patch_size, processor.merge_size, processor.temporal_patch_size)
    if found != expected:
        raise ValueError(
            f"preprocessor_config.json cuts pictures into patches of (patch_size, merge_size, temporal_patch_size) = "
            f"{found}, but Qwen's config.json says {expected}; the two do not belong together"
        )
    token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if token_id != config.image_token_id:
        raise ValueError(
            f"{IMAGE_TOKEN} is token {token_id} of the Qwen tokenizer, but {config.image_token_id} in Qwen's "
            "config.json; the two do not belong together"
        )


def _check_length(attention_mask: list[list[int]], image_tokens: list[int], crop: int) -> None:
    for index, (mask, image) in enumerate(zip(attention_mask, image_tokens, strict=True)):
        if (kept := sum(mask) - crop) > MAX_TEXT_POSITIONS:
            raise ValueError(
                f"prompt {index} and its picture make {kept} tokens, {image} of them the picture's, but the model "
                f"takes at most {MAX_TEXT_POSITIONS}; use a smaller picture or a shorter prompt"
            )


def load_image_processor(folder: Path) -> Qwen2VLImageProcessorPil:
    """How Qwen cuts pictures into patches. Not its whole processor: that needs torchvision, for videos."""
    for candidate in (folder, folder.parent / "tokenizer"):
        if (candidate / "preprocessor_config.json").is_file():
            # The one that works with PIL and numpy has another name in transformers 5.
            name = "Qwen2VLImageProcessorPil"
            processor: Any = getattr(transformers, name if hasattr(transformers, name) else "Qwen2VLImageProcessor")
            try:
                return processor.from_pretrained(candidate, local_files_only=True)
            except Exception as error:  # as with the tokenizer
                raise ValueError(
                    f"preprocessor_config.json in {candidate} is damaged ({reason(error)}); download it again"
                ) from None
    raise ValueError(
        f"no preprocessor_config.json for {folder}, neither in it nor in {folder.parent / 'tokenizer'}: without it "
        "pictures cannot be shown to Qwen. Download that file of Qwen2.5-VL into one of them"
    )


def _load_tokenizer(folder: Path, sibling: str) -> PreTrainedTokenizerBase:
    """The tokenizer in the encoder's folder or, as diffusers repositories have it, in a folder beside it."""
    for candidate in (folder, folder.parent / sibling):
        if (candidate / "tokenizer.json").is_file() or (candidate / "vocab.json").is_file():
            try:
                return AutoTokenizer.from_pretrained(candidate, local_files_only=True)
            except Exception as error:  # a damaged file shows as any of a dozen types, none of which names the file
                raise ValueError(
                    f"the tokenizer in {candidate} is damaged ({reason(error)}); download its files again"
                ) from None
    raise ValueError(
        f"no tokenizer for {folder}: neither it nor {folder.parent / sibling} has a tokenizer.json or a vocab.json; "
        "download the model's tokenizer files into one of them"
    )


def _own_name(key: str, prefixes: Sequence[str]) -> str:
    for prefix in prefixes:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def assign_weights(
    model: nn.Module,
    path: Path,
    prefixes: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    quantize: Quantize | None = None,
) -> None:
    """Give a model on the meta device its tensors from a folder or file, reading none that it does not have."""
    # Whether the model's own names carry a prefix depends on the transformers version, so both sides lose it.
    wanted = {_own_name(name, prefixes): (name, tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    convert = quantize(model) if quantize else None  # after it the model's names are other ones
    read: set[str] = set()
    tensors: dict[str, Tensor] = {}
    for file in find_weights(path):
        # The others are vision tower, lm_head, projections.
        header = {key: entry for key, entry in read_header(file).items() if _own_name(key, prefixes) in wanted}
        check_floats(file, header)
        with open_tensors(file) as tensors_in_file:
            for key, (_, found) in header.items():
                name, shape = wanted[_own_name(key, prefixes)]
                if found != shape:
                    raise ValueError(
                        f"{shortened(key)} in {file} has shape {found}, but config.json beside it makes it {shape}; "
                        "the two do not belong together"
                    )
                tensor = tensors_in_file.get_tensor(key).to(device)
                tensors |= (convert(name, tensor) if convert else {}) or {name: aligned(tensor.to(dtype))}
                read.add(name)
    missing = [name for name, _ in wanted.values() if name not in read]
    if missing:
        some = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{path} lacks {len(missing)} of the {len(wanted)} tensors of {type(model).__name__}: {some}. "
            "Download it again; it may be another model's"
        )
    model.load_state_dict(tensors, strict=True, assign=True)
