"""Text to image: the call that people make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky.models.text_embedder import TextEmbeddings
from kandinsky.pipelines.base import Pipeline, StepCallback


class TextToImagePipeline(Pipeline):
    """`pipe("a cat ...")` draws a picture. Built by `kandinsky.get_T2I_pipeline`."""

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
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
        """Draw pictures. None means as the YAML says.

        Args:
            text: what to show; a list makes one picture each.
            width, height: pixels, one of the sizes in the YAML's `generation.resolutions`.
            save_path: PNG to write, with a JSON file of all settings beside it; further pictures get the same name
                with a number.
            num_images_per_prompt: how many pictures each prompt makes.
            output_type: "pil" (the default), "uint8", "np", "pt" or "latent".

        All other arguments are those of `TextToVideoPipeline`.

        Returns:
            "pil": a list of pictures. "uint8": (pictures, 3, height, width) on the CPU. "pt": the same as float32 in
            [0, 1], and "np": (pictures, height, width, 3). "latent": (pictures, 1, height / 8, width / 8, 16), as the
            VAE's times its scaling factor.

        Raises:
            ValueError: for anything that can't be done, before any model runs.
        """
        return self.run(
            text,
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
