"""The video half of the tiny training: a 3-D VAE, text encoders, and one DiT for text to video and image to video.

Stages of `tools/train_tiny.py --task video`, in order: `vae`, `text`, `latents` (of 64, 128 and 256 pixels), `dit`,
`nabla`, `keyframes`, `export`. Clips are drawn by `tools/tiny_world.py`; of the combinations a tenth is never drawn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky.attention.block_sparse import masked_dense
from kandinsky.attention.nabla import NablaConfig
from kandinsky.config.reading import load_config
from kandinsky.loading.dit import load_dit
from kandinsky.loading.vae import load_vae
from kandinsky.models.dit import DiffusionTransformer3D, Execution
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
from kandinsky.models.vae_tiling import VAETiling
from kandinsky.text.embedder import TextEmbedder
from tools import tiny_world
from tools.make_tiny_text_encoders import make_text_encoders, save_text_encoders
from tools.tiny_training import (
    LATENT_NOISE,
    dit_optimizers,
    folder_megabytes,
    load_embedder,
    noisy,
    optimizers_for,
    psnr,
    to_float,
    train,
    vae_loss,
    velocity,
    write_safetensors,
)

log = logging.getLogger("train_tiny")
NUM_FRAMES, FRAMES_PER_LATENT = 25, 4
LOOPS = 0.4  # keyframes: the share of steps that show loops
SIZE = 128
VAE_CONFIG: dict[str, Any] = dict(block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8)
VALUES = (tuple(tiny_world.SHAPES), tuple(tiny_world.COLOURS), tuple(tiny_world.MOTIONS), tuple(tiny_world.BACKGROUNDS))


# --- data ------------------------------------------------------------------------------------------------------------


def draw_clips(scenes: Iterable[tiny_world.Scene], size: int = SIZE, loop: bool = False) -> Tensor:
    """uint8 clips (N, 3, frames, size, size)."""
    clips = [torch.from_numpy(tiny_world.render(scene, NUM_FRAMES, size, loop)) for scene in scenes]
    return torch.stack(clips).permute(0, 4, 1, 2, 3).contiguous()


def training_scenes(per_combination: int, seed: int) -> list[tiny_world.Scene]:
    rng = np.random.default_rng(seed)
    return [tiny_world.scene_for(a, rng) for _ in range(per_combination) for a in tiny_world.train_combinations()]


# --- VAE -------------------------------------------------------------------------------------------------------------


def new_vae(device: str) -> AutoencoderKLHunyuanVideo:
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(**VAE_CONFIG).to(device)
    vae.convolve_by_frame(device == "cpu")
    return vae


@torch.no_grad()
def reconstruction_psnr(vae: nn.Module, clips: Tensor) -> float:
    """Mean over whole clips, encoded and decoded through the published 17-frame windows."""
    assert isinstance(vae, AutoencoderKLHunyuanVideo)
    values = []
    device = next(vae.parameters()).device
    for clip in clips:
        x = to_float(clip[None].to(device))
        with torch.autocast(device.type, torch.bfloat16):
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
        return to_float(torch.stack(pieces).to(args.device))

    def images(step: int) -> Tensor:
        return vae_loss(vae, batch(small, 16, 1) if step < 0.7 * args.image_steps else batch(clips, 8, 1))

    def windows(step: int) -> Tensor:
        if step % 5 == 4:
            return vae_loss(vae, batch(clips, 8, 1))
        return vae_loss(vae, batch(small, 2, 17) if step < 0.97 * args.clip_steps else batch(clips, 1, 17))

    def decoder_windows(step: int) -> Tensor:
        return vae_loss(vae, batch(small, 2, 17) if step < 0.9 * args.decoder_steps else batch(clips, 1, 17))

    vae = new_vae(args.device)
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

        train(name, args.state, vae, optimizers_for(vae, rate, rate), loss, steps, 0.99, evaluate=report)


@dataclass(frozen=True)
class Drawn:
    """A clip with the unscaled latents that the pipeline's windows make of it."""

    pixels: Tensor  # uint8 (1, 3, 25, H, W)
    latents: Tensor  # (1, 16, 7, h, w)
    ends: Tensor  # (1, 16, 2, h, w): the first and the last frame, each encoded by itself
    caption: int  # its row of the table; -1, the empty prompt, for what runs backwards


