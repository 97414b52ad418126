"""Nodes for what is given besides words and a first picture: what sampling starts from, what it goes on from, further
pictures; and one that joins what goes on. `settled` is what a sampling node makes of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, from_numpy

from kandinsky.config.schema import Config
from kandinsky.keyframes import Keyframe, read_keyframes
from kandinsky.outputs.colour import colours_of, corrected
from kandinsky.outputs.sources import Media
from kandinsky.pipelines.decode import frames_before
from kandinsky.request import FPS, FRAMES_PER_LATENT, Request, resolve_request
from kandinsky.serving.segments import HOW, Part, checked_overlap, request_of

from .hosting import stop_where_asked
from .images import fitted, fitted_mask, to_frames

CATEGORY = "Kandinsky 5"
GIVEN, RECORD = "KANDINSKY5_GIVEN", "KANDINSKY5_RECORD"
UNNAMED = "given without a file name"


@dataclass(frozen=True)
class Given:
    """What nodes before a sampling node hand to it, one after the other."""

    frames: np.ndarray | None = None  # uint8 (T, H, W, 3)
    goes_on: bool = False  # from the frames, and not: starts from them
    strength: float | None = None
    mask: Tensor | None = None
    overlap: int | None = None
    last: Image.Image | None = None
    loop: bool = False
    keyframes: tuple[tuple[float, Image.Image], ...] = ()


class Source:
    """Frames that are there already."""

    CATEGORY, FUNCTION = CATEGORY, "give"
    RETURN_TYPES, RETURN_NAMES = (GIVEN,), ("given",)
    DESCRIPTION = (
        "Frames, 24 a second, that sampling starts from (T2V; T2I with one) or that a video goes on from (T2V, I2V)."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        share = {"default": 0.6, "min": 0.0, "max": 1.0, "step": 0.05, "tooltip": "0: the same, 1: noise alone"}
        frames = {
            "default": 0,
            "min": 0,
            "max": 505,
            "tooltip": "that it goes on from, 4n + 1; 0: 1 for I2V, 5 for T2V",
        }
        return {
            "required": {
                "frames": ("IMAGE",),
                "how": (["start from", "go on from"],),
                "strength": ("FLOAT", share),
                "overlap": ("INT", frames),
            },
            "optional": {"mask": ("MASK",), "given": (GIVEN,)},
        }

    def give(
        self,
        frames: Tensor,
        how: str,
        strength: float,
        overlap: int,
        mask: Tensor | None = None,
        given: Given | None = None,
    ) -> tuple[Given]:
        stop_where_asked()
        goes_on, before = how == "go on from", given or Given()
        if before.frames is not None:
            raise ValueError("there are frames to start from or to go on from already: leave one of the nodes out")
        if goes_on and mask is not None:
            raise ValueError("a mask is of frames that sampling starts from: leave it out")
        return (
            dataclasses.replace(
                before,
                frames=to_frames(frames),
                goes_on=goes_on,
                strength=None if goes_on else strength,
                overlap=overlap or None,
                mask=mask,
            ),
        )


class Frames:
    """A picture that a video passes through."""

    CATEGORY, FUNCTION = CATEGORY, "give"
    RETURN_TYPES, RETURN_NAMES = (GIVEN,), ("given",)
    DESCRIPTION = (
        "I2V: the last picture, one at a time in seconds, or a loop, which needs none. Experimental with the published "
        "checkpoints, which have learnt to be given the first one alone."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        seconds = {"default": 0.0, "min": 0.0, "max": 21.0, "step": 0.01, "tooltip": "of a picture at a time"}
        return {
            "required": {"where": (["last", "at seconds", "loop"],), "seconds": ("FLOAT", seconds)},
            "optional": {"picture": ("IMAGE",), "given": (GIVEN,)},
        }

    def give(
        self, where: str, seconds: float, picture: Tensor | None = None, given: Given | None = None
    ) -> tuple[Given]:
        stop_where_asked()
        before = given or Given()
        if (picture is None) is not (where == "loop"):
            raise ValueError("a loop ends with its first picture: leave the picture out, and else give one")
        if picture is None:
            return (dataclasses.replace(before, loop=True),)
        shown = Image.fromarray(to_frames(picture[:1])[0])
        if where == "last":
            if before.last is not None:
                raise ValueError("there is a last picture already: leave one of the nodes out")
            return (dataclasses.replace(before, last=shown),)
        return (dataclasses.replace(before, keyframes=(*before.keyframes, (seconds, shown))),)


class Join:
    """Frames, and those that go on from them."""

    CATEGORY, FUNCTION = CATEGORY, "join"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", RECORD), ("frames", "record")
    DESCRIPTION = "Joins frames with those that go on from them, and brings the latter's colours back to the former's."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "before": ("IMAGE",),
                "after": ("IMAGE",),
                "record": (RECORD,),
                "colour_match": ("BOOLEAN", {"default": True, "tooltip": "to those of the frames before"}),
            }
        }

    def join(
        self, before: Tensor, after: Tensor, record: dict[str, Any], colour_match: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """record: of what goes on; the result's says of how many frames that was."""
        stop_where_asked()
        there, added = to_frames(before), to_frames(after)
        if there.shape[1:] != added.shape[1:]:
            raise ValueError(
                f"the frames are {there.shape[2]}x{there.shape[1]}, and those after them {added.shape[2]}x"
                f"{added.shape[1]}: join what goes on from these frames"
            )
        if not frames_before(record):
            raise ValueError("the record is of a video that goes on from nothing: join what goes on from these frames")
        reference, own = colours_of(there), colours_of(added)
        facts = {
            "how": HOW[record["task"]],
            "frames_before": len(there),
            "added_frames": len(added),
            "drift": (own.mean - reference.mean).round(2).tolist(),
            "corrected": colour_match,
        }
        if colour_match:
            after = from_numpy(corrected(added, own, reference)).float() / 255
        frames = from_numpy(np.concatenate((there, (after * 255).round().byte().numpy()))).float() / 255
        return frames, {**record, "num_frames": len(frames), "extended": facts}


