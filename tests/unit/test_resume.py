"""A run that was stopped after any of its steps goes on in a new pipeline to the same bytes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kandinsky.config.reading import config_from_dict, config_to_dict
from kandinsky.config.schema import MagCacheConfig
from kandinsky.outputs.resume import Stopped, load_run, output_path, read_record, stopped_path
from kandinsky.pipelines.base import Pipeline
from kandinsky.pipelines.inputs import Inputs
from kandinsky.runtime.magcache import cache_for_request
from tests.unit.small_pipelines import TASKS, build, two_prompts

STEPS = 4
CACHE = MagCacheConfig(mag_ratios=(1.0,) * 2 * (STEPS - 1), enabled=True, threshold=1.0, max_skips=1, retention=0.25)


def pipeline(task: str, **options: Any) -> Pipeline:
    return build(task, make_cache=functools.partial(cache_for_request, CACHE), **options)


def arguments(pipe: Pipeline) -> tuple[Any, Inputs]:
    """With guidance whose difference is kept for a step."""
    return two_prompts(pipe, STEPS, guidance_every=2)


def stop_after(pipe: Pipeline, step: int, path: Path) -> Path:
    def interrupt(pipe: Any, done: int, *_: Any) -> None:
        pipe.interrupt = done + 1 == step

    with pytest.raises(Stopped, match=f"stopped after {step} of {STEPS} steps") as stopped:
        pipe.generate(*arguments(pipe), path, progress=False, callback=interrupt, keep_stopped=True)
    return stopped.value.path


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".mp4", ".png")}


@pytest.mark.parametrize("task", TASKS)
def test_the_same_bytes_from_every_step(task: str, tmp_path: Path) -> None:
    name = "out.png" if task.endswith("i") else "out.mp4"
    expected = pipeline(task)
    expected.generate(*arguments(expected), tmp_path / "whole" / name, progress=False)
    record = json.loads((tmp_path / "whole" / "out.json").read_text())
    assert record["evaluations"]["skipped"] > 0
    assert len(outputs(tmp_path / "whole")) == 2
    for step in range(1, STEPS):
        folder = tmp_path / str(step)
        path = stop_after(pipeline(task), step, folder / name)
        assert path == stopped_path(folder / name) and not outputs(folder)
        resumed = pipeline(task)
        resumed.resume(load_run(path), folder / name, progress=False)
        assert outputs(folder) == outputs(tmp_path / "whole"), step
        assert not resumed.text_embedder.calls  # type: ignore[attr-defined]
        found = json.loads((folder / "out.json").read_text())
        assert {key: found[key] for key in found if key != "seconds"} == {
            key: record[key] for key in record if key != "seconds"
        }


def test_stopped_twice(tmp_path: Path) -> None:
    whole = pipeline("t2v")
    whole.generate(*arguments(whole), tmp_path / "whole" / "out.mp4", progress=False)
    path = stop_after(pipeline("t2v"), 1, tmp_path / "out.mp4")
    again = pipeline("t2v")

    def interrupt(pipe: Any, *_: Any) -> None:
        pipe.interrupt = True

    with pytest.raises(Stopped, match="after 2 of 4"):
        again.resume(load_run(path), tmp_path / "out.mp4", progress=False, callback=interrupt)
    pipeline("t2v").resume(load_run(path), tmp_path / "out.mp4", progress=False)
    assert outputs(tmp_path) == outputs(tmp_path / "whole")


def test_from_python_an_interrupted_call_returns_what_it_has(tmp_path: Path) -> None:
    pipe = pipeline("t2i")

    def interrupt(pipe: Any, *_: Any) -> None:
        pipe.interrupt = True

    pipe.generate(*arguments(pipe), tmp_path / "out.png", progress=False, callback=interrupt)
    assert len(outputs(tmp_path)) == 2 and not stopped_path(tmp_path / "out.png").exists()


def test_an_interruption_after_the_last_step_stops_nothing(tmp_path: Path) -> None:
    pipe = pipeline("t2i")

    def interrupt(pipe: Any, step: int, *_: Any) -> None:
        pipe.interrupt = step == STEPS - 1

    pipe.generate(*arguments(pipe), tmp_path / "out.png", progress=False, callback=interrupt, keep_stopped=True)
    assert len(outputs(tmp_path)) == 2


def test_the_record_makes_config_and_names(tmp_path: Path) -> None:
    pipe = pipeline("i2v")
    path = stop_after(pipe, 1, tmp_path / "my.first.mp4")
    record = read_record(path)
    assert config_to_dict(config_from_dict(record["config"])) == config_to_dict(pipe.config)
    assert (record["dtype"], record["step"], record["image_names"]) == ("float32", 1, ["cat.png"])
    assert output_path(path, ".mp4") == tmp_path / "my.first.mp4"


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    other = tmp_path / "other.safetensors"
    save_file({"latents": torch.zeros(2)}, other)
    damaged = tmp_path / "damaged.stopped.safetensors"
    damaged.write_bytes(stop_after(pipeline("t2i"), 1, tmp_path / "out.png").read_bytes()[:-5])
    for path, says in ((other, "holds no run"), (damaged, "damaged"), (tmp_path / "missing", "missing")):
        with pytest.raises(ValueError, match=says):
            load_run(path)
