"""Text to image: the call that people make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from kandinsky.pipelines.base import Pipeline
from kandinsky.pipelines.inputs import ImageSource, as_images
from kandinsky.pipelines.options import CallOptions, task_call


class TextToImagePipeline(Pipeline):
    """`pipe("a cat ...")` draws a picture. Built by `kandinsky.get_T2I_pipeline`."""

    @task_call
    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        width: int | None = None,
        height: int | None = None,
        *,
        num_images_per_prompt: int = 1,
        image: ImageSource | None = None,
        strength: float | None = None,
        mask: str | Path | None = None,
        **options: Unpack[CallOptions],
    ) -> Any:
        """Draw pictures.

        text: what to show; a list makes one picture each.
        width, height: pixels, one of the sizes in the YAML's `generation.resolutions`.
        num_images_per_prompt: how many pictures each prompt makes.
        image: with `strength` or `mask`, a picture to start from, for all prompts: layout and colours come from it.
        strength: how far to go from it: the share of the steps taken, 0 (the same) to 1 (noise alone). None: 0.6.
        mask: a picture, white where `image` may change.
        """
        return self.run(
            text,
            images=as_images(image),
            width=width,
            height=height,
            samples_per_prompt=num_images_per_prompt,
            strength=strength,
            mask=mask,
            **options,
        )
