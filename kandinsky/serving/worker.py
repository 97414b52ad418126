"""A worker from the inside: loads a pipeline and makes one job after the other, as test.py would.

The first line of standard input says what to load, each further one is a job to make or to cancel; news go out as
lines of JSON (worker_process.py is the other side). When nobody gives orders any more, it ends as Ctrl-C ends a run:
after the step that runs, with what there is kept beside the output, where the job is gone on with.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from kandinsky.common.out_of_memory import ran_out_of_memory
from kandinsky.common.signals import Stopper, stop_on_signals
from kandinsky.common.untrusted import read_json
from kandinsky.common.writing import discard
from kandinsky.config.reading import config_from_dict
from kandinsky.outputs import media, resume
from kandinsky.outputs.sources import Media
from kandinsky.request import Request, recorded_request
from kandinsky.serving.directed import extras_from, given_media, long_video, post_settings
from kandinsky.serving.segments import LongVideo, make_long
from kandinsky.serving.unfinished import what_is_left

if TYPE_CHECKING:
    from torch import Tensor

    from kandinsky.pipelines.base import Pipeline

logger = logging.getLogger(__name__)

PREVIEW_SHARE = 20  # previews take at most the 20th part of the time
PREVIEW_SECONDS = 0.4  # and there are no more than so
PREVIEW_FRAMES = 8
PREVIEW_MILLISECONDS = 200  # that each of them is shown


class Cancelled(Exception):
    """The job that runs is not wanted any more."""


class News:
    """The way out: one JSON object a line. Where nobody listens any more, nothing happens."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out

    def __call__(self, **news: Any) -> None:
        with suppress(OSError):
            self._out.write(json.dumps(news).encode() + b"\n")
            self._out.flush()


