"""Workers from the outside, with processes that speak as one and die where a test says: no torch, no weights."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kandinsky.config.reading import load_config
from kandinsky.planning.machine import Machine
from kandinsky.serving.bench import Bench, host_peak
from kandinsky.serving.lanes import Outcome, Task
from kandinsky.serving.ownership import own
from kandinsky.serving.variants import Catalogue, Variant
from kandinsky.serving.worker_process import Options, Worker
from tests.limits import PATIENCE

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = ("tiny_t2v", "tiny_t2i", "tiny_i2i")
ROOM = 1 << 40

# Does as a job's prompt says: "die denoising", "hang decoding", "fail", or makes an output.
SPEAKER = """
import json, os, signal, sys, threading, time
def say(**news): print(json.dumps(news), flush=True)
setup = json.loads(sys.stdin.readline())
say(machine={"host_memory": %(memory)d, "float32_convolutions": ["bfloat16"]})
if os.path.exists(%(flag)r):
    kind = open(%(flag)r).read()
    if kind == "die once": os.remove(%(flag)r)
    if kind.startswith("die"): os.kill(os.getpid(), signal.SIGKILL)
    say(refused=kind); sys.exit()
say(ready=True)
cancelled, jobs, more = set(), [], threading.Condition()
def listen():
    for line in sys.stdin:
        order = json.loads(line)
        with more:
            if "cancel" in order: cancelled.add(order["cancel"])
            else: jobs.append(order)
            more.notify_all()
    with more:
        for job in jobs: say(id=job["make"], outcome="kept")
    os._exit(0)
threading.Thread(target=listen, daemon=True).start()
while True:
    with more:
        while not jobs: more.wait()
        job = jobs[0]
    what, _, where = job["request"]["samples"][0]["text"].partition(" ")
    for step, stage in enumerate(("encoding", "denoising", "decoding")):
        say(id=job["make"], stage=stage, step=step)
        if stage == where and what == "die": os.kill(os.getpid(), signal.SIGKILL)
        if stage == where and what == "exit": os._exit(3)
        if stage == where and what == "hang":
            with more: more.wait_for(lambda: job["make"] in cancelled)
    with more:
        jobs.pop()
        was_cancelled = job["make"] in cancelled
        cancelled.discard(job["make"])
        if was_cancelled: say(id=job["make"], outcome="cancelled", error="it was cancelled")
        elif what == "fail": say(id=job["make"], outcome="failed", error="no memory", code="out_of_memory")
        else:
            say(id=job["make"], preview="QUJD")
            say(id=job["make"], outcome="done", seconds={"denoise": 1})
