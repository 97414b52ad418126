"""GGUF files of tests, written by the `gguf` package; K-quants, which it only reads, by the simplest quantiser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from kandinsky.checkpoints.gguf_file import BLOCKS

LLAMA_CPP = {  # published name -> llama.cpp's
    "embed_tokens": "token_embd", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "lm_head": "output",
}  # fmt: skip


def q4_k(weight: np.ndarray) -> np.ndarray:
    """float32 (rows, multiple of 256) -> uint8 (rows, bytes): each 32 between their least and largest."""
    groups = weight.reshape(len(weight), -1, 8, 32)
    minima = np.maximum(-groups.min(-1), 0)
    scales = (groups.max(-1) + minima) / 15
    d, dmin = (np.float16(values.max(-1, keepdims=True) / 63 + 1e-7) for values in (scales, minima))
    sc, m = (np.rint(v / np.float32(unit)).clip(0, 63).astype(np.uint8) for v, unit in ((scales, d), (minima, dmin)))
    step = np.maximum(np.float32(d) * sc, 1e-12)[..., None]
    values = np.rint((groups + (np.float32(dmin) * m)[..., None]) / step).clip(0, 15).astype(np.uint8)
    packed_scales = np.concatenate(
        [
            (sc[..., :4] & 63) | ((sc[..., 4:] >> 4) << 6),
            (m[..., :4] & 63) | ((m[..., 4:] >> 4) << 6),
            (sc[..., 4:] & 15) | ((m[..., 4:] & 15) << 4),
        ],
        axis=-1,
    )
    pairs = values.reshape(*values.shape[:2], 4, 2, 32)
    bytes_ = (pairs[..., 0, :] | (pairs[..., 1, :] << 4)).reshape(*values.shape[:2], 128)
    blocks = np.concatenate([d.view(np.uint8), dmin.view(np.uint8), packed_scales, bytes_], axis=-1)
    return blocks.reshape(len(weight), -1)


def random_blocks(scheme: str, rows: int, inputs: int, seed: int = 0) -> np.ndarray:
    """Any bytes, with scales that are numbers; uint8 (rows, bytes)."""
    from kandinsky.runtime.gguf_blocks import SCALES

    rng = np.random.default_rng(seed)
    weights, size = BLOCKS[scheme]
    packed = rng.integers(0, 256, (rows, inputs // weights, size), dtype=np.uint8)
    begin, end = SCALES[scheme]
    for at in range(begin, end, 2):
        scales = (1e-5 * rng.standard_normal((*packed.shape[:2], 1))).astype(np.float16)
        packed[..., at : at + 2] = scales.view(np.uint8)
    return packed.reshape(rows, -1)


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    scheme: str,
    arch: str = "kandinsky5",
    fallback: str = "",
    **metadata: Any,
) -> dict[str, Tensor]:
    """Weights of two axes in `scheme` where their rows divide into its blocks, else in `fallback` or F32.

    Returns what is in the file, as the package reads it.
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key.replace("__", "."), value)
    wanted, inside = scheme, {}
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        rows_fit = values.ndim == 2 and values.shape[1] % BLOCKS.get(wanted.lower(), (1, 0))[0] == 0
        scheme = wanted if rows_fit or not fallback else fallback
        kind = gguf.GGMLQuantizationType[scheme.upper()]
        if scheme.lower() in BLOCKS:
            fits = values.ndim == 2 and name.endswith(".weight") and values.shape[1] % BLOCKS[scheme.lower()][0] == 0
        else:
            fits = values.ndim == 2
        if not fits:
            writer.add_tensor(name, values)
            inside[name] = tensor.float()
            continue
        if scheme.lower() in ("q5_k", "q6_k"):
            packed = random_blocks(scheme.lower(), *values.shape)
        else:
            packed = q4_k(values) if scheme.lower() == "q4_k" else gguf.quants.quantize(values, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        inside[name] = torch.from_numpy(np.array(gguf.quants.dequantize(packed, kind))).reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return inside


def llama_cpp_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Qwen's tensors without vision, by llama.cpp's names."""
    named = {}
    for name, tensor in tensors.items():
        if "visual." in name:
            continue
        for start in ("model.language_model.", "language_model.", "model."):
            name = name.removeprefix(start)
        name = name.replace("layers.", "blk.")
        for ours, theirs in LLAMA_CPP.items():
            name = name.replace(ours, theirs)
        named["output_norm.weight" if name == "norm.weight" else name] = tensor
    return named
