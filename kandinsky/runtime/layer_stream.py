"""A text encoder's layers stream from the mapped file through two buffers; its embeddings are looked up on the host.

The same machinery as `BlockSwap`, without a copy of the layers on the host: what is read stays in the system's file
cache as long as it has room for it. A GPU gets layers by way of `Staging`, whose thread reads the next one while this
one runs; to read a prompt is little computation beside reading the file, so that is as fast as the file and the link
are. Every number is the one that a resident encoder has.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, MutableMapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kandinsky.runtime.block_swap import BlockSwap, _Buffer, _Layout
from kandinsky.runtime.staging import Arriving, Staging

Read = Callable[[str], Tensor]  # a tensor of the file by name, mapped for as long as it is kept


class LayersFromFile(BlockSwap):
    """Hands out layers, all of which stream, from a file that is opened for each tensor and mapped no longer."""

    def __init__(self, layers: nn.ModuleList, read: Read, prefix: str, device: torch.device) -> None:
        super().__init__(layers, {}, prefix, 0, device)
        self._read = read
        self._staging = Staging(device) if device.type == "cuda" else None
        self._arriving: dict[int, Arriving] = {}  # by turn, what is not waited for yet

    def _packed(self, index: int, layout: _Layout, weights: MutableMapping[str, Tensor]) -> list[Tensor]:
        return []

    def _copy(self, turn: int, buffer: _Buffer) -> None:
        prefix = f"{self._prefix}{self.streamed[turn]}."
        views = self._layouts[turn].views(buffer.data)
        places = [(view, functools.partial(self._read, prefix + name)) for name, view in views]
        if self._staging is not None:
            self._arriving[turn] = self._staging.copy(places)
            return
        for view, read in places:
            view.copy_(read())

    def _wait_for(self, turn: int) -> None:
        super()._wait_for(turn)
        if (arriving := self._arriving.pop(turn, None)) is not None:
            buffer = self._buffer(turn)
            buffer.holds = None  # for the next forward, should reading have failed
            arriving.wait()
            buffer.holds = turn

    def end(self) -> None:
        if self._staging is not None:
            self._staging.close()
            self._arriving.clear()
        super().end()


class StreamedLayers(nn.ModuleList):
    """A model's layers: who goes through them gets each with its weights, until he asks for the next one."""

    def __init__(self, layers: nn.ModuleList, read: Read, prefix: str, device: torch.device) -> None:
        super().__init__(layers)
        swap = LayersFromFile(layers, read, prefix, device)
        swap.begin()
        self._hand_out = functools.partial(swap, layers)
        weakref.finalize(self, swap.end)  # the first layers may be on their way again

    def __iter__(self) -> Iterator[nn.Module]:
        return self._hand_out()


class HostEmbedding(nn.Module):
    """A table of embeddings in the mapped file: a prompt needs a few hundred rows of 152,064."""

    def __init__(self, table: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = table.requires_grad_(False)  # a plain attribute: not to be moved, and not the model's device
        self.device, self.dtype = device, dtype

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids.to(self.weight.device), self.weight).to(self.device, self.dtype)
