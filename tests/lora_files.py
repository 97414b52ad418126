"""LoRA files of random numbers, in the layouts that there are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kandinsky.checkpoints.dit_layout import expected_dit_shapes
from kandinsky.config.schema import DiTConfig


def linear_layers(dit: DiTConfig) -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of all that an adapter can change."""
    shapes = expected_dit_shapes(dit).items()
    return {name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in shapes if len(shape) == 2}


def random_tensors(
    dit: DiTConfig,
    layers: Iterable[str] | None = None,
    rank: int = 4,
    seed: int = 0,
    prefix: str = "base_model.model.",
    strength: float = 0.1,
) -> dict[str, Tensor]:
    """In peft's names; None: of all layers."""
    generator = torch.Generator().manual_seed(seed)
    sizes = linear_layers(dit)
    tensors = {}
    for layer in sizes if layers is None else layers:
        outputs, inputs = sizes[layer]
        for name, shape in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
            tensors[f"{prefix}{layer}.{name}.weight"] = strength * torch.randn(shape, generator=generator)
    return tensors


def write_lora(
    path: Path,
    dit: DiTConfig,
    layers: Iterable[str] | None = None,
    config: dict[str, Any] | None = None,
    trigger: str | None = None,
    change: Callable[[dict[str, Tensor]], object] | None = None,
    **options: Any,
) -> Path:
    """A file, or a folder like the official ones where `config` is what config_lora.json shall have in it."""
    tensors = random_tensors(dit, layers, **options)
    if change is not None:
        change(tensors)
    if config is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"trigger": trigger} if trigger else None)
        return path
    path.mkdir(parents=True)
    save_file(tensors, path / "lora.safetensors", metadata={"trigger": trigger} if trigger else None)
    (path / "config_lora.json").write_text(json.dumps(config))
    return path
