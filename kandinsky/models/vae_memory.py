"""How much memory decoding needs, as a formula, and the tile that fits into a budget.

The formula counts the tensors that exist at once where a decoder's peak is: in the first block at full resolution. It
depends on sizes, channels and dtypes and on nothing else, neither on the device nor on what happens to be free, so the
same settings cut the same tiles and give the same pixels on every machine, but on CPUs that have no arithmetic in the
dtype and convolve in float32. On a CPU it is within 15 % of the measured peak; on a GPU kernels may want memory besides
that it does not know of.

Knows numbers only, and no torch, so that a plan can be made before anything loads.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

from kandinsky.common.limits import ELEMENTS_AT_ONCE, LEAST_FRAMES_AT_ONCE, LEAST_FRAMES_ON_GPU

GB = 2**30  # bytes, as memory is sold

RGB = 3
FLOAT32 = 4  # bytes
WINDOW_FRAMES = 17  # what videos are decoded in
SMALLEST_TILE = 256  # pixels; of a smaller one too much is overlap
TILE_STEP = 64


@dataclass(frozen=True)
class Decoding:
    """What is decoded, and by which VAE.

    channels are its `block_out_channels`, of which the first are those at full resolution; element_size is the bytes of
    a number: 4 for float32, 2 for bfloat16.
    """

    vae: Literal["hunyuan", "flux"]
    channels: tuple[int, ...]
    element_size: int
    width: int
    height: int
    num_frames: int  # 1 for a picture
    overlap: int  # of tiles, in pixels, at least
    float32_convolutions: bool = False  # in place of some in a dtype that the CPU has no arithmetic for

    def tile_bytes(self, width: int, height: int, frames: int) -> int:
        """Bytes besides the weights at the peak of decoding one tile of one window."""
        pixels, size = width * height, self.element_size
        outer, inner = self.channels[0], self.channels[:2][-1]  # of the last block and of what comes into it
        work = FLOAT32 if self.float32_convolutions else size  # of what a convolution sees and makes
        cast = work if work > size else 0
        if self.vae == "flux":
            # First convolution: input, input normalised, result. Second: input, hidden, hidden normalised, result.
            first = 2 * inner * size + inner * cast + outer * work
            second = (inner + 2 * outer) * size + outer * cast + outer * work
            return max(first, second) * pixels
        if frames == 1:
            # Normalising: input, input in float32, result in float32. Convolution: input, two padded copies, result;
            # and where it is in another dtype, what is cast.
            before_cast = inner * size if cast else 0
            return (inner * size + max(2 * inner * FLOAT32, (2 * inner + outer) * work + before_cast)) * pixels
        # First convolution of the block: input and result; a window of a few padded frames with two of history, and
        # what comes of it. A CPU takes fewer frames, and the same again in its kernels' layout.
        on_gpu = min(frames, LEAST_FRAMES_ON_GPU)
        on_cpu = min(frames, max(LEAST_FRAMES_AT_ONCE, ELEMENTS_AT_ONCE // (inner * pixels)))
        window = max(times * ((few + 2) * inner + few * outer) for times, few in ((1, on_gpu), (2, on_cpu)))
        return ((inner + outer) * frames * size + window * work) * pixels

    def peak_bytes(self, tile: int) -> int:
        """Bytes besides the weights at the peak of decoding all of it, in squares of `tile` pixels.

        To a tile's own peak comes what holds the pixels that are already there.
        """
        width, height = min(tile, self.width), min(tile, self.height)
        frames = min(self.num_frames, WINDOW_FRAMES)
        finished = 0  # for every axis that is cut, what its tiles are blended into
        if frames < self.num_frames:
            finished += self.num_frames * self.width * self.height
        if height < self.height:
            finished += frames * self.width * self.height
        if width < self.width:
            finished += frames * self.width * height
        return self.tile_bytes(width, height, frames) + RGB * finished * self.element_size

    def num_tiles(self, tile: int) -> int:
        """How many squares of `tile` pixels it takes to cover a frame."""
        stride = tile - min(self.overlap, tile // 2)
        across, down = (1 + max(0, math.ceil((side - tile) / stride)) for side in (self.width, self.height))
        return across * down

    def work(self, tile: int) -> float:
        """Pixels that are decoded in squares of `tile` pixels, over those that are wanted."""
        return self.num_tiles(tile) * min(tile, self.width) * min(tile, self.height) / (self.width * self.height)

    @functools.lru_cache(maxsize=1024)  # noqa: B019  (of small frozen values)
    def tile_within(self, budget: float, spatial_tile: int) -> int:
        """The side of the tiles for a peak of at most `budget` bytes: `spatial_tile`, or a multiple of 64 below it.

        Of those that fit it is one with the fewest tiles, and of these the one with the least work: tiles are always
        complete, so those that are larger than they need to be decode more twice. Where none fits, it is the smallest.
        """
        below = range((spatial_tile - 1) // TILE_STEP * TILE_STEP, SMALLEST_TILE - 1, -TILE_STEP)
        tiles = [spatial_tile, *below]
        fitting = [tile for tile in tiles if self.peak_bytes(tile) <= budget]
        return min(fitting, key=lambda tile: (self.num_tiles(tile), self.work(tile)), default=tiles[-1])

    def smaller_tile(self, tile: int) -> int | None:
        """What to try next where `tile` took too much memory, at most about half its area; None if it was the smallest.

        Chosen as `tile_within` chooses for a budget, so that what a plan counts with is what decoding comes to.
        """
        largest_side = -(-max(self.width, self.height) // TILE_STEP) * TILE_STEP
        cut = min(tile, largest_side)
        smaller = max(cut * 3 // 4 // TILE_STEP * TILE_STEP, SMALLEST_TILE)
        return self.tile_within(self.peak_bytes(smaller), smaller) if smaller < cut else None
