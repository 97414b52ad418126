"""Weight-only quantisation: linear layers that keep their weights in 8 or 4 bits and multiply in the compute dtype.

    int8  integers from -127 to 127, a scale for every 128 inputs of a row
    fp8   float8_e4m3fn, a scale for every row
    q8_0 … q4_0  GGUF's blocks, as they are in its files (see gguf_blocks.py); nothing is made into these here
    nf4   sixteen levels, quantiles of a normal distribution (QLoRA, arXiv 2305.14314), a scale for every 64 inputs of a
          row; its kernels are bitsandbytes', an optional package

A quantised layer is a plain module with two plain tensors, named and shaped as `checkpoints.quantized_parts` has it.
So its state dict is the file, and whatever moves, copies or compiles modules needs to know nothing of it. Activations
are not quantised: every call dequantises the weight, which is soon paid for where there are many tokens.

Tensors are quantised one by one as they are read (`quantize_linears`). This module does not know which device there is,
and opens no file but the one that `save_checkpoint` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky.checkpoints.dit_layout import (
    INT8_GROUP,
    NF4_GROUP,
    is_quantizable,
    quantization_from_header,
    quantized_layers,
    quantized_parts,
)
from kandinsky.checkpoints.gguf_file import BLOCKS
from kandinsky.checkpoints.headers import Header
from kandinsky.common.writing import save_tensors
from kandinsky.models.numerics import is_finite
from kandinsky.runtime.gguf_blocks import dequantize_blocks, scales_of_blocks
from kandinsky.runtime.weight_changes import Change, change_weight

DTYPES = {"I8": torch.int8, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
ROWS = 256  # that are quantised at a time: what float32 takes beside the result is small, whatever the layer's size

# A tensor as it was read, with its name in the model -> the tensors that the model takes in its place, by name.
# Empty where the tensor is none of the quantised layers' business.
Convert = Callable[[str, Tensor], dict[str, Tensor]]


class QuantizedLinear(nn.Module):
    """A linear layer (..., in) -> (..., out) with a quantised weight; computes in its input's dtype."""

    scheme: ClassVar[str]
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        for name, (dtype, shape) in quantized_parts(self.scheme, out_features, in_features).items():
            self.register_buffer(name, torch.zeros(shape, dtype=DTYPES[dtype]))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)
        # What adapters make of the weight (kandinsky.runtime.lora) whenever it is dequantised: to its few bits it could
        # not be added exactly. For thousands of tokens these are fewer operations than to multiply each of them with
        # an adapter's thin matrices.
        self.changes: tuple[Change, ...] = ()

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        """float32 (out, in) -> the quantised weight and its float32 scales, as the layer's buffers."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in). Scales are multiplied in float32, so that the result is rounded once."""
        raise NotImplementedError

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that is multiplied with, adapters included."""
        if not self.changes:
            return self.dequantize(dtype)
        return change_weight(self.dequantize(torch.float32), self.changes).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_in(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, scheme={self.scheme}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """What moves the module moves the quantised weight too; what casts it (`.bfloat16()`) leaves that as it is."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self


class Int8Linear(QuantizedLinear):
    scheme = "int8"
    weight_int8: Tensor  # (out, in)
    weight_scales: Tensor  # (out, groups of 128 inputs, the last one may be smaller)

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        groups = _in_groups(weight, INT8_GROUP)  # (out, groups, 128)
        scales = _nonzero(torch.linalg.vector_norm(groups, torch.inf, dim=-1) / 127)
        integers = (groups / scales[..., None]).round_().clamp_(-127, 127).to(torch.int8)
        return integers.flatten(1)[:, : weight.shape[1]].contiguous(), scales

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        weight, scales = self.weight_int8, self.weight_scales
        whole = self.in_features // INT8_GROUP  # groups; what is left is multiplied apart from them, because PyTorch
        end = whole * INT8_GROUP  # 2.13's compiler for CPUs goes wrong where scales are repeated and then cut off
        in_groups = (weight[:, :end].unflatten(1, (whole, INT8_GROUP)) * scales[:, :whole, None]).flatten(1)
        if end < self.in_features:
            in_groups = torch.cat((in_groups, weight[:, end:] * scales[:, whole:]), dim=1)
        return in_groups.to(dtype)


