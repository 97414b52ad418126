"""Which device each component runs on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FixedPlacement:
    """Every component stays on its device from loading on."""

    devices: Mapping[str, torch.device]

    def device(self, component: str) -> torch.device:
        return self.devices[component]

    @contextmanager
    def use(self, component: str) -> Iterator[None]:
        assert component in self.devices, component
        yield
