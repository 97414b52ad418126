"""What several processes send each other, what a step may take on 1 to 8 GPUs, and what a process keeps of the weights.

    python benchmarks/parallel.py traffic                          bytes a process sends, counted and by formula
    python benchmarks/parallel.py steps                            seconds of a step, computed, none of it measured
    python benchmarks/parallel.py weights [--blocks 32] [--processes 4] [--folder DIR]
                                                                   peak memory of processes that load a checkpoint

`traffic` runs a small DiT over gloo on the CPU; the formula has no constant to fit. `steps` takes the arithmetic of the
published variants at TFLOPS and what they send at GB_PER_SECOND, one after the other: what a perfect program that does
not overlap the two would take. `weights` writes a checkpoint of random bfloat16 weights at Lite's widths (4 GB at its
32 blocks), deletes it afterwards, and reports the peak resident set (VmHWM), in which pages of the file count too.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

from benchmarks.memory import MODELS, status, write_checkpoint
from kandinsky.common.limits import BLOCK_TOKENS
from kandinsky.config.reading import load_config
from kandinsky.config.rules import check_processes
from kandinsky.config.schema import Config
from kandinsky.loading.dit import load_sharded_dit
from kandinsky.models.dit import DiffusionTransformer3D, Execution
from kandinsky.request import resolve_request
from kandinsky.runtime.parallel import DistributedTeam
from kandinsky.runtime.processes import Processes

REPOSITORY = Path(__file__).resolve().parents[1]
TFLOPS = 790  # what an H200 reaches in dense bfloat16 matrix products
GB_PER_SECOND = 450  # one way; 900 GB/s count both
DENSITY = 0.2  # blocks that NABLA keeps
CONFIGS = {"Lite 5 s": "5s_sft", "Lite 10 s": "10s_sft", "Pro 5 s": "5s_t2v_pro", "Pro 5 s HD": "5s_t2v_pro_hd",
           "image": "t2i"}  # fmt: skip
MB, GB = 1e6, 1e9


# --- formulas ---------------------------------------------------------------------------------------------------------


def padded_share(tokens: int, processes: int, whole: int = 1) -> int:
    """Tokens of each process."""
    return -(-tokens // (processes * whole)) * whole


def block_bytes(tokens: int, width: int, processes: int, item: int = 2, whole: int = 1) -> float:
    """What a process sends in one visual block: queries, keys, values, and the result, all but its own part of each."""
    share = padded_share(tokens, processes, whole)
    return 4 * share * width * item * (processes - 1) / processes


def gather_bytes(tokens: int, width: int, processes: int, item: int = 2, whole: int = 1) -> float:
    """What a process sends once a forward, after the blocks: its tokens, to every other process."""
    return padded_share(tokens, processes, whole) * width * item * (processes - 1)


def forward_flop(config: Config, tokens: int) -> float:
    """Of one forward's visual blocks: attention (block-sparse where it is), linear layers, cross-attention."""
    dit = config.model.dit_params
    density = DENSITY if config.model.attention.type == "nabla" else 1.0
    attention = 4 * tokens**2 * dit.model_dim * density
    linear = 2 * tokens * (6 * dit.model_dim**2 + 2 * dit.model_dim * dit.ff_dim)
    cross = 4 * tokens * config.model.text_embedder.qwen.max_length * dit.model_dim
    return dit.num_visual_blocks * (attention + linear + cross)


def evaluation_seconds(config: Config, tokens: int, processes: int) -> tuple[float, float]:
    """(computing, sending) of one model evaluation on a sequence of that many GPUs."""
    dit = config.model.dit_params
    whole = BLOCK_TOKENS if config.model.attention.type == "nabla" else 1
    sent = dit.num_visual_blocks * block_bytes(tokens, dit.model_dim, processes, whole=whole)
    sent += gather_bytes(tokens, dit.model_dim, processes, whole=whole)
    return forward_flop(config, tokens) / processes / (TFLOPS * 1e12), sent / (GB_PER_SECOND * GB)


# --- tables -----------------------------------------------------------------------------------------------------------


