"""The image half of the tiny training: an image VAE, text encoders with eyes, text to image, and editing images.

Stages of `tools/train_tiny.py --task image`, in order: `vae`, `text`, `dit`, `edit`, `export`. Pictures and edits are
drawn as they are needed by `tools/tiny_world.py`; of looks and of pairs (source, target) a tenth is never drawn here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from kandinsky.config.reading import load_config
from kandinsky.config.schema import Config
from kandinsky.models.dit import DiffusionTransformer3D
from kandinsky.models.vae_flux import AutoencoderKL
from kandinsky.outputs.media import halve_image
from kandinsky.text.embedder import TextEmbedder
from kandinsky.text.embeddings import TextEmbeddings
from tools import tiny_world
from tools.make_tiny_text_encoders import make_text_encoders, save_text_encoders
from tools.tiny_training import (
    LATENT_NOISE,
    dit_optimizers,
    flow_loss,
    folder_megabytes,
    load_embedder,
    optimizers_for,
    psnr,
    to_float,
    train,
    vae_loss,
    with_input_channels,
    write_safetensors,
)

log = logging.getLogger("train_tiny")
SIZE = 128
VAE_CONFIG: dict[str, Any] = dict(block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8)
VALUES = (tuple(tiny_world.SHAPES), tuple(tiny_world.COLOURS), tuple(tiny_world.BACKGROUNDS))  # of a Look, in order
PICTURE_TOKENS = 4  # that Qwen makes of a picture of 64 x 64 pixels; two more follow them
Edit = tuple[tiny_world.Scene, str, tiny_world.Scene]


def draw(scenes: Sequence[tiny_world.Scene], size: int = SIZE) -> Tensor:
    """Pictures in [-1, 1], (N, 3, size, size)."""
    pictures = np.stack([tiny_world.render_picture(scene, size) for scene in scenes])
    return to_float(torch.from_numpy(pictures).permute(0, 3, 1, 2))


def as_qwen_sees(scenes: Sequence[tiny_world.Scene]) -> list[Image.Image]:
    """The pictures as image to image shows them to Qwen: at half their size."""
    return [halve_image(Image.fromarray(tiny_world.render_picture(scene, SIZE))) for scene in scenes]


# --- VAE -------------------------------------------------------------------------------------------------------------


def image_vae_weights(video: dict[str, Tensor], image: AutoencoderKL) -> dict[str, Tensor]:
    """Weights for the image VAE from those of a video VAE of the same widths, which is close to it on one frame.

    Time taps are summed and the two 1x1 convolutions around the latents folded into their neighbours. What differs is
    how the border is padded, and that is left to training.
    """
    weights = {}
    for name in image.state_dict():
        weight = video[name] if name in video else video[".conv.".join(name.rsplit(".", 1))]
        if weight.dim() == 5:
            weight = weight.sum(2)
            if "downsamplers" in name:  # here the taps lie on the pixel and after it, there around it
                for dim in (2, 3):
                    before, on, after = weight.unbind(dim)
                    weight = torch.stack((before + on, after, torch.zeros_like(after)), dim)
        weights[name] = weight
    matrix = video["quant_conv.weight"][:, :, 0, 0, 0]
    weights["encoder.conv_out.bias"] = matrix @ weights["encoder.conv_out.bias"] + video["quant_conv.bias"]
    weights["encoder.conv_out.weight"] = torch.einsum("om,mihw->oihw", matrix, weights["encoder.conv_out.weight"])
    kernel = weights["decoder.conv_in.weight"]
    matrix, offset = video["post_quant_conv.weight"][:, :, 0, 0, 0], video["post_quant_conv.bias"]
    weights["decoder.conv_in.bias"] = weights["decoder.conv_in.bias"] + kernel.sum((2, 3)) @ offset
    weights["decoder.conv_in.weight"] = torch.einsum("omhw,mi->oihw", kernel, matrix)
    return weights


def new_vae(device: str) -> AutoencoderKL:
    vae = AutoencoderKL(**VAE_CONFIG).to(device)
    return vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def stage_vae(args: argparse.Namespace) -> None:
    """From the trained video VAE, first on pictures of half the size."""
    video = args.video_state / "vae_decoder.pt"
    vae = new_vae(args.device)
    if video.exists():
        vae.load_state_dict(image_vae_weights(torch.load(video, map_location="cpu")["ema"], vae))
    else:
        log.info("no video VAE at %s: starting from nothing, which takes several times --vae_steps", video)
    rng = np.random.default_rng(1)
    held_out_rng = np.random.default_rng(0)
    held_out = draw([tiny_world.sample_picture(held_out_rng, "test") for _ in range(32)])

    def loss(step: int) -> Tensor:
        small = step < 0.7 * args.vae_steps
        scenes = [tiny_world.sample_picture(rng) for _ in range(16)]
        return vae_loss(vae, draw(scenes, SIZE // 2 if small else SIZE).to(args.device))

    @torch.no_grad()
    def report(model: nn.Module) -> str:
        assert isinstance(model, AutoencoderKL)
        x = held_out.to(args.device)
        back = model.decode(model.encode(x).mode()).clamp(-1, 1)
        return f"held out {np.mean([psnr(a, b) for a, b in zip(back, x, strict=True)]):.2f} dB"

    train("vae", args.state, vae, optimizers_for(vae, 1e-3, 1e-3), loss, args.vae_steps, 0.98, evaluate=report)
    log.info(report(vae))


def trained_vae(args: argparse.Namespace) -> AutoencoderKL:
    vae = new_vae(args.device)
    vae.load_state_dict(torch.load(args.state / "vae.pt", map_location=args.device)["ema"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, scenes: Sequence[tiny_world.Scene], device: str) -> Tensor:
    """Unscaled latents (N, 1, h, w, C)."""
    parts = []
    for begin in range(0, len(scenes), 64):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            parts.append(vae.encode(draw(scenes[begin : begin + 64]).to(device)).mode().float())
    return torch.cat(parts).movedim(1, -1).unsqueeze(1)


def latent_scale(vae: AutoencoderKL, device: str) -> float:
    """1 / std of the latents of 256 training pictures, the same every time: what brings them to unit variance."""
    rng = np.random.default_rng(2)
    latents = encode_pictures(vae, [tiny_world.sample_picture(rng) for _ in range(256)], device)
    return round(1 / float(latents.std()), 4)


# --- text encoders ---------------------------------------------------------------------------------------------------


def training_captions() -> list[tuple[str, tiny_world.Look]]:
    """Every wording of every look that is not held out."""
    known = {text: tiny_world.parse_picture_caption(text) for text in tiny_world.picture_corpus()}
    looks = frozenset(tiny_world.train_looks())
    return [(text, look) for text, look in known.items() if look in looks]


def look_indices(scenes: Sequence[tiny_world.Scene]) -> Tensor:
    """(N, 3): which shape, colour and background."""
    looks = [[values.index(name) for values, name in zip(VALUES, scene.look, strict=True)] for scene in scenes]
    return torch.tensor(looks)


class Readers(nn.Module):
    """Linear read-outs of what a text says and a picture shows; thrown away after training."""

    def __init__(self, embedder: TextEmbedder, dim: int) -> None:
        super().__init__()
        self.embedder = embedder
        look = [len(names) for names in VALUES]
        edit = [len(names) + 1 for names in VALUES]  # one more: stays as it is
        self.sizes = {"caption": look, "caption_pooled": look, "edit": edit, "edit_pooled": edit}
        self.sizes |= {"source": look, "target": look}
        self.heads = nn.ModuleDict({name: nn.Linear(dim, sum(sizes)) for name, sizes in self.sizes.items()})

    def read(self, name: str, states: Tensor, wanted: Tensor) -> Tensor:
        parts = self.heads[name](states).split(self.sizes[name], dim=1)
        return torch.stack([F.cross_entropy(part, w) for part, w in zip(parts, wanted.T, strict=True)]).mean()

    def captions(self, texts: list[str], scenes: Sequence[tiny_world.Scene]) -> Tensor:
        """Qwen's last token and CLIP's pooled state must tell the look."""
        out = self.embedder(texts, "image")
        looks = look_indices(scenes).to(out.pooled_embeds.device)
        states = last_tokens(out.text_embeds, out.text_mask, 1)[:, 0]
        return self.read("caption", states, looks) + self.read("caption_pooled", out.pooled_embeds, looks)

    def edits(self, edits: Sequence[Edit]) -> Tensor:
        """CLIP must tell what the instruction changes; Qwen that, what its picture shows, and what comes of it."""
        sources, texts, targets = zip(*edits, strict=True)
        out = self.embedder(list(texts), "image_edit", as_qwen_sees(sources))
        source, target = (look_indices(s).to(out.pooled_embeds.device) for s in (sources, targets))
        change = torch.where(source == target, torch.tensor([len(names) for names in VALUES]).to(source), target)
        states = last_tokens(out.text_embeds, out.text_mask, PICTURE_TOKENS + 2)
        picture, last = states[:, :PICTURE_TOKENS].mean(1), states[:, -1]
        return (
            self.read("edit", last, change)
            + self.read("edit_pooled", out.pooled_embeds, change)
            + self.read("source", picture, source)
            + self.read("target", last, target)
        )


def last_tokens(states: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """The last `count` real states of each text, (B, count, D)."""
    ends = torch.full((len(states),), states.shape[1]).to(states.device) if mask is None else mask.sum(1)
    places = ends[:, None] + torch.arange(-count, 0, device=states.device)
    return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))


def stage_text(args: argparse.Namespace) -> None:
    """Random frozen encoders would do for words, but nothing learns to see through a random vision tower."""
    folder = args.state / "text"
    captions = training_captions()
    if not folder.exists():
        make_text_encoders([t for t, _ in captions] + tiny_world.instruction_corpus(), folder, seed=0, images=True)
    embedder = load_embedder(folder, load_config(args.edit_config), args.device).requires_grad_(True)
    readers = Readers(embedder, embedder.language_model.config.hidden_size).to(args.device)
    rng = np.random.default_rng(3)

    def loss(step: int) -> Tensor:
        chosen = [captions[i] for i in rng.integers(0, len(captions), 32)]
        scenes = [tiny_world.picture_for(look, rng) for _, look in chosen]
        edits = [tiny_world.sample_edit(rng) for _ in range(48)]
        return (readers.captions([text for text, _ in chosen], scenes) + readers.edits(edits)) / 6

    train("text", args.state, readers, optimizers_for(readers, 2e-3, 2e-3, uses_muon), loss, args.text_steps)
    save_text_encoders(embedder, folder)


def uses_muon(name: str) -> bool:
    """Matrices inside the encoders; embeddings and read-outs are AdamW's."""
    return "layers." in name or "blocks." in name or "merger" in name or "patch_embed" in name