class Making:
    """One job while it is made: what `Stopper` and the pipeline's callback ask about it."""

    def __init__(self, pipeline: Pipeline, job: Mapping[str, Any], setup: Mapping[str, Any], news: News) -> None:
        self.news, self.id = news, job["make"]
        self.request: Request = recorded_request(job["request"], pipeline.config)
        self.extras = extras_from(job["extras"], pipeline.config)
        self.files = {field: [Path(path) for path in paths] for field, paths in job["files"].items()}
        self.pipeline, self.asked = pipeline.under(post_settings(pipeline.config, self.extras)), pipeline.config
        self.segment, self._steps_before = self.request, 0  # what is made of a longer video, and all its earlier steps
        self.output = Path(job["output"])
        self.picture = None if job["picture"] is None else Path(job["picture"])
        self.picture_name = Path(job["picture_name"] or "picture")
        self.is_cancelled = self.is_stopping = False
        self.preview = bool(setup["preview"]) and pipeline.latent_rgb is not None
        self._keep_seconds, self._last_kept = setup["keep_seconds"], time.monotonic()
        self._before: Tensor | None = None  # the latents that the step that runs began with
        self._next_preview = 0.0

    # What signals ask for.

    @property
    def is_denoising(self) -> bool:
        return self.pipeline.is_denoising

    @property
    def interrupt(self) -> bool:
        return self.is_stopping

    def stop(self) -> None:
        self.is_stopping = True
        self.pipeline.stop()

    # What is done.

    def run(self) -> None:
        """Make the output, or the rest of it. Raises as `Pipeline.generate` does, and Cancelled."""
        from kandinsky.pipelines.inputs import Inputs

        pictures = [] if self.picture is None else [media.load_image(self.picture)]
        names = [str(self.picture_name)] if pictures else []
        if self.extras.is_long:
            self._run_long(Media(pictures, names))
            return
        config = self.pipeline.config
        found, keyframes = given_media(config, self.request, self.extras, pictures, names, self.files)
        inputs = Inputs(**vars(found), keyframes=keyframes)
        make: Callable[[], Any] = functools.partial(
            self.pipeline.generate, self.request, inputs, self.output, False, None, self, True
        )
        make = self._rest() or make
        while True:
            try:
                make()
                break
            except resume.Stopped as stopped:
                if self.is_stopping:
                    raise
                # Kept for when the machine goes down; and on.
                self._before = None
                run = resume.load_run(stopped.path)
                make = functools.partial(self.pipeline.resume, run, self.output, False, self)
        discard(resume.stopped_path(self.output))

    def _run_long(self, first: Media) -> None:
        """Segment after segment; what was stopped or kept goes on with what is there."""
        image = None if self.picture is None else self.picture_name
        video = long_video(self.asked, self.request, self.extras, image, self.files)
        while True:
            try:
                make_long(self.pipeline, video, first, self.output, False, functools.partial(self._begin, video))
                return
            except resume.Stopped:
                if self.is_stopping:
                    raise
                self._before = None

    def _begin(self, video: LongVideo, number: int) -> Making:
        """What the steps of a segment are told to."""
        if self.is_cancelled:
            raise Cancelled
        self.segment, self._before = video.requests[number], None
        self._steps_before = sum(one.num_steps for one in video.requests[:number])
        return self

    def _rest(self) -> Callable[[], None] | None:
        # What is started from is no picture that the record names.
        name = None if self.picture is None or self.pipeline.config.task == "t2i" else self.picture_name
        try:
            return what_is_left(self.pipeline, self.request, name, self.output, False, self)
        except ValueError as error:
            logger.warning("%s is made from its beginning: %s", self.id, error)
            return None

    def __call__(self, pipeline: Pipeline, step: int, timestep: Tensor, tensors: Mapping[str, Any]) -> None:
        """The pipeline's callback, after each step."""
        if self.is_cancelled:
            raise Cancelled
        is_last = step + 1 == self.segment.num_steps
        done = self._steps_before + step + 1
        self.news(id=self.id, step=done, stage="decoding" if is_last else "denoising")
        now = time.monotonic()
        if self.preview and not is_last and now >= self._next_preview:
            self._show(step, tensors["latents"])
            self._next_preview = time.monotonic() + max(PREVIEW_SECONDS, PREVIEW_SHARE * (time.monotonic() - now))
        self._before = tensors["latents"] if self.preview else None
        if now - self._last_kept >= self._keep_seconds and not is_last:
            self._last_kept, pipeline.interrupt = now, True

    def _show(self, step: int, latents: Tensor) -> None:
        """Send what the latents would be without noise, by the straight line of the step: see preview.py."""
        if self._before is None or self.pipeline.latent_rgb is None:
            return
        import torch

        from kandinsky.sampling.sampler import flow_timesteps

        sigmas = flow_timesteps(self.segment.num_steps, self.segment.scheduler_scale)
        sigma, next_sigma = float(sigmas[step]), float(sigmas[step + 1])
        every = -(-latents.shape[1] // PREVIEW_FRAMES)
        clean = torch.lerp(self._before[0, ::every], latents[0, ::every], sigma / (sigma - next_sigma))
        frames = [media.to_pil(frame) for frame in self.pipeline.latent_rgb(clean).unbind(1)]
        buffer = io.BytesIO()
        more = {"save_all": True, "append_images": frames[1:], "duration": PREVIEW_MILLISECONDS, "loop": 0}
        frames[0].save(buffer, format="WEBP", quality=70, method=0, **(more if len(frames) > 1 else {}))
        self.news(id=self.id, preview=b64encode(buffer.getvalue()).decode())


class Worker:
    """A loaded pipeline, and the job that it makes."""

    def __init__(self, pipeline: Pipeline, setup: Mapping[str, Any], news: News, stopper: Stopper) -> None:
        self.pipeline, self.setup, self.news, self.stopper = pipeline, setup, news, stopper
        self.making: Making | None = None
        self.cancelled: set[str] = set()
        self._own = [(one["name"], one["scale"]) for one in pipeline.active_adapters()]  # the config's
        self._files: dict[str, tuple[str, float]] = {}  # of adapters that are loaded: path and time of change

    def cancel(self, job_id: str) -> None:
        """From another thread."""
        self.cancelled.add(job_id)
        making = self.making
        if making is not None and making.id == job_id:
            making.is_cancelled = True

    def work(self, job: Mapping[str, Any]) -> None:
        """Make a job, and tell how it ended. Raises KeyboardInterrupt where there is to be an end."""
        import torch

        from kandinsky.loading.assemble import with_magcache

        job_id = job["make"]
        self.news(id=job_id, stage="encoding")
        try:
            self._use_adapters(job["loras"])
            pipeline = with_magcache(self.pipeline, job["magcache"])
            self.making = self.stopper.pipeline = Making(pipeline, job, self.setup, self.news)
            if job_id in self.cancelled:
                raise Cancelled
            self.making.run()
            if job_id in self.cancelled:  # while it was decoded
                raise Cancelled
            seconds = read_json(media.sidecar_path(Path(job["output"])))["seconds"]
            self.news(id=job_id, outcome="done", seconds=seconds)
        except Cancelled:
            self.news(id=job_id, outcome="cancelled", error="it was cancelled", code="cancelled")
        except KeyboardInterrupt:
            self.news(id=job_id, outcome="kept")
            raise
        except Exception as error:
            self.news(id=job_id, outcome="failed", **why(error))
            torch.cuda.empty_cache()  # does nothing without a GPU
        finally:
            self.making = self.stopper.pipeline = None
            self.cancelled.discard(job_id)

    def _use_adapters(self, wanted: list[tuple[str, str, float]]) -> None:
        """Have a job's adapters active, or the config's where it names none."""
        active = [(one["name"], one["scale"]) for one in self.pipeline.active_adapters()]
        scales = [(f"lora:{name}", scale) for name, _, scale in wanted] or self._own
        for name, path, _ in wanted:
            file = path, changed_at(Path(path))
            if self._files.get(name) != file:
                self.pipeline.load_adapter(None, path, f"lora:{name}")
                self._files[name], active = file, []
        if scales != active:
            if scales:
                self.pipeline.set_adapter([name for name, _ in scales], [scale for _, scale in scales])
            elif self.pipeline.active_adapters():
                self.pipeline.disable_adapters()


def changed_at(path: Path) -> float:
    """When a file, or the last of a folder's, was changed."""
    return max((file.stat().st_mtime for file in path.iterdir()) if path.is_dir() else [path.stat().st_mtime])


def why(error: Exception) -> dict[str, str]:
    """Why a job failed, in one line. What no client can have caused is told in the log in full."""
    words = " ".join(str(error).split())
    if ran_out_of_memory(error):
        what = f" ({words})" if words else ""
        return {"error": f"out of memory: ask for something smaller or shorter{what}", "code": "out_of_memory"}
    if isinstance(error, ValueError):
        return {"error": words, "code": "invalid_request_error"}
    logger.error("a job failed", exc_info=error)
    return {
        "error": words if isinstance(error, OSError) else f"{type(error).__name__}: {words}",
        "code": "server_error",
    }


def load(setup: Mapping[str, Any], news: News) -> Pipeline:
    """The pipeline. Raises as `load_pipeline` does."""
    from kandinsky.loading.assemble import load_pipeline
    from kandinsky.loading.device_map import parse_device_map
    from kandinsky.loading.devices import machine_memory
    from kandinsky.outputs.preview import load_latent_rgb

    config = config_from_dict(setup["config"])
    machine = machine_memory(parse_device_map(setup["device"])["dit"])
    news(machine=vars(machine))
    request = None if setup["request"] is None else recorded_request(setup["request"], config)
    pipeline = load_pipeline(
        config,
        setup["device"],
        setup["cache_dir"],
        attention_engine=setup["attention_engine"],
        dtype=setup["dtype"],
        request=request,
    )
    if setup["preview"] and pipeline.latent_rgb is None:
        from kandinsky.planning.plan import weight_files

        vae = config.model.vae
        pipeline.latent_rgb = load_latent_rgb(weight_files(config, setup["cache_dir"])["vae"], vae.name)
    return pipeline


def main() -> None:
    """Until nobody gives orders any more."""
    # What libraries print must not come between the news.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    news, orders = News(out), sys.stdin.buffer
    logging.basicConfig(level=logging.INFO, format="worker: %(message)s", stream=sys.stderr)
    for library in ("httpx", "httpx2"):
        logging.getLogger(library).setLevel(logging.WARNING)
    setup = json.loads(orders.readline())
    stopper = Stopper(is_launched=True, is_first=False)
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    workers: list[Worker] = []

    def listen() -> None:
        for line in orders:
            order = json.loads(line)
            if "make" in order:
                jobs.put(order)
            else:
                for worker in workers:
                    worker.cancel(order["cancel"])
        os.kill(os.getpid(), signal.SIGTERM)

    with suppress(KeyboardInterrupt), stop_on_signals(stopper):
        threading.Thread(target=listen, daemon=True).start()
        try:
            workers.append(Worker(load(setup, news), setup, news, stopper))
        except (ValueError, OSError) as error:
            news(refused=" ".join(str(error).split()))
        else:
            news(ready=True)
            while True:
                workers[0].work(jobs.get())
    os._exit(0)  # the thread that listens can't be ended in any other way
