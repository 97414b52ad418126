"""What a tiny decoder's file holds, from its header: TAEHV's layout for videos, TAESD's for pictures.

Both are a list of layers (`decoder.0`, `decoder.1`, ...) of four widths, from the latents to the pixels. The published
files are `taehv.safetensors` (github.com/madebyollin/taehv, for HunyuanVideo's latents) and `taef1` (huggingface.co/
madebyollin/taef1, for Flux's; with diffusers' names for the same layers). Whether a file is for these latents and not
for another model's of as many channels, its header does not say. This module does not know torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from kandinsky.checkpoints.dit_layout import check_floats
from kandinsky.checkpoints.headers import Header

Kind = Literal["video", "image"]
KINDS: dict[str, Kind] = {"hunyuan": "video", "flux": "image"}  # by the name of the VAE that they stand for

BLOCKS = 3  # of a level
RGB = 3
TIMES = (1, 2, 2)  # frames that each level of a video's makes of one
LATENT_CHANNELS = 16
PUBLISHED: dict[Kind, tuple[int, ...]] = {"video": (256, 128, 64, 64), "image": (64, 64, 64, 64)}
# Where the widths stand: the first layer of each level, which makes that level's channels.
FIRST_LAYERS: dict[Kind, tuple[int, ...]] = {"video": (1, 8, 14, 20), "image": (1, 7, 12, 17)}
_OWN = re.compile(r"(?:decoder\.)?(?P<index>\d+)\.(?P<rest>.+)")
_DIFFUSERS = re.compile(r"decoder\.layers\.(?P<index>\d+)\.(?P<rest>.+)")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class TinyLayout:
    """What a file holds of a tiny decoder."""

    kind: Kind
    widths: tuple[int, ...]  # channels of its four levels
    names: dict[str, str]  # a tensor's name in the file -> in the decoder

    @property
    def parameters(self) -> int:
        return parameters(self.kind, self.widths)


def tiny_layout(header: Header, kind: Kind, path: object) -> TinyLayout:
    """The layout of a file. Raises ValueError, in one line, where it is no tiny decoder of that kind."""
    names = {name: own for name in header if (own := _own_name(name)) is not None}
    shapes = {own: header[name][1] for name, own in names.items()}
    firsts = [shapes.get(f"decoder.{layer}.weight", ()) for layer in FIRST_LAYERS[kind]]
    widths = tuple(shape[0] for shape in firsts if len(shape) == 4)
    of = {"video": "HunyuanVideo's latents, like taehv.safetensors", "image": "Flux's latents, like taef1"}[kind]
    if len(widths) < len(firsts):
        raise ValueError(f"{path}: not a tiny decoder of {of}: it has no layers of that kind")
    wanted = expected_tiny_shapes(kind, widths)
    wrong = sorted(name for name in {*wanted, *shapes} if wanted.get(name) != shapes.get(name))
    if wrong:
        found = "missing" if wrong[0] not in shapes else "x".join(map(str, shapes[wrong[0]]))
        raise ValueError(f"{path}: not a tiny decoder of {of}: its {wrong[0]} is {found}")
    check_floats(str(path), {name: header[name] for name in names})
    return TinyLayout(kind, widths, names)


def expected_tiny_shapes(kind: Kind, widths: tuple[int, ...] | None = None) -> Shapes:
    """name -> shape of every tensor of a decoder with these widths, or with the published ones."""
    widths = widths or PUBLISHED[kind]
    shapes: Shapes = {}

    def conv(name: str, inputs: int, outputs: int, size: int = 3, bias: bool = True) -> None:
        shapes[f"decoder.{name}.weight"] = (outputs, inputs, size, size)
        if bias:
            shapes[f"decoder.{name}.bias"] = (outputs,)

    def block(layer: int, width: int) -> None:
        conv(f"{layer}.conv.0", width * (2 if kind == "video" else 1), width)
        conv(f"{layer}.conv.2", width, width)
        conv(f"{layer}.conv.4", width, width)

    conv("1", LATENT_CHANNELS, widths[0])
    layer = 3
    for width, following, times in zip(widths, widths[1:], TIMES, strict=False):
        for _ in range(BLOCKS):
            block(layer, width)
            layer += 1
        layer += 1  # the upsampling
        if kind == "video":
            conv(f"{layer}.conv", width, width * times, size=1, bias=False)
            layer += 1
        conv(str(layer), width, following, bias=False)
        layer += 1
    if kind == "image":
        block(layer, widths[-1])
    conv(str(layer + 1), widths[-1], RGB)
    return shapes


def parameters(kind: Kind, widths: tuple[int, ...] | None = None) -> int:
    total = 0
    for shape in expected_tiny_shapes(kind, widths).values():
        count = 1
        for side in shape:
            count *= side
        total += count
    return total


def _own_name(name: str) -> str | None:
    """A decoder's tensor as it is called here; None for others, such as an encoder's, which many files have too."""
    if match := _DIFFUSERS.fullmatch(name):  # which does not count the clamp that is in front
        return f"decoder.{int(match['index']) + 1}.{match['rest']}"
    if match := _OWN.fullmatch(name):
        return f"decoder.{int(match['index'])}.{match['rest']}"
    return None
