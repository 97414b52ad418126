"""Many prompts: a file of them in, an output for each, one after the other, over ranks, or on Ray Data.

Three steps: `read_prompts` reads rows, `resolve_jobs` checks all of them and leaves nothing open, and `run_in_turn` or
`run_on_ray` makes the outputs. A row's seed, its output's name and the rank that makes it follow from the file and the
flags alone, and not from what there is already or who runs. So a run that died is simply started again, and what it
had made is left out.

Knows pipelines only by what they can be called for, and no devices. Has no queue, lock or scheduler of its own:
processes are started and ended by torchrun, which takes a share each, or actors by Ray, which hands rows out and hands
them out again where an actor or a machine dies.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky.clips import Clip
from kandinsky.common.out_of_memory import of_the_host, ran_out_of_memory
from kandinsky.config.schema import Config
from kandinsky.keyframes import keyframe_words, read_keyframes
from kandinsky.outputs import media
from kandinsky.outputs.sources import open_source, read_mask, read_source
from kandinsky.pictures import check_is_path
from kandinsky.request import MAX_SEED, Request, resolve_request
from kandinsky.serving.prompts_file import Row, RowMistakes
from kandinsky.serving.prompts_file import read_prompts as read_prompts
from kandinsky.serving.unfinished import what_is_left

if TYPE_CHECKING:
    from kandinsky.pipelines.base import Pipeline
    from kandinsky.pipelines.inputs import Inputs
    from kandinsky.text.embeddings import TextEmbeddings


logger = logging.getLogger(__name__)


PROMPTS_AT_ONCE = 64  # are encoded before the first of them is denoised: 130 MB of embeddings
ATTEMPTS = 3  # at a prompt on Ray whose actor dies, before it counts as failed
FOREVER = timedelta(days=365)  # ranks finish hours apart


@dataclass(frozen=True)
class Job:
    """A row with nothing left open."""

    row: Row
    request: Request  # of one sample
    image: Path | None
    output: Path
    clip: Clip | None = None  # to start from
    mask: Path | None = None
    last_image: Path | None = None
    keyframes: tuple[tuple[float, Path], ...] = ()  # seconds and pictures


@dataclass(frozen=True)
class Outcome:
    job: Job
    error: str | None = None  # why there is no output; None: there is one

    def __str__(self) -> str:
        prompt = " ".join(self.job.row.values["prompt"].split())
        shortened = prompt if len(prompt) <= 60 else f"{prompt[:57]}..."
        return f'{self.job.row} "{shortened}": {self.error or self.job.output}'


# --------------------------------------------------------------------------------------------------------------- plans


def resolve_jobs(
    config: Config,
    path: Path,
    rows: Sequence[Row],
    folder: Path,
    *,
    image: Path | None = None,
    seed: int | None = None,
    job_of: dict[str, Job] | None = None,
    **wishes: Any,
) -> list[Job]:
    """What each row comes to, all of them checked; makes the folders of the outputs.

    Args:
        path: of the file; pictures that rows name are looked for beside it.
        folder: where outputs go. A row may name a path in it, and none outside of it.
        image: for the rows that name none.
        seed: of the first row that says nothing else; later rows count up from it. None: from the row's number and
            words, so that the same file gives the same outputs.
        job_of: earlier rows by their outputs' names, of which no row may take one; these rows are added.
        wishes: of all rows, those of `resolve_request`; a row's own values stand over them.

    Raises RowMistakes with everything that is wrong in any row.
    """
    sizes: dict[Path, tuple[int, int]] = {}
    jobs: list[Job] = []
    mistakes: dict[int, str] = {}  # by row
    job_of = {} if job_of is None else job_of
    for row in rows:
        try:
            job = _plan(config, path.parent, row, folder, image, seed, wishes, sizes)
            if (other := job_of.setdefault(name_on_any_disk(job.output), job)) is not job:
                same = "is that" if other.output == job.output else f"and {other.output} are one file, or share one,"
                raise ValueError(f"its output {job.output} {same} of {other.row} as well: give each its own")
            jobs.append(job)
        except ValueError as error:
            mistakes[row.number] = str(error)
    if not mistakes:  # now there may be folders
        for job in jobs:
            try:
                media.check_writable(job.output, suffix_of(job.request))
            except ValueError as error:
                mistakes[job.row.number] = str(error)
    if len(mistakes) == len(rows) > 1 and len(set(mistakes.values())) == 1:  # what is wrong for all is no row's mistake
        raise ValueError(mistakes[1])
    if mistakes:
        raise RowMistakes([f"{path}, {row}: {mistakes[row.number]}" for row in rows if row.number in mistakes])
    return jobs


def _plan(
    config: Config,
    images_folder: Path,
    row: Row,
    folder: Path,
    image: Path | None,
    seed: int | None,
    wishes: Mapping[str, Any],
    sizes: dict[Path, tuple[int, int]],
) -> Job:
    values = dict(row.values)
    prompt = values.pop("prompt", "")
    name = values.pop("output", None)
    files: dict[str, Path] = {}
    for kind in ("image", "video", "mask", "last_image"):
        if kind in values:
            check_is_path(values[kind])
            files[kind] = (images_folder / values.pop(kind)).absolute()
    image = files.get("image", None if image is None else image.absolute())
    if image is not None and image not in sizes:
        sizes[image] = media.load_image(image).size
    words = [word.strip() for word in values.pop("keyframe", "").split("|") if word.strip()]
    keyframes = tuple((seconds, images_folder.absolute() / name) for seconds, name in keyframe_words(words))
    if "seed" not in values:
        values["seed"] = seed_of(row.number, prompt) if seed is None else seed_after(seed, row.number - 1)
    if "negative_prompt" in values:
        values["negative_caption"] = values.pop("negative_prompt")
    if "seconds" in values:
        values["time_length"] = values.pop("seconds")
    values = {**wishes, **values}
    clip, mask = None, files.get("mask")
    if "video" in files:
        clip = open_source(config, files["video"], values.get("time_length"), values.get("num_frames"))
    request = resolve_request(
        config,
        prompt,
        image_sizes=[] if image is None else [sizes[image]],
        clip=None if clip is None else (*clip.size, clip.frames),
        mask=mask is not None,
        **values,
    )
    if mask is not None:
        read_mask(request, mask)  # what is wrong with it is to be told now
    read_keyframes(config, request.num_frames, files.get("last_image"), request.loop, keyframes)
    stem = f"{row.number:04d}_{media.output_stem(prompt, values['seed'])}"
    output = Path(os.path.normpath(folder / (name or stem + suffix_of(request))))
    if not output.is_relative_to(os.path.normpath(folder)):
        raise ValueError(f"its output {output} is outside of {folder}: name a file in it, or another --output_dir")
    return Job(row, request, image, output, clip, mask, files.get("last_image"), keyframes)


def name_on_any_disk(output: Path) -> str:
    """The same for two paths that are one file on some disk, or whose records would be: links, case, accents."""
    path = unicodedata.normalize("NFC", os.path.realpath(output.with_suffix("")))
    return unicodedata.normalize("NFC", path.casefold())


def seed_of(number: int, prompt: str) -> int:
    """The seed of a row that nobody gave one: another one for every row, the same in every run."""
    words = f"{number} {prompt}".encode(errors="backslashreplace")
    return int.from_bytes(hashlib.sha256(words).digest()[:4], "big")


def seed_after(seed: int, steps: int) -> int:
    """The seed that many further on, from the largest on to 0. One that is no seed is left for the check to find."""
    return (seed + steps) % (MAX_SEED + 1) if 0 <= seed <= MAX_SEED else seed


def suffix_of(request: Request) -> str:
    return media.IMAGE_SUFFIX if request.is_image else media.VIDEO_SUFFIX


def left_to_do(jobs: Sequence[Job], resume: bool) -> list[Job]:
    """The jobs whose outputs aren't there. Raises ValueError where some are and nobody said to `resume`."""
    todo = [job for job in jobs if not job.output.exists()]
    if done := len(jobs) - len(todo):
        if not resume:
            example = next(job.output for job in jobs if job.output.exists())
            raise ValueError(
                f"{done} of {len(jobs)} outputs are there already, like {example}: --resume makes the others; "
                "to make all of them again, name another --output_dir"
            )
        logger.info("%d of %d outputs are there already", done, len(jobs))
    return todo


