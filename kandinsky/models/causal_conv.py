"""Causal 3-D convolution for videos: a few frames at a time, on CPUs as 2-D convolutions where those are faster.

Causal in time: frame t sees frames <= t. Without autograd a large tensor goes through what comes before a convolution,
padding and the convolution a few frames at a time (`padded_windows`), so that beside a layer's input and output only
those few frames exist. How many depends on the tensor's size, and on whether caches or launches count where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kandinsky.common.limits import (
    ELEMENTS_AT_ONCE,
    GPU_BYTES_AT_ONCE,
    LEAST_FRAMES_AT_ONCE,
    LEAST_FRAMES_ON_GPU,
)
from kandinsky.models.numerics import upcast

# A 3-D convolution on a CPU is not given to oneDNN up to this size of its input: batch x channels x frames x rows.
SMALLEST_FOR_ONEDNN = 20480

# What becomes of any stretch of a video's frames (B, C, T', H, W) before they are convolved. Without autograd it is
# written to a second tensor of that shape, which may have another dtype and is part of a larger one.
FrameOperation = Callable[..., Tensor]


def frames_at_once(x: Tensor) -> int:
    """How many frames of x (B, C, T, H, W) a layer works on at a time. Autograd keeps everything anyway: all."""
    frames = x.shape[2]
    if torch.is_grad_enabled():
        return frames
    if x.device.type == "cuda":
        return max(LEAST_FRAMES_ON_GPU, GPU_BYTES_AT_ONCE * frames // (x.numel() * x.element_size()))
    return max(LEAST_FRAMES_AT_ONCE, ELEMENTS_AT_ONCE * frames // x.numel())


def unchanged(frames: Tensor, out: Tensor | None = None) -> Tensor:
    return frames if out is None else out.copy_(frames)


def padded_windows(
    x: Tensor, prepare: FrameOperation, border: int, taps: int, stride: int = 1, dtype: torch.dtype | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """Stretches (begin, end, window) of a causal convolution's output frames, and the frames that they are made from.

    A window is what is left to be convolved without padding, in `dtype`: the frames that a stretch's first output sees
    of the past, then its own, `prepare`d, all with `border` repeated pixels on each side. The past of the very first
    frame is taps - 1 times that frame.

    All windows are the same memory, in x's format: the last frames of one are moved to its beginning and are the past
    of the next, whose own frames are written behind them. So a window is to be used before the next one is asked for.
    """
    batch, channels, frames_in, rows, columns = x.shape
    frames_out = (frames_in - 1) // stride + 1
    step = min(frames_at_once(x), frames_out)
    dtype = dtype or x.dtype
    if taps == 1 and border == 0 and prepare is unchanged:  # a window would be a copy
        for begin in range(0, frames_out, step):
            yield begin, min(begin + step, frames_out), x[:, :, begin : begin + step].to(dtype)
        return
    longest = taps + stride * (step - 1)
    memory = new_video(x, (batch, channels, longest, rows + 2 * border, columns + 2 * border), dtype)
    length = 0
    for begin in range(0, frames_out, step):
        end = min(begin + step, frames_out)
        frames = x[:, :, stride * (begin - 1) + 1 if begin else 0 : stride * (end - 1) + 1]
        past = taps - stride if begin else taps - 1
        if begin:
            for frame in range(past):
                memory[:, :, frame] = memory[:, :, length - past + frame]
        length = past + frames.shape[2]
        prepare(frames, memory[:, :, past:length, border : border + rows, border : border + columns])
        repeat_border(memory[:, :, past:length], border)
        if not begin:
            memory[:, :, :past] = memory[:, :, past : past + 1]
        yield begin, end, memory[:, :, :length]


def repeat_border(window: Tensor, border: int) -> None:
    """Write the outermost pixels of what is `border` pixels inside of a window (B, C, T, H, W) to all around it."""
    for i in range(border):
        window[..., i, :] = window[..., border, :]
        window[..., -1 - i, :] = window[..., -1 - border, :]
    for i in range(border):
        window[..., i] = window[..., border]
        window[..., -1 - i] = window[..., -1 - border]


def padded(x: Tensor, border: int, past: int) -> Tensor:
    """x (B, C, T, H, W) with `border` repeated pixels on each side in space and `past` repeated first frames.

    For autograd. The gradient of replicating three axes at once corrupts memory for channels-last tensors on a CPU
    (torch 2.13); these two steps have none.
    """
    pictures = F.pad(rearrange(x, "b c t h w -> (b t) c h w"), (border,) * 4, mode="replicate")
    x = rearrange(pictures, "(b t) c h w -> b c t h w", t=x.shape[2])
    return torch.cat((*[x[:, :, :1]] * past, x), dim=2)


def convolve(window: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], by_frame: bool) -> Tensor:
    """3-D convolution without padding; with `by_frame` as one 2-D convolution per time tap, added up."""
    if not by_frame:
        return F.conv3d(window, weight, bias, tuple(stride))
    stride_time, *stride_space = stride
    taps = weight.shape[2]
    frames = (window.shape[2] - taps) // stride_time + 1
    out = None
    for tap in range(taps):
        seen = window[:, :, tap : tap + stride_time * (frames - 1) + 1 : stride_time]
        pictures = rearrange(seen, "b c t h w -> (b t) c h w")
        part = F.conv2d(pictures, weight[:, :, tap], bias if tap == 0 else None, stride_space)
        if out is None:
            out = part
        elif torch.is_grad_enabled():
            out = out + part
        else:
            out.add_(part)
    assert out is not None
    return rearrange(out, "(b t) c h w -> b c t h w", t=frames)


def new_video(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor of `shape` and `dtype`, its device and memory format as `like`'s."""
    channels_last = like.is_contiguous(memory_format=torch.channels_last_3d)
    memory_format = torch.channels_last_3d if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype, device=like.device, memory_format=memory_format)


