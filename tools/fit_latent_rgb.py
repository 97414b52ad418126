"""Fits the linear map from a tiny VAE's latents to colours that previews are made with, and writes it beside the VAE.

    python tools/fit_latent_rgb.py --config configs/config_tiny_t2v.yaml
    python tools/fit_latent_rgb.py --config configs/config_tiny_t2i.yaml

Least squares over latent pixels of clips or pictures that the checkpoint was trained on: each latent pixel's channels
against the mean colour of the pixels that it stands for. Prints how much of the colours' variance the map explains, on
clips that were not fitted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs without the project being installed

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kandinsky.config.reading import load_config
from kandinsky.loading.assemble import locate_weights
from kandinsky.loading.vae import load_vae
from kandinsky.outputs import media
from kandinsky.outputs.preview import FILE
from kandinsky.request import FRAMES_PER_LATENT, PIXELS_PER_LATENT
from tools import tiny_world


def colours_of(pixels: Tensor) -> Tensor:
    """Pixels (3, T, H, W) in [-1, 1] -> the mean colour of each latent pixel, (latent frames, H / 8, W / 8, 3)."""
    small = F.avg_pool2d(pixels.transpose(0, 1), PIXELS_PER_LATENT)  # (T, 3, H / 8, W / 8)
    first, rest = small[:1], small[1:]
    rest = rest.view(-1, FRAMES_PER_LATENT, *small.shape[1:]).mean(1)
    return torch.cat((first, rest)).permute(0, 2, 3, 1)


def fit(latents: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of latents (N, C) and of colours (N, 3) -> factors (C, 3) and bias (3,)."""
    ones = torch.ones(len(latents), 1, dtype=torch.float64)
    solution = torch.linalg.lstsq(torch.cat((latents.double(), ones), dim=1), colours.double()).solution
    return solution[:-1].float(), solution[-1].float()


def explained(latents: Tensor, colours: Tensor, factors: Tensor, bias: Tensor) -> float:
    """Share of the colours' variance, 1 at best."""
    error = (latents @ factors + bias - colours).square().mean()
    return float(1 - error / colours.var(dim=0, correction=0).mean())


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="of a tiny checkpoint, whose VAE is taken")
    parser.add_argument("--num", type=int, default=24, help="clips or pictures; a quarter is for the check")
    args = parser.parse_args(argv)
    config = load_config(args.config)
    path = locate_weights("vae", None, config.model.vae.checkpoint_path, config, "./weights/")
    vae = load_vae(path, "cpu", torch.float32, config.model.vae.name)
    is_video = config.model.vae.name == "hunyuan"

    rows: list[tuple[Tensor, Tensor]] = []
    for seed in range(args.num):
        rng = np.random.default_rng(seed)
        if is_video:
            frames = tiny_world.render(tiny_world.sample_scene(rng), num_frames=9, size=64)
        else:
            frames = tiny_world.render_picture(tiny_world.sample_picture(rng))[None]
        pixels = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1  # (3, T, H, W)
        posterior = vae.encode(pixels[None] if is_video else pixels[None, :, 0])
        latents = posterior.mode() * vae.scaling_factor  # (1, C, [T,] H / 8, W / 8)
        latents = latents.view(latents.shape[1], -1, *latents.shape[-2:]).permute(1, 2, 3, 0)
        rows.append((latents.flatten(0, 2), colours_of(pixels).flatten(0, 2)))

    held_out = args.num // 4
    latents, colours = (torch.cat(parts) for parts in zip(*rows[held_out:], strict=True))
    factors, bias = fit(latents, colours)
    unseen = [torch.cat(parts) for parts in zip(*rows[:held_out], strict=True)]
    print(f"explains {explained(unseen[0], unseen[1], factors, bias):.1%} of the variance")
    values = {
        "source": f"python tools/fit_latent_rgb.py --config {args.config}",
        "factors": [[round(value, 4) for value in row] for row in factors.tolist()],
        "bias": [round(value, 4) for value in bias.tolist()],
    }
    with media.atomic_path(path / FILE) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print(path / FILE)


if __name__ == "__main__":
    main()
