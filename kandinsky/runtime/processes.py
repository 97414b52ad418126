"""The processes that make one output together: how they meet, agree, and end.

A launcher (torchrun, `python -m torch.distributed.launch`) starts the same program several times, on one machine or on
several, and tells each copy its number. Here they find each other, by the launcher's key-value store, and form a
torch.distributed process group.

When one process fails, all end within seconds, with its message: it is written into the store, which every process
reads once a second. A process that was killed writes nothing; but every process also leaves a sign of life there once a
second, and the one before it in the ring of all misses it. Collective operations alone would not do: NCCL's wait for a
dead process for as long as their timeout, which has to be longer than the longest thing that one process does alone.

Knows torch.distributed and nothing of models, requests or what a process computes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

BEAT = 1.0  # seconds between two signs of life
SILENCE = 25.0  # seconds without one after which a process counts as dead
STARTING = 300.0  # seconds that the others may need to import and start, their machines included
TELLING = 5.0  # seconds that the first process has to show an error before another one does it
COLLECTIVE_TIMEOUT = timedelta(hours=2)  # longer than anything that one process does while the others wait for it
FAILED = 1  # exit status of a process that ends because of another one


class Processes:
    """This process among those that make one output together.

    Args:
        rank, size: which one of how many.
        local_rank: which one on this machine, and so which of its GPUs.
        store: what all of them read and write.
        end: ends this process; interrupt: what a signal to it would do. A test puts something else in their places.
        silence: seconds.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        local_rank: int,
        store: Any,
        end: Callable[[int], Any] = os._exit,
        silence: float = SILENCE,
        interrupt: Callable[[int], Any] = signal.raise_signal,
    ) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store = dist.PrefixStore("kandinsky", store)
        self._group_store = dist.PrefixStore("kandinsky_group", store)
        self._end_process = end
        self._silence = silence
        self._interrupt = interrupt
        self._left = threading.Event()
        self._ending = threading.Lock()
        own = self._store.clone()  # type: ignore[attr-defined]  # for a thread of its own
        self._watcher = threading.Thread(target=self._watch, args=(own,), daemon=True)
        self._watcher.start()

    @classmethod
    def join(cls, rank: int, size: int, local_rank: int) -> Processes:
        """Meet the others at MASTER_ADDR and MASTER_PORT, which the launcher has set for torch.distributed.

        Raises RuntimeError where nobody answers there.
        """
        store, *_ = next(iter(dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=STARTING))))
        return cls(rank, size, local_rank, store)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def connect(self, device: torch.device) -> None:
        """Form the process group: NCCL for tensors on GPUs, gloo for those on the CPU."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=self._group_store,
            rank=self.rank,
            world_size=self.size,
            timeout=COLLECTIVE_TIMEOUT,
        )

    def agree(self, value: Value) -> Value:
        """The first process's value, in all of them. Tensors have to be of one shape and dtype everywhere."""
        if isinstance(value, Tensor):
            value = value.contiguous()  # type: ignore[assignment]
            dist.broadcast(value, 0)
            return value
        values = [value]
        dist.broadcast_object_list(values, 0, device=torch.device("cpu"))
        return values[0]

    def everybodys(self, value: Value) -> list[Value]:
        """The values of all, in the order of the processes."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait_for_all(self, what: str) -> None:
        """Come back when all processes have called this with the same word, which is used once."""
        self._store.set(f"{what}/{self.rank}", "1")
        self._store.wait([f"{what}/{rank}" for rank in range(self.size)], COLLECTIVE_TIMEOUT)

    def leave(self) -> None:
        """Part from the others after everything went well."""
        if self.is_first:  # it may be the one that holds the store
            self.wait_for_all("left")
        else:
            self._store.set(f"left/{self.rank}", "1")
        self._left.set()
        self._watcher.join()
        if dist.is_initialized():
            dist.destroy_process_group()

    def interrupted(self, status: int) -> NoReturn:
        """End all processes because this one was interrupted, without a word; does not return.

        The first process is let end as if it had been interrupted itself: what there is is in its hands.
        """
        self._left.set()  # nobody tells this one how the others end
        with contextlib.suppress(RuntimeError, dist.DistError):
            self._store.set(f"left/{self.rank}", "1")
            if self.is_first:
                self._store.set("told", str(self.rank))
                self._store.set("failure", "interrupted")
                # It may be the one that holds the store.
                self._store.wait([f"left/{rank}" for rank in range(self.size)], timedelta(seconds=TELLING))
            else:
                self._store.set("interrupted", "1")
                self._store.wait(["failure"], timedelta(seconds=TELLING))
        self._end_process(status)
        raise SystemExit(status)  # where that came back

    def fail(self, error: BaseException | str, status: int = FAILED) -> NoReturn:
        """End all processes with this error, of which the first process tells; does not return.

        An exception that no user can mend is told with its traceback.
        """
        text = " ".join(str(error).split())
        name = "" if self.is_first else f"process {self.rank}: "
        if isinstance(error, RuntimeError) and ("gloo" in text or isinstance(error, dist.DistError)):
            text = f"the connection to another process is lost, it has ended or can't be reached ({text})"
        elif isinstance(error, BaseException) and error.__traceback__ and not isinstance(error, ValueError | OSError):
            name = f"process {self.rank}: "
            text = f"{text}\n{''.join(traceback.format_exception(error)).rstrip()}"
        self._end(self._store, name + text, status)
        raise SystemExit(status)  # where `end` came back

    # --- watching the others ------------------------------------------------------------------------------------------

    def _watch(self, store: Any) -> None:
        """Leave signs of life, miss the next process's, and read whether anybody has failed."""
        following = (self.rank + 1) % self.size
        seen, since = b"", time.monotonic()
        limit = STARTING  # until the first sign
        beat = 0
        is_interrupted = False
        while not self._left.wait(BEAT):
            try:
                beat += 1
                store.set(f"beat/{self.rank}", str(beat))
                if self.is_first and not is_interrupted and store.check(["interrupted"]):
                    is_interrupted = True
                    self._interrupt(signal.SIGTERM)
                if store.check(["failure"]):
                    if self._left.is_set():  # it is this one's own: `interrupted` was called meanwhile
                        return
                    self._end(store, store.get("failure").decode(), FAILED)
                    return
                if store.check([f"left/{following}"]):
                    since = time.monotonic()
                elif store.check([f"beat/{following}"]):
                    sign = store.get(f"beat/{following}")
                    if sign != seen:
                        seen, since, limit = sign, time.monotonic(), self._silence
            except (RuntimeError, dist.DistError) as error:
                if not self._left.is_set():
                    self._end(None, f"the process that holds the others together can't be reached ({error})", FAILED)
                return
            if time.monotonic() - since > limit:
                how_long = f"for {limit:.0f} s: it was killed, or its machine can't be reached"
                self._end(store, f"process {following} has given no sign of life {how_long}", FAILED)
                return

    def _end(self, store: Any, text: str, status: int) -> None:
        """Have all processes end with the first error of any; one of them tells it, the first process if it can."""
        if not self._ending.acquire(blocking=False):  # the other thread is at it
            if not self._left.wait(3 * TELLING):
                self._end_process(status)
            return
        is_told = False
        try:
            if store is not None:
                text = store.compare_set("failure", "", text).decode()
                deadline = time.monotonic() + (0 if self.is_first else TELLING)
                while time.monotonic() < deadline and not store.check(["told"]):
                    time.sleep(BEAT / 10)
                is_told = store.compare_set("told", "", str(self.rank)).decode() != str(self.rank)
                store.set(f"left/{self.rank}", "1")
        except (RuntimeError, dist.DistError):
            pass  # nobody is left to be told by
        if not is_told:
            logger.error("error: %s", text)
        self._end_process(status)
