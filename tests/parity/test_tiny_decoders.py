"""The tiny decoders against public definitions: TAESD against diffusers, TAEHV against a transcription of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from kandinsky.checkpoints.tiny_decoder import expected_tiny_shapes, parameters
from kandinsky.loading.vae import load_tiny_decoder
from kandinsky.models.vae_tiny import FLUX_SHIFT

CPU = torch.device("cpu")


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (2 / max(1, torch.Size(shape[1:]).numel())) ** 0.5
        for name, shape in shapes.items()
    }


def taehv(weights: dict[str, Tensor], latents: Tensor) -> Tensor:
    """TAEHV's decoder, all frames at once: latents (N, T, C, h, w) -> (N, 4 T - 3, 3, 8 h, 8 w) in 0..1.

    Everything that has to do with time is a matter of how the frames lie in the batch. After `taehv.py` of
    github.com/madebyollin/taehv.
    """

    def conv(name: str, x: Tensor) -> Tensor:
        weight = weights[f"decoder.{name}.weight"]
        return F.conv2d(x, weight, weights.get(f"decoder.{name}.bias"), padding=weight.shape[-1] // 2)

    samples, x = len(latents), latents.flatten(0, 1)

    def memory_block(index: int, x: Tensor) -> Tensor:
        videos = x.unflatten(0, (samples, -1))
        before = torch.cat((torch.zeros_like(videos[:, :1]), videos[:, :-1]), dim=1).flatten(0, 1)
        y = torch.cat((x, before), dim=1)
        for part in (0, 2, 4):
            y = conv(f"{index}.conv.{part}", y if part == 0 else F.relu(y))
        return F.relu(y + x)

    x = F.relu(conv("1", 3 * torch.tanh(x / 3)))
    for blocks, grow, times, out in (((3, 4, 5), 7, 1, 8), ((9, 10, 11), 13, 2, 14), ((15, 16, 17), 19, 2, 20)):
        for index in blocks:
            x = memory_block(index, x)
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        channels = x.shape[1]
        x = conv(f"{grow}.conv", x).reshape(-1, channels, *x.shape[2:])
        assert len(x) % times == 0
        x = conv(str(out), x)
    return conv("22", F.relu(x)).unflatten(0, (samples, -1))[:, 3:]


@pytest.mark.parametrize("widths", [(12, 8, 6, 4), (256, 128, 64, 64)])
def test_taehv(widths: tuple[int, ...], tmp_path: Path) -> None:
    """From a file as the public one is: with an encoder, which is not looked at."""
    weights = random_weights(expected_tiny_shapes("video", widths))
    save_file({**weights, "encoder.0.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "taehv.safetensors")
    decoder = load_tiny_decoder(tmp_path / "taehv.safetensors", CPU, torch.float32)
    latents = torch.randn(2, 16, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = decoder.decode(latents)
        wanted = taehv(weights, latents.transpose(1, 2)).transpose(1, 2) * 2 - 1
    assert found.shape == (2, 3, 9, 32, 48)
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_published_size_of_taehv() -> None:
    """Its file has 11,315,539 parameters; those that are not the decoder's are its encoder's."""

    def conv(inputs: int, outputs: int, taps: int = 9, bias: bool = True) -> int:
        return inputs * outputs * taps + (outputs if bias else 0)

    block = conv(128, 64) + 2 * conv(64, 64)
    levels = sum(conv(64 * frames, 64, 1, False) + conv(64, 64, 9, False) + 3 * block for frames in (2, 2, 1))
    assert parameters("video") + conv(3, 64) + levels + conv(64, 16) == 11_315_539


@pytest.mark.parametrize("names", ["diffusers", "original"])
def test_taesd(names: str, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    theirs = AutoencoderTiny(latent_channels=16).eval()
    weights = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    if names == "original":  # the decoder alone, and the clamp in front of it counted
        layers = {name.removeprefix("decoder.layers."): x for name, x in weights.items() if name.startswith("decoder.")}
        weights = {f"{int(name.partition('.')[0]) + 1}.{name.partition('.')[2]}": x for name, x in layers.items()}
    save_file(weights, tmp_path / "taef1.safetensors")
    ours = load_tiny_decoder(tmp_path / "taef1.safetensors", CPU, torch.float32, "flux")
    latents = torch.randn(2, 16, 5, 7)
    with torch.no_grad():
        wanted = theirs.decode(latents).sample
        found = ours.decode((latents + FLUX_SHIFT)[:, :, None])[:, :, 0]  # Kandinsky's latents have the shift
    assert found.shape == wanted.shape == (2, 3, 40, 56)
    assert float((found - wanted).abs().max()) <= 1e-5
