"""How Qwen2.5-VL is shown pictures: brought to sides of whole tokens, normalised, and cut into patches.

Called as transformers' Qwen2VLImageProcessor is, so that one of those can stand in its place. Knows no files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LONGEST_STRIP = 200  # a picture's longer side over its shorter one


@dataclass(frozen=True)
class ImageProcessor:
    """What preprocessor_config.json says; the defaults are transformers', for what is left out there."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    rescale_factor: float = 1 / 255
    resample: int = int(Image.Resampling.BICUBIC)

    def __call__(self, images: Sequence[Image.Image], return_tensors: str = "pt") -> dict[str, Tensor]:
        """RGB pictures -> `pixel_values` (patches of all, 3 * 2 * 14 * 14) and `image_grid_thw` (pictures, 3).

        The four patches that become a token follow each other. A picture stands for two frames, both the same.
        """
        assert return_tensors == "pt"
        patches, grids = [], []
        for image in images:
            height, width = self.size_for(image.height, image.width)
            scaled = np.asarray(image.resize((width, height), self.resample), dtype=np.float64) * self.rescale_factor
            mean, std = (np.array(values, dtype=np.float32) for values in (self.image_mean, self.image_std))
            pixels = (scaled.astype(np.float32) - mean) / std  # (H, W, 3)
            rows, columns = height // self.patch_size, width // self.patch_size
            m, p = self.merge_size, self.patch_size
            cut = pixels.reshape(rows // m, m, p, columns // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
            frames = np.repeat(cut[:, :, :, :, :, None], self.temporal_patch_size, axis=5)
            patches.append(frames.reshape(rows * columns, -1))
            grids.append([1, rows, columns])
        return {"pixel_values": torch.from_numpy(np.concatenate(patches)), "image_grid_thw": torch.tensor(grids)}

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        """The nearest height and width in whole tokens with `min_pixels` to `max_pixels`, their ratio about the same.

        Raises ValueError for a strip of which one side is more than 200 times the other.
        """
        if max(height, width) > LONGEST_STRIP * min(height, width):
            raise ValueError(f"a picture of {width}x{height} pixels is too narrow: at most {LONGEST_STRIP} to 1")
        step = self.patch_size * self.merge_size
        rows, columns = round(height / step) * step, round(width / step) * step
        if rows * columns > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows, columns = (max(step, math.floor(side / shrink / step) * step) for side in (height, width))
        elif rows * columns < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(side * grow / step) * step for side in (height, width))
        return rows, columns
