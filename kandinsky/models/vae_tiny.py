"""Tiny decoders: latents to pixels in a fraction of the VAE's operations, for previews and quick looks.

TAEHV's (videos, HunyuanVideo's latents) and TAESD's (pictures, Flux's latents), both by Ollin Boer Bohan; the layers
and their names are those of the published files, see checkpoints/tiny_decoder.py. They take the latents as the
diffusion model has them, and see no tiles: a video goes through frame by frame, and what a layer remembers is the one
frame before. So the memory does not grow with the length, and no frame can depend on a later one.

Knows no devices and no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from kandinsky.checkpoints.tiny_decoder import BLOCKS, LATENT_CHANNELS, PUBLISHED, RGB, TIMES, Kind

# TAESD knows Flux's latents, which have the VAE's shift taken off before they are scaled; Kandinsky's have not (see
# vae_flux.AutoencoderKL): shift_factor * scaling_factor of Flux's VAE.
FLUX_SHIFT = 0.1159 * 0.3611
TRIMMED = 3  # frames: the first latent frame stands for one frame of four, the last


class Clamp(nn.Module):
    """Soft, to -3..3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """Three convolutions beside a shortcut; sees `inputs` channels, the last ones of which the shortcut leaves out."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv(inputs, channels), nn.ReLU(inplace=True),
            conv(channels, channels), nn.ReLU(inplace=True),
            conv(channels, channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).add_(x).relu_()


class MemoryBlock(Block):
    """A block that also sees its input of the frame before, and zeros before the first."""

    def __init__(self, channels: int) -> None:
        super().__init__(2 * channels, channels)

    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        past = torch.zeros_like(x) if past is None else past
        return self.conv(torch.cat((x, past), dim=1)).add_(x).relu_()


class Grow(nn.Module):
    """Of each frame `times` frames, each twice as large in both directions.

    The published order is the other one, enlarging and then a 1x1 convolution. That is the same sums four times over:
    such a convolution does not care whether a pixel is there four times.
    """

    def __init__(self, channels: int, times: int) -> None:
        super().__init__()
        self.times = times
        self.conv = nn.Conv2d(channels, channels * times, 1, bias=False)

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        for frame in self.conv(x).chunk(self.times, dim=1):
            yield nn.functional.interpolate(frame, scale_factor=2)


class TinyDecoder(nn.Module):
    """The decoder; `widths` are its channels at each of the four levels, the smallest first, else the published ones.

    For "video" 1 + n latent frames make 1 + 4n frames; for "image" there is one.
    """

    def __init__(self, kind: Kind, widths: Sequence[int] | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.widths = tuple(widths or PUBLISHED[kind])
        layers: list[nn.Module] = [Clamp(), conv(LATENT_CHANNELS, self.widths[0]), nn.ReLU(inplace=True)]
        for width, following, times in zip(self.widths, self.widths[1:], TIMES, strict=False):
            if kind == "video":
                layers += [*(MemoryBlock(width) for _ in range(BLOCKS)), nn.Identity(), Grow(width, times)]
            else:
                layers += [*(Block(width, width) for _ in range(BLOCKS)), nn.Upsample(scale_factor=2)]
            layers.append(conv(width, following, bias=False))
        last = self.widths[-1]
        layers += [nn.ReLU(inplace=True) if kind == "video" else Block(last, last), conv(last, RGB)]
        self.decoder = nn.ModuleList(layers)

    def frames(self, latents: Tensor) -> Iterator[Tensor]:
        """(B, C, T, h, w) scaled latents -> frames (B, 3, 8h, 8w) in order, about [-1, 1], not clamped.

        A frame is computed when it is asked for.
        """
        if self.kind == "image":
            latents = latents - FLUX_SHIFT
        stream: Iterable[Tensor] = latents.unbind(2)
        for layer in self.decoder:
            stream = through(layer, stream)
        for i, frame in enumerate(stream):
            if self.kind == "image" or i >= TRIMMED:
                yield frame.mul(2).sub(1)  # from 0..1

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, T, h, w) scaled latents -> pixels (B, 3, frames, 8h, 8w)."""
        return torch.stack(list(self.frames(latents)), dim=2)


def conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def through(layer: nn.Module, frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """Frames as they come out of a layer; what it remembers is local to this.

    While others work on what came of a frame, nothing here holds it, nor the frame, but for a memory's sake.
    """
    past: Tensor | None = None
    for frame in frames:
        given = [frame]
        if isinstance(layer, MemoryBlock):
            given += [] if past is None else [past]
            past = frame
        del frame
        if isinstance(layer, Grow):
            yield from layer(given.pop())
        else:
            yield layer(*[given.pop(0) for _ in range(len(given))])
