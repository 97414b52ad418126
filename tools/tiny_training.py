"""What every stage of training the tiny checkpoints shares: a loop that can be resumed, Muon, the two losses, files.

Knows no task and no data: `tools/train_tiny.py` is the command.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kandinsky.attention.nabla import NablaConfig
from kandinsky.checkpoints.dit_layout import KEEP_PRECISION
from kandinsky.config.schema import Config
from kandinsky.loading.text import load_text_encoders
from kandinsky.models.dit import DiffusionTransformer3D, Execution
from kandinsky.text.embedder import TextEmbedder

log = logging.getLogger("train_tiny")
LATENT_NOISE = 0.1  # std of the noise on the latent mean, in place of a KL term; also the exported posterior's std
PLAIN = Execution()
FEW_TOKENS = 128  # up to so many, PyTorch's fused attention is slower backwards on a CPU than the plain one


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
        state = torch.load(path, map_location="cpu")
        model.load_state_dict(state["model"])
        ema = {k: v.to(ema[k].device) for k, v in state["ema"].items()}
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
        self.matrices = [nn.Parameter(self._as_matrix(w.data, w)) for w in weights]
        super().__init__(self.matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    @staticmethod
    def _as_matrix(x: Tensor, weight: Tensor) -> Tensor:
        # Kernels may lie in memory channels last, and then only a matrix in that order is a view of them.
        return (x if weight.is_contiguous() else x.movedim(1, -1)).flatten(1)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            assert matrix.data_ptr() == weight.data_ptr()
            matrix.grad = None if weight.grad is None else self._as_matrix(weight.grad, weight)
        super().step()


def optimizers_for(
    model: nn.Module, muon_lr: float, adamw_lr: float, use_muon: Callable[[str], bool] = lambda name: True
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and kernels whose name `use_muon` accepts, AdamW for everything else."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    weights = [p for n, p in trained.items() if p.dim() >= 2 and use_muon(n)]
    chosen = {id(p) for p in weights}
    others = [p for p in trained.values() if id(p) not in chosen]
    return [MatrixMuon(weights, muon_lr), torch.optim.AdamW(others, adamw_lr, betas=(0.9, 0.98), weight_decay=0.0)]


def dit_optimizers(dit: DiffusionTransformer3D, lr: float) -> list[torch.optim.Optimizer]:
    return optimizers_for(dit, lr, lr / 2, lambda name: "blocks" in name and "modulation" not in name)


# --- VAEs ------------------------------------------------------------------------------------------------------------


def to_float(pixels: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return pixels.float() / 127.5 - 1


def psnr(a: Tensor, b: Tensor) -> float:
    """Of images in [-1, 1], in dB."""
    return float(10 * torch.log10(4 / (a.float() - b.float()).square().mean()))


def vae_loss(vae: Any, x: Tensor) -> Tensor:
    """Of pictures (B, 3, H, W) or clips (B, 3, T, H, W) in [-1, 1], sent through the VAE with noise on the latents."""
    x = x.contiguous(memory_format=torch.channels_last_3d if x.dim() == 5 else torch.channels_last)
    with torch.autocast(x.device.type, torch.bfloat16):
        with torch.set_grad_enabled(next(vae.encoder.parameters()).requires_grad):
            mean = vae.encode(x).mode()
        out = vae.decode(mean + LATENT_NOISE * torch.randn_like(mean))
    # The object is a tenth of the picture and most of what matters in it.
    weight = 1 + ((x - x[..., :1, :1]).abs().amax(1, keepdim=True) > 0.1).float()
    error = (out.float() - x) * (weight / weight.mean()).sqrt()
    # A little absolute error keeps edges sharp; the penalty keeps the latents near unit scale.
    return error.square().mean() + 0.1 * error.abs().mean() + 1e-3 * (mean.float().square().mean() - 1).relu()


# --- diffusion transformers ------------------------------------------------------------------------------------------


def noisy(x0: Tensor, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    """x0 at random noise levels: latents, the velocity to predict, and levels (B,)."""
    batch = len(x0)
    # Stratified over the batch, and shifted as the sampler's own steps are.
    u = (torch.arange(batch, device=x0.device) + torch.rand(batch, device=x0.device)) / batch
    sigma = shift * u / (1 + (shift - 1) * u)
    noise = torch.randn_like(x0)
    return torch.lerp(x0, noise, sigma.view(-1, 1, 1, 1, 1)), noise - x0, sigma


def velocity(
    dit: DiffusionTransformer3D,
    x: Tensor,
    text: tuple[Tensor, Tensor, Tensor | None],
    sigma: Tensor,
    rotary_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
    nabla: NablaConfig | None = None,
    execution: Execution = PLAIN,
) -> Tensor:
    """What `dit` predicts for x (B, T, H, W, C), in float32. `text`: embeddings, pooled, mask.

    The weights are float32 and computed with as inference computes: in bfloat16 but for time and modulation.
    """
    embeds, pooled, mask = text
    weights = {n: p if any(k in n for k in KEEP_PRECISION) else p.bfloat16() for n, p in dit.named_parameters()}
    few = x.shape[1] * x.shape[2] * x.shape[3] // 4 <= FEW_TOKENS
    with sdpa_kernel(SDPBackend.MATH if few else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        options = {"text_mask": mask, "scale_factor": rotary_scale, "nabla": nabla, "execution": execution}
        out = torch.func.functional_call(dit, weights, (x, embeds, pooled, sigma * 1000), options)
    return out.float()


def flow_loss(
    dit: DiffusionTransformer3D,
    x0: Tensor,
    text: tuple[Tensor, Tensor, Tensor | None],
    shift: float,
    extra: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the velocity at x0 (B, T, H, W, C); `extra`: the conditioned variants' other channels."""
    x, wanted, sigma = noisy(x0, shift)
    inputs = x if extra is None else torch.cat((x, extra), -1)
    return F.mse_loss(velocity(dit, inputs, text, sigma), wanted)


def with_input_channels(weights: dict[str, Tensor], channels: int, patch: int = 4) -> dict[str, Tensor]:
    """A DiT's weights for another number of input channels: the first ones are kept, and new ones weigh nothing."""
    name = "visual_embeddings.in_layer.weight"
    old = weights[name].unflatten(1, (patch, -1))  # (D, positions in a patch, channels)
    new = old.new_zeros(*old.shape[:2], channels)
    kept = min(channels, old.shape[2])
    new[..., :kept] = old[..., :kept]
    return {**weights, name: new.flatten(1)}


# --- files -----------------------------------------------------------------------------------------------------------


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """In bfloat16, under another name first: a file that is being read stays whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    saved = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(saved, temporary)
    temporary.replace(path)


def folder_megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def load_embedder(folder: Path, config: Config, device: str) -> TextEmbedder:
    """The text encoders that lie in `folder`, in float32, as training needs them."""
    return load_text_encoders(config, folder / "text_encoder", folder / "text_encoder2", device, torch.float32)
