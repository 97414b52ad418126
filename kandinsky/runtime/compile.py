"""Compiles the DiT's visual blocks, from this one place: one graph, made once, run with the weights of every block.

Or, where whole blocks are not compiled, what lies between their products (`with_compiled_elementwise`).

Only the visual blocks: they are nearly all of the work, and their norms, rotations, modulations and gates become a few
kernels. The text blocks see few tokens and would need a graph of their own. What wraps blocks knows nothing of it: a
cache and block swap go on calling blocks.

One graph serves a whole run. Prompts differ in length, so the number of text tokens is left open; a mask over them
makes a second graph. The first size that is asked for is built into the graph; from the second on the number of visual
tokens is left open too, by PyTorch, which compiles once more for it. Attention other than PyTorch's own is one opaque
operation in the graph: kernels of other packages, NABLA's, which depend on data, and flex_attention, which is compiled
by itself. So is what processes that share the tokens send each other.

What was compiled is kept on disk, where the next process finds it; looking at the block's code, a few seconds, is done
by every process. Knows nothing of configs' files, tasks or samplers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky.attention.engines import Attention, first_line, sdpa
from kandinsky.config.schema import ModelConfig
from kandinsky.models.dit import Execution
from kandinsky.models.layers import EAGER, Elementwise, VisualBlock
from kandinsky.models.rope import RotaryTable
from kandinsky.sampling.sampler import uses_guidance

logger = logging.getLogger(__name__)

# `auto` compiles from this many model evaluations on. An estimate that no GPU has confirmed: not compiled, a 5 s video
# of the 2B model moves about 0.5 TB more through memory in every evaluation, which takes an H100 some 0.15 s; a process
# that finds its kernels on disk still needs a few seconds to load them. 16 evaluations don't earn that, 50 do.
BREAK_EVEN_EVALUATIONS = 32
FP8_CAPABILITY = (8, 9)  # of GPUs that Triton has fp8 numbers for
# Graphs that a process may make of a block's code: sizes, masks, models, dtypes. PyTorch gives up after 8 unless told.
LARGEST_NUMBER_OF_GRAPHS = 64
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
# Where the exceptions of a failed compilation are at home.
COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch", "triton")


def model_evaluations(model: ModelConfig) -> int:
    """How many times a run with this config's own settings evaluates the model."""
    if not uses_guidance(model.guidance_weight):
        return model.num_steps
    begin, end = model.guidance_interval
    return model.num_steps + round(model.num_steps * (end - begin) / model.guidance_every)


class CompileError(ValueError):
    """The blocks could not be compiled; the message says what to do."""


def is_wanted(setting: str, device: torch.device, evaluations: int, quantization: str | None = None) -> bool:
    """Whether `runtime.compile` means that a run of this many evaluations on this device compiles anything.

    quantization: of the DiT's weights. Raises ValueError where it was asked for and the device has no compiler, or none
    for such weights.
    """
    if setting == "off" or (setting == "auto" and (device.type != "cuda" or evaluations < BREAK_EVEN_EVALUATIONS)):
        return False
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"runtime.compile is {setting}, but blocks are not compiled for {device}: run with --compile off"
        )
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        missing, capability = "", torch.cuda.get_device_capability(device)
        if not has_triton():
            missing = f"no Triton that compiles for {device} (pip install triton, or triton-windows on Windows)"
        elif quantization == "fp8" and setting != "elementwise" and capability < FP8_CAPABILITY:
            missing = f"no fp8 in Triton for {device}, of compute capability {capability[0]}.{capability[1]} (from 8.9)"
        if missing:
            if setting != "auto":
                raise ValueError(f"runtime.compile is {setting}, but there is {missing}: run with --compile off")
            logger.info("not compiled: %s", missing)
            return False
    return True


def with_compiled_blocks(
    execution: Execution,
    backend: str | Callable[..., Any] = "inductor",
    required: bool = True,
    mode: str = "default",
) -> Execution:
    """The same with visual blocks that run compiled; their weights stay where they are.

    Compilation itself happens when a block is first called, and so does its failure: where it is `required` a
    CompileError, otherwise a warning, and the blocks run as they are from then on.
    """
    schema = "(Tensor q, Tensor k, Tensor v) -> Tensor"
    engines: list[Callable[..., Tensor]] = [execution.attention, execution.exact]
    dense, exact = (engine if engine is sdpa else opaque(engine, schema) for engine in engines)
    kernel: Callable[..., Tensor] = execution.block_sparse
    block_sparse = opaque(kernel, "(Tensor q, Tensor k, Tensor v, Tensor block_map) -> Tensor")
    # The function of the class, with the block as an argument like the others: so all blocks share what is made of it.
    compiled = torch.compile(
        VisualBlock.forward, fullgraph=True, backend=backend, mode=None if mode == "default" else mode
    )
    run_block = Fallback(required).of(functools.partial(run_compiled, compiled), execution.run_block)
    logger.info("the DiT's blocks are compiled when they first run: that evaluation takes longer")
    return dataclasses.replace(execution, attention=dense, exact=exact, block_sparse=block_sparse, run_block=run_block)


