"""What the model sees besides text: the noise to start from, and the channels that condition on a picture.

This is the only place where the tasks differ from each other. Text to video starts from noise and conditions on no
picture; checkpoints with a visual condition then get zeros. Knows tensors and seeds; knows no models and no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Where the sampler starts, and what is appended to the latents' channels at every step.

    noise (B, T, H, W, C) float32; extra (B, T, H, W, C + 1), condition latents and mask, or None where the model
    takes the latents alone.
    """

    noise: Tensor
    extra: Tensor | None

    def model_input(self, latents: Tensor) -> Tensor:
        """(B, T, H, W, C) -> (B, T, H, W, C_in), what the model takes."""
        return latents if self.extra is None else torch.cat((latents, self.extra.to(latents.dtype)), dim=-1)


def draw_noise(
    seeds: Sequence[int],
    shape: tuple[int, int, int, int],
    device: torch.device | str,
    noise_device: torch.device | str = "cpu",
    noise_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Gaussian noise (len(seeds), *shape) on `device`, float32; sample i depends on seeds[i] and on nothing else.

    Drawn on the CPU in float32 by default, so that a seed means the same video on every machine;
    `noise_device="cuda", noise_dtype=torch.bfloat16` draws what the original implementation draws.
    """
    samples = []
    for seed in seeds:
        generator = torch.Generator(noise_device).manual_seed(seed)
        samples.append(torch.randn(shape, generator=generator, device=noise_device, dtype=noise_dtype))
    return torch.stack(samples).to(device=device, dtype=torch.float32)


def text_to_video(noise: Tensor, in_channels: int) -> Conditioning:
    """Conditioning on text alone: where the model has channels for a picture, they and the mask are zero."""
    extra_channels = in_channels - noise.shape[-1]
    extra = noise.new_zeros((*noise.shape[:-1], extra_channels)) if extra_channels else None
    return Conditioning(noise, extra)
