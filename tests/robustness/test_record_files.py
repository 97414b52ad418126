"""Runs that were stopped and latents that wait: of other versions, cut, of strangers. One line, or the whole truth."""

from __future__ import annotations

import functools
import json
import os
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky.config.reading import config_from_dict, config_to_dict
from kandinsky.config.schema import MagCacheConfig
from kandinsky.outputs import latents_file, resume
from kandinsky.outputs.records import OUTPUT, STOPPED, recorded_config
from kandinsky.outputs.resume import Stopped, load_run
from kandinsky.pipelines.base import Pipeline
from kandinsky.pipelines.inputs import Inputs
from kandinsky.request import resolve_request
from kandinsky.runtime.magcache import cache_for_request
from tests.robustness.fuzzing import CASES, NASTY_VALUES, clearly_refused, fuzz, spoiled_bytes, spoiled_json
from tests.unit.small_pipelines import PICTURE, TASKS, build, call

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

STEPS = 4
CACHE = MagCacheConfig(mag_ratios=(1.0,) * 2 * (STEPS - 1), enabled=True, threshold=1.0, max_skips=1, retention=0.25)
Change = Callable[[Any, dict[str, torch.Tensor]], object]


def pipeline(task: str) -> Pipeline:
    return build(task, make_cache=functools.partial(cache_for_request, CACHE))


def stopped_run(task: str, folder: Path) -> Path:
    """Of two prompts, after the first of four steps, where guidance's difference is kept and MagCache has residuals."""
    pipe = pipeline(task)
    pictures = [PICTURE] if task in ("i2v", "i2i") else []
    request = resolve_request(
        pipe.config, ["a red cat", "a dog"], image_sizes=[one.size for one in pictures], seed=3, num_steps=STEPS,
        guidance_weight=3.0, guidance_every=2,
    )  # fmt: skip

    def interrupt(pipe: Any, step: int, *_: Any) -> None:
        pipe.interrupt = step == 0

    output = folder / f"{task}.{'png' if task.endswith('i') else 'mp4'}"
    with pytest.raises(Stopped) as stopped:
        inputs = Inputs(pictures, ["cat.png"] if pictures else [])
        pipe.generate(request, inputs, output, progress=False, callback=interrupt, keep_stopped=True)
    return Path(stopped.value.path)


def saved_latents(task: str, folder: Path) -> Path:
    """Of two outputs, whose decoding fails."""
    pipe = build(task)

    def fail(*_: Any) -> None:
        raise RuntimeError("decoding fails")

    pipe.decode = fail  # type: ignore[assignment, method-assign]
    output = folder / f"{task}.{'png' if task.endswith('i') else 'mp4'}"
    with pytest.raises(RuntimeError, match="decoding fails"):
        call(pipe, ["a red cat", "a dog"], save_path=output, guidance_weight=1.0)
    return latents_file.latents_path(output)


@functools.cache
def small() -> Pipeline:
    return build("t2v")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stopped")
    return {task: stopped_run(task, folder) for task in TASKS}


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("latents")
    return {task: saved_latents(task, folder) for task in TASKS}