def with_compiled_elementwise(execution: Execution, backend: str | Callable[..., Any] = "inductor") -> Execution:
    """The same with visual blocks of which only what lies between products and attention is compiled.

    For blocks that are not compiled whole: because their weights are elsewhere, because they run in parts, or because
    there are too few evaluations for it. These are small graphs, one or a few of each function, for any number of
    tokens. Where one cannot be compiled a warning says so, and all run as they are from then on.
    """
    fallback = Fallback(required=False)

    def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        graph = torch.compile(function, fullgraph=True, backend=backend)
        return fallback.of(functools.partial(call_compiled, graph), function)

    functions: tuple[Callable[..., Tensor], ...] = EAGER
    run_block = functools.partial(execution.run_block, elementwise=Elementwise(*map(compiled, functions)))
    return dataclasses.replace(execution, run_block=run_block)


class Fallback:
    """Compiled functions that go over to uncompiled ones, all at once and with one warning, where compiling fails.

    required: that failure is raised instead, a CompileError.
    """

    def __init__(self, required: bool) -> None:
        self.required, self.has_failed = required, False

    def of(self, compiled: Callable[..., Tensor], otherwise: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*inputs: Any) -> Tensor:
            if not self.has_failed:
                try:
                    return compiled(*inputs)
                except CompileError as error:
                    if self.required:
                        raise
                    logger.warning("%s. Going on so", error)
                    self.has_failed = True
            return otherwise(*inputs)

        return run


def keep_compiled_code() -> None:
    """Compiled code goes into the user's cache folder, where later processes find it, unless the user named another.

    PyTorch's own choice is a folder for temporary files, which may be empty after a restart.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # PyTorch knows only this variable, and sets it itself to that choice of its when it is loaded.
    if os.environ.get(CACHE_VARIABLE, default_cache_dir()) == default_cache_dir():
        caches = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(caches) if caches else Path.home() / ".cache") / "kandinsky5" / "compiled"
        os.environ[CACHE_VARIABLE] = str(folder)


def run_compiled(
    compiled: Callable[..., Tensor],
    block: VisualBlock,
    x: Tensor,
    text: Tensor,
    time_embed: Tensor,
    rope: RotaryTable,
    text_mask: Tensor | None,
    attention: Attention,
    chunk_tokens: int | None = None,
) -> Tensor:
    """`VisualBlock.forward`, compiled for any number of text tokens."""
    if text.shape[1] == 1:
        # A dimension of size 1 would be built into a graph of its own. Attention to a token that is there twice is
        # attention to that token.
        text = torch.cat((text, text), dim=1)
        text_mask = None if text_mask is None else torch.cat((text_mask, text_mask), dim=-1)
    if x._is_view():
        # The first block's tokens; a view, whose base a graph asks for, and no other block's are one. Nor have others
        # the strides that one has of several processes' tokens.
        x = x.clone(memory_format=torch.contiguous_format)
    torch._dynamo.mark_dynamic(text, 1)
    if text_mask is not None:
        torch._dynamo.mark_dynamic(text_mask, 3)
    return call_compiled(compiled, block, x, text, time_embed, rope, text_mask, attention, chunk_tokens)


def call_compiled(compiled: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """compiled(*inputs), whose failure to compile becomes a CompileError."""
    try:
        with _more_graphs():
            return compiled(*inputs)
    except Exception as error:
        if not type(error).__module__.startswith(COMPILERS):
            raise
        reason = getattr(error, "inner_exception", error)  # of a compiler behind Dynamo, which wraps what it raises
        raise CompileError(
            f"the DiT's blocks could not be compiled ({type(reason).__name__}: {first_line(reason)}): run with "
            "--compile off (runtime.compile=off), which computes the same, slower"
        ) from error


@functools.cache
def _more_graphs() -> AbstractContextManager[Any]:
    """Lets PyTorch make `LARGEST_NUMBER_OF_GRAPHS`. Made once: every one that is made leaves a class and a context
    variable behind, and a video has thousands of calls."""
    patch: AbstractContextManager[Any] = torch._dynamo.config.patch(recompile_limit=LARGEST_NUMBER_OF_GRAPHS)
    return patch


_numbers = itertools.count()


def operation(name: str, run: Callable[..., Tensor], fake: Callable[..., Tensor], schema: str) -> Callable[..., Tensor]:
    """`run` as one operation that a compiler neither looks into nor runs before the graph does.

    fake: makes a tensor like the result, whose numbers nobody reads.
    """
    # Numbered, because names are for good; in order, because compiled code on disk is found by them.
    made = torch.library.custom_op(f"kandinsky::{name}_{next(_numbers)}", run, mutates_args=(), schema=schema)
    made.register_fake(fake)
    return made


@functools.cache
def opaque(kernel: Callable[..., Tensor], schema: str) -> Callable[..., Tensor]:
    """`kernel` as one `operation`.

    Its result has the shape of its first argument q (B, heads, N, d), and the tokens before the heads in memory: most
    kernels leave it so, and what comes next reads it so.
    """

    def run(*tensors: Tensor) -> Tensor:
        return kernel(*tensors).transpose(1, 2).contiguous().transpose(1, 2)

    def fake(q: Tensor, *others: Tensor) -> Tensor:
        return torch.empty_like(q.transpose(1, 2).contiguous()).transpose(1, 2)

    made = operation(getattr(kernel, "__name__", "attention"), run, fake, schema)

    @functools.wraps(kernel)
    def call(*tensors: Tensor) -> Tensor:
        return made(*tensors)

    return call
