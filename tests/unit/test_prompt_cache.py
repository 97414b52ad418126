"""Embeddings on disk: when they are found, when not, and that nothing but time depends on it."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kandinsky.runtime import prompt_cache
from kandinsky.runtime.prompt_cache import PromptCache, default_folder, fingerprint
from kandinsky.text.embeddings import TextEmbeddings

NEGATIVE = "ugly, static"
PICTURES = [Image.fromarray(np.full((4, 6, 3), value, np.uint8)) for value in (10, 20)]


class Encoder:
    """Random embeddings, the same for the same question; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(
        self,
        prompts: Sequence[str],
        content: str = "video",
        images: Sequence[Image.Image] | None = None,
        max_length: int | None = None,
    ) -> TextEmbeddings:
        (prompt,) = prompts  # never a batch
        self.asked.append(prompt)
        question = (prompt, content, images and images[0].tobytes(), max_length)
        generator = torch.Generator().manual_seed(zlib.crc32(repr(question).encode()))
        embeds = torch.randn(1, 1 + len(prompt), 8, generator=generator).bfloat16()
        return TextEmbeddings(embeds, torch.randn(1, 4, generator=generator), None)


def cache_in(folder: Path, **options: Any) -> tuple[PromptCache, Encoder]:
    encoder = Encoder()
    options = {"always": [NEGATIVE], "everything": True, "identity": {"files": "abc"}} | options
    return PromptCache(encoder, folder, device=torch.device("cpu"), **options), encoder


def assert_same(a: TextEmbeddings, b: TextEmbeddings) -> None:
    assert torch.equal(a.text_embeds, b.text_embeds) and a.text_embeds.dtype == b.text_embeds.dtype
    assert torch.equal(a.pooled_embeds, b.pooled_embeds) and a.pooled_embeds.dtype == b.pooled_embeds.dtype
    assert (a.text_mask is None) == (b.text_mask is None)
    assert a.text_mask is None or b.text_mask is None or torch.equal(a.text_mask, b.text_mask)


def test_what_was_asked_before_is_not_encoded_again(tmp_path: Path) -> None:
    first, encoder = cache_in(tmp_path / "made" / "when needed")
    expected = first.encode(["a red cat"], max_length=7)
    assert encoder.asked == ["a red cat"]
    second, encoder = cache_in(tmp_path / "made" / "when needed")
    assert_same(second.encode(["a red cat"], max_length=7), expected)
    assert encoder.asked == []
    assert_same(Encoder().encode(["a red cat"], max_length=7), expected)
    (entry,) = (tmp_path / "made" / "when needed").iterdir()  # nothing temporary is left
    assert b"cat" not in entry.read_bytes()


def test_several_prompts_are_each_encoded_alone_and_joined(tmp_path: Path) -> None:
    cache, encoder = cache_in(tmp_path)
    cache.encode(["bb"])
    joined = cache.encode(["a", "bb", "cccc"])
    assert encoder.asked == ["bb", "a", "cccc"]
    assert joined.text_mask is not None and joined.text_mask.sum(dim=1).tolist() == [2, 3, 5]
    for row, prompt in zip(joined.unbind(), ["a", "bb", "cccc"], strict=True):
        assert_same(row, Encoder().encode([prompt]))
    pictures = cache.encode(["a", "a"], "image_edit", PICTURES).unbind()
    for row, picture in zip(pictures, PICTURES, strict=True):
        assert_same(row, Encoder().encode(["a"], "image_edit", [picture]))


