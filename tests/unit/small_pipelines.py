"""Pipelines of all four tasks on small random models, for tests of what happens around the models.

The text encoders are a stand-in that makes embeddings from the words alone and remembers what it was asked; the DiT
and the VAEs are real.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from kandinsky.config.reading import load_config
from kandinsky.config.schema import DiTConfig
from kandinsky.loading.assemble import PIPELINES
from kandinsky.models.dit import DiffusionTransformer3D
from kandinsky.models.vae_flux import AutoencoderKL
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
from kandinsky.pipelines.base import Pipeline
from kandinsky.pipelines.inputs import Inputs
from kandinsky.request import Request, resolve_request
from kandinsky.runtime.placement import FixedPlacement
from kandinsky.text.embeddings import TextEmbeddings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = {"t2v": "5s_sft", "i2v": "5s_i2v", "t2i": "t2i", "i2i": "i2i"}
TASKS = list(NAMES)
VAE = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
TEXT_DIM, POOLED_DIM = 24, 12
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


@torch.no_grad()
def randomised(model: nn.Module) -> Any:
    """The modulations too, which start at zero and make every block the identity."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = 1 / math.sqrt(math.prod(parameter.shape[1:])) if parameter.dim() > 1 else 0.2
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


class WordsEmbedder:
    """A token a word; remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def encode(
        self,
        prompts: Sequence[str],
        content: str = "video",
        images: Sequence[Image.Image] | None = None,
        max_length: int | None = None,
    ) -> TextEmbeddings:
        self.calls.append({"prompts": list(prompts), "content": content, "images": images, "max_length": max_length})
        rows = [[zlib.crc32(word.encode()) for word in ("<", *prompt.split())][:max_length] for prompt in prompts]
        longest = max(map(len, rows))
        embeds = torch.zeros(len(rows), longest, TEXT_DIM)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            mask[i, : len(row)] = True
            for j, number in enumerate(row):
                embeds[i, j] = torch.randn(TEXT_DIM, generator=torch.Generator().manual_seed(number))
        pooled = embeds.sum(1)[:, :POOLED_DIM]
        return TextEmbeddings(embeds, pooled, None if mask.all() else mask)


def build(task: str, **options: Any) -> Pipeline:
    """A pipeline like the published one of its task, small; options are the pipeline's."""
    config = load_config(CONFIGS / f"config_{NAMES[task]}.yaml")
    channels = {"visual_cond": True} if task in ("t2v", "i2v") else {}
    channels |= {"instruct_type": "channel"} if task == "i2i" else {}
    dit = DiTConfig(
        in_text_dim=TEXT_DIM, in_text_dim2=POOLED_DIM, time_dim=16, model_dim=32, ff_dim=48, num_text_blocks=1,
        num_visual_blocks=2, axes_dims=(4, 6, 6), **channels,
    )  # fmt: skip
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, dit_params=dit, num_steps=2,
            text_embedder=dataclasses.replace(
                config.model.text_embedder,
                qwen=dataclasses.replace(config.model.text_embedder.qwen, emb_size=TEXT_DIM),
                clip=dataclasses.replace(config.model.text_embedder.clip, emb_size=POOLED_DIM),
            ),
        ),
        generation=dataclasses.replace(
            config.generation, width=32, height=32, time_length=0.2 if task.endswith("v") else 0,
            resolutions=((32, 32), (48, 32)),
        ),
    )  # fmt: skip
    torch.manual_seed(0)
    vae = randomised(AutoencoderKLHunyuanVideo(**VAE) if task.endswith("v") else AutoencoderKL(**VAE))
    devices = dict.fromkeys(("dit", "vae", "text_embedder"), torch.device("cpu"))
    model = randomised(DiffusionTransformer3D(**dataclasses.asdict(dit)))
    return PIPELINES[task](config, model, WordsEmbedder(), vae, FixedPlacement(devices), **options)  # type: ignore[arg-type]


def call(pipe: Any, text: Any = "a red cat", **options: Any) -> Any:
    """With a picture where the task needs one."""
    if pipe.config.task in ("i2v", "i2i"):
        options.setdefault("image", PICTURE)
    return pipe(text, **{"seed": 1, "progress": False, **options})


def latents_of(pipe: Any, text: Any = "a red cat", **options: Any) -> Tensor:
    return call(pipe, text, **{"output_type": "latent", **options})


def count_name(pipe: Pipeline) -> str:
    return "num_videos_per_prompt" if pipe.config.task.endswith("v") else "num_images_per_prompt"


class Abort(Exception):
    pass


def abort_at(last_step: int) -> Any:
    """A callback that ends a call after this step."""

    def callback(pipe: Pipeline, step: int, *_: object) -> None:
        if step == last_step:
            raise Abort

    return callback


def two_prompts(pipe: Pipeline, num_steps: int, **more: Any) -> tuple[Request, Inputs]:
    """A guided request with two prompts, and a picture where the task takes one; `more`: of `resolve_request`."""
    pictures = [PICTURE] if pipe.config.task in ("i2v", "i2i") else []
    request = resolve_request(
        pipe.config,
        ["a red cat", "a dog in the snow"],
        image_sizes=[picture.size for picture in pictures],
        seed=3,
        num_steps=num_steps,
        guidance_weight=3.0,
        **more,
    )
    return request, Inputs(pictures, ["cat.png"] * len(pictures))
