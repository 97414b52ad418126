"""Prompts that are written out: what is asked, what of an answer is taken, and when the user's words stand."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kandinsky import get_T2V_pipeline
from kandinsky.text.expansion import PromptExpander, clean, expand_prompt, fault_of, instructions
from tests.unit.small_pipelines import TASKS, build, call, latents_of

TINY = Path(__file__).resolve().parents[2] / "configs" / "config_tiny_t2v.yaml"
CAPTION = "A cat sits in a small wooden boat on a calm lake. The camera moves slowly to the left."


class Writer:
    """Answers what it is told to; remembers what it was asked."""

    def __init__(self, answer: str = CAPTION, is_whole: bool = True) -> None:
        self.answer = answer, is_whole
        self.asked: list[tuple[Any, ...]] = []

    def generate(
        self, text: str, images: Sequence[Image.Image] = (), *, seed: int = 0, max_new_tokens: int = 256
    ) -> tuple[str, bool]:
        self.asked.append((text, list(images), seed, max_new_tokens))
        return self.answer


@pytest.mark.parametrize("task", ["t2v", "i2v", "t2i", "i2i"])
def test_what_is_asked(task: str) -> None:
    writer, picture = Writer(), Image.new("RGB", (8, 8))
    assert expand_prompt(writer, "a {cat}", task, [picture], seed=5) == CAPTION
    ((text, images, seed, most),) = writer.asked
    assert text == instructions()[task].replace("{prompt}", "a {cat}") and text.endswith("Request: a {cat}")
    assert (images, seed, most) == ([picture], 5, 256)


@pytest.mark.parametrize(
    ("answer", "is_whole", "expected"),
    [
        ("  A cat.\n\nIt sleeps. ", True, "A cat. It sleeps."),
        ("Caption: A cat.", True, "A cat."),
        ("**Caption:** A cat.", True, "A cat."),
        ('"A cat sleeps."', True, "A cat sleeps."),
        ('"Hello" says the "cat"', True, '"Hello" says the "cat"'),
        ("A cat sleeps. It dreams of a", False, "A cat sleeps."),
        ("A cat that dreams of a", False, "A cat that dreams of a"),
        ("", True, ""),
    ],
)
def test_what_is_taken(answer: str, is_whole: bool, expected: str) -> None:
    assert clean(answer, is_whole) == expected


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("... !!", "empty"),
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("As an AI language model", "refusal"),
        ("the cat sat on " * 20, "repeats"),
    ],
)
def test_the_user_s_words_stand(answer: str, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert expand_prompt(Writer(answer), "a cat", "t2v") == "a cat"
    assert fault in caplog.text and "taken as it is" in caplog.text


def test_ordinary_captions_have_no_fault() -> None:
    for caption in (CAPTION, "a cat", "猫が舟で眠る", f"{CAPTION} The cat looks up. {CAPTION.upper()}"):
        assert fault_of(caption) is None


def test_what_was_written_is_kept(tmp_path: Path) -> None:
    writer, picture = Writer(), Image.new("RGB", (8, 8))
    expander = PromptExpander(lambda: writer, {"model": 1}, tmp_path / "captions")
    for _ in range(2):
        assert expander.expand(["a cat"], "i2v", [picture], [1]) == [CAPTION]
    assert len(writer.asked) == 1
    others: list[tuple[Any, ...]] = [
        (["a dog"], "i2v", [picture], [1]),
        (["a cat"], "i2i", [picture], [1]),
        (["a cat"], "i2v", [Image.new("RGB", (8, 8), "red")], [1]),
        (["a cat"], "i2v", [Image.new("RGB", (4, 16))], [1]),
        (["a cat"], "i2v", [None], [1]),
        (["a cat"], "i2v", [picture], [2]),
    ]
    for other in others:
        expander.expand(*other)
    PromptExpander(lambda: writer, {"model": 2}, tmp_path / "captions").expand(["a cat"], "i2v", [picture], [1])
    assert len(writer.asked) == 2 + len(others)


def test_without_a_folder_every_call_asks(tmp_path: Path) -> None:
    writer = Writer()
    made = []
    expander = PromptExpander(lambda: made.append(1) or writer)  # type: ignore[func-returns-value]
    assert expander.expand(["a cat"] * 2, "t2v", [None] * 2, [1, 1]) == [CAPTION] * 2
    assert len(writer.asked) == 2 and len(made) == 1
    expander.expand(["a cat"], "t2v", [None], [1])
    assert len(made) == 2


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        captions = PromptExpander(Writer, folder=tmp_path / "file" / "captions").expand(["a cat"], "t2v", [None], [0])
        assert captions == [CAPTION]
    assert "can't be kept" in caplog.text


# --- in a pipeline ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_the_model_is_told_the_caption(task: str, tmp_path: Path) -> None:
    writer = Writer()
    pipe: Any = build(task, expander=PromptExpander(lambda: writer))
    expanded = latents_of(pipe, ["a red cat", "a dog"], seed=[4, 9])
    told = latents_of(build(task), [CAPTION, CAPTION], seed=[4, 9])
    assert torch.equal(expanded, told)
    assert [(text.split("Request: ")[1], seed) for text, _, seed, _ in writer.asked] == [("a red cat", 4), ("a dog", 9)]
    assert all(len(images) == (task in ("i2v", "i2i")) for _, images, _, _ in writer.asked)
    path = tmp_path / ("a.mp4" if task.endswith("v") else "a.png")
    call(pipe, save_path=path)
    facts = json.loads(path.with_suffix(".json").read_text())
    assert (facts["prompt"], facts["expanded_prompt"]) == ("a red cat", CAPTION)


def test_when_there_is_nothing_to_expand() -> None:
    writer = Writer()
    pipe: Any = build("t2v", expander=PromptExpander(lambda: writer))
    assert torch.equal(latents_of(pipe, expand_prompts=False), latents_of(build("t2v")))
    latents_of(pipe, None, prompt_embeds=pipe.encode_prompt("a red cat"))
    assert not writer.asked
    latents_of(pipe, num_frames=1)
    assert writer.asked[0][0].startswith(instructions()["t2i"][:40])


def test_a_model_that_cannot_write() -> None:
    with pytest.raises(ValueError, match="can read and not write"):
        latents_of(build("t2v"), expand_prompts=True)
    with pytest.raises(ValueError, match="has no lm_head"):
        get_T2V_pipeline("cpu", conf_path=TINY, overrides=["generation.expand_prompts=true"])
    with pytest.raises(ValueError, match="expand_prompts is 'yes'"):
        latents_of(build("t2v"), expand_prompts="yes")


@pytest.mark.parametrize("options", [{}, {"offload": True}, {"cache_prompts": True}])
def test_a_tiny_qwen_with_a_head_writes(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of sense, as its head is random; but through the same code as the published one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(TINY.parents[1] / "assets" / "tiny" / "t2v" / "text_encoder", tmp_path / "qwen"))
    state = load_file(folder / "model.safetensors")
    embeddings = next(tensor for name, tensor in state.items() if name.endswith("embed_tokens.weight"))
    state["lm_head.weight"] = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    pipe = get_T2V_pipeline("cpu", conf_path=TINY, text_encoder_path=folder, **options)
    with caplog.at_level(logging.INFO):
        pipe("a red circle", time_length=0, num_steps=1, seed=1, progress=False)
    assert "expanded prompt" in caplog.text
    if "cache_prompts" in options:
        (kept,) = (tmp_path / "cache" / "kandinsky5" / "captions").iterdir()
        assert kept.read_text() in caplog.text
