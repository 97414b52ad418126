"""What an old YAML file does not say, derived from what it does say."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


VIDEO_NEGATIVE_CAPTION = (
    "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, deformed, "
    "walking backwards"
)

# (width, height) in pixels: the sizes that the published checkpoints were trained for.
SD_SIZES = ((512, 512), (768, 512), (512, 768))
HD_SIZES = ((1024, 1024), (1408, 640), (640, 1408), (1280, 768), (768, 1280), (1152, 896), (896, 1152))

# Where download_models.py puts the tiny decoders of the VAEs' latents.
TINY_PATHS = {
    "hunyuan": "./weights/taehv/taehv.safetensors",
    "flux": "./weights/taef1/diffusion_pytorch_model.safetensors",
}


def fill_defaults(values: dict[str, Any]) -> None:
    """Derive what an old YAML file does not say. What a file says is never changed."""
    metrics = values.setdefault("metrics", {})
    model = values.setdefault("model", {})
    generation = values.setdefault("generation", {})
    if not values.get("magcache", {}).get("mag_ratios"):  # an empty list says the same as none
        values.get("magcache", {}).pop("mag_ratios", None)
    name = _variant_name(model.get("checkpoint_path", ""))

    if "task" not in values:
        if model.get("vae", {}).get("name") == "flux":
            values["task"] = "i2i" if model.get("dit_params", {}).get("instruct_type") == "channel" else "t2i"
        else:
            values["task"] = "i2v" if "i2v" in name else "t2v"
    task = values["task"]
    is_image = task in ("t2i", "i2i")
    is_sd = metrics.get("resolution", 512) < 1024
    is_10s = "10s" in name
    is_nabla = model.get("attention", {}).get("type") == "nabla"

    if "scheduler_scale" not in metrics:
        # What the published variants are run with: images 3; all 10 s models, and SD image-to-video, 10; the rest 5.
        # NABLA at SD is what tells a 10 s model whose file has been renamed.
        ten = is_10s or (is_sd and (is_nabla or task == "i2v"))
        metrics["scheduler_scale"] = 3.0 if is_image else 10.0 if ten else 5.0
        logger.info("metrics.scheduler_scale is not set: using %g, as published", metrics["scheduler_scale"])
    model.setdefault("num_steps", 16 if "distil" in name else 50)
    without_cfg = "distil" in name or "nocfg" in name
    model.setdefault("guidance_weight", 1.0 if without_cfg else 3.5 if is_image else 5.0)

    if "vae" in model:
        name = model["vae"].get("name", "hunyuan")
        model["vae"].setdefault("tiny_path", TINY_PATHS.get(name) if isinstance(name, str) else None)
    if model.get("vae", {}).get("name") == "flux":
        model["vae"].setdefault("spatial_tile", max(max(size) for size in HD_SIZES))  # published without tiles

    resolution = metrics.get("resolution", 512)
    sizes = {512: SD_SIZES, 1024: HD_SIZES}.get(resolution, ((resolution, resolution),))
    sizes = generation.setdefault("resolutions", sizes)
    default_size = (resolution, resolution) if is_image else {512: (768, 512), 1024: (1280, 768)}.get(resolution)
    if default_size not in sizes and sizes:
        default_size = sizes[0]
    if default_size:
        generation.setdefault("width", default_size[0])
        generation.setdefault("height", default_size[1])
    generation.setdefault("time_length", 0.0 if is_image else 10.0 if is_10s else 5.0)
    generation.setdefault("negative_caption", "" if is_image else VIDEO_NEGATIVE_CAPTION)


def _variant_name(checkpoint_path: str) -> str:
    """The part of a path that says which variant it is: the file, or a folder where the file has a general name."""
    parts = Path(checkpoint_path.lower()).parts
    for part in reversed(parts):
        if re.search("t2v|i2v|t2i|i2i", part):
            return part
    return parts[-1] if parts else ""
