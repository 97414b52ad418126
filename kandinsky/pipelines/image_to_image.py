"""Image to image: the call that people make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import Unpack

from kandinsky.pipelines.base import Pipeline
from kandinsky.pipelines.inputs import ImageSource, as_images
from kandinsky.pipelines.options import CallOptions, task_call


class ImageToImagePipeline(Pipeline):
    """`pipe("make the cat blue", "cat.png")` edits a picture. Built by `kandinsky.get_I2I_pipeline`."""

    @task_call
    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        image: ImageSource | Sequence[ImageSource] | None = None,
        width: int | None = None,
        height: int | None = None,
        *,
        num_images_per_prompt: int = 1,
        **options: Unpack[CallOptions],
    ) -> Any:
        """Edit pictures.

        text: what to change; a list makes one picture each.
        image: path, PIL image or uint8 array (H, W), (H, W, 3) or (H, W, 4); one for all prompts or one each. The text
            encoder sees it too: embeddings given as `prompt_embeds` must have been made with the same picture.
        width, height: pixels, one of the sizes in the YAML's `generation.resolutions`, both or neither. Without them
            the one nearest in shape; what sticks out of it is cut off evenly on both sides.
        num_images_per_prompt: how many pictures each prompt makes.
        """
        return self.run(
            text,
            images=as_images(image),
            width=width,
            height=height,
            samples_per_prompt=num_images_per_prompt,
            **options,
        )