def frames_of(record: dict[str, Any]) -> int:
    """How many frames an output has, by its record."""
    if "extended" in record:
        return int(record["num_frames"])
    return int(record["num_frames"]) - int(record["loop"]) - frames_before(record)


def settled(
    config: Config, text: str, pictures: tuple[Image.Image, ...], given: Given, **wishes: Any
) -> tuple[Request, Media, tuple[Keyframe, ...]]:
    """`resolve_request` of what is given, and what pipelines take of it. Raises ValueError as that does."""
    if given.goes_on and given.frames is not None:
        if given.last is not None or given.loop or given.keyframes:
            raise ValueError("what goes on from frames has no further pictures: leave them, or the frames, out")
        return *_going_on(config, text, given, wishes), ()
    sizes = [one.size for one in pictures]
    clip = None
    if given.frames is not None:
        count, height, width, _ = given.frames.shape
        if config.task == "t2i":
            sizes = [(width, height)]
        else:
            clip = width, height, count
    request = resolve_request(
        config,
        text,
        image_sizes=sizes,
        clip=clip,
        mask=given.mask is not None,
        strength=given.strength,
        loop=given.loop,
        **wishes,
    )
    keyframes = read_keyframes(config, request.num_frames, given.last, given.loop, given.keyframes)
    if given.frames is None:
        return request, Media(pictures, [UNNAMED] * len(pictures)), keyframes
    size = request.num_frames, request.width, request.height
    mask = None if given.mask is None else fitted_mask(given.mask, *size)
    return request, Media((), (), fitted(given.frames, *size), UNNAMED, mask), keyframes


def _going_on(config: Config, text: str, given: Given, wishes: dict[str, Any]) -> tuple[Request, Media]:
    """As `--extend` does it (serving/segments.py), for one segment."""
    assert given.frames is not None
    if config.task not in HOW:
        raise ValueError(f"{config.source} is for {config.task}, and what goes on is a video: leave the frames out")
    count, height, width, _ = given.frames.shape
    overlap = checked_overlap(config.task, given.overlap, count)
    size = wishes.pop("width") or width, wishes.pop("height") or height
    length = wishes.pop("time_length")
    seconds = config.generation.time_length if length is None else length
    part = Part(text, int(seconds * FPS) // FRAMES_PER_LATENT * FRAMES_PER_LATENT, wishes.pop("seed"))
    request = request_of(config, part, size, overlap, **wishes)
    held = fitted(given.frames[-overlap:], overlap, *size)
    shown = [Image.fromarray(held[-1])] if config.task == "i2v" else []
    return request, Media(shown, (), overlap=held, source_name=UNNAMED)
