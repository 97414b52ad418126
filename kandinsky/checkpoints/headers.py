"""The table of contents of a safetensors file, read and checked before anything else of it is.

A file begins with 8 bytes with the length of the header (little endian), then the header as JSON, {name: {"dtype",
"shape", "data_offsets": [begin, end]}}, then the tensors' bytes without gaps (https://huggingface.co/docs/safetensors).
Reading that much takes milliseconds even for a 77 GB file, and says whether it is complete and which model it belongs
to. What the format's own library would refuse is refused here, in words: whoever has read a header can open the file.

Safetensors only: a pickle (.pt, .bin, .ckpt) can run any code when it is opened. This module does not know torch.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kandinsky.common.given import shortened, why_no_file
from kandinsky.common.untrusted import open_file, parse_json, reason

Header = dict[str, tuple[str, tuple[int, ...]]]

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
MAX_HEADER_BYTES = 25_000_000  # a quarter of what the format allows, and a hundred times the largest published one
MAX_TENSOR_NAME = 500  # characters
BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8,
    "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
AGAIN = "copy or download it again"


def read_header(path: str | Path) -> Header:
    """name -> (dtype, shape) of every tensor in a safetensors file, dtype as the format calls it ("BF16").

    Raises ValueError where the file is missing, no file, a pickle, not safetensors, damaged or incomplete.
    """
    return _read(Path(path))[0]


def read_metadata(path: str | Path) -> dict[str, str]:
    """What stands in the header beside the tensors. Errors are those of `read_header`."""
    return _read(Path(path))[1]


@contextmanager
def open_tensors(path: str | Path, framework: str = "pt") -> Iterator[Any]:
    """safetensors' `safe_open` of a file whose header is sound. Raises ValueError in place of its own error."""
    from safetensors import SafetensorError, safe_open

    read_header(path)  # a truncated file is a clear error here and a bus error later
    try:
        with safe_open(path, framework=framework) as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{path}: not readable as safetensors ({reason(error)}): {AGAIN}") from None


def _read(path: Path) -> tuple[Header, dict[str, str]]:
    refuse_pickle(path)
    if not path.is_file():
        raise ValueError(f"{path}: {why_absent(path, 'file')}")
    size = path.stat().st_size
    with open_file(path) as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"{path}: truncated, it has {size} bytes: {AGAIN}")
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER_BYTES:
            _explain_start(path, start)
            raise ValueError(f"{path}: not a safetensors file (its header would have {length:,} bytes)")
        text = file.read(length)
    if len(text) < length:
        raise ValueError(
            f"{path}: truncated inside its header ({size:,} bytes; the header ends at {8 + length:,}): {AGAIN}"
        )
    entries = _parse(path, text)
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: damaged header, its __metadata__ is not text: {AGAIN}")

    header: Header = {}
    spans = []
    for name, entry in entries.items():
        if len(name) > MAX_TENSOR_NAME:
            raise ValueError(f"{path}: damaged header, a tensor's name has {len(name):,} characters: {AGAIN}")
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end)):
                raise ValueError
            if dtype not in BITS:
                raise ValueError(f"its dtype is {shortened(str(dtype))}, which is not known here: take another file")
            if (end - begin) * 8 != _elements(shape) * BITS[dtype]:
                raise ValueError
        except (TypeError, KeyError, ValueError) as error:
            why = str(error) if "dtype is" in str(error) else f"it makes no sense: {AGAIN}"
            raise ValueError(f"{path}: damaged header, the entry of {shortened(name)}: {why}") from None
        header[name] = (dtype, shape)
        spans.append((begin, end))
    _check_spans(path, sorted(spans), data_bytes=size - 8 - length)
    return header, metadata


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    not_json = f"{path}: not a safetensors file, or a damaged one (its header is not JSON)"
    if text[:3] == b"\xef\xbb\xbf":  # which other JSON may begin with
        raise ValueError(not_json)
    try:
        entries = parse_json(text, path, unique=True)
    except ValueError as error:
        raise ValueError(not_json if "not JSON" in str(error) else f"{error} (in its header): {AGAIN}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: not a safetensors file (its header is not a JSON object)")
    return entries


def _elements(shape: tuple[int, ...]) -> int:
    """How many there are. Raises ValueError where the numbers up to some axis already don't fit into 64 bits."""
    count = 1
    for side in shape:
        count *= side
        if count >= 2**64:
            raise ValueError
    return count


def _explain_start(path: Path, start: bytes) -> None:
    """Name the usual files that are not safetensors, read as which their first bytes are an absurd header length."""
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise ValueError(f"{path}: this is a pickle (a torch.save file), whatever its name says; safetensors only")
    if start.startswith(b"version "):
        raise ValueError(f"{path}: this is a Git LFS pointer, not the weights: fetch them with git lfs pull")


def _check_spans(path: Path, spans: list[tuple[int, int]], data_bytes: int) -> None:
    position = 0
    for begin, end in spans:
        if begin != position or end < begin:
            raise ValueError(f"{path}: damaged header, its tensors overlap or leave gaps: {AGAIN}")
        position = end
    if data_bytes != position:
        what = "truncated" if data_bytes < position else "too long"
        raise ValueError(f"{path}: {what}, it has {data_bytes:,} of {position:,} bytes of tensors: {AGAIN}")


def why_absent(path: Path, what: str) -> str:
    """Why there is no `what` (a file, a folder) at a path, for people."""
    if path.exists() and not path.is_dir() and (why := why_no_file(path)):
        return why
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a symbolic link that leads back to itself: replace it with the file"
        if path.is_symlink():
            return f"a symbolic link to {os.readlink(path)}, where there is nothing"
    return f"no such {what}"


def refuse_pickle(path: Path) -> None:
    """Raise ValueError for a file that is a pickle by its name."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ValueError(
            f"{path}: safetensors only. A {path.suffix} file is a pickle, which can run any code when it is opened; "
            "convert it with safetensors.torch.save_file on a machine where you trust it"
        )
