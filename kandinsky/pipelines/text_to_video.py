"""Text to video: the call that people make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from kandinsky.pipelines.base import Pipeline
from kandinsky.pipelines.options import CallOptions, task_call


class TextToVideoPipeline(Pipeline):
    """`pipe("a cat ...")` makes a video. Built by `kandinsky.get_T2V_pipeline`."""

    @task_call
    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        time_length: float | None = None,
        width: int | None = None,
        height: int | None = None,
        *,
        num_frames: int | None = None,
        num_videos_per_prompt: int = 1,
        video: str | Path | None = None,
        strength: float | None = None,
        mask: str | Path | None = None,
        **options: Unpack[CallOptions],
    ) -> Any:
        """Generate videos, or with `time_length=0` pictures.

        text: what to show; a list makes one video each.
        time_length: seconds at 24 frames a second; or `num_frames`, 4n + 1.
        width, height: pixels, multiples of 16.
        num_videos_per_prompt: how many videos each prompt makes.
        video: a file or a folder of frames to start from, for all prompts: layout and motion come from it. Brought to
            24 frames a second and the size nearest to its own.
        strength: how far to go from it: the share of the steps taken, 0 (the same) to 1 (noise alone). None: 0.6.
        mask: white where the video may change: a picture for all frames, or a video or folder with one each.
        """
        return self.run(
            text,
            time_length=time_length,
            num_frames=num_frames,
            width=width,
            height=height,
            samples_per_prompt=num_videos_per_prompt,
            video=video,
            strength=strength,
            mask=mask,
            **options,
        )