# --------------------------------------------------------------------------------------------------- one after another


def run_in_turn(
    pipeline: Pipeline, jobs: Sequence[Job], progress: bool = True, resume: bool = False
) -> Iterator[Outcome]:
    """Make the outputs, and tell of each when it is there or has failed. A failure costs one output, never the others.

    `PROMPTS_AT_ONCE` prompts are encoded before the first of them is denoised: an offloaded text encoder is loaded once
    for all of them, and the first output of a long file doesn't wait for its end. Their embeddings wait in host memory,
    about 2 MB a prompt. Where it is interrupted, the running output's steps are kept (see `Pipeline.generate`), and
    `resume` goes on with them.
    """
    negatives: dict[object, TextEmbeddings] = {}
    for first in range(0, len(jobs), PROMPTS_AT_ONCE):
        window = jobs[first : first + PROMPTS_AT_ONCE]
        yield from _run_window(pipeline, window, (first, len(jobs)), negatives, progress, resume)


def _run_window(
    pipeline: Pipeline,
    jobs: Sequence[Job],
    place: tuple[int, int],
    negatives: dict[object, TextEmbeddings],
    progress: bool,
    resume: bool,
) -> Iterator[Outcome]:
    """Encode these jobs, then make them; `place` is how many came before and how many there are in all."""
    encoded: dict[int, tuple[Request, Inputs]] = {}
    before, total = place
    begun = {job.row.number: rest for job in jobs if resume and (rest := _begun(pipeline, job, progress))}
    with pipeline.placement.use("text_embedder"):
        for job in jobs:
            if job.row.number in begun:
                continue
            try:
                encoded[job.row.number] = _encode(pipeline, job, negatives)
            except Exception as error:
                yield Outcome(job, _reason(error))
    for position, job in enumerate(jobs, before + 1):
        if job.row.number not in encoded and job.row.number not in begun:
            continue
        logger.info("%d of %d, %s: %s", position, total, job.row, job.request.samples[0].text)
        try:
            if job.row.number in begun:
                begun[job.row.number]()
            else:
                request, inputs = encoded.pop(job.row.number)
                inputs = replace(inputs, **_media(pipeline, job))
                pipeline.generate(request, inputs, job.output, progress, keep_stopped=True)
        except Exception as error:
            yield Outcome(job, _reason(error))
        else:
            yield Outcome(job)


