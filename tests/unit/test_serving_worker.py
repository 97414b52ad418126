"""A worker from the inside, on small random models in this process: what is kept, shown, cancelled and told."""

from __future__ import annotations

import dataclasses
import io
import json
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kandinsky.common.signals import Stopper
from kandinsky.outputs import resume
from kandinsky.outputs.preview import LatentRGB
from kandinsky.request import resolve_request
from kandinsky.serving.directed import Extras
from kandinsky.serving.longer import resolve_long
from kandinsky.serving.worker import Making, News, Worker
from tests.unit.small_pipelines import PICTURE, build

STEPS = 6


class Told:
    """News in place of a pipe."""

    def __init__(self) -> None:
        self.lines = io.BytesIO()
        self.news = News(self.lines)

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines.getvalue().splitlines()]

    @property
    def outcome(self) -> dict[str, Any]:
        return self.all()[-1]


MakeWorker = Callable[..., tuple[Worker, Told]]


@pytest.fixture
def make_worker() -> MakeWorker:
    def make(task: str = "t2v", keep_seconds: float = 1e9, preview: bool = False) -> tuple[Worker, Told]:
        told = Told()
        latent_rgb = LatentRGB(torch.ones(16, 3) / 16, torch.zeros(3)) if preview else None
        pipeline = build(task, latent_rgb=latent_rgb)
        setup = {"preview": preview, "keep_seconds": keep_seconds}
        return Worker(pipeline, setup, told.news, Stopper(is_launched=True, is_first=False)), told

    return make


def job(worker: Worker, output: Path, **more: Any) -> dict[str, Any]:
    config = worker.pipeline.config
    sizes = [PICTURE.size] if config.task in ("i2v", "i2i") else []
    request = resolve_request(config, "a red cat", image_sizes=sizes, seed=1, num_steps=STEPS)
    asked = json.loads(json.dumps(dataclasses.asdict(request)))
    return {
        "make": "job", "request": asked, "magcache": False, "loras": [], "output": str(output), "picture": None,
        "picture_name": None, "extras": {}, "files": {}, **more,
    }  # fmt: skip