class FP8Linear(QuantizedLinear):
    scheme = "fp8"
    weight_fp8: Tensor  # (out, in)
    weight_scale: Tensor  # (out, 1)

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = _nonzero(torch.linalg.vector_norm(weight, torch.inf, dim=-1, keepdim=True) / FP8_MAX)
        # What rounds to more than the largest number would become NaN.
        return (weight / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return (self.weight_fp8.to(torch.float32) * self.weight_scale).to(dtype)


class NF4Linear(QuantizedLinear):
    scheme = "nf4"
    weight_nf4: Tensor  # (out, bytes of two values each), zeros added for whole groups
    weight_scales: Tensor  # (out, groups of 64 inputs)

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        groups = _in_groups(weight, NF4_GROUP)  # (out, groups, 64)
        packed, scales = torch.ops.bitsandbytes.quantize_4bit(groups, NF4_GROUP, "nf4", torch.uint8)
        return packed.view(len(weight), -1), scales.view(groups.shape[:2])

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        packed, scales = self.weight_nf4, self.weight_scales
        shape = (self.out_features, 2 * packed.shape[1])
        weight = torch.ops.bitsandbytes.dequantize_4bit(
            packed.view(-1, 1), scales.view(-1), NF4_GROUP, "nf4", shape, dtype
        )
        return weight[:, : self.in_features]


class BlockLinear(QuantizedLinear):
    """Of a GGUF file: its bytes."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return dequantize_blocks(getattr(self, f"weight_{self.scheme}"), self.scheme).to(dtype)

    @property
    def weight(self) -> Tensor:
        """The weight in float32, for layers that compute in it whatever their input: modulations."""
        weight = self.dequantize(torch.float32)
        return change_weight(weight, self.changes) if self.changes else weight


LINEARS: dict[str, type[QuantizedLinear]] = {cls.scheme: cls for cls in (Int8Linear, FP8Linear, NF4Linear)}
BLOCK_LINEARS: dict[str, type[QuantizedLinear]] = {
    scheme: type(f"{scheme.upper()}Linear", (BlockLinear,), {"scheme": scheme}) for scheme in BLOCKS
}


def _in_groups(weight: Tensor, size: int) -> Tensor:
    """(out, in) -> (out, groups, size), with zeros at the end of rows that do not divide into groups."""
    missing = -weight.shape[1] % size
    return (F.pad(weight, (0, missing)) if missing else weight).unflatten(1, (-1, size))


def _nonzero(scales: Tensor) -> Tensor:
    """Scales of rows and groups of zeros are 1: any will do, and none may be divided by zero."""
    return torch.where(scales > 0, scales, 1.0)


def require_scheme(scheme: str, device: torch.device | None = None) -> None:
    """Raise ValueError for a scheme that is not known, whose package is not installed, or that `device` hasn't."""
    if scheme not in LINEARS:
        raise ValueError(f"quantization is {scheme!r}; choose one of {', '.join(LINEARS)}")
    if device is not None and device.type not in ("cpu", "cuda") and scheme != "int8":
        raise ValueError(
            f"{scheme} quantization needs a CUDA device or the CPU, not {device}: choose "
            "int8 for the transformer, or none"
        )
    if scheme == "nf4":
        try:
            import bitsandbytes  # noqa: F401  (registers its kernels as torch.ops.bitsandbytes)
        except ImportError:
            raise ValueError(
                "nf4 quantization needs the package bitsandbytes: pip install bitsandbytes, or quantize to int8 or fp8"
            ) from None


def quantize_linears(
    model: nn.Module, layers: Iterable[str], scheme: str, keep_on: torch.device | None = None
) -> Convert:
    """Put quantised layers in the place of linear ones and return what turns read tensors into theirs.

    model: on the meta device: the new layers have no memory yet, and are to be given theirs by
        load_state_dict(assign=True).
    layers: names of nn.Linear modules.
    keep_on: where quantised weights shall be; None: where each tensor is that is quantised.

    Tensors that the returned function is handed may be a layer's `weight`, which it quantises on the device that it is
    on, or parts of an already quantised one. It raises ValueError for a weight that is not finite.
    """
    require_scheme(scheme)
    return replace_linears(model, dict.fromkeys(layers, scheme), keep_on)


def replace_linears(model: nn.Module, schemes: Mapping[str, str], keep_on: torch.device | None = None) -> Convert:
    """`quantize_linears` with a scheme for each layer, GGUF's included; the latter only for what comes in it."""
    parts_of: dict[str, Header] = {}
    for name, scheme in schemes.items():
        kind = (LINEARS | BLOCK_LINEARS)[scheme]
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), name
        with torch.device("meta"):
            quantized = kind(linear.in_features, linear.out_features, linear.bias is not None)
        model.set_submodule(name, quantized)
        parts_of[name] = quantized_parts(scheme, linear.out_features, linear.in_features)

    def empty(device: torch.device) -> dict[str, dict[str, Tensor]]:
        return {
            layer: {
                f"{layer}.{part}": torch.empty(shape, dtype=DTYPES[dtype], device=device)
                for part, (dtype, shape) in parts.items()
            }
            for layer, parts in parts_of.items()
            if schemes[layer] in LINEARS
        }

    results: dict[str, dict[str, Tensor]] = {}

    def convert(name: str, tensor: Tensor) -> dict[str, Tensor]:
        layer, _, part = name.rpartition(".")
        parts = parts_of.get(layer, {})
        blocks = part.removeprefix("weight_") if part not in parts else ""  # GGUF's, for a layer in a scheme of ours
        if parts and (part == "weight" or blocks in BLOCKS):
            if not results:  # all in a row, before anything that is freed again and would leave holes between them
                results.update(empty(keep_on or tensor.device))
            for start in range(0, len(tensor), ROWS):
                rows = tensor[start : start + ROWS]
                rows = dequantize_blocks(rows, blocks) if blocks in BLOCKS else rows.float()
                _check_finite(name, rows)
                quantized = LINEARS[schemes[layer]].quantize(rows)
                for result, of_rows in zip(results[layer].values(), quantized, strict=True):
                    result[start : start + ROWS] = of_rows
            return results[layer]
        if part not in parts:
            return {}
        if (scheme := schemes[layer]) in BLOCKS:
            _check_finite(name, scales_of_blocks(tensor, scheme).float())
        dtype, shape = parts[part]
        if dtype == "F32":
            _check_finite(name, tensor)
            if tensor.numel() == 1:  # one for the whole weight
                tensor = tensor.reshape(1, 1).expand(shape).contiguous()
        return {name: tensor.to(DTYPES[dtype])}

    return convert


