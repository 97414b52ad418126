"""What the engine gives jobs to: lanes. Each makes one at a time, here (bench.py) or elsewhere (replicas.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from kandinsky.planning.machine import Machine
from kandinsky.serving.variants import Order


@dataclass(frozen=True)
class Task:
    """A job as a lane needs it. Paths are the same on all machines."""

    id: str
    order: Order
    output: Path
    picture: Path | None = None
    picture_name: str | None = None  # for the record
    loras: tuple[tuple[str, str, float], ...] = ()  # name, path, scale
    files: Mapping[str, Sequence[Path]] = field(default_factory=dict)  # what else it is given, by field


@dataclass(frozen=True)
class Outcome:
    """How a job ended: "kept" is one that goes on when the engine runs again."""

    state: Literal["done", "failed", "cancelled", "kept"]
    error: str | None = None
    code: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)


Report = Callable[[dict[str, Any]], None]


class Lane(Protocol):
    """What makes one job at a time. `close` may be called while it does: the job then comes back as kept."""

    machine: Machine | None  # known once something is loaded

    def prepare(self) -> None: ...

    def make(self, task: Task, report: Report) -> Outcome: ...

    def cancel(self, job_id: str) -> None:
        """End the job after the step that runs; asked a second time, at once."""
        ...

    def close(self) -> None: ...
