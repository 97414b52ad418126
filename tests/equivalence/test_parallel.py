"""Pipelines over several processes (gloo, on the CPU) beside the same pipelines in one.

All cases of a number of processes run in one group of them, as starting it takes long. Four processes do what two do,
so that of two, but for what is particular to them, a few cases do; `make exhaustive` has all.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from benchmarks.memory import status, write_checkpoint
from kandinsky.attention.nabla import NablaConfig
from kandinsky.config.schema import CacheConfig, CoarseConfig, DiTConfig, MagCacheConfig
from kandinsky.loading.dit import load_dit, load_sharded_dit
from kandinsky.models.dit import DiffusionTransformer3D, Execution
from kandinsky.outputs.resume import Stopped, load_run
from kandinsky.pipelines.inputs import Inputs
from kandinsky.request import resolve_request
from kandinsky.runtime.caches import cache_maker
from kandinsky.runtime.compile import with_compiled_blocks, with_compiled_elementwise
from kandinsky.runtime.magcache import cache_for_request
from kandinsky.runtime.parallel import DistributedTeam, FirstProcessEncodes, SequenceParallel
from kandinsky.runtime.processes import Processes
from kandinsky.text.embeddings import TextEmbeddings
from tests.limits import EVERYTHING
from tests.unit.small_pipelines import TASKS, WordsEmbedder, build, call, latents_of, randomised

pytestmark = pytest.mark.distributed
TOLERANCE = 1e-5
STEPS = 6
MAGCACHE = functools.partial(
    cache_for_request, MagCacheConfig(mag_ratios=(0.98, 1.01) * (STEPS - 1), enabled=True, retention=0.3)
)
ADAPTIVE = {kind: CacheConfig(kind=kind, threshold=5.0, order=0) for kind in ("firstblock", "tracked")}  # type: ignore[arg-type]
SPARSE = NablaConfig(P=0.5, wT=3, wH=1, wW=1)


# --- the DiT ----------------------------------------------------------------------------------------------------------


def peaked_dit() -> DiffusionTransformer3D:
    """Four heads, random weights; queries and keys are large, so that NABLA's map is peaked as a trained model's is."""
    dit = DiffusionTransformer3D(
        in_text_dim=24, in_text_dim2=12, time_dim=32, model_dim=256, ff_dim=256, num_text_blocks=1, num_visual_blocks=2
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(values / math.sqrt(parameter.shape[1]))
            else:
                parameter.copy_(0.2 * values + (2 if name.endswith("norm.weight") else 0))
    return dit.eval()


VELOCITIES: dict[str, tuple[int, tuple[int, int, int], NablaConfig | None]] = {
    "odd": (1, (3, 10, 6), None),
    "batch": (2, (1, 4, 14), None),
    "fewer tokens than four processes need": (1, (1, 2, 10), None),
    "nabla": (1, (3, 32, 48), SPARSE),
    "nabla, five blocks, batch": (2, (5, 16, 16), SPARSE),
}


@torch.no_grad()
def velocity(name: str, team: DistributedTeam | None, folder: Path, execution: Execution | None = None) -> Tensor:
    """Of one request, with a masked text. Each process's blocks see its share of the tokens, in whole NABLA blocks."""
    dit = peaked_dit()
    batch, size, nabla = VELOCITIES[name]
    if team is None:
        execution = Execution()
    else:
        execution = execution or Execution(around=team.sequence.around)
        tokens, whole = math.prod(size) // 4, 64 if nabla else 1
        share = -(-tokens // (whole * team.sequence.size)) * whole

        def check(block: Any, inputs: tuple[Tensor, ...]) -> None:
            assert inputs[0].shape[1] == share

        dit.visual_transformer_blocks[0].register_forward_pre_hook(check)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, *size, 16, generator=generator)
    text, pooled = (torch.randn(batch, *shape, generator=generator) for shape in ((7, 24), (12,)))
    mask = torch.ones(batch, 7, dtype=torch.bool)
    mask[-1, 4:] = False
    timesteps = torch.tensor([723.4567, 41.875])[:batch]
    return dit(latents, text, pooled, timesteps, nabla=nabla, text_mask=mask, execution=execution)


