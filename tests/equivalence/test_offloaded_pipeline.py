"""Whole runs of the tiny models with their weights elsewhere: the same pixels, and only what is in use in memory."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from kandinsky.config.reading import load_config
from kandinsky.loading import text as loading_text
from kandinsky.loading.assemble import load_pipeline
from kandinsky.pipelines.base import Pipeline
from kandinsky.runtime.block_swap import BlockSwap
from kandinsky.runtime.offload import Offloaded, TextEncodersOnDemand

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG_T2V = REPOSITORY / "configs" / "config_tiny_t2v.yaml"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of prompts for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kandinsky5" / "prompts"


def load(task: str, *overrides: str, device: str = "cpu", dtype: str | None = None, **paths: Any) -> Any:
    config = load_config(REPOSITORY / "configs" / f"config_tiny_{task}.yaml", ["model.num_steps=2", *overrides])
    return load_pipeline(config, device, dtype=dtype, **paths)


def picture_of(pipe: Pipeline, **options: Any) -> Tensor:
    """Pixels (1, 3, H, W) of one small picture."""
    given = {"image": PICTURE} if pipe.config.task == "i2i" else {}
    given |= {"time_length": 0} if pipe.config.task == "t2v" else {}
    call: Any = pipe
    return call("a red circle", **given, **{"seed": 1, "progress": False, "output_type": "uint8", **options})


def in_memory(pipe: Pipeline) -> set[str]:
    """The components that have weights now, whole or in part."""
    found = {
        name
        for name in ("dit", "vae")
        if any(not tensor.is_meta for tensor in (*getattr(pipe, name).parameters(), *getattr(pipe, name).buffers()))
    }
    embedder: Any = pipe.text_embedder
    embedder = embedder.embedder
    if not isinstance(embedder, TextEncodersOnDemand) or embedder._loaded is not None:
        found.add("text_embedder")
    return found


SETTINGS = {
    "offload": ("runtime.offload=on",),
    "offload, swap": ("runtime.offload=on", "runtime.blocks_on_gpu=1"),
    "swap": ("runtime.blocks_on_gpu=2",),
    "swap of nothing": ("runtime.blocks_on_gpu=99",),
    "cached prompts": ("runtime.cache_prompts=true",),
    "all": ("runtime.offload=on", "runtime.blocks_on_gpu=1", "runtime.cache_prompts=true"),
}


@pytest.mark.processor
@pytest.mark.parametrize("task", ["t2v", "i2i"])
def test_the_same_pixels(task: str) -> None:
    """i2i: the image VAE, whose memory format is not the file's, and a text encoder that sees a picture."""
    expected = picture_of(load(task))
    for name in SETTINGS if task == "t2v" else ("offload", "all"):
        pipe = load(task, *SETTINGS[name])
        for _ in range(2 if name == "all" else 1):
            assert torch.equal(picture_of(pipe), expected), name
        assert isinstance(pipe.execution.hand_out, BlockSwap) == (name in ("offload, swap", "swap", "all"))
    assert not torch.equal(picture_of(pipe, seed=2), expected)


@pytest.mark.processor
def test_the_same_pixels_where_weights_are_cast(tmp_path: Path) -> None:
    """In bfloat16 from a float32 file, of which time embedding and modulations stay as they are."""
    published = load_file(REPOSITORY / load_config(CONFIG_T2V).model.checkpoint_path)
    wide = tmp_path / "float32.safetensors"
    generator = torch.Generator().manual_seed(0)  # digits that bfloat16 does not have
    noise = {name: 1e-3 * torch.randn(w.shape, generator=generator) for name, w in published.items()}
    save_file({name: w.float() * (1 + noise[name]) for name, w in published.items()}, wide)
    plain = load("t2v", dtype="bfloat16", dit_path=wide)
    expected = picture_of(plain)
    for overrides in (SETTINGS["offload"], SETTINGS["swap"]):
        pipe = load("t2v", *overrides, dtype="bfloat16", dit_path=wide)
        assert torch.equal(picture_of(pipe), expected)
        dtypes = {name: parameter.dtype for name, parameter in pipe.dit.named_parameters()}
        assert dtypes == {name: parameter.dtype for name, parameter in plain.dit.named_parameters()}
        assert set(dtypes.values()) == {torch.bfloat16, torch.float32}


def test_the_record_says_the_same(tmp_path: Path) -> None:
    records = []
    for name, overrides in (("plain", ()), ("offload", SETTINGS["offload"])):
        path = tmp_path / f"{name}.png"
        picture_of(load("t2v", *overrides, dtype="bfloat16"), save_path=path)
        records.append(json.loads(path.with_suffix(".json").read_text()))
        assert records[-1]["dtype"] == "bfloat16"
        del records[-1]["seconds"], records[-1]["config"]["runtime"]
    assert records[0] == records[1]


@contextmanager
def watched_stages(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, set[str]]]]:
    """(component, what has weights) at the end of every stage."""
    seen: list[tuple[str, set[str]]] = []
    use = pipe.placement.use

    @contextmanager
    def watched(component: str) -> Iterator[None]:
        assert in_memory(pipe) == set()
        with use(component):
            yield
            seen.append((component, in_memory(pipe)))
        assert in_memory(pipe) == set()

    with monkeypatch.context() as patch:
        patch.setattr(pipe.placement, "use", watched, raising=True)
        yield seen


