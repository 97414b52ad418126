"""The DiT out of its file: whole, in shards, or on the host, from where it comes to its device when its stage begins.

What a file is, is read from its header before anything is allocated.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kandinsky.checkpoints.dit_layout import (
    COMFY_PREFIX,
    KEEP_PRECISION,
    check_dit_header,
    quantization_from_header,
    strip_prefix,
)
from kandinsky.checkpoints.files import find_weights
from kandinsky.checkpoints.formats import read_weights_header
from kandinsky.config.schema import DiTConfig
from kandinsky.loading.weights import host_weights, load_weights
from kandinsky.models.dit import DiffusionTransformer3D, HandOut
from kandinsky.runtime.block_swap import BlockSwap
from kandinsky.runtime.lora import Adapters
from kandinsky.runtime.mapped_blocks import MappedBlocks
from kandinsky.runtime.offload import Offloaded, Part, take_weights
from kandinsky.runtime.parallel import DistributedTeam
from kandinsky.runtime.prompt_cache import fingerprint
from kandinsky.runtime.quantization import quantize_dit

logger = logging.getLogger(__name__)


def load_dit(
    path: str | Path,
    params: DiTConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    quantization: str | None = None,
    quantize_on: torch.device | None = None,
) -> DiffusionTransformer3D:
    """The DiT from its file or folder. Raises ValueError for damaged files and for other variants' files.

    quantization: "int8", "fp8" or "nf4", which weights are brought to as they are read. None leaves them as they are in
        the file, which may be quantised itself; a file that is quantised otherwise, and no GGUF, is a ValueError.
    quantize_on: where tensors are quantised, one at a time; None: where they then stay.
    """
    files = find_weights(path)
    header = {name: entry for file in files for name, entry in read_weights_header(file).items()}
    try:
        check_dit_header(header, params)
        with torch.device("meta"):
            dit = DiffusionTransformer3D(**dataclasses.asdict(params))
        convert = quantize_dit(dit, strip_prefix(header), quantization, torch.device(device))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

    def dtype_of(name: str, tensor: Tensor) -> torch.dtype:
        return tensor.dtype if any(part in name for part in KEEP_PRECISION) else dtype

    load_weights(dit, files, device, dtype_of, COMFY_PREFIX, convert, quantize_on)
    return dit


def load_sharded_dit(
    path: str | Path, params: DiTConfig, device: torch.device, dtype: torch.dtype, team: DistributedTeam
) -> DiffusionTransformer3D:
    """A DiT of which each process of a sequence has a part of the weights. Errors are those of `load_dit`."""
    from kandinsky.runtime.sharding import load_shards, shard  # FSDP takes a second to import

    files = find_weights(path)
    header = {name: entry for file in files for name, entry in read_weights_header(file).items()}
    try:
        check_dit_header(header, params)
        if quantization_from_header(strip_prefix(header)) is not None:
            raise ValueError("runtime.shard_weights = true takes checkpoints that are not quantised: leave it out")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    with torch.device("meta"):
        dit = DiffusionTransformer3D(**dataclasses.asdict(params))
    mesh = team.mesh["sequence"]
    shard(dit, mesh)

    def dtype_of(name: str, tensor: Tensor) -> torch.dtype:
        return tensor.dtype if any(part in name for part in KEEP_PRECISION) else dtype

    load_shards(dit, files, mesh, device, dtype_of, COMFY_PREFIX)
    return dit


def load_dit_on_host(
    path: Path, params: DiTConfig, device: torch.device, dtype: torch.dtype, quantization: str | None
) -> tuple[DiffusionTransformer3D, dict[str, Tensor]]:
    """A DiT on the meta device, and its weights by name on the host. Arguments and errors are those of `load_dit`.

    The weights stay in their files, but for those that are quantised as they are read: these lie in memory. A GPU
    quantises them, where `device` is one.
    """
    if quantization is None and scheme_of(path) is None:
        return load_dit(path, params, "meta", dtype), host_weights(path, COMFY_PREFIX)
    quantize_on = device if quantization is not None and device.type == "cuda" else None
    dit = load_dit(path, params, "cpu", dtype, quantization, quantize_on)
    return dit, take_weights(dit)


def scheme_of(path: Path) -> str | None:
    """How the weights of a DiT's checkpoint are quantised; None: they are not."""
    header = {name: entry for file in find_weights(path) for name, entry in read_weights_header(file).items()}
    return quantization_from_header(strip_prefix(header))


def dit_parts(
    dit: DiffusionTransformer3D,
    weights: dict[str, Tensor],
    resident: int | None,
    device: torch.device,
    adapters: Adapters,
    from_file: bool = False,
) -> tuple[list[Part], HandOut]:
    """What brings a DiT on the meta device to its device, with only `resident` of its visual blocks (None: all); and
    what hands out its visual blocks.

    `weights` are its tensors on the host by name. Those of blocks that stream are taken out. `from_file`: they stream
    from where these tensors lie, without a copy in memory.
    """
    if resident is None:
        return [Offloaded(dit, weights, device, adapters.merge), adapters], iter
    swap_of = MappedBlocks if from_file else BlockSwap
    adapters.swap = swap = swap_of(
        dit.visual_transformer_blocks, weights, "visual_transformer_blocks.", resident, device
    )
    blocks = len(dit.visual_transformer_blocks)
    source = "their mapped file" if from_file else f"{swap.host_gb:.1f} GB of host memory"
    logger.info("%d of %d visual blocks stream from %s", len(swap.streamed), blocks, source)
    return [Offloaded(dit, weights, device, adapters.merge), swap, adapters], swap


def reread(path: Path) -> Callable[[], dict[str, Tensor]]:
    """What gives a DiT checkpoint's tensors a second time, as `host_weights` does, opened when it is first called.

    It raises ValueError where the checkpoint is gone by then, or not the same any more.
    """
    before = fingerprint(find_weights(path))

    @functools.cache
    def read() -> dict[str, Tensor]:
        try:
            same = fingerprint(find_weights(path)) == before
        except (ValueError, OSError):
            same = False
        if not same:
            raise ValueError(
                f"{path} has changed since it was loaded, and adapters need it again: load the pipeline anew"
            )
        return host_weights(path, COMFY_PREFIX)

    return read
