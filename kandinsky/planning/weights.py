"""How many bytes each model's weights take, where they are computed with and in their files.

Counted from the headers of the files where those are there, else from the published shapes. Knows no tensors, no torch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from kandinsky.checkpoints.dit_layout import (
    KEEP_PRECISION,
    check_dit_header,
    expected_dit_shapes,
    is_quantizable,
    packed_weight,
    quantization_from_header,
    quantized_layers,
    quantized_parts,
    strip_prefix,
    unpacked_shapes,
)
from kandinsky.checkpoints.encoder_config import QWEN, encoder_config
from kandinsky.checkpoints.files import find_weights, folder_of, has_tied_head
from kandinsky.checkpoints.formats import read_weights_header
from kandinsky.checkpoints.gguf_file import BLOCKS
from kandinsky.checkpoints.headers import BITS, Header, read_header
from kandinsky.checkpoints.tiny_decoder import KINDS, PUBLISHED, TinyLayout, tiny_layout
from kandinsky.common.untrusted import read_json
from kandinsky.config.schema import Config, DiTConfig
from kandinsky.planning.activations import FLOAT32
from kandinsky.planning.adapters import KEY, NO_ADAPTERS, Adapted, adapted

# Dtypes that a CPU computes with where they lie in a mapped file, for the size of the dtype that is computed in: of the
# two small ones a model's files have one, and float32 is copied (see models/numerics.py, `aligned`).
IN_PLACE: dict[int, tuple[str, ...]] = {2: ("F16", "BF16"), 4: ()}
# Parameters that no header has to be read for: Qwen2.5-VL-7B without its head, CLIP ViT-L/14's text model, the VAEs.
QWEN_PARAMETERS = 7_070_619_136
QWEN_EMBEDDING_PARAMETERS = 544_997_376  # of those: not a linear layer, so never quantised
QWEN_VISION_PARAMETERS = 676_550_144
QWEN_LAYER_PARAMETERS = 233_057_792  # of each of the 28 layers
QWEN_VISION_BLOCK_PARAMETERS = 19_702_000  # of each of the 32 blocks, about
QWEN_VISION_REST_PARAMETERS = 46_100_000  # patch embedding and merger, about
QWEN_INTERMEDIATE = 18944  # width of its feed-forward
QWEN_HEAD_PARAMETERS = 544_997_376  # what it writes with
CLIP_PARAMETERS = 123_060_480
VAE_PARAMETERS = {"hunyuan": 246_478_803, "flux": 83_819_683}
VAE_CHANNELS = (128, 256, 512, 512)  # of both
NF4_SIZE = 0.5 + 4 / 64  # bytes of a weight with its share of a scale


@dataclass(frozen=True)
class Weights:
    """One model's weights: bytes where they are computed with, and of the files that they come from."""

    size: int
    read: int  # bytes of the files that are read
    mapped: int  # of `size`, what a CPU computes with where it lies, in the memory-mapped file

    def __add__(self, other: Weights) -> Weights:
        return Weights(self.size + other.size, self.read + other.read, self.mapped + other.mapped)

    @property
    def left_mapped(self) -> int:
        """Bytes of the files that stay mapped without being needed; the system drops them when it likes."""
        return self.read - self.mapped if self.mapped else 0