class DecoderSamples:
    """Windows of training clips, as the pipeline decodes them: every second one of the clip's own latents, the others
    as a DiT would have it. That is a single prediction from some noise, which has a DiT's mistakes and still shows this
    clip. A decoder that has seen none of them decodes them up to 2 dB worse.

    Encoding takes about as long as a step: a clip stays in a pool, from which `REUSED` of `REUSED + 1` windows come.
    """

    LATENTS = 5  # a window of 17 frames
    STARTS = (0, 2, 0, 2, 1)  # the published windows of 25 frames begin at the latents 0 and 2, other lengths' anywhere
    POOL, REUSED = 400, 3
    NOISE = (0.1, 0.7)  # levels that are predicted from

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.encoder = load_vae(args.out / "vae", args.device, torch.bfloat16)
        self.device, self.rng = args.device, np.random.default_rng(seed)
        self.captions = CaptionTable.build(trained_embedder(args))
        config = load_config(args.config)
        self.scale = self.encoder.scaling_factor
        self.from_words, self.from_ends = (
            load_dit(args.out / "model" / f"{name}.safetensors", config.model.dit_params, args.device, torch.float32)
            for name in ("tiny_t2v", "tiny_flf")
        )
        self.pool: list[Drawn] = []

    @torch.no_grad()
    def draw(self) -> Drawn:
        if self.pool and self.rng.random() < self.REUSED / (self.REUSED + 1):
            return self.pool[self.rng.integers(len(self.pool))]
        combinations = tiny_world.train_combinations()
        index = int(self.rng.integers(len(combinations)))
        pixels = draw_clips([tiny_world.scene_for(combinations[index], self.rng)])
        caption = int(self.rng.choice(self.captions.rows[index]))
        if self.rng.random() < 0.5:
            pixels, caption = pixels.flip(2), -1
        clip = to_float(pixels.to(self.device)).bfloat16()
        latents = self.encoder.encode(clip, VAETiling()).mode().float()
        ends = torch.cat([self.encoder.encode(clip[:, :, i : i + 1]).mode().float() for i in (0, NUM_FRAMES - 1)], 2)
        if len(self.pool) == self.POOL:
            del self.pool[self.rng.integers(self.POOL)]
        self.pool.append(Drawn(pixels, latents, ends, caption))
        return self.pool[-1]

    @torch.no_grad()
    def as_predicted(self, drawn: Drawn) -> Tensor:
        """Its latents as a DiT has them from noise and its caption, every second time from its first and last frame."""
        x0, ends = (self.scale * x.movedim(1, -1) for x in (drawn.latents, drawn.ends))  # (1, T, h, w, C)
        sigma = float(self.rng.uniform(*self.NOISE))
        x = torch.lerp(x0, torch.randn_like(x0), sigma)
        dit = self.from_ends if self.rng.random() < 0.5 else self.from_words
        given = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        given[:, [0, -1]] = dit is self.from_ends
        stills = torch.zeros_like(x)
        stills[:, [0, -1]] = ends
        x, extra = shown_frames(x, stills, given, dit.in_channels)
        row = [drawn.caption]
        text = self.captions.text[row], self.captions.pooled[row], self.captions.mask[row]
        predicted = x - sigma * velocity(dit, torch.cat((x, extra), -1), text, x.new_tensor([sigma]))
        if dit is self.from_ends:
            predicted[:, 0] = ends[:, 0]
        return predicted.movedim(-1, 1) / self.scale

    def window(self) -> tuple[Tensor, Tensor, int]:
        """Latents of a window, the pixels that its decode should give, and how many of its first frames to drop."""
        drawn = self.draw()
        latents = self.as_predicted(drawn) if self.rng.random() < 0.5 else drawn.latents
        start = int(self.rng.choice(self.STARTS))
        frames = to_float(drawn.pixels[:, :, 4 * start : 4 * (start + self.LATENTS - 1) + 1].to(self.device))
        dropped = min(start, 1)  # a later window's first frame has no history and is another window's
        return latents[:, :, start : start + self.LATENTS], frames[:, :, dropped:], dropped

    def pictures(self, count: int) -> tuple[Tensor, Tensor, int]:
        """The same of single frames."""
        combinations = tiny_world.train_combinations()
        chosen = self.rng.integers(0, len(combinations), count)
        scenes = [tiny_world.scene_for(combinations[i], self.rng) for i in chosen]
        drawn = torch.stack([torch.from_numpy(tiny_world.render_picture(scene, SIZE)) for scene in scenes])
        pixels = to_float(drawn.permute(0, 3, 1, 2)[:, :, None].to(self.device))
        with torch.no_grad():
            latents = self.encoder.encode(pixels.bfloat16()).mode().float()
        return latents, pixels, 0


