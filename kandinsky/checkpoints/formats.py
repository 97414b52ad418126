"""Model weights in whatever format people have them, as if all were safetensors with our names for quantised layers.

- safetensors, as published or quantised by us: as it is.
- ComfyUI's fp8: `x.weight` in 8-bit floats, with `x.scale_weight` or `x.weight_scale` (one number, or one a row) or
  without, and notes beside it: `x.comfy_quant` or the file's `_quantization_metadata` have to say that it is fp8, and
  nobody needs the others (`scaled_fp8`, `x.scale_input`, `x.input_scale`).
  What is a layer's weight becomes `x.weight_fp8` and `x.weight_scale`; whatever else is in 8 bits, or shall not stay
  so, is made into larger floats as it is read.
- GGUF: see gguf_file.py.

Readers of models go through here; what we write ourselves is read by headers.py. Knows no torch until a tensor is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import safe_open

from kandinsky.checkpoints.dit_layout import COMFY_PREFIX, is_quantizable
from kandinsky.checkpoints.gguf_file import is_gguf, open_gguf, read_gguf_header
from kandinsky.checkpoints.headers import Header, open_tensors, read_header
from kandinsky.common.given import shortened

if TYPE_CHECKING:
    from torch import Tensor

FP8 = ("F8_E4M3", "F8_E5M2")
FP8_NOTES = ("float8_e4m3fn", "float8_e5m2")  # of ComfyUI's names of formats, those that are just numbers and a scale
SCALES = ("scale_weight", "weight_scale")
NOTES = ("comfy_quant", "scale_input", "input_scale", "scaled_fp8")


class _Source(NamedTuple):
    """Where a tensor comes from, and what becomes of it."""

    dtype: str
    shape: tuple[int, ...]
    tensor: str | None  # its name in the file; None for a scale that is 1 because the file has none
    scale: str | None = None  # what it is multiplied with when it is read


def read_weights_header(path: str | Path, keep_fp8: bool = True) -> Header:
    """name -> (dtype, shape) of every tensor of a file of model weights, as `open_weights` gives them.

    keep_fp8: False for layers in 8-bit floats that are to be made into numbers as they are read.
    Raises ValueError as `read_header` and `read_gguf_header` do, and for ways of quantising that are not known here.
    """
    path = Path(path)
    if is_gguf(path):
        return read_gguf_header(path)
    header = read_header(path)
    if not _is_foreign(path, header):
        return header
    return {name: (source.dtype, source.shape) for name, source in _sources(path, header, keep_fp8).items()}


@contextmanager
def open_weights(path: str | Path, keep_fp8: bool = True) -> Iterator[Any]:
    """The tensors, by `keys()` and `get_tensor(name)`, memory-mapped. Arguments and errors: `read_weights_header`."""
    path = Path(path)
    if is_gguf(path):
        with open_gguf(path) as tensors:
            yield tensors
        return
    header = read_header(path)
    with open_tensors(path) as tensors:
        yield _Fp8Tensors(tensors, _sources(path, header, keep_fp8)) if _is_foreign(path, header) else tensors


def _is_foreign(path: Path, header: Header) -> bool:
    """Whether a file has ComfyUI's fp8. Raises ValueError for NVFP4."""
    if any(name.endswith(".weight_scale_2") or dtype == "F4" for name, (dtype, _) in header.items()):
        raise ValueError(
            f"{path}: its layers are in NVFP4, 4-bit floats that only the newest GPUs compute with and that are not "
            "read here: take the same model in bf16, fp8 or GGUF"
        )
    found = any(dtype in FP8 and name.rpartition(".")[2] in ("weight", "bias") for name, (dtype, _) in header.items())
    if found:
        _check_notes(path, header)
    return found


def _check_notes(path: Path, header: Header) -> None:
    """Raises ValueError where ComfyUI's notes say that 8-bit weights are more than floats with a scale."""
    notes = [name for name, (dtype, _) in header.items() if name.endswith(".comfy_quant") and dtype == "U8"]
    with safe_open(path, framework="numpy") as tensors:
        found = {name: tensors.get_tensor(name).tobytes() for name in notes}
        of_all = (tensors.metadata() or {}).get("_quantization_metadata")
    try:
        formats = {name: json.loads(note)["format"] for name, note in found.items()}
        if of_all is not None:
            formats |= {name: layer["format"] for name, layer in json.loads(of_all)["layers"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"{path}: its notes on how it is quantised can't be read: take the same model in bf16, fp8 or GGUF"
        ) from None
    for name, word in formats.items():
        if word not in FP8_NOTES:
            raise ValueError(
                f"{path}: {shortened(name)} says {shortened(str(word))!r}; ComfyUI's {' and '.join(FP8_NOTES)} are "
                "read: take the same model in bf16, fp8 or GGUF"
            )


def _sources(path: Path, header: Header, keep_fp8: bool) -> dict[str, _Source]:
    found: dict[str, _Source] = {}
    for name, (dtype, shape) in header.items():
        base, _, part = name.rpartition(".")
        weight_dtype, _ = header.get(f"{base}.weight", ("", ()))
        if part == "scaled_fp8" or (weight_dtype in FP8 and part in (*NOTES, *SCALES)):
            continue  # notes; scales are taken along with their weights
        if dtype not in FP8:
            found[name] = _Source(dtype, shape, name)
            continue
        scale = (
            next((s for s in (f"{base}.{word}" for word in SCALES) if s in header), None) if part == "weight" else None
        )
        scale_shape: tuple[int, ...] = ()
        if scale is not None:
            scale_dtype, scale_shape = header[scale]
            fits = prod(scale_shape) == 1 or (len(shape) == 2 and scale_shape in (shape[:1], (shape[0], 1)))
            if scale_dtype not in ("F32", "F16", "BF16") or not fits:
                raise ValueError(
                    f"{path}: {shortened(scale)} is {scale_dtype} {scale_shape}; fp8 is read with one scale for a "
                    "weight or one for each of its rows: take the same model in bf16, fp8 or GGUF"
                )
        is_layer = is_quantizable(base.removeprefix(COMFY_PREFIX)) or base.endswith("_proj")  # the DiT's, Qwen's
        if keep_fp8 and dtype == "F8_E4M3" and is_layer and part == "weight" and len(shape) == 2:
            found[f"{base}.weight_fp8"] = _Source(dtype, shape, name)
            one_a_row = prod(scale_shape) > 1
            found[f"{base}.weight_scale"] = _Source("F32", (shape[0], 1) if one_a_row else (), scale)
        else:  # 8 bits fit into bfloat16 exactly, products don't
            found[name] = _Source("F32" if scale else "BF16", shape, name, scale)
    return found


class _Fp8Tensors:
    def __init__(self, tensors: Any, sources: dict[str, _Source]) -> None:
        self._tensors, self._sources = tensors, sources

    def keys(self) -> list[str]:
        return list(self._sources)

    def get_tensor(self, name: str) -> Tensor:
        import torch

        source = self._sources[name]
        if source.tensor is None:
            return torch.ones(source.shape)
        tensor: Tensor = self._tensors.get_tensor(source.tensor)
        if source.dtype in FP8 or tensor.dtype.itemsize > 1:
            return tensor.reshape(source.shape).float() if name.endswith(".weight_scale") else tensor
        if source.scale is None:
            return tensor.bfloat16()
        scale = self._tensors.get_tensor(source.scale).float()
        return tensor.float() * (scale if scale.numel() == 1 else scale.reshape(-1, 1))
