"""The published layout of a DiT's file: names, shapes, quantised layers, and from a header which variant it is.

A header (see headers.py) is compared with what a config means, before anything is loaded. This module does not know
torch and reads no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from kandinsky.checkpoints.gguf_file import BLOCKS
from kandinsky.checkpoints.headers import BITS as BITS
from kandinsky.checkpoints.headers import Header
from kandinsky.common.given import shortened
from kandinsky.config.schema import DiTConfig

FLOATS = ("F32", "F16", "BF16")

COMFY_PREFIX = "model.diffusion_model."
# These compute in float32 whatever the model's dtype, so they keep the precision that their file has.
KEEP_PRECISION = ("time_embeddings.", "modulation.")
# head_dim -> its split over time, height and width. A checkpoint says the sum only; these are the published splits.
AXES_DIMS = {64: (16, 24, 24), 128: (32, 48, 48)}

# Inputs of a linear layer that share a scale.
INT8_GROUP = 128
NF4_GROUP = 64
_TRANSFORMER_LINEAR = re.compile(
    r"(text|visual)_transformer_blocks\.\d+\."
    r"((self|cross)_attention\.(to_query|to_key|to_value|out_layer)|feed_forward\.(in_layer|out_layer))"
)
_MODULATION = "_modulation."
_QUANTIZED_WEIGHT = re.compile(r"(?P<layer>.+)\.weight_(?P<scheme>" + "|".join(["int8", "fp8", "nf4", *BLOCKS]) + ")")


# --- quantised layers -------------------------------------------------------------------------------------------------


def quantized_parts(scheme: str, outputs: int, inputs: int) -> Header:
    """What a quantised checkpoint has in the place of a linear layer's `weight` (outputs, inputs).

    int8 and fp8 are laid out as in the files that others have published, but for one thing: our fp8 has a scale for
    every row, theirs one for the whole weight, of shape () or (1,). nf4, two values to a byte, is our own layout; rows
    are filled up with zeros to whole groups.
    """
    if scheme in BLOCKS:
        weights, size = BLOCKS[scheme]
        return {f"weight_{scheme}": ("U8", (outputs, -(-inputs // weights) * size))}
    if scheme == "int8":
        groups = -(-inputs // INT8_GROUP)
        return {"weight_int8": ("I8", (outputs, inputs)), "weight_scales": ("F32", (outputs, groups))}
    if scheme == "fp8":
        return {"weight_fp8": ("F8_E4M3", (outputs, inputs)), "weight_scale": ("F32", (outputs, 1))}
    assert scheme == "nf4", scheme
    groups = -(-inputs // NF4_GROUP)
    return {"weight_nf4": ("U8", (outputs, groups * NF4_GROUP // 2)), "weight_scales": ("F32", (outputs, groups))}


def is_quantizable(layer: str) -> bool:
    """Whether a module of the DiT is one of those that are quantised: the linear layers of attention and feed-forward.

    Embeddings, norms, modulation and the output layer are few of the weights and much of the precision.
    """
    return _TRANSFORMER_LINEAR.fullmatch(layer) is not None


def packed_layers(header: Header) -> dict[str, str]:
    """Layer -> scheme (int8, fp8, nf4, or one of GGUF's) of all that a file of weights holds quantised."""
    found = (_QUANTIZED_WEIGHT.fullmatch(name) for name in strip_prefix(header))
    return {match["layer"]: match["scheme"] for match in found if match}


def quantized_layers(header: Header) -> dict[str, str]:
    """Of `packed_layers`, those of a DiT that stay quantised: `is_quantizable` ones, and in other people's files
    modulations, which are many of the weights."""
    return {layer: scheme for layer, scheme in packed_layers(header).items() if stays_packed(layer, scheme)}


def stays_packed(layer: str, scheme: str) -> bool:
    """Whether a layer of a DiT that a file has quantised stays so; others are made into numbers as they are read."""
    return is_quantizable(layer) or (scheme in BLOCKS and _MODULATION in layer)


def packed_weight(name: str) -> tuple[str, str] | None:
    """A tensor's layer and scheme where it is a quantised weight: "a.weight_q8_0" -> ("a", "q8_0")."""
    match = _QUANTIZED_WEIGHT.fullmatch(name)
    return (match["layer"], match["scheme"]) if match else None


def unpacked_shapes(header: Header) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a file's tensors, with quantised weights as `weight` (outputs, inputs)."""
    shapes = {}
    for name, (_, shape) in header.items():
        layer, scheme = packed_weight(name) or ("", "")
        if scheme in BLOCKS and len(shape) == 2:
            weights, size = BLOCKS[scheme]
            shape = (shape[0], shape[1] // size * weights)
        shapes[f"{layer}.weight" if layer else name] = shape
    return shapes


def quantization_from_header(header: Header) -> str | None:
    """The scheme that a DiT checkpoint is quantised with, None for none; "gguf" for GGUF's, which come mixed.

    Raises ValueError where there are several others.
    """
    schemes = sorted({"gguf" if scheme in BLOCKS else scheme for scheme in quantized_layers(header).values()})
    if len(schemes) > 1:
        raise ValueError(f"the checkpoint mixes layers in {' and '.join(schemes)}: use one that has a single scheme")
    return schemes[0] if schemes else None


# --- which DiT is it? -------------------------------------------------------------------------------------------------


def strip_prefix(header: Header) -> Header:
    """The header with the names that our modules have (ComfyUI files put model.diffusion_model. before each)."""
    return {name.removeprefix(COMFY_PREFIX): entry for name, entry in header.items()}


def dit_params_from_header(header: Header) -> dict[str, Any]:
    """What a DiT checkpoint says about its own shape, as a dict with fields of DiTConfig.

    In place of visual_cond and instruct_type, which look alike in the weights, there is `extra_channels`, true where
    the model takes a condition and a mask beside the latents. axes_dims is absent, and head_dim there, where the size
    of a head is none of the published ones. patch_size is known in its product only, and taken as (1, 2, 2).
    A quantised checkpoint says the same; `quantization_from_header` tells its scheme.
    Raises ValueError where the file is not a Kandinsky 5 DiT.
    """
    shapes = unpacked_shapes(strip_prefix(header))

    def size(name: str, axis: int = 0) -> int:
        try:
            return shapes[name][axis]
        except (KeyError, IndexError):
            raise ValueError(f"not a Kandinsky 5 DiT checkpoint: it has no fitting {name}") from None

    def count(name: str) -> int:
        found = (re.match(rf"{name}\.(\d+)\.", key) for key in shapes)
        return 1 + max((block_index(match[1], len(shapes)) for match in found if match), default=-1)

    patch = 4
    out_visual_dim = size("out_layer.out_layer.bias") // patch
    visual_in = size("visual_embeddings.in_layer.weight", 1) // patch  # C, or C + C + 1 with condition and mask
    extra_channels = visual_in == 2 * out_visual_dim + 1
    head_dim = size("visual_transformer_blocks.0.self_attention.query_norm.weight")
    params: dict[str, Any] = {
        "in_visual_dim": out_visual_dim if extra_channels else visual_in,
        "in_text_dim": size("text_embeddings.in_layer.weight", 1),
        "in_text_dim2": size("pooled_text_embeddings.in_layer.weight", 1),
        "time_dim": size("time_embeddings.in_layer.bias"),
        "out_visual_dim": out_visual_dim,
        "model_dim": size("visual_embeddings.in_layer.bias"),
        "ff_dim": size("visual_transformer_blocks.0.feed_forward.in_layer.weight"),
        "num_text_blocks": count("text_transformer_blocks"),
        "num_visual_blocks": count("visual_transformer_blocks"),
        "head_dim": head_dim,
        "extra_channels": extra_channels,
    }
    if head_dim in AXES_DIMS:
        params["axes_dims"] = AXES_DIMS[head_dim]
    return params


def block_index(digits: str, tensors: int) -> int:
    """A block's number in a tensor's name. Raises ValueError where there can't be as many blocks before it.

    What a file's names say decides how long lists are that are made from it, and names are cheap.
    """
    if int(digits) >= tensors:
        raise ValueError(f"it names a block {shortened(digits)}, and has {tensors} tensors in all: damaged, or a fake")
    return int(digits)


def expected_dit_shapes(dit: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter: 18 + 14 to a text block + 24 to a visual block."""
    dim, ff, time, head = dit.model_dim, dit.ff_dim, dit.time_dim, dit.head_dim
    patch = prod(dit.patch_size)
    extra = dit.in_visual_dim + 1 if dit.visual_cond or dit.instruct_type == "channel" else 0
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def attention(name: str) -> None:
        for layer in ("to_query", "to_key", "to_value", "out_layer"):
            linear(f"{name}.{layer}", dim, dim)
        shapes[f"{name}.query_norm.weight"] = shapes[f"{name}.key_norm.weight"] = (head,)

    def feed_forward(name: str) -> None:
        shapes[f"{name}.in_layer.weight"], shapes[f"{name}.out_layer.weight"] = (ff, dim), (dim, ff)

    linear("time_embeddings.in_layer", time, dim)
    linear("time_embeddings.out_layer", time, time)
    linear("text_embeddings.in_layer", dim, dit.in_text_dim)
    shapes["text_embeddings.norm.weight"] = shapes["text_embeddings.norm.bias"] = (dim,)
    linear("pooled_text_embeddings.in_layer", time, dit.in_text_dim2)
    shapes["pooled_text_embeddings.norm.weight"] = shapes["pooled_text_embeddings.norm.bias"] = (time,)
    linear("visual_embeddings.in_layer", dim, patch * (dit.in_visual_dim + extra))
    for i in range(dit.num_text_blocks):
        block = f"text_transformer_blocks.{i}"
        linear(f"{block}.text_modulation.out_layer", 6 * dim, time)
        attention(f"{block}.self_attention")
        feed_forward(f"{block}.feed_forward")
    for i in range(dit.num_visual_blocks):
        block = f"visual_transformer_blocks.{i}"
        linear(f"{block}.visual_modulation.out_layer", 9 * dim, time)
        attention(f"{block}.self_attention")
        attention(f"{block}.cross_attention")
        feed_forward(f"{block}.feed_forward")
    linear("out_layer.modulation.out_layer", 2 * dim, time)
    linear("out_layer.out_layer", patch * dit.out_visual_dim, dim)
    return shapes


# (model_dim, extra_channels) -> the name of the family and the config to use with it. Text to video and image to video
# look alike in the weights.
FAMILIES = {
    (1792, True): ("Lite", "configs/config_5s_sft.yaml"),
    (4096, True): ("Pro", "configs/config_5s_t2v_pro.yaml"),
    (2560, False): ("Text to Image Lite", "configs/config_t2i.yaml"),
    (2560, True): ("Image to Image Lite", "configs/config_i2i.yaml"),
}


def check_floats(path: str | Path, header: Header) -> None:
    """Raise ValueError where a tensor is not in a dtype that weights are in."""
    for name, (dtype, _) in header.items():
        if dtype not in FLOATS:
            raise ValueError(
                f"{path}: {shortened(name)} is in {dtype}; weights are in {', '.join(FLOATS)}: take another file"
            )


def check_dit_header(header: Header, dit: DiTConfig) -> None:
    """Raise one ValueError unless a checkpoint has exactly the parameters that a config asks for.

    Linear layers may be quantised, as `quantized_parts` has it, all of them or some.
    """
    header = strip_prefix(header)
    found = dit_params_from_header(header)
    scheme = quantization_from_header(header)
    wanted = {name: getattr(dit, name) for name in found if name not in ("extra_channels", "axes_dims")}
    wanted["extra_channels"] = dit.visual_cond or dit.instruct_type == "channel"
    different = [name for name, value in wanted.items() if value != found[name]]
    if different:
        details = ", ".join(f"{name} {found[name]} (config: {wanted[name]})" for name in different)
        raise ValueError(f"{_describe_variants(found, wanted, scheme)}. Different: {details}")

    shapes = expected_dit_shapes(dit)
    dtypes: dict[str, tuple[str, ...]] = dict.fromkeys(shapes, FLOATS)  # what is allowed
    packed = quantized_layers(header)
    packed |= {layer: scheme for layer, scheme in packed_layers(header).items() if scheme in BLOCKS}
    for layer in [layer for layer in packed if f"{layer}.weight" in shapes]:
        for part, (dtype, shape) in quantized_parts(packed[layer], *shapes.pop(f"{layer}.weight")).items():
            name = f"{layer}.{part}"
            one_scale = part == "weight_scale" and header.get(name, ("", shape))[1] in ((), (1,))
            shapes[name] = header[name][1] if one_scale else shape
            dtypes[name] = FLOATS if dtype == "F32" else (dtype,)
    problems = []
    for what, names in (
        ("missing", [name for name in shapes if name not in header]),
        ("unexpected", [name for name in header if name not in shapes]),
        ("of another shape", [name for name, shape in shapes.items() if name in header and header[name][1] != shape]),
        ("of another dtype", [name for name, ok in dtypes.items() if name in header and header[name][0] not in ok]),
    ):
        if names:
            some = ", ".join(map(shortened, names[:3])) + (", ..." if len(names) > 3 else "")
            problems.append(f"{len(names)} {what} ({some})")
    if problems:
        model = "model" if scheme is None else f"model, quantised to {scheme}"
        raise ValueError(
            f"the checkpoint does not have the {len(shapes)} parameters of this config's {model}: {'; '.join(problems)}"
        )


def _family(params: Mapping[str, Any]) -> tuple[str, str]:
    return FAMILIES.get((params["model_dim"], params["extra_channels"]), ("a model of its own", ""))


def _describe_dit(params: Mapping[str, Any], scheme: str | None = None) -> str:
    """ "Pro (60 visual blocks, dim 4096)" """
    quantised = f", quantised to {scheme}" if scheme else ""
    return f"{_family(params)[0]} ({params['num_visual_blocks']} visual blocks, dim {params['model_dim']}{quantised})"


def _describe_variants(found: Mapping[str, Any], wanted: Mapping[str, Any], scheme: str | None) -> str:
    """ "this file is Pro (60 visual blocks, dim 4096); the config says Lite (32 visual blocks, dim 1792): use ..." """
    config = _family(found)[1]
    if not config or _family(found) == _family(wanted):  # within a family it is some other number that is wrong
        advice = "the config of that checkpoint"
    else:
        advice = f"a config like {config}"
    return (
        f"this file is {_describe_dit(found, scheme)}; the config says {_describe_dit(wanted)}: use {advice}, or "
        "another checkpoint"
    )