def trained_embedder(args: argparse.Namespace) -> TextEmbedder:
    return load_embedder(args.state / "text", load_config(args.edit_config), args.device)


# --- text to image ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Embedded texts, padded to one length."""

    embeds: Tensor  # (N, L, D)
    pooled: Tensor
    mask: Tensor

    @classmethod
    def build(cls, embed: Callable[[slice], TextEmbeddings], count: int) -> Texts:
        """Of `count` texts that `embed` takes in slices."""
        each = [one for begin in range(0, count, 64) for one in embed(slice(begin, begin + 64)).unbind()]
        states = [one.text_embeds[0] for one in each]
        lengths = torch.tensor([len(s) for s in states])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        embeds = nn.utils.rnn.pad_sequence(states, batch_first=True)
        return cls(embeds, torch.cat([one.pooled_embeds for one in each]), mask.to(embeds.device))

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = self.mask[rows]
        length = int(mask.sum(1).max())
        return self.embeds[rows, :length], self.pooled[rows], mask[:, :length]


def new_dit(config: Config, weights: dict[str, Tensor], device: str) -> DiffusionTransformer3D:
    dit = DiffusionTransformer3D(**dataclasses.asdict(config.model.dit_params))
    dit.load_state_dict({n: w.float() for n, w in with_input_channels(weights, dit.in_channels).items()})
    return dit.to(device)


