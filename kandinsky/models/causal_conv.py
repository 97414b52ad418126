"""Causal 3-D convolution for videos: a few frames at a time, on CPUs as 2-D convolutions where those are faster.

Causal in time: frame t sees frames <= t. Without autograd a large tensor goes through what comes before a convolution,
padding and the convolution a few frames at a time (`padded_windows`), so that beside a layer's input and output only
those few frames exist. How many depends on the tensor's size alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kandinsky.common.limits import ELEMENTS_AT_ONCE, LEAST_FRAMES_AT_ONCE
from kandinsky.models.numerics import upcast

# A 3-D convolution on a CPU is not given to oneDNN up to this size of its input: batch x channels x frames x rows.
SMALLEST_FOR_ONEDNN = 20480

FrameOperation = Callable[[Tensor], Tensor]  # of any stretch of a video's frames (B, C, T', H, W)


def frames_at_once(x: Tensor) -> int:
    """How many frames of x (B, C, T, H, W) a layer works on at a time. Autograd keeps everything anyway: all."""
    if torch.is_grad_enabled():
        return x.shape[2]
    return max(LEAST_FRAMES_AT_ONCE, ELEMENTS_AT_ONCE * x.shape[2] // x.numel())


def unchanged(frames: Tensor) -> Tensor:
    return frames


def padded_windows(
    x: Tensor, prepare: FrameOperation, border: int, taps: int, stride: int = 1
) -> Iterator[tuple[int, int, Tensor]]:
    """Stretches (begin, end, window) of a causal convolution's output frames, and the frames that they are made from.

    A window is `prepare`d and padded by repetition: by `border` pixels in space, and at the very beginning by taps - 1
    frames in time, so that what is left to do is a convolution without padding.
    """
    frames_out = (x.shape[2] - 1) // stride + 1
    step = frames_at_once(x)
    history = x  # the prepared and padded frames that the next stretch shares with the last
    for begin in range(0, frames_out, step):
        end = min(begin + step, frames_out)
        window = prepare(x[:, :, stride * (begin - 1) + 1 if begin else 0 : stride * (end - 1) + 1])
        past = 0 if begin else taps - 1
        if border or past:
            window = repeat_border(window, border, past)
        if begin:
            window = torch.cat((history, window), dim=2)
        if end < frames_out:
            history = window[:, :, window.shape[2] - (taps - stride) :].clone()
        yield begin, end, window
        del window  # before the next one is made


def repeat_border(x: Tensor, border: int, past: int) -> Tensor:
    """x (B, C, T, H, W) with `border` repeated pixels on each side in space and `past` repeated first frames."""
    if not torch.is_grad_enabled():
        return F.pad(x, (border, border, border, border, past, 0), mode="replicate")
    # The gradient of that corrupts memory for channels-last tensors on a CPU (torch 2.13); these two steps have none.
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

    def forward(self, x: Tensor, prepare: FrameOperation = unchanged, out: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) -> (B, C', ceil(T / stride), ...) of prepare(x).

        `out` is memory that the result may be written to, x itself where their shapes agree.
        """
        weight, bias, stride = self.conv.weight, self.conv.bias, self.conv.stride
        dtype = self.dtype_inside(x)
        if x.shape[2] == 1:
            # The only frame is its own past: all taps see the same picture, so their sum is one tap.
            weight = upcast(weight).sum(2, keepdim=True)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        frames_out = (x.shape[2] - 1) // stride[0] + 1
        frames_in = padded_windows(x, lambda frames: prepare(frames).to(dtype), self.border, weight.shape[2], stride[0])
        for begin, end, window in frames_in:
            part = convolve(window, weight, bias, stride, self.is_by_frame(window))
            del window
            if part.shape[2] == frames_out:
                return part.to(x.dtype)
            if out is None:
                out = new_video(part, (*part.shape[:2], frames_out, *part.shape[3:]), x.dtype)
            out[:, :, begin:end] = part
        assert out is not None
        return out

    def dtype_inside(self, x: Tensor) -> torch.dtype:
        """What products of x are computed in."""
        return torch.float32 if self.in_float32 else x.dtype

    def is_by_frame(self, window: Tensor) -> bool:
        if torch.is_grad_enabled():
            return self.for_cpu
        return self.by_frame or (self.for_cpu and window.shape[:4].numel() <= SMALLEST_FOR_ONEDNN)