DIFFERENT: dict[str, dict[str, Any]] = {
    "words": {"prompts": ["a red cat "]},
    "template": {"content": "image"},
    "limit": {"max_length": 8},
    "no limit": {"max_length": None},
    "picture": {"content": "image_edit", "images": PICTURES[1:]},
    "shape of the picture": {"content": "image_edit", "images": [PICTURES[0].transpose(Image.Transpose.ROTATE_90)]},
    "encoders": {"identity": {"files": "abd"}},
    "another setting": {"identity": {"files": "abc", "dtype": "bfloat16"}},
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_everything_that_matters_is_in_the_name(tmp_path: Path, what: str) -> None:
    question: dict[str, Any] = {"prompts": ["a red cat"], "content": "video", "images": None, "max_length": 7}
    if "images" in DIFFERENT[what]:
        question |= {"content": "image_edit", "images": PICTURES[:1]}
    cache_in(tmp_path)[0].encode(**question)
    change = dict(DIFFERENT[what])
    options = {"identity": change.pop("identity")} if "identity" in change else {}
    cache, encoder = cache_in(tmp_path, **options)
    cache.encode(**question | change)
    assert len(encoder.asked) == 1 and len(list(tmp_path.iterdir())) == 2


def test_other_software_other_threads_other_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, _ = cache_in(tmp_path)
    paths = {cache.path("a", "video")}
    for name, value in (("FORMAT", 99), ("__version__", "99")):
        with monkeypatch.context() as patch:
            patch.setattr(prompt_cache, name, value)
            paths.add(cache.path("a", "video"))
    for module in ("torch", "tokenizers"):
        with monkeypatch.context() as patch:
            patch.setattr(f"{module}.__version__", "99")
            paths.add(cache.path("a", "video"))
    with monkeypatch.context() as patch:
        patch.setattr("torch.get_num_threads", lambda: 99)
        paths.add(cache.path("a", "video"))
        on_gpu = PromptCache(Encoder(), tmp_path, cache.identity, torch.device("cuda:0"))
        paths.add(on_gpu.path("a", "video"))
    assert on_gpu.path("a", "video") in paths  # threads of a CPU don't matter there
    assert len(paths) == 7 and cache.path("a", "video") in paths


def test_only_the_default_negative_prompt_unless_told(tmp_path: Path) -> None:
    for _ in range(2):
        cache, encoder = cache_in(tmp_path, everything=False)
        for prompt in ("a red cat", NEGATIVE):
            cache.encode([prompt])
    assert encoder.asked == ["a red cat"] and len(list(tmp_path.iterdir())) == 1
    # With a picture it would be an entry for every picture.
    cache.encode([NEGATIVE], "image_edit", PICTURES[:1])
    assert len(list(tmp_path.iterdir())) == 1


def test_a_damaged_entry_is_computed_again_and_mended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, encoder = cache_in(tmp_path)
    expected = cache.encode(["a red cat"])
    path = cache.path("a red cat", "video")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for content in (b"", whole[:50], whole[:-1], bytes(flipped), b"\0" * len(whole), b"something else"):
        path.write_bytes(content)
        encoder.asked.clear()
        caplog.clear()
        assert_same(cache.encode(["a red cat"]), expected)
        assert encoder.asked == ["a red cat"] and "computed again" in caplog.text
        assert path.read_bytes() == whole
    caplog.clear()
    cache.encode(["a red cat"])
    assert len(encoder.asked) == 1 and not caplog.records


def test_a_folder_that_takes_nothing_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    cache, encoder = cache_in(tmp_path / "file" / "below")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_same(cache.encode(["a red cat"]), Encoder().encode(["a red cat"]))
    assert encoder.asked == ["a red cat"] * 2
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "going on without" in caplog.text


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(path: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("kandinsky.common.writing._sync", full)
    cache, _ = cache_in(tmp_path)
    assert_same(cache.encode(["a"]), Encoder().encode(["a"]))
    assert "no space left" in caplog.text and list(tmp_path.iterdir()) == []


def test_mistakes_are_told_before_anything_is_encoded(tmp_path: Path) -> None:
    cache, encoder = cache_in(tmp_path)
    for arguments, message in (
        (("a bare string",), "non-empty list"),
        (([],), "non-empty list"),
        ((["a"], "poem"), "no prompt template for content 'poem'"),
        ((["a", "b"], "image_edit", PICTURES[:1]), "1 pictures for 2 prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.encode(*arguments)  # type: ignore[arg-type]
    assert encoder.asked == [] and list(tmp_path.iterdir()) == []


def test_the_folder_is_where_this_user_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "kandinsky5" / "prompts"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in (lambda: monkeypatch.setenv("XDG_CACHE_HOME", ""), lambda: monkeypatch.delenv("XDG_CACHE_HOME")):
        unset()
        assert default_folder() == tmp_path / "home" / ".cache" / "kandinsky5" / "prompts"


# --- what tells files from others -------------------------------------------------------------------------------------


@pytest.fixture
def encoder_files(tmp_path: Path) -> list[Path]:
    """A config and a weight file whose pages are not all looked at: header, then data."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    files = [folder / "config.json", folder / "model.safetensors"]
    files[0].write_text("{}")
    data = np.random.default_rng(0).integers(0, 256, 2**21, dtype=np.uint8).tobytes()
    files[1].write_bytes((16).to_bytes(8, "little") + b"a header of 16 b" + data)
    return files


def change_byte(path: Path, at: int) -> None:
    """Without a trace in the times of the file."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_files_that_were_moved_are_the_same_files(encoder_files: list[Path], tmp_path: Path) -> None:
    before = fingerprint(encoder_files)
    assert fingerprint(encoder_files) == before
    encoder_files[0].parent.rename(tmp_path / "elsewhere")
    assert fingerprint([tmp_path / "elsewhere" / path.name for path in encoder_files]) == before


@pytest.mark.parametrize(
    ("file", "at"),
    [(0, 1), (1, 10), (1, 30), (1, (2**21 + 24 - 4096) * 31 // 63 + 5), (1, -1)],
    ids=["config", "header", "first page", "a page in the middle", "last byte"],
)
def test_a_changed_file_is_another(encoder_files: list[Path], file: int, at: int) -> None:
    before = fingerprint(encoder_files)
    change_byte(encoder_files[file], at)
    assert fingerprint(encoder_files) != before


def test_a_file_that_was_written_again_is_another(encoder_files: list[Path]) -> None:
    before = fingerprint(encoder_files)
    os.utime(encoder_files[1], ns=(0, encoder_files[1].stat().st_mtime_ns + 1))
    assert fingerprint(encoder_files) != before
    assert fingerprint(encoder_files[1:]) != fingerprint(encoder_files)