def _check_finite(name: str, tensor: Tensor) -> None:
    if not is_finite(tensor):
        raise ValueError(f"{name} has NaN or infinite values in it: the file is damaged, download it again")


def quantize_dit(
    dit: nn.Module, header: Header, scheme: str | None, keep_on: torch.device | None = None
) -> Convert | None:
    """`quantize_linears` for a DiT and the checkpoint with this header: as that is quantised, else with `scheme`.

    Returns None where there is nothing to quantise. Raises ValueError where the checkpoint is quantised otherwise; a
    GGUF file's layers are made into numbers for it, and quantised anew.
    """
    found = quantization_from_header(header)
    quantizable = [name for name, _ in dit.named_modules() if is_quantizable(name)]
    if found == "gguf":
        if scheme is not None:
            require_scheme(scheme)
        schemes = quantized_layers(header) | (dict.fromkeys(quantizable, scheme) if scheme else {})
        return replace_linears(dit, schemes, keep_on)
    if found is not None:
        if scheme not in (None, found):
            raise ValueError(
                f"the checkpoint is quantised to {found} already, and cannot be to {scheme}: leave dit_quantization "
                "out, or use the checkpoint in full precision"
            )
        return quantize_linears(dit, quantized_layers(header), found)
    if scheme is None:
        return None
    return quantize_linears(dit, quantizable, scheme, keep_on)


def quantize_qwen(qwen: nn.Module) -> Convert:
    """`quantize_linears` to nf4 for all linear layers of Qwen, and of its vision tower where it has one."""
    return quantize_linears(qwen, [name for name, m in qwen.named_modules() if isinstance(m, nn.Linear)], "nf4")


def save_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Write a model's tensors as a safetensors file that appears whole or not at all, at the path only once written."""
    save_tensors(path, model.state_dict())
