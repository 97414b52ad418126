"""What is seen of a job while it runs: the latest step and the latest preview, and waiting for news of them.

Whoever watches sees the newest and not everything: a slow reader costs nothing, and nothing piles up.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

Stage = str  # "queued", "loading", "encoding", "denoising", "decoding"


@dataclass
class Live:
    """A job that runs, as it is now."""

    stage: Stage = "loading"
    step: int = 0
    preview: bytes | None = None  # WebP
    preview_step: int = 0


@dataclass
class Watchers:
    """Who waits for news of which job; news come from threads, and those who wait are in event loops."""

    _waiting: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def watch(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever there is news, until the block ends; to be cleared before looking."""
        entry = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            self._waiting.setdefault(job_id, set()).add(entry)
        try:
            yield entry[1]
        finally:
            with self._lock:
                self._waiting[job_id].discard(entry)
                if not self._waiting[job_id]:
                    del self._waiting[job_id]

    def news(self, job_id: str) -> None:
        with self._lock:
            for loop, event in self._waiting.get(job_id, ()):
                with suppress(RuntimeError):  # a loop that has ended
                    loop.call_soon_threadsafe(event.set)

    def news_of_all(self) -> None:
        with self._lock:
            jobs = list(self._waiting)
        for job_id in jobs:
            self.news(job_id)