@dataclass(frozen=True)
class Models:
    """What a request's models are made of."""

    qwen: Weights
    writer: Weights | None  # what Qwen needs besides to write prompts out; None: it can't, or is not to
    clip: Weights
    vae: Weights
    dit: Weights
    dit_block: int  # bytes of one visual block where it runs
    dit_blocks: int  # how many there are
    dit_quantization: str | None  # as it is in memory, whether it is so in the file or made so on the way
    vae_channels: tuple[int, ...]
    qwen_intermediate: int
    qwen_quantization: str | None  # likewise
    qwen_streamed: int  # bytes of it where its layers come one after the other, its table of embeddings staying mapped
    element_size: int  # bytes of a number in the dtype that is computed with
    float32_convolutions: bool = False  # of the VAE, on a CPU that has no arithmetic in that dtype
    tiny: TinyLayout | None = None  # of the tiny decoder, where there is one
    adapted: Adapted = NO_ADAPTERS  # what LoRA adapters take besides

    @property
    def tiny_size(self) -> int:
        """Bytes of the tiny decoder's weights."""
        return 0 if self.tiny is None else self.tiny.parameters * self.tiny_element_size

    @property
    def tiny_element_size(self) -> int:
        return FLOAT32 if self.float32_convolutions else self.element_size

    @property
    def text(self) -> Weights:
        return self.qwen + self.clip

    @property
    def all(self) -> Weights:
        return self.text + self.vae + self.dit

    @property
    def dit_rest(self) -> int:
        """Bytes of all but the visual blocks."""
        return self.dit.size - self.dit_blocks * self.dit_block


def models(config: Config, files: Mapping[str, Path], element_size: int) -> Models:
    """The models of a config in a dtype of `element_size` bytes, quantised as config.runtime says, or as the file is.

    files: where "dit", "vae", "qwen" and "clip" are, and "tiny" where a tiny decoder is used. One that does not exist
        is taken to be the published one. Adapters are among them, by names as from `adapter_files`.
    Raises ValueError for a file that exists and is damaged, or a DiT's of another variant.
    """
    dit, block, scheme = _dit(config, files.get("dit"), element_size)
    qwen, intermediate, qwen_scheme = _qwen(config, files.get("qwen"), element_size)
    of_adapters = NO_ADAPTERS
    if any(name.startswith(KEY) for name in files):
        of_adapters = adapted(config, files, dit_header(config.model.dit_params, files.get("dit")), scheme)
    return Models(
        qwen=qwen,
        writer=_writer(config, files.get("qwen"), element_size),
        clip=_clip(files.get("clip")),
        vae=_vae(files.get("vae"), VAE_PARAMETERS[config.model.vae.name], element_size),
        dit=dit,
        dit_block=block,
        dit_blocks=config.model.dit_params.num_visual_blocks,
        dit_quantization=scheme,
        vae_channels=_vae_channels(files.get("vae")),
        qwen_intermediate=intermediate,
        qwen_quantization=qwen_scheme,
        qwen_streamed=_qwen_streamed(config, files.get("qwen"), element_size),
        element_size=element_size,
        tiny=_tiny(config, files.get("tiny")),
        adapted=of_adapters,
    )


def _tiny(config: Config, path: Path | None) -> TinyLayout | None:
    if path is None:
        return None
    kind = KINDS[config.model.vae.name]
    return tiny_layout(read_header(path), kind, path) if path.exists() else TinyLayout(kind, PUBLISHED[kind], {})


def _dit(config: Config, path: Path | None, element_size: int) -> tuple[Weights, int, str | None]:
    """The DiT's weights, the bytes of one of its visual blocks, and in what scheme its layers are in memory."""
    params, scheme = config.model.dit_params, config.runtime.dit_quantization
    if path is None or not path.exists():
        return _published_dit(params, scheme, element_size)
    return _dit_of_header(params, dit_header(params, path), scheme, element_size)


@functools.cache
def _published_dit(params: DiTConfig, scheme: str | None, element_size: int) -> tuple[Weights, int, str | None]:
    return _dit_of_header(params, dit_header(params, None), scheme, element_size)


