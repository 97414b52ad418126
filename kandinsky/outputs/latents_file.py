"""Denoised latents on disk: written before they are decoded, so that hours of denoising survive a decode that fails.

A file is safetensors: `latents` (samples, T, H, W, C), scaled, float32, and as metadata one JSON record a sample, the
one that will stand beside its output. Knows no models: `python test.py --decode_latents FILE` goes on from it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky.checkpoints.headers import open_tensors, read_header
from kandinsky.common.writing import Kept, discard, flags_for, save_tensors, write_somewhere
from kandinsky.outputs import media
from kandinsky.outputs.records import check_outputs, read_record

if TYPE_CHECKING:
    from torch import Tensor


logger = logging.getLogger(__name__)


SUFFIX = ".latents.safetensors"
METADATA_KEY = "kandinsky5_records"


@dataclass(frozen=True)
class SavedLatents:
    latents: Tensor  # (samples, T, H, W, C), scaled, float32
    records: list[dict[str, Any]]  # of each sample what `Pipeline.describe` says


def latents_path(output: str | Path) -> Path:
    """Where the latents of an output lie: video.mp4 -> video.latents.safetensors."""
    return Path(output).with_suffix(SUFFIX)


def output_path(latents: str | Path, suffix: str) -> Path:
    """The way back: video.latents.safetensors -> video.mp4 for the suffix .mp4."""
    path = Path(latents)
    return path.with_name(path.name.removesuffix(SUFFIX) + suffix)


def save_latents(path: str | Path, latents: Tensor, records: Sequence[Mapping[str, Any]]) -> None:
    """Write them; replaces what is there. Raises WriteError."""
    text = json.dumps(list(records), ensure_ascii=True, default=str)
    save_tensors(path, {"latents": latents.float()}, {METADATA_KEY: text})


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a latents file. Raises ValueError where it is damaged or something else."""
    records = read_record(path, METADATA_KEY)
    if records is None or "latents" not in read_header(path):
        raise ValueError(f"{path} holds no latents of ours: give a file that ends in {SUFFIX}")
    return records


def checked_records(path: str | Path) -> list[dict[str, Any]]:
    """The same, of a file that `Pipeline.finish` can make its outputs from. Raises ValueError for others."""
    records = read_records(path)
    check_outputs(records, read_header(path), path)
    return records


def unfinished(folder: str | Path) -> list[Path]:
    """Latents files in a folder whose output isn't there: of runs that died, or that are decoding now."""
    files = sorted(Path(folder).glob(f"*{SUFFIX}"))
    suffixes = (media.VIDEO_SUFFIX, media.IMAGE_SUFFIX)
    return [path for path in files if not any(output_path(path, suffix).exists() for suffix in suffixes)]


def load_latents(path: str | Path) -> SavedLatents:
    """Latents and records of a file. Raises ValueError as `read_records` does, and for NaN in the latents."""
    from kandinsky.models.numerics import is_finite

    records = read_records(path)
    with open_tensors(path) as tensors:
        latents = tensors.get_tensor("latents")
    if not is_finite(latents):
        raise ValueError(f"{path}: there are NaN or infinite values in its latents: the run has to be repeated")
    return SavedLatents(latents, records)


@contextmanager
def on_disk(
    output: str | Path, latents: Tensor, records: Sequence[Mapping[str, Any]], keep: bool = False
) -> Iterator[None]:
    """The latents lie beside `output` until the body has succeeded, and after it where `keep` says so.

    Where they can't lie there, among temporary files. Where the body fails they stay, and a warning says how to go on;
    where it is interrupted, the Kept that is raised in place of KeyboardInterrupt does.
    """
    output, path = Path(output), kept(output, latents, records)
    try:
        yield
    except BaseException as error:
        if path is None or not path.exists():  # there may be room by now, or the folder is gone
            path = kept(output, latents, records)
        if path is None:
            raise
        message, flags = f"the denoised latents are kept in {path}", flags_for("--decode_latents", path, output)
        if isinstance(error, KeyboardInterrupt):
            raise Kept(message, path, flags) from None
        logger.warning("%s; what is left is done by: python test.py %s", message, flags)
        raise
    if path is not None and not keep:
        discard(path)


def kept(output: Path, latents: Tensor, records: Sequence[Mapping[str, Any]]) -> Path | None:
    """Where the latents are on disk now; None where there is no room for them, which a warning tells."""
    try:
        return write_somewhere(latents_path(output), lambda path: save_latents(path, latents, records))
    except OSError as error:
        # A full disk, most likely. The video may still fit, and giving up now would lose what this is here to save.
        logger.warning("the denoised latents could not be kept (%s); going on without", error)
        return None
