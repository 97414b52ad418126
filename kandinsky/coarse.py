"""Steps on a smaller grid: how many, and which, for a size and a number of steps.

The first steps of sampling settle layout and motion, for which fewer pixels do. Knows numbers and configs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from kandinsky.common.limits import NABLA_PIXELS, PATCH_PIXELS
from kandinsky.config.schema import Config

logger = logging.getLogger(__name__)
MOST_BENT = 1.1  # how many times wider or narrower the coarse picture may be


@dataclass(frozen=True)
class CoarseSteps:
    """The first `steps` steps are made at this size, in pixels."""

    steps: int
    width: int
    height: int


def coarse_steps(config: Config, num_steps: int, width: int, height: int) -> CoarseSteps | None:
    """What `generation.coarse_steps` comes to; None where it comes to no step. The last step is never coarse.

    Each side times `scale` is rounded to what the model divides, as `size_for_video` does. Raises ValueError where that
    leaves it as large as it is, or bends the picture's aspect by more than a tenth.
    """
    wanted = config.generation.coarse_steps
    steps = min(round(num_steps * wanted.share), num_steps - 1)
    if steps < 1:
        return None
    multiple = NABLA_PIXELS if config.model.attention.type == "nabla" else PATCH_PIXELS
    small = [max(1, round(side * wanted.scale / multiple)) * multiple for side in (width, height)]
    bent = small[0] * height / (small[1] * width)
    if small[0] >= width or small[1] >= height or not 1 / MOST_BENT <= bent <= MOST_BENT:
        raise ValueError(
            f"generation.coarse_steps.scale is {wanted.scale:g}, and {width}x{height} would become "
            f"{small[0]}x{small[1]}, in multiples of {multiple} pixels, which has to be smaller and of the same shape: "
            "take another scale or size, or --coarse_steps 0"
        )
    return CoarseSteps(steps, small[0], small[1])


def tell_coarse_steps(config: Config, num_steps: int, width: int, height: int) -> None:
    """Say in the log which steps are made at which size, and where it comes to no step that some are asked for."""
    if (coarse := coarse_steps(config, num_steps, width, height)) is not None:
        logger.info(
            "%dx%d, of which the first %d of %d steps are made at %dx%d",
            *(width, height, coarse.steps, num_steps, coarse.width, coarse.height),
        )
    elif (share := config.generation.coarse_steps.share) > 0:
        logger.warning("generation.coarse_steps %s", none_of(share, num_steps))


def none_of(share: float, num_steps: int) -> str:
    """In words, that a share of the steps comes to none."""
    return f"is {share:g} of {num_steps} steps, which rounds to none (the last one never counts): all are at full size"


def check_coarse(config: Config, num_steps: int, width: int, height: int, has_source: bool) -> None:
    """Raise ValueError for a size that can't be made coarse, and where sampling begins between a source and noise."""
    if coarse_steps(config, num_steps, width, height) is not None and has_source:
        raise ValueError(
            "generation.coarse_steps makes the first steps small, and a video or picture to start from would lose what "
            "it gives: leave one of them out (--coarse_steps 0)"
        )
