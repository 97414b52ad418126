"""Whole requests of a variant on a GPU that is not there: what they take, beside what was planned for them.

Weight files are headers of the published shapes with nothing behind them; their tensors come without numbers. Words are
embedded already: the text encoders are not rehearsed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import Tensor

from benchmarks._flops import dit_flops
from kandinsky.checkpoints.dit_layout import expected_dit_shapes, is_quantizable, quantized_parts
from kandinsky.checkpoints.headers import Header, read_header
from kandinsky.config.reading import load_config, with_settings
from kandinsky.config.schema import Config, DiTConfig
from kandinsky.loading import assemble, dit, weights
from kandinsky.loading.assemble import load_pipeline
from kandinsky.loading.devices import machine_memory
from kandinsky.models.layers import TimeEmbeddings
from kandinsky.models.vae_flux import AutoencoderKL
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
from kandinsky.pipelines.base import Pipeline
from kandinsky.planning.adapters import adapter_files
from kandinsky.planning.machine import CUDA_CONTEXT
from kandinsky.planning.plan import default_request, make_plan, models_in
from kandinsky.planning.stages import text_tokens
from kandinsky.runtime import lora
from kandinsky.text.embeddings import TextEmbeddings
from tests.rehearsal.fake_gpu import NABLA_DENSITY, FakeGPU

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
DEVICE = torch.device("cuda", 0)
WITHIN_PLAN, WITHIN_FLOPS = 0.15, 0.01


@dataclass
class Rehearsed:
    """What came of a request: by stage its peak on the GPU in bytes, as counted and as planned; operations likewise."""

    settings: dict[str, Any]
    peaks: dict[str, tuple[int, int]]
    flops: tuple[float, float]  # of all evaluations, counted and by formula
    evaluations: int
    kernels: dict[str, int]
    faults: list[str] = field(default_factory=list)


def write_hollow_file(path: Path, tensors: Header) -> None:
    """A safetensors file whose tensors are a hole: any size takes no room on the disk."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def without_numbers(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """`read_tensors` of hollow files."""
    for file in files:
        for name, (dtype, shape) in read_header(file).items():
            yield name, torch.empty(shape, dtype=DTYPES[dtype])


class HollowTensors:
    """An open file of weights, whose tensors come without numbers."""

    def __init__(self, path: Path) -> None:
        self._header = read_header(path)

    def get_tensor(self, name: str) -> Tensor:
        dtype, shape = self._header[name]
        return torch.empty(shape, dtype=DTYPES[dtype])


@contextlib.contextmanager
def open_hollow(path: Path, **_: Any) -> Iterator[HollowTensors]:
    yield HollowTensors(path)


def write_hollow_lora(path: Path, params: DiTConfig, rank: int = 16) -> None:
    """An adapter of every layer that is quantised where weights are."""
    tensors = {}
    for name, (rows, *columns) in expected_dit_shapes(params).items():
        layer = name.removesuffix(".weight")
        if layer != name and is_quantizable(layer):
            tensors[f"{layer}.lora_A.weight"] = ("BF16", (rank, *columns))
            tensors[f"{layer}.lora_B.weight"] = ("BF16", (rows, rank))
    write_hollow_file(path, tensors)


def hollow_files(config: Config, folder: Path, scheme: str | None = None) -> dict[str, Path]:
    """The DiT and the VAE of a config; the text encoders' files are not there, so the planner takes the published.

    scheme: of the DiT's layers, like "q8_0" as a GGUF file's reader names them.
    """
    tensors = {}
    for name, shape in expected_dit_shapes(config.model.dit_params).items():
        layer = name.removesuffix(".weight")
        if scheme is not None and layer != name and is_quantizable(layer):
            tensors |= {f"{layer}.{part}": entry for part, entry in quantized_parts(scheme, *shape).items()}
        else:
            tensors[name] = ("BF16", shape)
    write_hollow_file(folder / "dit.safetensors", tensors)
    kind = AutoencoderKL if config.model.vae.name == "flux" else AutoencoderKLHunyuanVideo
    with torch.device("meta"):
        vae = kind()
    tensors = {name: ("F32", tuple(tensor.shape)) for name, tensor in vae.state_dict().items()}
    write_hollow_file(folder / "vae" / "diffusion_pytorch_model.safetensors", tensors)
    (folder / "vae" / "config.json").write_text("{}")
    return {"dit": folder / "dit.safetensors", "vae": folder / "vae", "qwen": folder / "qwen", "clip": folder / "clip"}


def published(name: str, **runtime: Any) -> Config:
    config = load_config(CONFIGS / f"config_{name}.yaml")
    return with_settings(config, runtime=runtime, generation={"expand_prompts": False})


def rehearse(config: Config, folder: Path, memory_gb: float = 80, steps: int = 3, change: Any = None,
             output_type: str = "pt", scheme: str | None = None) -> Rehearsed:  # fmt: skip
    """A request of the config's own size, with fewer steps. `change` is called with (gpu, pipeline) before it runs.

    scheme: of the DiT's file, see `hollow_files`.
    """
    if config.runtime.dit_quantization == "nf4":
        import bitsandbytes  # noqa: F401  (before there is a GPU to be seen, whose libraries it would look for)
    files = hollow_files(config, folder, scheme)
    gpu = FakeGPU(memory_gb * 2**30 - CUDA_CONTEXT)
    with gpu, mock.patch.object(weights, "read_tensors", without_numbers), \
            mock.patch.object(assemble, "locate_weights", lambda part, given, *_: Path(given)), \
            mock.patch.object(dit, "fingerprint", lambda files: ()), \
            mock.patch.object(lora, "open_tensors", open_hollow), \
            watch_time_embeddings(gpu):  # fmt: skip
        request = default_request(config)
        files |= adapter_files(config)
        plan = make_plan(config, request, machine_memory(DEVICE), files, "bfloat16")
        settled, models = plan.config, models_in("bfloat16", config, files, plan.machine)
        absent = 0 if settled.runtime.offload == "on" else models.text.size
        planned = {stage.name: stage.weights + stage.activations - absent for stage in plan.stages}
        gpu.label = "loading"
        pipeline = load_pipeline(
            config, DEVICE, folder, dit_path=files["dit"], vae_path=files["vae"], text_encoder_path=files["qwen"],
            text_encoder2_path=files["clip"], request=request, read_text_encoders=False,
        )  # fmt: skip
        if change is not None:
            change(gpu, pipeline)
        peaks: dict[str, tuple[int, int]] = {}
        evaluations = _watch(gpu, pipeline, planned, peaks)
        words, pictures = text_tokens(config, request), []
        if config.task in ("i2v", "i2i"):
            pictures = [Image.new("RGB", (request.width, request.height))]
        params = config.model.dit_params
        embeds = TextEmbeddings(
            torch.empty(1, words, params.in_text_dim, dtype=torch.bfloat16, device=DEVICE),
            torch.empty(1, params.in_text_dim2, device=DEVICE),
            None,
        )
        gpu.label = "encoding"
        pipeline.run(
            None, images=pictures, prompt_embeds=embeds, negative_prompt_embeds=embeds, seed=0, num_steps=steps,
            output_type=output_type, progress=False, **({} if pictures or request.is_image else {"time_length": None}),
        )  # fmt: skip
        gpu.label = ""
        is_nabla = config.model.attention.type == "nabla"
        flops = dit_flops(params, request.latent_size, words, NABLA_DENSITY if is_nabla else 1)
        done = len(evaluations)
        result = Rehearsed(
            settings=plan.settings,
            peaks=peaks,
            flops=(sum(sum(one.values()) for one in evaluations), done * flops),
            evaluations=done,
            kernels=dict(gpu.kernels),
        )
        del pipeline
    result.faults = [*gpu.faults, *_faults(gpu, result, evaluations, config.magcache.enabled)]
    return result


def watch_time_embeddings(gpu: FakeGPU) -> Any:
    forward = TimeEmbeddings.forward

    @functools.wraps(forward)
    def watched(self: TimeEmbeddings, timesteps: Tensor) -> Tensor:
        out = forward(self, timesteps)
        if timesteps.dtype != torch.float32 or out.dtype != torch.float32:
            gpu.fault(f"a timestep in {timesteps.dtype} makes an embedding in {out.dtype}: both are to be float32")
        return out

    return mock.patch.object(TimeEmbeddings, "forward", watched)


def _watch(gpu: FakeGPU, pipeline: Pipeline, planned: dict[str, int], peaks: dict[str, tuple[int, int]]) -> list[Any]:
    """Have each stage's peak written down, and the operations of each evaluation returned as they come."""

    def stage(method: str, name: str) -> None:
        run = getattr(pipeline, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            gpu.reset_peak()
            gpu.label = name
            try:
                return run(*args, **kwargs)
            finally:
                if name in planned:
                    peaks[name] = (gpu.peak, planned[name])
                gpu.label = "after " + name

        setattr(pipeline, method, watched)

    for method, name in (("encode_images", "encode image"), ("denoise", "denoise"), ("decode", "decode")):
        stage(method, name)
    evaluations: list[Any] = []
    forward = pipeline.dit.forward
    live: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        gpu.label = f"evaluation {len(evaluations) + 1}"
        live.append(gpu.live)
        before = gpu.flops.copy()
        out = forward(*args, **kwargs)
        evaluations.append(gpu.flops - before)
        # The same work finds the same memory in use, from the second step on.
        if len(live) > 5 and live[-1] > live[-3] > live[-5]:
            gpu.fault(f"memory in use grows from step to step, by {live[-1] - live[-3]} bytes")
        return out

    pipeline.dit.forward = counted
    return evaluations


def _faults(gpu: FakeGPU, result: Rehearsed, evaluations: list[Any], is_cached: bool) -> Iterator[str]:
    for name, (counted, planned) in result.peaks.items():
        if abs(counted / planned - 1) > WITHIN_PLAN:
            yield f"{name} takes {counted / 2**30:.2f} GB, and {planned / 2**30:.2f} are planned"
    counted, formula = result.flops
    if abs(counted / formula - 1) > WITHIN_FLOPS and not is_cached:
        yield f"{counted / 1e12:.1f} TFLOP are counted, and {formula / 1e12:.1f} are what the formula says"
    wide = sum(one["torch.float32"] for one in evaluations)
    if wide > WITHIN_FLOPS * counted:
        yield f"{wide / 1e12:.1f} of {counted / 1e12:.1f} TFLOP are in float32: weights of the wrong dtype"
    # After the first evaluation its result is looked at once; nothing else waits before the last.
    last = len(evaluations)
    for sync in gpu.syncs:
        where = sync.rpartition("evaluation ")
        if where[1] and where[0].endswith(" in ") and 1 < int(where[2]) < last:
            yield f"the host waits for the device between steps: {sync}"
            break


def as_row(name: str, size: str, result: Rehearsed) -> str:
    """A row of the table."""
    counted, formula = result.flops
    cells = [name, size, f"{counted / result.evaluations / 1e12:.1f}", f"{counted / formula:.4f}"]
    for stage in ("denoise", "decode"):
        peak, planned = result.peaks.get(stage, (0, 0))
        cells += [f"{peak / 2**30:.2f}", f"{planned / 2**30:.2f}", f"{peak / planned:.3f}"] if planned else ["", "", ""]
    settings = ", ".join(f"{key} {value}" for key, value in result.settings.items() if value is not None)
    return "| " + " | ".join([*cells, settings, "; ".join(result.faults) or "none"]) + " |"


def size_of(config: Config) -> str:
    request = default_request(config)
    return f"{request.width}x{request.height}x{request.num_frames}"


@dataclass(frozen=True)
class Case:
    name: str
    memory_gb: float = 80
    runtime: dict[str, Any] = field(default_factory=dict)
    scheme: str | None = None  # of the DiT's file
    has_lora: bool = False
    decodes: bool = True

    @property
    def words(self) -> str:
        given = [f"{key} {value}" for key, value in self.runtime.items()]
        given += [f"GGUF {self.scheme}"] * (self.scheme is not None) + ["LoRA"] * self.has_lora
        return f"{self.name} | {self.memory_gb:g}; {', '.join(given) or 'nothing'}"

    def run(self, folder: Path, steps: int = 2) -> Rehearsed:
        config = published(self.name, **self.runtime)
        if self.has_lora:
            write_hollow_lora(folder / "lora.safetensors", config.model.dit_params)
            config = dataclasses.replace(
                config, model=dataclasses.replace(config.model, loras=(str(folder / "lora.safetensors"),))
            )
        output_type = "pt" if self.decodes else "latent"
        return rehearse(config, folder, self.memory_gb, steps, output_type=output_type, scheme=self.scheme)


STREAMED = {"offload": "on", "blocks_on_gpu": 8}
CASES = [
    Case("5s_sft"),
    Case("5s_sft", 24, {"offload": "on"}),
    Case("5s_sft", 8, {"offload": "on", "blocks_on_gpu": 2, "chunk_tokens": 8192}),
    *(Case("5s_sft", 24, {"dit_quantization": scheme}, decodes=False) for scheme in ("int8", "fp8", "nf4")),
    Case("5s_sft", 24, {"dit_quantization": "int8", **STREAMED}, decodes=False),
    Case("5s_sft", 24, scheme="q8_0", decodes=False),
    Case("5s_sft", 24, scheme="q4_k", decodes=False),
    Case("5s_sft", 80, has_lora=True, decodes=False),
    Case("5s_sft", 24, STREAMED, has_lora=True, decodes=False),
    Case("5s_sft", 24, {"dit_quantization": "int8"}, has_lora=True, decodes=False),
    Case("10s_sft"),
    Case("5s_i2v", 24),
    Case("5s_t2v_pro"),
    Case("5s_t2v_pro", 24, {"offload": "on", "blocks_on_gpu": 10}),
    Case("5s_t2v_pro_hd"),
    Case("10s_t2v_pro"),
    Case("10s_t2v_pro_hd"),
    Case("5s_i2v_pro"),
    Case("5s_i2v_pro_hd"),
    Case("t2i", 24),
    Case("i2i", 24),
]
# The others decode what one of those does.
CASES += [
    Case(name, decodes=False)
    for name in sorted(path.stem.removeprefix("config_") for path in CONFIGS.glob("config_*.yaml"))
    if "tiny" not in name and name not in {case.name for case in CASES}
]
HEAD = (
    "variant | GPU, GB; set | size | TFLOP a forward | counted / formula | denoise GB | planned | ratio "
    "| decode GB | planned | ratio | chosen | found"
)


def main() -> None:
    """Print the table of all variants; exit with 1 where anything was found. Names given limit it to those."""
    wanted, is_clean = sys.argv[1:], True
    print(f"| {HEAD} |\n|{'---|' * (HEAD.count('|') + 1)}", flush=True)
    for case in CASES:
        if wanted and case.name not in wanted:
            continue
        size = size_of(published(case.name))
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = case.run(Path(folder))
            except (ValueError, RuntimeError) as error:
                print(f"| {case.words} | {size} | {type(error).__name__}: {error} |", flush=True)
                is_clean = False
                continue
        is_clean = is_clean and not result.faults
        print(as_row(case.words, size, result), flush=True)
    sys.exit(not is_clean)


if __name__ == "__main__":
    main()
