"""What the calls of all four tasks take besides what is a task's own: declared once, here.

A task writes `def __call__(self, text, width, ..., **options: Unpack[CallOptions])` under `@task_call`. Editors and
type checkers read the options from the TypedDict; `help()`, `inspect.signature` and calls by position see them all in
a row.
Knows signatures; knows nothing of what they do.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from kandinsky.pipelines.parts import StepCallback
from kandinsky.text.embeddings import TextEmbeddings


class CallOptions(TypedDict, total=False):
    """What every task's call takes; what is left out, or None, is as the YAML says.

    seed: the same seed gives the same output on every device; None draws one. Further outputs get the numbers that
        follow; a list gives every output its own.
    num_steps: Euler steps.
    guidance_weight: classifier-free guidance; 1 switches it off and halves the time.
    scheduler_scale: shift of the schedule towards noise.
    negative_caption: what not to show; used by guidance. One for all prompts or one each.
    expand_prompts: have Qwen write a short prompt out first; None: as the YAML says, else where it can.
    save_path: MP4 or PNG to write, with a JSON file of all settings beside it; further outputs get the same name with a
        number.
    progress: whether to show a progress bar; it is, unless this is False.
    guidance_interval: (begin, end), shares of the steps: guidance runs in step i of n where begin <= i / n < end, and
        the other steps take half the time.
    guidance_every: k: of the steps with guidance, the first and each k-th after it evaluate the negative prompt; those
        between reuse the difference that it made.
    schedule: whose noise levels, "original" or "diffusers": the two divide the way from noise to data differently.
    generator: random generators in place of seeds: one that all outputs draw from in turn, or one an output.
    latents: (outputs, latent frames, height / 8, width / 8, 16), in place of the noise; of a picture one latent frame.
    prompt_embeds, negative_prompt_embeds: from `encode_prompt`, in place of words.
    output_type: "uint8" (the default for videos), "pil" (for pictures), "np", "pt" or "latent".
    callback_on_step_end: `f(pipe, step, timestep, tensors)` after every step. `tensors` holds "latents", and lists of
        one `TextEmbeddings` an output as "prompt_embeds" and "negative_prompt_embeds"; what it returns under these
        names replaces them. Setting `pipe.interrupt = True` ends the run with what there is.
    max_sequence_length: tokens of a prompt that are read, up to 1024.

    Returned are, of `n` outputs: "uint8": (n, 3, frames, height, width) on the CPU. "pt": (n, frames, 3, height, width)
    and "np": (n, frames, height, width, 3), float32 in [0, 1]. "pil": a list of PIL frames each. Of pictures all of
    these without the axis of frames: "pil" is a list of pictures. "latent": (n, latent frames, rows, columns, 16), as
    the VAE's times its scaling factor.

    Raises ValueError for anything that can't be done, before any model runs.
    """

    seed: int | Sequence[int] | None
    num_steps: int | None
    guidance_weight: float | None
    scheduler_scale: float | None
    negative_caption: str | Sequence[str] | None
    expand_prompts: bool | None
    save_path: str | Path | None
    progress: bool  # the last that may be given by position
    guidance_interval: Sequence[float] | None
    guidance_every: int | None
    schedule: str | None
    generator: torch.Generator | Sequence[torch.Generator] | None
    latents: Tensor | None
    prompt_embeds: TextEmbeddings | None
    negative_prompt_embeds: TextEmbeddings | None
    output_type: str | None
    callback_on_step_end: StepCallback | None
    max_sequence_length: int | None


def task_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """A task's `__call__` with all of CallOptions in its signature and its help, in place of `**options`."""
    options = list(CallOptions.__annotations__)
    by_position = options[: options.index("progress") + 1]
    own = [parameter for parameter in inspect.signature(function).parameters.values() if parameter.name != "options"]
    shared = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD if name in by_position else inspect.Parameter.KEYWORD_ONLY,
            default=True if name == "progress" else None,
            annotation=CallOptions.__annotations__[name].__forward_arg__,
        )
        for name in options
    ]
    signature = inspect.Signature(sorted([*own, *shared], key=lambda parameter: parameter.kind))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(**signature.bind(*args, **kwargs).arguments)

    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__doc__ = f"{inspect.getdoc(function)}\n\n{inspect.getdoc(CallOptions)}"
    return call