def test_a_job_that_is_kept_after_every_step_is_the_same(
    make_worker: MakeWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, told = make_worker()
    worker.work(job(worker, tmp_path / "whole.mp4"))
    assert told.outcome["outcome"] == "done" and set(told.outcome["seconds"]) >= {"denoise", "decode"}
    steps = [news["step"] for news in told.all() if "step" in news]
    assert steps == list(range(1, STEPS + 1))

    kept: list[int] = []
    load_run = resume.load_run

    def counted(path: Path) -> Any:
        run = load_run(path)
        kept.append(run.state.step)
        return run

    monkeypatch.setattr(resume, "load_run", counted)
    worker, told = make_worker(keep_seconds=0)
    worker.work(job(worker, tmp_path / "kept.mp4"))
    assert told.outcome["outcome"] == "done" and kept == list(range(1, STEPS))
    assert (tmp_path / "kept.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_longer_video_is_kept_ended_and_gone_on_with(
    make_worker: MakeWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a picture, two segments; what ends in the second goes on there to the same bytes; frames are doubled."""
    PICTURE.save(tmp_path / "picture.png")
    worker, told = make_worker("i2v")
    config = worker.pipeline.config
    video = resolve_long(
        config, "a red cat", name="extend", seconds=0.17, image_sizes=[PICTURE.size], seed=1, num_steps=STEPS
    )
    first, extras = video.requests[0], Extras(further=video.requests[1:], is_long=True, overlap=video.overlap, fps=48)
    assert len(video.requests) == 2
    asked = {
        "request": json.loads(json.dumps(dataclasses.asdict(first))),
        "extras": json.loads(json.dumps(extras.as_dict)),
        "picture": str(tmp_path / "picture.png"),
        "picture_name": "cat.png",
    }
    worker.work({**job(worker, tmp_path / "whole.mp4"), **asked})
    assert told.outcome["outcome"] == "done", told.outcome
    assert [news["step"] for news in told.all() if "step" in news] == list(range(1, 2 * STEPS + 1))
    record = json.loads((tmp_path / "whole.json").read_text())
    assert record["image"] == "cat.png" and record["post"]["frames"] == 2 * record["num_frames"]
    assert record["seconds"]["denoise"] > max(one["seconds"]["denoise"] for one in record["extended"]["segments"])

    call = Making.__call__

    def ends(making: Making, pipeline: Any, step: int, *rest: Any) -> None:
        call(making, pipeline, step, *rest)
        if step == 2 and making.segment == video.requests[1]:
            making.stop()

    monkeypatch.setattr(Making, "__call__", ends)
    worker, told = make_worker("i2v", keep_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        worker.work({**job(worker, tmp_path / "part.mp4"), **asked})
    assert told.outcome["outcome"] == "kept" and (tmp_path / "part.segments" / "0002.stopped.safetensors").exists()
    monkeypatch.setattr(Making, "__call__", call)
    worker, told = make_worker("i2v")
    worker.work({**job(worker, tmp_path / "part.mp4"), **asked})
    assert [news["step"] for news in told.all() if "step" in news] == list(range(STEPS + 4, 2 * STEPS + 1))
    assert (tmp_path / "part.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert not (tmp_path / "part.segments").exists()


def test_an_end_keeps_the_job_and_the_next_worker_goes_on(
    make_worker: MakeWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, _ = make_worker()
    worker.work(job(worker, tmp_path / "whole.mp4"))

    worker, told = make_worker()
    call = Making.__call__

    def ends(making: Making, pipeline: Any, step: int, *rest: Any) -> None:
        call(making, pipeline, step, *rest)
        if step == 2:
            making.stop()  # what a signal comes to

    monkeypatch.setattr(Making, "__call__", ends)
    with pytest.raises(KeyboardInterrupt):
        worker.work(job(worker, tmp_path / "part.mp4"))
    assert told.outcome == {"id": "job", "outcome": "kept"}
    assert (tmp_path / "part.stopped.safetensors").exists()

    monkeypatch.setattr(Making, "__call__", call)
    worker, told = make_worker()
    worker.work(job(worker, tmp_path / "part.mp4"))
    assert [news["step"] for news in told.all() if "step" in news] == list(range(4, STEPS + 1))
    assert (tmp_path / "part.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_previews_show_the_estimate(make_worker: MakeWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kandinsky.serving.worker.PREVIEW_SECONDS", 0)
    monkeypatch.setattr("kandinsky.serving.worker.PREVIEW_SHARE", 0)
    worker, told = make_worker(preview=True)
    worker.work(job(worker, tmp_path / "a.mp4"))
    previews = [Image.open(io.BytesIO(b64decode(news["preview"]))) for news in told.all() if "preview" in news]
    assert len(previews) == STEPS - 2  # the first step has none before it, the last one the output itself
    assert {(one.format, one.size) for one in previews} == {("WEBP", (16, 16))}  # half of 32 x 32


def test_cancelled_between_two_steps(make_worker: MakeWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, told = make_worker()
    call = Making.__call__

    def cancels(making: Making, pipeline: Any, step: int, *rest: Any) -> None:
        if step == 2:
            worker.cancel("another")
            worker.cancel("job")
        call(making, pipeline, step, *rest)

    monkeypatch.setattr(Making, "__call__", cancels)
    worker.work(job(worker, tmp_path / "a.mp4"))
    assert told.outcome["outcome"] == "cancelled"
    assert [news["step"] for news in told.all() if "step" in news] == [1, 2]
    assert not list(tmp_path.iterdir()) and worker.making is None
    worker.cancel("later")  # before it begins
    worker.work({**job(worker, tmp_path / "b.mp4"), "make": "later"})
    assert told.outcome == {"id": "later", "outcome": "cancelled", "error": "it was cancelled", "code": "cancelled"}


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("it must be\nsmaller"), "invalid_request_error", "it must be smaller"),
        (OSError(28, "No space left on device"), "server_error", "can't write"),
        (torch.OutOfMemoryError("70 GiB"), "out_of_memory", "out of memory: ask for something smaller"),
        (MemoryError(), "out_of_memory", "smaller or shorter"),
        (KeyError("x"), "server_error", "KeyError: 'x'"),
    ],
)
def test_failures_are_told_and_cost_one_job(
    make_worker: MakeWorker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: str,
    words: str,
) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise error

    worker, told = make_worker()
    with monkeypatch.context() as patch:
        if isinstance(error, OSError):
            patch.setattr("imageio_ffmpeg.count_frames_and_secs", fails)  # the last thing that writing a video does
        else:
            patch.setattr(type(worker.pipeline), "decode", fails)
        worker.work(job(worker, tmp_path / "a.mp4"))
    assert told.outcome["outcome"] == "failed" and told.outcome["code"] == code
    assert words in told.outcome["error"] and len(told.outcome["error"].splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.latents.safetensors"]  # nothing that was denoised is lost
    worker.work(job(worker, tmp_path / "a.mp4"))
    assert told.outcome["outcome"] == "done"
    assert not [news for news in told.all()[-3:] if "step" in news]  # it was only decoded
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.json"}


def test_a_picture_is_called_as_its_client_calls_it(make_worker: MakeWorker, tmp_path: Path) -> None:
    worker, told = make_worker("i2v")
    PICTURE.save(tmp_path / "stored.png")
    worker.work(job(worker, tmp_path / "a.mp4", picture=str(tmp_path / "stored.png"), picture_name="cat.jpg"))
    assert told.outcome["outcome"] == "done"
    assert json.loads((tmp_path / "a.json").read_text())["image"] == "cat.jpg"


class Recorded:
    """In place of a DiT's adapters: remembers what it was told, and makes no difference."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.active: list[dict[str, Any]] = [{"name": "own", "path": "own", "scale": 0.5, "trigger": ""}]

    def load(self, adapter_config: Any, path: Any, name: str, trigger: str | None) -> None:
        self.loaded.append(name)
        self.activate({name: 1.0})

    def activate(self, scales: dict[str, float]) -> None:
        self.active = [{"name": name, "path": name, "scale": scale, "trigger": ""} for name, scale in scales.items()]


def test_adapters_are_a_job_s_own(tmp_path: Path) -> None:
    told, adapters = Told(), Recorded()
    worker = Worker(
        build("t2i", adapters=adapters), {"preview": False, "keep_seconds": 1e9}, told.news, Stopper(True, False)
    )
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"")

    def used(*loras: tuple[str, float]) -> dict[str, float]:
        wanted = [[name, str(tmp_path / name), scale] for name, scale in loras]
        worker.work(job(worker, tmp_path / "out.png", loras=wanted))
        assert told.outcome["outcome"] == "done", told.outcome
        record = json.loads((tmp_path / "out.json").read_text())
        return {one["name"]: one["scale"] for one in record["adapters"]}

    assert used() == {"own": 0.5}  # the config's
    assert used(("a", 0.8), ("b", 1.0)) == {"lora:a": 0.8, "lora:b": 1.0}
    assert used(("b", 0.3)) == {"lora:b": 0.3}
    assert used() == {"own": 0.5}
    assert adapters.loaded == ["lora:a", "lora:b"]  # once each
    import os

    os.utime(tmp_path / "a", (1, 1))  # another file by now
    assert used(("a", 1.0)) == {"lora:a": 1.0} and adapters.loaded == ["lora:a", "lora:b", "lora:a"]
