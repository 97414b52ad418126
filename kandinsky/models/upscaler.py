"""Real-ESRGAN's small network for videos (SRVGGNetCompact), with the keys of its published files.

Convolutions at the picture's own size, of which the last makes all pixels of the larger picture; they are what has to
be added to the picture enlarged by repeating (Wang et al. 2021, arXiv 2107.10833; github.com/xinntao/Real-ESRGAN,
realesr-animevideov3: 64 channels, 16 convolutions between the first and the last, 4 times as large).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

COLOURS = 3


class CompactUpscaler(nn.Module):
    """RGB (B, 3, H, W) in [0, 1] -> (B, 3, scale H, scale W), not clamped."""

    def __init__(self, channels: int = 64, convolutions: int = 16, scale: int = 4) -> None:
        super().__init__()
        self.scale = scale
        # In one list, each convolution but the last followed by its PReLU: body.0.weight, body.1.weight, ...
        layers: list[nn.Module] = [nn.Conv2d(COLOURS, channels, 3, padding=1), nn.PReLU(channels)]
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.PReLU(channels)]
        layers.append(nn.Conv2d(channels, COLOURS * scale**2, 3, padding=1))
        self.body = nn.Sequential(*layers)

    @property
    def reach(self) -> int:
        """How many pixels away a pixel of the small picture still counts: one for each convolution."""
        return len(self.body) // 2 + 1

    def forward(self, x: Tensor) -> Tensor:
        details = functional.pixel_shuffle(self.body(x), self.scale)  # (B, 3, scale H, scale W)
        return details + functional.interpolate(x, scale_factor=self.scale, mode="nearest")

    def in_tiles(self, x: Tensor, tile: int) -> Tensor:
        """The same of a picture (1, 3, H, W), in squares of `tile` pixels, each computed with all that it depends on:
        there are no seams, and nothing to blend."""
        height, width = x.shape[-2:]
        out = x.new_empty(1, COLOURS, self.scale * height, self.scale * width)
        for top in range(0, height, tile):
            for left in range(0, width, tile):
                above, before = max(0, top - self.reach), max(0, left - self.reach)
                below, after = min(height, top + tile + self.reach), min(width, left + tile + self.reach)
                made = self(x[..., above:below, before:after])
                rows, columns = min(tile, height - top) * self.scale, min(tile, width - left) * self.scale
                y, x_ = self.scale * (top - above), self.scale * (left - before)
                target = out[..., self.scale * top :, self.scale * left :][..., :rows, :columns]
                target.copy_(made[..., y : y + rows, x_ : x_ + columns])
        return out


def upscaler_of(shapes: Mapping[str, Sequence[int]]) -> CompactUpscaler:
    """The network, without weights, that a file's tensors are of. Raises ValueError where they are of none."""
    numbers = [int(name.split(".")[1]) for name in shapes if name.startswith("body.") and name.split(".")[1].isdigit()]
    first, last = shapes.get("body.0.weight", ()), shapes.get(f"body.{max(numbers, default=0)}.weight", ())
    scale = math.isqrt(last[0] // COLOURS) if len(last) == 4 else 0
    if len(first) == 4 and scale in (2, 3, 4) and max(numbers) % 2 == 0 and 2 <= max(numbers) <= 200:
        with torch.device("meta"):
            network = CompactUpscaler(first[0], max(numbers) // 2 - 1, scale)
        if {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == {
            name: tuple(shape) for name, shape in shapes.items()
        }:
            return network
    raise ValueError(
        "its tensors are not those of Real-ESRGAN's small network (SRVGGNetCompact), like realesr-animevideov3 or "
        "realesr-general-x4v3: the large ones are not read here"
    )
