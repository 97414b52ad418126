"""The formulas of memory: weights against what is loaded, activations against peaks that are measured.

Peaks are those of the resident set in a process of its own, which runs this file: its child's part is `main`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kandinsky.checkpoints.files import find_weights
from kandinsky.config.reading import load_config, with_settings
from kandinsky.config.schema import DiTConfig
from kandinsky.models.vae_memory import GB, Decoding
from kandinsky.planning import activations
from kandinsky.planning import weights as planned_weights
from kandinsky.planning.machine import Machine
from kandinsky.planning.plan import default_request, make_plan, weight_files
from tests.limits import EVERYTHING, PATIENCE

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LARGEST_ERROR = 0.15
TOO_MUCH = 0.25  # a plan may say too much by so much: oneDNN's convolutions of one frame need a fifth less with AMX
MiB = 2**20


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dit", "block"),
    [("5s_sft", 4.0e9, 119e6), ("5s_t2v_pro", 38.6e9, 613e6), ("t2i", 12.0e9, 236e6)],
)
def test_weights_of_published_models(name: str, dit: float, block: float) -> None:
    """In bfloat16, beside the sizes that are known for them."""
    models = planned_weights.models(load_config(CONFIGS / f"config_{name}.yaml"), {}, 2)
    assert models.dit.size == models.dit.mapped == pytest.approx(dit, rel=0.015)
    assert models.dit_block == pytest.approx(block, rel=0.015)
    assert (
        models.qwen.size == models.qwen.mapped == 2 * (16_584_333_312 // 2 - 544_997_376 - 676_550_144)
    )  # the files, less head and vision
    assert models.vae_channels == (128, 256, 512, 512)


def test_quantised_weights() -> None:
    pro = load_config(CONFIGS / "config_5s_t2v_pro.yaml")

    def size(scheme: str | None) -> int:
        runtime = dataclasses.replace(pro.runtime, dit_quantization=scheme)
        return planned_weights.models(dataclasses.replace(pro, runtime=runtime), {}, 2).dit.size

    # Modulations, 2.3 of 19.3 billion, and embeddings keep 16 bits, the others get 8 or 4, and scales.
    kept = sum(
        2 * _count(shape)
        for name, (_, shape) in planned_weights.dit_header(pro.model.dit_params, None).items()
        if "modulation" in name or not name.startswith(("text_transformer", "visual_transformer"))
    )
    rest = size(None) - kept
    assert size("fp8") == pytest.approx(kept + rest / 2, rel=0.001)
    assert size("int8") == pytest.approx(kept + rest / 2 * (1 + 4 / 128), rel=0.001)
    assert size("nf4") == pytest.approx(kept + rest / 4 * (1 + 2 * 4 / 64), rel=0.001)
    with_nf4 = dataclasses.replace(pro, runtime=dataclasses.replace(pro.runtime, qwen_quantization=True))
    assert 4.5e9 < planned_weights.models(with_nf4, {}, 2).qwen.size < 5e9


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


@pytest.mark.parametrize("name", ["tiny_t2v", "tiny_i2i"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_of_files_are_what_is_loaded(name: str, dtype: str) -> None:
    import torch

    from kandinsky.loading.dit import load_dit
    from kandinsky.loading.text import load_text_encoders
    from kandinsky.loading.vae import load_vae

    config = load_config(CONFIGS / f"config_{name}.yaml")
    files, torch_dtype = weight_files(config), getattr(torch, dtype)
    if not files["dit"].exists():
        pytest.skip("the tiny checkpoints are not there")
    models = planned_weights.models(config, files, torch_dtype.itemsize)

    text = load_text_encoders(config, files["qwen"], files["clip"], "cpu", torch_dtype)
    assert (models.qwen.size, models.clip.size) == (num_bytes(text.qwen), num_bytes(text.clip))
    assert models.dit.size == num_bytes(load_dit(files["dit"], config.model.dit_params, "cpu", torch_dtype))
    vae = load_vae(files["vae"], "cpu", torch_dtype, config.model.vae.name)
    assert models.vae.size == num_bytes(vae)
    assert models.vae_channels == vae.block_out_channels
    assert models.qwen_intermediate == text.language_model.config.intermediate_size
    for weights, name in ((models.dit, "dit"), (models.vae, "vae"), (models.clip, "clip")):  # Qwen's has its head too
        (file,) = find_weights(files[name])
        assert 0.9 * file.stat().st_size < weights.read < file.stat().st_size


def num_bytes(module: Any) -> int:
    """Of the parameters, and of what quantised layers have in their place."""
    quantised = [b for name, b in module.named_buffers() if name.rpartition(".")[2].startswith("weight_")]
    return sum(tensor.nbytes for tensor in (*module.parameters(), *quantised))


@pytest.mark.parametrize("scheme", ["int8", "fp8", "nf4"])
def test_quantised_weights_are_what_is_loaded(scheme: str, tmp_path: Path) -> None:
    """On the way from the file, and in a file that is quantised, whose header says so."""
    import torch

    from kandinsky.loading.dit import load_dit
    from kandinsky.loading.text import load_text_encoders
    from kandinsky.runtime.quantization import save_checkpoint

    config = load_config(CONFIGS / "config_tiny_t2v.yaml")
    files, params = weight_files(config), config.model.dit_params
    both = with_settings(config, runtime={"dit_quantization": scheme, "qwen_quantization": True})
    models = planned_weights.models(both, files, 2)
    dit = load_dit(files["dit"], params, "cpu", torch.bfloat16, scheme)
    assert models.dit.size == num_bytes(dit) and models.dit_quantization == scheme
    blocks = sum(map(num_bytes, dit.visual_transformer_blocks))
    assert models.dit_block * models.dit_blocks == blocks
    text = load_text_encoders(both, files["qwen"], files["clip"], "cpu", torch.bfloat16)
    assert models.qwen.size == num_bytes(text.qwen)

    quantised = tmp_path / "dit.safetensors"
    save_checkpoint(dit, quantised)
    for size in (2, 4):
        in_file = planned_weights.models(config, {"dit": quantised}, size)
        loaded = load_dit(quantised, params, "cpu", torch.float32 if size == 4 else torch.bfloat16)
        assert in_file.dit.size == num_bytes(loaded) and in_file.dit_quantization == scheme
    assert in_file.dit.read < quantised.stat().st_size < 1.1 * in_file.dit.read
    assert planned_weights.models(config, {"dit": quantised}, 2).dit.mapped == in_file.dit.read


def test_a_file_of_another_variant_is_named() -> None:
    """Before anything is said about whether it fits."""
    files = weight_files(load_config(CONFIGS / "config_tiny_t2v.yaml"))
    with pytest.raises(ValueError, match=r"tiny_t2v\.safetensors: this file is a model of its own .* says Lite"):
        planned_weights.models(load_config(CONFIGS / "config_5s_sft.yaml"), {"dit": files["dit"]}, 2)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "config_5s_sft.yaml")
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated"):
        planned_weights.models(config, {"dit": tmp_path}, 2)
    with pytest.raises(ValueError, match=r"config\.json: not readable"):
        planned_weights._vae_channels(tmp_path)


def test_chunks_take_less_and_never_more() -> None:
    """Down to the projections of attention, which no chunk makes smaller."""
    lite = load_config(CONFIGS / "config_5s_sft.yaml").model.dit_params
    chunks = (None, 47_616, 16_384, 4096, 64)
    sizes = [activations.dit_activations(lite, 47_616, 256, 2, on_gpu=True, chunk_tokens=chunk) for chunk in chunks]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] == sizes[0] and sizes[3] == sizes[4] < 0.75 * sizes[0]


# --- peaks ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Forward:
    """One forward of a DiT of two blocks."""

    model_dim: int
    ff_dim: int
    tokens: tuple[int, int, int]
    text_tokens: int
    dtype: str
    head_dim: int = 64
    nabla: bool = False
    chunk_tokens: int | None = None

    @property
    def config(self) -> DiTConfig:
        axes = {64: (16, 24, 24), 128: (32, 48, 48)}[self.head_dim]
        return DiTConfig(
            in_text_dim=64, in_text_dim2=32, time_dim=64, model_dim=self.model_dim, ff_dim=self.ff_dim,
            num_text_blocks=1, num_visual_blocks=2, axes_dims=axes, visual_cond=True,
        )  # fmt: skip

    @property
    def predicted(self) -> int:
        size = 4 if self.dtype == "float32" else 2
        sizes = _count(self.tokens), self.text_tokens, size
        return activations.dit_activations(self.config, *sizes, nabla=self.nabla, chunk_tokens=self.chunk_tokens)

    def prepare(self) -> tuple[Callable[[], object], Callable[[], object]]:
        import torch

        from kandinsky.attention.nabla import NablaConfig
        from kandinsky.models.dit import DiffusionTransformer3D, Execution

        dtype = getattr(torch, self.dtype)
        dit = DiffusionTransformer3D(**dataclasses.asdict(self.config)).to(dtype).eval()
        for parameter in dit.parameters():
            parameter.normal_(0, 0.05)
        execution = Execution(chunk_tokens=self.chunk_tokens)

        def forward(t: int, h: int, w: int, text_tokens: int) -> Callable[[], object]:
            latents, text = torch.randn(1, t, 2 * h, 2 * w, 33), torch.randn(1, text_tokens, 64).to(dtype)
            pooled, time = torch.randn(1, 32), torch.tensor([500.0])
            nabla = NablaConfig(0.8, 3, 3, 3) if self.nabla else None
            return lambda: dit(latents, text, pooled, time, nabla=nabla, execution=execution)

        return forward(1, 8, 8, 8), forward(*self.tokens, self.text_tokens)


@dataclasses.dataclass(frozen=True)
class Decode:
    """Decoding by a VAE with the levels of the published ones, in one piece or in tiles."""

    vae: str
    channels: tuple[int, ...]
    latents: tuple[int, int, int]  # frames, rows, columns
    dtype: str
    tile: int = 4096

    @property
    def predicted(self) -> int:
        import torch

        from kandinsky.loading.devices import convolves_in_float32

        frames, rows, columns = self.latents
        dtype = getattr(torch, self.dtype)
        decoding = Decoding(
            self.vae, self.channels, dtype.itemsize, 8 * columns, 8 * rows, 4 * frames - 3, 64,  # type: ignore
            float32_convolutions=convolves_in_float32(dtype, torch.device("cpu")),
        )  # fmt: skip
        return decoding.peak_bytes(self.tile)

    def prepare(self) -> tuple[Callable[[], object], Callable[[], object]]:
        import torch

        from kandinsky.loading.devices import convolves_in_float32
        from kandinsky.models.vae_flux import AutoencoderKL
        from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
        from kandinsky.models.vae_tiling import VAETiling

        dtype, tiling = getattr(torch, self.dtype), VAETiling(size=self.tile)
        is_video = self.vae == "hunyuan"
        model = AutoencoderKLHunyuanVideo if is_video else AutoencoderKL
        vae = model(block_out_channels=self.channels, norm_num_groups=8).to(dtype).eval()
        if is_video:
            vae.convolve_by_frame(True)
        else:
            vae.to(memory_format=torch.channels_last)
        vae.convolve_in_float32(convolves_in_float32(dtype, torch.device("cpu")))

        def decode(*size: int) -> Callable[[], object]:
            latents = torch.randn(1, 16, *size[0 if is_video else 1 :]).to(dtype)
            return lambda: vae.decode(latents, tiling)

        return decode(2, 4, 4), decode(*self.latents)


# Wide enough that no kernel's constant few MiB matter, and small enough for a few seconds.
FORWARDS: tuple[Forward, ...] = (
    Forward(256, 1024, (8, 24, 32), 64, "float32"),  # the peak is in the feed-forward
    Forward(512, 512, (4, 24, 32), 64, "float32", head_dim=128),  # in turning queries and keys
    Forward(512, 1024, (4, 32, 32), 64, "float32", nabla=True),  # in block-sparse attention
    Forward(512, 2048, (4, 24, 32), 64, "bfloat16", chunk_tokens=512),
)
DECODES: tuple[Decode, ...] = (
    Decode("hunyuan", (64, 128, 128, 128), (3, 12, 12), "bfloat16"),  # in the first convolution
    Decode("hunyuan", (64, 64, 64, 64), (7, 8, 8), "bfloat16"),  # in windows
    Decode("hunyuan", (64, 128, 128, 128), (1, 40, 40), "bfloat16"),  # one frame
    Decode("flux", (128, 256, 256, 256), (1, 40, 48), "bfloat16", tile=256),
)
if EVERYTHING:
    FORWARDS += (
        Forward(512, 2048, (8, 24, 32), 64, "bfloat16"),
        Forward(1024, 1024, (4, 24, 32), 256, "bfloat16", head_dim=128),
        Forward(256, 1024, (8, 24, 32), 64, "float32", chunk_tokens=1024),
    )
    DECODES += (
        Decode("hunyuan", (64, 128, 128, 128), (5, 8, 12), "bfloat16"),  # in the shortcut
        Decode("hunyuan", (128, 256, 256, 256), (2, 8, 16), "float32"),
        Decode("flux", (64, 128, 128, 128), (1, 48, 48), "float32"),
    )


def measure(rows: str) -> list[int]:
    """Peaks above what was there before, of all of FORWARDS or DECODES, by this file in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of the resident set is measured on Linux")
    # glibc: give freed tensors back to the system at once, so that what is resident is what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIGS.parent)}
    command = [sys.executable, __file__, rows]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.processor
