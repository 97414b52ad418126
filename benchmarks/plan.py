"""What the planner predicts of a run's memory beside what the run takes, stage by stage, on a CPU.

    python benchmarks/plan.py [--rows SUBSTRING ...]

Writes random models at a hundredth of the published sizes, and runs one step of each row of settings with them, all in
one process: every peak is what the row adds to what was resident before it. Peaks are the kernel's (VmHWM, of the
resident set), set back at the beginning of every stage. Weight files that are mapped are part of the resident set until
the system needs the room, so predicted is the sum of the plan's `host` and `mapped`, less Python and torch, which are
there before.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

from benchmarks.memory import status, write_checkpoint
from kandinsky.checkpoints.dit_layout import expected_dit_shapes
from kandinsky.config.reading import load_config
from kandinsky.config.schema import Config, DiTConfig
from kandinsky.loading.assemble import load_pipeline
from kandinsky.loading.devices import machine_memory
from kandinsky.loading.dit import load_dit
from kandinsky.models.vae_flux import AutoencoderKL
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
from kandinsky.pipelines.base import Pipeline
from kandinsky.pipelines.inputs import Inputs
from kandinsky.planning.machine import HOST_OF_CPU_RUN
from kandinsky.planning.plan import make_plan, weight_files
from kandinsky.planning.stages import Stage
from kandinsky.request import Request, resolve_request
from kandinsky.runtime.offload import Offloaded, OffloadPlacement
from kandinsky.runtime.processes import Processes
from kandinsky.runtime.quantization import require_scheme, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
MB = 10**6
# The plan's stages -> the pipeline's methods.
STAGES = {"encode text": "_embed", "encode image": "encode_images", "denoise": "denoise", "decode": "decode"}
PROMPT = "a red circle " * 40  # as long as prompts get
QWEN = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 4}
VAE = {"block_out_channels": (16, 32, 64, 128), "norm_num_groups": 8}
DIT = DiTConfig(
    in_text_dim=384, in_text_dim2=64, time_dim=64, model_dim=512, ff_dim=2048, num_text_blocks=1, num_visual_blocks=4,
    axes_dims=(16, 24, 24),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Settings of a run. `file`: what the DiT's file holds, "bfloat16", "float32" or "int8". `lora`: with an adapter
    for all layers. `processes`: that make it together; measured is what they take in sum."""

    dtype: str
    runtime: tuple[str, ...] = ()
    task: str = "t2v"
    file: str = "bfloat16"
    width: int = 256
    height: int = 256
    seconds: float = 0.2
    overrides: tuple[str, ...] = ()
    lora: bool = False
    processes: int = 1

    def __str__(self) -> str:
        size = f"{self.width}x{self.height}" + (f", {self.seconds:g} s" if self.seconds else "")
        parts = (self.task, self.dtype, *(f"{self.file} file",), *self.runtime, *self.overrides, size)
        parts += ("adapter",) * self.lora + (f"{self.processes} processes",) * (self.processes > 1)
        return ", ".join(parts)


ROWS = (
    Row("float32"),
    Row("float32", ("offload=on",)),
    Row("bfloat16"),
    Row("bfloat16", ("offload=on",)),
    Row("bfloat16", ("offload=on", "blocks_on_gpu=1")),
    Row("bfloat16", ("offload=off", "blocks_on_gpu=2")),
    Row("bfloat16", file="float32"),
    Row("bfloat16", ("offload=on",), file="float32"),
    Row("float32", file="float32"),
    Row("bfloat16", ("dit_quantization=int8",)),
    Row("bfloat16", ("dit_quantization=fp8", "offload=on")),
    Row("bfloat16", ("dit_quantization=int8", "offload=on", "blocks_on_gpu=1")),
    Row("float32", ("dit_quantization=nf4", "qwen_quantization=true")),
    Row("bfloat16", ("offload=on",), file="int8"),
    Row("float32", ("chunk_tokens=128",), width=512),
    Row("bfloat16", ("offload=on", "chunk_tokens=256"), width=512, height=512),
    Row("float32", ("offload=on",), width=384, overrides=("model.vae.memory_budget_gb=0.2",)),
    Row("float32", ("offload=on",), task="i2v"),
    Row("float32", ("offload=on",), task="t2i", width=512, height=512, seconds=0),
    Row("bfloat16", task="t2i", width=512, height=512, seconds=0),
    Row("bfloat16", lora=True),
    Row("bfloat16", ("offload=on", "blocks_on_gpu=1"), lora=True),
    Row("bfloat16", ("offload=on", "blocks_on_gpu=1", "blocks_from=file"), lora=True),
    Row("bfloat16", ("dit_quantization=int8",), lora=True),
    Row("float32", width=512, height=512, processes=2),
    Row("float32", ("shard_weights=true",), width=512, height=512, processes=2),
)