def _dit_of_header(
    params: DiTConfig, header: Header, scheme: str | None, element_size: int
) -> tuple[Weights, int, str | None]:
    in_file, shapes = quantized_layers(header), expected_dit_shapes(params)
    from_gguf = any(scheme in BLOCKS for scheme in in_file.values())
    size = blocks = mapped = 0
    for name, (dtype, shape) in header.items():
        layer, _, part = name.rpartition(".")
        stored = _stored({name: (dtype, shape)})
        kept = stored if any(word in name for word in KEEP_PRECISION) else prod(shape) * element_size
        if layer in in_file and part != "bias":
            outputs, inputs = shapes[f"{layer}.weight"]
            if from_gguf and scheme is not None and is_quantizable(layer):  # made into numbers, and quantised anew
                kept, stored = _stored(quantized_parts(scheme, outputs, inputs)), 0
            else:
                kept = _stored({name: quantized_parts(in_file[layer], outputs, inputs)[part]})
        elif packed := packed_weight(name):  # what a GGUF file has in blocks and a model has not
            element = FLOAT32 if any(word in name for word in KEEP_PRECISION) else element_size
            kept, stored = prod(shapes[f"{packed[0]}.weight"]) * element, 0
        elif scheme is not None and (from_gguf or not in_file) and part == "weight" and is_quantizable(layer):
            kept, stored = _stored(quantized_parts(scheme, *shape)), 0
        size += kept
        blocks += kept if name.startswith("visual_transformer_blocks.") else 0
        mapped += kept if kept == stored and (dtype != "F32" or layer in in_file) else 0
    return (
        Weights(size, _stored(header), mapped),
        blocks // params.num_visual_blocks,
        scheme if from_gguf and scheme else quantization_from_header(header) or scheme,
    )


def dit_header(dit: DiTConfig, path: Path | None) -> Header:
    """The header of the DiT's file, or as it would be in bfloat16 where there is none."""
    if path is None or not path.exists():
        return {name: ("BF16", shape) for name, shape in expected_dit_shapes(dit).items()}
    header = _header(path)
    try:
        check_dit_header(header, dit)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return strip_prefix(header)


def _qwen(config: Config, path: Path | None, element_size: int) -> tuple[Weights, int, str | None]:
    """Qwen's weights, the width of its feed-forward, and in what scheme its layers are in memory."""
    vision, to_nf4 = config.task == "i2i", config.runtime.qwen_quantization
    if path is None or not path.exists():
        parameters = QWEN_PARAMETERS + vision * QWEN_VISION_PARAMETERS
        linear = parameters - QWEN_EMBEDDING_PARAMETERS if to_nf4 else 0
        plain = (parameters - linear) * element_size
        mapped = plain if element_size == BITS["BF16"] // 8 else 0
        weights = Weights(plain + int(linear * NF4_SIZE), 2 * parameters, mapped)
        return weights, QWEN_INTERMEDIATE, "nf4" if to_nf4 else None
    size = read = mapped = 0
    intermediate, scheme = QWEN_INTERMEDIATE, "nf4" if to_nf4 else None
    header = _header(path, keep_fp8=not to_nf4)
    shapes = unpacked_shapes(header)
    for name, (dtype, shape) in header.items():
        if "lm_head" in name or ("visual." in name and not vision):
            continue
        stored = _stored({name: (dtype, shape)})
        read += stored
        if packed := packed_weight(name):
            name, shape = f"{packed[0]}.weight", shapes[f"{packed[0]}.weight"]
        if name.endswith("mlp.gate_proj.weight") and "visual." not in name:
            intermediate = shape[0] if shape else intermediate
        if to_nf4 and len(shape) == 2 and "embed" not in name:
            size += _stored(quantized_parts("nf4", *shape))
            continue
        if packed and "embed" not in name:
            scheme = "gguf" if packed[1] in BLOCKS else packed[1]
            size += stored
            mapped += stored
            continue
        size += prod(shape) * element_size
        mapped += prod(shape) * element_size if dtype in IN_PLACE[element_size] else 0
    return Weights(size, read, mapped), intermediate, scheme


