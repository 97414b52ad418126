"""Which size in pixels a person's picture gives what is made from it.

Sizes are (width, height) everywhere. Knows numbers and configs; knows no pictures, no files and no torch, so that a
picture of the wrong shape is refused before anything is loaded.
"""

from __future__ import annotations

from math import sqrt

from kandinsky.common.limits import MAX_PATCHES, NABLA_PIXELS, PATCH_PIXELS
from kandinsky.config.schema import Config

MIN_SIDE = PATCH_PIXELS
MAX_ASPECT = 4
HD_RESOLUTION = 1024
# What takes a picture where a config of this task does not.
TAKE_A_PICTURE = {
    "t2v": "an i2v config, whose videos begin with it",
    "t2i": "an i2i config, which edits it, or give a strength below 1 to start from it",
}


def check_picture(image_size: tuple[int, int]) -> None:
    """Raise ValueError for a picture that is too small, or too narrow, to make anything of."""
    width, height = image_size
    if min(image_size) < MIN_SIDE:
        raise ValueError(
            f"the picture is {width}x{height} pixels; it must have at least {MIN_SIDE} a side: take a larger one"
        )
    if max(image_size) > MAX_ASPECT * min(image_size):
        raise ValueError(
            f"the picture is {width}x{height} pixels; the long side may be at most {MAX_ASPECT} times the short one: "
            "crop it"
        )


def size_for_video(image_size: tuple[int, int], config: Config) -> tuple[int, int]:
    """(width, height) of the video that starts with a picture: its aspect, at the area that the model works at.

    Each side is rounded to what the model can divide, which changes the aspect a little: 1920x1080 becomes 832x464,
    and 1408x768 at 1024.
    """
    width, height = image_size
    is_hd = config.metrics.resolution >= HD_RESOLUTION
    area = HD_RESOLUTION**2 if is_hd else config.generation.width * config.generation.height
    # The published HD models get multiples of 128 whatever their attention.
    multiple = NABLA_PIXELS if is_hd or config.model.attention.type == "nabla" else PATCH_PIXELS
    scale = sqrt(area / (width * height)) / multiple
    limit = MAX_PATCHES * PATCH_PIXELS // multiple

    def rounded(side: int) -> int:
        return min(max(round(side * scale), 1), limit) * multiple

    return rounded(width), rounded(height)


def size_for_image(image_size: tuple[int, int], config: Config) -> tuple[int, int]:
    """(width, height) of the image made from a picture: of the config's sizes the one nearest in height / width."""
    width, height = image_size
    return min(config.generation.resolutions, key=lambda size: abs(size[1] / size[0] - height / width))
