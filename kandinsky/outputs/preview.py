"""Pictures of what is being denoised: by a tiny decoder, or small and at once, each latent pixel a colour.

The colours come of a linear map that is fitted: `latent_rgb.json` beside a VAE's weights is its own
(tools/fit_latent_rgb.py makes one), and otherwise the published one of that kind of VAE is taken, from the file of that
name here. What is shown is the estimate of the clean latents that a step ends with. Knows latents and files; knows no
requests.
"""

from __future__ import annotations

import importlib.resources
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from kandinsky.common.untrusted import read_json, reason
from kandinsky.models.vae_tiny import TinyDecoder
from kandinsky.outputs import media

logger = logging.getLogger(__name__)


FILE = "latent_rgb.json"
ENLARGED = 4  # a latent pixel is 8 pixels of the result, so that a preview is half as wide
FPS = 24
LATENTS_PER_SECOND = 6  # a latent frame is four frames of the result


class ToPictures(Protocol):
    """Latents (T, H, W, C), scaled -> uint8 frames (3, T', H', W') on the CPU, to be shown `fps` a second."""

    fps: ClassVar[int]

    def __call__(self, latents: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Decoded:
    """By a tiny decoder, as large and long as the result; memory for a frame at a time."""

    decoder: TinyDecoder
    fps: ClassVar[int] = FPS

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """(T, H, W, C) -> uint8 (3, frames, 8 H, 8 W), on the CPU."""
        weight = next(self.decoder.parameters())
        stream = self.decoder.frames(latents.permute(3, 0, 1, 2)[None].to(weight.device, weight.dtype))
        return torch.stack([_to_uint8(frame[0]).cpu() for frame in stream], dim=1)


@dataclass(frozen=True)
class LatentRGB:
    """rgb = (latents - shift) @ factors + bias, in [-1, 1], for scaled latents."""

    fps: ClassVar[int] = LATENTS_PER_SECOND
    factors: Tensor  # (C, 3)
    bias: Tensor  # (3,)
    shift: float = 0.0

    def __call__(self, latents: Tensor) -> Tensor:
        """(T, H, W, C) -> uint8 (3, T, 4 H, 4 W), on the CPU."""
        rgb = (latents.detach().float().cpu() - self.shift) @ self.factors + self.bias  # (T, H, W, 3)
        large = F.interpolate(rgb.permute(0, 3, 1, 2), scale_factor=ENLARGED, mode="bilinear")
        return _to_uint8(large).transpose(0, 1)


def _to_uint8(pixels: Tensor) -> Tensor:
    return (pixels.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def load_latent_rgb(vae_path: str | Path, kind: str) -> LatentRGB:
    """The map of the VAE at `vae_path`, or else the published one of its kind, "hunyuan" or "flux".

    Raises ValueError where the VAE's own file is damaged.
    """
    own = Path(vae_path) / FILE
    if own.is_file():
        try:
            return _from_values(read_json(own))
        except (ValueError, KeyError, TypeError, RuntimeError) as error:  # torch's, for numbers that are none
            why = f"no {error}" if isinstance(error, KeyError) else reason(error)
            raise ValueError(f"{own} holds no linear map from latents to colours ({why}); delete it") from None
    published = json.loads(importlib.resources.files("kandinsky.outputs").joinpath(FILE).read_text(encoding="utf-8"))
    return _from_values(published[kind])


def _from_values(values: dict[str, Any]) -> LatentRGB:
    factors, bias = torch.tensor(values["factors"]), torch.tensor(values["bias"])
    if factors.ndim != 2 or factors.shape[1] != 3 or bias.shape != (3,):
        raise ValueError(f"factors {tuple(factors.shape)}, bias {tuple(bias.shape)}")
    return LatentRGB(factors, bias, float(values.get("shift", 0)))


class Previews:
    """Writes a preview of each output after every n-th step, over the one before.

    One that can't be written is told of, once, and costs no more.
    """

    def __init__(self, every: int, to_pictures: ToPictures, outputs: Sequence[Path]) -> None:
        self.every = every
        self.to_pictures = to_pictures
        self.paths = [media.preview_path(output) for output in outputs]
        self._has_warned = False

    def __call__(self, step: int, num_steps: int, latents: Tensor) -> None:
        """After step `step`, counted from 0: `latents` (samples, T, H, W, C) is the estimate of the clean ones."""
        if (step + 1) % self.every or step + 1 == num_steps:
            return
        for path, sample in zip(self.paths, latents, strict=True):
            frames = self.to_pictures(sample)
            try:
                if path.suffix == media.IMAGE_SUFFIX:
                    media.write_image(frames[:, 0], path)
                else:
                    media.write_video(frames, path, fps=self.to_pictures.fps)
                logger.info("preview after %d of %d steps: %s", step + 1, num_steps, path)
            except OSError as error:
                if not self._has_warned:
                    logger.warning("%s; going on without previews", error)
                self._has_warned = True
