"""Which devices there are, which dtypes they compute in, and how much memory is free: asked here and nowhere else."""

from __future__ import annotations

import dataclasses
import socket

import torch

from kandinsky.common.host_memory import host_memory
from kandinsky.planning.machine import CUDA_CONTEXT, Machine
from kandinsky.runtime.processes import Processes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_of_rank(local_rank: int) -> str:
    """Where the process of that number on this machine runs: on the GPU of that number, or the CPU without GPUs."""
    return f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"


def spread_over(gpus: int) -> dict[str, str]:
    """A device map for one pipeline on that many GPUs: the DiT has the first to itself, the others share what is left.

    Raises ValueError for numbers that can't be.
    """
    if not 1 <= gpus <= 3:
        raise ValueError(f"a pipeline on {gpus} GPUs: it has three models, so give 1 to 3")
    others = [f"cuda:{min(i, gpus - 1)}" for i in range(3)]
    return {"dit": others[0], "vae": others[1], "text_embedder": others[2]}


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype to compute in. Raises ValueError for one that models can't run in."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    name = dtype_name(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def convolves_in_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a VAE of this dtype is to convolve in float32, because this CPU has no arithmetic for it.

    Without, oneDNN leaves such convolutions to PyTorch's fallbacks, which for a video take a hundred times as long and
    three times the memory.
    """
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if device.type != "cpu" or asked is None:
        return False
    return not (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, asked)())


def dtype_name(dtype: str | torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16 and its other spellings."""
    return str(dtype).removeprefix("torch.")


def machine_memory(device: torch.device) -> Machine:
    """What there is to fit into: the host's memory, and what is free on the GPU if `device` is one.

    Free is also what PyTorch keeps without using it: of a pipeline that is gone, in a notebook that loads another.
    """
    if device.type == "cpu":
        slow = tuple(name for name, dtype in DTYPES.items() if convolves_in_float32(dtype, device))
        return Machine(host_memory(), float32_convolutions=slow)
    if device.type == "mps":  # of the host's memory
        return Machine(host_memory(), torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    if device.type == "xpu":
        free, total = torch.xpu.mem_get_info(device)
        free += torch.xpu.memory_reserved(device) - torch.xpu.memory_allocated(device)
        return Machine(host_memory(), min(free + CUDA_CONTEXT, total))
    free, total = torch.cuda.mem_get_info(device)  # makes the context, if there was none
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Machine(host_memory(), min(free + CUDA_CONTEXT, total))


def machine_of_all(machine: Machine, processes: Processes) -> Machine:
    """What each of several processes can count on: the smallest GPU and host of all. To be called by all at once."""
    found = processes.everybodys((machine, socket.gethostname()))
    hosts = [host for _, host in found]
    gpus = [each.gpu_memory for each, _ in found if each.gpu_memory is not None]
    return dataclasses.replace(
        machine,
        host_memory=min(each.host_memory for each, _ in found),
        gpu_memory=min(gpus) if gpus else None,
        float32_convolutions=tuple(sorted({dtype for each, _ in found for dtype in each.float32_convolutions})),
        processes=processes.size,
        on_host=max(map(hosts.count, hosts)),
    )
