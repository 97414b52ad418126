"""What results depend on to the last bit: the precision inside and where operands begin; and whether it all worked."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """x in float32, or as it is where it already is float64."""
    return x if x.dtype == torch.float64 else x.float()


def has_complex(device: torch.device) -> bool:
    """Whether complex numbers are sure to be there. MPS and XPU lack operations on them, and all of float64 or some."""
    return device.type in ("cpu", "cuda")


ALIGNMENT = 64  # bytes; all memory that PyTorch allocates begins at a multiple of it


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it where it is float32 and does not begin where PyTorch would have had it begin.

    Tensors out of safetensors files begin wherever the header ends. MKL's float32 products of such operands have other
    last bits, and a file would give other results than the same numbers from another file, or cast, or copied.
    Products of smaller dtypes are oneDNN's or PyTorch's own and the same wherever operands begin, so those stay mapped.
    """
    return x.clone() if x.dtype == torch.float32 and x.data_ptr() % ALIGNMENT else x


def is_finite(x: Tensor) -> bool:
    """Whether x has no NaN and no infinity in it."""
    return x.numel() == 0 or bool(torch.stack(torch.aminmax(x)).isfinite().all())  # no mask as large as x


def require_finite(
    model: str, output: Tensor, weights: Callable[[], Iterable[tuple[str, Tensor]]], otherwise: str = ""
) -> None:
    """Raise ValueError where an output is not finite, naming the weights that are not; where all are, with `otherwise`.

    Looking at the first output costs nothing; looking at all weights, which may be 77 GB in a memory-mapped file, is
    only done when it has gone wrong.
    """
    if is_finite(output):
        return
    bad = [name for name, weight in weights() if weight.is_floating_point() and not is_finite(weight.float())]
    if bad:
        raise ValueError(
            f"{model} has NaN or infinite values in {len(bad)} of its tensors, like {bad[0]}: the file is damaged, "
            "download it again (python download_models.py --verify looks for such files)"
        )
    otherwise = otherwise or "numbers above 65504 don't fit into float16, so use dtype bfloat16 or float32"
    raise ValueError(f"{model} computes NaN or infinite values, though its weights have none: {otherwise}")