@pytest.mark.parametrize("task", ["t2v", "i2i"])
def test_only_what_is_in_use_is_in_memory(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load(task, *SETTINGS["offload, swap"])
    with watched_stages(pipe, monkeypatch) as seen:
        picture_of(pipe)
    stages = ["text_embedder", *(["vae"] if task == "i2i" else []), "dit", "vae"]
    assert seen == [(stage, {stage}) for stage in stages]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_error_in_any_stage_nothing_is_left_and_the_next_run_is_right(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load("t2v", *SETTINGS["offload, swap"])
    expected = picture_of(pipe)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    places = ((TextEncodersOnDemand, "encode"), (Offloaded, "begin"), (pipe.dit, "head"), (pipe.vae, "decode"))
    for owner, name in places:
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(owner, name, fail)
            picture_of(pipe)
        assert in_memory(pipe) == set(), name
    assert torch.equal(picture_of(pipe), expected)


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_the_default_negative_prompt_is_kept_without_being_told(cache: Path) -> None:
    pipe = load("t2v")
    assert not cache.exists()
    first = picture_of(pipe)
    assert len(list(cache.iterdir())) == 1
    again = load("t2v")
    kept: Any = again.text_embedder
    encoded = []
    encode = kept.embedder.encode
    kept.embedder.encode = lambda prompts, *rest: (encoded.extend(prompts), encode(prompts, *rest))[1]
    assert torch.equal(picture_of(again), first)
    assert encoded == ["a red circle"]
    picture_of(again, negative_caption="something else")
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("task", ["t2v", "i2i"])
def test_text_encoders_are_not_loaded_for_prompts_that_are_known(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = picture_of(load(task))
    loaded: list[str] = []
    original = loading_text.load_text_embedder

    def recording(*args: Any, device: Any, **kwargs: Any) -> Any:
        loaded.append(str(device))
        return original(*args, device=device, **kwargs)

    monkeypatch.setattr(loading_text, "load_text_embedder", recording)
    for overrides in (SETTINGS["cached prompts"], SETTINGS["all"]):
        loaded.clear()
        assert torch.equal(picture_of(load(task, *overrides)), expected)
        # The meta device: files and tokenizers are looked at, no weights are read.
        assert loaded == (["meta", "cpu"] if overrides == SETTINGS["cached prompts"] else ["meta"])
    # Without offloading they stay once they are there, with it they are loaded for every stage that needs them.
    for overrides, times in ((SETTINGS["cached prompts"], 1), (SETTINGS["offload"], 2)):
        pipe = load(task, *overrides)
        loaded.clear()
        for seed in range(2):
            picture_of(pipe, negative_caption=f"new {overrides} {seed}")
        assert loaded == ["cpu"] * times


def test_other_files_are_other_encoders(cache: Path, tmp_path: Path) -> None:
    folder = REPOSITORY / "assets" / "tiny" / "t2v"
    copies = {
        "text_encoder_path": shutil.copytree(folder / "text_encoder", tmp_path / "text_encoder"),
        "text_encoder2_path": shutil.copytree(folder / "text_encoder2", tmp_path / "text_encoder2"),
    }
    first = load("t2v", *SETTINGS["cached prompts"], **copies)
    picture_of(first)
    assert len(list(cache.iterdir())) == 2
    with (tmp_path / "text_encoder" / "model.safetensors").open("r+b") as file:
        file.seek(-64, 2)
        file.write(b"\x11" * 64)
    second = load("t2v", *SETTINGS["cached prompts"], **copies)
    picture_of(second)
    assert len(list(cache.iterdir())) == 4


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("task", ["t2v", "i2i"])
def test_on_a_gpu_the_same_pixels(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = picture_of(load(task, device="cuda:0"))
    for name in ("swap", "all"):
        assert torch.equal(picture_of(load(task, *SETTINGS[name], device="cuda:0")), expected), name
    pipe = load(task, *SETTINGS["offload, swap"], device="cuda:0")
    with watched_stages(pipe, monkeypatch) as seen:
        picture_of(pipe)
    assert all(there == {stage} for stage, there in seen)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dit.safetensors", "vae", "text_encoder", "text_encoder2"])
def test_damaged_files_are_told_when_loading(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = REPOSITORY / "assets" / "tiny" / "t2v"
    config = load_config(CONFIG_T2V)
    if name == "dit.safetensors":
        damaged = tmp_path / name
        damaged.write_bytes((REPOSITORY / config.model.checkpoint_path).read_bytes()[:-7])
    else:
        damaged = Path(shutil.copytree(source / name, tmp_path / name))
        (file,) = (file for file in damaged.glob("*.safetensors") if file.name != "tiny_decoder.safetensors")
        file.write_bytes(file.read_bytes()[:-7])
    paths = {"dit.safetensors": "dit_path", "vae": "vae_path"} | {
        "text_encoder": "text_encoder_path",
        "text_encoder2": "text_encoder2_path",
    }
    monkeypatch.setattr(BlockSwap, "__init__", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=str(damaged)):
        load("t2v", *SETTINGS["all"], **{paths[name]: damaged})


def test_another_model_s_file_is_told_when_loading() -> None:
    with pytest.raises(ValueError, match=r"num_visual_blocks 6 \(config: 99\)"):
        load("t2v", *SETTINGS["all"], "model.dit_params.num_visual_blocks=99")


def test_two_threads_share_a_pipeline() -> None:
    """Each gets what it gets alone, whether its models come and go or stay."""
    pipe = load("t2v", *SETTINGS["all"])
    alone = {seed: picture_of(pipe, seed=seed) for seed in range(4)}
    found: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: picture_of(pipe, seed=seed)})) for seed in alone
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.keys() == alone.keys() and all(torch.equal(found[seed], alone[seed]) for seed in alone)
    assert in_memory(pipe) == set()
