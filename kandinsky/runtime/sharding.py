"""Each process keeps a part of the DiT's weights: FSDP2, block by block, for inference.

A block's weights are gathered before it runs and dropped after it. They are sharded, sent and used in the dtypes that
the checkpoint has or was asked to have: no float32 copy, and no inputs are cast (a timestep of 997.96 would become 996
in bfloat16). Every parameter is divided along its first dimension, and a process reads only its own rows of each from
the memory-mapped file.

Knows tensors, files of tensors and process groups; knows no requests, and of the model only its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from kandinsky.checkpoints.headers import open_tensors, read_header
from kandinsky.models.dit import DiffusionTransformer3D


def own_rows(rows: int, mesh: DeviceMesh) -> slice:
    """Which of a parameter's rows are this process's: equally many each, the last processes may have fewer or none."""
    each = -(-rows // mesh.size())
    begin = min(each * mesh.get_local_rank(), rows)
    return slice(begin, min(begin + each, rows))


def shard(dit: DiffusionTransformer3D, mesh: DeviceMesh) -> None:
    """Make the parameters of a DiT on the meta device DTensors over a one-dimensional mesh, gathered block by block."""
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in (*dit.text_transformer_blocks, *dit.visual_transformer_blocks):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(dit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)  # the little that is left


def load_shards(
    dit: nn.Module,
    files: Sequence[Path],
    mesh: DeviceMesh,
    device: torch.device | str,
    dtype_of: Callable[[str, Tensor], torch.dtype],
    prefix: str = "",
) -> None:
    """Give a sharded model its parameters from safetensors files that are known to hold exactly those.

    dtype_of(name, tensor) says what a tensor is cast to; `prefix` is dropped from names that have it.
    """
    state: dict[str, Tensor] = {}
    for file in files:
        names = list(read_header(file))
        for stored in names:
            # Opened anew for each: pages that were read stay in this process's memory until the file is closed.
            with open_tensors(file) as tensors:
                rows = tensors.get_slice(stored)
                shape = rows.get_shape()
                part = rows[own_rows(shape[0], mesh)]
                name = stored.removeprefix(prefix)
                own = part.to(device=device, dtype=dtype_of(name, part), copy=True)
            stride = torch.empty(shape, device="meta").stride()
            state[name] = DTensor.from_local(
                own, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
            )
            del part, rows, tensors
    dit.load_state_dict(state, strict=True, assign=True)
    dit.eval().requires_grad_(False)