@torch.no_grad()
def compiled(name: str, team: DistributedTeam | None, folder: Path) -> Tensor:
    """One graph of all blocks of two requests, the exchanges in it; run as it is. Of two processes, as of one."""
    if team is None or team.size != 2:
        return velocity(name, team, folder)
    torch._dynamo.reset()
    counters.clear()
    execution = with_compiled_blocks(Execution(around=team.sequence.for_graphs().around), "aot_eager")
    found = velocity(name, team, folder, execution)
    velocity(name, team, folder, execution)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    return found


# --- pipelines --------------------------------------------------------------------------------------------------------


def pipeline(task: str, team: DistributedTeam | None, dit: Any = None, nabla: bool = False, **options: Any) -> Any:
    """As `loading` puts one together, with four heads."""
    pipe: Any = build(task, team=team, **options)
    params = dataclasses.replace(pipe.config.model.dit_params, model_dim=64)
    attention = dataclasses.replace(pipe.config.model.attention, type="nabla" if nabla else "full", P=0.5, wT=1)
    vae = dataclasses.replace(pipe.config.model.vae, spatial_tile=64, spatial_overlap=16)
    model = dataclasses.replace(pipe.config.model, dit_params=params, attention=attention, vae=vae)
    pipe.config = dataclasses.replace(pipe.config, model=model)
    pipe.dit = dit or randomised(DiffusionTransformer3D(**dataclasses.asdict(params)))
    if team is not None:
        pipe.execution = Execution(around=team.sequence.around)
        pipe.text_embedder = FirstProcessEncodes(
            WordsEmbedder() if team.is_first else None, team.processes, torch.device("cpu")
        )
    return pipe


def task(name: str, team: DistributedTeam | None, folder: Path) -> Tensor:
    """Two prompts, a height that gives an odd number of rows of patches where a video may have one."""
    odd = {"width": 80, "height": 48} if name.endswith("v") else {}
    return latents_of(pipeline(name, team), ["a red cat", "one dog and two birds"], **odd)


def directed(how: str, team: DistributedTeam | None, folder: Path) -> Tensor:
    """From frames, wholly or in part, or going on from them."""
    pipe = pipeline("i2v" if how == "overlap, i2v" else "t2v", team)
    frames = np.random.default_rng(1).integers(0, 256, (9, 48, 80, 3), dtype=np.uint8)
    mask = np.zeros((1, 48, 80), np.uint8)
    mask[..., 40:] = 255
    sizes: dict[str, Any] = {"width": 80, "height": 48, "num_steps": 4, "seed": 1}
    if how.startswith("overlap"):
        pictures = [(80, 48)] if how == "overlap, i2v" else []
        request = resolve_request(pipe.config, "a red cat", image_sizes=pictures, num_frames=17, **sizes)
        inputs = Inputs(overlap=frames)
    else:
        request = resolve_request(
            pipe.config, "a red cat", clip=(80, 48, 9), strength=0.75, mask=how == "mask", num_frames=9, **sizes
        )
        inputs = Inputs(source=frames, mask=mask if how == "mask" else None)
    made = pipe.generate(request, inputs, progress=False, output_type="latent")
    assert isinstance(made, Tensor)
    return made


def given_frames(team: DistributedTeam | None, folder: Path) -> Tensor:
    """A first, a last and a frame between, of two prompts."""
    pipe = pipeline("i2v", team)
    more = {"last_image": Image.new("RGB", (80, 48), "red"), "keyframes": {0.25: Image.new("RGB", (80, 48), "blue")}}
    return latents_of(pipe, ["a red cat", "a dog"], width=80, height=48, num_frames=13, **more)


