"""The engine's queue, states and files, with lanes that make nothing but what a test says."""

from __future__ import annotations

import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kandinsky.config.reading import load_config
from kandinsky.planning.machine import Machine
from kandinsky.serving.engine import Engine, NoSuchJob, NotNow, QueueFull
from kandinsky.serving.lanes import Outcome, Report, Task
from kandinsky.serving.limits import Limits
from kandinsky.serving.store import Job, Store
from kandinsky.serving.variants import Catalogue, Order, Variant

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 60  # seconds, only to end what hangs


def catalogue(limits: Limits | None = None) -> Catalogue:
    names = ("tiny_t2v", "tiny_i2v", "tiny_t2i", "tiny_i2i")
    configs = [load_config(REPOSITORY / "configs" / f"config_{name}.yaml") for name in names]
    return Catalogue([Variant(name, config) for name, config in zip(names, configs, strict=True)], limits=limits)


class Lane:
    """Waits, once a job has come, for the test to say how it ends; writes its output where that is "done"."""

    machine: Machine | None = Machine(1 << 40)

    def __init__(self) -> None:
        self.begun: queue.Queue[tuple[Task, Report]] = queue.Queue()
        self.endings: queue.Queue[Outcome | Exception] = queue.Queue()
        self.cancelled: list[str] = []

    def prepare(self) -> None:
        pass

    def make(self, task: Task, report: Report) -> Outcome:
        self.begun.put((task, report))
        ending = self.endings.get(timeout=PATIENCE)
        if isinstance(ending, Exception):
            raise ending
        if ending.state == "done":
            task.output.write_bytes(b"a video")
        return ending

    def cancel(self, job_id: str) -> None:
        self.cancelled.append(job_id)
        self.endings.put(Outcome("cancelled", "it was cancelled", "cancelled"))

    def close(self) -> None:
        self.endings.put(Outcome("kept"))

    def next(self) -> Task:
        return self.begun.get(timeout=PATIENCE)[0]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def start(lane: Lane, limits: Limits | None = None) -> Engine:
        engines.append(Engine(catalogue(limits), tmp_path, [lane]))
        engines[-1].start()
        return engines[-1]

    yield start
    for engine in engines:
        if not engine.is_stopping:
            engine.stop()


def orders(engine: Engine, prompt: str = "a red circle", **fields: Any) -> list[Order]:
    picture = fields.pop("picture", None)
    return engine.catalogue.orders({"model": "tiny_t2v", "prompt": prompt, "seed": 1, **fields}, picture)


def submit(engine: Engine, client: str = "me", prompt: str = "a red circle", **fields: Any) -> Job:
    (job,) = engine.submit("video", client, orders(engine, prompt, **fields))
    return job


def until(condition: Callable[[], bool]) -> None:
    """Wait for what other threads do."""
    pause = threading.Event()
    for _ in range(PATIENCE * 100):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it never came")


def test_a_job_from_the_queue_to_its_file(start: Callable[..., Engine], tmp_path: Path) -> None:
    lane = Lane()
    engine = start(lane)
    job = submit(engine)
    task, report = lane.begun.get(timeout=PATIENCE)
    assert task.order.request.samples[0].text == "a red circle" and task.output == tmp_path / f"{job.id}.mp4"
    report({"stage": "denoising", "step": 3})
    report({"preview": b"picture"})
    now = engine.job(job.id)
    assert (now.state, now.step, engine.live[job.id].preview_step) == ("running", 3, 3)
    lane.endings.put(Outcome("done", seconds={"denoise": 2.0, "decode": 1.0}))
    until(lambda: engine.job(job.id).state == "done")
    done = engine.job(job.id)
    assert (done.output, done.step, done.seconds["denoise"]) == (f"{job.id}.mp4", 16, 2.0)
    # What the next one will take: twice the steps are twice the denoising.
    (more,) = orders(engine, steps=32)
    assert engine.seconds_for(more) == pytest.approx(5.0)
    assert engine.seconds_until_free() == 0


