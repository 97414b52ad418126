"""Signals: which are heeded, when they wait for a step, and what a closed terminal does to what is printed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kandinsky.common import signals
from kandinsky.common.signals import SIGNALS, Stopper, stop_on_signals

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")


class Pipeline(SimpleNamespace):
    """With steps to lose."""

    def __init__(self) -> None:
        super().__init__(is_denoising=True, interrupt=False)

    def stop(self) -> None:
        self.interrupt = True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    yield now


def stopper(pipeline: Any, **options: Any) -> Stopper:
    made = Stopper(**options)
    made.pipeline = pipeline
    return made


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_first_waits_for_the_step_and_the_second_does_not(
    number: signal.Signals, clock: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    stop = stopper(Pipeline())
    with stop_on_signals(stop):
        signal.raise_signal(number)
        assert stop.pipeline is not None and stop.pipeline.interrupt
        assert "stopping after this step" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        signal.raise_signal(number)  # while what there is is being kept
        clock[0] += 5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert stop.status == 128 + number
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_steps_to_lose_it_ends_at_once() -> None:
    pipeline = Pipeline()
    pipeline.is_denoising = False
    for stop in (stopper(None), stopper(pipeline)):
        with stop_on_signals(stop), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_a_run_that_went_on_can_be_stopped_again() -> None:
    """Where it could not be kept."""
    pipeline = Pipeline()
    with stop_on_signals(stopper(pipeline)):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            assert pipeline.interrupt
            pipeline.interrupt = False


def test_what_a_launcher_passes_on_is_the_same_signal(clock: list[float]) -> None:
    """A terminal's Ctrl-C comes to the processes and to their launcher, which sends it to the processes."""
    with stop_on_signals(stopper(Pipeline(), is_launched=True)):
        signal.raise_signal(signal.SIGINT)
        clock[0] += 0.5
        signal.raise_signal(signal.SIGINT)
        clock[0] += 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        with stop_on_signals(stopper(None)):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_fails_nothing_that_is_printed() -> None:
    pid, terminal = os.forkpty()
    if pid == 0:
        status = 1
        try:
            pipeline = Pipeline()
            with stop_on_signals(stopper(pipeline)):
                os.write(1, b"ready")
                while not pipeline.interrupt:
                    signal.pause()
                for number in (1, 2):
                    os.write(number, b"progress\n")
                status = 0
        except OSError as error:
            status = 2 if error.errno else 3
        finally:
            os._exit(status)
    assert os.read(terminal, 5) == b"ready"
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert sys.stderr.writable()
