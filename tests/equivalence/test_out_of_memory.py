"""Runs in which memory runs out, as planted: they go on with settings that take less, to the same bits."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kandinsky.config.reading import load_config, with_settings
from kandinsky.loading import assemble
from kandinsky.models.dit import DiffusionTransformer3D
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
from kandinsky.models.vae_memory import GB
from kandinsky.outputs.resume import load_run
from kandinsky.pipelines.retries import NothingLessLeft
from kandinsky.planning.machine import Machine
from kandinsky.request import resolve_request
from kandinsky.runtime.offload import OffloadPlacement
from kandinsky.text.embedder import TextEmbedder
from tests.lora_files import write_lora

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STEPS = 4
MAGCACHE = ("magcache.enabled=true", f"magcache.mag_ratios=[{','.join(['0.99'] * 2 * (STEPS - 1))}]")


class Writer:
    """In the place of a Qwen that can write."""

    def expand(self, texts: Sequence[str], *_: Any) -> list[str]:
        return [f"{text}, on a hill" for text in texts]


# Where memory runs out, by the stage's name: what is called there.
PLACES: dict[str, tuple[type, str]] = {
    "expand prompt": (Writer, "expand"),
    "encode text": (TextEmbedder, "encode"),
    "encode image": (AutoencoderKLHunyuanVideo, "encode"),
    "denoise": (DiffusionTransformer3D, "forward"),
    "decode": (AutoencoderKLHunyuanVideo, "decode"),
}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if there were a GPU, so that all that a plan has to choose is to be had."""
    monkeypatch.setattr(assemble, "machine_memory", lambda device: Machine(64 * GB, 8 * GB))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def load(task: str = "t2v", *settings: str) -> Any:
    overrides = (f"model.num_steps={STEPS}", "generation.expand_prompts=false", *settings)
    return assemble.load_pipeline(load_config(CONFIGS / f"config_tiny_{task}.yaml", overrides), "cpu")


def picture(pipe: Any, **options: Any) -> Tensor:
    result: Tensor = pipe(
        "a red circle", **{"seed": 1, "time_length": 0, "progress": False, "output_type": "uint8"} | options
    )
    return result


def resumed(pipe: Any, file: Path) -> Tensor:
    (made,) = pipe.resume(load_run(file), file.with_name("a.png"), progress=False)
    return torch.from_numpy(np.array(made)).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def undisturbed() -> Iterator[Callable[..., Tensor]]:
    """Pixels of runs, each made once."""
    made: dict[Any, Tensor] = {}

    def pixels(*settings: str) -> Tensor:
        if settings not in made:
            made[settings] = picture(load("t2v", *settings))
        return made[settings]

    yield pixels


def starve(
    patch: pytest.MonkeyPatch, stage: str, at: Sequence[int], how: Callable[[], object] = lambda: no_memory()
) -> list[int]:
    """Have memory run out in those calls, counted from 1; returns the list of all that happen from now on."""
    owner, name = PLACES[stage]
    original, calls = getattr(owner, name), []

    def called(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(calls) + 1)
        if calls[-1] in at:
            how()
        return original(self, *args, **options)

    patch.setattr(owner, name, called)
    return calls


def no_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def no_memory_on_the_host() -> None:
    torch.empty(2**50)