def coarse(team: DistributedTeam | None, folder: Path) -> Tensor:
    """First steps on a smaller grid, of one token for each of four processes and none to spare; a picture is held."""
    pipe = pipeline("i2v", team)
    generation = dataclasses.replace(pipe.config.generation, coarse_steps=CoarseConfig(share=0.5))
    pipe.config = dataclasses.replace(pipe.config, generation=generation)
    return latents_of(pipe, width=64, height=32, num_frames=5, num_steps=4)


def nabla(team: DistributedTeam | None, folder: Path) -> Tensor:
    return latents_of(pipeline("t2v", team, nabla=True), width=256, height=128, num_frames=9)


def exact(team: DistributedTeam | None, folder: Path) -> Tensor:
    """In some steps and blocks, and another share for each half of the steps; with what was counted."""
    pipe = pipeline("t2v", team, nabla=True)
    more = {"P": (0.9, 0.2), "exact_steps": (0.0, 0.2), "exact_blocks": (-1,)}
    attention = dataclasses.replace(pipe.config.model.attention, **more)
    pipe.config = dataclasses.replace(pipe.config, model=dataclasses.replace(pipe.config.model, attention=attention))
    watches: list[Any] = []
    pipe.describe = lambda run, index, watch: watches.append(watch) or {"loop": False, "conditions": []}
    pipe.decode_and_write = lambda latents, *_: latents
    sizes = {"width": 256, "height": 128, "num_frames": 5, "num_steps": STEPS, "guidance_interval": (0.1, 0.9)}
    latents = call(pipe, output_type="pt", **sizes)
    calls = watches[0].attention_calls
    assert calls["engine"] + calls["exact"] == 2 * (STEPS + 5)
    return torch.cat((latents.flatten(), torch.tensor([calls["engine"], calls["exact"]])))


def magcache(team: DistributedTeam | None, folder: Path) -> Tensor:
    """Guidance in some steps only: the two branches skip different evaluations, and a half has those of its branch."""
    pipe = pipeline("t2v", team, make_cache=MAGCACHE)
    done: list[int] = []
    pipe.dit.register_forward_hook(lambda *_: done.append(1))
    latents = latents_of(pipe, num_steps=STEPS, guidance_interval=(0.1, 0.9))
    guided = 5
    if team is None or team.guidance is None:
        assert len(done) == STEPS + guided
    else:
        assert len(done) == (STEPS, guided)[team.guidance.group.rank()]
    return torch.cat((latents.flatten(), torch.tensor(evaluations(pipe))))


def adaptive(kind: str, team: DistributedTeam | None, folder: Path) -> Tensor:
    """Whoever shares a sequence decides alike."""
    return latents_of(with_adaptive(kind, team), num_steps=STEPS, guidance_interval=(0.1, 0.9))


def with_adaptive(kind: str, team: DistributedTeam | None) -> Any:
    pipe = pipeline("t2v", team)
    pipe.config = dataclasses.replace(pipe.config, cache=ADAPTIVE[kind])
    pipe.make_cache = cache_maker(pipe.config) if team is None else cache_maker(pipe.config, team.all_in_sequence)
    return pipe


def evaluations(pipe: Any) -> list[float]:
    """All and skipped evaluations of a run."""
    records = []

    def describe(run: Any, index: int, watch: Any) -> dict[str, Any]:
        records.append(watch)
        return {"loop": False, "conditions": []}

    pipe.describe = describe
    call(pipe, num_steps=STEPS, guidance_interval=(0.1, 0.9), output_type="pt")
    assert records[0].skipped_evaluations > 0
    return [records[0].evaluations, records[0].skipped_evaluations]


