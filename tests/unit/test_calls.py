"""Calls from several threads wait for each other, and arguments that are no tensors, paths or functions are refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_pipelines import build, latents_of

from kandinsky.pipelines.base import Pipeline
from kandinsky.runtime.offload import OffloadPlacement

GRACE = 0.2  # seconds that something has to happen too early; if it is to be found, not whether it passes, is up to it


class Adapters:
    """Records what is asked of it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.active: list[Mapping[str, Any]] = []

    def load(self, adapter_config: Any, path: Any, name: str, trigger: str | None) -> None:
        self.log.append(f"load {name}")

    def activate(self, scales: Mapping[str, float]) -> None:
        self.log.append(f"activate {dict(scales)}")


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return build("t2i")


def while_it_runs(pipe: Pipeline, work: Callable[[], object], **options: Any) -> threading.Thread:
    """Have another thread do `work` during a call, which has ended when this comes back; `work` may still go on."""
    thread = threading.Thread(target=work, daemon=True)

    def start(*_: Any) -> None:
        thread.start()
        thread.join(GRACE)

    latents_of(pipe, num_steps=1, callback_on_step_end=start, **options)
    return thread


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.set_adapter("a"),
        lambda pipe: pipe.load_adapter(None, "a.safetensors", "a"),
        lambda pipe: pipe.disable_adapters(),
    ],
)
def test_adapters_change_between_calls_and_not_within(change: Callable[[Pipeline], None]) -> None:
    adapters = Adapters()
    pipe = build("t2i", adapters=adapters)

    def ending(*_: Any) -> None:
        thread.start()
        thread.join(GRACE)
        adapters.log.append("end of the step")

    thread = threading.Thread(target=change, args=(pipe,), daemon=True)
    latents_of(pipe, num_steps=1, callback_on_step_end=ending)
    thread.join(60)
    assert len(adapters.log) == 2 and adapters.log[0] == "end of the step"


def test_a_second_call_waits_for_the_first(pipe: Pipeline) -> None:
    """And gets what it gets alone; `encode_prompt` waits too."""
    alone = latents_of(pipe, "a blue dog", seed=3)
    others: list[Any] = []
    thread = while_it_runs(pipe, lambda: others.append(latents_of(pipe, "a blue dog", seed=3)))
    thread.join(60)
    assert torch.equal(others[0], alone)

    log: list[str] = []
    encoding = threading.Thread(target=lambda: (pipe.encode_prompt("x"), log.append("encoded")), daemon=True)

    def step(*_: Any) -> None:
        if not encoding.is_alive() and not log:
            encoding.start()
        encoding.join(GRACE)
        log.append("step")

    latents_of(pipe, num_steps=2, callback_on_step_end=step)
    encoding.join(60)
    assert log == ["step", "step", "encoded"]


def test_a_callback_may_start_another_run_in_its_own_thread(pipe: Pipeline) -> None:
    inner: list[Any] = []
    outer = latents_of(pipe, num_steps=1, callback_on_step_end=lambda *_: inner.append(latents_of(pipe, num_steps=1)))
    assert torch.equal(outer, inner[0])


def test_another_thread_may_interrupt(pipe: Pipeline) -> None:
    steps: list[int] = []

    def on_step(pipeline: Pipeline, step: int, *_: Any) -> None:
        steps.append(step)
        other = threading.Thread(target=lambda: setattr(pipeline, "interrupt", True))
        other.start()
        other.join(60)

    latents_of(pipe, num_steps=5, callback_on_step_end=on_step)
    assert steps == [0]


def test_nobody_goes_on_before_the_weights_are_there() -> None:
    """The second thread in a stage waits for what the first one brings, and it stays until both have left."""
    log: list[str] = []
    bringing, go_on = threading.Event(), threading.Event()

    class Slow:
        def begin(self) -> None:
            bringing.set()
            assert go_on.wait(60)
            log.append("there")

        def end(self) -> None:
            log.append("gone")

    placement = OffloadPlacement({"dit": torch.device("cpu")}, {"dit": [Slow()]})

    def stage() -> None:
        with placement.use("dit"):
            log.append("used")

    threads = [threading.Thread(target=stage, daemon=True) for _ in range(2)]
    threads[0].start()
    assert bringing.wait(60)
    threads[1].start()
    threads[1].join(GRACE)
    go_on.set()
    for thread in threads:
        thread.join(60)
    # Either both were in it together or one after the other, but never without.
    assert log in (["there", "used", "used", "gone"], ["there", "used", "gone", "there", "used", "gone"])


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"latents": np.zeros((1, 1, 4, 4, 16), np.float32)}, r"latents are a ndarray; .* tensor \(1, 1, 4, 4, 16"),
        ({"latents": "noise.pt"}, "latents are a str; they must be a tensor"),
        ({"latents": torch.zeros(1, 1, 4, 4, 16, dtype=torch.int64)}, "latents are int64; they must be floating-point"),
        ({"latents": torch.zeros(4)}, r"latents are \(4,\); they must be \(samples"),
        ({"save_path": 5}, "save_path is 5; it must be a path"),
        ({"save_path": ["a.png"]}, r"save_path is \['a.png'\]; it must be a path"),
        ({"callback_on_step_end": 5}, r"callback_on_step_end is 5; it must be a function \(pipe, step"),
        ({"callback_on_step_end": lambda *_: 5}, "callback_on_step_end returned 5; it must be a dict"),
        ({"callback_on_step_end": lambda *_: [1]}, r"callback_on_step_end returned \[1\]; it must be a dict"),
        ({"callback_on_step_end": lambda *_: {7: 1}}, "callback_on_step_end returned 7; it may replace latents"),
        ({"callback_on_step_end": lambda *_: {"latents": None}}, "latents are a NoneType; they must be a tensor"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.zeros(2)}}, r"latents are \(2,\); they must be"),
        ({"callback_on_step_end": lambda *_: {"prompt_embeds": 5}}, "returned 5 as prompt_embeds; it must be a list"),
        ({"callback_on_step_end": lambda *_: {"prompt_embeds": []}}, r"returned \[\] as prompt_embeds"),
    ],
)  # fmt: skip
def test_what_is_no_tensor_no_path_and_no_function(pipe: Pipeline, given: dict[str, Any], says: str) -> None:
    output = {} if "save_path" not in given else {"output_type": "pil"}
    with pytest.raises(ValueError, match=says) as error:
        latents_of(pipe, **given, **output)
    assert len(str(error.value).splitlines()) == 1


def test_numpy_numbers_are_numbers(pipe: Pipeline, tmp_path: Path) -> None:
    theirs = {"seed": np.int64(4), "num_steps": np.int32(1), "guidance_weight": np.float32(2.5), "width": np.int64(32)}
    ours = {"seed": 4, "num_steps": 1, "guidance_weight": 2.5, "width": 32}
    assert torch.equal(latents_of(pipe, **theirs), latents_of(pipe, **ours))
    assert torch.equal(latents_of(pipe, seed=[np.uint32(4)]), latents_of(pipe, seed=4))
