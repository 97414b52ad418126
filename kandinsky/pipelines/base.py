"""Encode -> denoise -> decode -> write, once for every task.

A pipeline holds a config, three models and a placement, and keeps nothing between calls: what belongs to one
generation lives in its `Request` and in local variables. Knows how the stages follow each other; knows no files of
weights, no kernels, and nothing of what makes a run fast or small.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from kandinsky import media
from kandinsky.conditioning import Conditioning, draw_noise, text_to_video
from kandinsky.config import Config, config_to_dict
from kandinsky.models.dit import DiffusionTransformer3D
from kandinsky.models.text_embedder import TextEmbedder, TextEmbeddings
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo, VAETiling
from kandinsky.request import FPS, Request, warn_about_size
from kandinsky.sampler import Branch, euler_sample, flow_timesteps, uses_guidance

logger = logging.getLogger(__name__)


class Placement(Protocol):
    """Where components run: `use(name)` makes one ready on its device for the length of a stage."""

    def device(self, component: str) -> torch.device: ...

    def use(self, component: str) -> AbstractContextManager[Any]: ...


@dataclass
class Stopwatch:
    """Seconds per stage of one generation."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 3)


class Pipeline:
    """The stages; subclasses add a task's call signature and checks."""

    def __init__(
        self,
        config: Config,
        dit: DiffusionTransformer3D,
        text_embedder: TextEmbedder,
        vae: AutoencoderKLHunyuanVideo,
        placement: Placement,
    ) -> None:
        self.config = config
        self.dit = dit
        self.text_embedder = text_embedder
        self.vae = vae
        self.placement = placement

    @torch.no_grad()
    def generate(self, request: Request, save_path: str | Path | None = None, progress: bool = True) -> Tensor:
        """Run one request; uint8 pixels (1, 3, frames, height, width) on the CPU, also written where `save_path` says.

        Beside the output, a JSON file of the same name holds the prompt, every resolved setting, versions and times.
        """
        warn_about_size(self.config, request)
        if save_path is not None:
            media.check_writable(save_path, media.IMAGE_SUFFIX if request.is_image else media.VIDEO_SUFFIX)
        watch = Stopwatch()
        with watch.stage("encode"):
            cond, uncond = self.encode_prompts(request)
        with watch.stage("denoise"):
            latents = self.denoise(request, cond, uncond, progress)
        with watch.stage("decode"):
            pixels = self.decode(latents)
        logger.info("seconds: %s", ", ".join(f"{name} {seconds:.1f}" for name, seconds in watch.seconds.items()))
        if save_path is not None:
            self.write(request, pixels, Path(save_path), watch)
        return pixels

    def encode_prompts(self, request: Request) -> tuple[TextEmbeddings, TextEmbeddings | None]:
        """Embeddings of the prompt, and of the negative prompt where guidance needs it, from one pass."""
        guided = uses_guidance(request.guidance_weight)
        prompts = [request.text, request.negative_caption] if guided else [request.text]
        content = "image" if request.is_image else "video"
        with self.placement.use("text_embedder"):
            embeddings = self.text_embedder.encode(prompts, content=content)
        if not guided:
            return embeddings, None
        cond, uncond = embeddings.split(1)
        return cond, uncond

    def denoise(
        self, request: Request, cond: TextEmbeddings, uncond: TextEmbeddings | None, progress: bool = True
    ) -> Tensor:
        """Latents (1, T, H, W, C), float32, from the request's own noise."""
        device = self.placement.device("dit")
        scale_factor = self.config.metrics.scale_factor
        conditioning = self.condition(request)
        branches: dict[Branch, TextEmbeddings] = {"cond": cond.to(device)}
        if uncond is not None:
            branches["uncond"] = uncond.to(device)
        # Everything that depends on the request's sizes alone, once and not at every step.
        tables = {
            branch: self.dit.request_tables(request.latent_size, text.text_embeds.shape[1], scale_factor, device)
            for branch, text in branches.items()
        }

        def velocity(latents: Tensor, timestep: Tensor, branch: Branch) -> Tensor:
            text = branches[branch]
            return self.dit(
                conditioning.model_input(latents),
                text.text_embeds,
                text.pooled_embeds,
                timestep.expand(len(latents)),
                text_mask=text.text_mask,
                tables=tables[branch],
            )

        def bar(steps: Iterable[int]) -> Iterable[int]:
            return tqdm(steps, desc="denoise", unit="step", disable=not progress)

        sigmas = flow_timesteps(request.num_steps, request.scheduler_scale)
        with self.placement.use("dit"):
            return euler_sample(velocity, conditioning.noise, sigmas, request.guidance_weight, bar)

    def condition(self, request: Request) -> Conditioning:
        """What this task's sampling starts from and is conditioned on, besides text."""
        generation = self.config.generation
        shape = (*request.latent_size, self.config.model.dit_params.in_visual_dim)
        noise = draw_noise(
            [request.seed],
            shape,
            self.placement.device("dit"),
            generation.noise_device,
            getattr(torch, generation.noise_dtype),
        )
        return text_to_video(noise, self.dit.in_channels)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, T, H, W, C) scaled latents -> uint8 pixels (B, 3, frames, height, width) on the CPU."""
        vae_config = self.config.model.vae
        tiling = VAETiling(size=vae_config.spatial_tile, overlap=vae_config.spatial_overlap)
        with self.placement.use("vae"):
            dtype = next(self.vae.parameters()).dtype
            z = latents.permute(0, 4, 1, 2, 3).to(device=self.placement.device("vae"), dtype=torch.float32)
            pixels = self.vae.decode((z / self.vae.scaling_factor).to(dtype), tiling)
            return to_uint8(pixels).cpu()

    def write(self, request: Request, pixels: Tensor, path: Path, watch: Stopwatch) -> None:
        """The video or picture, then the JSON beside it."""
        with watch.stage("write"):
            if request.is_image:
                media.write_image(pixels[0, :, 0], path)
            else:
                media.write_video(pixels[0], path, fps=FPS)
        media.write_sidecar(path, self.describe(request, watch))
        logger.info("wrote %s", path)

    def describe(self, request: Request, watch: Stopwatch) -> dict[str, Any]:
        """What is needed to make this output again, and how long it took. Names are the command line's."""
        settings = dict(vars(request))
        return {
            "prompt": settings.pop("text"),
            "negative_prompt": settings.pop("negative_caption"),
            **settings,
            "fps": FPS,
            "attention_engine": getattr(self.dit.attention, "__name__", str(self.dit.attention)),
            "devices": {name: str(self.placement.device(name)) for name in ("text_embedder", "dit", "vae")},
            # Not that of any parameter: time embedding and modulations keep what their file has.
            "dtype": str(self.dit.visual_embeddings.in_layer.weight.dtype).removeprefix("torch."),
            "config": config_to_dict(self.config),
            "versions": media.versions(),
            "seconds": watch.seconds,
        }


def to_uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] to 0..255, rounded in float32 (truncating would darken by 0.4 levels). Reuses no memory of the input."""
    return pixels.float().clamp_(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8)