def parts(path: Path) -> tuple[str, Any, dict[str, torch.Tensor]]:
    """Key of the metadata, record, tensors."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    ((key, text),) = json.loads(content[8 : 8 + length])["__metadata__"].items()
    return key, json.loads(text), load_file(path)


def changed(path: Path, folder: Path, change: Change) -> Path:
    """A copy with another record or other tensors."""
    key, record, tensors = parts(path)
    new = folder / path.name
    result = change(record, tensors)
    record = result if isinstance(result, str | list) else record
    save_file(tensors, new, metadata={key: record if isinstance(record, str) else json.dumps(record)})
    return new


# --- what is whole is read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_what_was_written_is_read(
    task: str, stopped: dict[str, Path], waiting: dict[str, Path], tmp_path: Path
) -> None:
    """Also after a way through another program, which leaves order and white space as it likes."""
    run = load_run(changed(stopped[task], tmp_path, lambda record, tensors: None))
    assert run.state.step == 1 and len(run.request.samples) == 2
    assert run.residuals and run.state.difference is not None
    assert (run.conditioning.first_frame is not None) == (task == "i2v")
    path = changed(waiting[task], tmp_path, lambda record, tensors: None)
    assert len(latents_file.checked_records(path)) == len(latents_file.load_latents(path).latents) == 2


# --- runs that were stopped -------------------------------------------------------------------------------------------


def test_fuzz_stopped_runs(stopped: dict[str, Path], tmp_path: Path) -> None:
    """Whatever is loaded fits together: samples, steps, sizes, embeddings of each branch."""
    seeds = []
    for path in stopped.values():
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        (key,) = header["__metadata__"]
        seeds.append((content, header, key, json.loads(header["__metadata__"][key]), content[8 + length :]))
    path = tmp_path / "x.stopped.safetensors"
    nasty = (
        *NASTY_VALUES,
        4,
        3,
        32,
        48,
        5,
        "cond",
        "bfloat16",
        ["cond"],
        [1, 2],
        "F32",
        "BF16",
        [0, 4],
        "${oc.env:HOME}",
    )

    def case(rng: Random) -> None:
        content, header, key, record, data = rng.choice(seeds)
        kind = rng.random()
        if kind < 0.1:
            path.write_bytes(spoiled_bytes(rng, content))
        else:
            if kind < 0.7:
                text = spoiled_json(rng, record, nasty).decode("utf-8", "replace")
                written = json.dumps({**header, "__metadata__": {key: text}}).encode()
            else:
                written = spoiled_json(rng, header, nasty)
            path.write_bytes(struct.pack("<Q", len(written)) + written + data)
        run = load_run(path)
        request, shape = run.request, tuple(run.state.latents.shape)
        assert shape[:4] == (len(request.samples), *request.latent_size)
        assert 0 <= run.state.step < request.num_steps
        assert all(len(texts) == len(request.samples) for texts in run.branches.values())
        assert ("uncond" in run.branches) == (request.guidance_weight != 1)
        assert all(tensor.isfinite().all() for tensor in [run.state.latents, run.conditioning.noise])

    fuzz(case)


STOPPED_CHANGES: dict[str, tuple[str, Change]] = {
    **{f"without {name}": (f"has no {name}", lambda r, t, name=name: r.__delitem__(name)) for name in STOPPED},  # type: ignore[misc]
    "a request of another version": ("the request has other entries", lambda r, t: r["request"].pop("guidance_every")),
    "a request of the next version": ("the request has other entries", lambda r, t: r["request"].update(new=1)),
    "a sample of another version": ("a sample is", lambda r, t: r["request"]["samples"][0].pop("expanded")),
    "a config of another version": ("has a config that is none", lambda r, t: r["config"].update(new=1)),
    "no config": ("has a config that is none", lambda r, t: r.update(config={})),
    "steps as text": ("the number of steps is '4'", lambda r, t: r["request"].update(num_steps="4")),
    "a step beyond the last": ("has step = 4", lambda r, t: r.update(step=4)),
    "a step before the first": ("has step = -1", lambda r, t: r.update(step=-1)),
    "a step that is a bool": ("has step = True", lambda r, t: r.update(step=True)),
    "an unknown dtype": ("has dtype = 'float8'", lambda r, t: r.update(dtype="float8")),
    "one branch": ("has branches = ", lambda r, t: r.update(branches=["cond"])),
    "seconds as text": ("seconds for 'denoise'", lambda r, t: r["seconds"].update(denoise="1")),
    "an adapter without a name": ("has an adapter", lambda r, t: r.update(adapters=[{"scale": 1.0}])),
    "more frames than latents": ("latents in it is F32", lambda r, t: r["request"].update(num_frames=9)),
    "another width": ("in it is F32", lambda r, t: r["request"].update(width=48)),
    "3 channels": ("latents in it is F32", lambda r, t: t.update(latents=t["latents"][..., :3].clone())),
    "half a latents": ("latents in it is F16", lambda r, t: t.update(latents=t["latents"].half())),
    "no latents": ("there is no latents in it", lambda r, t: t.pop("latents")),
    "no noise": ("there is no conditioning.noise", lambda r, t: t.pop("conditioning.noise")),
    "no difference": ("there is no difference in it", lambda r, t: t.pop("difference")),
    "no embeddings": ("there is no text.uncond.1.pooled", lambda r, t: t.pop("text.uncond.1.pooled_embeds")),
    "embeddings of another width": (
        "text.cond.0.text_embeds in it is",
        lambda r, t: t.update({"text.cond.0.text_embeds": torch.zeros(1, 3, 7)}),
    ),
    "a tensor of nobody": ("which no such run has", lambda r, t: t.update(other=torch.zeros(1))),
    "a scalar for latents": ("latents in it is F32", lambda r, t: t.update(latents=torch.tensor(1.0))),
    "NaN": ("NaN or infinite values in its latents", lambda r, t: t["latents"].view(-1)[0].fill_(float("nan"))),
    "a list": ("and not a set of entries", lambda r, t: [r]),
    "no JSON": ("is not JSON", lambda r, t: "{"),
    "deep": ("nested deeper", lambda r, t: "[" * 200_000),
    "huge": ("must be finite", lambda r, t: '{"step": 1' + "0" * 400 + "}"),
}  # fmt: skip


@pytest.mark.parametrize("what", STOPPED_CHANGES)
def test_stopped_runs_that_are_not_whole(what: str, stopped: dict[str, Path], tmp_path: Path) -> None:
    says, change = STOPPED_CHANGES[what]
    path = changed(stopped["t2v"], tmp_path, change)
    message = clearly_refused(lambda: load_run(path))
    assert message is not None and says in message and str(path) in message, message


def test_a_cache_that_was_not_there(stopped: dict[str, Path], tmp_path: Path) -> None:
    """MagCache switched on, or its residuals gone, where the next evaluation would be skipped."""

    def without(record: Any, tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("residual.")]:
            tensors.pop(name)

    run = load_run(changed(stopped["t2v"], tmp_path, without))
    with pytest.raises(ValueError, match="without what MagCache's next step needs"):
        pipeline("t2v").resume(run, tmp_path / "x.mp4", progress=False)


# --- latents ----------------------------------------------------------------------------------------------------------


def test_fuzz_latents(waiting: dict[str, Path], tmp_path: Path) -> None:
    """Whatever is decoded, is what its sidecar says it is."""
    pipes = {task: build(task) for task in ("t2v", "t2i")}
    seeds = []
    for task in pipes:
        content = waiting[task].read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        seeds.append(
            (
                task,
                content,
                header,
                json.loads(header["__metadata__"][latents_file.METADATA_KEY]),
                content[8 + length :],
            )
        )
    path = tmp_path / "x.latents.safetensors"
    nasty = (*NASTY_VALUES, 4, 32, 48, 5, 9, "t2i", "t2v", {"all": 2, "skipped": 0}, "F32", [2, 2, 4, 4, 3], [0, 4])
    decoded = []

    def case(rng: Random) -> None:
        task, content, header, records, data = rng.choice(seeds)
        kind = rng.random()
        if kind < 0.1:
            path.write_bytes(spoiled_bytes(rng, content))
        else:
            if kind < 0.5:
                text = spoiled_json(rng, records, nasty).decode("utf-8", "replace")
                written = json.dumps({**header, "__metadata__": {latents_file.METADATA_KEY: text}}).encode()
            else:
                written = spoiled_json(rng, header, nasty)
            path.write_bytes(struct.pack("<Q", len(written)) + written + data)
        found = latents_file.checked_records(path)
        saved = latents_file.load_latents(path)
        if len(decoded) < 25:  # which takes longer than all the rest
            pixels = pipes[task].finish(saved, None)
            for record, output in zip(found, pixels, strict=True):
                size = record["num_frames"], record["height"], record["width"]
                assert tuple(output.shape) == (3, *size)
            decoded.append(task)

    fuzz(case, 4 * CASES)  # a record has so much in it that few are right still
    assert len(decoded) > 5 or "FUZZ_CASE" in os.environ


LATENT_CHANGES: dict[str, tuple[str, Change]] = {
    **{f"without {name}": (f"has no {name}", lambda r, t, name=name: r[1].__delitem__(name)) for name in OUTPUT},  # type: ignore[misc]
    **{
        f"without {name}": (f"has no {name}", lambda r, t, name=name: r[0].__delitem__(name))  # type: ignore[misc]
        for name in ("width", "num_frames", "num_steps", "guidance_interval", "expand_prompts")
    },
    "3 channels": ("latents in it is F32", lambda r, t: t.update(latents=t["latents"][..., :3].clone())),
    "fewer frames than recorded": ("latents in it is F32", lambda r, t: t.update(latents=t["latents"][:, :1].clone())),
    "fewer outputs than recorded": ("latents in it is F32", lambda r, t: t.update(latents=t["latents"][:1].clone())),
    "more outputs than recorded": ("latents in it is F32", lambda r, t: r[:1]),
    "smaller than recorded": ("latents in it is F32", lambda r, t: t.update(latents=t["latents"][:, :, 1:].clone())),
    "half a precision": ("latents in it is BF16", lambda r, t: t.update(latents=t["latents"].bfloat16())),
    "a scalar": ("latents in it is F32", lambda r, t: t.update(latents=torch.tensor(1.0))),
    "something else beside": ("which no such run has", lambda r, t: t.update(other=torch.zeros(1))),
    "two sizes": ("has two values of width", lambda r, t: r[1].update(width=48)),
    "frames as text": ("num_frames is '5'", lambda r, t: [one.update(num_frames="5") for one in r] and None),
    "a seed as text": ("has seed = '1'", lambda r, t: r[1].update(seed="1")),
    "a seed that is none": ("the seed is -1", lambda r, t: r[1].update(seed=-1)),
    "another frame rate": ("other evaluations, fps or task", lambda r, t: r[0].update(fps=25)),
    "another task": ("other evaluations, fps or task", lambda r, t: [one.update(task="i2v") for one in r] and None),
    "seconds": ("seconds for 'encode'", lambda r, t: r[0]["seconds"].update(encode=None)),
    "no records": ("and not one for each output", lambda r, t: "[]"),
    "null": ("holds no latents of ours", lambda r, t: "null"),
    "a number": ("and not one for each output", lambda r, t: "5"),
    "numbers": ("and not a set of entries", lambda r, t: [1, 2]),
    "no JSON": ("is not JSON", lambda r, t: "["),
    "deep": ("nested deeper", lambda r, t: "[" * 200_000),
}  # fmt: skip


@pytest.mark.parametrize("what", LATENT_CHANGES)
def test_latents_that_are_not_whole(what: str, waiting: dict[str, Path], tmp_path: Path) -> None:
    """By the command line's check, and by Pipeline.finish."""
    says, change = LATENT_CHANGES[what]
    path = changed(waiting["t2v"], tmp_path, change)
    message = clearly_refused(lambda: latents_file.checked_records(path))
    assert message is not None and says in message and str(path) in message, message
    if what not in ("a scalar", "something else beside", "half a precision"):
        pipe = small()
        assert clearly_refused(lambda: pipe.finish(latents_file.load_latents(path), tmp_path / "x.mp4"))
    assert not list(tmp_path.glob("x.*"))


