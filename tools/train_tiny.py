"""Train the tiny text-to-video checkpoint that ships in `assets/`, from nothing, on clips that our own code draws.

    python tools/train_tiny.py vae       # 3-D VAE: single frames, then 17-frame windows, then the decoder alone
    python tools/train_tiny.py text      # Qwen2.5-VL and CLIP in small, taught to tell the captions apart
    python tools/train_tiny.py latents --size 64 ; python tools/train_tiny.py latents --size 128   # clips encoded
    python tools/train_tiny.py dit       # the diffusion transformer, flow matching on small, then on full-size clips
    python tools/train_tiny.py export    # write assets/tiny/t2v/{model,vae,text_encoder,text_encoder2}

Every stage keeps its state in `.train/tiny` (ignored by git), saves it about once a minute and goes on from there
when it is started again. The modules that are trained are the package's own: the files that `export` writes load
through the same code as the published 2B and 19B checkpoints.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs without the project being installed

from kandinsky.config import Config, load_config
from kandinsky.loading import KEEP_PRECISION, load_dit, load_vae
from kandinsky.models.dit import DiffusionTransformer3D
from kandinsky.models.text_embedder import TextEmbedder, load_text_embedder
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo, VAETiling
from tools import tiny_world
from tools.make_tiny_text_encoders import make_text_encoders, save_text_encoders

log = logging.getLogger("train_tiny")
NUM_FRAMES = 25
SIZE = 128
VAE_CONFIG: dict[str, Any] = dict(block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8)
VALUES = (tuple(tiny_world.SHAPES), tuple(tiny_world.COLOURS), tuple(tiny_world.MOTIONS), tuple(tiny_world.BACKGROUNDS))
LATENT_NOISE = 0.1  # std of the noise on the latent mean, in place of a KL term; also the exported posterior's std


# --- a resumable training loop ---------------------------------------------------------------------------------------


def train(
    name: str,
    state_dir: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    loss_fn: Callable[[int], Tensor],
    steps: int,
    ema_decay: float = 0.0,
    warmup: int = 50,
    evaluate: Callable[[nn.Module], str] | None = None,
) -> nn.Module:
    """Run `loss_fn(step).backward()` for `steps` steps with a warm-up and a cosine to zero; resume where it stopped.

    Returns the model; with `ema_decay`, holding the exponential moving average of its weights.
    """
    path = state_dir / f"{name}.pt"
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()} if ema_decay else {}
    peak_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    first = 0
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        ema = state["ema"]
        first = state["step"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        log.info("%s: going on from step %d", name, first)

    def save(step: int) -> None:
        temporary = path.with_suffix(".tmp")
        state = {"model": model.state_dict(), "ema": ema, "step": step}
        torch.save({**state, "optimizers": [o.state_dict() for o in optimizers]}, temporary)
        temporary.replace(path)

    begin = saved_at = time.monotonic()
    running = 0.0
    for step in range(first, steps):
        factor = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for optimizer, rates in zip(optimizers, peak_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss = loss_fn(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        if ema_decay:
            decay = min(ema_decay, (step + 1) / (step + 10))
            for k, v in model.state_dict().items():
                ema[k].lerp_(v, 1 - decay)
        value = loss.item()
        running = value if step == first else 0.98 * running + 0.02 * value
        if (step + 1) % 50 == 0:
            seconds = (time.monotonic() - begin) / (step + 1 - first)
            log.info("%s %d/%d loss %.5f, %.2f s a step", name, step + 1, steps, running, seconds)
        if evaluate and (step + 1) % 200 == 0:
            log.info("%s %d: %s", name, step + 1, evaluate(model))
        if time.monotonic() - saved_at > 60 or step + 1 == steps:
            save(step + 1)
            saved_at = time.monotonic()
    if ema_decay:
        model.load_state_dict(ema)
    return model


class MatrixMuon(torch.optim.Muon):
    """torch's Muon for linear layers and convolutions: it sees a kernel as the matrix (outputs, everything else).

    On the VAE it got as far in 150 steps as AdamW in 1,500.
    """

    def __init__(self, weights: list[nn.Parameter], lr: float) -> None:
        self.weights = weights
        # Views of the same memory, so that a step on them is a step on the weights.
        self.matrices = [nn.Parameter(self._as_matrix(w.data)) for w in weights]
        super().__init__(self.matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    @staticmethod
    def _as_matrix(x: Tensor) -> Tensor:
        # Channels last, because that is how the kernels lie in memory.
        return x.permute(0, 2, 3, 4, 1).flatten(1) if x.dim() == 5 else x

    def step(self, closure: Any = None) -> None:
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            assert matrix.data_ptr() == weight.data_ptr()
            matrix.grad = None if weight.grad is None else self._as_matrix(weight.grad)
        super().step()


def optimizers_for(
    model: nn.Module, muon_lr: float, adamw_lr: float, use_muon: Callable[[str], bool]
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and kernels whose name `use_muon` accepts, AdamW for everything else."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    weights = [p for n, p in trained.items() if p.dim() >= 2 and use_muon(n)]
    chosen = {id(p) for p in weights}
    others = [p for p in trained.values() if id(p) not in chosen]
    return [MatrixMuon(weights, muon_lr), torch.optim.AdamW(others, adamw_lr, betas=(0.9, 0.98), weight_decay=0.0)]


# --- data ------------------------------------------------------------------------------------------------------------


def draw_clips(scenes: Iterable[tiny_world.Scene], size: int = SIZE) -> Tensor:
    """uint8 clips (N, 3, frames, size, size)."""
    clips = [torch.from_numpy(tiny_world.render(scene, NUM_FRAMES, size)) for scene in scenes]
    return torch.stack(clips).permute(0, 4, 1, 2, 3).contiguous()


def training_scenes(per_combination: int, seed: int) -> list[tiny_world.Scene]:
    rng = np.random.default_rng(seed)
    return [tiny_world.scene_for(a, rng) for _ in range(per_combination) for a in tiny_world.train_combinations()]


def to_float(clips: Tensor) -> Tensor:
    return clips.float() / 127.5 - 1


# --- VAE -------------------------------------------------------------------------------------------------------------


def new_vae() -> AutoencoderKLHunyuanVideo:
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(**VAE_CONFIG)
    vae.convolve_by_frame()
    return vae


def psnr(a: Tensor, b: Tensor) -> float:
    """Of images in [-1, 1], in dB."""
    return float(10 * torch.log10(4 / (a.float() - b.float()).square().mean()))


@torch.no_grad()
def reconstruction_psnr(vae: nn.Module, clips: Tensor) -> float:
    """Mean over whole clips, encoded and decoded through the published 17-frame windows."""
    assert isinstance(vae, AutoencoderKLHunyuanVideo)
    values = []
    for clip in clips:
        x = to_float(clip)[None]
        with torch.autocast("cpu", torch.bfloat16):
            out = vae.decode(vae.encode(x, VAETiling()).mode(), VAETiling())
        values.append(psnr(out.clamp(-1, 1), x))
    return float(np.mean(values))


def stage_vae(args: argparse.Namespace) -> None:
    """Single frames, then 17-frame windows, then the decoder alone: the latents may be in use by then."""
    rng = np.random.default_rng(1)
    log.info("drawing clips")
    scenes = training_scenes(1, seed=1)
    small, clips = draw_clips(scenes, SIZE // 2), draw_clips(scenes)
    held_out = draw_clips(tiny_world.sample_scene(rng, "test") for _ in range(8))

    def batch(clips: Tensor, count: int, frames: int) -> Tensor:
        """`count` random pieces of `frames` frames, every second one played backwards."""
        pieces = []
        for _ in range(count):
            i, t = rng.integers(len(clips)), rng.integers(0, NUM_FRAMES - frames + 1)
            piece = clips[i, :, t : t + frames]
            pieces.append(piece.flip(1) if rng.random() < 0.5 else piece)
        return to_float(torch.stack(pieces))

    def loss_on(vae: AutoencoderKLHunyuanVideo, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(vae.quant_conv.weight.requires_grad):
                mean = vae.encode(x).mode()
            out = vae.decode(mean + LATENT_NOISE * torch.randn_like(mean))
        # The object is a tenth of the picture and most of what matters in it.
        weight = 1 + ((x - x[..., :1, :1]).abs().amax(1, keepdim=True) > 0.1).float()
        error = (out.float() - x) * (weight / weight.mean()).sqrt()
        # A little absolute error keeps edges sharp; the penalty keeps the latents near unit scale.
        return error.square().mean() + 0.1 * error.abs().mean() + 1e-3 * (mean.float().square().mean() - 1).relu()

    def images(step: int) -> Tensor:
        return loss_on(vae, batch(small, 16, 1) if step < 0.7 * args.image_steps else batch(clips, 8, 1))

    def windows(step: int) -> Tensor:
        if step % 5 == 4:
            return loss_on(vae, batch(clips, 8, 1))
        return loss_on(vae, batch(small, 2, 17) if step < 0.97 * args.clip_steps else batch(clips, 1, 17))

    def decoder_windows(step: int) -> Tensor:
        return loss_on(vae, batch(small, 2, 17) if step < 0.9 * args.decoder_steps else batch(clips, 1, 17))

    vae = new_vae()
    for name, loss, steps, rate, judged in (
        ("vae_images", images, args.image_steps, 1e-3, held_out[:, :, 12:13]),
        ("vae", windows, args.clip_steps, 1e-3, held_out),
        ("vae_decoder", decoder_windows, args.decoder_steps, 5e-4, held_out),
    ):
        if name == "vae_decoder":
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)

        def report(model: nn.Module, judged: Tensor = judged) -> str:
            return f"held out {reconstruction_psnr(model, judged):.2f} dB"

        train(
            name, args.state, vae, optimizers_for(vae, rate, rate, lambda _: True), loss, steps, 0.99, evaluate=report
        )


# --- text encoders ---------------------------------------------------------------------------------------------------


def training_captions() -> dict[tiny_world.Attributes, list[str]]:
    """Every wording of every combination that is not held out."""
    captions: dict[tiny_world.Attributes, list[str]] = {a: [] for a in tiny_world.train_combinations()}
    for text in tiny_world.corpus():
        attributes = tiny_world.parse_caption(text)
        if attributes in captions:
            captions[attributes].append(text)
    return captions


def load_embedder(folder: Path, config: Config) -> TextEmbedder:
    encoders = config.model.text_embedder
    return load_text_embedder(
        folder / "text_encoder",
        folder / "text_encoder2",
        qwen_max_length=encoders.qwen.max_length,
        clip_max_length=encoders.clip.max_length,
        crop=encoders.qwen.crop,
        dtype=torch.float32,
    )


def trained_embedder(args: argparse.Namespace) -> TextEmbedder:
    """The text encoders of the `text` stage or, where there is no state of it, the exported ones."""
    folder = args.state / "text"
    if not folder.exists():
        log.info("no text encoders in %s: taking those in %s", args.state, args.out)
        folder = args.out
    return load_embedder(folder, load_config(args.config))


class AttributeHeads(nn.Module):
    """Linear read-outs of the four attributes from CLIP's pooled state and Qwen's last token; thrown away later."""

    def __init__(self, embedder: TextEmbedder, dim: int) -> None:
        super().__init__()
        self.embedder = embedder
        self.sizes = [len(names) for names in VALUES]
        self.from_pooled = nn.Linear(dim, sum(self.sizes))
        self.from_tokens = nn.Linear(dim, sum(self.sizes))

    def forward(self, texts: list[str], targets: Tensor) -> Tensor:
        out = self.embedder(texts)
        mask = torch.ones(out.text_embeds.shape[:2], dtype=torch.bool) if out.text_mask is None else out.text_mask
        last = out.text_embeds[torch.arange(len(texts)), mask.sum(1) - 1]
        losses = []
        for logits in (self.from_pooled(out.pooled_embeds), self.from_tokens(last)):
            parts = logits.split(self.sizes, dim=1)
            losses += [F.cross_entropy(part, target) for part, target in zip(parts, targets.T, strict=True)]
        return torch.stack(losses).mean()


def stage_text(args: argparse.Namespace) -> None:
    """Random frozen encoders would do, but the DiT learns several times faster from ones that separate the words."""
    folder = args.state / "text"
    captions = training_captions()
    texts = [(text, a) for a, wordings in captions.items() for text in wordings]
    if not folder.exists():
        make_text_encoders([text for text, _ in texts], folder, seed=0)
    embedder = load_embedder(folder, load_config(args.config)).requires_grad_(True)
    heads = AttributeHeads(embedder, embedder.qwen.config.hidden_size)
    rng = np.random.default_rng(2)

    def loss(step: int) -> Tensor:
        chosen = [texts[i] for i in rng.integers(0, len(texts), 48)]
        targets = [[values.index(name) for values, name in zip(VALUES, a, strict=True)] for _, a in chosen]
        return heads([text for text, _ in chosen], torch.tensor(targets))

    optimizer = torch.optim.AdamW(heads.parameters(), 1e-3)
    train("text", args.state, heads, [optimizer], loss, args.text_steps)
    save_text_encoders(embedder, folder)


# --- latents ---------------------------------------------------------------------------------------------------------


def trained_vae(args: argparse.Namespace) -> AutoencoderKLHunyuanVideo:
    """The VAE of the `vae` stage or, where there is no state of it, the exported one."""
    path = next((args.state / name for name in ("vae_decoder.pt", "vae.pt") if (args.state / name).exists()), None)
    if path is None:
        log.info("no VAE in %s: taking the one in %s", args.state, args.out)
        return load_vae(args.out / "vae", "cpu", torch.float32)
    vae = new_vae()
    vae.load_state_dict(torch.load(path)["ema"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def stage_latents(args: argparse.Namespace) -> None:
    """Unscaled latents of `--shards` files of training clips of `--size` pixels; files that exist are kept."""
    vae = trained_vae(args).bfloat16()
    combinations = tiny_world.train_combinations()
    for shard in range(args.first_shard, args.first_shard + args.shards):
        path = args.state / f"latents_{args.size}_{shard}.pt"
        if path.exists():
            continue
        rng = np.random.default_rng(100 + shard)
        chosen = rng.permutation(len(combinations))[: args.shard_clips]
        latents = []
        for i in chosen:
            clip = to_float(draw_clips([tiny_world.scene_for(combinations[i], rng)], args.size)).bfloat16()
            latents.append(vae.encode(clip, VAETiling()).mode().half())
        torch.save({"latents": torch.cat(latents), "combination": torch.from_numpy(chosen)}, path)
        log.info("latents of %d px: shard %d, %d clips", args.size, shard, len(latents))


@dataclass(frozen=True)
class LatentClips:
    """Training latents of one size (N, T, H, W, C), scaled, and the training combination that each one shows."""

    latents: Tensor
    combination: Tensor
    rotary_scale: tuple[float, float, float]

    @classmethod
    @cache
    def load(cls, state_dir: Path, size: int) -> LatentClips:
        shards = [torch.load(path) for path in sorted(state_dir.glob(f"latents_{size}_*.pt"))]
        latents = torch.cat([shard["latents"] for shard in shards]).permute(0, 2, 3, 4, 1).contiguous()
        log.info("%d px: %d clips of %s", size, len(latents), tuple(latents.shape[1:]))
        # Small clips get the positions that their patches have in a large one, so that what is learnt there holds.
        return cls(
            latents * latent_scale(state_dir),
            torch.cat([shard["combination"] for shard in shards]),
            (1.0, size / SIZE, size / SIZE),
        )


# --- diffusion transformer -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionTable:
    """Embeddings of every training caption, padded to one length; the last row is the empty prompt."""

    text: Tensor
    pooled: Tensor
    mask: Tensor
    rows: list[list[int]]  # for each training combination, in order, the rows of its wordings

    @classmethod
    def build(cls, embedder: TextEmbedder) -> CaptionTable:
        captions = training_captions()
        texts = [text for wordings in captions.values() for text in wordings] + [""]
        ends = np.cumsum([len(wordings) for wordings in captions.values()])
        rows = [list(range(end - len(w), end)) for end, w in zip(ends, captions.values(), strict=True)]
        parts = [embedder.encode(texts[i : i + 256]) for i in range(0, len(texts), 256)]
        length = max(part.text_embeds.shape[1] for part in parts)
        text, mask = [], []
        for part in parts:
            pad = length - part.text_embeds.shape[1]
            real = torch.ones(part.text_embeds.shape[:2], dtype=torch.bool)
            text.append(F.pad(part.text_embeds, (0, 0, 0, pad)))
            mask.append(F.pad(real if part.text_mask is None else part.text_mask, (0, pad)))
        return cls(torch.cat(text), torch.cat([part.pooled_embeds for part in parts]), torch.cat(mask), rows)


def stage_dit(args: argparse.Namespace) -> None:
    config = load_config(args.config)
    captions = CaptionTable.build(trained_embedder(args))

    torch.manual_seed(0)
    exported = args.out / "model" / "tiny_t2v.safetensors"
    if args.from_exported and not (args.state / "dit.pt").exists():
        log.info("starting from %s", exported)
        dit = load_dit(exported, config.model.dit_params, "cpu", torch.float32).float().requires_grad_(True)
    else:
        dit = DiffusionTransformer3D(**dataclasses.asdict(config.model.dit_params))
    optimizers = optimizers_for(dit, args.lr, args.lr / 2, lambda name: "blocks" in name and "modulation" not in name)
    rng = np.random.default_rng(int(time.time()))
    shift = config.metrics.scheduler_scale

    def loss(step: int) -> Tensor:
        # Most of what there is to learn can be learnt on small clips, at a quarter of the tokens.
        small = step < args.small_steps
        clips = LatentClips.load(args.state, SIZE // 2 if small else SIZE)
        batch = 2 * args.batch if small else args.batch
        index = rng.integers(0, len(clips.latents), batch)
        rows = [rng.choice(captions.rows[clips.combination[i]]) if rng.random() > 0.1 else -1 for i in index]
        x0 = clips.latents[index].float()
        noise = torch.randn_like(x0)
        # Stratified over the batch, and shifted as the sampler's own steps are.
        u = (torch.arange(batch) + torch.rand(batch)) / batch
        sigma = shift * u / (1 + (shift - 1) * u)
        level = sigma.view(-1, 1, 1, 1, 1)
        x = torch.lerp(x0, noise, level)
        # Float32 weights, computed with as inference computes: in bfloat16 but for time and modulation.
        weights = {n: p if any(k in n for k in KEEP_PRECISION) else p.bfloat16() for n, p in dit.named_parameters()}
        extra = x.new_zeros(*x.shape[:-1], dit.in_channels - x.shape[-1])
        inputs = (torch.cat((x, extra), -1), captions.text[rows], captions.pooled[rows], sigma * 1000)
        options = {"text_mask": captions.mask[rows], "scale_factor": clips.rotary_scale}
        # PyTorch's fused attention is slow backwards on a CPU where there are few tokens.
        with sdpa_kernel(SDPBackend.MATH if small else SDPBackend.FLASH_ATTENTION):
            velocity = torch.func.functional_call(dit, weights, inputs, options)
        return F.mse_loss(velocity.float(), noise - x0)

    train("dit", args.state, dit, optimizers, loss, args.dit_steps, warmup=200)


def latent_scale(state_dir: Path) -> float:
    """1 / std of the first shard of small clips: what brings the latents to unit variance."""
    return round(1 / float(torch.load(state_dir / f"latents_{SIZE // 2}_0.pt")["latents"].float().std()), 4)


# --- export ----------------------------------------------------------------------------------------------------------


def stage_export(args: argparse.Namespace) -> None:
    """Write the checkpoint in the published layout: bfloat16, safetensors, one folder a component."""
    out = args.out
    vae = trained_vae(args)
    with torch.no_grad():
        # The VAE was trained with noise of a fixed size on the mean: say so in the log-variance, exactly.
        channels = vae.quant_conv.out_channels // 2
        vae.quant_conv.weight[channels:].zero_()
        vae.quant_conv.bias[channels:].fill_(2 * math.log(LATENT_NOISE))
    state = torch.load(args.state / "dit.pt")
    write_safetensors(state["model"], out / "model" / "tiny_t2v.safetensors")
    write_safetensors(vae.state_dict(), out / "vae" / "diffusion_pytorch_model.safetensors")
    config = {**VAE_CONFIG, "latent_channels": 16, "scaling_factor": latent_scale(args.state)}
    (out / "vae" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_text_encoders(trained_embedder(args), out)
    log.info("wrote %s: DiT at step %d, %.1f MB in all", out, state["step"], folder_megabytes(out))


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)


def folder_megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "text", "latents", "dit", "export"))
    parser.add_argument("--state", type=Path, default=Path(".train/tiny"))
    parser.add_argument("--config", type=Path, default=Path("configs/config_tiny_t2v.yaml"))
    parser.add_argument("--out", type=Path, default=Path("assets/tiny/t2v"))
    parser.add_argument("--text_steps", type=int, default=400)
    parser.add_argument("--size", type=int, default=SIZE // 2, help="latents: of clips of this many pixels a side")
    parser.add_argument("--first_shard", type=int, default=0, help="latents: number of the first file")
    parser.add_argument("--shards", type=int, default=2, help="latents: how many files")
    parser.add_argument("--shard_clips", type=int, default=1152, help="latents: clips a file, each another combination")
    parser.add_argument("--small_steps", type=int, default=1200, help="dit: steps on half-size clips, the first ones")
    parser.add_argument("--from_exported", action="store_true", help="dit: start from the checkpoint in --out")
    parser.add_argument("--dit_steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--image_steps", type=int, default=480)
    parser.add_argument("--decoder_steps", type=int, default=600)
    parser.add_argument("--clip_steps", type=int, default=930)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args.state.mkdir(parents=True, exist_ok=True)
    globals()[f"stage_{args.stage}"](args)


if __name__ == "__main__":
    main()
