"""The third stage: latents become pixels, in tiles, and in smaller ones where memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kandinsky.common.out_of_memory import ran_out_of_memory
from kandinsky.models.numerics import require_finite
from kandinsky.models.vae_flux import AutoencoderKL
from kandinsky.models.vae_memory import GB, Decoding
from kandinsky.models.vae_tiling import VAETiling
from kandinsky.pipelines.calls import one_at_a_time
from kandinsky.pipelines.retries import Retries
from kandinsky.request import FRAMES_PER_LATENT
from kandinsky.sampling.conditioning import OVERLAP

logger = logging.getLogger(__name__)

FINISHED_AT_ONCE = 8  # decoded frames
AGAIN = 3  # latent frames of a loop that are decoded a second time; with 2 the join to the others can still be seen


class DecodeStage(Retries):
    """The VAE's decoder."""

    @one_at_a_time
    @torch.no_grad()
    def decode(self, latents: Tensor, finish: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """(B, T, H, W, C) scaled latents -> pixels (B, 3, frames, height, width) on the CPU, uint8 or as `finish`es.

        In tiles of the size that the config gives or its memory budget allows, the smaller of the two. Where memory
        runs out all the same, with the other models off the device, and then in smaller tiles: that changes pixels a
        little, and the log says so. Raises OutOfMemoryError where the smallest are too large as well. Several processes
        go on together, whichever of them ran out of memory.

        With the tiny decoder, where the config says so, frame by frame instead, each process all of them.
        """
        if self.config.model.vae.decoder == "tiny":
            return torch.cat([self._decode_tiny(sample, finish or to_uint8) for sample in latents.split(1)])
        config, decoding = self.config.model.vae, self._decoding(latents)
        tile = config.spatial_tile
        if config.memory_budget_gb is not None:
            tile = decoding.tile_within(config.memory_budget_gb * GB, tile)
        videos: list[Tensor] = []
        while len(videos) < len(latents):
            failure: BaseException | None = None
            try:
                self.team.together(partial(self._decode_samples, latents, tile, finish or to_uint8, videos))
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
                failure = error.with_traceback(None)  # with which goes what the attempt had made
            if failure is not None and not self.take_less("decode", None, failure):
                tile = next_tile(decoding, tile, str(failure))
                torch.cuda.empty_cache()
        return torch.cat(videos)

    def _decode_samples(
        self, latents: Tensor, tile: int, finish: Callable[[Tensor], Tensor], videos: list[Tensor]
    ) -> None:
        """Append the pixels of each sample that is not there yet. Several processes have the same ones then, whatever
        happens."""
        with self.placement.use("vae"):
            device, dtype = self.placement.device("vae"), next(self.vae.parameters()).dtype
            for sample in latents[len(videos) :].split(1):
                z = sample.permute(0, 4, 1, 2, 3).to(device=device, dtype=torch.float32)  # (1, C, T, H, W)
                z = (z / self.vae.scaling_factor).to(dtype)
                videos.append(self.team.together(partial(self._decode_tiles, z, tile, finish)))

    def decode_loop(self, latents: Tensor, finish: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """`decode` of latents whose last frame is the first one again: 4 (T - 1) frames, which go round.

        What follows the first frame is decoded a second time after the last one, where the decoder, which knows what
        came before and makes of it how things move, goes from the end into the beginning as from any frame into the
        next. These frames begin the loop; the others are those of the first round.
        """
        count = latents.shape[1] - 1
        again = min(AGAIN, count - 1)
        pixels = self.decode(torch.cat((latents, latents[:, 1 : 1 + again]), dim=1), finish)
        end, shown = FRAMES_PER_LATENT * count, FRAMES_PER_LATENT * again + 1
        return torch.cat((pixels[:, :, end:], pixels[:, :, shown:end]), dim=2)

    def _decode_tiny(self, sample: Tensor, finish: Callable[[Tensor], Tensor]) -> Tensor:
        """Scaled latents (1, T, H, W, C) -> finished pixels (1, 3, frames, height, width) on the CPU."""
        decoder = self.tiny_decoder
        assert decoder is not None, "loading sees to it"
        weight = next(decoder.parameters())
        frames = []
        for frame in decoder.frames(sample.permute(0, 4, 1, 2, 3).to(weight.device, weight.dtype)):
            require_finite("the tiny decoder", frame, decoder.named_parameters)
            frames.append(finish(frame[:, :, None]).cpu())
        return torch.cat(frames, dim=2)

    def _decoding(self, latents: Tensor) -> Decoding:
        """What decoding `latents` comes to, for the choice of tiles."""
        dtype = next(self.vae.parameters()).dtype
        vae, (frames, rows, columns) = self.config.model.vae, latents.shape[1:4]
        ratio = self.vae.spatial_compression_ratio
        size = columns * ratio, rows * ratio, FRAMES_PER_LATENT * (frames - 1) + 1
        of_vae = (self.vae.block_out_channels, dtype.itemsize)
        return Decoding(vae.name, *of_vae, *size, vae.spatial_overlap, self.vae.float32_convolutions)

    def _decode_tiles(self, z: Tensor, tile: int, finish: Callable[[Tensor], Tensor]) -> Tensor:
        """Unscaled latents (1, C, T, H, W) -> finished pixels (1, 3, frames, height, width) on the CPU."""
        tiling = VAETiling(size=tile, overlap=min(self.config.model.vae.spatial_overlap, tile // 2))
        if isinstance(self.vae, AutoencoderKL):
            pixels = self.vae.decode(z[:, :, 0], tiling, self.team.map_tiles)[:, :, None]
        else:
            pixels = self.vae.decode(z, tiling, self.team.map_tiles)
        require_finite("the VAE's decoder", pixels, self.vae.named_parameters)
        # A few frames at a time: all of them in float32 would be as much memory as the video once or twice more.
        return torch.cat([finish(frames).cpu() for frames in pixels.split(FINISHED_AT_ONCE, dim=2)], dim=2)


def next_tile(decoding: Decoding, tile: int, error: str) -> int:
    """The size of tiles to go on with where `tile` took too much memory; says so. Raises where there is none left."""
    smaller = decoding.smaller_tile(tile)
    if smaller is None:
        raise torch.OutOfMemoryError(
            f"decoding runs out of memory even in tiles of {tile} pixels: set runtime.offload=on where it is not, or "
            f"ask for something smaller or shorter ({error})"
        )
    logger.warning(
        "decoding ran out of memory in tiles of %d pixels and starts again with %d; model.vae.spatial_tile=%d does so "
        "at once, with the same result",
        *(tile, smaller, smaller),
    )
    return smaller


def frames_before(record: Mapping[str, Any]) -> int:
    """How many frames an output goes on from, by its record: they were there before, and are no part of it."""
    ends = [item["frame"] + item["frames"] for item in record["conditions"] if item["name"] == OVERLAP]
    return FRAMES_PER_LATENT * (max(ends) - 1) + 1 if ends else 0


def to_uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] to 0..255, rounded in float32 (truncating would darken by 0.4 levels). May overwrite its input."""
    return pixels.float().clamp_(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8)


def to_unit(pixels: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], float32."""
    return pixels.float().clamp(-1, 1).add_(1).mul_(0.5)