class CausalConv3d(nn.Module):
    """Convolution that pads by repeating the border: both sides in space, only the past in time.

    With `by_frame` every time tap is a 2-D convolution and the taps are added up: the same sum in another order. With
    `in_float32` the products are float32's, of the few frames that it works on at a time; what comes in, what goes out
    and the weights keep their dtype.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: tuple[int, int, int] = (1, 1, 1)):
        super().__init__()
        self.border = kernel // 2
        self.by_frame = False
        self.for_cpu = False
        self.in_float32 = False
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride)

    def forward(
        self,
        x: Tensor,
        prepare: FrameOperation = unchanged,
        out: Tensor | None = None,
        add: Callable[[int, int], Tensor] | None = None,
    ) -> Tensor:
        """(B, C, T, H, W) -> (B, C', ceil(T / stride), ...) of prepare(x).

        `out` is memory that the result may be written to, x itself where their shapes agree. add(begin, end) gives what
        is added to these frames of the result.
        """
        weight, bias, stride = self.conv.weight, self.conv.bias, self.conv.stride
        dtype = self.dtype_inside(x)
        if x.shape[2] == 1:
            # The only frame is its own past: all taps see the same picture, so their sum is one tap.
            weight = upcast(weight).sum(2, keepdim=True)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        taps, frames_out = weight.shape[2], (x.shape[2] - 1) // stride[0] + 1
        if torch.is_grad_enabled():
            window = padded(prepare(x).to(dtype), self.border, taps - 1)
            result = convolve(window, weight, bias, stride, self.is_by_frame(window)).to(x.dtype)
            return result if add is None else result + add(0, frames_out)
        for begin, end, window in padded_windows(x, prepare, self.border, taps, stride[0], dtype):
            part = convolve(window, weight, bias, stride, self.is_by_frame(window))
            if end - begin == frames_out:
                return (part if add is None else part.add_(add(begin, end))).to(x.dtype)
            if out is None:
                out = new_video(part, (*part.shape[:2], frames_out, *part.shape[3:]), x.dtype)
            if add is None:
                out[:, :, begin:end] = part
            else:
                torch.add(part, add(begin, end), out=out[:, :, begin:end])
            del part  # before the next one is made
        assert out is not None
        return out

    def dtype_inside(self, x: Tensor) -> torch.dtype:
        """What products of x are computed in."""
        return torch.float32 if self.in_float32 else x.dtype

    def is_by_frame(self, window: Tensor) -> bool:
        if torch.is_grad_enabled():
            return self.for_cpu
        return self.by_frame or (self.for_cpu and window.shape[:4].numel() <= SMALLEST_FOR_ONEDNN)
