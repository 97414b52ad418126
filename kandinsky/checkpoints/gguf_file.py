"""GGUF, llama.cpp's file format, read as if it were one of ours: its table of contents, and its tensors.

A file begins with "GGUF", a version, how many tensors and how many metadata entries there are; then the metadata, each
tensor's name, shape (the innermost axis first), type and offset, and the aligned bytes
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). All of the header is checked here before the `gguf`
package, which has no bounds, opens the file: whoever wrote it may have meant harm.

Weights in blocks are presented as `quantized_parts` of dit_layout.py has quantised layers: `x.weight` in Q4_K is
`x.weight_q4_k`, bytes. A Qwen with llama.cpp's names gets the published ones. This module knows no torch until a tensor
is read, and needs the package only then.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kandinsky.checkpoints.headers import AGAIN, MAX_HEADER_BYTES, MAX_TENSOR_NAME, Header, why_absent
from kandinsky.common.given import shortened
from kandinsky.common.untrusted import open_file, reason

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".gguf"
# Weights of a row in a block, and a block's bytes.
BLOCKS = {"q8_0": (32, 34), "q6_k": (256, 210), "q5_k": (256, 176), "q4_k": (256, 144), "q4_0": (32, 18)}
PLAIN = {"F32": 4, "F16": 2, "BF16": 2}  # bytes of an element
KNOWN = ", ".join([*PLAIN, *(name.upper() for name in BLOCKS)])
# The format's numbers for its types, as far as files of this kind have them.
TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 24: "I8", 28: "F64", 30: "BF16", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
MAX_VALUES = 2_000_000  # of all metadata; a Qwen has its vocabulary in it, 460,000
MAX_ALIGNMENT = 65536

# llama.cpp's name of a part of Qwen -> the published one.
_QWEN = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_QWEN_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_QWEN_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<what>weight|bias)")


class Entry(NamedTuple):
    """A tensor as its file has it."""

    name: str  # in the file
    type: str  # as the format calls it
    shape: tuple[int, ...]  # the innermost axis last


class Contents(NamedTuple):
    metadata: dict[str, Any]  # without lists, which nobody here reads
    tensors: dict[str, Entry]  # by the name that it has here


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == SUFFIX


def read_gguf_header(path: Path) -> Header:
    """name -> (dtype, shape) of every tensor, blocks as their bytes ("U8").

    Raises ValueError where the file is missing, damaged or incomplete, or has types that are not read here.
    """
    return {name: _presented(entry) for name, entry in read_contents(path).tensors.items()}


@contextmanager
def open_gguf(path: Path) -> Iterator[GGUFTensors]:
    """The tensors, memory-mapped. Raises ValueError as `read_gguf_header` does, and without the package."""
    contents = read_contents(path)
    require_gguf(path)
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path, "c")  # copies what is written to: torch takes no memory that can't be
    except Exception as error:  # what it makes of files that ours lets through, should there be one
        raise ValueError(f"{path}: not readable as GGUF ({reason(error)}): {AGAIN}") from None
    yield GGUFTensors(contents, {tensor.name: tensor.data for tensor in reader.tensors})


def require_gguf(path: Path) -> None:
    """Raise ValueError where the package that reads GGUF is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError(
            f"{path}: GGUF files need the package gguf: pip install gguf, or take a .safetensors file"
        ) from None


class GGUFTensors:
    """What `safe_open` gives for a safetensors file, as far as it is used."""

    def __init__(self, contents: Contents, arrays: dict[str, Any]) -> None:
        self._entries, self._arrays = contents.tensors, arrays

    def keys(self) -> list[str]:
        return list(self._entries)

    def get_tensor(self, name: str) -> Tensor:
        import torch

        entry = self._entries[name]
        tensor = torch.from_numpy(self._arrays[entry.name])
        return tensor.view(torch.bfloat16) if entry.type == "BF16" else tensor


# --- the header -------------------------------------------------------------------------------------------------------


