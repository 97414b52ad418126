"""What a call brings besides words and numbers: pictures, generators, tensors. Looked at before anything is encoded.

What words and numbers may be is for request.py to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kandinsky.keyframes import Keyframe
from kandinsky.outputs import media
from kandinsky.outputs.sources import ImageSource as ImageSource
from kandinsky.outputs.sources import Media
from kandinsky.pipelines.calls import check_latents, check_save_path
from kandinsky.pipelines.culprits import require_finite_input
from kandinsky.pipelines.parts import Parts, Value
from kandinsky.request import Request
from kandinsky.sampling.conditioning import Conditioning
from kandinsky.text.embeddings import TextEmbeddings

OUTPUT_TYPES = ("uint8", "pil", "np", "pt", "latent")


@dataclass(frozen=True)
class Inputs(Media):
    """What a call brings besides words and numbers.

    images: none, one for all prompts, or one a prompt. generators: none (seeds are used), one that all samples draw
    from in turn, or one a sample. latents: (samples, T, H, W, C), in place of the noise. conditioning: in place of
    noise, latents and pictures, all of them on the DiT's device.
    """

    generators: Sequence[torch.Generator] = ()
    latents: Tensor | None = None
    prompt_embeds: TextEmbeddings | None = None
    negative_prompt_embeds: TextEmbeddings | None = None
    conditioning: Conditioning | None = None
    keyframes: Sequence[Keyframe] = ()  # further pictures of the video, for all prompts


NO_INPUTS = Inputs()


class CheckedInputs(Parts):
    """What is checked of a request with its inputs, before anything is encoded."""

    def check_inputs(
        self, request: Request, inputs: Inputs, save_path: str | Path | None = None, output_type: str = "uint8"
    ) -> None:
        """Raise ValueError for tensors, generators and output settings that don't go with the request."""
        samples = len(request.samples)
        check_save_path(save_path)
        if request.expand_prompts and self.expander is None and self.team.is_first:
            raise ValueError("expand_prompts is on, but this checkpoint's Qwen can read and not write: leave it out")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; choose one of {', '.join(OUTPUT_TYPES)}")
        for generator in inputs.generators:
            if not isinstance(generator, torch.Generator):
                raise ValueError(f"generator is {generator!r}; it must be a torch.Generator or a list of them")
        if len(inputs.generators) not in (0, 1, samples):
            raise ValueError(f"{len(inputs.generators)} generators for {samples} outputs: give one, or one for each")
        if inputs.latents is not None:
            channels = self.config.model.dit_params.in_visual_dim
            check_latents(inputs.latents, (samples, *request.latent_size, channels))
        if inputs.negative_prompt_embeds is not None:
            rows = self._checked_embeds("negative_prompt_embeds", inputs.negative_prompt_embeds)
            if rows not in (1, request.num_prompts):
                raise ValueError(f"negative_prompt_embeds are of {rows} prompts, not of 1 or {request.num_prompts}")
        if save_path is not None:
            if output_type == "latent":
                raise ValueError("output_type='latent' makes no picture that save_path could be written to")
            suffix = media.IMAGE_SUFFIX if request.is_image else media.VIDEO_SUFFIX
            for path in media.output_paths(save_path, samples):
                media.check_writable(path, suffix)

    def _checked_embeds(self, name: str, embeds: object) -> int:
        """How many prompts `embeds` are of. Raises ValueError where they are not this model's."""
        if not isinstance(embeds, TextEmbeddings):
            raise ValueError(f"{name} is a {type(embeds).__name__}; give what pipe.encode_prompt(...) returns")
        dit = self.config.model.dit_params
        widths = embeds.text_embeds.shape[-1], embeds.pooled_embeds.shape[-1]
        if widths != (dit.in_text_dim, dit.in_text_dim2):
            raise ValueError(
                f"{name} are {widths[0]} and {widths[1]} wide; this model takes {dit.in_text_dim} and "
                f"{dit.in_text_dim2}: encode the prompt with this pipeline's encode_prompt"
            )
        require_finite_input(name, embeds.text_embeds, embeds.pooled_embeds)
        return len(embeds.text_embeds)


def as_images(image: ImageSource | Sequence[ImageSource] | None) -> list[ImageSource]:
    """None, one picture or several, as a list."""
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]  # type: ignore[list-item]


def one_each(values: Sequence[Value], count: int) -> list[Value]:
    """A value for each of `count` prompts, where one may stand for all."""
    return list(values) * count if len(values) == 1 else list(values)
