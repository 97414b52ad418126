"""Who is to blame for NaN: what came from outside is looked at where it comes in, and the latents when they are done.

A NaN spreads over everything that it meets, and shows far from where it arose. Who is then told that the VAE's file is
damaged, because decoding is where it was seen, downloads for nothing; and latents that can never be decoded are not
worth keeping.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from kandinsky.models.numerics import is_finite


def require_finite_input(name: str, *tensors: Tensor) -> None:
    """Raise ValueError for NaN or infinite values in what a caller gave under this name."""
    if not all(map(is_finite, tensors)):
        raise ValueError(f"{name} have NaN or infinite values in them: give others")


def blame(adapters: Iterable[Mapping[str, Any]]) -> str:
    """What may be the matter where weights and inputs are sound; empty where no adapter is active."""
    names = ", ".join(f"{one['name']} (scale {one['scale']:g})" for one in adapters)
    return f"the adapters {names} are in its weights, so take them out or lower their scale" if names else ""


def require_finite_latents(
    latents: Tensor, dtype: str, adapters: Iterable[Mapping[str, Any]], has_callback: bool
) -> None:
    """Raise ValueError where denoising ended in NaN although its first evaluation did not. Nothing of it is kept."""
    if is_finite(latents):
        return
    suspects = [blame(adapters)]
    if has_callback:
        suspects.append("callback_on_step_end may have changed them")
    if dtype == "float16":
        suspects.append("numbers above 65504 don't fit into float16, so use dtype bfloat16 or float32")
    reasons = "; ".join(filter(None, suspects)) or "try less guidance_weight and the checkpoint's own scheduler_scale"
    raise ValueError(
        f"the latents have NaN or infinite values after denoising, which began well, and can't be decoded: {reasons}"
    )
