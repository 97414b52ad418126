"""Some visual blocks stay on the device; the others stream through two buffers there, from host memory.

A streamed block's tensors lie one after the other in flat host memory, pinned where the device is a GPU, in the dtypes
that they are computed with: to fetch a block is to copy bytes. Of the two buffers on the device one is computed with
while the other is filled, on a stream of its own, so that the copies hide behind the computation. Streamed blocks and
those that stay alternate as evenly as they can, which gives every copy the same time to hide in.

Each streamed block has one of the two buffers for good, and its parameters are views of it. So a block that is not the
one to run next may hold another's weights, and a state dict of the model says nothing: only what `BlockSwap` hands out,
as `Execution.hand_out`, may be computed with, and only until the next one is asked for. In return nothing that a
compiler looks at ever changes: shapes, strides and addresses stay.

Knows neither files nor what a block computes. The device may be the CPU: then the buffers are a second copy there, and
copies are done when asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping, Sequence

import torch
from torch import Tensor, nn

from kandinsky.common.limits import STREAM_BUFFERS
from kandinsky.runtime.offload import Slot, slots_of

ALIGNMENT = 256  # bytes; each tensor of a block begins at a multiple of it
SMALLEST_PIECE = 2**20  # bytes; see `_pinned`


def streamed_blocks(num_blocks: int, num_resident: int) -> tuple[int, ...]:
    """Which blocks stream: as evenly spread as they can be, and the first of all blocks stays where any does.

    >>> streamed_blocks(8, 4)
    (1, 3, 5, 7)
    """
    streamed = max(0, num_blocks - num_resident)
    return tuple(i for i in range(num_blocks) if (i + 1) * streamed // num_blocks > i * streamed // num_blocks)


class BlockSwap:
    """Hands out visual blocks one after the other, each with its own weights: what `Execution.hand_out` asks for.

    For one forward at a time. A forward may end early, by an error or because nobody asks for more blocks: the next one
    begins at the first block all the same.

    Args:
        blocks: on the meta device, their tensors in the dtypes that they shall have.
        weights: tensors on the host, by names `prefix` + index + "." + the block's own name. Those of the blocks that
            stream are taken out of it, one block at a time, once they lie where they are streamed from; the others are
            left to who keeps them on the device.
        num_resident: how many blocks stay on the device.
        device: where blocks run.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        weights: MutableMapping[str, Tensor],
        prefix: str,
        num_resident: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self._prefix = prefix
        self.streamed = streamed_blocks(len(blocks), num_resident)
        self._turn = {index: turn for turn, index in enumerate(self.streamed)}
        self._layouts = [_Layout(blocks[index]) for index in self.streamed]
        self._host = []
        for index, layout in zip(self.streamed, self._layouts, strict=True):
            self._host.append(self._packed(index, layout, weights))
        self._buffers: list[_Buffer] = []
        self._copies: torch.cuda.Stream | None = None

    def _packed(self, index: int, layout: _Layout, weights: MutableMapping[str, Tensor]) -> list[Tensor]:
        """A block as it lies on the host, in one piece or several."""
        packed = torch.empty(layout.num_bytes, dtype=torch.uint8)
        for name, view in layout.views(packed):
            view.copy_(weights.pop(f"{self._prefix}{index}.{name}"))
        return _pinned(packed) if self.device.type == "cuda" else [packed]

    @property
    def host_gb(self) -> float:
        """Host memory that the streamed blocks take, in GB."""
        return sum(layout.num_bytes for layout in self._layouts) / 1e9

    def begin(self) -> None:
        """Make the buffers and the blocks' parameters views of them; nothing is copied yet."""
        size = max((layout.num_bytes for layout in self._layouts), default=0)
        for _ in range(min(STREAM_BUFFERS, len(self.streamed))):
            self._buffers.append(_Buffer(torch.empty(size, dtype=torch.uint8, device=self.device)))
        if self.device.type == "cuda":
            self._copies = torch.cuda.Stream(self.device)
        for turn, layout in enumerate(self._layouts):
            layout.bind(self._buffer(turn).data)

    def end(self) -> None:
        """Drop the buffers."""
        if self._copies is not None:
            self._copies.synchronize()
        for layout in self._layouts:
            layout.unbind()
        self._buffers.clear()
        self._copies = None

    def __call__(self, blocks: nn.ModuleList) -> Iterator[nn.Module]:
        """The blocks, each ready to run on the current stream, until the next one is asked for."""
        # What an earlier forward asked for in time is already there; after one that ended early it is not.
        for turn in range(len(self._buffers)):
            self._request(turn)
        for index, block in enumerate(blocks):
            if index not in self._turn:
                yield block
                continue
            turn = self._turn[index]
            self._wait_for(turn)
            yield block
            # This block is done with its buffer. The next one that has it, maybe of the next forward:
            following = turn + STREAM_BUFFERS
            self._request(following if following < len(self.streamed) else turn % STREAM_BUFFERS)

    def streams(self, name: str) -> bool:
        """Whether a tensor, named as in the `weights` that the blocks came with, is a streamed block's."""
        return name.startswith(self._prefix) and int(name.removeprefix(self._prefix).split(".")[0]) in self._turn

    def overwrite(self, name: str, tensor: Tensor) -> None:
        """Give a streamed block another tensor, of the same shape, from its next run on. Not while a forward runs."""
        index, own_name = name.removeprefix(self._prefix).split(".", 1)
        turn = self._turn[int(index)]
        if self._copies is not None:
            self._copies.synchronize()  # one may be reading what is overwritten
        begin, data = self._layouts[turn].bytes_of(own_name, tensor)
        for piece in self._host[turn]:
            end = min(begin + len(data), len(piece))
            if begin < end:
                piece[begin:end], data = data[: end - begin], data[end - begin :]
            begin = max(0, begin - len(piece))
        assert not len(data)
        for buffer in self._buffers:
            if buffer.holds == turn:
                buffer.holds = None

    def _buffer(self, turn: int) -> _Buffer:
        return self._buffers[turn % STREAM_BUFFERS]

    def _request(self, turn: int) -> None:
        """Have a block's weights copied into its buffer, after all that was asked of the current stream so far."""
        buffer = self._buffer(turn)
        if buffer.holds == turn:
            return
        buffer.holds = None  # until the copy is under way, whatever happens
        self._copy(turn, buffer)
        buffer.holds = turn

    def _copy(self, turn: int, buffer: _Buffer) -> None:
        if self._copies is None:
            _copy_pieces(self._host[turn], buffer.data)
            return
        # Blocks that the current stream still has to run may read the buffer.
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            _copy_pieces(self._host[turn], buffer.data)
            buffer.filled = self._copies.record_event()

    def _wait_for(self, turn: int) -> None:
        """Have the current stream wait until a block's weights are there."""
        buffer = self._buffer(turn)
        assert buffer.holds == turn, "streamed blocks were asked for by two forwards at once"
        if buffer.filled is not None:
            torch.cuda.current_stream(self.device).wait_event(buffer.filled)


