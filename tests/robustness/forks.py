"""Runs of test.py that are ended from outside, dozens of them for one import of torch: each is a fork of this process.

`python -m tests.robustness.forks PLAN RESULTS` carries out a list of cells. A cell is a folder in which test.py runs,
as one process or as several, and a signal that comes when a function is called for the n-th time. Then the command that
was printed is run as well, or where nobody could print one, what a person would do. See `Cell` and `Run`.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import hashlib
import importlib
import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.limits import PATIENCE

REPOSITORY = Path(__file__).resolve().parents[2]
WORKERS = 2  # cells at a time; most of their time is waiting
# stage -> (module, the object that has the function, the function, how the name of its first argument ends)
STAGES = {
    "load": ("kandinsky.loading.assemble", "", "load_vae", ""),
    "encode": ("kandinsky.pipelines.base", "Pipeline", "encode_prompts", ""),
    "step": ("kandinsky.models.dit", "DiffusionTransformer3D", "forward", ""),
    "save": ("kandinsky.common.writing", "", "_sync", ".tmp.safetensors"),  # latents, written and without a name
    "decode": ("kandinsky.pipelines.base", "Pipeline", "decode", ""),
    "write": ("kandinsky.outputs.media", "", "write_sidecar", ""),  # the output is written and without a name
}
PRINTED = re.compile(r"(?:go on with: (?:python|torchrun --nproc-per-node \d+)|goes on: python) test\.py (.*)")


@dataclasses.dataclass
class Cell:
    """stage, signal, at: what happens in the first run, at which call. whole_group: to all processes, as a terminal
    and launchers send it; otherwise to the process `rank` alone, in which it is counted in any case. then: what is run
    next where no command is printed. environment: over this process's."""

    folder: str
    words: list[str]
    stage: str | None = None
    signal: int = 0
    at: int = 1
    processes: int = 1
    rank: int = 0
    whole_group: bool = True
    then: list[str] | None = None
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Run:
    """words as they were given; statuses, as a shell has them, and forwards of the DiT of each process; what the first
    one wrote; files of the folder by name with their checksums, and hidden ones."""

    words: list[str]
    statuses: list[int]
    forwards: list[int | None]
    out: str
    err: str
    files: dict[str, str]
    hidden: list[str]


def carry_out(cell: Cell, cli: Any) -> list[Run]:
    runs = [run(cell, cell.words, cli, faulty=cell.stage is not None)]
    printed = PRINTED.findall(runs[0].err)
    next_words = shlex.split(printed[-1]) if printed else cell.then
    if next_words is not None:
        runs.append(run(cell, next_words, cli, faulty=False))
    return runs


def run(cell: Cell, words: list[str], cli: Any, faulty: bool) -> Run:
    folder = Path(cell.folder)
    logs = folder.with_name(f"{folder.name}.logs")
    logs.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    port = free_port() if cell.processes > 1 else ""
    members, parents = [], os.getpgrp()
    for rank in range(cell.processes):
        pid = os.fork()
        if pid == 0:
            log = logs / str(rank)
            try:
                while os.getpgrp() == parents:  # a signal to its group is to reach nobody else
                    time.sleep(0.001)
                begin(cell, rank, port, log)
                if faulty and rank == cell.rank:
                    install_fault(cell)
                code = work(cli, words, log)
            except BaseException:
                traceback.print_exc()
                code = 99
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        os.setpgid(pid, members[0] if members else pid)  # by the parent, who knows that the leader is there
        members.append(pid)
    statuses = [status_of(pid, members) for pid in members]
    files = [path for path in folder.rglob("*") if path.is_file()]
    seen = [path for path in files if not path.name.startswith(".")]
    forwards = [logs / f"{rank}.forwards" for rank in range(cell.processes)]
    done = Run(
        words,
        statuses,
        [int(path.read_text()) if path.exists() else None for path in forwards],
        (logs / "0.out").read_text(),
        (logs / "0.err").read_text(),
        {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in seen},
        sorted(path.name for path in files if path not in seen),
    )
    for path in logs.iterdir():
        path.unlink()
    return done


def begin(cell: Cell, rank: int, port: str, log: Path) -> None:
    """The process as a shell or a launcher starts it."""
    os.chdir(cell.folder)
    for number, name in ((1, "out"), (2, "err")):
        handle = os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    if port:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(cell.processes))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update(cell.environment)
    faulthandler.register(signal.SIGUSR1)


def work(cli: Any, words: list[str], log: Path) -> int:
    from kandinsky.models.dit import DiffusionTransformer3D

    forwards: list[int] = []
    forward = DiffusionTransformer3D.forward

    def counted(*args: Any, **options: Any) -> Any:
        forwards.append(1)
        return forward(*args, **options)

    DiffusionTransformer3D.forward = counted  # type: ignore[method-assign]
    try:
        return int(cli.main(words))
    except SystemExit as error:
        return int(str(error.code))
    finally:
        log.with_suffix(".forwards").write_text(str(len(forwards)))


def install_fault(cell: Cell) -> None:
    module_name, owner_name, name, ending = STAGES[str(cell.stage)]
    owner = importlib.import_module(module_name)
    owner = getattr(owner, owner_name) if owner_name else owner
    original, calls = getattr(owner, name), []

    def fault(*args: Any, **options: Any) -> Any:
        if str(args[0] if args else "").endswith(ending):
            calls.append(1)
            if len(calls) == cell.at:
                (os.killpg if cell.whole_group else os.kill)(
                    os.getpgid(0) if cell.whole_group else os.getpid(), cell.signal
                )
        return original(*args, **options)

    setattr(owner, name, fault)


def status_of(pid: int, members: list[int]) -> int:
    """As a shell has it. Ends them all where they hang."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        if time.monotonic() > deadline:
            for number in (signal.SIGUSR1, signal.SIGKILL):  # the first has it say where it is
                for member in members:
                    os.kill(member, number)
                time.sleep(1)
            deadline = float("inf")
        time.sleep(0.005)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def main(plan: str, results: str) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork has none of the threads of its parent
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    spec = importlib.util.spec_from_file_location("cli", REPOSITORY / "test.py")
    assert spec is not None and spec.loader is not None
    cli = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cli)
    for module in ("kandinsky.loading.assemble", "imageio.v2", "imageio_ffmpeg", "torch.distributed.fsdp"):
        importlib.import_module(module)
    import torch

    torch.set_num_threads(1)
    cells = [Cell(**cell) for cell in json.loads(Path(plan).read_text())]
    workers = []
    for worker in range(WORKERS):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                found = [[dataclasses.asdict(one) for one in carry_out(cell, cli)] for cell in cells[worker::WORKERS]]
                Path(f"{results}.{worker}").write_text(json.dumps(found))
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        workers.append(pid)
    assert not any([os.waitpid(pid, 0)[1] for pid in workers])
    parts = [json.loads(Path(f"{results}.{worker}").read_text()) for worker in range(WORKERS)]
    Path(results).write_text(json.dumps([parts[i % WORKERS][i // WORKERS] for i in range(len(cells))]))


if __name__ == "__main__":
    main(*sys.argv[1:])