# --- random models ----------------------------------------------------------------------------------------------------


def dit_params(task: str) -> DiTConfig:
    return dataclasses.replace(DIT, visual_cond=task != "t2i")


def write_models(folder: Path) -> None:
    """All that ROWS need: DiTs, VAEs and text encoders with the tiny checkpoints' tokenizers; 0.3 GB."""
    for task in ("t2v", "t2i"):
        place = folder / task
        (place / "model").mkdir(parents=True)
        params = dit_params(task)
        write_checkpoint(place / "model" / "bfloat16.safetensors", params)
        if task == "t2v":
            write_checkpoint(place / "model" / "float32.safetensors", params, "F32")
            write_adapter(place / "model" / "adapter.safetensors", params)
            dit = load_dit(place / "model" / "bfloat16.safetensors", params, "cpu", torch.bfloat16, "int8")
            save_checkpoint(dit, place / "model" / "int8.safetensors")
        vae = AutoencoderKLHunyuanVideo if task == "t2v" else AutoencoderKL
        path = place / "vae" / "diffusion_pytorch_model.safetensors"
        write_model(functools.partial(vae, **VAE), path, torch.float32)
        (place / "vae" / "config.json").write_text(json.dumps(VAE))
    write_text_encoders(folder)


def write_adapter(path: Path, params: DiTConfig, rank: int = 64) -> None:
    """A LoRA for all layers; 64 is more than is usual, to be seen beside the rest."""
    tensors = {}
    for name, shape in expected_dit_shapes(params).items():
        if len(shape) == 2:
            layer = name.removesuffix(".weight")
            tensors[f"{layer}.lora_A.weight"] = 0.01 * torch.randn(rank, shape[1])
            tensors[f"{layer}.lora_B.weight"] = 0.01 * torch.randn(shape[0], rank)
    save_file(tensors, path)


def write_model(make: Callable[[], nn.Module], path: Path, dtype: torch.dtype) -> None:
    """Small random weights for all of a model's parameters; the model itself is made without memory."""
    with torch.device("meta"):
        model = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: (0.02 * torch.randn(p.shape)).to(dtype) for name, p in model.named_parameters()}, path)


