"""Trains the tiny decoders of the tiny checkpoints' latents, and writes them beside the VAEs that they stand for.

    python tools/train_tiny_decoders.py --task video    # assets/tiny/t2v/vae/tiny_decoder.safetensors, an hour
    python tools/train_tiny_decoders.py --task image    # assets/tiny/image/vae/tiny_decoder.safetensors
    python tools/train_tiny_decoders.py --task video --from_exported --lr 1e-3 --steps 1500    # for a VAE that changed

The layers are TAEHV's and TAESD's (kandinsky/models/vae_tiny.py), with so few channels that decoding takes less than a
twentieth of the VAE's operations. They learn to make what the VAE's own decoder makes, from latents of drawn clips and
pictures of combinations that are not held out. Each ends with how near it comes on ones that are: PSNR in dB. State is
kept in `.train` (ignored by git), and a second start goes on from there.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs without the project being installed

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from kandinsky.loading.vae import load_vae
from kandinsky.models.vae_flux import AutoencoderKL
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
from kandinsky.models.vae_tiling import VAETiling
from kandinsky.models.vae_tiny import TinyDecoder
from tools import tiny_world
from tools.tiny_training import optimizers_for, psnr, to_float, train, write_safetensors

log = logging.getLogger("train_tiny")
WIDTHS = {"video": (48, 24, 10, 8), "image": (20, 8, 5, 4)}
FOLDERS = {"video": Path("assets/tiny/t2v/vae"), "image": Path("assets/tiny/image/vae")}
FILE = "tiny_decoder.safetensors"
LATENT_NOISE = 0.05  # std: what a DiT makes is not exact
NUM_FRAMES = 25
SIZE = 128

VAE = AutoencoderKLHunyuanVideo | AutoencoderKL


def draw(task: str, count: int, size: int, rng: np.random.Generator, split: str = "train") -> Tensor:
    """uint8 pixels (count, 3, frames, size, size); of pictures one frame."""
    if task == "image":
        drawn = [tiny_world.render_picture(tiny_world.sample_picture(rng, split), size)[None] for _ in range(count)]
    else:
        drawn = [tiny_world.render(tiny_world.sample_scene(rng, split), NUM_FRAMES, size) for _ in range(count)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 4, 1, 2, 3)


@torch.no_grad()
def encode(vae: VAE, pixels: Tensor) -> Tensor:
    """uint8 (N, 3, T, H, W) -> scaled latents (N, C, T', h, w), of videos in the windows of the published pipeline."""
    parts = []
    for one in pixels.split(1):
        x = to_float(one).to(next(vae.parameters()))
        is_video = isinstance(vae, AutoencoderKLHunyuanVideo)
        posterior = vae.encode(x, VAETiling()) if is_video else vae.encode(x[:, :, 0])
        mean = posterior.mode() if is_video else posterior.mode()[:, :, None]
        parts.append(mean.float() * vae.scaling_factor)
    return torch.cat(parts)


@torch.no_grad()
def decode(vae: VAE, latents: Tensor) -> Tensor:
    """Scaled latents (1, C, T', h, w) -> pixels (1, 3, T, H, W) in [-1, 1], by the VAE's own decoder."""
    z = (latents / vae.scaling_factor).to(next(vae.parameters()))
    if isinstance(vae, AutoencoderKLHunyuanVideo):
        return vae.decode(z, VAETiling()).float().clamp(-1, 1)
    return vae.decode(z[:, :, 0])[:, :, None].float().clamp(-1, 1)


@torch.no_grad()
def agreement(tiny: TinyDecoder, vae: VAE, latents: Tensor) -> list[float]:
    """PSNR in dB of each output of `tiny` against the VAE's own decoder."""
    return [psnr(tiny.decode(z).clamp(-1, 1), decode(vae, z)) for z in latents.split(1)]


@torch.no_grad()
def start_loud(tiny: TinyDecoder) -> None:
    """Weights at which what goes in keeps its size, blocks aside: with PyTorch's own it takes hundreds of steps."""
    for name, weight in tiny.named_parameters():
        if weight.dim() == 4:
            torch.nn.init.kaiming_normal_(weight)
            if name.endswith("conv.4.weight"):  # the last of a block
                weight.mul_(0.2)
        else:
            weight.zero_()
    last = tiny.decoder[-1]
    assert isinstance(last, torch.nn.Conv2d) and last.bias is not None
    last.weight.mul_(0.1)
    last.bias.fill_(0.5)  # grey


def prepare(file: Path, vae: VAE, task: str, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Latents (N, C, T', h, w) and what the VAE's own decoder makes of them, uint8 (N, 3, T, H, W); kept in `file`."""
    if not file.exists():
        log.info("encoding and decoding %d", count)
        latents = [encode(vae, draw(task, 1, SIZE, rng)) for _ in range(count)]
        pixels = [decode(vae, z).add(1).mul(127.5).round().to(torch.uint8) for z in latents]
        temporary = file.with_suffix(".tmp")
        torch.save((torch.cat(latents), torch.cat(pixels)), temporary)
        temporary.replace(file)
    latents, pixels = torch.load(file)
    return latents, pixels


def crop(z: Tensor, x: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A quarter of a picture: its latents, its pixels, and 1 where these can be told from those, else 0.

    Where it was cut, the VAE saw what lies beyond, so that a border of one latent there is not learnt from.
    """
    side = z.shape[-1] // 2
    top, left = (int(i) for i in rng.integers(0, z.shape[-1] - side + 1, 2))
    known = torch.ones(side, side)
    known[0] *= top == 0
    known[-1] *= top + side == z.shape[-1]
    known[:, 0] *= left == 0
    known[:, -1] *= left + side == z.shape[-1]
    z = z[..., top : top + side, left : left + side]
    x = x[..., 8 * top : 8 * (top + side), 8 * left : 8 * (left + side)]
    return z, x, known.repeat_interleave(8, 0).repeat_interleave(8, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--task", choices=tuple(WIDTHS), required=True)
    parser.add_argument("--steps", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument("--clips", type=int, help="to learn from; default: 256 videos, 1024 pictures")
    parser.add_argument("--batch", type=int, help="default: 2 videos, 8 pictures")
    parser.add_argument("--lr", type=float, default=3e-3, help="Muon's (default: %(default)s)")
    parser.add_argument("--from_exported", action="store_true", help="go on with the file that is there")
    parser.add_argument("--state", type=Path, default=Path(".train/tiny_decoders"))
    parser.add_argument("--held_out", type=int, default=8, help="outputs to measure with (default: %(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args.state.mkdir(parents=True, exist_ok=True)
    is_video = args.task == "video"
    clips, batch = args.clips or (256 if is_video else 1024), args.batch or (2 if is_video else 8)

    vae = load_vae(FOLDERS[args.task], "cpu", torch.bfloat16, "hunyuan" if is_video else "flux")
    rng = np.random.default_rng(3)
    latents, pixels = prepare(args.state / f"examples_{args.task}_{clips}.pt", vae, args.task, clips, rng)
    unseen = encode(vae, draw(args.task, args.held_out, SIZE, np.random.default_rng(0), "test"))

    torch.manual_seed(0)
    tiny = TinyDecoder("video" if is_video else "image", WIDTHS[args.task])
    if args.from_exported:
        tiny.load_state_dict(load_file(FOLDERS[args.task] / FILE))
    else:
        start_loud(tiny)
    tiny.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(step: int) -> Tensor:
        chosen = torch.from_numpy(rng.integers(0, clips, batch))
        z, x, known = crop(latents[chosen], to_float(pixels[chosen]), rng)
        out = tiny.decode(z + LATENT_NOISE * float(torch.rand(())) * torch.randn_like(z))
        # The object is a tenth of the picture and most of what matters in it.
        weight = known * (1 + 2 * ((x - x[..., :1, :1]).abs().amax(1, keepdim=True) > 0.1).float())
        return ((out - x).square().mean(1, keepdim=True) * weight).sum() / weight.sum()

    def evaluate(model: torch.nn.Module) -> str:
        return f"{np.mean(agreement(tiny, vae, unseen[:2])):.2f} dB"

    optimizers = optimizers_for(tiny, args.lr, args.lr)
    train(f"tiny_{args.task}", args.state, tiny, optimizers, loss, args.steps, 0.99, evaluate=evaluate)
    values = agreement(tiny, vae, unseen)
    log.info("against the VAE's own decoder, held out: mean %.2f dB, worst %.2f dB", np.mean(values), min(values))
    file = FOLDERS[args.task] / FILE
    write_safetensors(tiny.state_dict(), file)
    log.info("wrote %s, %.0f kB", file, file.stat().st_size / 1e3)


if __name__ == "__main__":
    main()