def test_clients_take_turns(start: Callable[..., Engine]) -> None:
    lane = Lane()
    engine = start(lane)
    first = submit(engine, "a", "a0")
    assert lane.next().id == first.id
    for i in (1, 2, 3):
        submit(engine, "a", f"a{i}")
    for name in ("b1", "b2"):
        submit(engine, "b", name)
    submit(engine, "c", "c1")
    order = []
    for _ in range(6):
        lane.endings.put(Outcome("done"))
        order.append(lane.next().order.request.samples[0].text)
    lane.endings.put(Outcome("done"))
    assert order == ["b1", "c1", "a1", "b2", "a2", "a3"]


def test_failures_cost_one_job(start: Callable[..., Engine]) -> None:
    lane = Lane()
    engine = start(lane)
    for ending in (Outcome("failed", "out of memory", "out_of_memory"), RuntimeError("a lane's own mistake")):
        job = submit(engine)
        lane.endings.put(ending)
        until(lambda job=job: engine.job(job.id).state == "failed")  # type: ignore[misc]
        assert str(getattr(ending, "error", ending)) in str(engine.job(job.id).error)
    again = submit(engine)
    lane.endings.put(Outcome("done"))
    until(lambda: engine.job(again.id).state == "done")
    assert engine.ended["tiny_t2v", "failed"] == 2


def test_cancel_retry_delete(start: Callable[..., Engine], tmp_path: Path) -> None:
    lane = Lane()
    engine = start(lane)
    running, waiting = submit(engine), submit(engine)
    lane.next()
    assert engine.cancel(waiting.id).state == "cancelled"
    left = tmp_path / f"{running.id}.stopped.safetensors"
    left.write_bytes(b"")
    engine.cancel(running.id)
    until(lambda: engine.job(running.id).state == "cancelled")
    assert lane.cancelled == [running.id] and not left.exists()
    with pytest.raises(NoSuchJob):
        engine.cancel("video_0")
    assert engine.retry(waiting.id).state == "queued"
    assert lane.next().id == waiting.id
    with pytest.raises(NotNow, match="is running"):
        engine.retry(waiting.id)
    engine.delete(waiting.id)  # while it runs
    with pytest.raises(NoSuchJob):
        engine.job(waiting.id)
    assert [job.id for job in engine.page(10)] == [running.id]
    until(lambda: engine.store.get(waiting.id) is None)
    engine.delete(running.id)
    assert engine.page(10) == [] and not list(tmp_path.glob("video_*"))


def test_a_picture_goes_with_its_job(start: Callable[..., Engine]) -> None:
    lane = Lane()
    engine = start(lane)
    picture = Image.new("RGB", (64, 48), "red")
    (job,) = engine.submit("video", "me", orders(engine, model="tiny_i2v", picture=(64, 48)), picture, "cat.jpg")
    task = lane.next()
    assert task.picture is not None and task.picture_name == "cat.jpg"
    assert list(Image.open(task.picture).get_flattened_data()) == list(picture.get_flattened_data())
    lane.endings.put(Outcome("done"))
    until(lambda: engine.job(job.id).state == "done")
    remix = engine.remix(engine.job(job.id), "you", "it jumps")
    other = lane.next()
    assert other.id == remix.id and other.picture != task.picture and other.picture is not None
    assert other.picture.read_bytes() == task.picture.read_bytes()
    before, now = job.request, remix.request
    assert {**before, "samples": 0} == {**now, "samples": 0} and now["samples"][0]["text"] == "it jumps"
    assert now["samples"][0]["seed"] == 1
    engine.delete(job.id)
    assert not task.picture.exists() and other.picture.exists()


def test_the_queue_is_bounded(start: Callable[..., Engine]) -> None:
    lane = Lane()
    engine = start(lane, Limits(queue=3))
    submit(engine)
    lane.next()
    for _ in range(3):
        submit(engine)
    with pytest.raises(QueueFull, match="3 jobs are waiting") as full:
        submit(engine)
    assert full.value.seconds >= 1


