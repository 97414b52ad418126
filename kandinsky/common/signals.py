"""What ends a run from outside: Ctrl-C, SIGTERM (docker stop, batch systems), SIGHUP (a terminal that is closed).

All three do the same. While a run has steps to lose, the first one lets the step that runs end, so that the run can be
kept, and one more ends it at once; at any other time they raise KeyboardInterrupt. A signal that was ignored when the
program began, as SIGHUP is under nohup, stays ignored. Knows of pipelines only what `Stoppable` says.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
REPEATED = 2.0  # seconds within which a launcher passes on the Ctrl-C that its processes have had from the terminal


class Stoppable(Protocol):
    @property
    def is_denoising(self) -> bool: ...

    @property
    def interrupt(self) -> bool: ...

    def stop(self) -> None: ...


class Stopper:
    """What signals come to; `pipeline` is what they stop, once there is one.

    is_launched: whether a launcher has started this process and others. is_first: whether this is the one that prints.
    """

    def __init__(self, is_launched: bool = False, is_first: bool = True) -> None:
        self.is_launched, self.is_first = is_launched, is_first
        self.pipeline: Stoppable | None = None
        self.status = 128 + signal.SIGINT  # what a shell says of a program that a signal has ended
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        self._last = -REPEATED  # when a signal was heeded
        self._has_raised = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        now = time.monotonic()
        if now - self._last < REPEATED and (self._has_raised or self.is_launched):
            return  # the same once more, or an impatient one while what there is is being kept
        self._last = now
        self.status = 128 + number
        if number != signal.SIGINT:
            self._leave_terminals()
        if self.pipeline is None or not self.pipeline.is_denoising or self.pipeline.interrupt:
            self._has_raised = True
            raise KeyboardInterrupt
        self.pipeline.stop()
        if self.is_first:
            how = "press Ctrl-C again" if number == signal.SIGINT else "once more"
            with contextlib.suppress(OSError):
                # Not print: it may be in the middle of something that is printed.
                os.write(2, f"\nstopping after this step; {how} to stop at once\n".encode())

    def _leave_terminals(self) -> None:
        """Where a terminal is gone, what is written goes nowhere: otherwise the next progress bar would be an error."""
        for number in self._terminals:
            if not os.isatty(number):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)


@contextmanager
def stop_on_signals(stopper: Stopper) -> Iterator[None]:
    """Until the block ends, signals go to `stopper`; where that can't be (not in the main thread), nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heeded = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in heeded:
        signal.signal(number, stopper)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])
