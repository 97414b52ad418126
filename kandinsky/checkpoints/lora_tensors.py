"""Which layer of a DiT each tensor of an adapter's file belongs to, what it is there, and whether they fit.

Five kinds of adapters, by what they make of a layer's weight W (out, in); s is alpha / rank:

    LoRA   W + s * up @ down                                        up (out, rank), down (rank, in)
    LoHa   W + s * (w1_a @ w1_b) * (w2_a @ w2_b), by elements       a (out, rank), b (rank, in)    arXiv 2108.06098
    LoKr   W + s * kron(w1, w2)     w1 (l, m), w2 (k, n), l * k = out, m * n = in; each may be a product a @ b
    DoRA   any of these, then each row scaled to a trained length: the `magnitude`                 arXiv 2402.09353

A layer's name may be written in several ways:

    with its dots              base_model.model.LAYER, transformer.LAYER, diffusion_model.LAYER, unet.LAYER, LAYER
    without (Kohya, LyCORIS)   lora_unet_LAYER, lora_transformer_LAYER, lycoris_LAYER, each dot an underscore

and so may what follows it: .lora_A.weight, .lora_down.weight, .lora.down.weight, with the name in between that the
adapter had while it was trained (.lora_A.default.weight). This module does not know torch, and reads no matrix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kandinsky.checkpoints.dit_layout import FLOATS, expected_dit_shapes
from kandinsky.checkpoints.headers import Header
from kandinsky.common.given import shortened
from kandinsky.config.schema import DiTConfig

PREFIXES = (
    "base_model.model.", "transformer.", "model.diffusion_model.", "diffusion_model.", "unet.", "pipe.dit.", "dit.",
    "module.",
)  # fmt: skip
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
# What the end of a tensor's name says it is. `(\.[\w-]+)?`: an adapter's name.
_PARTS = {
    part: re.compile(rf"(?P<layer>.+?)(?:{pattern})")
    for part, pattern in {
        "down": r"\.(?:lora_A|lora_down)(?:\.[\w-]+)?\.weight|[._]lora(?:_linear_layer)?\.down\.weight",
        "up": r"\.(?:lora_B|lora_up)(?:\.[\w-]+)?\.weight|[._]lora(?:_linear_layer)?\.up\.weight",
        "alpha": r"\.alpha",
        "magnitude": r"\.dora_scale|\.lora_magnitude_vector(?:\.[\w-]+){0,2}",
        **{name: rf"\.hada_{name}(?:\.[\w-]+)?" for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
        **{f"k{name}": rf"\.lokr_{name}(?:\.[\w-]+)?" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
    }.items()
}
# The parts that make a layer complete, beside alpha and magnitude.
LORA, LOHA, LOKR = "LORA", "LOHA", "LOKR"
_KINDS = {
    frozenset(("up", "down")): LORA,
    frozenset(("w1_a", "w1_b", "w2_a", "w2_b")): LOHA,
    **{
        frozenset((*first, *second)): LOKR
        for first in (("kw1",), ("kw1_a", "kw1_b"))
        for second in (("kw2",), ("kw2_a", "kw2_b"))
    },
}
_NUMBERS = ("F64", "I64", "I32", "I16", "I8", "U8")  # that alpha may be beside floats


@dataclass(frozen=True)
class LoraLayer:
    """Names of a layer's tensors in the file, by part. The scale is alpha / rank, None where `alpha` names its tensor.

    rank: None for a LoKr of two whole matrices, which is not scaled unless a config says so.
    """

    kind: str
    rank: int | None
    scale: float | None
    parts: Mapping[str, str] = field(default_factory=dict)

    @property
    def up(self) -> str:
        return self.parts["up"]

    @property
    def down(self) -> str:
        return self.parts["down"]

    @property
    def alpha(self) -> str | None:
        return self.parts.get("alpha")


def lora_layers(header: Header, dit: DiTConfig) -> dict[str, LoraLayer]:
    """The adapted layers with the scales of a file that has no config. Raises ValueError unless all tensors fit."""
    shapes = {
        name.removesuffix(".weight"): shape
        for name, shape in expected_dit_shapes(dit).items()
        if name.endswith(".weight") and len(shape) == 2
    }
    found, unknown, twice = _by_layer(header, shapes)
    names = shapes.keys() | {name.replace(".", "_") for name in shapes}

    def fits(layer: str) -> bool:
        """Whether this model, or one with more blocks, has a layer of that name, dotted or flattened."""
        return layer in shapes or re.sub(r"(blocks[._])\d+", r"\g<1>0", layer) in names

    if not found:
        raise ValueError(f"this is not a LoRA file: none of its {len(header)} tensors is a layer's ({_some(unknown)})")
    if not any(fits(layer) for layer in found):
        raise ValueError(
            f"this LoRA is for another model, nothing of it is used: it is of the layers {_some([*found])}, and this "
            f"model has none of its {len(found)}"
        )

    foreign: list[str] = []
    pairs: list[str] = []
    incomplete: list[str] = []
    misshapen: list[str] = []
    mistyped: list[str] = []
    layers = {}
    for layer, parts in found.items():
        kind = _KINDS.get(frozenset(parts) - {"alpha", "magnitude"})
        if kind is None:
            (pairs if parts.keys() <= {"up", "down", "alpha", "magnitude"} else incomplete).extend(parts.values())
        if layer not in shapes:
            foreign += parts.values()
        if layer not in shapes or kind is None:
            continue
        misshapen += _misshapen(parts, {part: header[name][1] for part, name in parts.items()}, kind, shapes[layer])
        for part, name in parts.items():
            if header[name][0] not in ((*FLOATS, *_NUMBERS) if part == "alpha" else FLOATS):
                mistyped.append(name)
        rank = _rank(parts, header)
        layers[layer] = LoraLayer(kind, rank, None if "alpha" in parts and rank else 1.0, parts)

    problems = [
        f"{len(keys)} {what} ({_some(keys)})"
        for what, keys in (
            ("tensors of no known kind", unknown),
            ("of layers that this model does not have", foreign),
            ("without the other one of their pair", pairs),
            ("that are not the matrices of one kind of adapter", incomplete),
            ("of the same part of a layer as another", twice),
            ("of another shape", misshapen),
            (f"of another dtype than {', '.join(FLOATS)}", mistyped),
        )
        if keys
    ]
    if problems:
        strange = unknown or pairs or incomplete or twice or mistyped
        variant = not strange and all(fits(layer) for layer in found)
        question = " Is it made for another variant?" if variant else ""
        raise ValueError(
            f"this LoRA does not fit the model, nothing of it is used: of {len(header)} tensors "
            f"{'; '.join(problems)}.{question}"
        )
    return layers


def describe_lora(header: Header) -> str:
    """For people, which kinds of adapter a file has in it and of which ranks; whatever model it is for."""
    found = _by_layer(header, ())[0].values()
    named = {LORA: "LoRA", LOHA: "LoHa", LOKR: "LoKr"}
    kinds = {named[kind] for parts in found if (kind := _KINDS.get(frozenset(parts) - {"alpha", "magnitude"}))}
    kinds |= {"DoRA" for parts in found if "magnitude" in parts}
    ranks = sorted({rank for parts in found if (rank := _rank(parts, header)) is not None})
    words = [word for word in sorted(kinds) if kinds != {"LoRA"}]
    return ", ".join([*words, *([f"rank {', '.join(map(str, ranks))}"] if ranks else [])])


def _by_layer(header: Header, layers: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str], list[str]]:
    """Layer -> part -> tensor; the tensors that are no part of any; and those of a part that another one is already.

    A flattened name that is no layer of the model stays flattened.
    """
    flattened = {layer.replace(".", "_"): layer for layer in layers}
    found: dict[str, dict[str, str]] = {}
    unknown, twice = [], []
    for key in header:
        layer, part = parse_name(key)
        layer = flattened.get(layer, layer)
        if not layer:
            unknown.append(key)
        elif part in found.setdefault(layer, {}):
            twice.append(key)
        else:
            found[layer][part] = key
    return found, unknown, twice


def parse_name(key: str) -> tuple[str, str]:
    """A tensor's layer, as it is written but without prefixes, and which of its parts it is. Empty where it is none."""
    for part, pattern in _PARTS.items():
        if match := pattern.fullmatch(key):
            return _without_prefixes(match["layer"].removesuffix(".default")), part
    return "", ""