def test_what_stopped_goes_on_and_what_died_too(start: Callable[..., Engine], tmp_path: Path) -> None:
    lane = Lane()
    engine = start(lane)
    jobs = [submit(engine, prompt=f"job {i}") for i in range(3)]
    lane.next()
    engine.stop()
    store = Store(tmp_path)  # as it lies there
    assert [job.state for job in store.in_state("queued")] == ["queued"] * 3
    store.update(jobs[1].id, state="running", attempts=1)  # of an engine that was killed
    store.close()

    lane = Lane()
    engine = start(lane)
    seen = []
    for _ in jobs:
        seen.append(lane.next().id)
        lane.endings.put(Outcome("done"))
    assert seen == [job.id for job in jobs]  # those that had begun come first
    until(lambda: engine.store.counts()["done"] == 3)
    engine.stop()

    store = Store(tmp_path)
    for job in jobs[:2]:
        store.update(job.id, state="running", attempts=3, output=None)
    (tmp_path / jobs[1].file_name).unlink()
    store.close()
    engine = start(Lane())
    assert engine.job(jobs[0].id).state == "done"  # its file is there
    assert engine.job(jobs[1].id).state == "failed" and "3 times" in str(engine.job(jobs[1].id).error)


def test_a_full_disk_loses_no_job(start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    lane = Lane()
    engine = start(lane)
    monkeypatch.setattr("kandinsky.serving.engine.AGAIN", 0.01)
    job = submit(engine)
    lane.next()
    update, failures = engine.store.update, []

    def full(job_id: str, **values: Any) -> None:
        if values.get("state") == "done" and len(failures) < 3:
            failures.append(values)
            raise sqlite3.OperationalError("database or disk is full")
        update(job_id, **values)

    monkeypatch.setattr(engine.store, "update", full)
    lane.endings.put(Outcome("done"))
    until(lambda: engine.job(job.id).state == "done")
    assert len(failures) == 3


def test_what_does_not_fit_is_refused(start: Callable[..., Engine]) -> None:
    lane = Lane()
    lane.machine = Machine(10**8)
    engine = start(lane)
    with pytest.raises(ValueError, match="of host memory, and there are"):
        submit(engine)
    assert engine.store.counts()["queued"] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "sora-2"}, "there is no model 'sora-2': choose one of tiny_t2v"),
        ({"steps": 0}, "the number of steps is 0; it must be a whole number from 1 to 1000"),
        ({"size": "12x"}, "the size is '12x'; it must be WIDTHxHEIGHT"),
        ({"size": "100x100"}, "width is 100; it must be a multiple of 16 pixels"),
        ({"size": "128x128", "width": 128}, "both size and width or height are given"),
        ({"seconds": 22}, "the duration is 22 s; it must be a number from 0"),
        ({"prompt": "x" * 9000}, "the prompt has 9,000 characters"),
        ({"n": 11}, "n is 11; it must be a whole number from 1 to 10"),
        ({"model": "tiny_i2v"}, "is a config for i2v, which needs a picture"),
        ({"loras": ["../x"]}, "there is no adapter '../x'; this server has none"),
        ({"size": "2048x2048", "seconds": 21}, "million pixels, and this server makes at most 200"),
    ],
)
def test_orders_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        catalogue().orders({"model": "tiny_t2v", "prompt": "a", **fields}, None)
    assert message in str(refused.value)


def test_outputs_of_one_request_have_seeds_that_count_up() -> None:
    made = catalogue().orders({"model": "tiny_t2i", "prompt": "a", "seed": 2**32 - 1, "n": 3}, None)
    assert [order.request.samples[0].seed for order in made] == [2**32 - 1, 0, 1]
    assert {order.request.samples[0].prompt for order in made} == {0}
