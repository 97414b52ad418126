"""Visual blocks that stream from their mapped file, where the host has no memory for a copy of them.

What was read stays in the system's file cache as long as it has room for it; beyond that the disk is read again for
every evaluation, which takes as long as it takes. Adapters are merged into tensors of their own, on the host.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor

from kandinsky.runtime.block_swap import BlockSwap, _Buffer, _Layout


class MappedBlocks(BlockSwap):
    """A `BlockSwap` whose host side is the tensors that it was given, as they lie: mapped, in the file's dtypes."""

    def __init__(self, *args: Any) -> None:
        self._tensors: dict[int, dict[str, Tensor]] = {}  # of each turn, by the block's own names
        super().__init__(*args)

    def _packed(self, index: int, layout: _Layout, weights: MutableMapping[str, Tensor]) -> list[Tensor]:
        names = [name for name, _, _ in layout._places]
        self._tensors[self._turn[index]] = {name: weights.pop(f"{self._prefix}{index}.{name}") for name in names}
        return []

    @property
    def host_gb(self) -> float:
        return 0.0

    def overwrite(self, name: str, tensor: Tensor) -> None:
        index, own_name = name.removeprefix(self._prefix).split(".", 1)
        turn = self._turn[int(index)]
        self._tensors[turn][own_name] = tensor.cpu()  # they are merged on the device, which is not to keep them
        for buffer in self._buffers:
            if buffer.holds == turn:
                buffer.holds = None

    def _copy(self, turn: int, buffer: _Buffer) -> None:
        # On the current stream, behind whatever it still has to run with what the buffer holds.
        for name, view in self._layouts[turn].views(buffer.data):
            view.copy_(self._tensors[turn][name].to(view.device))  # across first, then cast
