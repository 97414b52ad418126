"""What docs/exactness.md promises to the last bit, on whatever processor this runs."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from kandinsky.config.reading import load_config
from kandinsky.loading.assemble import load_pipeline
from kandinsky.models.numerics import ALIGNMENT, aligned
from kandinsky.text.embeddings import TextEmbeddings

pytestmark = pytest.mark.processor

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs" / "config_tiny_t2v.yaml"
PARTS = {
    "model.checkpoint_path": "model/tiny_t2v.safetensors",
    "model.vae.checkpoint_path": "vae",
    "model.text_embedder.qwen.checkpoint_path": "text_encoder",
    "model.text_embedder.clip.checkpoint_path": "text_encoder2",
}


@pytest.fixture(autouse=True)
def no_kept_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def beginning_at(tensors: dict[str, Tensor], start: int) -> bytes:
    """A safetensors file whose tensors begin `start` bytes after a multiple of 64: spaces may follow its header."""
    content = save(tensors)
    (length,) = struct.unpack("<Q", content[:8])
    spaces = (start - 8 - length) % ALIGNMENT
    return struct.pack("<Q", length + spaces) + content[8 : 8 + length] + b" " * spaces + content[8 + length :]


def weights_in(folder: Path, dtype: torch.dtype, start: int) -> Path:
    """The tiny model's files anew, in another dtype, their tensors beginning elsewhere."""
    shutil.copytree(REPOSITORY / "assets" / "tiny" / "t2v", folder)
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(beginning_at({name: one.to(dtype) for name, one in load_file(path).items()}, start))
    return folder


def generated(folder: Path, dtype: str, **wishes: Any) -> tuple[Tensor, Tensor]:
    """Latents and pixels of a video of 5 frames."""
    overrides = [f"{key}={folder / path}" for key, path in PARTS.items()]
    pipe: Any = load_pipeline(load_config(CONFIG, overrides), "cpu", dtype=dtype)
    wishes = {"time_length": 0.2, "width": 64, "height": 64, "num_steps": 2, "guidance_weight": 3.0} | wishes
    latents = pipe("a red circle", seed=1, progress=False, output_type="latent", **wishes)
    return latents, pipe.decode(latents)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_tensors_begin_in_a_file_does_not_matter(dtype: str, tmp_path: Path) -> None:
    """What a tensor's address changes in a product would otherwise come from the length of a file's header."""
    stored = getattr(torch, dtype)
    expected = generated(weights_in(tmp_path / "0", stored, 0), dtype)
    for start in (8, 24, 48):
        found = generated(weights_in(tmp_path / str(start), stored, start), dtype)
        assert all(map(torch.equal, found, expected)), start


def test_embeddings_begin_where_they_would_if_they_had_been_made() -> None:
    """Whoever they come from, on the way to the model."""
    memory = torch.zeros(4096, dtype=torch.uint8)
    shifted = memory[(8 - memory.data_ptr()) % ALIGNMENT :][:256].view(torch.float32).view(1, 8, 8)
    assert shifted.data_ptr() % ALIGNMENT == 8
    text = TextEmbeddings(shifted, shifted[0], None).to("cpu")
    assert text.text_embeds.data_ptr() % ALIGNMENT == text.pooled_embeds.data_ptr() % ALIGNMENT == 0
    assert aligned(text.text_embeds) is text.text_embeds  # and nothing is copied twice
    assert aligned(shifted.view(torch.bfloat16)).data_ptr() == shifted.data_ptr()


def test_the_same_again_and_nearly_so_with_two_threads(tmp_path: Path) -> None:
    folder = REPOSITORY / "assets" / "tiny" / "t2v"
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            found.append(generated(folder, "float32", width=128, height=128))
    finally:
        torch.set_num_threads(before)
    one, again, two = found
    assert all(map(torch.equal, one, again))
    differences = (one[1].int() - two[1].int()).abs()
    assert differences.max() <= 1 and (differences > 0).float().mean() < 1 / 500
