"""Lanes on a Ray cluster: the same workers, each bench of them in a Ray Serve deployment of its own.

A deployment has one replica, so that what is said to it (cancel, close) reaches the one that is meant; the queue and
the rows stay with the engine. Machines share code, weights and the folder of outputs under the same paths, as for files
of prompts (batch.py). Ray starts a replica again that dies, on another machine where it must, and the job goes on there
from what is kept of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from kandinsky.planning.plan import Machine
from kandinsky.serving.bench import Bench
from kandinsky.serving.lanes import Lane, Outcome, Report, Task
from kandinsky.serving.variants import Catalogue
from kandinsky.serving.worker_process import Options

logger = logging.getLogger(__name__)

ATTEMPTS = 2  # at a job whose replica dies
CALLS = 10  # that a replica hears at a time: one makes a job, the others tell it something
GRACE = 10  # seconds that a replica has when Ray ends it


class Replica:
    """A bench in a process of Ray's."""

    def __init__(self, catalogue: Catalogue, options: Options) -> None:
        self.bench = Bench(catalogue, options)
        self._thread = ThreadPoolExecutor(1)

    async def prepare(self) -> Machine | None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self.bench.prepare)
        return self.bench.machine

    async def make(self, task: Task) -> AsyncIterator[Any]:
        """News of the job, and as the last one its outcome."""
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[Any] = asyncio.Queue()

        def report(event: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(news.put_nowait, event)

        making = loop.run_in_executor(self._thread, self.bench.make, task, report)
        making.add_done_callback(lambda _: news.put_nowait(None))
        while (event := await news.get()) is not None:
            yield event
        yield await making

    async def cancel(self, job_id: str) -> None:
        self.bench.cancel(job_id)

    async def close(self) -> None:
        await asyncio.to_thread(self.bench.close)


class RayLane:
    """A lane of the engine that hands its jobs to a replica; `handle` is Ray Serve's."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.machine: Machine | None = None

    def prepare(self) -> None:
        self.machine = self.handle.prepare.remote().result()

    def make(self, task: Task, report: Report) -> Outcome:
        from ray.exceptions import RayError

        for _ in range(ATTEMPTS):
            try:
                for news in self.handle.options(stream=True).make.remote(task):
                    if isinstance(news, Outcome):
                        return news
                    report(news)
            except RayError as error:
                logger.warning("a replica died: %s", " ".join(str(error).split())[:500])
        return Outcome("failed", f"the process on Ray that makes outputs died {ATTEMPTS} times", "server_error")

    def cancel(self, job_id: str) -> None:
        self.handle.cancel.remote(job_id)

    def close(self) -> None:
        with suppress(Exception):  # it may be gone
            self.handle.close.remote().result()


@contextmanager
def on_ray(catalogue: Catalogue, options: Options, address: str, replicas: int) -> Iterator[list[Lane]]:
    """Lanes on a cluster until the block ends. Each has a GPU, where the cluster has any and `options` want one.

    address: "local" starts a Ray of our own, "auto" finds the cluster that this machine belongs to; or any other
    address of `ray.init`. Raises ValueError where Ray Serve is not installed, ConnectionError without a cluster.
    """
    try:
        import ray
        from ray import serve
    except ImportError:
        raise ValueError("--ray_address needs Ray Serve: pip install 'ray[serve]'") from None
    ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
    try:
        serve.start(proxy_location="Disabled")
        gpus = int(ray.cluster_resources().get("GPU", 0)) if options.device != "cpu" else 0
        as_deployment = serve.deployment(
            num_replicas=1,
            max_ongoing_requests=CALLS,
            graceful_shutdown_timeout_s=GRACE,
            ray_actor_options={"num_cpus": 1, "num_gpus": 1 if gpus else 0},
        )
        names = [f"kandinsky-{i}" for i in range(replicas)]
        yield [
            RayLane(serve.run(as_deployment(Replica).bind(catalogue, options), name=name, route_prefix=None))
            for name in names
        ]
        serve.shutdown()
    finally:
        ray.shutdown()
