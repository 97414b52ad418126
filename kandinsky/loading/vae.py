"""Either VAE out of its folder."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kandinsky.checkpoints.dit_layout import check_floats
from kandinsky.checkpoints.files import find_weights, folder_of
from kandinsky.checkpoints.headers import read_header
from kandinsky.checkpoints.tiny_decoder import KINDS, tiny_layout
from kandinsky.common.untrusted import read_json
from kandinsky.loading.devices import convolves_in_float32
from kandinsky.loading.weights import load_weights, read_tensors
from kandinsky.models.numerics import aligned
from kandinsky.models.vae_flux import AutoencoderKL
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
from kandinsky.models.vae_tiny import TinyDecoder


def load_vae(
    path: str | Path, device: torch.device | str, dtype: torch.dtype, name: str = "hunyuan", read: bool = True
) -> AutoencoderKLHunyuanVideo | AutoencoderKL:
    """A VAE from a folder, or a file with config.json beside it: the video VAE ("hunyuan") or the image one ("flux").

    read: False leaves the weights in the checked file and the VAE on the meta device, made for `device` in all else.

    Raises ValueError for damaged files and for the other VAE's.
    """
    path = Path(path)
    files = find_weights(path)
    for file in files:
        check_floats(file, read_header(file))
    model = AutoencoderKL if name == "flux" else AutoencoderKLHunyuanVideo
    with torch.device("meta"):
        vae: AutoencoderKLHunyuanVideo | AutoencoderKL = model(
            **known_arguments(model, folder_of(path) / "config.json")
        )
    load_weights(vae, files, device if read else "meta", lambda name, tensor: dtype)
    # The layout that convolutions are fastest in: measured on CPUs, by cuDNN's documentation on GPUs with tensor cores.
    memory_format = torch.channels_last if name == "flux" else torch.channels_last_3d
    vae.to(memory_format=memory_format)  # type: ignore[call-overload]
    if isinstance(vae, AutoencoderKLHunyuanVideo) and torch.device(device).type == "cpu":
        vae.convolve_by_frame()  # CPUs have fast kernels for 2-D convolutions only, GPUs for both
    vae.convolve_in_float32(convolves_in_float32(dtype, torch.device(device)))
    return vae


def load_tiny_decoder(path: Path, device: torch.device, dtype: torch.dtype, name: str = "hunyuan") -> TinyDecoder:
    """A tiny decoder of the latents of the VAE of that name, "hunyuan" or "flux", from its file.

    On a CPU without arithmetic in `dtype` in float32: it is small. Raises ValueError as `tiny_layout` does.
    """
    layout = tiny_layout(read_header(path), KINDS[name], path)
    dtype = torch.float32 if convolves_in_float32(dtype, device) else dtype
    with torch.device("meta"):
        decoder = TinyDecoder(layout.kind, layout.widths)
    state = {
        layout.names[name]: aligned(tensor.to(device=device, dtype=dtype))
        for name, tensor in read_tensors([path])
        if name in layout.names
    }
    decoder.load_state_dict(state, strict=True, assign=True)
    decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return decoder.eval().requires_grad_(False)


def known_arguments(model: Callable[..., Any], config_file: Path) -> dict[str, Any]:
    """The entries of a published config.json that are arguments of `model`; the rest is other software's business."""
    try:
        values = read_json(config_file)
    except ValueError as error:
        raise ValueError(f"{error}; download it again") from None
    return {name: values[name] for name in inspect.signature(model).parameters if name in values}