def motion_weight(x: Tensor, around: int = 4) -> Tensor:
    """1 where a clip (B, 3, T, H, W) stands still, 2 where something moves within `around` frames: where ghosts are."""
    if x.shape[2] == 1:
        return torch.ones_like(x[:, :1])
    moving = ((x[:, :, 1:] - x[:, :, :-1]).abs().amax(1, keepdim=True) > 0.1).float()
    moving = F.max_pool3d(F.pad(moving, (0, 0, 0, 0, 1, 0)), (2 * around + 1, 5, 5), 1, (around, 2, 2))
    return 1 + moving


def stage_decoder(args: argparse.Namespace) -> None:
    """The exported VAE's decoder goes on alone, on what it is given to decode: every DiT's latents stay as they are."""
    samples = DecoderSamples(args, seed=int(time.time()))
    rng = np.random.default_rng(1)
    held_out = draw_clips(tiny_world.sample_scene(rng, "test") for _ in range(6))
    vae = new_vae(args.device)
    vae.convolve_by_frame(False)  # that is for inference: forwards and backwards three axes at once take half as long
    vae.load_state_dict({k: v.float() for k, v in samples.encoder.state_dict().items()})
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)

    def loss(step: int) -> Tensor:
        latents, x, dropped = samples.pictures(4) if step % 20 == 7 else samples.window()
        # Less than the noise that the encoder was trained for, but some: what a DiT makes is not exact.
        latents = latents + 0.5 * LATENT_NOISE * float(torch.rand(())) * torch.randn_like(latents)
        latents = latents.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(x.device.type, torch.bfloat16):
            out = vae.decode(latents)[:, :, dropped:]
        weight = motion_weight(x)
        # PSNR is a logarithm: a clip in which little is left to gain counts as much as any.
        return ((out.float() - x).square() * (weight / weight.mean())).mean().log()

    def report(model: nn.Module) -> str:
        return f"held out {reconstruction_psnr(model, held_out):.2f} dB"

    optimizers = optimizers_for(vae, args.decoder_lr, args.decoder_lr / 2)
    train("vae_windows", args.state, vae, optimizers, loss, args.decoder_steps, 0.99, evaluate=report)


# --- text encoders ---------------------------------------------------------------------------------------------------


def training_captions() -> dict[tiny_world.Attributes, list[str]]:
    """Every wording of every combination that is not held out."""
    captions: dict[tiny_world.Attributes, list[str]] = {a: [] for a in tiny_world.train_combinations()}
    for text in tiny_world.corpus():
        attributes = tiny_world.parse_caption(text)
        if attributes in captions:
            captions[attributes].append(text)
    return captions


