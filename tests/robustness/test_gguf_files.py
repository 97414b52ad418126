"""GGUF headers from strangers: one line or success, and then the package opens the file and finds the same in it."""

from __future__ import annotations

import struct
from pathlib import Path
from random import Random

import pytest
import torch

from kandinsky.checkpoints.gguf_file import open_gguf, read_gguf_header
from tests.gguf_files import write_gguf
from tests.robustness.fuzzing import clearly_refused, fuzz, spoiled_bytes

NUMBERS = (0, 1, 7, 255, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)


def whole(path: Path) -> bytes:
    tensors = {"a.weight": torch.randn(4, 64), "b.bias": torch.randn(4), "blk.0.attn_q.weight": torch.randn(2, 32)}
    write_gguf(path, tensors, "q8_0", heads=4, base=1e6)
    return path.read_bytes()


def test_fuzz_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    good = whole(path)

    def case(rng: Random) -> None:
        if rng.random() < 0.5:
            content = bytearray(good)
            at = rng.randrange(4, 300)
            kind = rng.choice(("<I", "<Q"))
            content[at : at + struct.calcsize(kind)] = struct.pack(
                kind, rng.choice(NUMBERS) % 2 ** (8 * struct.calcsize(kind))
            )
            path.write_bytes(content)
        else:
            path.write_bytes(spoiled_bytes(rng, good))
        header = read_gguf_header(path)
        with open_gguf(path) as tensors:
            assert set(tensors.keys()) == set(header)
            for name, (_, shape) in header.items():
                assert tuple(tensors.get_tensor(name).shape) == shape

    fuzz(case)


def strings(count: int) -> bytes:
    """A header with one list of this many numbers."""
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 0, count) + bytes(1000)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF", "truncated"),
        (b"GGML" + bytes(100), "not a GGUF file"),
        (b"version https", "Git LFS pointer"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "other processors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "truncated"),
        (strings(2**40), "values in it"),
    ],
)
def test_what_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    message = clearly_refused(lambda: read_gguf_header(path))
    assert message is not None and words in message and str(path) in message


def test_truncated_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(whole(path)[:-200])
    message = clearly_refused(lambda: read_gguf_header(path))
    assert message is not None and "truncated" in message


def test_tensors_over_one_another(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    content = whole(path)
    at = content.index(b"b.bias") + len(b"b.bias") + 4 + 8 + 4  # after its name, axes, size and type: its offset
    assert struct.unpack_from("<Q", content, at) == (288,)  # 4 rows of two blocks of 34 bytes, aligned to 32
    path.write_bytes(content[:at] + struct.pack("<Q", 0) + content[at + 8 :])
    message = clearly_refused(lambda: read_gguf_header(path))
    assert message is not None and "overlap" in message
