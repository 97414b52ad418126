"""ComfyUI's IMAGE and MASK, to the arrays and pictures that pipelines take."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kandinsky.outputs import media


def to_frames(image: Tensor) -> np.ndarray:
    """uint8 (frames, height, width, 3) of an IMAGE, (frames, height, width, 3 or 4) in 0..1. Raises ValueError where
    there is none."""
    if image.ndim != 4 or not len(image):
        raise ValueError(f"the picture is {tuple(image.shape)}; it must be an IMAGE with one picture")
    return (image[..., :3].float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def to_picture(image: Tensor) -> Image.Image:
    """The first of an IMAGE. Raises ValueError where there is none."""
    return Image.fromarray(to_frames(image[:1])[0])


def fitted(frames: np.ndarray, count: int, width: int, height: int) -> np.ndarray:
    """So many frames at a size; what stands out is cut off evenly, and the last one stands for what is missing."""
    found = [np.asarray(media.fit_image(Image.fromarray(frame), width, height)) for frame in frames[:count]]
    return np.stack(found + [found[-1]] * (count - len(found)))


def fitted_mask(mask: Tensor, count: int, width: int, height: int) -> np.ndarray:
    """uint8 (1 or frames, height, width) of a MASK, (1 or frames, height, width) in 0..1. Raises ValueError for another
    number of them."""
    if mask.ndim != 3 or (len(mask) != 1 and len(mask) + 3 < count):
        raise ValueError(
            f"the mask is {tuple(mask.shape)}, and there are {count} frames: give one for all, or one each"
        )
    grey = mask.float().clamp(0, 1)[..., None].expand(-1, -1, -1, 3)
    return fitted(to_frames(grey), 1 if len(mask) == 1 else count, width, height)[..., 0].copy()