def sharded(kind: str, team: DistributedTeam | None, folder: Path) -> Tensor:
    """Weights from a file, of which each process has its rows; bfloat16 has float32 modulations in between."""
    params = pipeline("t2v", None).config.model.dit_params
    path, dtype = folder / f"{kind}.safetensors", torch.bfloat16 if kind == "bfloat16" else torch.float32
    if team is None or team.sequence.size == 1:
        dit = load_dit(path, params, "cpu", dtype)
    else:
        dit = load_sharded_dit(path, params, torch.device("cpu"), dtype, team)
        own = 0
        for name, parameter in dit.named_parameters():
            assert isinstance(parameter, DTensor), name
            is_precise = dtype == torch.float32 or "modulation" in name or "time_embeddings" in name
            assert parameter.dtype == parameter.to_local().dtype == (torch.float32 if is_precise else dtype), name
            own += parameter.to_local().numel()
        assert own <= 1.02 * sum(p.numel() for p in dit.parameters()) / team.sequence.size
    pipe = pipeline("t2v", team, dit, nabla=kind == "nabla")
    if kind == "elementwise" and team is not None and team.size == 2:
        torch._dynamo.reset()
        counters.clear()
        pipe.execution = with_compiled_elementwise(pipe.execution, "aot_eager")
        latents = latents_of(pipe, num_steps=STEPS)
        assert counters["stats"]["unique_graphs"] > 0
        return latents
    if kind == "magcache":
        pipe.make_cache = MAGCACHE
    if kind in ADAPTIVE:
        pipe.make_cache = with_adaptive(kind, team).make_cache
    return latents_of(pipe, num_steps=STEPS, **SHARDED[kind])


def memory(team: DistributedTeam | None, folder: Path) -> Tensor:
    """Half a gigabyte in bfloat16: four processes take a quarter each, and hold no pages of the rest.

    In benchmarks/parallel.py it is 4 GB.
    """
    if team is not None and team.size == 4:
        before = status("VmRSS")
        dit = load_sharded_dit(folder / "large.safetensors", LARGE, torch.device("cpu"), torch.bfloat16, team)
        share = (folder / "large.safetensors").stat().st_size / team.size
        assert sum(parameter.to_local().nbytes for parameter in dit.parameters()) <= 1.02 * share  # type: ignore[attr-defined]
        assert status("VmHWM") - before <= 1.2 * share + 40e6, (before, status("VmHWM"), share)
    return torch.zeros(1)


LARGE = DiTConfig(visual_cond=True, num_text_blocks=1, num_visual_blocks=4)
SHARDED: dict[str, dict[str, Any]] = {
    "float32": {"width": 80, "height": 48},
    "bfloat16": {},
    "magcache": {"guidance_interval": (0.1, 0.9)},
    "firstblock": {},
    "tracked": {"guidance_interval": (0.1, 0.9)},
    "nabla": {"width": 256, "height": 128},
    "elementwise": {},
}