def test_nan_in_latents_names_their_file(waiting: dict[str, Path], tmp_path: Path) -> None:
    path = changed(waiting["t2v"], tmp_path, lambda r, t: t["latents"].view(-1)[7].fill_(float("inf")) is None)
    message = clearly_refused(lambda: latents_file.load_latents(path))
    assert message == f"{path}: there are NaN or infinite values in its latents: the run has to be repeated"


def test_files_that_are_neither(stopped: dict[str, Path], waiting: dict[str, Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for read, path, says in (
        (load_run, waiting["t2v"], "holds no run that was stopped"),
        (latents_file.checked_records, stopped["t2v"], "holds no latents of ours"),
        (load_run, tmp_path / "fifo", "it is a pipe"),
        (latents_file.checked_records, tmp_path / "fifo", "it is a pipe"),
    ):
        message = clearly_refused(lambda read=read, path=path: read(path))  # type: ignore[misc]
        assert message is not None and says in message


# --- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "model.num_steps=2", "model.num_steps=50", "model.guidance_weight=1", "model.guidance_interval=[0, 0.5]",
        "model.guidance_every=2", "metrics.scheduler_scale=3", "generation.negative_caption=x", "generation.width=64",
        "generation.time_length=1", "generation.noise_device=cuda", "generation.expand_prompts=true", "task=i2v",
        "model.text_embedder.qwen.max_length=5", "model={num_steps: 3}", "generation={negative_caption: x}",
    ],
)  # fmt: skip
def test_overrides_without_an_effect_are_refused(
    override: str, stopped: dict[str, Path], waiting: dict[str, Path], tmp_path: Path
) -> None:
    import test as command_line

    for flag, path in (("--resume_from", stopped["t2v"]), ("--decode_latents", waiting["t2v"])):
        if flag == "--resume_from":
            record = resume.read_record(path)
            message = clearly_refused(lambda: recorded_config(record, [override], path, decoding=False))  # noqa: B023
        else:
            record = latents_file.checked_records(path)[0]
            message = clearly_refused(lambda: recorded_config(record, [override], path, decoding=True))  # noqa: B023
        assert message is not None and "goes on with what its run began with" in message and "leave" in message
        assert path.exists()
        before = path.read_bytes()
        assert command_line.main([flag, str(path), override, "--output_filename", str(tmp_path / "x.mp4")]) == 2
        assert path.read_bytes() == before and not list(tmp_path.iterdir())