class _Buffer:
    """A place on the device for one block, and which one it holds or is about to hold (as its turn)."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.holds: int | None = None
        self.filled: torch.cuda.Event | None = None


class _Layout:
    """Where in a flat piece of memory each tensor of a block lies."""

    def __init__(self, block: nn.Module) -> None:
        self._places: list[tuple[str, Slot, int]] = []
        end = 0
        for name, slot in slots_of(block):
            self._places.append((name, slot, end))
            end += math.ceil(slot.empty.numel() * slot.empty.element_size() / ALIGNMENT) * ALIGNMENT
        self.num_bytes = end

    def views(self, memory: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The block's tensors, by name, as views of `memory`, which is uint8."""
        for name, slot, begin in self._places:
            yield name, _view(memory, begin, slot.empty)

    def bind(self, memory: Tensor) -> None:
        """Make the block's tensors views of `memory`."""
        for _, slot, begin in self._places:
            slot.fill(_view(memory, begin, slot.empty))

    def bytes_of(self, name: str, tensor: Tensor) -> tuple[int, Tensor]:
        """Where the tensor of this name begins, and the bytes (uint8, on the host) with which it has these values."""
        slot, begin = next((slot, begin) for own_name, slot, begin in self._places if own_name == name)
        data = torch.empty(slot.empty.numel() * slot.empty.element_size(), dtype=torch.uint8)
        _view(data, 0, slot.empty).copy_(tensor)
        return begin, data

    def unbind(self) -> None:
        for _, slot, _ in self._places:
            slot.clear()


def _view(memory: Tensor, begin: int, like: Tensor) -> Tensor:
    """A tensor of `like`'s dtype, shape and (dense) strides in the bytes from `begin` on."""
    num_bytes = like.numel() * like.element_size()
    return memory[begin : begin + num_bytes].view(like.dtype).as_strided(like.shape, like.stride())


def _pinned(packed: Tensor) -> list[Tensor]:
    """The same bytes in pinned memory, in pieces whose sizes are powers of two, down to a small rest.

    torch rounds what it pins up to those: in one piece, a block of 613 MB would take 1024.
    """
    pieces = []
    while len(packed):
        size = len(packed) if len(packed) < SMALLEST_PIECE else 1 << (len(packed).bit_length() - 1)
        pieces.append(torch.empty(size, dtype=torch.uint8, pin_memory=True).copy_(packed[:size]))
        packed = packed[size:]
    return pieces


def _copy_pieces(pieces: Sequence[Tensor], target: Tensor) -> None:
    begin = 0
    for piece in pieces:
        target[begin : begin + len(piece)].copy_(piece, non_blocking=True)
        begin += len(piece)