def _begun(pipeline: Pipeline, job: Job, progress: bool) -> Callable[[], None] | None:
    # A record doesn't name all of these files: another row's steps might go on.
    if _starts_from_source(pipeline, job) or job.last_image is not None or job.keyframes:
        return None
    try:
        return what_is_left(pipeline, job.request, job.image, job.output, progress)
    except ValueError as error:
        logger.warning("%s is made from its beginning: %s", job.row, error)
        return None


def _encode(pipeline: Pipeline, job: Job, negatives: dict[object, TextEmbeddings]) -> tuple[Request, Inputs]:
    """What the pipeline takes, with embeddings in place of words and without the picture."""
    import torch

    from kandinsky.pipelines.inputs import Inputs

    request, images = job.request, [] if _starts_from_source(pipeline, job) else _images(job)
    # The same negative prompt is encoded once, where the text encoder sees no picture beside it.
    picture = (job.image, request.width, request.height) if pipeline.config.task == "i2i" else None
    key = (request.samples[0].negative_caption, picture)
    inputs = Inputs(images, [str(job.image)] if images else [], negative_prompt_embeds=negatives.get(key))
    fitted = [media.fit_image(image, request.width, request.height) for image in images]
    request = pipeline.expand_prompts(request, fitted)
    with torch.no_grad():
        branches = pipeline.encode_prompts(request, inputs, fitted)
    embeds = {branch: texts[0].to("cpu") for branch, texts in branches.items()}
    if "uncond" in embeds:
        negatives[key] = embeds["uncond"]
    return request, replace(
        inputs, images=(), prompt_embeds=embeds["cond"], negative_prompt_embeds=embeds.get("uncond")
    )


def _images(job: Job) -> list[Any]:
    return [] if job.image is None else [media.load_image(job.image)]


def _starts_from_source(pipeline: Pipeline, job: Job) -> bool:
    return job.clip is not None or (job.image is not None and pipeline.config.task == "t2i")


def _media(pipeline: Pipeline, job: Job) -> dict[str, Any]:
    """Fields of `Inputs`: the pictures, or what is started from in their place."""
    images = _images(job)
    if not _starts_from_source(pipeline, job):
        given = job.last_image, job.request.loop, job.keyframes
        return {"images": images, "keyframes": read_keyframes(pipeline.config, job.request.num_frames, *given)}
    mask = None if job.mask is None else read_mask(job.request, job.mask)
    name = str(job.image if job.clip is None else job.clip.path)
    return {"source": read_source(job.request, job.clip, images), "source_name": name, "mask": mask}


def _reason(error: Exception) -> str:
    """Why a prompt failed, in one line. What no user can have caused is told in the log in full."""
    name, words = type(error).__name__, " ".join(str(error).split())
    if ran_out_of_memory(error):
        return f"out of {'host' if of_the_host(error) else 'GPU'} memory"
    if isinstance(error, ValueError | OSError):
        return words
    logger.error("a prompt failed unexpectedly", exc_info=error)
    return f"{name}: {words}"


# --------------------------------------------------------------------------------------------------------- over ranks


