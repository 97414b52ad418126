"""Copies from the host to a GPU through a few pinned buffers, by a thread that runs ahead of who wants them.

CUDA copies from memory that is not pinned, which memory-mapped files never are, by way of a small buffer of its own,
and the host waits: a tenth of what the link can do. Here a thread reads a piece of a tensor into a pinned buffer,
cast on the way where need be; has it copied on a stream of its own, which takes no time of the host's; and goes on to
the next buffer while that is under way. An event after each copy says when its buffer may be written again.

Whoever asks for copies may go on with other work, and has his own stream wait for them when he needs them.

On a CPU the same thread fills the same buffers and copies out of them plainly. That is for tests: it is a copy more
than needed (benchmarks/loading.py), so nothing on a CPU is staged.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from kandinsky.common.limits import STAGING_BUFFERS, STAGING_BYTES

AHEAD = STAGING_BUFFERS * STAGING_BYTES  # bytes that are asked for before they are needed; at least one tensor is
make_thread: Callable[[], Any] = lambda: ThreadPoolExecutor(1, "staging")  # noqa: E731  (the rehearsal has its own)

# Gives a tensor on the host, in any dtype. Called in the thread: what it reads or computes, nobody waits for.
Read = Callable[[], Tensor]
Key = TypeVar("Key")


class Staging:
    """`with Staging(device) as staging:` copies may be asked for; at the end all that were asked for are over or given
    up, the thread has ended, and the buffers are free."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_gpu = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if self._is_gpu else None
        self._thread: Any = None
        self._stopping = threading.Event()
        self._buffers: deque[_Buffer] = deque()  # the next one first

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread after the piece that it is at. May be called again; whoever then asks starts another one."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
        if self._copies is not None:
            self._copies.synchronize()  # what is under way reads the buffers and writes somebody's memory
        self._buffers.clear()
        self._stopping.clear()

    def copy(self, pairs: Iterable[tuple[Tensor, Read]]) -> Arriving:
        """Begin to fill tensors on the device, one after the other, each with what its `Read` gives.

        They are written after all that was asked of the current stream so far: what used their memory before.
        """
        if self._thread is None:
            self._thread = make_thread()
        before = torch.cuda.current_stream(self.device).record_event() if self._is_gpu else None
        return Arriving(self._thread.submit(self._copy, list(pairs), before), self.device)

    def bring(self, tensors: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """(where to, what) -> the filled tensors on the device in the same order, ready for the current stream.

        The iterable is asked for more, and so makes what comes after, while earlier ones are on their way.
        """
        pending: deque[tuple[Tensor, Arriving]] = deque()
        on_the_way = 0
        for target, source in tensors:
            pending.append((target, self.copy([(target, lambda source=source: source)])))  # type: ignore[misc]
            on_the_way += target.nbytes
            while pending and on_the_way >= AHEAD:
                on_the_way -= pending[0][0].nbytes
                yield _arrived(pending)
        while pending:
            yield _arrived(pending)

    # --- in the thread ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _copy(self, pairs: list[tuple[Tensor, Read]], before: torch.cuda.Event | None) -> torch.cuda.Event | None:
        """Copy all; returns the event after the last one."""
        if self._copies is not None and before is not None:
            self._copies.wait_event(before)
        for target, read in pairs:
            source = read()
            assert target.shape == source.shape, (target.shape, source.shape)
            for there, here in zip(*_flat(target, source), strict=True):
                if self._stopping.is_set():
                    raise InterruptedError("copies to the device were given up")
                self._copy_piece(there, here)
        return None if self._copies is None else self._copies.record_event()

    def _copy_piece(self, target: Tensor, source: Tensor) -> None:
        buffer = self._next_buffer()
        staged = buffer.memory[: target.nbytes].view(target.dtype)
        staged.copy_(source)
        if self._copies is None:
            target.copy_(staged)
        else:
            with torch.cuda.stream(self._copies):
                target.copy_(staged, non_blocking=True)
                buffer.is_free = self._copies.record_event()
        self._buffers.append(buffer)

    def _next_buffer(self) -> _Buffer:
        """One that nothing reads any more."""
        if len(self._buffers) < STAGING_BUFFERS:
            return _Buffer(torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=self._is_gpu))
        buffer = self._buffers.popleft()
        if buffer.is_free is not None:
            buffer.is_free.synchronize()
        return buffer


def on_device(tensors: Iterable[tuple[Key, Tensor]], device: torch.device | str) -> Iterator[tuple[Key, Tensor]]:
    """Tensors of the host, with whatever names them, on a device; to a GPU the next ones are on their way meanwhile."""
    device = torch.device(device)
    if device.type != "cuda":
        yield from ((key, tensor.to(device)) for key, tensor in tensors)
        return
    keys: deque[Key] = deque()

    def places() -> Iterator[tuple[Tensor, Tensor]]:
        for key, tensor in tensors:
            keys.append(key)
            yield torch.empty_like(tensor, device=device), tensor

    with Staging(device) as staging:
        for tensor in staging.bring(places()):
            yield keys.popleft(), tensor


class Arriving:
    """Copies that were asked for."""

    def __init__(self, future: Future[torch.cuda.Event | None], device: torch.device) -> None:
        self._future, self._device = future, device

    def wait(self) -> None:
        """Have the current stream wait until all are there. Raises what has gone wrong in the thread, as soon as it
        has; the host waits no longer than until the last copy is begun."""
        event = self._future.result()
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


class _Buffer:
    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.is_free: torch.cuda.Event | None = None  # comes when the copy out of it is over


def _arrived(pending: deque[tuple[Tensor, Arriving]]) -> Tensor:
    target, arriving = pending.popleft()
    arriving.wait()
    return target


def _flat(target: Tensor, source: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The elements of both in the order in which they lie in `target`'s dense memory, in pieces that fit a buffer."""
    order = sorted(range(target.dim()), key=lambda i: (target.stride(i), target.shape[i]), reverse=True)
    size = STAGING_BYTES // target.element_size()
    return target.permute(order).view(-1).split(size), source.permute(order).reshape(-1).split(size)
