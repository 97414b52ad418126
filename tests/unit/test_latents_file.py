"""Latents on disk: what is written comes back, what is damaged is refused, what fails keeps them."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kandinsky.common.writing import Kept
from kandinsky.outputs import latents_file

LATENTS = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
RECORDS = [{"prompt": "a cat – “ü”", "seed": 1}, {"prompt": "two", "seed": 2}]


def test_round_trip(tmp_path: Path) -> None:
    path = latents_file.latents_path(tmp_path / "a video.mp4")
    latents_file.save_latents(path, LATENTS, RECORDS)
    saved = latents_file.load_latents(path)
    assert torch.equal(saved.latents, LATENTS) and saved.records == RECORDS
    assert latents_file.output_path(path, ".mp4") == tmp_path / "a video.mp4"
    assert [file.name for file in tmp_path.iterdir()] == ["a video.latents.safetensors"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "weights.safetensors"
    save_file({"latents": LATENTS}, other)
    with pytest.raises(ValueError, match=r"holds no latents of ours"):
        latents_file.load_latents(other)
    path = tmp_path / "x.latents.safetensors"
    latents_file.save_latents(path, LATENTS, RECORDS)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated"):
        latents_file.load_latents(path)
    with pytest.raises(ValueError, match="no such file"):
        latents_file.load_latents(tmp_path / "none.latents.safetensors")


@pytest.mark.parametrize("keep", [False, True])
def test_gone_after_success_unless_kept(tmp_path: Path, keep: bool) -> None:
    output = tmp_path / "x.mp4"
    with latents_file.on_disk(output, LATENTS, RECORDS, keep):
        assert torch.equal(latents_file.load_latents(latents_file.latents_path(output)).latents, LATENTS)
    assert latents_file.latents_path(output).exists() == keep


@pytest.mark.parametrize("error", [RuntimeError("decode died"), KeyboardInterrupt()])
def test_kept_after_a_failure_with_the_way_on(
    tmp_path: Path, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "a video.mp4"
    with pytest.raises(type(error)) as raised, latents_file.on_disk(output, LATENTS, RECORDS):
        raise error
    path = latents_file.latents_path(output)
    assert torch.equal(latents_file.load_latents(path).latents, LATENTS)
    # Once: whoever hears of an interruption says so himself, and may know a better way on.
    told = raised.value.flags if isinstance(raised.value, Kept) else caplog.text
    assert f"--decode_latents '{path}'" in told and (isinstance(raised.value, Kept) != bool(caplog.text))


def test_a_full_disk_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(latents_file, "save_latents", full)
    done = []
    with caplog.at_level(logging.WARNING), latents_file.on_disk(tmp_path / "x.mp4", LATENTS, RECORDS):
        done.append(True)
    assert done and "No space left" in caplog.text