def trained_embedder(args: argparse.Namespace) -> TextEmbedder:
    """The text encoders of the `text` stage or, where there is no state of it, the exported ones."""
    folder = args.state / "text"
    if not folder.exists():
        log.info("no text encoders in %s: taking those in %s", args.state, args.out)
        folder = args.out
    return load_embedder(folder, load_config(args.config), args.device)


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
        states, mask = out.text_embeds, out.text_mask
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask
        last = states[torch.arange(len(texts), device=states.device), mask.sum(1) - 1]
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
    embedder = load_embedder(folder, load_config(args.config), args.device).requires_grad_(True)
    heads = AttributeHeads(embedder, embedder.language_model.config.hidden_size).to(args.device)
    rng = np.random.default_rng(2)

    def loss(step: int) -> Tensor:
        chosen = [texts[i] for i in rng.integers(0, len(texts), 48)]
        targets = [[values.index(name) for values, name in zip(VALUES, a, strict=True)] for _, a in chosen]
        return heads([text for text, _ in chosen], torch.tensor(targets, device=args.device))

    optimizer = torch.optim.AdamW(heads.parameters(), 1e-3)
    train("text", args.state, heads, [optimizer], loss, args.text_steps)
    save_text_encoders(embedder, folder)


# --- latents ---------------------------------------------------------------------------------------------------------


def vae_state(args: argparse.Namespace) -> Path | None:
    """What the last of the VAE's stages has left."""
    states = [args.state / f"{name}.pt" for name in ("vae_windows", "vae_decoder", "vae")]
    return next((path for path in states if path.exists()), None)


