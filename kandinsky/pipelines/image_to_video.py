"""Image to video: the call that people make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky.models.text_embedder import TextEmbeddings
from kandinsky.pipelines.base import ImageSource, Pipeline, StepCallback, as_images


class ImageToVideoPipeline(Pipeline):
    """`pipe("the cat jumps", "cat.png")` makes a video that begins with the picture. Built by
    `kandinsky.get_I2V_pipeline`."""

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        image: ImageSource | Sequence[ImageSource] | None = None,
        time_length: float | None = None,
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
        num_frames: int | None = None,
        num_videos_per_prompt: int = 1,
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
        """Generate videos that begin with `image`. None means as the YAML says.

        Args:
            text: what happens; a list makes one video each.
            image: path, PIL image or uint8 array (H, W), (H, W, 3) or (H, W, 4); one for all prompts or one each.
            width, height: pixels, multiples of 16; both or neither. Without them the picture's aspect decides. What
                sticks out is cut off evenly on both sides.

        All other arguments are those of `TextToVideoPipeline`.

        Returns:
            As `TextToVideoPipeline` does.

        Raises:
            ValueError: for anything that can't be done, before any model runs.
        """
        return self.run(
            text,
            images=as_images(image),
            time_length=time_length,
            num_frames=num_frames,
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
            samples_per_prompt=num_videos_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            max_sequence_length=max_sequence_length,
        )