"""


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue([Variant(name, load_config(REPOSITORY / "configs" / f"config_{name}.yaml")) for name in NAMES])


class Spoken(Worker):
    """Counts processes."""

    started = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        Spoken.started += 1


@pytest.fixture
def make_bench(catalogue: Catalogue, tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []
    Spoken.started = 0

    def make(memory: int = ROOM) -> Bench:
        code = SPEAKER % {"memory": memory, "flag": str(tmp_path / "flag")}
        new_worker = functools.partial(Spoken, command=(sys.executable, "-c", code))
        benches.append(Bench(catalogue, Options(stop_seconds=PATIENCE), new_worker=new_worker))
        return benches[-1]

    yield make
    for bench in benches:
        bench.close()


def task(catalogue: Catalogue, prompt: str, model: str = "tiny_t2v", name: str = "job") -> Task:
    picture = (64, 64) if catalogue[model].needs_picture else None
    (order,) = catalogue.orders({"model": model, "prompt": prompt, "seed": 1}, picture)
    return Task(name, order, Path("out.mp4"))


def make(bench: Bench, catalogue: Catalogue, prompt: str, **options: Any) -> tuple[Outcome, list[dict[str, Any]]]:
    seen: list[dict[str, Any]] = []
    return bench.make(task(catalogue, prompt, **options), seen.append), seen


def test_a_job_and_its_news(make_bench: Callable[..., Bench], catalogue: Catalogue) -> None:
    bench = make_bench()
    outcome, seen = make(bench, catalogue, "make")
    assert outcome == Outcome("done", seconds={"denoise": 1})
    assert [news["stage"] for news in seen if "stage" in news] == ["loading", "encoding", "denoising", "decoding"]
    assert seen[-1]["preview"] == b"ABC"
    assert bench.machine == Machine(ROOM, float32_convolutions=("bfloat16",)) and hash(bench.machine)
    assert make(bench, catalogue, "fail")[0] == Outcome("failed", "no memory", "out_of_memory")
    assert make(bench, catalogue, "make")[0].state == "done" and Spoken.started == 1


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_worker_that_dies_costs_its_job(
    make_bench: Callable[..., Bench], catalogue: Catalogue, tmp_path: Path
) -> None:
    bench = make_bench()
    for stage in ("encoding", "denoising", "decoding"):
        outcome, _ = make(bench, catalogue, f"die {stage}")
        assert outcome.state == "failed" and outcome.code == "server_error"
        assert f"was killed, as the system does where memory runs out while {stage}" in str(outcome.error)
        assert make(bench, catalogue, "make")[0].state == "done"
    assert "ended with status 3" in str(make(bench, catalogue, "exit denoising")[0].error)
    # While it is loaded: it is tried once more.
    (tmp_path / "flag").write_text("die once")
    assert make(bench, catalogue, "make")[0].state == "done"
    bench.workers["tiny_t2v"].kill()  # between two jobs: nobody notices
    bench.workers["tiny_t2v"].process.wait()
    assert make(bench, catalogue, "make")[0].state == "done"
    bench.workers["tiny_t2v"].kill()
    (tmp_path / "flag").write_text("die always")
    outcome, _ = make(bench, catalogue, "make")
    assert outcome.state == "failed" and "while it was loaded" in str(outcome.error)
    (tmp_path / "flag").write_text("weights not found at x")
    assert make(bench, catalogue, "make")[0] == Outcome("failed", "weights not found at x", "invalid_request_error")
    (tmp_path / "flag").unlink()
    assert make(bench, catalogue, "make")[0].state == "done"


def started(bench: Bench, catalogue: Catalogue, prompt: str) -> tuple[threading.Thread, list[Outcome]]:
    """A job in a thread, at its second stage by now."""
    outcomes: list[Outcome] = []
    is_there = threading.Event()

    def work() -> None:
        one = task(catalogue, prompt)
        outcomes.append(bench.make(one, lambda news: is_there.set() if news.get("step") == 1 else None))

    thread = threading.Thread(target=work)
    thread.start()
    assert is_there.wait(PATIENCE)
    return thread, outcomes


def test_cancelled_once_and_twice(make_bench: Callable[..., Bench], catalogue: Catalogue) -> None:
    bench = make_bench()
    thread, outcomes = started(bench, catalogue, "hang denoising")
    bench.cancel("another")
    bench.cancel("job")
    thread.join(PATIENCE)
    assert [one.state for one in outcomes] == ["cancelled"]
    thread, outcomes = started(bench, catalogue, "hang denoising")
    os.kill(bench.workers["tiny_t2v"].process.pid, signal.SIGSTOP)  # it hears nothing
    bench.cancel("job")
    bench.cancel("job")
    thread.join(PATIENCE)
    assert [one.state for one in outcomes] == ["cancelled"]
    assert make(bench, catalogue, "make")[0].state == "done"


def test_closed_while_it_works(make_bench: Callable[..., Bench], catalogue: Catalogue) -> None:
    bench = make_bench()
    thread, outcomes = started(bench, catalogue, "hang denoising")
    bench.close()
    thread.join(PATIENCE)
    assert [one.state for one in outcomes] == ["kept"]
    assert not bench.workers["tiny_t2v"].is_alive


def test_as_many_are_loaded_as_fit(make_bench: Callable[..., Bench], catalogue: Catalogue) -> None:
    def peak(name: str) -> int:
        variant = catalogue[name]
        return host_peak(variant.plan(variant.default, Machine(ROOM), None))

    bench = make_bench(peak("tiny_t2v") + peak("tiny_t2i"))
    for name, loaded in (
        ("tiny_t2v", ["tiny_t2v"]),
        ("tiny_t2i", ["tiny_t2v", "tiny_t2i"]),
        ("tiny_t2v", ["tiny_t2i", "tiny_t2v"]),
        ("tiny_i2i", ["tiny_i2i"] if peak("tiny_i2i") > peak("tiny_t2i") else ["tiny_t2v", "tiny_i2i"]),
    ):
        assert make(bench, catalogue, "make", model=name)[0].state == "done"
        assert list(bench.workers) == loaded
    bench = make_bench(int(1.1 * peak("tiny_t2v")))
    for name in ("tiny_t2v", "tiny_t2i", "tiny_t2v"):
        assert make(bench, catalogue, "make", model=name)[0].state == "done"
        assert list(bench.workers) == [name]


@pytest.mark.skipif(os.name != "posix", reason="locks of files")
def test_a_folder_belongs_to_one_server(tmp_path: Path) -> None:
    handle = own(tmp_path, 1)
    with pytest.raises(ValueError, match="another server works in"):
        own(tmp_path, 0)
    os.close(handle)
    os.close(own(tmp_path, 0))
