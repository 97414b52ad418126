"""Text to video: the call that people make."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from kandinsky.media import to_pil
from kandinsky.pipelines.base import Pipeline
from kandinsky.request import resolve_request

if TYPE_CHECKING:
    from PIL import Image


class TextToVideoPipeline(Pipeline):
    """`pipe("a cat ...")` makes a video. Built by `kandinsky.get_T2V_pipeline`."""

    def __call__(
        self,
        text: str,
        time_length: float | None = None,
        width: int | None = None,
        height: int | None = None,
        seed: int | None = None,
        num_steps: int | None = None,
        guidance_weight: float | None = None,
        scheduler_scale: float | None = None,
        negative_caption: str | None = None,
        expand_prompts: bool = False,
        save_path: str | Path | None = None,
        progress: bool = True,
    ) -> Tensor | list[Image.Image]:
        """Generate a video, or with `time_length=0` a picture. None means as the YAML says.

        Args:
            text: what to show.
            time_length: seconds at 24 frames a second.
            width, height: pixels, multiples of 16.
            seed: the same seed gives the same noise on every device; None draws one.
            num_steps: Euler steps.
            guidance_weight: classifier-free guidance; 1 switches it off and halves the time.
            scheduler_scale: shift of the schedule towards noise.
            negative_caption: what not to show; used by guidance.
            expand_prompts: not part of this version; True raises ValueError.
            save_path: MP4 (PNG for a picture) to write, with a JSON file of all settings beside it.
            progress: whether to show a progress bar.

        Returns:
            uint8 (1, 3, frames, height, width) on the CPU, or a list of one PIL image.

        Raises:
            ValueError: for anything that can't be done, before any model runs.
        """
        if expand_prompts:
            raise ValueError("expand_prompts=True: prompt expansion is not part of this version; leave it out")
        request = resolve_request(
            self.config,
            text,
            time_length=time_length,
            width=width,
            height=height,
            seed=seed,
            num_steps=num_steps,
            guidance_weight=guidance_weight,
            scheduler_scale=scheduler_scale,
            negative_caption=negative_caption,
        )
        pixels = self.generate(request, save_path, progress)
        return [to_pil(picture[:, 0]) for picture in pixels] if request.is_image else pixels