def failures_of_all_ranks(failed: Sequence[str]) -> list[str]:
    """On rank 0 of torchrun all ranks' failures, in rank order, once the last one is done; elsewhere none, at once.

    torchrun ends all processes as soon as one reports an error. So only rank 0 may do that, and only at the end.
    Outside of torchrun every process speaks for itself: its own failures.
    """
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if not dist.is_torchelastic_launched():
        return list(failed)
    store, rank, world_size = next(iter(rendezvous("env://", timeout=FOREVER)))
    store.set(f"failed_prompts/{rank}", json.dumps(list(failed)))
    if rank != 0:
        return []
    return [line for rank in range(world_size) for line in json.loads(store.get(f"failed_prompts/{rank}"))]


# ------------------------------------------------------------------------------------------------------------- on Ray


class Maker:
    """An actor of Ray Data: a loaded pipeline, which makes the outputs of the rows it is given."""

    def __init__(self, load: Callable[[], Pipeline], jobs: Sequence[Job], resume: bool = False) -> None:
        self.jobs, self.resume = jobs, resume
        self.pipeline: Pipeline | None = None
        try:
            self.pipeline = load()
        except (ValueError, OSError) as error:  # what a user can mend is told by the first row, in one line
            self.refusal = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """For "index" of some jobs, their "error" (empty: the output is there), or why no pipeline could be loaded."""
        indices = list(batch["index"])
        if self.pipeline is None:
            return {"index": indices, "error": [""] * len(indices), "refusal": [self.refusal] * len(indices)}
        jobs = [self.jobs[index] for index in indices]
        # An actor may have died after the output was there and before anybody heard of it.
        outcomes = run_in_turn(self.pipeline, [job for job in jobs if not job.output.exists()], False, self.resume)
        errors = {outcome.job.row.number: outcome.error for outcome in outcomes}
        errors_by_job = [errors.get(job.row.number) or "" for job in jobs]
        return {"index": indices, "error": errors_by_job, "refusal": [""] * len(indices)}


def run_on_ray(
    load: Callable[[], Pipeline],
    jobs: Sequence[Job],
    address: str,
    actors: int | None = None,
    resume: bool = False,
    use_gpus: bool = True,
    gpus_each: int = 1,
) -> Iterator[Outcome]:
    """Make the outputs on a Ray cluster; tells of each in the order in which they end.

    Every actor loads a pipeline and has `gpus_each` GPUs to itself where the cluster has any. Ray restarts actors that
    die, on other machines where it must, and gives their rows out again, `ATTEMPTS` times. A row is a task: an
    offloaded text encoder is loaded for each.

    Args:
        load: called in each actor. It must find code and weights there, and the outputs' folder is the same on all
            machines.
        address: "local" starts a Ray of our own, "auto" finds the cluster that this machine belongs to; or any other
            address of `ray.init`.
        actors: None takes one for each GPU, or group of them, that the cluster has now, or one where it has none.

    Raises ValueError where Ray is not installed, its machines lack this code or no pipeline could be loaded,
    ConnectionError without a cluster.
    """
    try:
        import ray
        from ray.data import ActorPoolStrategy, DataContext
        from ray.util.annotations import RayDeprecationWarning
    except ImportError:
        raise ValueError("--ray_address needs Ray Data: pip install 'ray[data]'") from None

    ray.init(address=address)
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0)) if use_gpus else 0
        # A prompt whose actor died in every attempt is dropped, and missing at the end; the others go on.
        DataContext.get_current().max_errored_blocks = len(jobs)
        rows = ray.data.from_items([{"index": index} for index in range(len(jobs))], override_num_blocks=len(jobs))
        with warnings.catch_warnings():
            # Ray 2.64 takes its last two arguments away: attempts are unlimited then, which is what it warns of.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            made = rows.map_batches(
                Maker,
                fn_constructor_args=(load, jobs, resume),
                batch_size=1,
                # One at a time, so that the death of an actor is an attempt at one row and not at those behind it.
                compute=ActorPoolStrategy(size=actors or max(gpus // gpus_each, 1), max_tasks_in_flight_per_actor=1),
                num_gpus=gpus_each if gpus else 0,
                max_restarts=-1,
                max_task_retries=ATTEMPTS - 1,
            )
        missing = dict(enumerate(jobs))
        for row in made.iter_rows():
            if row["refusal"]:
                raise ValueError(row["refusal"])
            yield Outcome(missing.pop(row["index"]), row["error"] or None)
        for job in missing.values():
            yield Outcome(job, f"its actor died {ATTEMPTS} times")
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"Ray at {address!r} could not make the outputs: {reason}. Its machines need this code under the same path"
        ) from error
    finally:
        ray.shutdown()
