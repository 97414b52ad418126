"""The engine: takes jobs, gives them to whoever makes outputs, one client after the other, and keeps what comes of it.

Knows jobs, their rows and files, and lanes: each lane makes one job at a time, on this machine (bench.py) or on
another (replicas.py). Knows no HTTP, no torch, and no processes. What a crash leaves behind is gone on with when the
engine starts again.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import shutil
import sqlite3
import threading
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kandinsky.common.untrusted import read_json
from kandinsky.common.writing import atomic_path, discard, remove_leftovers
from kandinsky.outputs import media
from kandinsky.planning.machine import Machine
from kandinsky.serving import job_files
from kandinsky.serving.directed import Files, extras_from
from kandinsky.serving.job_files import PICTURES
from kandinsky.serving.lanes import Lane, Outcome, Task
from kandinsky.serving.store import ENDED, Job, State, Store
from kandinsky.serving.variants import NO_FILES, Catalogue, Order, request_from, settings_of
from kandinsky.serving.watching import Live, Watchers

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # at a job with which the whole server dies
REMEMBERED = 1000  # clients whose turn is known
AGAIN = 1.0  # seconds until a row that could not be written is tried again


class QueueFull(Exception):
    """As many jobs wait as may."""

    def __init__(self, waiting: int, seconds: float) -> None:
        super().__init__(f"{waiting} jobs are waiting, which is all that may: try again later")
        self.seconds = seconds


class NoSuchJob(Exception):
    """There is none of that id."""


class NotNow(Exception):
    """A job is in another state than this needs."""


class Engine:
    """Threads may share it. `start` takes up what an earlier engine left in the folder; `stop` leaves it so."""

    def __init__(self, catalogue: Catalogue, folder: Path, lanes: Sequence[Lane], dtype: str | None = None) -> None:
        """folder: of outputs, pictures and rows; nobody else's while the engine lives. dtype: for plans."""
        self.catalogue, self.folder, self.lanes, self.dtype = catalogue, folder.absolute(), list(lanes), dtype
        self.store = Store(self.folder)
        self.watchers = Watchers()
        self.live: dict[str, Live] = {}
        self.ended: Counter[tuple[str, str]] = Counter()  # (model, state) since the start
        self.stage_seconds: defaultdict[tuple[str, str], float] = defaultdict(float)  # (model, stage), likewise
        self.is_stopping = False
        self._lane_of: dict[str, Lane] = {}
        self._deleted: set[str] = set()  # to be removed when they have ended
        self._served: OrderedDict[str, None] = OrderedDict()  # clients, who had a turn last stands last
        self._changed = threading.Condition(threading.RLock())
        self._threads: list[threading.Thread] = []

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Take up what was left, and work."""
        (self.folder / PICTURES).mkdir(exist_ok=True)
        for folder in (self.folder, self.folder / PICTURES):
            remove_leftovers(folder)
        for job in self.store.in_state("running"):
            self._take_up(job)
        self._threads = [threading.Thread(target=self._work, args=[lane], daemon=True) for lane in self.lanes]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Have lanes end after the step that runs; what they had begun is kept, and all else waits."""
        with self._changed:
            self.is_stopping = True
            self._changed.notify_all()
        self.watchers.news_of_all()
        for lane in self.lanes:
            lane.close()
        for thread in self._threads:
            thread.join()
        self.store.close()

    def _take_up(self, job: Job) -> None:
        """A job during which an earlier engine has died."""
        output = self.folder / job.file_name
        if output.exists():  # files come whole or not at all
            self._end(job, Outcome("done", seconds=_seconds_of(output)))
        elif job.attempts >= ATTEMPTS:
            words = f"the server ended {job.attempts} times while it was made, and it is not tried again by itself"
            self._end(job, Outcome("failed", words, "server_error"))
        else:
            self.store.update(job.id, state="queued", step=0)

    # --- what clients do ----------------------------------------------------------------------------------------------

    def submit(
        self,
        kind: Literal["video", "image"],
        client: str,
        orders: Sequence[Order],
        picture: Image.Image | None = None,
        picture_name: str | None = None,
        files: Files = NO_FILES,
        remix_of: str | None = None,
    ) -> list[Job]:
        """Queue them, all or none. picture: what they begin with; files: the others, which are copied.

        Raises QueueFull; ValueError for what can't fit on the machine; OSError or sqlite3.Error on a full disk.
        """
        for order in orders:
            self.check_fits(order)
        jobs = [
            Job(
                id=f"{kind}_{secrets.token_hex(12)}",
                kind=kind,
                client=client,
                model=order.model,
                request=order.as_dict,
                created=time.time(),
                magcache=order.magcache,
                loras=[list(pair) for pair in order.loras],
                picture=picture_name if picture is not None else None,
                extras=order.extras.as_dict,
                remix_of=remix_of,
            )
            for order in orders
        ]
        self._check_room(len(jobs))
        written: list[Path] = []
        try:
            if picture is not None:
                for job in jobs:
                    written.append(self.picture_path(job))
                    with atomic_path(written[-1]) as temporary:
                        picture.save(temporary, format="PNG", compress_level=1)
            for job in jobs:
                for field, given in self.given_files(job).items():
                    for (path, _), source in zip(given, files[field], strict=True):
                        written.append(path)
                        with atomic_path(path) as temporary:
                            shutil.copyfile(source, temporary)
            with self._changed:
                self._check_room(len(jobs))
                self.store.add(jobs)
                self._changed.notify_all()
        except BaseException:
            for path in written:
                discard(path)
            raise
        return jobs

    def remix(self, job: Job, client: str, prompt: str) -> Job:
        """A new job with the settings, the seed and the files of an old one. Errors are those of `submit`."""
        variant = self.catalogue[job.model]
        settings = settings_of(job.request, job.magcache, job.loras, job.extras)
        settings |= {"prompt": prompt, "model": job.model}
        for segment in settings.get("segments", []):
            segment["prompt"] = prompt
        source = None if job.picture is None else media.load_image(self.picture_path(job))
        size = None if source is None else source.size
        if variant.makes_images:
            del settings["seconds"]
        settings = {name: value for name, value in settings.items() if value is not None}
        files = {field: [path for path, _ in given] for field, given in self.given_files(job).items()}
        (order,) = self.catalogue.orders(settings, size, files=files)
        names = dataclasses.replace(order.extras, files=tuple(map(tuple, job.extras.get("files", []))))
        order = dataclasses.replace(order, extras=names)
        (new,) = self.submit(job.kind, client, [order], source, job.picture, files, job.id)
        return new

    def cancel(self, job_id: str) -> Job:
        """End a job that has not ended yet. Raises NoSuchJob."""
        with self._changed:
            job = self.job(job_id)
            if job.state == "queued":
                self._end(job, Outcome("cancelled", "it was cancelled before it began", "cancelled"))
            elif job.state == "running" and (lane := self._lane_of.get(job_id)) is not None:
                lane.cancel(job_id)
            return self.job(job_id)

    def retry(self, job_id: str) -> Job:
        """Queue a job again that has failed or was cancelled; what is kept of it is gone on with.

        Raises NoSuchJob, NotNow for other states, and QueueFull.
        """
        with self._changed:
            job = self.job(job_id)
            if job.state not in ("failed", "cancelled"):
                raise NotNow(f"the job is {job.state}; one that has failed or was cancelled can be tried again")
            self._check_room(1)
            self.store.update(
                job_id, state="queued", step=0, attempts=0, started=None, ended=None, error=None, code=None
            )
            self._changed.notify_all()
        self.watchers.news(job_id)
        return self.job(job_id)

    def delete(self, job_id: str) -> None:
        """Remove a job and its files; one that runs is cancelled first, and is gone for everybody at once."""
        with self._changed:
            job = self.job(job_id)
            if job.state != "running":
                self._remove(job)
                return
            self._deleted.add(job_id)
            if (lane := self._lane_of.get(job_id)) is not None:
                lane.cancel(job_id)
        self.watchers.news(job_id)

    def job(self, job_id: str) -> Job:
        """Raises NoSuchJob."""
        job = self.store.get(job_id)
        if job is None or job_id in self._deleted:
            raise NoSuchJob("there is no job of that id")
        live = self.live.get(job_id)
        return job if live is None else dataclasses.replace(job, step=max(job.step, live.step))

    def page(self, limit: int, **filters: Any) -> list[Job]:
        """As `Store.page`, without what is deleted."""
        return [self.job(job.id) for job in self.store.page(limit, **filters) if job.id not in self._deleted]

    # --- files --------------------------------------------------------------------------------------------------------

    def picture_path(self, job: Job) -> Path:
        return job_files.picture_path(self.folder, job)

    def given_files(self, job: Job) -> dict[str, list[tuple[Path, str]]]:
        return job_files.given_files(self.folder, job)

    def output_path(self, job: Job) -> Path:
        return self.folder / job.file_name

    # --- what it will take --------------------------------------------------------------------------------------------

    @property
    def machine(self) -> Machine | None:
        """Of the first lane that knows."""
        return next((lane.machine for lane in self.lanes if lane.machine is not None), None)

    def check_fits(self, order: Order) -> None:
        """Raise ValueError for what no setting makes fit, as loading it would; what isn't known yet may fit."""
        variant, machine = self.catalogue[order.model], self.machine
        if machine is None or variant.config.runtime.offload != "auto":
            return
        plan = self.catalogue.plan(order, machine, self.dtype)
        if plan.refusal is not None:
            raise ValueError(plan.refusal)

    def seconds_for(self, order: Order) -> float | None:
        """How long an order is likely to take, by the last job of its model that ended well; None before the first."""
        variant = self.catalogue[order.model]
        last = self.store.last_done(order.model)
        if last is None or "denoise" not in last.seconds:
            return None
        try:
            before = variant.work(self._order_of(last).requests)
        except ValueError:  # the config has changed since
            return None
        now = variant.work(order.requests)
        denoise = last.seconds["denoise"]
        return denoise * now[0] / before[0] + (sum(last.seconds.values()) - denoise) * now[1] / before[1]

    def seconds_until_free(self) -> float | None:
        """How long the jobs that are there are likely to take; None where that isn't known of one of them."""
        total = 0.0
        states: tuple[State, ...] = ("running", "queued")
        for state in states:
            for job in self.store.in_state(state):
                try:
                    seconds = self.seconds_for(self._order_of(job))
                except ValueError:  # it will fail at once
                    continue
                if seconds is None:
                    return None
                live = self.live.get(job.id)
                total += seconds * (1 if live is None else 1 - live.step / job.num_steps)
        return total / max(len(self.lanes), 1)

    # --- the lanes' threads -------------------------------------------------------------------------------------------

    def _work(self, lane: Lane) -> None:
        try:
            lane.prepare()
        except Exception as error:  # the first job will tell its client
            logger.warning("nothing is loaded yet: %s", error)
        while (job := self._next(lane)) is not None:
            try:
                outcome = self._make(lane, job)
            except Exception as error:
                logger.error("job %s failed unexpectedly", job.id, exc_info=error)
                outcome = Outcome("failed", f"{type(error).__name__}: {error}", "server_error")
            self._finish(job, outcome)

    def _next(self, lane: Lane) -> Job | None:
        """The job whose turn it is, now running; waits for one. None: the engine stops."""
        while True:
            job = None
            with self._changed:
                if self.is_stopping:
                    return None
                try:
                    job = self._whose_turn()
                    if job is not None:
                        self.live[job.id], self._lane_of[job.id] = Live(), lane
                        started = job.started or time.time()
                        self.store.update(job.id, state="running", attempts=job.attempts + 1, started=started)
                        break
                    self._changed.wait()
                except sqlite3.Error as error:  # a full disk
                    if job is not None:
                        self.live.pop(job.id, None)
                        self._lane_of.pop(job.id, None)
                    logger.error("the queue can't be worked on: %s", error)
                    self._changed.wait(AGAIN)
        self.watchers.news(job.id)
        return job

    def _whose_turn(self) -> Job | None:
        waiting = self.store.waiting()
        if not waiting:
            return None
        job = self.store.get(waiting[0][0])
        assert job is not None
        if job.attempts == 0:
            turns = {client: turn for turn, client in enumerate(self._served)}
            job_id, _ = min(waiting, key=lambda one: turns.get(one[1], -1))  # of equals the first
            job = self.store.get(job_id)
            assert job is not None
        self._served[job.client] = None
        self._served.move_to_end(job.client)
        while len(self._served) > REMEMBERED:
            self._served.popitem(last=False)
        return job

    def _make(self, lane: Lane, job: Job) -> Outcome:
        try:
            order = self._order_of(job)
            there = self.catalogue.loras()
            if missing := [name for name, _ in order.loras if name not in there]:
                raise ValueError(f"the adapter {missing[0]} is not there any more")
        except ValueError as error:
            return Outcome("failed", str(error), "invalid_request_error")
        loras = tuple((name, str(there[name].absolute()), scale) for name, scale in order.loras)
        picture = None if job.picture is None else self.picture_path(job)
        files = {field: [path for path, _ in given] for field, given in self.given_files(job).items()}
        task = Task(job.id, order, self.output_path(job), picture, job.picture, loras, files)
        live = self.live[job.id]

        def report(event: dict[str, Any]) -> None:
            live.stage = event.get("stage", live.stage)
            if "step" in event:
                live.step = event["step"]
                with suppress(sqlite3.Error):  # the next step is another chance
                    self.store.update(job.id, step=live.step)
            if "preview" in event:
                live.preview, live.preview_step = event["preview"], live.step
            self.watchers.news(job.id)

        return lane.make(task, report)

    def _order_of(self, job: Job) -> Order:
        config = self.catalogue[job.model].config
        request, loras = request_from(job.request, config), tuple((name, scale) for name, scale in job.loras)
        return Order(job.model, request, job.magcache, loras, extras_from(job.extras, config))

    def _finish(self, job: Job, outcome: Outcome) -> None:
        """Write down how a job ended; on a full disk again and again, until there is room or the engine stops."""
        while True:
            with self._changed:
                try:
                    if job.id in self._deleted:
                        self._remove(job)
                    elif outcome.state == "kept":
                        self.store.update(job.id, state="queued", attempts=1)
                    else:
                        self._end(job, outcome)
                    break
                except sqlite3.Error as error:
                    logger.error("how job %s ended can't be written down: %s", job.id, error)
                    if self.is_stopping:  # the next engine finds out by itself
                        break
                    self._changed.wait(AGAIN)
        with self._changed:
            self.live.pop(job.id, None)
            self._lane_of.pop(job.id, None)
            self._deleted.discard(job.id)
        self.watchers.news(job.id)

    def _end(self, job: Job, outcome: Outcome) -> None:
        assert outcome.state in ENDED
        state: State = outcome.state  # type: ignore[assignment]
        values: dict[str, Any] = {"state": state, "ended": time.time(), "error": outcome.error, "code": outcome.code}
        if state == "done":
            values |= {"output": job.file_name, "seconds": outcome.seconds, "step": job.num_steps}
        self.store.update(job.id, **values)
        self.ended[job.model, state] += 1
        for stage, seconds in outcome.seconds.items():
            self.stage_seconds[job.model, stage] += seconds
        if state == "cancelled":
            kept = job_files.inputs_of(self.folder, job)  # for a second try
            job_files.discard_files(self.folder, job, kept)
        self.watchers.news(job.id)

    def _remove(self, job: Job) -> None:
        self.store.remove(job.id)
        job_files.discard_files(self.folder, job)
        self.watchers.news(job.id)

    def _check_room(self, more: int) -> None:
        waiting = self.store.counts()["queued"]
        if waiting + more > self.catalogue.limits.queue:
            seconds = self.seconds_until_free()
            raise QueueFull(waiting, min(max(seconds or 30.0, 1.0), 3600.0))
        free = shutil.disk_usage(self.folder).free
        if free == 0:
            raise OSError(28, "No space left on device")


def _seconds_of(output: Path) -> dict[str, float]:
    """How long the stages of an output took, by its record; nothing where that says nothing."""
    try:
        seconds = read_json(media.sidecar_path(output)).get("seconds")
    except ValueError:
        return {}
    return seconds if isinstance(seconds, dict) else {}
