"""A DiT over several processes (gloo, on the CPU) beside the same DiT in one."""

from __future__ import annotations

import math
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kandinsky.attention.nabla import NablaConfig
from kandinsky.models.dit import DiffusionTransformer3D
from kandinsky.runtime.parallel import SequenceParallel, check_world_size

pytestmark = pytest.mark.distributed
TOLERANCE = 1e-5
SPARSE = NablaConfig(P=0.5, wT=3, wH=1, wW=1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def process(rank: int, world_size: int, port: int, folder: Path, work: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        torch.save(work(*arguments), folder / f"{rank}.pt")
    except Exception:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()


def in_processes(world_size: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns in each of `world_size` processes."""
    mp.spawn(process, (world_size, free_port(), folder, work, arguments), nprocs=world_size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


def small_dit() -> DiffusionTransformer3D:
    """Four heads, random weights; queries and keys are large, so that NABLA's map is peaked as a trained model's is."""
    dit = DiffusionTransformer3D(
        in_text_dim=24, in_text_dim2=12, time_dim=32, model_dim=256, ff_dim=256, num_text_blocks=1, num_visual_blocks=2
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(values / math.sqrt(parameter.shape[1]))
            else:
                parameter.copy_(0.2 * values + (2 if name.endswith("norm.weight") else 0))
    return dit.eval()


@torch.no_grad()
def velocities(parallel: bool) -> dict[str, torch.Tensor]:
    """Of several requests one after the other: tokens that do and don't divide, batches, NABLA, masked text."""
    dit = small_dit()
    if parallel:
        assert dist.group.WORLD is not None
        SequenceParallel(dist.group.WORLD).apply(dit)
    results = {}
    for name, (batch, size, nabla) in {
        "odd": (1, (3, 10, 6), None),
        "batch": (2, (1, 4, 14), None),
        "fewer tokens than four processes need": (1, (1, 2, 10), None),
        "nabla": (1, (3, 32, 48), SPARSE),
        "nabla, one block a frame, batch": (2, (5, 16, 16), SPARSE),
    }.items():
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(batch, *size, 16, generator=generator)
        text, pooled = (torch.randn(batch, *shape, generator=generator) for shape in ((7, 24), (12,)))
        mask = torch.ones(batch, 7, dtype=torch.bool)
        mask[-1, 4:] = False
        timesteps = torch.tensor([723.4567, 41.875])[:batch]
        results[name] = dit(latents, text, pooled, timesteps, nabla=nabla, text_mask=mask)
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_same_velocity_as_in_one_process(world_size: int, tmp_path: Path) -> None:
    expected = velocities(parallel=False)
    for found in in_processes(world_size, tmp_path, velocities, True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            difference = (found[name] - value).abs().max().item()
            assert difference <= TOLERANCE * value.abs().max().item(), f"{name}: {difference}"


def test_heads_that_do_not_divide_are_refused() -> None:
    check_world_size(28, 7)
    with pytest.raises(ValueError, match=r"3 processes cannot share this model's 4 attention heads.*start 1, 2 or 4"):
        check_world_size(4, 3)
    with pytest.raises(ValueError, match=r"1, 2, 4, 7, 14 or 28"):
        check_world_size(28, 8)