def stage_dit(args: argparse.Namespace) -> None:
    """From the video DiT: its latents are nearly these, and what is new to it are the text encoders."""
    config = load_config(args.config)
    embedder, vae = trained_embedder(args), trained_vae(args)
    captions = [*training_captions(), ("", None)]
    texts = Texts.build(lambda rows: embedder.encode([text for text, _ in captions[rows]], "image"), len(captions))
    rows_of = {look: [i for i, (_, named) in enumerate(captions) if named == look] for _, look in captions}
    rng = np.random.default_rng(int(time.time()))
    scenes = [tiny_world.sample_picture(rng) for _ in range(args.pictures)]
    latents = encode_pictures(vae, scenes, args.device) * latent_scale(vae, args.device)
    log.info("encoded %d pictures and %d captions", len(scenes), len(captions))
    dit = new_dit(config, load_file(args.video_out / "model" / "tiny_t2v.safetensors"), args.device)

    def loss(step: int) -> Tensor:
        index = rng.integers(0, len(scenes), args.batch)
        rows = [rng.choice(rows_of[scenes[i].look if rng.random() > 0.1 else None]) for i in index]
        return flow_loss(dit, latents[index], texts[torch.tensor(rows)], config.metrics.scheduler_scale)

    train("dit", args.state, dit, dit_optimizers(dit, args.lr), loss, args.dit_steps)


