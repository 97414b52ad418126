"""How much memory each model takes, as formulas: its weights, and what exists besides them while it runs.

Weights are counted from the headers of the files where those are there, else from the published shapes. Activations are
counted from the tensors that exist at once in the eager code of models/ at its peak; a compiled model needs less. On a
CPU that is within 15 % of the measured peak (tests/unit/test_memory_model.py). On a GPU it has not been measured: the
count is the same there, but kernels may want memory of their own, and PyTorch keeps some that nobody uses.

Bytes everywhere. Knows shapes and numbers; knows no tensors and no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from kandinsky.checkpoints import BITS, Header, expected_dit_shapes, find_weights, read_header, strip_prefix
from kandinsky.config import Config, DiTConfig

FLOAT32 = 4
# Parameters that no header has to be read for: Qwen2.5-VL-7B without its head, CLIP ViT-L/14's text model, the VAEs.
QWEN_PARAMETERS = 7_070_619_136
QWEN_EMBEDDING_PARAMETERS = 544_997_376  # of those: not a linear layer, so never quantised
QWEN_VISION_PARAMETERS = 676_550_144
CLIP_PARAMETERS = 123_060_480
VAE_PARAMETERS = {"hunyuan": 246_478_803, "flux": 83_819_683}
VAE_CHANNELS = (128, 256, 512, 512)  # of both
QWEN_INTERMEDIATE = 18944 / 3584  # width of Qwen's feed-forward over that of its hidden states

# Bytes of a weight in a quantised layer, its scales included: a float32 for 128, for a row, for 64.
QUANTIZED_SIZE = {"int8": 1 + 4 / 128, "fp8": 1.0, "nf4": 0.5 + 4 / 64}
# Bytes that exist for every weight of a layer while it is made into one that can be multiplied with, by scheme.
DEQUANTIZING_SIZE = {"int8": 6, "fp8": 8, "nf4": 2}
QUANTIZED_PARTS = ("self_attention", "cross_attention", "feed_forward")
KEPT_PRECISION = ("time_embeddings.", "modulation.")  # see loading.py

NABLA_BLOCK = 64  # tokens
NABLA_DENSITY = 0.2  # share of its blocks that NABLA is taken to keep; it depends on what is generated
SORTED_AT_ONCE = 2**24  # entries of NABLA's maps that are worked on at a time


@dataclass(frozen=True)
class Models:
    """What a request's models are made of. Bytes are those of the weights on the device that they run on."""

    qwen: int
    clip: int
    vae: int
    dit_block: int  # one visual block
    dit_blocks: int  # how many there are
    dit_rest: int  # all but the visual blocks
    vae_channels: tuple[int, ...]
    element_size: int  # bytes of a number in the dtype that is computed with

    @property
    def text(self) -> int:
        return self.qwen + self.clip

    @property
    def dit(self) -> int:
        return self.dit_rest + self.dit_blocks * self.dit_block


def models(config: Config, files: Mapping[str, Path], element_size: int) -> Models:
    """The models of a config in a dtype of `element_size` bytes, quantised as config.runtime says.

    files: where "dit", "vae", "qwen" and "clip" are. One that does not exist is taken to be the published one.
    Raises ValueError for a file that exists and is damaged.
    """
    scheme = config.runtime.dit_quantization
    blocks = rest = 0.0
    for name, (dtype, shape) in dit_header(config.model.dit_params, files.get("dit")).items():
        if dtype not in ("F32", "F16", "BF16") or name.endswith(("_scale", "_scales")):  # quantised in the file
            size = BITS.get(dtype, 32) / 8
        elif any(part in name for part in KEPT_PRECISION):
            size = BITS[dtype] / 8
        elif scheme is not None and _is_quantized(name):
            size = QUANTIZED_SIZE[scheme]
        else:
            size = element_size
        if name.startswith("visual_transformer_blocks."):
            blocks += prod(shape) * size
        else:
            rest += prod(shape) * size
    count = config.model.dit_params.num_visual_blocks
    clip = _parameters(files.get("clip"), CLIP_PARAMETERS, without=("vision", "visual", "text_projection", "logit"))
    return Models(
        qwen=_qwen_bytes(config, files.get("qwen"), element_size),
        clip=clip * FLOAT32,
        vae=_parameters(files.get("vae"), VAE_PARAMETERS[config.model.vae.name]) * element_size,
        dit_block=int(blocks / count),
        dit_blocks=count,
        dit_rest=int(rest),
        vae_channels=_vae_channels(files.get("vae")),
        element_size=element_size,
    )


def dit_header(dit: DiTConfig, path: Path | None) -> Header:
    """The header of the DiT's file, or as it would be in bfloat16 where there is none."""
    if path is None or not path.exists():
        return {name: ("BF16", shape) for name, shape in expected_dit_shapes(dit).items()}
    return strip_prefix(_header(path))


def _vae_channels(path: Path | None) -> tuple[int, ...]:
    """`block_out_channels` of a VAE's config.json, or the published ones where there is none."""
    file = None if path is None else path / "config.json"
    if file is None or not file.is_file():
        return VAE_CHANNELS
    try:
        return tuple(json.loads(file.read_text(encoding="utf-8")).get("block_out_channels", VAE_CHANNELS))
    except (ValueError, AttributeError, TypeError):
        raise ValueError(f"{file}: not readable as a VAE's config; download it again") from None


def _header(path: Path) -> Header:
    return {name: entry for file in find_weights(path) for name, entry in read_header(file).items()}