@torch.no_grad()
def decoded(name: str, team: DistributedTeam | None, folder: Path) -> Tensor:
    """Windows of time and tiles of a picture, fewer and more than there are processes."""
    pipe = pipeline(name, team)
    size, tiles = ((8, 12, 8), 6) if name == "t2v" else ((1, 12, 8), 2)
    done: list[int] = []
    pipe.vae.decoder.register_forward_hook(lambda *_: done.append(1))
    pixels = pipe.decode(torch.randn(1, *size, 16, generator=torch.Generator().manual_seed(2)), lambda pixels: pixels)
    assert len(done) == -(-tiles // (team.size if team else 1))
    return pixels


@torch.no_grad()
def without_memory(team: DistributedTeam | None, folder: Path) -> Tensor:
    """One process alone runs out of memory: in one of its tiles, then when it is done with all of them.

    All go on with the same smaller tiles, and nobody waits for what another one has given up.
    """
    pipe = pipeline("t2i", team)
    vae = dataclasses.replace(pipe.config.model.vae, spatial_tile=256 if team is None else 448, spatial_overlap=64)
    pipe.config = dataclasses.replace(pipe.config, model=dataclasses.replace(pipe.config.model, vae=vae))
    latents = torch.randn(1, 1, 64, 64, 16, generator=torch.Generator().manual_seed(2))
    failures = [320, 448] if team is not None and team.processes.rank == team.size - 1 else []
    tiles: list[int] = []
    decoder, decode_tiles = pipe.vae.decoder.forward, pipe._decode_tiles

    def starved(z: Tensor) -> Tensor:
        if 448 in failures:
            failures.remove(448)
            raise torch.OutOfMemoryError("no room for a tile")
        return decoder(z)

    def finish(pixels: Tensor) -> Tensor:
        if failures == [tiles[-1]]:
            raise torch.OutOfMemoryError("no room for the whole")
        return pixels

    pipe.vae.decoder.forward = starved
    pipe._decode_tiles = lambda z, tile, finish: tiles.append(tile) or decode_tiles(z, tile, finish)
    pixels = pipe.decode(latents, finish)
    assert tiles == ([256] if team is None else [448, 320, 256])
    return pixels


class LessOfTheSame:
    """A stand-in for settings that take less: they are written down, and the models stay as they are."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.stages: list[str] = []

    def settings(self, config: Any, request: Any, stage: str, on_host: bool) -> dict[str, Any]:
        self.stages.append(stage)
        return {"chunk_tokens": 64 * len(self.stages)}

    def load(self, config: Any, before: Any) -> Any:
        assert before is self.pipe
        return before


# Where in the last process memory runs out: the object, the function, and in which of its calls.
STARVED: dict[str, Callable[[Any], tuple[Any, str, int]]] = {
    "the text encoder": lambda pipe: (pipe.text_embedder.embedder, "encode", 1),
    "what comes of it": lambda pipe: (TextEmbeddings, "to", 1),
    "a picture's encoder": lambda pipe: (pipe.vae, "encode", 1),
    "tables": lambda pipe: (pipe.dit, "request_tables", 1),
    "the first block": lambda pipe: (pipe.dit.visual_transformer_blocks[0], "forward", 2),
    "a block between two exchanges": lambda pipe: (pipe.dit.visual_transformer_blocks[1].feed_forward, "forward", 2),
    "behind the blocks": lambda pipe: (pipe.dit.out_layer, "forward", 4),
    "between two steps": lambda pipe: (pipe, "make_previews", 2),
}


IN_BRANCHES = ("the first block", "behind the blocks", "between two steps")  # with MagCache, whose residuals are kept


@torch.no_grad()
def starved(where: str, team: DistributedTeam | None, folder: Path) -> Tensor:
    """All go on together where memory runs out in one, and come to what they come to without."""
    task = "i2v" if where == "a picture's encoder" else "t2v"
    cache = {"make_cache": MAGCACHE} if where in IN_BRANCHES else {}
    found = []
    for is_starved in (False, True):
        pipe = pipeline(task, team, **cache)
        pipe.make_previews = lambda: None
        pipe.frugality = frugality = LessOfTheSame(pipe)
        request = resolve_request(
            pipe.config, "a red cat", image_sizes=[(32, 32)] if task == "i2v" else [], seed=1, num_steps=STEPS
        )
        in_first = where == "the text encoder"
        is_here = team is not None and (team.is_first if in_first else team.processes.rank == team.size - 1)
        with pytest.MonkeyPatch.context() as patch:
            if is_starved and is_here:
                owner, name, at = STARVED[where](pipe)
                run_out(patch, owner, name, at)
            latents = pipe.generate(
                request,
                Inputs([Image.new("RGB", (32, 32), "red")] if task == "i2v" else []),
                progress=False,
                output_type="latent",
                callback=lambda pipe, *_: pipe.make_previews(),
            )
        stage = {"the text encoder": "encode text", "what comes of it": "encode text"}.get(where, "denoise")
        stage = "encode image" if task == "i2v" else stage
        told = team is not None and team.is_first and is_starved
        assert frugality.stages == ([stage] if told else []), where
        assert pipe.config.runtime.chunk_tokens == (64 if team is not None and is_starved else None)
        found.append(latents)
    assert torch.equal(*found)
    return found[-1]


def run_out(patch: pytest.MonkeyPatch, owner: Any, name: str, at: int) -> None:
    """Have memory run out in that call, counted from 1."""
    original, calls = getattr(owner, name), []

    def called(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("in one process")
        return original(*args, **options)

    patch.setattr(owner, name, called)


def random_seed(team: DistributedTeam | None, folder: Path) -> Tensor:
    """The same in all processes, whatever it is; compared with nothing else."""
    return latents_of(pipeline("i2v", team), seed=None)


def interrupted(team: DistributedTeam | None, folder: Path) -> Tensor:
    """By the first process alone, after its second step of six."""

    def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> None:
        pipe.interrupt = step == 1 and (team is None or team.is_first)

    return latents_of(pipeline("t2v", team), num_steps=STEPS, callback_on_step_end=callback)


def resumed(kind: str, team: DistributedTeam | None, folder: Path) -> Tensor:
    """Stopped by the first process where a cache holds residuals, and gone on with from the file, by all; twice,
    because the second time a half of the processes holds of the other half's branch what there was the first time."""
    make = functools.partial(pipeline, "t2v", team, make_cache=MAGCACHE)
    if kind == "tracked":
        make = functools.partial(with_adaptive, kind, team)
    name = f"resumed_{kind}_{team.size}_{team.guidance is not None}" if team else f"resumed_{kind}"

    def stop(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any], at: int = 1) -> None:
        pipe.interrupt = step == at and (team is None or team.is_first)

    pipe = make()
    request = resolve_request(pipe.config, "a red cat", seed=1, num_steps=STEPS)
    with pytest.raises(Stopped) as stopped:
        pipe.generate(request, save_path=folder / f"{name}.mp4", callback=stop, keep_stopped=True)
    if team is not None:
        dist.barrier()
    run = load_run(stopped.value.path)
    assert {key.split(".")[0] for key in run.residuals} == {"cond", "uncond"}
    with pytest.raises(Stopped) as stopped:
        make().resume(run, folder / f"{name}.mp4", callback=functools.partial(stop, at=3))
    if team is not None:
        dist.barrier()
    run = load_run(stopped.value.path)
    pipe = make()
    watches = []
    pipe.describe = lambda run, index, watch: watches.append(watch)
    pipe.decode_and_write = lambda latents, *_: latents
    latents = pipe.resume(run, folder / f"{name}.mp4")
    counts = torch.tensor([float(watches[0].evaluations), watches[0].skipped_evaluations])
    assert watches[0].skipped_evaluations > 0
    return torch.cat((latents.flatten(), counts))


