"""How long the stages of one generation take, on whatever devices they run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Stopwatch:
    """Seconds per stage of one generation, and how many model evaluations an output asked for and was spared.

    devices: whose work belongs to the stage in which it is asked for; a GPU works on while the program asks for more.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    evaluations: int = 0
    skipped: Sequence[int] = ()  # evaluations of each output that left blocks out
    spared_blocks: int = 0  # in each of these
    # Visual blocks that ran, of all outputs, by how their attention was computed: "engine", or "exact" in its place.
    attention_calls: Counter[str] = field(default_factory=Counter)
    devices: Sequence[torch.device] = ()

    _running: tuple[str, float] | None = None

    @property
    def skipped_evaluations(self) -> int:
        """Of all outputs."""
        return sum(self.skipped)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._running = name, time.perf_counter()
        yield
        self.seconds = self.so_far()
        self._running = None

    def so_far(self) -> dict[str, float]:
        """The seconds of all stages and of the one that runs, once the devices have done what was asked of them."""
        for device in self.devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            elif device.type != "cpu":
                torch.accelerator.synchronize(device)
        if self._running is None:
            return dict(self.seconds)
        name, begin = self._running
        return {**self.seconds, name: round(self.seconds.get(name, 0) + time.perf_counter() - begin, 3)}
