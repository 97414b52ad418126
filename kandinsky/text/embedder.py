"""The two text encoders: Qwen2.5-VL for a sequence of text embeddings, CLIP for one pooled vector.

Qwen reads the prompt inside its chat template and hands over the last hidden state (after the final RMSNorm) without
the template's prefix. To edit a picture it also sees that picture: its vision tower turns it into tokens that stand
behind the words. CLIP reads the bare prompt, and its state at the first end-of-text token, without projection, is the
pooled embedding.

This module does not know files, which device there is, or what the embeddings are used for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from kandinsky.common.limits import MAX_TEXT_TOKENS
from kandinsky.models.clip_text import ClipText
from kandinsky.models.numerics import require_finite
from kandinsky.models.qwen import Qwen, QwenConfig, QwenText
from kandinsky.text.embeddings import TextEmbeddings
from kandinsky.text.patches import ImageProcessor
from kandinsky.text.prompts import (
    IMAGE_TOKEN,
    check_prefix,
    check_prompts,
    get_template,
    prefix_length,
    tokenize_prompts,
)
from kandinsky.text.tokenizer import Tokenizer


class TextEmbedder(nn.Module):
    """Prompts (and pictures) in, `TextEmbeddings` out.

    Move it with `.to(device)`, never to another dtype: CLIP stays float32.

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
        qwen: QwenText | Qwen,
        clip: ClipText,
        qwen_tokenizer: Tokenizer,
        clip_tokenizer: Tokenizer,
        *,
        qwen_max_length: int | None,
        clip_max_length: int,
        crop: int | None = None,
        content: str = "video",
        image_processor: ImageProcessor | None = None,
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
        if isinstance(qwen, Qwen):
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
    def language_model(self) -> QwenText:
        """Qwen without its vision tower, whether it has one or not."""
        return self.qwen.language_model if isinstance(self.qwen, Qwen) else self.qwen

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
        device = self.language_model.norm.weight.device
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
            hidden_states = self.language_model(qwen_ids)
        text_embeds = hidden_states[:, crop:]  # (B, L, in_text_dim)
        text_mask = torch.tensor(tokens.attention_mask, dtype=torch.bool)[:, crop:]  # (B, L)

        clip_rows = self.clip_tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.clip_max_length
        )["input_ids"]
        clip_ids = torch.tensor(clip_rows, device=device)  # (B, clip_max_length)
        pooled_embeds = self.clip(clip_ids)[1]  # (B, in_text_dim2)
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
        assert isinstance(self.qwen, Qwen)
        return self.qwen(qwen_ids, **{name: tensor.to(qwen_ids.device) for name, tensor in pixels.items()})


def _check_vocabulary(name: str, tokenizer: Tokenizer, model: QwenText | ClipText) -> None:
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the {name} tokenizer knows {len(tokenizer)} tokens, but its model only {model.config.vocab_size}; "
            "the two do not belong together"
        )


def _check_vision(config: QwenConfig, tokenizer: Tokenizer, processor: ImageProcessor | None) -> None:
    assert processor is not None, "a vision tower needs an image processor"
    vision = config.vision_config
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
        if (kept := sum(mask) - crop) > MAX_TEXT_TOKENS:
            raise ValueError(
                f"prompt {index} and its picture make {kept} tokens, {image} of them the picture's, but the model "
                f"takes at most {MAX_TEXT_TOKENS}; use a smaller picture or a shorter prompt"
            )
