"""ComfyUI's LATENT for Kandinsky 5, from and to ours.

ComfyUI keeps latents as the VAE's encoder gives them: its samplers multiply by the model's scale when they begin and
divide when they end (`process_in` and `process_out` in comfy/latent_formats.py), and its VAE nodes take and give them
unscaled. A LATENT is a dict, whose `samples` are (B, 16, T, H / 8, W / 8) for videos and (B, 16, H / 8, W / 8) for
pictures. Ours are (B, T, H / 8, W / 8, 16), times the VAE's scaling factor: 0.476986 for HunyuanVideo's VAE, which is
the scale of ComfyUI's format of that name, and 0.3611 for FLUX.1's. ComfyUI's format for the latter also shifts, by
0.1159, on the way into a model; what is outside of models is unshifted there as well, so that the VAE's own numbers are
the common ground and no shift is needed here.

Dividing by the scale and multiplying by it again is off by a rounding in float32. So a LATENT from here also carries
ours as they were, which count for as long as its samples are those that were made from them, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CUT = "kandinsky5_cut"  # how many frames were there before, and whether the last latent frame is the first one
EXACT = "kandinsky5_scaled"  # what samples were made from; other nodes hand unknown keys on
CHANNELS = 16


def to_native(scaled: Tensor, scaling_factor: float) -> dict[str, Any]:
    """LATENT of scaled latents (B, T, H, W, C), float32."""
    return {"samples": _samples(scaled, scaling_factor), EXACT: scaled.cpu()}


def from_native(latent: dict[str, Any], scaling_factor: float) -> Tensor:
    """Scaled latents (B, T, H, W, C), float32, of any LATENT. Raises ValueError where it is another model family's."""
    samples = latent["samples"]
    if samples.ndim not in (4, 5) or samples.shape[1] != CHANNELS:
        raise ValueError(
            f"the latents are {tuple(samples.shape)}; Kandinsky 5 has (batch, {CHANNELS}, frames, rows, columns) for "
            f"videos and (batch, {CHANNELS}, rows, columns) for pictures"
        )
    exact = latent.get(EXACT)
    if exact is not None and torch.equal(samples, _samples(exact, scaling_factor)):
        return exact
    videos = samples if samples.ndim == 5 else samples[:, :, None]
    return videos.float().permute(0, 2, 3, 4, 1) * scaling_factor


def _samples(scaled: Tensor, scaling_factor: float) -> Tensor:
    """(B, T, H, W, C) -> (B, C, T, H, W), of pictures (B, C, H, W); on the CPU, where ComfyUI keeps latents."""
    samples = (scaled.float() / scaling_factor).permute(0, 4, 1, 2, 3).contiguous().cpu()
    return samples[:, :, 0] if samples.shape[2] == 1 else samples