def _qwen_streamed(config: Config, path: Path | None, element_size: int) -> int:
    """Two buffers of the largest layer, two of the vision tower's where there is one, and what is in no layer."""
    vision = config.task == "i2i"
    if path is None or not path.exists():
        of_vision = 2 * QWEN_VISION_BLOCK_PARAMETERS + QWEN_VISION_REST_PARAMETERS
        return element_size * (2 * QWEN_LAYER_PARAMETERS + vision * of_vision)
    layers: dict[str, int] = {}
    rest = 0
    for name, (_, shape) in _header(path).items():
        if "lm_head" in name or "embed_tokens" in name or ("visual." in name and not vision):
            continue
        layer = re.match(r".*\b(layers|blocks)\.\d+\.", name)
        if layer is None:
            rest += prod(shape)
        else:
            layers[layer[0]] = layers.get(layer[0], 0) + prod(shape)
    stacks = [[size for name, size in layers.items() if ("visual." in name) is seen] for seen in (False, True)]
    return element_size * (rest + sum(2 * max(sizes, default=0) for sizes in stacks))


def _writer(config: Config, path: Path | None, element_size: int) -> Weights | None:
    """Qwen's head, and its vision tower where the encoder has none and there is a picture; see models/text_generator.

    Never quantised.
    """
    if config.generation.expand_prompts is False:
        return None
    with_vision = config.task == "i2v"
    if path is None or not path.exists():
        parameters = QWEN_HEAD_PARAMETERS + with_vision * QWEN_VISION_PARAMETERS
        return Weights(parameters * element_size, 2 * parameters, 2 * parameters if element_size == 2 else 0)
    header = _header(path)
    needed = {name: entry for name, entry in header.items() if name.startswith("lm_head.weight")}
    if not needed and not _has_tied_head(path):
        return None
    needed |= {name: entry for name, entry in header.items() if with_vision and "visual." in name}
    same = {name: entry for name, entry in needed.items() if entry[0] in IN_PLACE[element_size]}
    packed = {name: entry for name, entry in needed.items() if packed_weight(name)}
    size = element_size * sum(prod(shape) for name, (_, shape) in needed.items() if name not in packed)
    return Weights(size + _stored(packed), _stored(needed), _stored(same) + _stored(packed))


def _has_tied_head(path: Path) -> bool:
    """Whether Qwen writes with its embeddings."""
    try:
        return has_tied_head(encoder_config(path, QWEN))
    except ValueError:
        return False


def _clip(path: Path | None) -> Weights:
    """CLIP is always computed with in float32."""
    if path is None or not path.exists():
        return Weights(CLIP_PARAMETERS * FLOAT32, CLIP_PARAMETERS * FLOAT32, 0)
    without = ("vision", "visual", "text_projection", "logit")
    header = {name: entry for name, entry in _header(path).items() if not name.startswith(without)}
    size = FLOAT32 * sum(prod(shape) for _, shape in header.values())
    return Weights(size, _stored(header), 0)


def _vae(path: Path | None, published: int, element_size: int) -> Weights:
    """A CPU has the convolutions' weights in another order, so of those no file's are computed with."""
    if path is None or not path.exists():
        return Weights(published * element_size, published * FLOAT32, 0)
    header = _header(path)
    same = {name: entry for name, entry in header.items() if entry[0] in IN_PLACE[element_size] and len(entry[1]) < 3}
    return Weights(element_size * sum(prod(shape) for _, shape in header.values()), _stored(header), _stored(same))


def _vae_channels(path: Path | None) -> tuple[int, ...]:
    """`block_out_channels` of a VAE's config.json, or the published ones where there is none."""
    file = None if path is None else folder_of(path) / "config.json"
    if file is None or not file.is_file():
        return VAE_CHANNELS
    try:
        channels = read_json(file, "it").get("block_out_channels", VAE_CHANNELS)
    except ValueError as error:
        raise ValueError(f"{file}: not readable as a VAE's config ({error}); download it again") from None
    if not isinstance(channels, list | tuple) or not channels or not all(type(n) is int and n > 0 for n in channels):
        raise ValueError(f"{file}: not readable as a VAE's config; download it again")
    return tuple(channels)


def _header(path: Path, keep_fp8: bool = True) -> Header:
    return {name: entry for file in find_weights(path) for name, entry in read_weights_header(file, keep_fp8).items()}


def _stored(header: Header) -> int:
    """Bytes of a header's tensors."""
    return sum(prod(shape) * BITS.get(dtype, 32) // 8 for dtype, shape in header.values())