@pytest.mark.slow
@pytest.mark.parametrize("rows", ["FORWARDS", "DECODES"])
def test_predicted_peaks_are_those_that_are_measured(rows: str) -> None:
    cases = globals()[rows]
    peaks = measure(rows)
    off = [case.predicted / peak - 1 for case, peak in zip(cases, peaks, strict=True)]
    table = "\n".join(
        f"{case.predicted / MiB:7.1f} MiB predicted, {peak / MiB:7.1f} measured, {error:+.0%}: {case}"
        for case, peak, error in zip(cases, peaks, off, strict=True)
    )
    sys.stdout.write(f"{table}\n")  # what pytest -rP shows
    assert min(off) >= -LARGEST_ERROR and max(off) <= TOO_MUCH, table


@pytest.mark.processor
@pytest.mark.slow
def test_predicted_peak_of_a_whole_run() -> None:
    """Of the tiny text to video model, most of it Python and torch themselves."""
    import torch

    if torch.version.cuda is not None:
        pytest.skip("how much torch itself takes is known of its CPU build")
    config = load_config(CONFIGS / "config_tiny_t2v.yaml")
    files = weight_files(config)
    if not files["dit"].exists():
        pytest.skip("the tiny checkpoints are not there")
    plan = make_plan(config, default_request(config), Machine(16 * GB), files, "float32")
    (peak,) = measure("RUN")
    assert max(stage.host for stage in plan.stages) == pytest.approx(peak, rel=LARGEST_ERROR)


def resident(field: str) -> int:
    """VmRSS, what is resident now, or VmHWM, the most that was, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def main(rows: str) -> None:
    """In the child: measure each row's second function after its first, a small one of the same kind."""
    import torch

    torch.set_num_threads(1)
    peaks = []
    if rows == "RUN":
        from kandinsky.loading.assemble import load_pipeline

        pipe = load_pipeline(load_config(CONFIGS / "config_tiny_t2v.yaml"), "cpu")
        pipe.generate(dataclasses.replace(default_request(pipe.config), num_steps=1), progress=False)
        peaks.append(resident("VmHWM"))
    else:
        with torch.no_grad():
            for case in globals()[rows]:
                warm_up, run = case.prepare()
                warm_up()
                gc.collect()
                before = resident("VmRSS")
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
                run()
                peaks.append(resident("VmHWM") - before)
    sys.stdout.write(json.dumps(peaks))


if __name__ == "__main__":
    main(sys.argv[1])
