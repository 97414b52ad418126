"""Qwen's layers out of the file, one after the other: the bits of the resident encoder, in the memory of two layers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.encoders import measure_in_a_process
from kandinsky.loading.text_encoders import load_text_embedder
from kandinsky.loading.text_generator import load_text_generator
from kandinsky.runtime.layer_stream import StreamedLayers
from kandinsky.text.embedder import TextEmbedder
from tools.make_tiny_text_encoders import make_text_encoders

WORDS = ["a red circle", "", "make it blue, then move it to the left"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    make_text_encoders(WORDS, folder, seed=0, images=True)
    file = folder / "text_encoder" / "model.safetensors"
    state = load_file(file)  # with a head, to write with
    table = next(tensor for name, tensor in state.items() if name.endswith("embed_tokens.weight"))
    state["lm_head.weight"] = torch.randn(table.shape, generator=torch.Generator().manual_seed(0)).to(table.dtype)
    save_file(state, file, metadata={"format": "pt"})
    return folder


def load(folder: Path, content: str, **options: Any) -> TextEmbedder:
    from transformers import Qwen2Tokenizer

    from kandinsky.text.prompts import get_template, prefix_length

    crop = prefix_length(Qwen2Tokenizer.from_pretrained(folder / "text_encoder"), get_template(content))
    lengths: dict[str, Any] = {"qwen_max_length": 64, "clip_max_length": 32, "crop": crop, "content": content}
    vision = content == "image_edit"
    return load_text_embedder(folder / "text_encoder", folder / "text_encoder2", vision=vision, **lengths, **options)


@pytest.mark.processor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("content", ["video", "image", "image_edit"])
def test_the_same_bits(folder: Path, content: str, dtype: torch.dtype) -> None:
    """Of every template, pictures included, and again with what earlier prompts left in the buffers."""
    resident, streamed = (load(folder, content, dtype=dtype, stream=stream) for stream in (False, True))
    for seed, words in enumerate(WORDS):
        pixels = torch.randint(0, 256, (84, 56, 3), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
        images = [Image.fromarray(pixels.numpy())] if content == "image_edit" else None
        expected, found = (one.encode([words], content, images) for one in (resident, streamed))
        assert torch.equal(found.text_embeds, expected.text_embeds) and found.text_embeds.dtype == dtype
        assert torch.equal(found.pooled_embeds, expected.pooled_embeds)
    # No layer has memory of its own: what they are views of is two buffers.
    stacks = [module for module in streamed.modules() if isinstance(module, StreamedLayers)]
    assert len(stacks) == 1 + (content == "image_edit")
    for stack in stacks:
        buffers = {tensor.untyped_storage().data_ptr() for tensor in stack.parameters()}
        assert len(buffers) == min(2, len(stack))


@pytest.mark.processor
@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="reads Linux's account of memory")
def test_memory_of_two_layers(tmp_path: Path) -> None:
    """Beyond what the interpreter and a tiny encoder take: two buffers, and what a resident encoder computes with.

    A copy of one tensor may be made by the library that multiplies, and, in `rss`, one is mapped while it is copied out
    of the file. The published width is in benchmarks/RESULTS.md.
    """
    result = measure_in_a_process(tmp_path, layers=6, hidden=1280, intermediate=5120)
    layer, tensor, streamed, resident = (result[name] for name in ("layer", "largest", "streamed", "resident"))
    assert result["same"] and result["finite"]
    allowed = 2 * layer + resident["anon"] + tensor
    assert 1.9 * layer < streamed["anon"] < allowed and streamed["rss"] < allowed + tensor
    assert resident["rss"] > 5.9 * layer > 1.9 * (allowed + tensor)


def test_writing_while_streaming(folder: Path) -> None:
    resident, streamed = (
        load_text_generator(load(folder, "image", dtype=torch.float32, stream=stream), folder / "text_encoder")
        for stream in (False, True)
    )
    assert resident.generate("a cat", max_new_tokens=4) == streamed.generate("a cat", max_new_tokens=4)


def test_quantised_files_are_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("text_encoder", "text_encoder2"):
        shutil.copytree(folder / name, tmp_path / name)
    file = tmp_path / "text_encoder" / "model.safetensors"
    state = load_file(file)
    state["model.layers.0.self_attn.q_proj.weight"] = state["model.layers.0.self_attn.q_proj.weight"].to(
        torch.float8_e4m3fn
    )
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"quantised layers don't stream: set runtime.stream_encoders=off"):
        load(tmp_path, "video", dtype=torch.float32, stream=True)
