"""What a run's LoRA adapters take, by the headers of their files (see runtime/lora.py for where they are when)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from kandinsky.checkpoints.dit_layout import expected_dit_shapes, is_quantizable
from kandinsky.checkpoints.files import resolve_path
from kandinsky.checkpoints.headers import BITS, Header, read_header
from kandinsky.checkpoints.lora_file import read_lora
from kandinsky.config.rules import split_lora
from kandinsky.config.schema import Config
from kandinsky.planning.activations import FLOAT32

KEY = "lora "  # what the names of adapters' files begin with among a run's files


@dataclass(frozen=True)
class Adapted:
    """Bytes that adapters take besides the DiT, most of whose weights have them merged into."""

    matrices: int = 0  # on the host, as in their files
    on_device: int = 0  # in float32, of layers that are quantised and so get them whenever they are used
    merged: int = 0  # of the checkpoint, of layers that they are merged into
    in_blocks: int = 0  # of that, of visual blocks
    missing: tuple[str, ...] = ()  # files that are not here


NO_ADAPTERS = Adapted()


def adapter_files(config: Config, cache_dir: str | Path = "./weights/") -> dict[str, Path]:
    """The files of `model.loras`, by names that begin with KEY, whether or not they are there."""
    paths = (resolve_path(split_lora(text)[0], config, cache_dir) for text in config.model.loras)
    return {f"{KEY}{number}": path for number, path in enumerate(paths)}


def adapted(config: Config, files: Mapping[str, Path], header: Header, quantization: str | None) -> Adapted:
    """What the adapters among a run's files come to. Raises ValueError for one that is damaged or does not fit.

    header: of the DiT's file. quantization: how its layers are in memory.
    """
    shapes = expected_dit_shapes(config.model.dit_params)
    matrices = on_device = 0
    layers: set[str] = set()
    missing: list[str] = []
    for name, path in files.items():
        if not name.startswith(KEY):
            continue
        if not path.exists():
            missing.append(str(path))
            continue
        lora = read_lora(path, config.model.dit_params)
        tensors = read_header(lora.path)
        for layer, found in lora.layers.items():
            parts = [tensors[part] for kind, part in found.parts.items() if kind != "alpha"]
            matrices += sum(prod(shape) * BITS.get(dtype, 32) // 8 for dtype, shape in parts)
            if quantization is not None and is_quantizable(layer):
                on_device += FLOAT32 * sum(prod(shape) for _, shape in parts)
            else:
                layers.add(f"{layer}.weight")
    stored = {
        layer: prod(shapes[layer]) * BITS.get(header[layer][0] if layer in header else "BF16", 16) // 8
        for layer in layers
    }
    return Adapted(
        matrices=matrices,
        on_device=on_device,
        merged=sum(stored.values()),
        in_blocks=sum(size for layer, size in stored.items() if layer.startswith("visual_transformer_blocks.")),
        missing=tuple(missing),
    )
