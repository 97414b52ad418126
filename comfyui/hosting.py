"""What a run tells ComfyUI, and what it hears from it: progress, a preview, and whether somebody has pressed Cancel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from kandinsky.outputs import media
from kandinsky.pipelines.base import Pipeline
from kandinsky.request import Request
from kandinsky.sampling.sampler import flow_timesteps

PREVIEW_PIXELS = 512  # of the longer side, at most


class Progress:
    """A pipeline's callback for one request: a step further, with a preview where the pipeline can make one.

    Raises ComfyUI's InterruptProcessingException between two steps, once somebody has asked for it.
    """

    def __init__(self, request: Request) -> None:
        self.steps = request.num_steps
        self.sigmas = flow_timesteps(request.num_steps, request.scheduler_scale, request.schedule)
        self.bar = comfy.utils.ProgressBar(self.steps)
        self.before: Tensor | None = None  # the latents that the step that runs began with

    def __call__(self, pipeline: Pipeline, step: int, timestep: Tensor, tensors: Mapping[str, Any]) -> None:
        stop_where_asked()
        latents = tensors["latents"]
        self.bar.update_absolute(step + 1, self.steps, self.preview(pipeline, step, latents))
        self.before = latents

    def preview(self, pipeline: Pipeline, step: int, latents: Tensor) -> tuple[str, Any, int] | None:
        """As ComfyUI's bar takes it: format, picture, longest side. Of a video, the frame in the middle."""
        if self.before is None or pipeline.latent_rgb is None:
            return None
        sigma, next_sigma = float(self.sigmas[step]), float(self.sigmas[step + 1])
        middle = latents.shape[1] // 2
        frames = slice(middle, middle + 1)
        # As far along the step's straight line as it takes to get to sigma 0.
        clean = torch.lerp(self.before[0, frames], latents[0, frames], sigma / (sigma - next_sigma))
        return "JPEG", media.to_pil(pipeline.latent_rgb(clean)[:, 0]), PREVIEW_PIXELS


def stop_where_asked() -> None:
    """Raise ComfyUI's InterruptProcessingException where somebody has pressed Cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()
