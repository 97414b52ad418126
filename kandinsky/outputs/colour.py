"""Colour and contrast of a stretch of video, and how far a later one has drifted from an earlier one.

A video that goes on from its own last frames drifts a little with every segment, mostly to more contrast. What is
compared is mean and spread of each of red, green and blue over all pixels of a segment. A correction stays within
limits, because a scene may change for good reason, and comes in slowly, because the frame at a joint is right: it is
what the segment goes on from. Knows uint8 frames only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_SHIFT = 8.0  # levels of 255 that a segment's mean is moved by
MOST_GAIN = 1.1  # that its spread is multiplied or divided by
FADE = 12  # frames after a joint until the correction is whole


@dataclass(frozen=True)
class Colours:
    """Mean and spread, (3,) each, in levels from 0 to 255."""

    mean: np.ndarray
    spread: np.ndarray

    def facts(self) -> dict[str, Any]:
        return {"mean": self.mean.round(2).tolist(), "spread": self.spread.round(2).tolist()}


class Tally:
    """`Colours` of frames that come one after the other."""

    def __init__(self) -> None:
        self.pixels, self.sums, self.squares = 0, np.zeros(3), np.zeros(3)

    def over(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The same frames (H, W, 3), each counted on its way."""
        for frame in frames:
            values = frame.reshape(-1, 3).astype(np.float64)
            self.pixels += len(values)
            self.sums += values.sum(axis=0)
            self.squares += (values**2).sum(axis=0)
            yield frame

    def colours(self) -> Colours:
        mean = self.sums / self.pixels
        return Colours(mean, np.sqrt(np.maximum(self.squares / self.pixels - mean**2, 0)))


def colours_of(frames: Iterable[np.ndarray]) -> Colours:
    """Of uint8 frames (T, H, W, 3)."""
    tally = Tally()
    for _ in tally.over(frames):
        pass
    return tally.colours()


def corrected(frames: np.ndarray, own: Colours, wanted: Colours) -> np.ndarray:
    """uint8 frames (T, H, W, 3) after a joint, whose colours are `own`, brought close to the `wanted` ones."""
    shift = np.clip(wanted.mean - own.mean, -MOST_SHIFT, MOST_SHIFT)
    flat = own.spread < 1  # there is no contrast to change
    gain = np.clip(wanted.spread / np.where(flat, 1, own.spread), 1 / MOST_GAIN, MOST_GAIN)
    gain[flat] = 1
    out = np.empty_like(frames)
    for i, frame in enumerate(frames):
        share = min((i + 1) / FADE, 1.0)
        changed = (frame - own.mean) * (1 + share * (gain - 1)) + own.mean + share * shift
        out[i] = np.rint(changed).clip(0, 255)
    return out