def write_text_encoders(folder: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, Qwen2_5_VLConfig, Qwen2_5_VLTextModel

    tiny = ROOT / "assets" / "tiny" / "t2v"
    for name in ("text_encoder", "text_encoder2"):
        shutil.copytree(tiny / name, folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((folder / "text_encoder" / "config.json").read_text())
    text = settings["text_config"] | QWEN
    head_dim = QWEN["hidden_size"] // QWEN["num_attention_heads"]
    text["layer_types"] = ["full_attention"] * QWEN["num_hidden_layers"]
    text["rope_parameters"]["mrope_section"] = [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16]
    (folder / "text_encoder" / "config.json").write_text(json.dumps(settings | {"text_config": text}))
    qwen = Qwen2_5_VLConfig.from_pretrained(folder / "text_encoder").text_config
    path = folder / "text_encoder" / "model.safetensors"
    write_model(lambda: Qwen2_5_VLTextModel(qwen), path, torch.bfloat16)
    settings = json.loads((folder / "text_encoder2" / "config.json").read_text())
    settings |= {"hidden_size": DIT.in_text_dim2, "projection_dim": DIT.in_text_dim2}
    (folder / "text_encoder2" / "config.json").write_text(json.dumps(settings))
    clip = CLIPTextConfig.from_pretrained(folder / "text_encoder2")
    write_model(lambda: CLIPTextModel(clip), folder / "text_encoder2" / "model.safetensors", torch.float32)


def config_of(row: Row, folder: Path) -> Config:
    """A tiny variant's config with the random models in the place of its own."""
    overrides = [*(f"runtime.{setting}" for setting in row.runtime), *row.overrides]
    if row.task == "t2i":  # pictures have none but their own sizes
        overrides += [f"generation.resolutions=[[{row.width},{row.height}]]"]
        overrides += [f"generation.width={row.width}", f"generation.height={row.height}"]
        overrides += ["model.text_embedder.qwen.crop=80"]  # the tokenizer is that of the video model
    overrides += ["model.num_steps=1", "model.guidance_weight=1", "model.text_embedder.qwen.max_length=256"]
    config = load_config(ROOT / "configs" / f"config_tiny_{row.task}.yaml", overrides)
    of_task = folder / ("t2i" if row.task == "t2i" else "t2v")
    model, encoders, replace = config.model, config.model.text_embedder, dataclasses.replace
    encoders = replace(
        encoders,
        qwen=replace(encoders.qwen, checkpoint_path=str(folder / "text_encoder"), emb_size=DIT.in_text_dim),
        clip=replace(encoders.clip, checkpoint_path=str(folder / "text_encoder2"), emb_size=DIT.in_text_dim2),
    )
    model = replace(
        model,
        dit_params=dit_params(row.task),
        checkpoint_path=str(of_task / "model" / f"{row.file}.safetensors"),
        loras=(str(of_task / "model" / "adapter.safetensors"),) if row.lora else (),
        vae=replace(model.vae, checkpoint_path=str(of_task / "vae")),
        text_embedder=encoders,
    )
    return replace(config, model=model)


def request_of(row: Row, config: Config) -> Request:
    sizes = [(row.width, row.height)] if row.task == "i2v" else []
    wishes: dict[str, Any] = {} if row.task == "t2i" else {"time_length": row.seconds}
    return resolve_request(config, PROMPT, image_sizes=sizes, width=row.width, height=row.height, seed=0, **wishes)


# --- prediction and measurement ---------------------------------------------------------------------------------------


def predicted(row: Row, folder: Path) -> dict[str, Stage]:
    """The plan's stages by name, on a machine where everything fits."""
    config = config_of(row, folder)
    machine = dataclasses.replace(machine_memory(torch.device("cpu")), host_memory=2**40)
    machine = dataclasses.replace(machine, processes=row.processes, on_host=row.processes)
    made = make_plan(config, request_of(row, config), machine, weight_files(config), row.dtype)
    return {stage.name: stage for stage in made.stages}


def measured(row: Row, folder: Path, processes: Processes | None = None) -> dict[str, int]:
    """The peak of each stage of a run in bytes, beyond what was resident before loading; of this process."""
    config = config_of(row, folder)
    gc.collect()
    before = status("VmRSS")
    peaks: dict[str, int] = {}

    def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
            result = method(*args, **kwargs)
            peaks[name] = status("VmHWM") - before
            return result

        return run

    request = request_of(row, config)
    pipe = load_pipeline(config, "cpu", dtype=row.dtype, request=request, processes=processes)
    touch(pipe)
    for name, method in STAGES.items():
        setattr(pipe, method, watched(name, getattr(pipe, method)))
    images = [Image.new("RGB", (row.width, row.height))] if row.task == "i2v" else []
    pipe.generate(request, Inputs(images), progress=False)
    return peaks if images else {name: peak for name, peak in peaks.items() if name != "encode image"}


def touch(pipe: Pipeline) -> None:
    """Read all weights that are there, and fill the buffers of blocks that stream: what will be resident is so now.

    Not of processes that share weights, which all have to gather them at once.

    Else it would depend on how far the kernel reads ahead what a stage finds in memory of those before it.
    """
    if pipe.config.runtime.shard_weights:
        return
    if not isinstance(pipe.placement, OffloadPlacement):
        for _ in pipe.execution.hand_out(pipe.dit.visual_transformer_blocks):
            pass
    weights = [*pipe.dit.parameters(), *pipe.dit.buffers(), *pipe.vae.parameters()]
    if isinstance(pipe.placement, OffloadPlacement):
        parts = [part for some in pipe.placement.parts.values() for part in some if isinstance(part, Offloaded)]
        weights += [weight for part in parts for *_, weight in part._slots]
    for weight in weights:
        if not weight.is_meta and weight.is_contiguous():
            weight.detach().flatten().view(torch.uint8).sum()


def measured_in_a_process(rows: Sequence[int], folder: Path) -> Iterator[dict[str, int]]:
    """`measured` for some of ROWS, in a fresh interpreter, after a run of the tiny model; in several for a row of
    several processes."""
    # glibc: give freed tensors back to the system at once, so that what is resident is what is in use.
    own = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    for (count, _), some in itertools.groupby(
        rows, lambda row: (ROWS[row].processes, row if ROWS[row].processes > 1 else None)
    ):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        chosen = list(some)
        with (folder / "errors.txt").open("w+") as errors, contextlib.ExitStack() as stack:
            members = []
            for rank in range(count):
                request = {"rows": chosen, "folder": str(folder), "rank": rank, "size": count}
                command = [sys.executable, __file__, "--measure", json.dumps(request)]
                started = subprocess.Popen(command, env=os.environ | own, stdout=subprocess.PIPE, stderr=errors)
                members.append(stack.enter_context(started))
            for _ in chosen:
                lines = [member.stdout.readline() for member in members if member.stdout is not None]
                if not all(lines):
                    errors.seek(0)
                    raise RuntimeError(f"measuring failed: {errors.read()}")
                peaks = [json.loads(line) for line in lines]
                yield {name: sum(each[name] for each in peaks) for name in peaks[0]}


def answer(rows: Sequence[int], folder: Path, rank: int, size: int) -> None:
    """The other end of `measured_in_a_process`."""
    torch.set_num_threads(1)
    require_scheme("nf4")  # its package takes memory too
    tiny = load_config(ROOT / "configs" / "config_tiny_t2v.yaml", ["model.num_steps=1"])
    for dtype in {ROWS[row].dtype for row in rows}:
        pipe = load_pipeline(tiny, "cpu", dtype=dtype)
        pipe.generate(resolve_request(tiny, "a cat", seed=0, time_length=0.2), progress=False)
        del pipe
    if size == 1:
        for row in rows:
            print(json.dumps(measured(ROWS[row], folder)), flush=True)
        return
    importlib.import_module("torch.distributed.fsdp")  # which takes memory too

    (row,) = rows  # a group of processes is formed once
    processes = Processes.join(rank, size, rank)
    print(json.dumps(measured(ROWS[row], folder, processes)), flush=True)
    processes.leave()


def compare(rows: Sequence[int], folder: Path) -> Iterator[tuple[Row, str, float, float]]:
    """(row, stage, bytes predicted, bytes measured) for every stage of some of ROWS."""
    for row, peaks in zip(rows, measured_in_a_process(rows, folder), strict=True):
        stages = predicted(ROWS[row], folder)
        for name, peak in peaks.items():
            there_before = ROWS[row].processes * HOST_OF_CPU_RUN
            yield ROWS[row], name, stages[name].host + stages[name].mapped - there_before, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", nargs="*", metavar="WORDS", help="only rows that have one of these in their name")
    parser.add_argument("--folder", type=Path, help="where the models are written; default: the system's for that")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        request = json.loads(args.measure)
        answer(request["rows"], Path(request["folder"]), request["rank"], request["size"])
        return

    rows = [i for i, row in enumerate(ROWS) if args.rows is None or any(words in str(row) for words in args.rows)]
    print(f"python {' '.join(sys.argv)}\ntorch {torch.__version__}; MB of 10^6 bytes beyond Python and torch")
    print(f"{'stage':14}{'predicted':>10}{'of it mapped':>14}{'measured':>10}{'error':>8}")
    worst, last = 0.0, None
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_models(Path(folder))
        for row, name, expected, peak in compare(rows, Path(folder)):
            if row is not last:
                print(row)
                last, stages = row, predicted(row, Path(folder))
            error = expected / peak - 1
            worst = max(worst, abs(error))
            numbers = f"{expected / MB:10.1f}{stages[name].mapped / MB:14.1f}{peak / MB:10.1f}{error:+8.1%}"
            print(f"  {name:12}{numbers}", flush=True)
    print(f"largest error {worst:.1%}")


if __name__ == "__main__":
    main()
