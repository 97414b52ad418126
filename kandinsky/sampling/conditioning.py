"""What the model sees besides text: the noise to start from, and the channels that condition on a picture.

This is the only place where the tasks differ from each other:

- text to video, text to image: nothing but noise; checkpoints with a visual condition get zeros (`from_text`);
- image to video: the first latent frame is the picture's and stays so at every step; a mask says which frame that is,
  the condition channels are zeros, or hold the picture there once more (`from_first_frame`);
- image to image: the condition channels hold the source picture's latents, the mask is one (`from_source`).

Knows tensors and generators; knows no models and no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# First-frame normalisation: which latent frames are brought close to which later ones, and how far at most.
NORMALIZED_FRAMES = 4
REFERENCE_FRAMES = 5
MEAN_RANGE = (-0.05, 0.1)
STD_RANGE = (-0.1, 0.25)


def draw_noise(generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian noise of `shape`, float32, on the generator's device.

    A generator on the CPU and float32 mean the same video on every machine; one on a GPU and bfloat16 draw what the
    original implementation draws.
    """
    return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype).float()


@dataclass(frozen=True)
class Conditioning:
    """Where the sampler starts, and what holds at every step.

    noise (B, T, H, W, C) float32; extra (B, T, H, W, C + 1), condition latents and mask, or None where the model takes
    the latents alone; first_frame (B, 1, H, W, C), clean latents of a picture that the video begins with, or None.
    """

    noise: Tensor
    extra: Tensor | None = None
    first_frame: Tensor | None = None

    def model_input(self, latents: Tensor) -> Tensor:
        """(B, T, H, W, C) -> (B, T, H, W, C_in), what the model takes."""
        return latents if self.extra is None else torch.cat((latents, self.extra.to(latents.dtype)), dim=-1)

    def hold(self, latents: Tensor) -> Tensor:
        """The latents with the picture in the first frame, where there is one."""
        return latents if self.first_frame is None else torch.cat((self.first_frame, latents[:, 1:]), dim=1)


def from_text(noise: Tensor, in_channels: int) -> Conditioning:
    """Conditioning on text alone: where the model has channels for a picture, they and the mask are zero."""
    extra_channels = in_channels - noise.shape[-1]
    extra = noise.new_zeros((*noise.shape[:-1], extra_channels)) if extra_channels else None
    return Conditioning(noise, extra)


def from_first_frame(noise: Tensor, image_latents: Tensor, visual_cond: str = "zeros") -> Conditioning:
    """Conditioning on the picture that a video begins with; image_latents (B, H, W, C), scaled.

    visual_cond: "zeros", as the original leaves the first frame's condition channels, or "image": the picture's latents
    there too, as diffusers had it up to 0.39.
    """
    extra = noise.new_zeros((*noise.shape[:-1], noise.shape[-1] + 1))
    extra[:, 0, :, :, -1] = 1
    if visual_cond == "image":
        extra[:, 0, :, :, :-1] = image_latents
    return Conditioning(noise, extra, image_latents[:, None].to(noise))


def from_source(noise: Tensor, image_latents: Tensor) -> Conditioning:
    """Conditioning on a picture to edit; noise (B, 1, H, W, C), image_latents (B, H, W, C), scaled."""
    source = image_latents[:, None].to(noise)
    return Conditioning(noise, torch.cat((source, torch.ones_like(source[..., :1])), dim=-1))


def normalize_first_frames(latents: Tensor, statistics: str = "each") -> Tensor:
    """Bring mean and spread of the first four latent frames close to those of the next five: against the flash of
    contrast with which a video leaves its first picture.

    latents (B, T, H, W, C). Every frame moves by itself, within fixed limits, as published; with `statistics`
    "together" the four as one, as in diffusers. With fewer than five latent frames there is nothing to compare with
    and the latents come back as they are.
    """
    if latents.shape[1] <= NORMALIZED_FRAMES:
        return latents
    frames, reference = latents[:, :NORMALIZED_FRAMES], latents[:, NORMALIZED_FRAMES:][:, :REFERENCE_FRAMES]
    own = (2, 3, 4) if statistics == "each" else (1, 2, 3, 4)
    mean, std = (m.float() for m in _moments(frames, dims=own))  # (B, 4 or 1, 1, 1, 1)
    wanted_mean, wanted_std = _moments(reference, dims=(1, 2, 3, 4))  # (B, 1, 1, 1, 1)
    wanted_mean = wanted_mean.clamp(mean + MEAN_RANGE[0], mean + MEAN_RANGE[1])
    wanted_std = wanted_std.clamp(std + STD_RANGE[0], std + STD_RANGE[1])
    # A frame of one value has no spread to change; dividing by it would make NaN.
    scale = torch.where(std > 0, wanted_std / std, torch.ones_like(std))
    return torch.cat(((frames - mean) * scale + wanted_mean, latents[:, NORMALIZED_FRAMES:]), dim=1)


def _moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    std, mean = torch.std_mean(x, dim=dims, keepdim=True)
    return mean, std
