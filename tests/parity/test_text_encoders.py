"""The text encoders, tokenizers and the cutting of pictures beside transformers', from the same files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from kandinsky.loading.text_encoders import _CLIP_PREFIXES, _QWEN_PREFIXES, assign_weights
from kandinsky.loading.text_files import load_image_processor, load_tokenizer, read_config
from kandinsky.models.clip_text import ClipText, ClipTextConfig
from kandinsky.models.qwen import Qwen, QwenConfig
from kandinsky.models.qwen_vision import window_order

TINY = Path(__file__).resolve().parents[2] / "assets" / "tiny"
TEXTS = (
    "a red circle moves left",
    "",
    "  two  spaces,\n\nlines and\ttabs ",
    "don't; it's 1234 of Ünïcode — 日本, 🦊 and e\u0301!",
    "<|im_start|>user\n<|image_pad|><|im_end|>",
    "SHOUTING <|endoftext|> Words",
)


@pytest.mark.parametrize("family", ["t2v", "image"])
@pytest.mark.parametrize(("folder", "kind"), [("text_encoder", "qwen"), ("text_encoder2", "clip")])
def test_tokenizers(family: str, folder: str, kind: Any, tmp_path: Path) -> None:
    """From tokenizer.json, and from vocab.json and merges.txt, which published repositories have in its place."""
    path = TINY / family / folder
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    whole = load_tokenizer(path, "-", kind)
    model = json.loads((path / "tokenizer.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(model["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["model"]["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    told = json.loads((path / "tokenizer_config.json").read_text())
    told["added_tokens_decoder"] = {str(token["id"]): token for token in model["added_tokens"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    for ours in (whole, load_tokenizer(tmp_path, "-", kind)):
        assert len(ours) == len(theirs)
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]
        rows = theirs(list(TEXTS))["input_ids"]
        assert ours(TEXTS)["input_ids"] == rows
        fixed: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": 9}
        assert ours(TEXTS, **fixed)["input_ids"] == theirs(list(TEXTS), **fixed)["input_ids"]
        if kind == "qwen":
            for row in rows:
                for skip in (False, True):
                    expected = theirs.decode(row, skip_special_tokens=skip)
                    assert ours.decode(row, skip_special_tokens=skip) == expected


def test_pictures() -> None:
    """Sizes that are rounded, brought up to the least, and down to the most."""
    path = TINY / "image" / "text_encoder"
    ours = dataclasses.replace(load_image_processor(path), max_pixels=200 * 200)
    theirs = transformers.Qwen2VLImageProcessorPil.from_pretrained(path, max_pixels=200 * 200)
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        for w, h in ((64, 64), (20, 31), (333, 222), (90, 500))
    ]
    found, expected = ours(images), theirs(images=images, return_tensors="pt")
    assert torch.equal(found["image_grid_thw"], expected["image_grid_thw"])
    assert (found["pixel_values"] - expected["pixel_values"]).abs().max() <= 1e-6
    with pytest.raises(ValueError, match="too narrow"):
        ours([Image.new("RGB", (2010, 10))])


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def both(request: pytest.FixtureRequest) -> tuple[Qwen, Any, torch.dtype]:
    """The tiny Qwen with its tower, ours and transformers'."""
    path = TINY / "image" / "text_encoder"
    with torch.device("meta"):
        ours = Qwen(read_config(QwenConfig, path))
    assign_weights(ours, path, _QWEN_PREFIXES, torch.device("cpu"), request.param)
    theirs = transformers.Qwen2_5_VLModel.from_pretrained(path, dtype=request.param)
    return ours.eval(), theirs.eval(), request.param


@torch.no_grad()
def test_qwen(both: tuple[Qwen, Any, torch.dtype]) -> None:
    ours, theirs, dtype = both
    ids = torch.randint(0, 490, (2, 70), generator=torch.Generator().manual_seed(0))
    expected = theirs.language_model(input_ids=ids).last_hidden_state
    found = ours.language_model(ids)
    assert found.dtype == dtype and expected.std() > 0.1
    assert (found - expected).abs().max() <= 1e-6


@torch.no_grad()
def test_qwen_with_pictures(both: tuple[Qwen, Any, torch.dtype]) -> None:
    """Several in one text, with windows that are cut off, and words before, between and behind."""
    ours, theirs, _ = both
    sizes = ((140, 364), (56, 84), (252, 112))
    noise = np.random.default_rng(0)
    images = [Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]
    pixels = load_image_processor(TINY / "image" / "text_encoder")(images)
    token, start = ours.config.image_token_id, ours.config.image_token_id - 1
    counts = (pixels["image_grid_thw"].prod(-1) // 4).tolist()
    rows = [[5, 6, 7], *([start, *[token] * count, 8] for count in counts), [9, 10]]
    ids = torch.tensor([[one for row in rows for one in row]])
    kinds = (ids == token).int()
    expected = theirs(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **pixels
    ).last_hidden_state
    assert (ours(ids, **pixels) - expected).abs().max() <= 1e-6
    order, windows = window_order(pixels["image_grid_thw"].tolist(), ours.config.vision_config)
    assert sorted(order.tolist()) == list(range(sum(counts))) and len(set(windows)) > 1


@torch.no_grad()
@pytest.mark.parametrize("end", [None, 2])
def test_clip(end: int | None, tmp_path: Path) -> None:
    """Also with the end token of no vocabulary that the published config has."""
    path = Path(shutil.copytree(TINY / "t2v" / "text_encoder2", tmp_path / "clip"))
    values = json.loads((path / "config.json").read_text())
    if end is not None:
        text = values | {"eos_token_id": end}
        (path / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": text}))
    ours = ClipText(read_config(ClipTextConfig, path)).eval()
    assign_weights(ours, path, _CLIP_PREFIXES, torch.device("cpu"), torch.float32)
    config = transformers.CLIPTextConfig.from_pretrained(path)
    theirs = transformers.CLIPTextModel.from_pretrained(path, config=config, dtype=torch.float32).eval()
    row = load_tokenizer(path, "-", "clip")(TEXTS, padding="max_length", truncation=True, max_length=32)["input_ids"]
    states, pooled = ours(torch.tensor(row))
    expected = theirs(input_ids=torch.tensor(row))
    assert (states - expected.last_hidden_state).abs().max() <= 1e-6
    assert (pooled - expected.pooler_output).abs().max() <= 1e-6 and pooled.std() > 0.1


OTHERS = {
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "positions": ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
    "windows": ({"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window is True"),
    "heads": ({"num_attention_heads": 5}, "do not divide"),
    "no number": ({"hidden_size": "128"}, "hidden_size is '128'"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_models_are_refused_and_not_computed_wrongly(what: str, tmp_path: Path) -> None:
    path = Path(shutil.copytree(TINY / "t2v" / "text_encoder", tmp_path / "qwen"))
    values = json.loads((path / "config.json").read_text())
    change, says = OTHERS[what]
    values["text_config"] |= change
    (path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=says):
        read_config(QwenConfig, path)