# --- one process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults",
    [{"encode text": [1]}, {"denoise": [6]}, {"decode": [1]}, {"encode text": [1], "denoise": [1, 5]}],
    ids=["encode", "denoise", "decode", "several times"],
)
def test_goes_on_to_the_same_bits(
    faults: dict[str, list[int]], undisturbed: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Of what was finished nothing is done again, a line says what was changed, and the pipeline works on."""
    pipe, expected = load(), undisturbed()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        calls = {stage: starve(patch, stage, at) for stage, at in faults.items()}
        assert torch.equal(picture(pipe, save_path=tmp_path / "a.png"), expected)
    count = sum(map(len, faults.values()))
    warnings = [line for line in caplog.messages if "ran out of memory and goes on with runtime." in line]
    assert len(warnings) == len(pipe.taken) == count
    assert [line.split(" ran out")[0] for line in warnings] == [stage for stage, at in faults.items() for _ in at]
    if "denoise" in faults:  # a step at most is taken again, of two evaluations
        assert len(calls["denoise"]) <= 2 * STEPS + 2 * len(faults["denoise"])
    assert isinstance(pipe.placement, OffloadPlacement)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["config"]["runtime"]["offload"] == ("off" if "decode" in faults else "on")  # it was denoised with
    assert record["evaluations"] == {"all": 2 * STEPS, "skipped": 0}
    assert torch.equal(picture(pipe), expected) and not torch.equal(picture(pipe, seed=2), expected)


def test_memory_of_the_host(
    undisturbed: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """PyTorch's own error for it, of a CPU that has no GPU."""
    monkeypatch.setattr(assemble, "machine_memory", lambda device: Machine(64 * GB))
    pipe = load()
    starve(monkeypatch, "denoise", [3], no_memory_on_the_host)
    assert torch.equal(picture(pipe), undisturbed())
    assert "denoise ran out of memory and goes on with runtime.offload=on" in caplog.text


def test_prompts_are_written_out_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are written out as before also where Qwen then streams; those of later calls as well."""
    load_prompts = assemble.load_prompts
    monkeypatch.setattr(assemble, "load_prompts", lambda *given: (load_prompts(*given)[0], Writer(), []))
    words = {"image": Image.new("RGB", (128, 128), "red"), "time_length": 0.3, "num_steps": 1}
    pipe = load("i2v", "generation.expand_prompts=null")
    expected = picture(pipe, **words)
    with monkeypatch.context() as patch:
        for stage, at in (("expand prompt", [1]), ("encode text", [1])):
            starve(patch, stage, at)
        assert torch.equal(picture(pipe, **words), expected)
    assert pipe.config.runtime.stream_encoders == "on"
    written = starve(monkeypatch, "expand prompt", [])
    assert torch.equal(picture(pipe, **words), expected) and written == [1]


def test_an_image_s_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"image": Image.new("RGB", (128, 128), "red"), "time_length": 0.3, "num_steps": 1}
    pipe = load("i2v")
    expected = picture(pipe, **words)
    starve(monkeypatch, "encode image", [1])
    assert torch.equal(picture(pipe, **words), expected) and pipe.taken == ["runtime.offload=on"]


def test_under_another_config(undisturbed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the server and segments have it: what memory runs out under goes on itself, and so does what it is made of."""
    pipe = load()
    other = pipe.under(with_settings(pipe.config, runtime={"upscale": 2}))
    assert pipe.under(pipe.config) is pipe and other is not pipe
    with monkeypatch.context() as patch:
        starve(patch, "denoise", [3])
        assert torch.equal(picture(other), undisturbed())
    assert other.config.runtime.offload == pipe.config.runtime.offload == "on"
    assert other.config.runtime.upscale == 2 and pipe.config.runtime.upscale == 1
    assert other.dit is pipe.dit and torch.equal(picture(pipe), undisturbed())


def test_with_adapters_and_a_cache_of_blocks(undisturbed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One in the config and one loaded later; a copy of the pipeline is taken along, and lets go of the old models."""
    params = load_config(CONFIGS / "config_tiny_t2v.yaml").model.dit_params
    files = [write_lora(tmp_path / f"{name}.safetensors", params, seed=seed) for seed, name in enumerate("ab")]

    def prepared() -> Any:
        pipe = load("t2v", *MAGCACHE, f"model.loras=[{files[0]}:0.5]")
        pipe.load_adapter(None, files[1], "later")
        pipe.set_adapter(["a", "later"], [0.5, 0.25])
        return pipe

    expected = picture(prepared())
    pipe = prepared()
    plain = assemble.with_magcache(pipe, False)
    with monkeypatch.context() as patch:
        # MagCache skips some of the later evaluations, but not these calls of the DiT, in which its blocks are skipped.
        starve(patch, "denoise", [5, 9])
        assert torch.equal(picture(pipe), expected)
    assert [one["scale"] for one in pipe.active_adapters()] == [0.5, 0.25]
    assert plain.dit is pipe.dit and plain.placement is pipe.placement
    without = picture(plain)
    assert not torch.equal(without, expected)
    pipe.disable_adapters()
    assert torch.equal(picture(plain), undisturbed())


def test_until_nothing_is_left(undisturbed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any) -> None:
    """The error names what was tried, what was finished is kept in a file, and the pipeline works on."""
    pipe = load()
    request = resolve_request(pipe.config, "a red circle", seed=1, num_frames=1)
    with (
        monkeypatch.context() as patch,
        pytest.raises(NothingLessLeft, match=r"even with runtime\.offload=on") as error,
    ):
        starve(patch, "denoise", range(5, 1000))
        pipe.generate(request, save_path=tmp_path / "a.png", progress=False, keep_stopped=True)
    assert "CUDA out of memory" in str(error.value) and len(pipe.taken) > 2
    assert all(settings in str(error.value) for settings in pipe.taken)
    kept = tmp_path / "a.stopped.safetensors"
    assert f"--resume_from {kept}" in caplog.text and load_run(kept).state.step == 2
    assert torch.equal(resumed(pipe, kept), undisturbed())


def test_stopped_and_resumed_after_it(undisturbed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kandinsky.outputs.resume import Stopped

    def stop(pipe: Any, step: int, *_: Any) -> None:
        pipe.interrupt = step == 2

    pipe = load()
    request = resolve_request(pipe.config, "a red circle", seed=1, num_frames=1)
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        starve(patch, "denoise", [4])
        pipe.generate(request, save_path=tmp_path / "a.png", progress=False, callback=stop, keep_stopped=True)
    run = load_run(stopped.value.path)
    assert run.state.step == 3 and run.evaluations == 6
    assert torch.equal(resumed(load(), stopped.value.path), undisturbed())


def test_what_fails_in_between_changes_nothing(undisturbed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models are there until the new ones are."""
    pipe = load()
    before = {name: getattr(pipe, name) for name in ("dit", "vae", "placement", "config")}
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="the disk is gone"):
        starve(patch, "denoise", [2])

        def gone(*_: Any, **__: Any) -> None:
            raise ValueError("the disk is gone")

        patch.setattr(assemble, "load_vae", gone)
        picture(pipe)
    assert all(getattr(pipe, name) is value for name, value in before.items())
    assert pipe.taken == [] and torch.equal(picture(pipe), undisturbed())


def test_no_memory_for_the_new_models_either(undisturbed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load()
    with monkeypatch.context() as patch, pytest.raises(NothingLessLeft, match="there are none that take less"):
        starve(patch, "denoise", [2])
        patch.setattr(assemble, "load_vae", lambda *_, **__: no_memory())
        picture(pipe)
    assert pipe.taken == [] and torch.equal(picture(pipe), undisturbed())


def test_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug() -> None:
        raise RuntimeError("a bug")

    pipe = load()
    starve(monkeypatch, "denoise", [2], bug)
    with pytest.raises(RuntimeError, match="a bug"):
        picture(pipe)
    assert pipe.taken == []
