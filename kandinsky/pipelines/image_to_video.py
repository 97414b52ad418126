"""Image to video: the call that people make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import Unpack

from kandinsky.pipelines.base import Pipeline
from kandinsky.pipelines.inputs import ImageSource, as_images
from kandinsky.pipelines.options import CallOptions, task_call


class ImageToVideoPipeline(Pipeline):
    """`pipe("the cat jumps", "cat.png")` makes a video that begins with the picture. Built by
    `kandinsky.get_I2V_pipeline`."""

    @task_call
    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        image: ImageSource | Sequence[ImageSource] | None = None,
        time_length: float | None = None,
        width: int | None = None,
        height: int | None = None,
        *,
        num_frames: int | None = None,
        num_videos_per_prompt: int = 1,
        last_image: ImageSource | None = None,
        loop: bool = False,
        keyframes: Mapping[float, ImageSource] | None = None,
        **options: Unpack[CallOptions],
    ) -> Any:
        """Generate videos that begin with `image`.

        text: what happens; a list makes one video each.
        image: path, PIL image or uint8 array (H, W), (H, W, 3) or (H, W, 4); one for all prompts or one each.
        time_length: seconds at 24 frames a second; or `num_frames`, 4n + 1.
        width, height: pixels, multiples of 16; both or neither. Without them the picture's aspect decides. What sticks
            out is cut off evenly on both sides.
        num_videos_per_prompt: how many videos each prompt makes.
        last_image: the picture that the videos end with.
        loop: have them end as they begin; the last frame, which would be the first one again, is left out.
        keyframes: seconds -> the picture at that time. All three are experimental where the config's
            `generation.given_frames` is "first", as with the published checkpoints.
        """
        return self.run(
            text,
            images=as_images(image),
            time_length=time_length,
            num_frames=num_frames,
            width=width,
            height=height,
            samples_per_prompt=num_videos_per_prompt,
            last_image=last_image,
            loop=loop,
            keyframes=keyframes,
            **options,
        )
