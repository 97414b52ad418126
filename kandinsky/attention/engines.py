"""Attention engines: interchangeable implementations of one function, and the choice among them.

An engine is a callable `attention(q, k, v, mask=None) -> out`. The model calls whatever engine it was given and
knows nothing about kernels; this file knows nothing about the model. `resolve_engine` decides once, when a model is
loaded: what can't run says why, and what runs but computes something else than attention is refused.

Engines: PyTorch's scaled_dot_product_attention, the same held to cuDNN's kernel, FlashAttention 2 and 3
(github.com/Dao-AILab/flash-attention) and SageAttention (github.com/thu-ml/SageAttention).
"""

from __future__ import annotations

import importlib
import logging
import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)

HALF_PRECISION = (torch.bfloat16, torch.float16)
# Rounding to bfloat16 costs about 0.005 and SageAttention's int8 about 0.03; noise is off by 1 and more.
LARGEST_ERROR = 0.1


class Attention(Protocol):
    """Scaled dot-product attention with scale 1/sqrt(head_dim).

    q (B, heads, N, d), k and v (B, heads, M, d), mask None or bool broadcastable to (B, heads, N, M), True = attend.
    Returns (B, heads, N, d). Only `sdpa` takes masks; the others raise ValueError for one.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor: ...


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's scaled_dot_product_attention: runs on every device and takes every mask."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def sdpa_cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """scaled_dot_product_attention with cuDNN's kernel, which PyTorch prefers to its slower own only when told to."""
    refuse_mask("sdpa_cudnn", mask)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def flash_attention_2(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The flash-attn package."""
    from flash_attn import flash_attn_func

    refuse_mask("flash_attention_2", mask)
    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def flash_attention_3(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """FlashAttention's Hopper kernels; some versions return (out, logsumexp), others out alone."""
    from flash_attn_interface import flash_attn_func

    refuse_mask("flash_attention_3", mask)
    out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    out = out[0] if isinstance(out, tuple) else out
    return out.transpose(1, 2)


def sage(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """SageAttention: 8-bit products. An approximation, so it is never chosen by itself."""
    from sageattention import sageattn

    refuse_mask("sage", mask)
    return sageattn(q, k, v, tensor_layout="HND", is_causal=False)


def sage_emulated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """SageAttention's numbers on any device, slowly: for measuring what its products in int8 cost in precision.

    Keys lose their mean over all tokens, which no softmax sees. Queries and keys are rounded to int8, 128 and 64 tokens
    by one scale. Probabilities and values are float16. Paper: arXiv 2410.02367.
    """
    refuse_mask("sage_emulated", mask)
    k = k.float() - k.float().mean(dim=-2, keepdim=True)
    k8, k_scales = rounded_to_int8(k, SAGE_KEYS)
    values = v.half().float()
    parts = []
    for queries in q.float().split(SAGE_QUERIES, dim=-2):
        q8, q_scales = rounded_to_int8(queries / math.sqrt(q.shape[-1]), SAGE_QUERIES)
        scores = (q8 @ k8.mT) * (q_scales * k_scales.mT)  # products of whole numbers below 2^24: exact
        parts.append(scores.softmax(-1).half().float() @ values)
    return torch.cat(parts, dim=-2).to(q.dtype)


def rounded_to_int8(x: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """x (..., N, d) as whole numbers from -127 to 127, in float32, and the scale of each token (..., N, 1); so many
    tokens in a row have one scale."""
    largest = torch.cat(
        [part.abs().amax((-1, -2), keepdim=True).expand(*part.shape[:-1], 1) for part in x.split(tokens, dim=-2)],
        dim=-2,
    )
    scales = largest.clamp(min=torch.finfo(x.dtype).tiny) / 127
    return (x / scales).round(), scales


def refuse_mask(name: str, mask: Tensor | None) -> None:
    if mask is not None:
        raise ValueError(f"attention engine {name!r} takes no mask; masked attention is for sdpa")


ENGINES: dict[str, Attention] = {
    "sdpa": sdpa,
    "sdpa_cudnn": sdpa_cudnn,
    "flash_attention_2": flash_attention_2,
    "flash_attention_3": flash_attention_3,
    "sage": sage,
    "sage_emulated": sage_emulated,
}
APPROXIMATE = ("sage", "sage_emulated")  # the others compute attention as exactly as their dtype is
SAGE_QUERIES, SAGE_KEYS = 128, 64  # tokens that share a scale
# Fastest first where it runs. By published throughputs at head_dim 64 on Hopper, in TFLOP/s: FlashAttention 3 500,
# cuDNN 413, FlashAttention 2 324. benchmarks/attention.py measures them side by side.
AUTO_ORDER = ("flash_attention_3", "sdpa_cudnn", "flash_attention_2", "sdpa")


@dataclass(frozen=True)
class Needs:
    """What an engine needs to run at all; all of them need an NVIDIA GPU and half precision."""

    module: str | None  # what has to be importable
    install: str  # how to come by it
    lowest: tuple[int, int]  # compute capability
    highest: tuple[int, int] | None
    largest_head_dim: int


NEEDS: dict[str, Needs] = {
    "sdpa_cudnn": Needs(None, "", (9, 0), None, 128),
    "flash_attention_2": Needs("flash_attn", "pip install flash-attn", (8, 0), None, 256),
    "flash_attention_3": Needs(
        "flash_attn_interface", "build hopper/ of github.com/Dao-AILab/flash-attention", (9, 0), (9, 0), 256
    ),
    "sage": Needs("sageattention", "pip install sageattention", (8, 0), None, 128),
}


def resolve_engine(
    name: str, device: torch.device, dtype: torch.dtype | None = None, head_dim: int | None = None
) -> Attention:
    """The engine called `name`; "auto" takes the first of AUTO_ORDER that can run. Called once, when a model is loaded.

    `dtype` and `head_dim` are the model's; None means what models usually have on that device. An engine other than
    sdpa is tried on a small input first. Raises ValueError for an unknown name, and for an engine that can't run or
    computes something else, with the reason and what would work.
    """
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    head_dim = head_dim or 64
    if name == "auto":
        passed_over: list[str] = []
        for candidate in ("sdpa",) if compute_capability(device) is None else AUTO_ORDER:
            reason = obstacle(candidate, device, dtype, head_dim) or disagreement(candidate, device, dtype, head_dim)
            if reason is None:
                because = f"; passed over {', '.join(passed_over)}" if passed_over else ""
                logger.log(log_level(device), "attention engine: %s, chosen for %s%s", candidate, device, because)
                return ENGINES[candidate]
            passed_over.append(f"{candidate} ({reason})")
    if name == "flex":
        raise ValueError(
            "attention engine 'flex' is for models with attention.type nabla, and this one attends to everything: "
            f"choose one of auto, {', '.join(ENGINES)}"
        )
    if name not in ENGINES:
        raise ValueError(f"attention engine {name!r} does not exist: choose one of auto, {', '.join(ENGINES)}")
    reason = obstacle(name, device, dtype, head_dim) or disagreement(name, device, dtype, head_dim)
    if reason is not None:
        others = (other for other in ENGINES if other not in (name, "sage_emulated"))  # which is only for measuring
        usable = [other for other in others if obstacle(other, device, dtype, head_dim) is None]
        raise ValueError(
            f"attention engine {name!r} cannot be used here: {reason}; choose one of auto, {', '.join(usable)}"
        )
    logger.log(log_level(device), "attention engine: %s, as asked for", name)
    return ENGINES[name]


def log_level(device: torch.device) -> int:
    """Without an NVIDIA GPU there is nothing to choose from, and so nothing to tell."""
    return logging.DEBUG if compute_capability(device) is None else logging.INFO


def obstacle(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the engine can't run on this device with this dtype and head_dim; None where nothing is known against it."""
    if name not in NEEDS:
        return None
    needs, capability = NEEDS[name], compute_capability(device)
    if capability is None:
        return f"it needs an NVIDIA GPU, the device is {device}"
    here = ".".join(map(str, capability))
    if capability < needs.lowest:
        return f"it needs compute capability {'.'.join(map(str, needs.lowest))} or higher, {device} has {here}"
    if needs.highest is not None and capability > needs.highest:
        return f"it is made for compute capability {'.'.join(map(str, needs.highest))}, {device} has {here}"
    if dtype not in HALF_PRECISION:
        return f"it computes in bfloat16 or float16, the model is in {str(dtype).removeprefix('torch.')}"
    if head_dim > needs.largest_head_dim or head_dim % 8:
        return f"it takes head_dim in multiples of 8 up to {needs.largest_head_dim}, the model has {head_dim}"
    if needs.module is not None:
        try:
            importlib.import_module(needs.module)
        except ModuleNotFoundError:
            return f"it is not installed ({needs.install})"
        except Exception as error:  # built for another torch or CUDA: anything may be raised
            return f"{needs.module} is installed but can't be imported ({first_line(error)})"
    return None


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """(major, minor) of an NVIDIA GPU, None for anything else."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability(device)


@torch.no_grad()
def disagreement(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What is wrong with the engine's result on a small input, compared with SDPA in float32; None where nothing is.

    That an engine can be imported does not mean that it works: SageAttention 2.2.0 returned noise on Hopper.
    """
    if name == "sdpa":
        return None
    generator = torch.Generator().manual_seed(0)
    # A number of tokens that no kernel's tile divides; queries that look at a few keys, as trained ones do.
    q, k, v = (torch.randn(1, 3, 333, head_dim, generator=generator).to(device, dtype) for _ in range(3))
    q = 2 * q
    try:
        out = ENGINES[name](q, k, v)
    except Exception as error:  # whatever a foreign kernel may raise
        return f"it fails on a small input ({first_line(error)})"
    return deviation(out, sdpa(q.float(), k.float(), v.float()))


def deviation(out: Tensor, reference: Tensor) -> str | None:
    """How `out` is wrong, in words, if its root mean square error is more than a tenth of the reference's size."""
    if out.shape != reference.shape:
        return f"its result has the shape {tuple(out.shape)} instead of {tuple(reference.shape)}"
    error = ((out.float() - reference).square().mean() / reference.square().mean()).sqrt().item()
    if not error <= LARGEST_ERROR:  # NaN as well
        return f"it computes something else than attention (relative error {error:.2g} on a small input)"
    return None


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