def _without_prefixes(layer: str) -> str:
    prefixes: tuple[str, ...] = (*PREFIXES, *FLAT_PREFIXES)
    while prefix := next((prefix for prefix in prefixes if layer.startswith(prefix)), None):
        flat = prefix in FLAT_PREFIXES
        layer = layer.removeprefix(prefix)
        if flat:  # what was before the flattened name may have been flattened with it
            prefixes = tuple(other.replace(".", "_") for other in PREFIXES)
    return layer


def _misshapen(
    parts: Mapping[str, str], shape: Mapping[str, tuple[int, ...]], kind: str, layer: tuple[int, ...]
) -> list[str]:
    """What is wrong with the shapes of a complete layer's tensors, one text a mistake."""
    outputs, inputs = layer

    def product(a: str, b: str) -> tuple[int, ...] | None:
        """The shape of a matrix product; None where there is none."""
        fits = len(shape[a]) == len(shape[b]) == 2 and shape[a][1] == shape[b][0] > 0
        return (shape[a][0], shape[b][1]) if fits else None

    def told(*names: str) -> str:
        return " and ".join(f"{parts[name]} {shape[name]}" for name in names) + f", the layer is {(outputs, inputs)}"

    wrong = []
    if kind == LORA and product("up", "down") != layer:
        wrong.append(told("down", "up"))
    if kind == LOHA:
        wrong += [told(a, b) for a, b in (("w1_a", "w1_b"), ("w2_a", "w2_b")) if product(a, b) != layer]
        if not wrong and shape["w1_b"][0] != shape["w2_b"][0]:
            wrong.append(told("w1_b", "w2_b"))
    if kind == LOKR:
        factors = [
            (shape[whole] if len(shape[whole]) == 2 else None)
            if whole in shape
            else product(f"{whole}_a", f"{whole}_b")
            for whole in ("kw1", "kw2")
        ]
        one, other = factors
        if one is None or other is None or (one[0] * other[0], one[1] * other[1]) != layer:
            wrong.append(told(*(part for part in parts if part.startswith("kw"))))
    if "alpha" in parts and math.prod(shape["alpha"]) != 1:
        wrong.append(f"{parts['alpha']} {shape['alpha']}, not one number")
    if "magnitude" in parts and shape["magnitude"] not in ((outputs,), (outputs, 1), (1, inputs)):
        wrong.append(told("magnitude"))
    return wrong


def _rank(parts: Mapping[str, str], header: Header) -> int | None:
    """What alpha is divided by: of a LoKr the second factor's rank, if that is a product, else the first one's."""
    for part in ("down", "w1_b", "kw2_b", "kw1_b"):
        if part in parts:
            shape = header[parts[part]][1]
            return shape[0] if shape else 0
    return None


def _some(names: list[str]) -> str:
    return ", ".join(shortened(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
