"""Runs that are killed, starved of memory or of disk: what was finished is still there, and there is a way on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs" / "config_tiny_t2v.yaml"
SETTINGS = ("--sample_steps", "2", "--video_duration", "0.3", "--seed", "1", "--prompt", "a red circle grows")

# Runs test.py as a person does, but for one function, which ends the process as the machine would.
FAULTY = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("cli", {cli!r})
cli = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cli)
sys.path.insert(0, os.path.dirname({cli!r}))
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
import {module} as module
calls = []
def fault(*args, **options):
    calls.append(args)
    {fault}
owner = {owner}
original = getattr(owner, {name!r})
setattr(owner, {name!r}, fault)
sys.exit(cli.main(sys.argv[1:]))
"""
CTRL_C = "os.kill(os.getpid(), signal.SIGINT) if len(calls) == {at} else None\n    return original(*args, **options)"
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
# stage -> (module, the object that has the function, the function)
STAGES = {
    "load": ("kandinsky.loading", "module", "load_vae"),
    "encode": ("kandinsky.pipelines.base", "module.Pipeline", "condition"),
    "denoise": ("kandinsky.pipelines.base", "module", "euler_sample"),
    "step": ("kandinsky.models.dit", "module.DiffusionTransformer3D", "forward"),
    "decode": ("kandinsky.pipelines.base", "module.Pipeline", "decode"),
    "write": ("imageio_ffmpeg", "module", "count_frames_and_secs"),
}


def run(folder: Path, *words: str, stage: str | None = None, fault: str = KILL) -> subprocess.CompletedProcess[str]:
    command = [str(REPOSITORY / "test.py")]
    if stage is not None:
        module, owner, name = STAGES[stage]
        code = FAULTY.format(cli=command[0], module=module, owner=owner, name=name, fault=fault)
        command = ["-c", code]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def generate(folder: Path, stage: str | None = None, fault: str = KILL) -> subprocess.CompletedProcess[str]:
    return run(folder, "--config", str(CONFIG), *SETTINGS, "--output_filename", "a.mp4", stage=stage, fault=fault)


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The video of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    done = generate(folder)
    assert done.returncode == 0, done.stderr
    assert visible(folder) == {"a.mp4", "a.json"}
    return (folder / "a.mp4").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "step"])
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
    other = run(tmp_path, "--config", str(CONFIG), *SETTINGS, "--output_filename", "b.mp4", "--device", "nonsense")
    assert other.returncode == 2 and "--decode_latents a.latents.safetensors" in other.stderr


@pytest.mark.slow
def test_full_disk_while_writing(whole: bytes, tmp_path: Path) -> None:
    died = generate(tmp_path, "write", "return 3, 0.1")  # what ffmpeg leaves behind on a full disk: fewer frames
    assert died.returncode == 2 and "disk full" in died.stderr
    assert visible(tmp_path) == {"a.latents.safetensors"}


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGINT")
def test_stopped_from_the_keyboard(whole: bytes, tmp_path: Path) -> None:
    stopped = generate(tmp_path, "step", CTRL_C.format(at=1))
    assert stopped.returncode == 130
    assert "stopping after this step" in stopped.stderr
    assert "stopped after 1 of 2 steps" in stopped.stderr and "--resume_from a.stopped.safetensors" in stopped.stderr
    assert visible(tmp_path) == {"a.stopped.safetensors"}
    again = run(tmp_path, "--resume_from", "a.stopped.safetensors", "--seed", "3")
    assert again.returncode == 2 and "leave out --seed" in again.stderr
    resumed = run(tmp_path, "--resume_from", "a.stopped.safetensors")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.strip() == "a.mp4"
    assert visible(tmp_path) == {"a.mp4", "a.json"}
    assert (tmp_path / "a.mp4").read_bytes() == whole


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGINT")
def test_stopped_twice_from_the_keyboard(tiny: Path, tmp_path: Path) -> None:
    """At once, and while there is no step to wait for as well."""
    impatient = CTRL_C.format(at=1).replace("== 1", "<= 2")
    for stage, fault in (("step", impatient), ("encode", CTRL_C.format(at=1))):
        stopped = generate(tmp_path, stage, fault)
        assert stopped.returncode == 130 and "interrupted; nothing was written" in stopped.stderr
        assert not visible(tmp_path)