def written(team: DistributedTeam | None, folder: Path) -> Tensor:
    """Pixels in all processes, files from one."""
    name = "alone" if team is None else f"{team.size}_{team.processes.rank}"
    call(pipeline("t2i", team), save_path=folder / "written" / name / "a.png")
    files = sorted(path.name for path in (folder / "written").glob(f"{name}/*"))
    assert files == (["a.json", "a.png"] if team is None or team.is_first else [])
    return torch.zeros(1)


def refused(team: DistributedTeam | None, folder: Path) -> Tensor:
    """A prompt that the first process can't encode is a ValueError everywhere, after which the others still work."""
    pipe = pipeline("t2v", team)

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no such words")

    embedder = pipe.text_embedder if team is None else pipe.text_embedder.embedder
    if embedder is not None:
        embedder.encode = refuse
    with pytest.raises(ValueError, match="no such words"):
        call(pipe)
    return torch.zeros(1)


Case = Callable[[DistributedTeam | None, Path], Tensor]
CASES: dict[str, Case] = {
    "memory": memory,  # the first, as a peak is one of all that has been
    **{f"velocity: {name}": functools.partial(velocity, name) for name in VELOCITIES},
    **{f"compiled: {name}": functools.partial(compiled, name) for name in ("odd", "nabla")},
    **{name: functools.partial(task, name) for name in TASKS},
    "given frames": given_frames,
    **{f"directed: {how}": functools.partial(directed, how) for how in ("video", "mask", "overlap", "overlap, i2v")},
    "coarse": coarse,
    "nabla": nabla,
    "exact": exact,
    "magcache": magcache,
    **{f"adaptive: {kind}": functools.partial(adaptive, kind) for kind in ADAPTIVE},
    **{f"sharded: {name}": functools.partial(sharded, name) for name in SHARDED},
    "decode t2v": functools.partial(decoded, "t2v"),
    "decode t2i": functools.partial(decoded, "t2i"),
    "without memory": without_memory,
    **{f"starved: {where}": functools.partial(starved, where) for where in STARVED},
    "random seed": random_seed,
    "interrupted": interrupted,
    "resumed": functools.partial(resumed, "magcache"),
    "resumed: tracked": functools.partial(resumed, "tracked"),
    "written": written,
    "refused": refused,
}
WITH_BRANCHES = (
    *("t2v", "exact", "magcache", "sharded: magcache", "i2i", "resumed"),
    *(f"starved: {where}" for where in IN_BRANCHES),
)
OF_TWO = (
    *("velocity: odd", "compiled: nabla", "sharded: elementwise"),  # the last two are compiled by two processes alone
    *("t2v", "i2i", "nabla", "magcache", "sharded: float32", "decode t2v", "without memory"),
    *("starved: the text encoder", "starved: behind the blocks", "resumed"),
)
TO_THE_BIT = ("decode t2v", "decode t2i", "without memory")


