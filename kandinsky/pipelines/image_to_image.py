"""Image to image: the call that people make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky.models.text_embedder import TextEmbeddings
from kandinsky.pipelines.base import ImageSource, Pipeline, StepCallback, as_images


class ImageToImagePipeline(Pipeline):
    """`pipe("make the cat blue", "cat.png")` edits a picture. Built by `kandinsky.get_I2I_pipeline`."""

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        image: ImageSource | Sequence[ImageSource] | None = None,
        width: int | None = None,
        height: int | None = None,
        seed: int | Sequence[int] | None = None,
        num_steps: int | None = None,
        guidance_weight: float | None = None,
        scheduler_scale: float | None = None,
        negative_caption: str | Sequence[str] | None = None,
        expand_prompts: bool | None = None,
        save_path: str | Path | None = None,
        progress: bool = True,
        *,
        num_images_per_prompt: int = 1,
        guidance_interval: Sequence[float] | None = None,
        guidance_every: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: TextEmbeddings | None = None,
        negative_prompt_embeds: TextEmbeddings | None = None,
        output_type: str | None = None,
        callback_on_step_end: StepCallback | None = None,
        max_sequence_length: int | None = None,
    ) -> Any:
        """Edit pictures. None means as the YAML says.

        Args:
            text: what to change; a list makes one picture each.
            image: path, PIL image or uint8 array (H, W), (H, W, 3) or (H, W, 4); one for all prompts or one each. The
                text encoder sees it too.
            width, height: pixels, one of the sizes in the YAML's `generation.resolutions`, both or neither. Without
                them the one nearest in shape; what sticks out of it is cut off evenly on both sides.

        All other arguments, and what is returned, are those of `TextToImagePipeline`. Embeddings given as
        `prompt_embeds` must have been made with the same picture.

        Raises:
            ValueError: for anything that can't be done, before any model runs.
        """
        return self.run(
            text,
            images=as_images(image),
            width=width,
            height=height,
            seed=seed,
            num_steps=num_steps,
            guidance_weight=guidance_weight,
            scheduler_scale=scheduler_scale,
            guidance_interval=guidance_interval,
            guidance_every=guidance_every,
            negative_caption=negative_caption,
            expand_prompts=expand_prompts,
            save_path=save_path,
            progress=progress,
            samples_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            max_sequence_length=max_sequence_length,
        )