def trained_vae(args: argparse.Namespace) -> AutoencoderKLHunyuanVideo:
    """The VAE of the `vae` stage or, where there is no state of it, the exported one."""
    path = vae_state(args)
    if path is None:
        log.info("no VAE in %s: taking the one in %s", args.state, args.out)
        vae = load_vae(args.out / "vae", args.device, torch.float32)
        assert isinstance(vae, AutoencoderKLHunyuanVideo)
        return vae
    vae = new_vae(args.device)
    vae.load_state_dict(torch.load(path, map_location=args.device)["ema"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def stage_latents(args: argparse.Namespace) -> None:
    """Unscaled latents of `--shards` files of training clips of `--size` pixels; files that exist are kept."""
    vae = trained_vae(args).bfloat16()
    combinations = tiny_world.train_combinations()
    for shard in range(args.first_shard, args.first_shard + args.shards):
        path = args.state / f"{'loops' if args.loops else 'latents'}_{args.size}_{shard}.pt"
        if path.exists():
            continue
        rng = np.random.default_rng(100 + shard)
        chosen = rng.permutation(len(combinations))[: args.shard_clips]
        latents, stills = [], []
        for i in chosen:
            pixels = draw_clips([tiny_world.scene_for(combinations[i], rng)], args.size, args.loops)
            clip = to_float(pixels.to(args.device)).bfloat16()
            latents.append(vae.encode(clip, VAETiling()).mode().half().cpu())
            # The last frame of each latent frame by itself, as a picture that is given for it is encoded.
            pictures = clip[:, :, ::FRAMES_PER_LATENT].split(1, dim=2)
            stills.append(torch.cat([vae.encode(picture).mode() for picture in pictures], dim=2).half().cpu())
        shard_data = {"latents": torch.cat(latents), "stills": torch.cat(stills)}
        torch.save({**shard_data, "combination": torch.from_numpy(chosen)}, path)
        log.info("latents of %d px: shard %d, %d clips", args.size, shard, len(latents))


@dataclass(frozen=True)
class LatentClips:
    """Training latents of one size (N, T, H, W, C), scaled, and the training combination that each one shows."""

    latents: Tensor
    stills: Tensor  # likewise: the last frame of each latent frame encoded by itself, as a model is given pictures
    combination: Tensor
    rotary_scale: tuple[float, float, float]

    @classmethod
    @cache
    def load(cls, state_dir: Path, size: int, scale: float, kind: str = "latents") -> LatentClips:
        shards = [torch.load(path) for path in sorted(state_dir.glob(f"{kind}_{size}_*.pt"))]
        latents, stills = (
            torch.cat([shard[name] for shard in shards]).permute(0, 2, 3, 4, 1).contiguous()
            for name in ("latents", "stills")
        )
        log.info("%s of %d px: %d clips of %s", kind, size, len(latents), tuple(latents.shape[1:]))
        # Small clips get the positions that their patches have in a large one, so that what is learnt there holds.
        return cls(
            latents * scale,
            stills * scale,
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
            real = torch.ones(part.text_embeds.shape[:2], dtype=torch.bool, device=part.text_embeds.device)
            text.append(F.pad(part.text_embeds, (0, 0, 0, pad)))
            mask.append(F.pad(real if part.text_mask is None else part.text_mask, (0, pad)))
        return cls(torch.cat(text), torch.cat([part.pooled_embeds for part in parts]), torch.cat(mask), rows)


def compile_blocks(dit: DiffusionTransformer3D, args: argparse.Namespace) -> None:
    if args.compile:
        for block in dit.visual_transformer_blocks:
            block.compile(dynamic=False)


def stage_dit(args: argparse.Namespace) -> None:
    """One model for both tasks: every second sample is given the latents of its first frame, as image to video is."""
    config = load_config(args.config)
    captions = CaptionTable.build(trained_embedder(args))
    scale = latent_scale(args)

    torch.manual_seed(0)
    exported = args.out / "model" / "tiny_t2v.safetensors"
    if args.from_exported and not (args.state / "dit.pt").exists():
        log.info("starting from %s", exported)
        dit = load_dit(exported, config.model.dit_params, args.device, torch.float32).float().requires_grad_(True)
    else:
        dit = DiffusionTransformer3D(**dataclasses.asdict(config.model.dit_params)).to(args.device)
    compile_blocks(dit, args)
    rng = np.random.default_rng(int(time.time()))

    def loss(step: int) -> Tensor:
        # Most of what there is to learn can be learnt on small clips, at a quarter of the tokens.
        small = step < args.small_steps
        clips = LatentClips.load(args.state, SIZE // 2 if small else SIZE, scale)
        batch = 2 * args.batch if small else args.batch
        index = rng.integers(0, len(clips.latents), batch)
        rows = [rng.choice(captions.rows[clips.combination[i]]) if rng.random() > 0.1 else -1 for i in index]
        x0 = clips.latents[index].to(args.device).float()
        x, wanted, sigma = noisy(x0, config.metrics.scheduler_scale)
        # The first frame is clean at every noise level, and the mask, the last channel, says so.
        given = torch.zeros(x0.shape[:2], dtype=torch.bool, device=args.device)
        given[step % 2 :: 2, 0] = True
        x, extra = shown_frames(x, noisy_stills(clips, index, scale, args.device), given, dit.in_channels)
        text = captions.text[rows], captions.pooled[rows], captions.mask[rows]
        predicted = velocity(dit, torch.cat((x, extra), -1), text, sigma, clips.rotary_scale)
        return object_loss(predicted, wanted, x0, given)

    train("dit", args.state, dit, dit_optimizers(dit, args.lr), loss, args.dit_steps, warmup=200)


def stage_nabla(args: argparse.Namespace) -> None:
    """The exported model goes on, on large clips, with block-sparse attention of a density that changes every step."""
    config = load_config(args.nabla_config)
    captions = CaptionTable.build(trained_embedder(args))
    clips = LatentClips.load(args.state, config.generation.width, latent_scale(args))
    torch.manual_seed(0)
    exported = args.out / "model" / "tiny_t2v.safetensors"
    dit = load_dit(exported, config.model.dit_params, args.device, torch.float32).float().requires_grad_(True)
    # So few blocks are faster under a mask than gathered, and backwards more so.
    execution = Execution(block_sparse=masked_dense)
    attention = config.model.attention
    rng = np.random.default_rng(int(time.time()))

    def loss(step: int) -> Tensor:
        index = rng.integers(0, len(clips.latents), args.nabla_batch)
        rows = [rng.choice(captions.rows[clips.combination[i]]) if rng.random() > 0.1 else -1 for i in index]
        x, wanted, sigma = noisy(clips.latents[index].to(args.device).float(), config.metrics.scheduler_scale)
        extra = x.new_zeros(*x.shape[:-1], dit.in_channels - x.shape[-1])
        text = captions.text[rows], captions.pooled[rows], captions.mask[rows]
        nabla = NablaConfig(float(rng.uniform(0.3, 0.9)), attention.wT, attention.wH, attention.wW)
        predicted = velocity(dit, torch.cat((x, extra), -1), text, sigma, config.metrics.scale_factor, nabla, execution)
        return F.mse_loss(predicted, wanted)

    train("dit_nabla", args.state, dit, dit_optimizers(dit, args.lr / 3), loss, args.nabla_steps, warmup=20)


def given_frames(rng: np.random.Generator, batch: int, frames: int) -> Tensor:
    """(batch, latent frames) of bool: which ones a model is given, of all the ways in which it may be asked."""
    given = torch.zeros(batch, frames, dtype=torch.bool)
    for row in given:
        way = rng.random()
        row[0] = 0.15 <= way < 0.3 or 0.4 <= way < 0.7  # nothing before, in between the last alone
        row[-1] = 0.3 <= way < 0.7
        if way >= 0.7:  # any of them
            row |= torch.from_numpy(rng.random(frames) < rng.uniform(0.1, 0.4))
            row[0] |= bool(rng.random() < 0.5)
    return given


def shown_frames(x: Tensor, stills: Tensor, given: Tensor, in_channels: int) -> tuple[Tensor, Tensor]:
    """Latents (B, T, H, W, C) and the channels beside them, as a model that has learnt keyframes is given pictures.

    given: (B, T). The first frame is the picture. A later one is four frames of video, which end with the picture:
    the condition channels show it, and the model makes of it how things get there.
    """
    channels = x.shape[-1]
    is_given = given[..., None, None, None]
    extra = x.new_zeros(*x.shape[:-1], in_channels - channels)
    extra[..., -1:] = is_given
    extra[:, 1:, ..., :channels] = torch.where(is_given[:, 1:], stills[:, 1:], 0)
    first = torch.where(is_given[:, :1], stills[:, :1], x[:, :1])
    return torch.cat((first, x[:, 1:]), dim=1), extra


def noisy_stills(clips: LatentClips, index: np.ndarray, scale: float, device: str) -> Tensor:
    """(B, T, H, W, C): the pictures of these clips, with as much noise as the VAE was trained with."""
    stills = clips.stills[index].to(device).float()
    return stills + LATENT_NOISE * scale * torch.randn_like(stills)


def object_loss(predicted: Tensor, wanted: Tensor, x0: Tensor, given: Tensor, most: float = 4.0) -> Tensor:
    """Mean squared error of the velocity at x0 (B, T, H, W, C), where latents are not the background's `most` times as
    heavy: the object is a quarter of all, and nearly all of what can be wrong. First frames that are given (B, T) are
    not predicted."""
    differs = (x0 - x0[:, :, :1, :1]).abs().mean(-1) > 0.3
    weight = torch.where(differs, most, 1.0)
    weight[given[:, 0], 0] = 0
    return ((predicted - wanted).square().mean(-1) * weight).sum() / weight.sum()


def stage_keyframes(args: argparse.Namespace) -> None:
    """The exported model goes on with any of its latent frames given, each by the picture that it ends with; of the
    steps a part shows loops, mostly with the first and the last frame given, which are one picture."""
    config = load_config(args.config)
    captions = CaptionTable.build(trained_embedder(args))
    scale = latent_scale(args)
    kinds = [LatentClips.load(args.state, SIZE, scale, kind) for kind in ("latents", "loops")]
    torch.manual_seed(0)
    exported = args.out / "model" / "tiny_t2v.safetensors"
    dit = load_dit(exported, config.model.dit_params, args.device, torch.float32).float().requires_grad_(True)
    # It has seen nothing but zeros in the condition channels: what it would make of them is as it was drawn.
    channels = kinds[0].latents.shape[-1]
    of_input = dit.visual_embeddings.in_layer.weight
    of_input.data.unflatten(1, (-1, dit.in_channels))[..., channels : 2 * channels] = 0
    compile_blocks(dit, args)
    bounces = torch.tensor([combination.motion == "bounce" for combination in tiny_world.train_combinations()])
    rng = np.random.default_rng(int(time.time()))

    def loss(step: int) -> Tensor:
        loop = rng.random() < LOOPS
        clips = kinds[loop]
        index = rng.integers(0, len(clips.latents), args.batch)
        rows = [rng.choice(captions.rows[clips.combination[i]]) if rng.random() > 0.1 else -1 for i in index]
        x0 = clips.latents[index].to(args.device).float()
        x, wanted, sigma = noisy(x0, config.metrics.scheduler_scale)
        given = given_frames(rng, args.batch, x.shape[1]).to(args.device)
        # What ends as it began is a loop: a bounce that does so too, but faster, is not shown its end.
        given[:, -1] &= loop | ~bounces[clips.combination[index]]
        if loop:
            given[: 3 * args.batch // 4] = torch.isin(torch.arange(x.shape[1]), torch.tensor([0, x.shape[1] - 1]))
        x, extra = shown_frames(x, noisy_stills(clips, index, scale, args.device), given, dit.in_channels)
        text = captions.text[rows], captions.pooled[rows], captions.mask[rows]
        predicted = velocity(dit, torch.cat((x, extra), -1), text, sigma, clips.rotary_scale)
        return object_loss(predicted, wanted, x0, given)

    train("dit_keyframes", args.state, dit, dit_optimizers(dit, args.lr / 2), loss, args.keyframe_steps, warmup=20)


def latent_scale(args: argparse.Namespace) -> float:
    """1 / std of the first shard of small clips: what brings the latents to unit variance. Where there is none, the
    exported VAE's."""
    shard = args.state / f"latents_{SIZE // 2}_0.pt"
    if not shard.exists():
        return float(json.loads((args.out / "vae" / "config.json").read_text())["scaling_factor"])
    return round(1 / float(torch.load(shard)["latents"].float().std()), 4)


# --- export ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def export_vae(args: argparse.Namespace) -> None:
    """With the scale of the latents, which is what it was where only the decoder went on."""
    vae = trained_vae(args)
    # The VAE was trained with noise of a fixed size on the mean: say so in the log-variance, exactly.
    channels = vae.quant_conv.out_channels // 2
    assert vae.quant_conv.bias is not None
    vae.quant_conv.weight[channels:].zero_()
    vae.quant_conv.bias[channels:].fill_(2 * math.log(LATENT_NOISE))
    config = {**VAE_CONFIG, "latent_channels": 16, "scaling_factor": latent_scale(args)}
    write_safetensors(vae.state_dict(), args.out / "vae" / "diffusion_pytorch_model.safetensors")
    (args.out / "vae" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    log.info("wrote the VAE in %s", args.out)


def stage_export(args: argparse.Namespace) -> None:
    """Write the checkpoint in the published layout: bfloat16, safetensors, one folder a component."""
    out = args.out
    if (args.state / "dit_keyframes.pt").exists():
        keyframes = torch.load(args.state / "dit_keyframes.pt", map_location="cpu")
        write_safetensors(keyframes["model"], out / "model" / "tiny_flf.safetensors")
        log.info("wrote the DiT for keyframes, at step %d", keyframes["step"])
    if vae_state(args) is not None:
        export_vae(args)
    if not (args.state / "dit.pt").exists():  # all that it was trained from is there
        return
    state = torch.load(args.state / "dit.pt", map_location="cpu")
    write_safetensors(state["model"], out / "model" / "tiny_t2v.safetensors")
    if (args.state / "dit_nabla.pt").exists():
        nabla = torch.load(args.state / "dit_nabla.pt", map_location="cpu")
        write_safetensors(nabla["model"], out / "model" / "tiny_t2v_10s.safetensors")
    save_text_encoders(trained_embedder(args), out)
    log.info("wrote %s: DiT at step %d, %.1f MB in all", out, state["step"], folder_megabytes(out))
