"""Runs of test.py in a process of its own, in which one function fails as the machine would have it fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.limits import PATIENCE

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs" / "config_tiny_t2v.yaml"
SETTINGS = ("--sample_steps", "2", "--video_duration", "0.3", "--seed", "1", "--prompt", "a red circle grows")

# Runs test.py as a person does, but for one function, which ends the process as the machine would.
FAULTY = """
import importlib.util, os, signal, sys
sys.path.insert(0, os.path.dirname({cli!r}))
spec = importlib.util.spec_from_file_location("cli", {cli!r})
cli = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cli)
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
    "load": ("kandinsky.loading.assemble", "module", "load_vae"),
    "encode": ("kandinsky.pipelines.base", "module.Pipeline", "condition"),
    "denoise": ("kandinsky.pipelines.denoise", "module", "euler_sample"),
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
        [sys.executable, *command, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def generate(folder: Path, stage: str | None = None, fault: str = KILL) -> subprocess.CompletedProcess[str]:
    return run(folder, "--config", str(CONFIG), *SETTINGS, "--output_filename", "a.mp4", stage=stage, fault=fault)


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def undisturbed(folder: Path) -> bytes:
    """The video of a run that nothing happens to."""
    done = generate(folder)
    assert done.returncode == 0, done.stderr
    assert visible(folder) == {"a.mp4", "a.json"}
    return (folder / "a.mp4").read_bytes()
