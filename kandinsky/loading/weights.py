"""Tensors out of files of weights, memory-mapped, one at a time: the reader that every model's weights come through.

Models are built on the meta device and take over what is read, cast on the way: no second copy of the weights exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kandinsky.checkpoints.dit_layout import COMFY_PREFIX, packed_weight, stays_packed
from kandinsky.checkpoints.files import find_weights
from kandinsky.checkpoints.formats import open_weights
from kandinsky.checkpoints.gguf_file import BLOCKS
from kandinsky.models.numerics import aligned
from kandinsky.runtime.gguf_blocks import dequantize_blocks
from kandinsky.runtime.quantization import ROWS, Convert
from kandinsky.runtime.staging import on_device


def load_weights(
    model: nn.Module,
    files: Sequence[Path],
    device: torch.device | str,
    dtype_of: Callable[[str, Tensor], torch.dtype],
    prefix: str = "",
    convert: Convert | None = None,
    convert_on: torch.device | str | None = None,
) -> None:
    """Give a model on the meta device the tensors of `files`, one at a time; ready for inference afterwards.

    dtype_of(name, tensor) says what a tensor is cast to; `prefix` is dropped from names that have it; `convert` makes
    tensors into quantised ones, and works on `convert_on`, or where they shall stay. Raises ValueError where names or
    shapes are not exactly the model's.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in on_device(read_tensors(files), convert_on or device):
        name = name.removeprefix(prefix)
        try:
            parts = convert(name, tensor) if convert else {}
        except ValueError as error:
            raise ValueError(f"{files[0]}: {error}") from None
        parts = parts or {name: aligned(tensor.to(dtype_of(name, tensor)))}
        state |= {own_name: part.to(device) for own_name, part in parts.items()}
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = [name for name in {*expected, *state} if name not in state or expected.get(name) != state[name].shape]
    if wrong:
        raise ValueError(
            f"{files[0]}: {len(wrong)} tensors are missing, unknown or of another shape, like {sorted(wrong)[0]}: "
            "this is another model's file, or its config is"
        )
    model.load_state_dict(state, strict=True, assign=True)
    model.eval().requires_grad_(False)


def host_weights(path: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of a file or folder by name, without `prefix`: memory-mapped, so nothing is read yet."""
    return {name.removeprefix(prefix): tensor for name, tensor in read_tensors(find_weights(path))}


def read_tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of files of weights, memory-mapped; those in GGUF's blocks that don't stay so, as float32.

    Raises ValueError for damaged files, naming them.
    """
    for file in files:
        with open_weights(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is not a mapping)
                layer, scheme = packed_weight(name) or ("", "")
                if scheme in BLOCKS and not stays_packed(layer.removeprefix(COMFY_PREFIX), scheme):
                    yield f"{layer}.weight", unpacked(tensors.get_tensor(name), scheme, torch.float32)
                else:
                    yield name, tensors.get_tensor(name)


def unpacked(packed: Tensor, scheme: str, dtype: torch.dtype) -> Tensor:
    """A weight in GGUF's blocks as numbers, some rows at a time: a table of words is large."""
    return torch.cat([dequantize_blocks(rows, scheme).to(dtype) for rows in packed.split(ROWS)])
