"""Runs that are killed, starved of memory or of disk: what was finished is still there, and there is a way on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.e2e.faulty_runs import CONFIG, SETTINGS, generate, run, undisturbed, visible


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return undisturbed(tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize(
    "stage", [*(pytest.param(stage, marks=pytest.mark.exhaustive) for stage in ("load", "denoise", "decode")), "write"]
)
def test_killed(stage: str, whole: bytes, tmp_path: Path) -> None:
    died = generate(tmp_path, stage)
    assert died.returncode == -signal.SIGKILL, died.stderr
    if stage not in ("decode", "write"):
        assert not visible(tmp_path)  # nothing was finished yet
        return
    assert visible(tmp_path) == {"a.latents.safetensors"}
    finished = run(tmp_path, "--decode_latents", "a.latents.safetensors")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "a.mp4"
    assert visible(tmp_path) == {"a.mp4", "a.json"}
    assert (tmp_path / "a.mp4").read_bytes() == whole


@pytest.mark.slow
def test_out_of_memory_while_decoding(whole: bytes, tmp_path: Path) -> None:
    died = generate(tmp_path, "decode", "import torch; raise torch.OutOfMemoryError('70 GiB')")
    assert died.returncode == 2
    assert "--decode_latents a.latents.safetensors" in died.stderr
    again = run(tmp_path, "--config", "no_such.yaml", "--decode_latents", "a.latents.safetensors", "--prompt", "other")
    assert again.returncode == 2 and "leave out --prompt" in again.stderr
    assert visible(tmp_path) == {"a.latents.safetensors"}
    # The next run in this folder says so as well, and doesn't touch it.
    other = run(tmp_path, "--config", str(CONFIG), *SETTINGS, "--output_filename", "b.mp4", "--device", "cuda:99")
    assert other.returncode == 2 and "--decode_latents a.latents.safetensors" in other.stderr


@pytest.mark.slow
def test_full_disk_while_writing(whole: bytes, tmp_path: Path) -> None:
    died = generate(tmp_path, "write", "return 3, 0.1")  # what ffmpeg leaves behind on a full disk: fewer frames
    assert died.returncode == 2 and "disk full" in died.stderr
    assert visible(tmp_path) == {"a.latents.safetensors"}
