"""The first hour on a GPU: every figure that the code assumes, measured, in steps that can be gone on with.

    python tools/first_hour.py [--dry] [--again STEP ...] [--folder benchmarks/gpu]

Each step runs in a process of its own, is ended after 9 minutes, and leaves a JSON file; one that is there is not
measured again unless --again names it. The table at the end says what was assumed, what was measured, and the line to
change. --dry goes through every step on the CPU with tiny sizes, and of other programs asks only for their help; its
figures mean nothing and go into a folder of their own. Nothing of this has ever run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

from kandinsky.attention.engines import AUTO_ORDER
from kandinsky.common.limits import LEAST_FRAMES_ON_GPU, STAGING_BYTES
from kandinsky.planning.machine import CUDA_CONTEXT, GPU_SLACK, HOST_OF_GPU_RUN, Machine
from kandinsky.runtime.compile import BREAK_EVEN_EVALUATIONS
from tools import gpu_measurements
from tools.gpu_measurements import STEPS, Figures

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 9 * 60  # seconds of a step
# Steps are forked from a process that has imported everything and never touched a GPU.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([gpu_measurements.__name__])

SPEED = ("benchmarks/speed.py", "--device", "cuda", "--part")
PROGRAMS: dict[str, tuple[str, ...]] = {
    "tests": ("-m", "pytest", "-q", "-m", "gpu", "tests"),
    "attention": ("benchmarks/attention.py", "--device", "cuda", "--part", "engines"),
    "nabla": ("benchmarks/attention.py", "--device", "cuda", "--part", "nabla"),
    "memory": ("benchmarks/memory.py", "--device", "cuda", "--latents", "31", "64", "96"),
    **{f"speed_{part}": (*SPEED, part) for part in ("forward", "vae", "text")},
    **{
        f"run_{path.stem.removeprefix('config_')}": (*SPEED, "generation", "--configs", str(path.relative_to(ROOT)))
        for path in sorted((ROOT / "configs").glob("config_*.yaml"))
        if "tiny" not in path.stem
    },
}


@dataclass(frozen=True)
class Assumption:
    """What the code goes by, the step and the name of the figure to compare it with, and the line that says it.

    line: how that line of `file` begins.
    """

    what: str
    value: Any
    step: str
    figure: str
    file: str
    line: str

    def where(self) -> str:
        """file:line, as it is today."""
        lines = (ROOT / self.file).read_text(encoding="utf-8").splitlines()
        return f"{self.file}:{next(n for n, text in enumerate(lines, 1) if text.strip().startswith(self.line))}"


MACHINE, LIMITS, ENGINES = (
    "kandinsky/planning/machine.py",
    "kandinsky/common/limits.py",
    "kandinsky/attention/engines.py",
)
COMPILE = "kandinsky/runtime/compile.py"
ASSUMED = (
    Assumption("CUDA's own memory, bytes", CUDA_CONTEXT, "context", "context", MACHINE, "CUDA_CONTEXT ="),
    Assumption("the host's for a run besides weights, at most, bytes", HOST_OF_GPU_RUN, "context", "host", MACHINE,
               "HOST_OF_GPU_RUN ="),
    Assumption("link, bytes/s", Machine.link, "rates", "link", MACHINE, "link:"),
    Assumption("mapped files, bytes/s", Machine.files, "rates", "files", MACHINE, "files:"),
    Assumption("the GPU's products in bfloat16, FLOP/s", Machine.flops, "rates", "flops", MACHINE, "flops:"),
    Assumption("the host's products, FLOP/s", Machine.host_flops, "rates", "host flops", MACHINE, "host_flops:"),
    Assumption("the GPU's memory, bytes/s", Machine.memory, "rates", "memory", MACHINE, "memory:"),
    Assumption("share of a copy that hides behind computing", 1, "rates", "overlap", "kandinsky/runtime/block_swap.py",
               "self._copies = torch.cuda.Stream"),
    Assumption("allocator and kernels beside the plan", GPU_SLACK, "forward", "slack", MACHINE, "GPU_SLACK ="),
    Assumption("evaluations that compiling pays from", BREAK_EVEN_EVALUATIONS, "forward",
               "break even, kernels on disk", COMPILE, "BREAK_EVEN_EVALUATIONS ="),
    Assumption("the same where nothing is on disk", BREAK_EVEN_EVALUATIONS, "forward", "break even, nothing on disk",
               COMPILE, "BREAK_EVEN_EVALUATIONS ="),
    Assumption("`auto`'s engines, head_dim 64", AUTO_ORDER, "engines", "order 64", ENGINES, "AUTO_ORDER"),
    Assumption("`auto`'s engines, head_dim 128", AUTO_ORDER, "engines", "order 128", ENGINES, "AUTO_ORDER"),
    Assumption("staged loading, times as fast as plain copies", "more than 1", "staging", "times as fast as plain",
               "kandinsky/runtime/staging.py", "if device.type != \"cuda\":"),
    Assumption("bytes of a staging buffer", STAGING_BYTES, "staging", "best bytes", LIMITS, "STAGING_BYTES ="),
    Assumption("NABLA's map on a GPU", "sort", "nabla_map", "faster", "kandinsky/attention/nabla.py",
               "return sorted_heaviest(mass, P)"),
    Assumption("frames of the VAE's chunks", LEAST_FRAMES_ON_GPU, "vae_chunks", "fastest", LIMITS,
               "LEAST_FRAMES_ON_GPU ="),
    Assumption("the VAE in channels-last memory, times as fast", "more than 1", "vae_chunks",
               "channels last, times as fast", "kandinsky/loading/vae.py", "memory_format = torch.channels_last"),
)  # fmt: skip


def run_step(name: str, dry: bool) -> Figures:
    """A step's figures, from a process that is ended after `LIMIT`: nothing that goes wrong there stays on the GPU."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_measure, args=(name, dry, sender))
    process.start()
    sender.close()  # so that the child's end is the only one
    try:
        figures: Figures = receiver.recv() if receiver.poll(LIMIT) else {"error": f"took more than {LIMIT} s"}
    except EOFError:
        process.join()
        figures = {"error": f"the process ended with {process.exitcode}"}
    process.kill()
    process.join()
    return figures


