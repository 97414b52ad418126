"""Calls of a pipeline: one after the other, and with arguments that are what they should be.

What words and numbers may be is for request.py to say; here are tensors, paths and callbacks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar, cast

from torch import Tensor

from kandinsky.common.given import shown
from kandinsky.pipelines.culprits import require_finite_input
from kandinsky.text.embeddings import TextEmbeddings

Method = TypeVar("Method", bound=Callable[..., Any])


def one_at_a_time(method: Method) -> Method:
    """A method of a Pipeline that waits until no other thread is in one: models and adapters are everybody's.

    The same thread may call on, as a callback does that starts another run.
    """

    @wraps(method)
    def in_turn(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return method(self, *args, **kwargs)

    return cast("Method", in_turn)


def check_latents(latents: object, expected: tuple[int, ...]) -> None:
    """Raise ValueError for what is no floating-point tensor of that shape, and for NaN in it."""
    if not isinstance(latents, Tensor):
        raise ValueError(f"latents are a {type(latents).__name__}; they must be a tensor {expected}")
    if tuple(latents.shape) != expected:
        raise ValueError(
            f"latents are {tuple(latents.shape)}; they must be (samples, latent frames, rows, columns, channels) = "
            f"{expected}"
        )
    if not latents.is_floating_point():
        raise ValueError(
            f"latents are {str(latents.dtype).removeprefix('torch.')}; they must be floating-point numbers"
        )
    require_finite_input("latents", latents)


def check_save_path(save_path: object) -> None:
    """Raise ValueError for what is no path."""
    if save_path is not None and not isinstance(save_path, str | os.PathLike):
        raise ValueError(f"save_path is {shown(save_path)}; it must be a path, like 'video.mp4'")


def check_callback(callback: object) -> None:
    """Raise ValueError for what cannot be called."""
    if callback is not None and not callable(callback):
        raise ValueError(
            f"callback_on_step_end is {shown(callback)}; it must be a function (pipe, step, timestep, tensors)"
        )


def replacements(returned: object, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a callback wants replaced of `tensors`. Raises ValueError for what could not take its place."""
    name = "callback_on_step_end returned"
    if returned is None:
        return {}
    if not isinstance(returned, Mapping):
        raise ValueError(f"{name} {shown(returned)}; it must be a dict of what to replace, or None")
    if unknown := set(returned) - set(tensors):
        names = ", ".join(sorted(map(str, unknown)))
        raise ValueError(f"{name} {names}; it may replace {', '.join(tensors)}")
    for key, value in returned.items():
        if key == "latents":
            try:
                check_latents(value, tuple(tensors[key].shape))
            except ValueError as error:
                raise ValueError(f"{name} other latents: {error}") from None
        elif tensors[key] is not None and not (
            isinstance(value, list | tuple)
            and len(value) == len(tensors[key])
            and all(isinstance(one, TextEmbeddings) for one in value)
        ):
            raise ValueError(f"{name} {shown(value)} as {key}; it must be a list of {len(tensors[key])} TextEmbeddings")
    return returned
