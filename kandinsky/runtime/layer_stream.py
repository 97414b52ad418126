"""A text encoder's layers stream from the mapped file through two buffers; its embeddings are looked up on the host.

The same machinery as `BlockSwap`, without a copy of the layers on the host: to read a prompt is little computation
beside reading the file, so there is nothing to hide copies behind, and what is read stays in the system's file cache
as long as it has room for it. Every number is the one that a resident encoder has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, MutableMapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kandinsky.runtime.block_swap import BlockSwap, _Buffer, _Layout

Read = Callable[[str], Tensor]  # a tensor of the file by name, mapped for as long as it is kept


class LayersFromFile(BlockSwap):
    """Hands out layers, all of which stream, from a file that is opened for each tensor and mapped no longer."""

    def __init__(self, layers: nn.ModuleList, read: Read, prefix: str, device: torch.device) -> None:
        super().__init__(layers, {}, prefix, 0, device)
        self._read = read

    def _packed(self, index: int, layout: _Layout, weights: MutableMapping[str, Tensor]) -> list[Tensor]:
        return []

    def _copy(self, turn: int, buffer: _Buffer) -> None:
        # On the current stream, behind whatever it still has to run with what the buffer holds.
        for name, view in self._layouts[turn].views(buffer.data):
            view.copy_(self._read(f"{self._prefix}{self.streamed[turn]}.{name}"))


class StreamedLayers(nn.ModuleList):
    """A model's layers: who goes through them gets each with its weights, until he asks for the next one."""

    def __init__(self, layers: nn.ModuleList, read: Read, prefix: str, device: torch.device) -> None:
        super().__init__(layers)
        swap = LayersFromFile(layers, read, prefix, device)
        swap.begin()
        self._hand_out = functools.partial(swap, layers)

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