def _parameters(path: Path | None, published: int, without: tuple[str, ...] = ()) -> int:
    if path is None or not path.exists():
        return published
    return sum(prod(shape) for name, (_, shape) in _header(path).items() if not name.startswith(without))


def _is_quantized(name: str) -> bool:
    """Whether this is the weight of a linear layer of the DiT that can be kept in fewer bits."""
    return name.endswith(".weight") and any(f".{part}." in name for part in QUANTIZED_PARTS) and "_norm" not in name


def _qwen_bytes(config: Config, path: Path | None, element_size: int) -> int:
    vision = config.task == "i2i"
    if path is None or not path.exists():
        parameters = QWEN_PARAMETERS + vision * QWEN_VISION_PARAMETERS
        plain = QWEN_EMBEDDING_PARAMETERS
    else:
        shapes = {name: shape for name, (_, shape) in _header(path).items() if "lm_head" not in name}
        shapes = {name: shape for name, shape in shapes.items() if vision or "visual." not in name}
        parameters = sum(map(prod, shapes.values()))
        plain = sum(prod(shape) for name, shape in shapes.items() if len(shape) != 2 or "embed" in name)
    size = QUANTIZED_SIZE["nf4"] if config.runtime.qwen_quantization else element_size
    return int(plain * element_size + (parameters - plain) * size)


# --- what exists besides the weights ----------------------------------------------------------------------------------


def dit_activations(
    dit: DiTConfig,
    tokens: int,
    text_tokens: int,
    element_size: int,
    *,
    nabla: bool = False,
    flex: bool = False,
    chunk_tokens: int | None = None,
) -> int:
    """Peak of one forward of the DiT for one sample, its rotary tables included.

    nabla: attention is block-sparse, by flex_attention's kernel (`flex`, what a GPU gets) or in plain PyTorch.
    chunk_tokens: what `runtime.chunk_tokens` says; queries, keys and values are then taken to be written into their
        places chunk by chunk, and the feed-forward's result likewise.
    """
    hidden = tokens * dit.model_dim * element_size  # one tensor of the size of all tokens
    wide = tokens * dit.model_dim * FLOAT32
    cast = 0 if element_size == FLOAT32 else 1  # whether float32 is a copy
    rows = min(tokens, chunk_tokens or tokens)
    share = rows / tokens
    rope = tokens * dit.head_dim * FLOAT32  # cosines and sines, and once more as complex numbers where they are used

    # The patch embedding, the block's input, its hidden states so far, the last normalised ones; layer norm in float32.
    norm = 4 * hidden + (1 + cast) * wide
    # The same without hidden states of its own, then q, k, v and the rotated q; and k in float32, normalised, rotated.
    turned = max(2 * wide + rope, cast * (2 * wide + hidden)) + cast * wide
    qkv = (7 if rows == tokens else 6) * hidden + share * turned
    # Block map and kernel; then the result and its projection.
    attention = 6 * hidden + max(2 * hidden, _nabla_bytes(dit, tokens, hidden, flex) if nabla else 0)
    # The four of `norm`, and both halves of the feed-forward's wide middle; of chunks also the result.
    feed_forward = 4 * hidden + rows * dit.ff_dim * element_size * 2 + (hidden if rows < tokens else 0)

    text = 2 * text_tokens * dit.model_dim * element_size
    return int(max(norm, qkv, attention, feed_forward)) + rope + text


def _nabla_bytes(dit: DiTConfig, tokens: int, hidden: int, flex: bool) -> int:
    """The map of blocks and what the kernel makes of it, besides q, k and v."""
    row = tokens // NABLA_BLOCK
    entries = dit.num_heads * row**2
    worked_on = min(entries, max(SORTED_AT_ONCE, row**2))
    if flex:
        # The map (a byte), lists of full and of partly masked blocks (int32 both), and running counts in int64.
        return entries * 9 + worked_on * 24
    # The map, and the kept blocks as int64 indices in five lists; q, k and v block by block, and the result; and keys
    # and values of one row of blocks.
    kept = int(entries * (1 + 5 * 8 * NABLA_DENSITY))
    return kept + 4 * hidden + 2 * hidden // dit.num_heads


def denoising_state(dit: DiTConfig, tokens: int, samples: int) -> int:
    """What the sampler holds: noise, latents, what conditions them, velocities of both branches; all float32."""
    cells = tokens * prod(dit.patch_size)
    conditioned = dit.visual_cond or dit.instruct_type == "channel"
    extra = dit.in_visual_dim + 1 if conditioned else 0
    channels = 2 * dit.in_visual_dim + extra + (dit.in_visual_dim + extra) + 3 * dit.out_visual_dim
    return samples * cells * channels * FLOAT32


def magcache_bytes(dit: DiTConfig, tokens: int, samples: int, branches: int, element_size: int) -> int:
    """The residuals that MagCache keeps: one for every sample and branch of guidance."""
    return samples * branches * tokens * dit.model_dim * element_size


def text_activations(width: int, tokens: int, prompts: int, element_size: int) -> int:
    """Qwen's peak: its feed-forward's gate, that activated, the other half and their product; six hidden states."""
    return int(prompts * tokens * width * (4 * QWEN_INTERMEDIATE + 6) * element_size)


def encode_bytes(channels: tuple[int, ...], width: int, height: int, element_size: int) -> int:
    """The VAE's peak in encoding a picture, at most.

    In its first block: input, hidden, two padded copies, result; or input, hidden, and float32 twice while normalising.
    """
    return channels[0] * width * height * max(5 * element_size, 2 * element_size + 2 * FLOAT32)
