"""Repositories in diffusers' layout, written by diffusers itself, with small random models and the tiny encoders."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = REPOSITORY / "assets" / "tiny"
SIZES: dict[str, Any] = {
    "in_visual_dim": 16, "out_visual_dim": 16, "in_text_dim": 128, "in_text_dim2": 128, "time_dim": 32, "model_dim": 64,
    "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (8, 12, 12),
}  # fmt: skip
NABLA: dict[str, Any] = {
    "attention_type": "nabla", "attention_P": 0.8, "attention_wT": 11, "attention_wH": 3, "attention_wW": 3,
    "attention_add_sta": True, "attention_method": "topcdf",
}  # fmt: skip
SMALL_VAE: dict[str, Any] = {
    "latent_channels": 16, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4,
}  # fmt: skip
# The tiny tokenizers have templates of other lengths than the published ones.
CROPS = {"t2v": 125, "i2v": 125, "t2i": 40, "i2i": 51}


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Every parameter, the modulations too, which start at zero and make each block the identity."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(values / math.sqrt(math.prod(parameter.shape[1:])))
        elif "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * values)
        else:
            parameter.copy_(0.2 * values)


def build_parts(task: str, shift: float = 5.0, attention: dict[str, Any] | None = None) -> dict[str, Any]:
    """diffusers' transformer, vae and scheduler, as the task's published repositories have them but for sizes."""
    transformer = diffusers.Kandinsky5Transformer3DModel(
        **SIZES, visual_cond=task != "t2i", **(attention or {"attention_type": "regular"})
    ).eval()
    vae: Any
    if task.endswith("v"):
        vae = diffusers.AutoencoderKLHunyuanVideo(**SMALL_VAE).eval()
    else:
        vae = diffusers.AutoencoderKL(
            **SMALL_VAE, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ).eval()  # fmt: skip
    for model in (transformer, vae):
        randomise(model)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    return {"transformer": transformer, "vae": vae, "scheduler": scheduler}


def write_repository(folder: Path, task: str, parts: dict[str, Any] | None = None) -> Path:
    """All of a repository but what nobody reads; `parts` as from `build_parts`."""
    for name, part in (parts or build_parts(task)).items():
        part.save_pretrained(folder / name)
    tiny = TINY / ("image" if task.endswith("2i") else "t2v")
    for source, target in (("text_encoder", "text_encoder"), ("text_encoder2", "text_encoder_2")):
        shutil.copytree(tiny / source, folder / target)
    for part, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        (folder / tokenizer).mkdir()
        for file in sorted((folder / part).iterdir()):
            if file.name not in ("config.json", "model.safetensors"):
                file.rename(folder / tokenizer / file.name)
    index = {"_class_name": "Kandinsky5T2VPipeline"} | {path.name: ["library", "Class"] for path in folder.iterdir()}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def crop(task: str) -> list[str]:
    """The override that the tiny tokenizer needs."""
    return [f"model.text_embedder.qwen.crop={CROPS[task]}"]
