"""What an earlier run has left of an output before its end, and whether it is of the same wishes.

Two kinds of files lie beside an output that is not there yet: the latents of a run that ended while it decoded them
(outputs/latents_file.py), and the steps of one that was stopped while denoising (outputs/resume.py). Knows pipelines by
their calls only.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky.common.writing import discard
from kandinsky.config.reading import config_to_dict
from kandinsky.outputs import latents_file, resume
from kandinsky.request import Request

if TYPE_CHECKING:
    from kandinsky.pipelines.base import Pipeline
    from kandinsky.pipelines.parts import StepCallback


logger = logging.getLogger(__name__)
OF_SAMPLES = ("text", "negative_caption", "seed")


def what_is_left(
    pipeline: Pipeline,
    request: Request,
    image: Path | None,
    output: Path,
    progress: bool = True,
    callback: StepCallback | None = None,
) -> Callable[[], Any] | None:
    """What makes the rest of an output of one sample and returns it, where an earlier run has left latents or steps of
    it. `callback` is for the steps that are left (see `Pipeline.resume`).

    None where there are none, or only of other wishes or settings; such files stay where they are. Raises ValueError
    where a file is damaged.
    """
    latents, stopped = latents_file.latents_path(output), resume.stopped_path(output)
    wanted = _wanted(pipeline, request, image)
    if latents.exists() and _of_latents(latents_file.checked_records(latents)[0], wanted):
        return partial(_finish, pipeline, latents, output)
    if stopped.exists():
        if _of_run(resume.read_record(stopped), wanted):
            return partial(_go_on, pipeline, stopped, output, progress, callback)
        logger.warning(
            "%s was stopped with other wishes or settings and stays where it is: %s is made from its beginning",
            stopped,
            output.name,
        )
    return None


def _finish(pipeline: Pipeline, latents: Path, output: Path) -> Any:
    made = pipeline.finish(latents_file.load_latents(latents), output)
    if not pipeline.config.runtime.save_latents:
        discard(latents)
    discard(resume.stopped_path(output))  # of the same output, and earlier
    return made


def _go_on(pipeline: Pipeline, stopped: Path, output: Path, progress: bool, callback: StepCallback | None) -> Any:
    made = pipeline.resume(resume.load_run(stopped), output, progress, callback)
    discard(stopped)
    return made


def _wanted(pipeline: Pipeline, request: Request, image: Path | None) -> dict[str, Any]:
    """All that an output's pixels depend on, as JSON has it."""
    facts = dataclasses.asdict(request)
    (sample,) = facts.pop("samples")
    facts |= {name: sample[name] for name in OF_SAMPLES}
    facts |= {"image": None if image is None else str(image), "dtype": pipeline.dtype_name}
    facts["config"] = without_runtime(config_to_dict(pipeline.config))
    found = json.loads(json.dumps(facts, default=str))
    assert isinstance(found, dict)
    return found


def without_runtime(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a run fast or small makes no difference."""
    return {name: value for name, value in config.items() if name != "runtime"}


def _of_latents(record: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    found = {**record, "text": record["prompt"], "negative_caption": record["negative_prompt"]}
    found["config"] = without_runtime(record["config"])
    return {name: found.get(name) for name in wanted} == wanted


def _of_run(record: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    (sample,), names = record["request"]["samples"], record["image_names"]
    found = {**record["request"], **{name: sample[name] for name in OF_SAMPLES}, "dtype": record["dtype"]}
    found["image"] = names[0] if names else None
    found["config"] = without_runtime(record["config"])
    return {name: found.get(name) for name in wanted} == wanted
