"""Which device each model runs on, from what a person gives."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kandinsky.common.given import DEVICES

COMPONENTS = ("dit", "vae", "text_embedder")
COUNTS = {  # what they are called, and how many this PyTorch finds
    "cuda": ("CUDA", lambda: torch.cuda.device_count() if torch.cuda.is_available() else 0),
    "mps": ("MPS", lambda: int(torch.backends.mps.is_available())),
    "xpu": ("XPU", lambda: torch.xpu.device_count() if torch.xpu.is_available() else 0),
}

DeviceMap = str | torch.device | Mapping[str, str | torch.device] | None


def parse_device_map(device_map: DeviceMap, local_rank: int = 0) -> dict[str, torch.device]:
    """A device for each component from what a user gives: one device for all, a mapping, or None for the best one.

    local_rank: which process on this machine asks; its GPU is the one of that number.
    ROCm calls AMD's GPUs cuda. `mps` and `xpu`, on which nothing has ever run, are only taken when they are named.
    Raises ValueError for an unknown component, a missing one, or a device that this machine does not have.
    """
    if device_map is None:
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    if str(device_map) == "cuda":
        device_map = f"cuda:{local_rank}"
    if not isinstance(device_map, Mapping):
        device_map = dict.fromkeys(COMPONENTS, device_map)
    unknown, missing = set(device_map) - set(COMPONENTS), set(COMPONENTS) - set(device_map)
    if unknown or missing:
        raise ValueError(f"device_map has the keys {sorted(device_map)}; it needs exactly {', '.join(COMPONENTS)}")
    return {component: _checked_device(device) for component, device in device_map.items()}


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"{device!r} is not a device: use {DEVICES}") from None
    if device.type not in ("cpu", *COUNTS):
        raise ValueError(f"{device} is not a device this runs on: use {DEVICES}")
    if device.type == "cpu":
        return device
    name, count = COUNTS[device.type][0], COUNTS[device.type][1]()
    if (device.index or 0) >= count:
        raise ValueError(f"this machine has no {device}: {count} {name} devices found; use cpu")
    return device