def _measure(name: str, dry: bool, sender: Connection) -> None:
    try:
        sender.send(STEPS[name](gpu_measurements.DRY if dry else gpu_measurements.REAL))
    except Exception as error:  # the next step may well work
        sender.send({"error": f"{type(error).__name__}: {error}"})


def run_program(words: tuple[str, ...]) -> Figures:
    """A program's status, seconds and last lines; ended after `LIMIT`."""
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace")
        return {"error": f"took more than {LIMIT} s", "command": words, "output": output[-20000:]}
    figures = {"command": words, "seconds": time.perf_counter() - begin, "output": done.stdout[-20000:]}
    if done.returncode:
        figures["error"] = f"ended with {done.returncode}: {done.stderr[-2000:]}"
    return figures


def help_of(words: tuple[str, ...]) -> tuple[str, ...]:
    """The program's question for help."""
    return (*words[: 2 if words[0] == "-m" else 1], "--help")


def take_steps(folder: Path, dry: bool, again: list[str], programs: dict[str, tuple[str, ...]] = PROGRAMS) -> None:
    """Every step that has no figures yet."""
    folder.mkdir(parents=True, exist_ok=True)
    helps: dict[tuple[str, ...], Figures] = {}  # of each program once
    for name in [*STEPS, *programs]:
        file = folder / f"{name}.json"
        if file.exists() and name not in again and "error" not in json.loads(file.read_text()):
            continue
        print(f"{name} ...", flush=True)
        if name in STEPS:
            figures = run_step(name, dry)
        elif not dry:
            figures = run_program(programs[name])
        else:
            words = help_of(programs[name])
            figures = helps[words] = helps.get(words) or run_program(words)
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(figures, indent=1))
        os.replace(unfinished, file)


def table(folder: Path) -> str:
    """What was assumed beside what was measured, and what failed."""
    lines = ["| what | assumed | measured | line to change |", "|---|---|---|---|"]
    found = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    for one in ASSUMED:
        value = found.get(one.step, {}).get(one.figure, "not measured")
        lines.append(f"| {one.what} | {_cell(one.value)} | {_cell(value)} | {one.where()} |")
    failed = [f"{name}: {figures['error']}" for name, figures in found.items() if "error" in figures]
    return "\n".join([*lines, "", *failed])


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--again", nargs="+", default=[], choices=[*STEPS, *PROGRAMS], help="measure these once more")
    parser.add_argument("--folder", type=Path, help="of the figures; default: benchmarks/gpu")
    args = parser.parse_args()
    dry = args.dry or not torch.cuda.is_available()
    folder = args.folder or ROOT / ("outputs/gpu_dry" if dry else "benchmarks/gpu")
    take_steps(folder, dry, args.again)
    words = table(folder)
    (folder / "table.md").write_text(words + "\n")
    print(words)
    failed = [file for file in folder.glob("*.json") if "error" in json.loads(file.read_text())]
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
