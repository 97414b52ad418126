"""First steps on a smaller grid: what the model is conditioned on there, and the way from it to the full one.

Layout and motion are settled while there is much noise, and a grid of half the sides is a quarter of the tokens. At the
switch the estimate of the clean latents is enlarged and gets the noise of the current level, as in cascaded and
pyramidal sampling (Jin et al. 2024, "Pyramidal Flow Matching", arXiv 2410.05954, train a model for it; here it is any
model, as it is).

Everything coarse is computed from what there is at full size, so that a run that is gone on with needs no more than
that. The coarse noise is the mean of the full one over each coarse cell, at unit variance: both grids begin with the
same large shapes. Knows tensors; knows no models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from kandinsky.coarse import CoarseSteps
from kandinsky.sampling.conditioning import PIXELS_PER_LATENT, Conditioning, towards_noise


@dataclass(frozen=True)
class Grids:
    """A request's conditioning at each step: coarse before step `switch`, full from there on; 0: full at all."""

    full: Conditioning
    coarse: Conditioning
    switch: int = 0

    def at(self, step: int) -> Conditioning:
        """Of the latents that enter this step."""
        return self.coarse if step < self.switch else self.full

    def to_full(self, clean: Tensor, sigma: float) -> Tensor:
        """Estimated clean latents (B, T, h, w, C) of the coarse grid -> latents (B, T, H, W, C) that enter the step
        `switch`, of that noise level, with what the conditions hold in them."""
        latents = towards_noise(enlarged(clean, self.full.noise), self.full.noise, sigma)
        return self.full.hold(latents, sigma, self.switch)


def grids_of(conditioning: Conditioning, coarse: CoarseSteps | None) -> Grids:
    """`conditioning` is that of the full size."""
    if coarse is None:
        return Grids(conditioning, conditioning)
    rows, columns = coarse.height // PIXELS_PER_LATENT, coarse.width // PIXELS_PER_LATENT
    return Grids(conditioning, coarsened(conditioning, rows, columns), coarse.steps)


def coarsened(conditioning: Conditioning, rows: int, columns: int) -> Conditioning:
    """The same conditions on a grid of so many latent rows and columns: means over its cells."""
    items = tuple(
        replace(
            item,
            latents=pooled(item.latents, rows, columns),
            region=None if item.region is None else pooled(item.region, rows, columns),
        )
        for item in conditioning.items
    )
    extra = None if conditioning.extra is None else pooled(conditioning.extra, rows, columns)
    return Conditioning(pooled_noise(conditioning.noise, rows, columns), extra, items)


def pooled(x: Tensor, rows: int, columns: int) -> Tensor:
    """(B, T, H, W, C) -> (B, T, rows, columns, C): means."""
    images = x.flatten(0, 1).permute(0, 3, 1, 2)  # (B T, C, H, W)
    small = functional.adaptive_avg_pool2d(images, (rows, columns))
    return small.permute(0, 2, 3, 1).unflatten(0, x.shape[:2]).contiguous()


def pooled_noise(noise: Tensor, rows: int, columns: int) -> Tensor:
    """Means of white noise of unit variance, brought back to unit variance."""

    def counts(length: int, cells: int) -> Tensor:
        """How many places each cell is the mean of, as adaptive pooling cuts them."""
        cell = torch.arange(cells, device=noise.device)
        return (-(-(cell + 1) * length // cells) - cell * length // cells).to(noise.dtype)

    places = counts(noise.shape[2], rows)[:, None] * counts(noise.shape[3], columns)  # (rows, columns)
    return pooled(noise, rows, columns) * places.sqrt()[..., None]


def enlarged(x: Tensor, like: Tensor) -> Tensor:
    """(B, T, h, w, C) -> (B, T, H, W, C) of `like`, bicubic in rows and columns."""
    images = x.flatten(0, 1).permute(0, 3, 1, 2)  # (B T, C, h, w)
    large = functional.interpolate(images, size=tuple(like.shape[2:4]), mode="bicubic", align_corners=False)
    return large.permute(0, 2, 3, 1).unflatten(0, x.shape[:2]).contiguous()
