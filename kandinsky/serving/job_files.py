"""Where the files of a job lie in the folder of outputs: what it is given, what comes of it, and what is kept of it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from kandinsky.common.writing import discard
from kandinsky.outputs import latents_file, media, resume
from kandinsky.serving import segments
from kandinsky.serving.store import Job

PICTURES = "pictures"  # the folder of what jobs begin with
LONGEST_SUFFIX = 10  # characters of a name that a client gave


def picture_path(folder: Path, job: Job) -> Path:
    """Of the picture that it begins with, as a PNG."""
    return folder / PICTURES / f"{job.id}.png"


def given_files(folder: Path, job: Job) -> dict[str, list[tuple[Path, str]]]:
    """By field, the other files that it is given, as they came, and what its client calls them."""
    found: dict[str, list[tuple[Path, str]]] = {}
    for field, name in job.extras.get("files", []):
        before, suffix = found.setdefault(field, []), Path(name).suffix
        suffix = suffix if suffix[1:].isalnum() and suffix.isascii() and len(suffix) <= LONGEST_SUFFIX else ""
        before.append((folder / PICTURES / f"{job.id}.{field}{len(before)}{suffix}", name))
    return found


def inputs_of(folder: Path, job: Job) -> list[Path]:
    return [picture_path(folder, job), *(path for given in given_files(folder, job).values() for path, _ in given)]


def files_of(folder: Path, job: Job) -> list[Path]:
    """All that may lie there of a job, but for its segments."""
    output = folder / job.file_name
    return [
        *(output, media.sidecar_path(output), media.preview_path(output), output.with_suffix(".thumbnail.webp")),
        *(latents_file.latents_path(output), resume.stopped_path(output), *inputs_of(folder, job)),
    ]


def discard_files(folder: Path, job: Job, kept: Sequence[Path] = ()) -> None:
    """Remove them, but for `kept`, and its segments."""
    for path in files_of(folder, job):
        if path not in kept:
            discard(path)
    shutil.rmtree(segments.folder_of(folder / job.file_name), ignore_errors=True)
