"""Tiny decoders: frame by frame in bounded memory, in a twentieth of the operations, near the VAE; what is refused."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from kandinsky.checkpoints import inspect as inspection
from kandinsky.checkpoints.tiny_decoder import PUBLISHED, TinyLayout, expected_tiny_shapes, parameters
from kandinsky.config.reading import load_config
from kandinsky.loading.vae import load_tiny_decoder, load_vae
from kandinsky.models.vae_flux import AutoencoderKL
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
from kandinsky.models.vae_tiling import VAETiling
from kandinsky.models.vae_tiny import TinyDecoder
from kandinsky.planning import weights as planned_weights
from kandinsky.planning.activations import tiny_bytes
from kandinsky.planning.machine import Machine
from kandinsky.planning.plan import default_request, make_plan, plan_decoding, weight_files
from tests.unit.small_pipelines import build, call, randomised
from tools.train_tiny_decoders import FILE, agreement, draw, encode

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs"
TINY = {"video": REPOSITORY / "assets/tiny/t2v/vae", "image": REPOSITORY / "assets/tiny/image/vae"}
VAES: dict[str, Any] = {"video": AutoencoderKLHunyuanVideo, "image": AutoencoderKL}
SMALL = {"block_out_channels": (16, 32, 64, 64), "layers_per_block": 1, "norm_num_groups": 8}  # the tiny VAEs'
GB = 2**30
CPU = torch.device("cpu")


# --- time ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_frame_is_there_before_the_next_latents_are_looked_at() -> None:
    decoder = randomised(TinyDecoder("video", (8, 8, 4, 4)))
    seen: list[int] = []
    decoder.decoder[1].register_forward_hook(lambda *_: seen.append(1))
    latents = torch.randn(1, 16, 3, 4, 4)
    frames, counts = decoder.frames(latents), []
    for _ in frames:
        counts.append(len(seen))
    assert counts == [1, *[2] * 4, *[3] * 4]
    later = latents.clone()
    later[:, :, 2] += 1
    first, second = decoder.decode(latents), decoder.decode(later)
    assert torch.equal(first[:, :, :5], second[:, :, :5]) and not torch.equal(first[:, :, 5:], second[:, :, 5:])
    assert torch.equal(decoder.decode(latents[:, :, :2]), first[:, :, :5])


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors' memory that existed at once, of what was made within."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@torch.no_grad()
@pytest.mark.parametrize("kind", ["video", "image"])
def test_memory_is_the_formula_s_and_does_not_grow(kind: Any) -> None:
    def peak(length: int) -> int:
        latents = torch.zeros(1, 16, length, 16, 24)
        with LiveBytes() as live:
            for _ in decoder.frames(latents):
                pass
        return live.peak

    widths = (64, 32, 16, 16)
    decoder = TinyDecoder(kind, widths)
    predicted = tiny_bytes(TinyLayout(kind, widths, {}), 24 * 8, 16 * 8, 4)
    lengths = (2, 3, 8) if kind == "video" else (1,)
    peaks = [peak(length) for length in lengths]
    assert peaks[0] == pytest.approx(predicted, rel=0.15)
    assert max(peaks) <= 1.1 * peaks[0]  # the latents themselves, which are counted, grow


# --- operations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "vae", "widths", "size", "times"),
    [
        # The published ones, of a window of 17 frames of 768x512 and of 1024x1024; and the tiny checkpoints' own.
        ("video", {}, None, (5, 64, 96), 35),
        ("image", {}, None, (1, 128, 128), 15),
        ("video", SMALL, "shipped", (7, 16, 16), 20),
        ("image", SMALL, "shipped", (1, 16, 16), 20),
    ],
)
@torch.no_grad()
def test_operations_are_a_fraction(
    kind: Any, vae: dict[str, Any], widths: Any, size: tuple[int, int, int], times: int
) -> None:
    if widths == "shipped":
        widths = load_tiny_decoder(TINY[kind] / FILE, CPU, torch.float32, {"image": "flux"}.get(kind, "hunyuan")).widths
    with torch.device("meta"):
        full, tiny, latents = VAES[kind](**vae), TinyDecoder(kind, widths), torch.empty(1, 16, *size)
        with FlopCounterMode(display=False) as of_tiny:
            shape = tiny.decode(latents).shape
        with FlopCounterMode(display=False) as of_full:
            decoded = full.decode(latents, VAETiling()) if kind == "video" else full.decode(latents[:, :, 0])
    assert shape == (decoded if kind == "video" else decoded[:, :, None]).shape
    assert of_full.get_total_flops() >= times * of_tiny.get_total_flops()


@torch.no_grad()
def test_operations_of_five_seconds() -> None:
    """768x512: 16.6 TFLOP in the published order, a little less where frames grow after their 1x1 convolution."""
    with torch.device("meta"), FlopCounterMode(display=False) as counted:
        for _ in TinyDecoder("video").frames(torch.empty(1, 16, 31, 64, 96)):
            pass
    assert 15 <= counted.get_total_flops() / 1e12 <= 16.6


# --- the tiny checkpoints' own ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "mean", "worst"), [("video", 25, 23), ("image", 32, 28)])
def test_the_shipped_ones_are_near_the_vae(kind: str, mean: float, worst: float) -> None:
    """In dB, on latents of held-out clips and pictures."""
    name = {"image": "flux"}.get(kind, "hunyuan")
    vae = load_vae(TINY[kind], "cpu", torch.float32, name)
    tiny = load_tiny_decoder(TINY[kind] / FILE, CPU, torch.float32, name)
    latents = encode(vae, draw(kind, 3 if kind == "video" else 16, 128, np.random.default_rng(5), "test"))
    values = agreement(tiny, vae, latents)
    assert np.mean(values) >= mean and min(values) >= worst, values


@pytest.mark.parametrize("task", ["t2v", "i2v", "t2i", "i2i"])
def test_every_task_decodes_with_it(task: str, tmp_path: Path) -> None:
    kind: Any = "image" if task in ("t2i", "i2i") else "video"
    pipe: Any = build(task, tiny_decoder=randomised(TinyDecoder(kind, (8, 8, 4, 4))))
    full = call(pipe)
    vae = dataclasses.replace(pipe.config.model.vae, decoder="tiny")
    pipe.config = dataclasses.replace(pipe.config, model=dataclasses.replace(pipe.config.model, vae=vae))
    other = call(pipe)
    as_array = [np.stack([np.asarray(one) for one in out]) for out in (full, other)]
    assert as_array[0].shape == as_array[1].shape and not np.array_equal(*as_array)


# --- files that are none ---------------------------------------------------------------------------------------------


def test_other_files_are_told(tmp_path: Path) -> None:
    def refused(path: Path, name: str = "hunyuan") -> str:
        with pytest.raises(ValueError) as error:
            load_tiny_decoder(path, CPU, torch.float32, name)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "it has no layers of that kind" in refused(TINY["video"] / "diffusion_pytorch_model.safetensors")
    assert "not a tiny decoder of HunyuanVideo's latents" in refused(TINY["image"] / FILE)
    assert "not a tiny decoder of Flux's latents" in refused(TINY["video"] / FILE, "flux")
    wan = {name: torch.zeros(shape) for name, shape in expected_tiny_shapes("video", (8, 8, 4, 4)).items()}
    wan["decoder.1.weight"] = torch.zeros(8, 48, 3, 3)
    save_file(wan, tmp_path / "taew2_2.safetensors")
    assert "its decoder.1.weight is 8x48x3x3" in refused(tmp_path / "taew2_2.safetensors")


def test_inspection_knows_them() -> None:
    for kind, path in TINY.items():
        report = inspection.inspect(path / FILE)
        assert (report.kind, report.problems) == ("tiny decoder", ()) and report.variant.startswith(kind)


# --- the plan --------------------------------------------------------------------------------------------------------


def test_the_plan_counts_it() -> None:
    config = load_config(CONFIGS / "config_5s_sft.yaml", ["runtime.offload=on"])
    tiny = load_config(CONFIGS / "config_5s_sft.yaml", ["runtime.offload=on", "model.vae.decoder=tiny"])
    machine = Machine(64 * GB, 24 * GB)
    full_stages, stages = (
        {
            stage.name: stage
            for stage in make_plan(one, default_request(one), machine, weight_files(one), "bfloat16").stages
        }
        for one in (config, tiny)
    )
    extra = 2 * parameters("video")
    assert stages["denoise"].weights == full_stages["denoise"].weights + extra
    layout = TinyLayout("video", PUBLISHED["video"], {})
    assert tiny_bytes(layout, 768, 512, 2) < stages["decode"].activations < tiny_bytes(layout, 768, 512, 2) + 0.1 * GB
    assert stages["decode"].gpu < full_stages["decode"].gpu
    plan = plan_decoding(tiny, default_request(tiny), machine, weight_files(tiny), "bfloat16")
    assert plan.costs == ("decode: frame by frame, with the tiny decoder",)


def test_previews_of_the_tiny_config_count_it_too() -> None:
    config = load_config(CONFIGS / "config_tiny_t2v.yaml", ["runtime.preview=2"])
    files = weight_files(config)
    assert files["tiny"].name == FILE
    models = planned_weights.models(config, files, 4)
    assert models.tiny_size == 4 * sum(
        p.numel() for p in load_tiny_decoder(files["tiny"], CPU, torch.float32).parameters()
    )
    assert "tiny" not in weight_files(load_config(CONFIGS / "config_tiny_t2v.yaml"))
    published = load_config(CONFIGS / "config_5s_sft.yaml", ["runtime.preview=2"])
    assert "tiny" not in weight_files(published)  # it is not there
