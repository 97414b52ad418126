"""A request in the middle of its denoising: all that the next step needs.

It is made when a request is encoded, changed by every step, and kept on disk (outputs/resume.py) where a run is stopped
between two steps. Text encoders and pictures have done their part in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kandinsky.request import Request

if TYPE_CHECKING:
    from torch import Tensor

    from kandinsky.sampling.conditioning import Conditioning
    from kandinsky.sampling.sampler import Branch, SamplerState
    from kandinsky.text.embeddings import TextEmbeddings

# What a cache may leave behind of each branch and sample: tensors like the tokens or like velocities, and numbers.
CACHE_TENSORS, CACHE_NUMBERS = 3, 16


@dataclass
class RunState:
    """A request in the middle of its denoising."""

    request: Request
    conditioning: Conditioning
    branches: dict[Branch, list[TextEmbeddings]]  # of each sample
    state: SamplerState
    residuals: dict[str, Tensor] = field(default_factory=dict)  # what a cache of blocks goes on with
    image_names: tuple[str, ...] = ()
    evaluations: int = 0  # of the model, so far
    skipped: list[int] = field(default_factory=list)  # of them, of each output, those that left blocks out
    spared_blocks: int = 0  # how many each of these left out
    attention_calls: dict[str, int] = field(default_factory=dict)  # "engine" and "exact", see Stopwatch
    seconds: dict[str, float] = field(default_factory=dict)
    adapters: list[dict[str, Any]] = field(default_factory=list)  # that were active: name, path, scale, trigger