# --- in several processes ---------------------------------------------------------------------------------------------


def cases_of(size: int, branches: int) -> Sequence[str]:
    if branches == 2:
        return WITH_BRANCHES
    return OF_TWO if size == 2 and not EVERYTHING else tuple(CASES)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def joined(rank: int, size: int, port: int) -> Processes:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    processes = Processes.join(rank, size, rank)
    processes.connect(torch.device("cpu"))
    return processes


def process(rank: int, size: int, port: int, folder: Path) -> None:
    """Every case, with its results or its traceback in a file."""
    processes = joined(rank, size, port)
    results: dict[str, Any] = {}
    for branches in (1, 2):
        team = DistributedTeam(processes, branches, "cpu")
        for name in cases_of(size, branches):
            try:
                results[f"{name}, cfg_parallel" if branches == 2 else name] = CASES[name](team, folder)
            except Exception:
                results[name] = traceback.format_exc()
                torch.save(results, folder / f"{size}_{rank}.pt")
                raise  # the others, who wait for this one, end as well
    torch.save(results, folder / f"{size}_{rank}.pt")
    processes.leave()


def process_compiled(rank: int, size: int, port: int, folder: Path) -> None:
    """One request whose blocks are compiled, its tokens divided and then its branches."""
    processes = joined(rank, size, port)
    results: dict[str, Any] = {}
    for branches, how in enumerate(("tokens", "guidance"), start=1):
        team = DistributedTeam(processes, branches, "cpu")
        pipe = pipeline("t2v", team)
        execution = Execution(around=team.sequence.for_graphs().around) if how == "tokens" else Execution()
        pipe.execution = with_compiled_blocks(execution)
        counters.clear()
        try:
            results[how] = latents_of(pipe)
            assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
        except Exception:
            results[how] = traceback.format_exc()
            torch.save(results, folder / f"{size}_{rank}.pt")
            raise
    torch.save(results, folder / f"{size}_{rank}.pt")
    processes.leave()


