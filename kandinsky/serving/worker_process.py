"""A worker from the outside: a process with one loaded pipeline, which makes one job at a time.

Orders go to its standard input and news come from its standard output, a JSON object a line (worker.py is the other
side). When it dies, whoever reads sees the end of the lines; when the one who gives orders dies, so does the worker.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kandinsky.config.reading import config_to_dict
from kandinsky.planning.machine import Machine
from kandinsky.request import Request
from kandinsky.serving.lanes import Outcome, Report, Task
from kandinsky.serving.variants import Variant

PACKAGE = Path(__file__).resolve().parents[1]
CODE = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); from kandinsky.serving.worker import main; main()"


@dataclasses.dataclass(frozen=True)
class Options:
    """How pipelines are loaded and run, as on the command line."""

    device: str | None = None
    dtype: str | None = None
    attention_engine: str | None = None
    preview: bool = True
    keep_seconds: float = 300  # after so long a job's steps are kept on disk, for when the machine goes down
    stop_seconds: float = 120  # how long a worker has to end, before it is killed


class Died(Exception):
    """The process is gone, or was before it had begun with anything."""


class Worker:
    """A process that has loaded a pipeline. `make` is for one thread; `cancel` and `stop` are for others."""

    def __init__(
        self,
        variant: Variant,
        request: Request | None,
        options: Options,
        keep_open: Sequence[int] = (),
        command: Sequence[str] = (sys.executable, "-c", CODE),
    ) -> None:
        """request: what settings that are left open have to fit. keep_open: file descriptors that it holds until it
        ends."""
        self.variant, self.options, self.loaded_for = variant, options, request or variant.default
        self._writing, self._reading = threading.Lock(), threading.RLock()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=tuple(keep_open),
            start_new_session=True,  # Ctrl-C is for the server, which tells its workers
        )
        setup = {
            "config": config_to_dict(variant.config),
            "cache_dir": variant.cache_dir,
            "request": None if request is None else dataclasses.asdict(request),
            **dataclasses.asdict(options),
        }
        self._told(setup)

    def load(self, on_machine: Callable[[Machine], None]) -> None:
        """Wait until it is ready. Raises ValueError for what a user can mend, Died for all else."""
        with self._reading:
            for news in self._news():
                if "machine" in news:
                    on_machine(_machine(news["machine"]))
                elif "refused" in news:
                    self._wait()
                    raise ValueError(news["refused"])
                elif "ready" in news:
                    return
            raise Died(self._how_it_died("while it was loaded"))

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def make(self, task: Task, report: Report) -> Outcome:
        """Raises Died where it was gone before it could begin: nothing has happened then."""
        with self._reading:
            return self._make(task, report)

    def _make(self, task: Task, report: Report) -> Outcome:
        order = task.order
        told = self._told(
            {
                "make": task.id,
                "request": order.as_dict,
                "magcache": order.magcache,
                "loras": task.loras,
                "output": str(task.output),
                "picture": None if task.picture is None else str(task.picture),
                "picture_name": task.picture_name,
                "extras": order.extras.as_dict,
                "files": {field: list(map(str, paths)) for field, paths in task.files.items()},
            }
        )
        has_begun, stage = False, "encoding"
        for news in self._news() if told else ():
            has_begun = True
            if "outcome" in news:
                return Outcome(news["outcome"], news.get("error"), news.get("code"), news.get("seconds") or {})
            stage = news.get("stage", stage)
            if "preview" in news:
                news["preview"] = b64decode(news["preview"])
            report(news)
        if not has_begun:
            raise Died(self._how_it_died("before it began"))
        return Outcome("failed", self._how_it_died(f"while {stage}"), "server_error")

    def cancel(self, job_id: str) -> None:
        self._told({"cancel": job_id})

    def kill(self) -> None:
        with suppress(OSError):
            self.process.kill()

    def stop(self) -> None:
        """Have it end, after the step that runs and with what it has kept; comes back at once."""
        with self._writing, suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()

    def close(self) -> None:
        """`stop`, and wait until it has ended; killed where that takes too long."""
        self.stop()
        try:
            self.process.wait(self.options.stop_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
        self._wait()

    def _wait(self) -> int:
        code = self.process.wait()
        with self._reading:
            for pipe in (self.process.stdin, self.process.stdout):
                assert pipe is not None
                with suppress(OSError):
                    pipe.close()
        return code

    def _told(self, order: dict[str, Any]) -> bool:
        """Whether the order could be written; what becomes of it is told by the news."""
        try:
            with self._writing:
                assert self.process.stdin is not None
                self.process.stdin.write(json.dumps(order, default=str).encode() + b"\n")
                self.process.stdin.flush()
        except (OSError, ValueError):  # it is gone, or told to go
            return False
        return True

    def _news(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with suppress(json.JSONDecodeError):  # half a line of one that was killed
                yield json.loads(line)

    def _how_it_died(self, when: str) -> str:
        code = self._wait()
        if code == -signal.SIGKILL:
            why = "was killed, as the system does where memory runs out"
        elif code < 0:
            why = f"ended by the signal {signal.Signals(-code).name}"
        else:
            why = f"ended with status {code}; the server's log says why"
        return f"the process that makes outputs {why} {when}; it starts anew with the next job"


def _machine(told: Mapping[str, Any]) -> Machine:
    """What JSON says of one, in which tuples are lists."""
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in told.items()}
    return Machine(**values)
