"""NaN from anywhere: who brought it is named, and latents that can never be decoded are not kept."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky.pipelines.base import Pipeline
from kandinsky.runtime.prompt_cache import PromptCache
from kandinsky.text.embeddings import TextEmbeddings
from tests.robustness.fuzzing import assert_clear
from tests.unit.small_pipelines import POOLED_DIM, TASKS, TEXT_DIM, WordsEmbedder, build, call

NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module", params=TASKS)
def pipe(request: pytest.FixtureRequest) -> Pipeline:
    return build(request.param)


def refused(pipe: Pipeline, folder: Path, says: str, **options: Any) -> None:
    """With one clear line, before or after denoising, and without a file that anybody would go on with."""
    output = folder / ("x.mp4" if pipe.config.task.endswith("v") else "x.png")
    with pytest.raises(ValueError, match=says) as error:
        call(pipe, options.pop("text", "a red cat"), save_path=output, **options)
    assert_clear(str(error.value))
    assert not list(folder.iterdir())


# --- what a caller gives ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_latents_that_are_given(value: float, pipe: Pipeline, tmp_path: Path) -> None:
    latents = call(pipe, output_type="latent")
    latents.view(-1)[3] = value
    refused(pipe, tmp_path, "^latents have NaN or infinite values in them", latents=latents)
    latents.view(-1)[3] = 0
    call(pipe, latents=latents)


def test_embeddings_that_are_given(pipe: Pipeline, tmp_path: Path) -> None:
    good = WordsEmbedder().encode(["a red cat"])
    for name in ("text_embeds", "pooled_embeds"):
        tensors = {**vars(good), name: getattr(good, name).clone()}
        tensors[name].view(-1)[0] = NAN
        bad = TextEmbeddings(**tensors)
        refused(pipe, tmp_path, "^prompt_embeds have NaN", text=None, prompt_embeds=bad)
        options = {"negative_prompt_embeds": bad, "guidance_weight": 2.0}
        refused(pipe, tmp_path, "^negative_prompt_embeds have NaN", **options)
    call(pipe, None, prompt_embeds=good)


def returned(value: float) -> Callable[..., Any]:
    return lambda pipe, step, timestep, tensors: {"latents": torch.full_like(tensors["latents"], value)}


def writing(pipe: Pipeline, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> None:
    if step == 1:
        tensors["latents"].fill_(NAN)


def test_a_callback_that_makes_nan(pipe: Pipeline, tmp_path: Path) -> None:
    """What it returns is looked at at once; what it writes into the tensor it was given, when denoising ends."""
    options = {"num_steps": 3, "callback_on_step_end": returned(NAN)}
    refused(pipe, tmp_path, "^callback_on_step_end returned other latents: latents have NaN", **options)
    if pipe.config.task == "i2v":  # there the tensor is a copy
        return
    options["callback_on_step_end"] = writing
    says = "^the latents have NaN .* after denoising, which began well.*: callback_on_step_end may have changed them"
    refused(pipe, tmp_path, says, **options)


# --- what arises on the way -------------------------------------------------------------------------------------------


def test_an_overflow_at_a_later_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first evaluation is well, the fifth is not: neither the VAE is blamed for it, nor are latents kept."""
    pipe = build("t2v")
    pipe.dit.to(torch.float16)
    forward, calls = pipe.dit.forward, []

    def overflowing(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        velocity = forward(*args, **options).float()
        return (velocity * (1e6 if len(calls) == 5 else 1)).half()

    monkeypatch.setattr(pipe.dit, "forward", overflowing)
    says = "^the latents have NaN .* after denoising, which began well.*: numbers above 65504 don't fit into float16"
    refused(pipe, tmp_path, says, num_steps=6, guidance_weight=1.0)
    assert len(calls) == 6


def test_an_overflow_that_nothing_explains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build("t2i")
    forward, calls = pipe.dit.forward, []

    def broken(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return forward(*args, **options) * (INFINITY if len(calls) > 1 else 1)

    monkeypatch.setattr(pipe.dit, "forward", broken)
    refused(pipe, tmp_path, "can't be decoded: try less guidance_weight", num_steps=3, guidance_weight=1.0)


# --- the cache of prompts ---------------------------------------------------------------------------------------------


def spoiled(path: Path, what: str) -> None:
    """The entry at `path`, damaged."""
    if what == "a FIFO":
        path.unlink()
        os.mkfifo(path)
        return
    if what == "a folder's link":
        path.unlink()
        path.symlink_to("/dev/zero")
        return
    if what in ("empty", "cut", "deep"):
        content = path.read_bytes()
        path.write_bytes({"empty": b"", "cut": content[:-4], "deep": content[:8] + b"[" * (len(content) - 8)}[what])
        return
    tensors = load_file(path)
    if what == "NaN":
        tensors["text_embeds"][0, 0, 0] = NAN
    elif what == "another width":
        tensors["text_embeds"] = torch.zeros(1, 3, TEXT_DIM + 1)
    elif what == "another pooled width":
        tensors["pooled_embeds"] = torch.zeros(1, POOLED_DIM + 1)
    elif what == "two prompts":
        tensors = {name: torch.cat([tensor, tensor]) for name, tensor in tensors.items()}
    elif what == "no tokens":
        tensors["text_embeds"] = tensors["text_embeds"][:, :0].clone()
    elif what == "scalars":
        tensors = {name: torch.tensor(1.0) for name in tensors}
    elif what == "integers":
        tensors["text_embeds"] = tensors["text_embeds"].to(torch.int64)
    save_file(tensors, path)


@pytest.mark.parametrize(
    "what",
    [
        "NaN", "another width", "another pooled width", "two prompts", "no tokens", "scalars", "integers", "a FIFO",
        "a folder's link", "empty", "cut", "deep",
    ],
)  # fmt: skip
def test_a_damaged_entry_is_dropped_and_made_again(what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    embedder, device = WordsEmbedder(), torch.device("cpu")
    cache = PromptCache(embedder, tmp_path, {}, device, everything=True, widths=(TEXT_DIM, POOLED_DIM))
    expected = cache.encode(["a red cat"])
    path = cache.path("a red cat", "video")
    spoiled(path, what)
    with caplog.at_level(logging.WARNING):
        found = cache.encode(["a red cat"])
    assert "cached embeddings are not readable and are computed again" in caplog.text
    assert torch.equal(found.text_embeds, expected.text_embeds) and len(embedder.calls) == 2
    again = cache.encode(["a red cat"])
    assert torch.equal(again.text_embeds, expected.text_embeds) and len(embedder.calls) == 2
    assert path.is_file() and not path.is_symlink()


# --- folders of text encoders -----------------------------------------------------------------------------------------


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """The tiny Qwen with its tokenizer, linked file by file."""
    from kandinsky.checkpoints.files import resolve_path
    from kandinsky.config.reading import load_config

    config = load_config(Path(__file__).resolve().parents[2] / "configs" / "config_tiny_t2v.yaml")
    folder = resolve_path(config.model.text_embedder.qwen.checkpoint_path, config).resolve()
    copy = tmp_path / "text_encoder"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file)
    return copy


def load(qwen: Path) -> Any:
    from kandinsky.checkpoints.files import resolve_path
    from kandinsky.config.reading import load_config
    from kandinsky.loading.text import load_text_encoders

    config = load_config(Path(__file__).resolve().parents[2] / "configs" / "config_tiny_t2v.yaml")
    clip = resolve_path(config.model.text_embedder.clip.checkpoint_path, config)
    return load_text_encoders(config, qwen, clip, "meta", torch.float32)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "generation_config.json", "added_tokens.json"]
)
@pytest.mark.parametrize(
    "content", ["[" * 200_000, '{"text_config": "x"}', '{"a": 1e999}', "fifo"], ids=lambda text: text[:12]
)
def test_folders_of_text_encoders(name: str, content: str, qwen: Path) -> None:
    path = qwen / name
    path.unlink(missing_ok=True)
    if content == "fifo":
        os.mkfifo(path)
    else:
        path.write_text(content)
    try:
        load(qwen)
    except ValueError as error:
        assert_clear(str(error))
    else:
        assert content != "fifo" and name != "config.json"


def test_code_in_a_tokenizers_folder_is_never_run(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even asked about: whoever starts a batch at night would say nothing, whoever says yes has been robbed. What
    the folder names beside the tables of tokens has no say."""
    import builtins
    import json

    asked: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda question="": asked.append(question) or "y")
    (qwen / "evil.py").write_text(f"open({str(qwen / 'robbed')!r}, 'w')\nclass Tokenizer: pass\n")
    settings, config = (json.loads((qwen / f"{name}.json").read_text()) for name in ("tokenizer_config", "config"))
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}, "tokenizer_class": "Evil"}
    for name, values in (("tokenizer_config", settings), ("config", {**config, "model_type": "evil"})):
        (qwen / f"{name}.json").unlink()
        (qwen / f"{name}.json").write_text(json.dumps(values))
    load(qwen)
    assert not asked and not (qwen / "robbed").exists() and "evil" not in sys.modules