def in_processes(size: int, folder: Path, target: Callable[[int, int, int, Path], None]) -> list[dict[str, Any]]:
    """What `target` has left in each process's file."""
    context = multiprocessing.get_context("forkserver")  # its processes begin with what is imported here, once for all
    context.set_forkserver_preload(
        ["torch.distributed.fsdp", "torch._dynamo", "kandinsky.loading.assemble", "tests.unit.small_pipelines"]
    )
    port = free_port()
    members = [context.Process(target=target, args=(rank, size, port, folder)) for rank in range(size)]
    for member in members:
        member.start()
    for member in members:
        member.join(120)
    for member in members:
        member.kill()
    files = [folder / f"{size}_{rank}.pt" for rank in range(size)]
    results = [torch.load(file) for file in files if file.exists()]
    failures = [value for result in results for value in result.values() if isinstance(value, str)]
    assert not failures, failures[0]
    assert len(results) == size, [member.exitcode for member in members]
    assert [member.exitcode for member in members] == [0] * size
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With the weights that the cases read."""
    folder = tmp_path_factory.mktemp("parallel")
    state = pipeline("t2v", None).dit.state_dict()
    wide = ("modulation", "time_embeddings")
    narrow = {k: v if any(part in k for part in wide) else v.bfloat16() for k, v in state.items()}
    for kind in SHARDED:
        save_file(narrow if kind == "bfloat16" else state, folder / f"{kind}.safetensors")
    write_checkpoint(folder / "large.safetensors", LARGE)
    yield folder
    (folder / "large.safetensors").unlink()


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Tensor]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # how a sum is split moves its last bits
    try:
        return {name: case(None, folder) for name, case in CASES.items()}
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def of_two(folder: Path) -> list[dict[str, Any]]:
    """The results of the cases in each of two processes."""
    return in_processes(2, folder, process)


@pytest.fixture(scope="module")
def of_four(folder: Path) -> list[dict[str, Any]]:
    return in_processes(4, folder, process)


@pytest.mark.exhaustive
def test_compiled_by_inductor(folder: Path) -> None:
    """Guidance over two processes, and tokens; they compile at once, into the same cache."""
    results = in_processes(2, folder, process_compiled)
    reference = latents_of(pipeline("t2v", None))
    assert results[0].keys() == {"tokens", "guidance"}
    for result in results:
        for how, latents in result.items():
            difference = (latents - reference).abs().max().item()
            assert difference <= TOLERANCE * reference.abs().max().item(), (how, difference)
            assert torch.equal(latents, results[0][how])


def names_of(size: int) -> list[str]:
    return [*cases_of(size, 1), *(f"{name}, cfg_parallel" for name in cases_of(size, 2))]


@pytest.mark.parametrize("name", names_of(2))
def test_two_processes(name: str, of_two: list[dict[str, Any]], expected: dict[str, Tensor]) -> None:
    assert_same(name, of_two, expected)


@pytest.mark.parametrize("name", names_of(4))
def test_four_processes(name: str, of_four: list[dict[str, Any]], expected: dict[str, Tensor]) -> None:
    assert_same(name, of_four, expected)


def assert_same(name: str, found: list[dict[str, Any]], expected: dict[str, Tensor]) -> None:
    """What all of a request's processes have found is what one process finds."""
    reference = expected[name.removesuffix(", cfg_parallel")]
    if name == "random seed":
        reference = found[0][name]
        assert not torch.equal(reference, expected[name])
    tolerance = 0.02 if "bfloat16" in name else 0.0 if name in TO_THE_BIT else TOLERANCE
    for result in found:
        difference = (result[name] - reference).abs().max().item()
        assert difference <= tolerance * reference.abs().max().item(), difference
        assert torch.equal(result[name], found[0][name])  # who would drift apart in the end wait for each other


class Group:
    """A process group on paper."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = lambda: rank, lambda: size


@pytest.mark.parametrize(("length", "size", "whole"), [(5, 4, 1), (64 * 5, 4, 64), (64 * 7, 3, 64), (8, 2, 1)])
def test_slices_are_whole_blocks_equally_long_and_hold_every_token(length: int, size: int, whole: int) -> None:
    tokens = torch.arange(1.0, length + 1)[None, :, None]
    slices = [SequenceParallel(Group(rank, size)).shard(tokens, 1, whole) for rank in range(size)]  # type: ignore[arg-type]
    assert len({part.shape for part in slices}) == 1
    assert slices[0].shape[1] % whole == 0
    joined = torch.cat(slices, dim=1)
    assert torch.equal(joined[:, :length], tokens)
    assert not joined[:, length:].any()
    assert not dist.is_initialized()
