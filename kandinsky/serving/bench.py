"""The workers of one machine: a pipeline is loaded when its first job comes, and stays as long as there is room.

Room is what the plans say: where the peaks of all loaded pipelines and of the next one together are more than the
machine has, those that were idle the longest go. One job runs at a time.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from kandinsky.planning.machine import Machine
from kandinsky.planning.plan import Plan
from kandinsky.request import Request
from kandinsky.serving.lanes import Outcome, Report, Task
from kandinsky.serving.variants import Catalogue
from kandinsky.serving.worker_process import Died, Options, Worker

logger = logging.getLogger(__name__)


class Bench:
    """A lane of the engine. All but `cancel` and `close` is for one thread."""

    def __init__(
        self,
        catalogue: Catalogue,
        options: Options,
        machine: Machine | None = None,
        keep_open: Sequence[int] = (),
        new_worker: Callable[..., Worker] = Worker,
    ) -> None:
        """machine: what is known of it before the first worker, who asks torch, can tell."""
        self.catalogue, self.options, self.machine, self.keep_open = catalogue, options, machine, keep_open
        self.workers: OrderedDict[str, Worker] = OrderedDict()  # by model, the one that was used last at the end
        self._new_worker = new_worker
        self._current: tuple[str, Worker | None] | None = None  # the job that runs
        self._cancelled: set[str] = set()
        self._is_closing = False
        self._lock = threading.RLock()

    def prepare(self) -> None:
        """Load the first model, so that the first job need not wait for it. Errors are those of `Worker`."""
        self._worker(next(iter(self.catalogue.variants)), None)

    def make(self, task: Task, report: Report) -> Outcome:
        with self._lock:
            self._current = task.id, None
        try:
            for attempt in (1, 2):
                report({"stage": "loading"})
                try:
                    worker = self._worker(task.order.model, task.order.largest)
                    with self._lock:
                        self._current = task.id, worker
                        if early := self._early(task.id):
                            return early
                    outcome = worker.make(task, report)
                    if outcome.state == "failed" and not worker.is_alive:  # killed, maybe by us
                        with self._lock:
                            return self._early(task.id) or outcome
                    return outcome
                except Died as error:
                    self.workers.pop(task.order.model, None)
                    with self._lock:
                        if early := self._early(task.id):
                            return early
                    if attempt == 2:
                        return Outcome("failed", str(error), "server_error")
                    logger.warning("%s", error)
            raise AssertionError
        except (ValueError, OSError) as error:
            return Outcome("failed", " ".join(str(error).split()), "invalid_request_error")
        finally:
            with self._lock:
                self._current = None
                self._cancelled.discard(task.id)

    def cancel(self, job_id: str) -> None:
        """Asked a second time, kill its worker."""
        with self._lock:
            if self._current is None or self._current[0] != job_id:
                return
            worker, again = self._current[1], job_id in self._cancelled
            self._cancelled.add(job_id)
            if worker is not None and again:
                worker.kill()
            elif worker is not None:
                worker.cancel(job_id)

    def close(self) -> None:
        with self._lock:
            self._is_closing = True
            workers = list(self.workers.values())
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.close()

    def _early(self, job_id: str) -> Outcome | None:
        """How a job ends that somebody ended, and whose worker does not tell."""
        if self._is_closing:
            return Outcome("kept")
        return Outcome("cancelled", "it was cancelled", "cancelled") if job_id in self._cancelled else None

    def _worker(self, model: str, request: Request | None) -> Worker:
        """The worker with the model, loaded so that the request fits."""
        worker = self.workers.get(model)
        if worker is not None and (not worker.is_alive or self._is_outgrown(worker, request)):
            del self.workers[model]
            worker.close()
            worker = None
        if worker is None:
            self._make_room(model)
            worker = self._new_worker(self.catalogue[model], request, self.options, self.keep_open)
            with self._lock:
                self.workers[model] = worker
                if self._is_closing:
                    worker.stop()
            try:
                worker.load(self._see_machine)
            except ValueError:
                del self.workers[model]
                raise
        self.workers.move_to_end(model)
        return worker

    def _see_machine(self, machine: Machine) -> None:
        if len(self.workers) == 1:  # as it is when nothing else is loaded
            self.machine = machine

    def _is_outgrown(self, worker: Worker, request: Request | None) -> bool:
        """Whether a request is larger than what the worker was loaded for, and needs other settings to fit."""
        if request is None or self.machine is None:
            return False
        before = worker.loaded_for
        pixels = [one.width * one.height * one.num_frames for one in (before, request)]
        if pixels[1] <= pixels[0]:
            return False
        plans = [worker.variant.plan(one, self.machine, self.options.dtype) for one in (before, request)]
        return plans[0].settings != plans[1].settings

    def _make_room(self, model: str) -> None:
        while self.workers and not self._fit([*self.workers, model]):
            name, worker = self.workers.popitem(last=False)
            logger.info("%s makes room for %s", name, model)
            worker.close()

    def _fit(self, models: Sequence[str]) -> bool:
        if self.machine is None:
            return False
        variants = [self.catalogue[name] for name in models]
        plans = [one.plan(one.default, self.machine, self.options.dtype) for one in variants]
        on_gpu, on_host = (sum(map(peak, plans)) for peak in (gpu_peak, host_peak))
        return on_host <= self.machine.host_memory and on_gpu <= (self.machine.gpu_memory or 0)


def gpu_peak(plan: Plan) -> int:
    """Bytes on the GPU, of the stage with the most; 0 where there is none."""
    return max(stage.gpu for stage in plan.stages)


def host_peak(plan: Plan) -> int:
    """Bytes of the host's memory, likewise."""
    return max(stage.host for stage in plan.stages)