def read_contents(path: Path) -> Contents:
    """The table of contents. Errors are those of `read_gguf_header`."""
    if not path.is_file():
        raise ValueError(f"{path}: {why_absent(path, 'file')}")
    with open_file(path) as file:
        header = _Cursor(path, file.read(MAX_HEADER_BYTES), path.stat().st_size)
    if (start := header.take(4)) != b"GGUF":
        what = "a Git LFS pointer: fetch it with git lfs pull" if start == b"vers" else "not a GGUF file"
        raise ValueError(f"{path}: {what}")
    if (version := header.number("<I")) not in (2, 3):
        why = "written for other processors" if version & 0xFFFF == 0 else "not known here"
        raise ValueError(f"{path}: GGUF version {version} is {why}; versions 2 and 3 are read")
    tensors, entries = header.number("<Q"), header.number("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = header.string(MAX_TENSOR_NAME)
        if key in metadata or key.startswith("GGUF."):
            raise header.damaged(f"it has {shortened(key)} twice")
        metadata[key] = header.value(header.number("<I"))
    found: dict[str, Entry] = {}
    spans: list[tuple[int, int]] = []
    for _ in range(tensors):
        entry, span = _read_entry(header)
        name = _our_name(entry)
        if name in found:
            raise header.damaged(f"it has a tensor {shortened(entry.name)} twice")
        found[name] = entry
        spans.append(span)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise header.damaged("its general.alignment is no power of two")
    _check_spans(header, sorted(spans), alignment)
    return Contents({key: value for key, value in metadata.items() if value is not None}, found)


class _Cursor:
    """Reads a header from its beginning, never past its end."""

    def __init__(self, path: Path, content: bytes, size: int) -> None:
        self.path, self.content, self.size = path, content, size
        self.position = self.values = 0

    def damaged(self, why: str) -> ValueError:
        return ValueError(f"{self.path}: damaged GGUF header, {why}: {AGAIN}")

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.content):
            if end <= self.size:
                raise ValueError(f"{self.path}: its GGUF header has more than {MAX_HEADER_BYTES:,} bytes: damaged")
            raise ValueError(
                f"{self.path}: truncated inside its GGUF header ({self.size:,} bytes), or damaged: {AGAIN}"
            )
        taken = self.content[self.position : end]
        self.position = end
        return taken

    def number(self, kind: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def string(self, limit: int) -> str:
        length = self.number("<Q")
        if length > limit:
            raise self.damaged(f"a name or text in it has {length:,} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.damaged("a name or text in it is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """A value of the metadata; None for a list, over which it goes."""
        if kind == STRING:
            return self.string(MAX_HEADER_BYTES)
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise self.damaged(f"a value of a kind {kind} in it")
        of, count = self.number("<I"), self.number("<Q")
        self.values += count
        if self.values > MAX_VALUES:
            raise self.damaged(f"more than {MAX_VALUES:,} values in it")
        if of == STRING:
            for _ in range(count):
                self.take(self.number("<Q"))
        elif of in SCALARS:
            self.take(count * struct.calcsize(SCALARS[of]))
        else:
            raise self.damaged(f"a list of a kind {of} in it")
        return None


def _read_entry(header: _Cursor) -> tuple[Entry, tuple[int, int]]:
    """A tensor's entry, and the bytes that it has: where they begin and end after the header."""
    name = header.string(MAX_TENSOR_NAME)
    axes = header.number("<I")
    if not 1 <= axes <= 4:
        raise header.damaged(f"{shortened(name)} has {axes} axes")
    shape = tuple(header.number("<Q") for _ in range(axes))[::-1]
    number, begin = header.number("<I"), header.number("<Q")
    kind = TYPES.get(number, f"type {number}")
    if not all(0 < side < 2**48 for side in shape) or prod(shape) >= 2**48:
        raise header.damaged(f"{shortened(name)} has the shape {shortened(str(shape))}")
    if kind in PLAIN:
        return Entry(name, kind, shape), (begin, begin + prod(shape) * PLAIN[kind])
    if kind.lower() not in BLOCKS:
        raise ValueError(f"{header.path}: {shortened(name)} is in {kind}; GGUF is read in {KNOWN}: take another file")
    weights, size = BLOCKS[kind.lower()]
    if shape[-1] % weights:
        raise header.damaged(f"{shortened(name)} has rows of {shape[-1]}, and {kind} has blocks of {weights}")
    if len(shape) != 2 or not name.endswith(".weight"):
        raise ValueError(
            f"{header.path}: {shortened(name)} is in {kind}, and only weights of two axes are read in blocks"
        )
    return Entry(name, kind, shape), (begin, begin + prod(shape) // weights * size)


def _check_spans(header: _Cursor, spans: list[tuple[int, int]], alignment: int) -> None:
    end = 0
    for begin, after in spans:
        if begin != -(-end // alignment) * alignment:
            raise header.damaged("its tensors overlap or leave gaps")
        end = after
    start = -(-header.position // alignment) * alignment
    if header.size < start + end:
        raise ValueError(f"{header.path}: truncated, it has {header.size:,} of {start + end:,} bytes: {AGAIN}")


def _our_name(entry: Entry) -> str:
    """The published name, and where it is in blocks with what blocks these are: `x.weight_q4_k`."""
    name, match = entry.name, _QWEN_NAME.fullmatch(entry.name)
    if match and match["layer"] and match["part"] in _QWEN_LAYER:
        name = f"model.layers.{match['layer']}.{_QWEN_LAYER[match['part']]}.{match['what']}"
    elif match and not match["layer"] and match["part"] in _QWEN:
        name = f"{_QWEN[match['part']]}.{match['what']}"
    return name if entry.type in PLAIN else f"{name}_{entry.type.lower()}"


def _presented(entry: Entry) -> tuple[str, tuple[int, ...]]:
    if entry.type in PLAIN:
        return entry.type, entry.shape
    weights, size = BLOCKS[entry.type.lower()]
    return "U8", (*entry.shape[:-1], entry.shape[-1] // weights * size)
