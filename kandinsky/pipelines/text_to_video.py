"""Text to video: the call that people make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky.models.text_embedder import TextEmbeddings
from kandinsky.pipelines.base import Pipeline, StepCallback


class TextToVideoPipeline(Pipeline):
    """`pipe("a cat ...")` makes a video. Built by `kandinsky.get_T2V_pipeline`."""

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
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
        """Generate videos, or with `time_length=0` pictures. None means as the YAML says.

        Args:
            text: what to show; a list makes one video each.
            time_length: seconds at 24 frames a second; or `num_frames`, 4n + 1.
            width, height: pixels, multiples of 16.
            seed: the same seed gives the same video on every device; None draws one. Further videos get the numbers
                that follow; a list gives every video its own.
            num_steps: Euler steps.
            guidance_weight: classifier-free guidance; 1 switches it off and halves the time.
            scheduler_scale: shift of the schedule towards noise.
            negative_caption: what not to show; used by guidance. One for all prompts or one each.
            expand_prompts: have Qwen write a short prompt out first; None: as the YAML says, else where it can.
            save_path: MP4 (PNG for a picture) to write, with a JSON file of all settings beside it; further videos
                get the same name with a number.
            progress: whether to show a progress bar.
            num_videos_per_prompt: how many videos each prompt makes.
            guidance_interval: (begin, end), shares of the steps: guidance runs in step i of n where begin <= i / n <
                end, and the other steps take half the time.
            guidance_every: k: of the steps with guidance, the first and each k-th after it evaluate the negative
                prompt; those between reuse the difference that it made.
            generator: random generators in place of seeds: one that all videos draw from in turn, or one a video.
            latents: (videos, latent frames, height / 8, width / 8, 16), in place of the noise.
            prompt_embeds, negative_prompt_embeds: from `encode_prompt`, in place of words.
            output_type: "uint8" (the default for videos), "pil" (for pictures), "np", "pt" or "latent".
            callback_on_step_end: `f(pipe, step, timestep, tensors)` after every step. `tensors` holds "latents", and
                lists of one `TextEmbeddings` a video as "prompt_embeds" and "negative_prompt_embeds"; what it returns
                under these names replaces them. Setting `pipe.interrupt = True` ends the run with what there is.
            max_sequence_length: tokens of a prompt that are read, up to 1024.

        Returns:
            "uint8": (videos, 3, frames, height, width) on the CPU. "pt": (videos, frames, 3, height, width) and "np":
            (videos, frames, height, width, 3), float32 in [0, 1]. "pil": a list of PIL frames a video. Of pictures
            without the axis of frames: "pil" is a list of pictures. "latent": (videos, latent frames, rows, columns,
            16), as the VAE's times its scaling factor.

        Raises:
            ValueError: for anything that can't be done, before any model runs.
        """
        return self.run(
            text,
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
