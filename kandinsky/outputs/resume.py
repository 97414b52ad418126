"""A run that was stopped between two steps of denoising, on disk: everything that the next step needs.

A file is safetensors. Its tensors are the latents and the guidance's last difference, the conditioning, the embeddings
of every sample and branch, and a cache's residuals; its metadata is one JSON record with the request and the config.
Text encoders and the picture have done their part, so that resuming needs neither. Knows no models:
`python test.py --resume_from FILE` goes on from it, to the same bits on the same machine.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky.checkpoints.headers import open_tensors, read_header
from kandinsky.common.writing import Kept, flags_for, save_tensors
from kandinsky.outputs.records import ADVICE, check_stopped
from kandinsky.outputs.records import read_record as read_metadata

if TYPE_CHECKING:
    from torch import Tensor


from kandinsky.run_state import RunState

SUFFIX = ".stopped.safetensors"
METADATA_KEY = "kandinsky5_stopped"


class Stopped(Kept):
    """A run was stopped between two steps and lies in the file `path`. What stops a program that doesn't ask for it."""

    def __init__(self, path: Path, step: int, num_steps: int, output: str | Path) -> None:
        message = f"stopped after {step} of {num_steps} steps; what there is lies in {path}"
        super().__init__(message, path, flags_for("--resume_from", path, Path(output)))


def stopped_path(output: str | Path) -> Path:
    """Where the run of an output is kept: video.mp4 -> video.stopped.safetensors."""
    return Path(output).with_suffix(SUFFIX)


def output_path(stopped: str | Path, suffix: str) -> Path:
    """The way back: video.stopped.safetensors -> video.mp4 for the suffix .mp4."""
    path = Path(stopped)
    return path.with_name(path.name.removesuffix(SUFFIX) + suffix)


def save_run(path: str | Path, run: RunState, config: Mapping[str, Any], dtype: str) -> None:
    """Write a run; replaces what is there. dtype: the model's, by name. Raises WriteError."""
    tensors = {"latents": run.state.latents, "difference": run.state.difference}
    conditioning = run.conditioning
    tensors |= {"conditioning.noise": conditioning.noise, "conditioning.extra": conditioning.extra}
    for i, item in enumerate(conditioning.items):
        tensors |= {f"item.{i}.latents": item.latents, f"item.{i}.region": item.region}
    for branch, samples in run.branches.items():
        for i, text in enumerate(samples):
            tensors |= {f"text.{branch}.{i}.{name}": value for name, value in vars(text).items()}
    tensors |= {f"residual.{name}": value for name, value in run.residuals.items()}
    record = {
        "request": dataclasses.asdict(run.request),
        "config": dict(config),
        "dtype": dtype,
        "step": run.state.step,
        "branches": list(run.branches),
        "image_names": list(run.image_names),
        "items": [item.facts() for item in conditioning.items],
        "evaluations": run.evaluations,
        "skipped": run.skipped,
        "spared_blocks": run.spared_blocks,
        "attention_calls": run.attention_calls,
        "seconds": run.seconds,
        "adapters": run.adapters,
    }
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_tensors(path, given, {METADATA_KEY: json.dumps(record, default=str)})


def read_record(path: str | Path) -> dict[str, Any]:
    """What a file says about its run: request, config, dtype, step. All of it, and what tensors there are, is checked.

    Raises ValueError where it is no such file, damaged, or of another version.
    """
    record = read_metadata(path, METADATA_KEY)
    if record is None:
        raise ValueError(f"{path} holds no run that was stopped: give a file that ends in {SUFFIX}")
    check_stopped(record, read_header(path), path)
    return record


def load_run(path: str | Path) -> RunState:
    """The run of a file, its tensors on the CPU. Raises ValueError as `read_record` does, and for NaN in a tensor."""
    from kandinsky.models.numerics import is_finite
    from kandinsky.sampling.conditioning import Conditioning, Item
    from kandinsky.sampling.sampler import SamplerState, guided_steps
    from kandinsky.text.embeddings import TextEmbeddings

    record = read_record(path)
    request = check_stopped(record, read_header(path), path)
    with open_tensors(path) as file:
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in read_header(path)}
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise ValueError(f"{path}: there are NaN or infinite values in its {name}: the run has to be repeated")
    interval, every = request.guidance_interval, request.guidance_every
    left = guided_steps(request.num_steps, request.guidance_weight, interval, every, request.first_step)[
        record["step"] :
    ]
    if next((what for what in left if what != "off"), "off") == "kept" and "difference" not in tensors:
        raise ValueError(f"{path}: there is no difference in it, which its next guided step needs: {ADVICE}")

    def parts(prefix: str, kind: type) -> dict[str, Tensor | None]:
        return {each.name: tensors.get(f"{prefix}.{each.name}") for each in dataclasses.fields(kind)}

    texts = {
        branch: [TextEmbeddings(**parts(f"text.{branch}.{i}", TextEmbeddings)) for i in range(len(request.samples))]  # type: ignore[arg-type]
        for branch in record["branches"]
    }
    items = tuple(
        Item(
            latents=tensors[f"item.{i}.latents"],
            region=tensors.get(f"item.{i}.region"),
            **{name: value for name, value in facts.items() if name not in ("frames", "everywhere")},
        )
        for i, facts in enumerate(record["items"])
    )
    prefix = "residual."
    return RunState(
        request=request,
        conditioning=Conditioning(tensors["conditioning.noise"], tensors.get("conditioning.extra"), items),
        branches=texts,
        state=SamplerState(tensors["latents"], record["step"], tensors.get("difference")),
        residuals={name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)},
        image_names=tuple(record["image_names"]),
        evaluations=record["evaluations"],
        skipped=record["skipped"],
        spared_blocks=record["spared_blocks"],
        attention_calls=record["attention_calls"],
        seconds=record["seconds"],
        adapters=record["adapters"],
    )