# --- image to image --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedEdits:
    """Training edits as the DiT sees them: scaled latents (N, 1, h, w, C) and what Qwen made of words and picture."""

    source: Tensor
    target: Tensor
    texts: Texts  # twice as many: behind them those of the pictures alone, for guidance

    @classmethod
    def make(cls, args: argparse.Namespace, rng: np.random.Generator) -> EncodedEdits:
        embedder, vae = trained_embedder(args), trained_vae(args)
        sources, words, targets = zip(*(tiny_world.sample_edit(rng) for _ in range(args.pictures)), strict=True)
        scale = latent_scale(vae, args.device)

        texts, shown = [*words, *[""] * len(words)], sources + sources

        def embed(rows: slice) -> TextEmbeddings:
            return embedder.encode(texts[rows], "image_edit", as_qwen_sees(shown[rows]))

        return cls(
            encode_pictures(vae, sources, args.device) * scale,
            encode_pictures(vae, targets, args.device) * scale,
            Texts.build(embed, 2 * len(words)),
        )


def stage_edit(args: argparse.Namespace) -> None:
    """From the text-to-image DiT, with the source's latents as new input channels that weigh nothing at first."""
    config = load_config(args.edit_config)
    rng = np.random.default_rng(int(time.time()))
    edits = EncodedEdits.make(args, rng)
    log.info("encoded %d edits", len(edits.source))
    dit = new_dit(config, torch.load(args.state / "dit.pt", map_location="cpu")["model"], args.device)

    def loss(step: int) -> Tensor:
        rows = torch.from_numpy(rng.integers(0, len(edits.source), args.batch))
        without_words = torch.from_numpy(rng.random(args.batch) < 0.1)
        source = edits.source[rows]
        extra = torch.cat((source, torch.ones_like(source[..., :1])), -1)
        texts = edits.texts[rows + len(edits.source) * without_words]
        return flow_loss(dit, edits.target[rows], texts, config.metrics.scheduler_scale, extra)

    train("edit", args.state, dit, dit_optimizers(dit, args.lr), loss, args.edit_steps)


# --- export ----------------------------------------------------------------------------------------------------------


def stage_export(args: argparse.Namespace) -> None:
    """Write the checkpoints in the published layout: bfloat16, safetensors, one folder a component."""
    vae = trained_vae(args)
    scale = latent_scale(vae, args.device)
    weights = vae.state_dict()
    # The VAE was trained with noise of a fixed size on the mean: say so in the log-variance, exactly.
    channels = len(weights["encoder.conv_out.bias"]) // 2
    weights["encoder.conv_out.weight"][channels:] = 0
    weights["encoder.conv_out.bias"][channels:] = 2 * math.log(LATENT_NOISE)
    write_safetensors(weights, args.out / "vae" / "diffusion_pytorch_model.safetensors")
    config = {**VAE_CONFIG, "latent_channels": 16, "scaling_factor": scale, "shift_factor": 0.0}
    (args.out / "vae" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_text_encoders(trained_embedder(args), args.out)
    for stage, name in (("dit", "tiny_t2i"), ("edit", "tiny_i2i")):
        if (args.state / f"{stage}.pt").exists():
            state = torch.load(args.state / f"{stage}.pt", map_location="cpu")
            write_safetensors(state["model"], args.out / "model" / f"{name}.safetensors")
            log.info("%s: step %d", name, state["step"])
    log.info("wrote %s: %.1f MB in all", args.out, folder_megabytes(args.out))
