"""The first stage: words and pictures become embeddings and what a request starts from and is conditioned on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kandinsky.models.numerics import require_finite
from kandinsky.models.vae_flux import AutoencoderKL
from kandinsky.models.vae_tiling import VAETiling
from kandinsky.outputs import media
from kandinsky.pipelines.calls import one_at_a_time
from kandinsky.pipelines.inputs import ImageSource, Inputs, as_images, one_each
from kandinsky.pipelines.retries import Retries
from kandinsky.request import Request
from kandinsky.sampling.conditioning import (
    FIRST_FRAME,
    Conditioning,
    Item,
    compose,
    draw_noise,
    frame_item,
    from_source,
    from_text,
    keyframe_item,
    latent_mask,
    overlap_items,
    source_item,
)
from kandinsky.sampling.sampler import Branch, uses_guidance
from kandinsky.sizes import check_picture, size_for_image
from kandinsky.text.embeddings import TextEmbeddings
from kandinsky.text.prompts import check_prompts

if TYPE_CHECKING:
    from PIL import Image


logger = logging.getLogger(__name__)


class EncodeStage(Retries):
    """Prompts written out and embedded, pictures encoded, noise drawn."""

    @one_at_a_time
    @torch.no_grad()
    def encode_prompt(
        self,
        text: str | Sequence[str],
        image: ImageSource | Sequence[ImageSource] | None = None,
        *,
        content: str | None = None,
        max_sequence_length: int | None = None,
    ) -> TextEmbeddings:
        """Embeddings of one prompt or several, for `prompt_embeds` or `negative_prompt_embeds`, to be kept and reused.

        Image-to-image models also read the picture that is edited, at the size it will be edited in. `content` is
        "video" or "image"; None means what this model makes.
        """
        texts = [text] if isinstance(text, str) else list(text)
        images: list[Image.Image] | None = None
        if self.config.task == "i2i":
            if image is None:
                raise ValueError("an image-to-image model reads the picture together with the prompt: give image=")
            images = [media.load_image(one) for one in as_images(image)]
            if len(images) not in (1, len(texts)):
                raise ValueError(f"{len(images)} pictures for {len(texts)} prompts: give one for all, or one for each")
            for picture in images:
                check_picture(picture.size)
            images = [media.fit_image(picture, *size_for_image(picture.size, self.config)) for picture in images]
        elif image is not None:
            raise ValueError(f"a model for {self.config.task} reads no picture together with the prompt: leave it out")
        content = content or self._content(self.config.task != "t2v")
        return TextEmbeddings.join(self._embed(texts, images, content, max_sequence_length))

    def _content(self, is_image: bool) -> str:
        """Which prompt template the model was trained with."""
        task = self.config.task
        return "image_edit" if task == "i2i" else "image" if is_image and task != "i2v" else "video"

    def _embed(
        self, texts: Sequence[str], images: Sequence[Image.Image] | None, content: str, max_length: int | None
    ) -> list[TextEmbeddings]:
        """The embeddings of each prompt, encoded by itself."""
        check_prompts(texts)
        pictures = [None] * len(texts) if images is None else [[media.halve_image(image)] for image in images]

        def embedded() -> list[TextEmbeddings]:
            with self.placement.use("text_embedder"):
                return [
                    self.text_embedder.encode([text], content=content, images=picture, max_length=max_length)
                    for text, picture in zip(texts, one_each(pictures, len(texts)), strict=True)
                ]

        return self.frugally("encode text", None, embedded)

    @one_at_a_time
    @torch.no_grad()
    def expand_prompts(self, request: Request, images: Sequence[Image.Image]) -> Request:
        """The request with each prompt written out, with the seed of its first sample; or as it is, where that isn't
        wanted or can't be done, where there are no words, or where it was done before."""
        return self.frugally("expand prompt", request, lambda: self._expanded(request, images))

    def _expanded(self, request: Request, images: Sequence[Image.Image]) -> Request:
        first = request.samples[0]
        if self.expander is None or request.expand_prompts is False or first.text is None or first.expanded is not None:
            return request
        if request.expand_prompts is None and not self.expands_unasked:
            return request
        task = "t2i" if request.is_image and self.config.task == "t2v" else self.config.task
        pictures: list[Image.Image | None] = [None] * request.num_prompts
        if images:
            shown = [media.halve_image(image) for image in images] if task == "i2i" else images
            pictures = [*one_each(shown, request.num_prompts)]
        firsts = [next(s for s in request.samples if s.prompt == i) for i in range(request.num_prompts)]
        with self.placement.use("text_embedder"):
            captions = self.expander.expand(
                [s.text or "" for s in firsts], task, pictures, [s.seed or 0 for s in firsts]
            )
        for caption in captions:
            logger.info("expanded prompt: %s", caption)
        samples = tuple(replace(sample, expanded=captions[sample.prompt]) for sample in request.samples)
        return replace(request, samples=samples)

    @one_at_a_time
    @torch.no_grad()
    def encode_prompts(
        self, request: Request, inputs: Inputs, images: Sequence[Image.Image]
    ) -> dict[Branch, list[TextEmbeddings]]:
        """For each branch of guidance the embeddings of each sample. No prompt is encoded twice."""
        first_samples = [next(s for s in request.samples if s.prompt == i) for i in range(request.num_prompts)]
        triggers = self._triggers()
        if triggers:
            logger.info("prompts begin with %r, for the adapters", triggers)
        given: dict[Branch, TextEmbeddings | None] = {"cond": inputs.prompt_embeds}
        prompts = [sample.expanded or sample.text for sample in first_samples]
        words: dict[Branch, list[str | None]] = {"cond": [prompt and triggers + prompt for prompt in prompts]}
        if uses_guidance(request.guidance_weight):
            given["uncond"] = inputs.negative_prompt_embeds
            words["uncond"] = [sample.negative_caption for sample in first_samples]

        pictures = one_each(images, request.num_prompts)
        is_edit = self.config.task == "i2i"
        # What has to be encoded, each once: one negative prompt is usually shared by all.
        keys = {branch: [(text, i if is_edit else 0) for i, text in enumerate(words[branch])] for branch in words}
        todo = list(dict.fromkeys(key for branch in keys if given[branch] is None for key in keys[branch]))
        encoded: dict[tuple[str | None, int], TextEmbeddings] = {}
        if todo:
            embeddings = self._embed(
                [text for text, _ in todo if text is not None],
                [pictures[i] for _, i in todo] if is_edit else None,
                self._content(request.is_image),
                request.max_sequence_length,
            )
            encoded = dict(zip(todo, embeddings, strict=True))

        device = self.placement.device("dit")
        branches: dict[Branch, list[TextEmbeddings]] = {}
        for branch, embeds in given.items():
            found = [encoded[key] for key in keys[branch]] if embeds is None else embeds.unbind()
            by_prompt = [text.to(device) for text in one_each(found, request.num_prompts)]
            branches[branch] = [by_prompt[sample.prompt] for sample in request.samples]
        return branches

    def _triggers(self) -> str:
        """What the active adapters want before every prompt."""
        return "".join(one["trigger"] for one in self.active_adapters())

    def condition(self, request: Request, inputs: Inputs, images: Sequence[Image.Image]) -> Conditioning:
        """What this task's sampling starts from and is conditioned on, besides text.

        A sample draws its noise first and the picture's latents after it, from the same generator.
        """
        if inputs.conditioning is not None:
            return inputs.conditioning
        generation = self.config.generation
        generators = inputs.generators or [
            torch.Generator(generation.noise_device).manual_seed(sample.seed)
            for sample in request.samples
            if sample.seed is not None
        ]
        shape = (*request.latent_size, self.config.model.dit_params.in_visual_dim)
        # A picture to start from is no condition of the model's, and what goes on from a video has its last frame.
        has_frames = inputs.source is not None or inputs.overlap is not None
        posteriors = [] if has_frames else one_each(self.encode_images(images), request.num_prompts)
        noise, image_latents = [], []
        for i, sample in enumerate(request.samples):
            generator = generators[i % len(generators)]
            if inputs.latents is None:
                noise.append(draw_noise(generator, shape, getattr(torch, generation.noise_dtype)))
            else:
                noise.append(inputs.latents[i].float())
            if posteriors:
                latents = posteriors[sample.prompt].sample(generator).float() * self.vae.scaling_factor
                image_latents.append(latents.view(latents.shape[1], *latents.shape[-2:]).permute(1, 2, 0))  # (H, W, C)
        device = self.placement.device("dit")
        start = self.team.agree(torch.stack([one.to(device) for one in noise]))
        if inputs.source is not None:
            return self._from_source(start, inputs.source, inputs.mask, inputs.source_name)
        if inputs.overlap is not None:
            held = self.encode_video(inputs.overlap).to(start).expand(len(start), -1, -1, -1, -1)
            held, shows = self.team.agree(held.contiguous()), self.config.task == "i2v"
            items = overlap_items(held, shows, generation.visual_cond, inputs.source_name)
            return compose(start, self.dit.in_channels, items)
        if not image_latents:
            return from_text(start, self.dit.in_channels)
        pictures = self.team.agree(torch.stack([one.to(device) for one in image_latents]))
        if self.config.task == "i2v":
            first = frame_item(FIRST_FRAME, pictures, visual_cond=generation.visual_cond)
            return compose(start, self.dit.in_channels, [first, *self._keyframe_items(request, inputs, posteriors)])
        return from_source(start, pictures)

    def _keyframe_items(self, request: Request, inputs: Inputs, firsts: Sequence[Any]) -> list[Item]:
        """The pictures after the first, by the latents that the VAE makes of each alone; `firsts`: the distributions of
        the first ones, one a prompt."""
        device, items, generation = self.placement.device("dit"), [], self.config.generation
        learnt = generation.given_frames == "any"
        for keyframe in inputs.keyframes:
            of_prompts = firsts
            if keyframe.picture is not None:
                fitted = media.fit_image(keyframe.picture, request.width, request.height)
                of_prompts = self.encode_images([fitted]) * request.num_prompts
            modes = [of_prompts[sample.prompt].mode()[0, :, 0] for sample in request.samples]  # (C, H, W) each
            latents = torch.stack(modes).to(device).float().permute(0, 2, 3, 1) * self.vae.scaling_factor
            latents, where = self.team.agree(latents.contiguous()), keyframe.frame
            items.append(keyframe_item(keyframe.name, latents, where, learnt, generation.visual_cond, keyframe.origin))
        return items

    def _from_source(self, noise: Tensor, frames: np.ndarray, mask: np.ndarray | None, origin: str) -> Conditioning:
        """Sampling that starts from frames (T, H, W, 3), which are kept outside of a mask."""
        latents = self.encode_video(frames).to(noise).expand(len(noise), -1, -1, -1, -1)
        keep = None if mask is None else 1 - latent_mask(torch.from_numpy(mask) / 255).to(noise)
        if keep is not None:
            keep = self.team.agree(keep.expand(-1, noise.shape[1], -1, -1, -1).contiguous())
        return compose(noise, self.dit.in_channels, [source_item(self.team.agree(latents.contiguous()), keep, origin)])

    @torch.no_grad()
    def encode_video(self, frames: np.ndarray) -> Tensor:
        """uint8 frames (T, H, W, 3) -> latents (1, T', H', W', C), scaled: the middle of the VAE's distribution."""
        return self.frugally("encode video", None, lambda: self._encode_video(frames))

    def _encode_video(self, frames: np.ndarray) -> Tensor:
        tile, overlap = self.config.model.vae.spatial_tile, self.config.model.vae.spatial_overlap
        tiling = VAETiling(size=tile, overlap=min(overlap, tile // 2))
        with self.placement.use("vae"):
            weight = next(self.vae.parameters())
            x = torch.tensor(frames).to(weight.device).permute(3, 0, 1, 2)[None].contiguous()  # (1, 3, T, H, W)
            x = (x.float() / 127.5 - 1).to(weight.dtype)
            if isinstance(self.vae, AutoencoderKL):
                latents = self.vae.encode(x[:, :, 0], tiling).mode()[:, :, None]
            else:
                latents = self.vae.encode(x, tiling).mode()
            require_finite("the VAE's encoder", latents, self.vae.named_parameters)
        return latents.permute(0, 2, 3, 4, 1).float() * self.vae.scaling_factor

    def encode_images(self, images: Sequence[Image.Image]) -> list[Any]:
        """The VAE's distribution over the latents of each RGB picture, (1, C, H, W) or (1, C, 1, H, W)."""
        return self.frugally("encode image", None, lambda: self._encode_images(images)) if images else []

    def _encode_images(self, images: Sequence[Image.Image]) -> list[Any]:
        posteriors = []
        with self.placement.use("vae"):
            weight = next(self.vae.parameters())
            for image in images:
                pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, H, W)
                x = (pixels.to(weight.device).float() / 127.5 - 1).to(weight.dtype)
                if isinstance(self.vae, AutoencoderKL):
                    posteriors.append(self.vae.encode(x))
                else:
                    posteriors.append(self.vae.encode(x[:, :, None]))
                require_finite("the VAE's encoder", posteriors[-1].mean, self.vae.named_parameters)
        return posteriors
