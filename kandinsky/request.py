"""A person's wishes, checked against a variant and resolved once: `Request`.

Everything that can be wrong with what somebody asks for is found here, from the config alone, before weights are read
or torch is imported. What is not asked for is what the YAML says.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass

from kandinsky.config import MAX_PATCHES, PATCH_PIXELS, Config

logger = logging.getLogger(__name__)

FPS = 24
FRAMES_PER_LATENT = 4
PIXELS_PER_LATENT = 8
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Request:
    """One generation with nothing left open. Lengths in pixels and frames; num_frames is 4n + 1."""

    text: str
    negative_caption: str
    width: int
    height: int
    num_frames: int
    seed: int
    num_steps: int
    guidance_weight: float
    scheduler_scale: float

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """(latent frames, rows, columns)."""
        latent_frames = (self.num_frames - 1) // FRAMES_PER_LATENT + 1
        return latent_frames, self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT

    @property
    def is_image(self) -> bool:
        return self.num_frames == 1


def resolve_request(
    config: Config,
    text: str,
    *,
    time_length: float | None = None,
    width: int | None = None,
    height: int | None = None,
    seed: int | None = None,
    num_steps: int | None = None,
    guidance_weight: float | None = None,
    scheduler_scale: float | None = None,
    negative_caption: str | None = None,
) -> Request:
    """A `Request` for the variant `config`; None means as the YAML says, and a random seed.

    Raises ValueError that says what was given, what is allowed and what to do.
    """
    generation = config.generation
    text = _checked_text("prompt", text)
    if not text.strip():
        raise ValueError("the prompt is empty: say what the video should show")
    negative = _checked_text(
        "negative prompt", generation.negative_caption if negative_caption is None else negative_caption
    )
    if config.model.attention.type == "nabla":
        raise ValueError(
            f"{config.source}: this variant uses NABLA attention, which this version can load but not run: "
            "take a 5 s config like configs/config_5s_sft.yaml"
        )
    return Request(
        text=text,
        negative_caption=negative,
        width=_checked_side("width", generation.width if width is None else width),
        height=_checked_side("height", generation.height if height is None else height),
        num_frames=_frames(generation.time_length if time_length is None else time_length),
        seed=_checked_seed(seed),
        num_steps=_checked_steps(config.model.num_steps if num_steps is None else num_steps),
        guidance_weight=_checked_number(
            "guidance_weight",
            config.model.guidance_weight if guidance_weight is None else guidance_weight,
            lowest=0.0,
        ),
        scheduler_scale=_checked_number(
            "scheduler_scale",
            config.metrics.scheduler_scale if scheduler_scale is None else scheduler_scale,
            lowest=0.01,
        ),
    )


def warn_about_size(config: Config, request: Request) -> None:
    """Say so where a size is possible but not one that the checkpoint was trained at."""
    if (request.width, request.height) not in config.generation.resolutions:
        trained = ", ".join(f"{w}x{h}" for w, h in config.generation.resolutions)
        logger.warning(
            "%dx%d is not a size this checkpoint was trained at (%s); quality may suffer",
            request.width,
            request.height,
            trained,
        )


def _checked_text(name: str, text: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"the {name} is {text!r}; it must be a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes of another encoding, from a terminal or a file
        raise ValueError(f"the {name} is not UTF-8: {text[:60]!a}; type it in a UTF-8 terminal") from None
    return text


def _checked_side(name: str, pixels: int) -> int:
    limit = MAX_PATCHES * PATCH_PIXELS
    if isinstance(pixels, bool) or not isinstance(pixels, int):
        raise ValueError(f"{name} is {pixels!r}; it must be a whole number of pixels, a multiple of {PATCH_PIXELS}")
    if pixels % PATCH_PIXELS or not 0 < pixels <= limit:
        nearest = round(min(max(pixels, PATCH_PIXELS), limit) / PATCH_PIXELS) * PATCH_PIXELS
        raise ValueError(
            f"{name} is {pixels}; it must be a multiple of {PATCH_PIXELS} pixels from {PATCH_PIXELS} to {limit}: "
            f"the nearest is {nearest}"
        )
    return pixels


def _frames(seconds: float) -> int:
    longest = ((MAX_PATCHES - 1) * FRAMES_PER_LATENT) // FPS
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= longest:
        raise ValueError(f"the duration is {seconds} s; it must be from 0 (an image) to {longest} s")
    return int(seconds * FPS) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1


def _checked_seed(seed: int | None) -> int:
    if seed is None:
        return random.SystemRandom().randrange(MAX_SEED)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"the seed is {seed}; it must be a whole number from 0 to {MAX_SEED}")
    return seed


def _checked_steps(num_steps: int) -> int:
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or not 1 <= num_steps <= 1000:
        raise ValueError(f"the number of steps is {num_steps}; it must be a whole number from 1 to 1000")
    return num_steps


def _checked_number(name: str, value: float, lowest: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= 100:
        raise ValueError(f"{name} is {value}; it must be a number from {lowest:g} to 100")
    return float(value)