def test_another_config_is_refused(
    stopped: dict[str, Path], waiting: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    import test as command_line

    for flag, path in (("--resume_from", stopped["t2v"]), ("--decode_latents", waiting["t2v"])):
        assert command_line.main([flag, str(path), "--config", "configs/config_tiny_i2i.yaml"]) == 2
        said = capsys.readouterr().err
        assert "error: --config configs/config_tiny_i2i.yaml" in said and "leave --config out" in said and path.exists()


def test_the_cache_stays_as_it_was_or_is_switched_off(stopped: dict[str, Path]) -> None:
    """Two values are named; of each setting, before anything is loaded."""
    record = resume.read_record(stopped["t2v"])

    def resumed(began: Sequence[str], now: Sequence[str]) -> str | None:
        config = config_from_dict(record["config"], [f"magcache.mag_ratios={[1.0] * 32}", *began])
        begun = {**record, "config": config_to_dict(config)}
        return clearly_refused(lambda: recorded_config(begun, now, "a.stopped.safetensors", decoding=False))

    tracked = ["cache.kind=tracked", "cache.threshold=0.3"]
    for now in ([], ["cache.kind=off"], ["runtime.offload=on"], tracked):
        assert resumed(tracked, now) is None
    assert resumed(["magcache.enabled=true"], ["magcache.enabled=false"]) is None
    began = "and the run of a.stopped.safetensors began"
    for words, now, says in (
        (tracked, "cache.threshold=0.5", f"cache.threshold is 0.5, {began} with 0.3"),
        (tracked, "cache.max_skips=9", f"cache.max_skips is 9, {began} with 3"),
        (tracked, "cache.order=0", f"cache.order is 0, {began} with 1"),
        (tracked, "cache.kind=dbcache", f"the cache is dbcache, {began} with tracked"),
        ([], "cache.kind=tracked", f"the cache is tracked, {began} without one: leave it out"),
        (["magcache.enabled=true"], "magcache.threshold=0.5", f"cache.threshold is 0.5, {began} with 0.12"),
        (["magcache.enabled=true"], "magcache.retention=0.5", "magcache.retention is another one"),
    ):
        message = resumed(words, [now])
        assert message is not None and says in message, message
    assert (resumed(tracked, ["cache.order=0"]) or "").endswith("or leave blocks out no longer: --cache off")


def test_overrides_with_an_effect(stopped: dict[str, Path], waiting: dict[str, Path]) -> None:
    record = resume.read_record(stopped["t2v"])
    config = recorded_config(record, ["runtime.offload=on", "model.vae.spatial_tile=128"], "x", decoding=False)
    assert (config.runtime.offload, config.model.vae.spatial_tile) == ("on", 128)
    record = latents_file.checked_records(waiting["t2v"])[0]
    assert recorded_config(record, ["model.vae.spatial_tile=128"], "x", decoding=True).model.vae.spatial_tile == 128


@pytest.mark.parametrize("flag", ["--resume_from", "--decode_latents"])
@pytest.mark.parametrize(
    "override", ["runtime.preview=[1", "runtime.preview={", "model.num_steps=[1", "runtime.preview='"]
)
def test_overrides_that_are_no_yaml(
    flag: str, override: str, stopped: dict[str, Path], waiting: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    import test as command_line

    path = (stopped if flag == "--resume_from" else waiting)["t2v"]
    assert command_line.main([flag, str(path), override]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
