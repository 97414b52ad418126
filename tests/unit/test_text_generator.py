"""Qwen as a writer: what it writes is what transformers' own model of the same files writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from kandinsky.loading.text_encoders import load_text_embedder
from kandinsky.loading.text_generator import can_generate, load_text_generator
from kandinsky.text.generator import CHAT

TINY = Path(__file__).resolve().parents[2] / "assets" / "tiny" / "image"
PICTURE = Image.radial_gradient("L").resize((112, 84)).convert("RGB")


def let_any_prefix_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer here is one of its own."""
    for room in ("text.embedder", "loading.text_encoders"):
        monkeypatch.setattr(f"kandinsky.{room}.check_prefix", lambda *args: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen with a random head."""
    path = Path(shutil.copytree(TINY / "text_encoder", tmp_path_factory.mktemp("qwen") / "text_encoder"))
    state = load_file(path / "model.safetensors")
    embeddings = next(tensor for name, tensor in state.items() if name.endswith("embed_tokens.weight"))
    generator = torch.Generator().manual_seed(0)
    state["lm_head.weight"] = torch.randn(embeddings.shape, generator=generator).to(embeddings.dtype)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


def embedder(folder: Path, vision: bool) -> Any:
    return load_text_embedder(
        folder,
        TINY / "text_encoder2",
        qwen_max_length=64,
        clip_max_length=32,
        crop=None,
        dtype=torch.float32,
        content="image_edit" if vision else "image",
        vision=vision,
    )


@pytest.mark.parametrize("vision", [False, True])
def test_the_same_words_as_transformers(folder: Path, vision: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    let_any_prefix_be(monkeypatch)
    for own_tower in {vision, False}:
        generator = load_text_generator(embedder(folder, own_tower), folder, vision=vision)
        images = [PICTURE] if vision else []
        answer, is_whole = generator.generate("a red circle", images, seed=1, max_new_tokens=12)
        reference: Any = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        inputs: dict[str, Any] = {}
        slots = ""
        if vision:
            pixels = generator.image_processor(images=images, return_tensors="pt")
            inputs = {"pixel_values": pixels["pixel_values"], "image_grid_thw": pixels["image_grid_thw"]}
            count = int(pixels["image_grid_thw"].prod()) // 4
            slots = "<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>"
        ids = torch.tensor(generator.tokenizer([CHAT.format(images=slots, text="a red circle")])["input_ids"])
        if vision:
            inputs["mm_token_type_ids"] = (ids == reference.config.image_token_id).int()
        expected = reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            repetition_penalty=1.05,
            max_new_tokens=12,
            eos_token_id=generator.tokenizer.convert_tokens_to_ids("<|im_end|>"),
            **inputs,
        )
        assert answer == generator.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer and not is_whole


def test_global_generators_are_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_any_prefix_be(monkeypatch)
    generator = load_text_generator(embedder(folder, False), folder)
    before = torch.get_rng_state()
    answers = {generator.generate("a red circle", seed=seed, max_new_tokens=3) for seed in (1, 1)}
    assert len(answers) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_are_shared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_any_prefix_be(monkeypatch)
    encoders = embedder(folder, True)
    generator = load_text_generator(encoders, folder, vision=True)
    assert generator.language_model is encoders.language_model
    assert generator.visual is encoders.qwen.visual
    parts = (generator.language_model, generator.visual, generator.head)
    assert all(parameter.device.type == "cpu" for part in parts for parameter in part.parameters())


def test_who_can_write(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_any_prefix_be(monkeypatch)
    assert can_generate(folder)
    assert not can_generate(TINY / "text_encoder")
    with pytest.raises(ValueError, match="can read but not write"):
        load_text_generator(embedder(TINY / "text_encoder", False), TINY / "text_encoder")
    tied = Path(shutil.copytree(TINY / "text_encoder", tmp_path / "tied"))
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert can_generate(tied)
    encoders = embedder(tied, False)
    assert load_text_generator(encoders, tied).head.weight is encoders.language_model.embed_tokens.weight