def steps() -> None:
    """Seconds of a step with guidance, that is of two evaluations."""
    print(f"seconds of a guided step at {TFLOPS} TFLOP/s and {GB_PER_SECOND} GB/s one way; in brackets, of it: sending")
    print("GPUs = halves of guidance x sequence; one half evaluates both branches one after the other\n")
    shapes = [(1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (1, 8), (2, 4)]
    print("| variant | tokens | " + " | ".join(f"{halves * size} = {halves}x{size}" for halves, size in shapes) + " |")
    print("|---|---|" + "---|" * len(shapes))
    for name, file in CONFIGS.items():
        config = load_config(REPOSITORY / "configs" / f"config_{file}.yaml")
        frames, rows, columns = resolve_request(config, "any").latent_size
        tokens = frames * rows * columns // 4
        cells = []
        for halves, size in shapes:
            runtime = dataclasses.replace(config.runtime, cfg_parallel=halves)
            try:
                check_processes(dataclasses.replace(config, runtime=runtime), halves * size)
            except ValueError:
                cells.append("not possible")
                continue
            computing, sending = (2 / halves * seconds for seconds in evaluation_seconds(config, tokens, size))
            cells.append(f"{computing + sending:.3f}" + (f" ({sending:.3f})" if size > 1 else ""))
        print(f"| {name} | {tokens:,} | {' | '.join(cells)} |")


def traffic() -> None:
    """Bytes that a process sends, counted where they are handed to torch.distributed."""
    print("| processes | tokens | a block: counted | formula | after the blocks: counted | formula |")
    print("|---|---|---|---|---|---|")
    for size in (2, 4):
        for latents in ((3, 16, 16), (3, 10, 6)):
            tokens, width = math.prod(latents) // 4, 256
            block, gather = run_in_processes(size, count_traffic, latents)[0]
            expected = block_bytes(tokens, width, size, item=4), gather_bytes(tokens, width, size, item=4)
            print(f"| {size} | {tokens} | {block:,.0f} | {expected[0]:,.0f} | {gather:,.0f} | {expected[1]:,.0f} |")


def weights(blocks: int, size: int, folder: str | None) -> None:
    """Peak memory of processes that load their shards."""
    params = dataclasses.replace(MODELS["lite"], num_visual_blocks=blocks)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "random.safetensors"
        total = write_checkpoint(path, params)
        print(f"{size} processes load {total / GB:.2f} GB: {total / size / MB:,.0f} MB each\n")
        print("| process | before loading | peak | peak of its own memory and the file's pages beyond before |")
        print("|---|---|---|---|")
        for rank, (before, peak) in enumerate(run_in_processes(size, measure_weights, path, params)):
            print(f"| {rank} | {before / MB:,.0f} MB | {peak / MB:,.0f} MB | {(peak - before) / MB:,.0f} MB |")


# --- in each process --------------------------------------------------------------------------------------------------


@torch.no_grad()
def count_traffic(team: DistributedTeam, latents: tuple[int, int, int]) -> tuple[float, float]:
    """Bytes sent in one visual block, and after the blocks."""
    torch.manual_seed(0)
    dit = DiffusionTransformer3D(
        in_text_dim=24, in_text_dim2=12, time_dim=32, model_dim=256, ff_dim=64, num_text_blocks=1, num_visual_blocks=3
    )
    execution = Execution(around=team.sequence.around)
    sent = {"exchange": 0.0, "gather": 0.0}
    exchange, gather = dist.all_to_all_single, dist.all_gather

    def counted_exchange(received: torch.Tensor, x: torch.Tensor, **options: Any) -> Any:
        sent["exchange"] += x.nbytes * (team.size - 1) / team.size
        return exchange(received, x, **options)

    def counted_gather(parts: list[torch.Tensor], x: torch.Tensor, *options: Any) -> Any:
        sent["gather"] += x.nbytes * (team.size - 1)
        return gather(parts, x, *options)

    dist.all_to_all_single, dist.all_gather = counted_exchange, counted_gather  # type: ignore[assignment]
    dit(
        torch.randn(1, *latents, 16),
        torch.randn(1, 7, 24),
        torch.randn(1, 12),
        torch.tensor([500.0]),
        execution=execution,
    )
    dist.all_to_all_single, dist.all_gather = exchange, gather
    return sent["exchange"] / len(dit.visual_transformer_blocks), sent["gather"]


def measure_weights(team: DistributedTeam, path: Path, params: Any) -> tuple[int, int]:
    """Resident set before loading, and its peak, in bytes."""
    before = status("VmRSS")
    dit = load_sharded_dit(path, params, torch.device("cpu"), torch.bfloat16, team)
    peak = status("VmHWM")
    assert sum(parameter.to_local().sum().isfinite() for parameter in dit.parameters())  # type: ignore[attr-defined]
    return before, peak


def run_in_processes(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(team, *arguments)` returns in each of `size` processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    members = [
        context.Process(target=one_process, args=(rank, size, port, results, work, arguments)) for rank in range(size)
    ]
    for member in members:
        member.start()
    found = dict(results.get(timeout=600) for _ in members)
    for member in members:
        member.join()
    return [found[rank] for rank in range(size)]


def one_process(rank: int, size: int, port: int, results: Any, work: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    processes = Processes.join(rank, size, rank)
    processes.connect(torch.device("cpu"))
    results.put((rank, work(DistributedTeam(processes, 1, "cpu"), *arguments)))
    processes.leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["traffic", "steps"], help="traffic, steps, weights")
    parser.add_argument("--blocks", type=int, default=32, help="visual blocks of the checkpoint")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--folder", help="where the checkpoint is written; default: the system's temporary folder")
    args = parser.parse_args()
    for what in args.what:
        if what == "weights":
            weights(args.blocks, args.processes, args.folder)
        elif what in ("traffic", "steps"):
            {"traffic": traffic, "steps": steps}[what]()
        else:
            parser.error(f"{what!r} is none of traffic, steps, weights")
        print()


if __name__ == "__main__":
    main()
