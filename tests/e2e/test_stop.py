"""Runs that are stopped from the keyboard, and go on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.faulty_runs import CONFIG, CTRL_C, REPOSITORY, SETTINGS, generate, run, undisturbed, visible
from tests.limits import PATIENCE


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return undisturbed(tmp_path_factory.mktemp("whole"))


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


# Runs test.py in a process whose first import of a module is a Ctrl-C.
EARLY = """
import os, runpy, signal, sys
_, module, *ignored = sys.argv
if ignored:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
class CtrlC:
    def find_spec(self, name, *_):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)
sys.modules.pop(module, None)
sys.meta_path.insert(0, CtrlC())
sys.argv = ["test.py", "--device", "banana", "--prompt", "x"]
try:
    runpy.run_path("test.py", run_name="__main__")
finally:
    import logging
    assert not logging.getLogger("torch._subclasses.fake_tensor").isEnabledFor(logging.INFO)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGINT")
@pytest.mark.parametrize(
    ("module", "is_ignored", "status", "says"),
    [
        ("argparse", False, 130, "interrupted"),
        ("kandinsky.commands.many", False, 130, "interrupted"),
        ("kandinsky.commands.many", True, 2, "error: 'banana' is not a device"),  # under nohup, for example
    ],
)
def test_stopped_before_there_is_anything_to_stop(module: str, is_ignored: bool, status: int, says: str) -> None:
    command = [sys.executable, "-c", EARLY, module, *["ignored"] * is_ignored]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == status and run.stderr.startswith(says) and len(run.stderr.splitlines()) == 1, run.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGINT")
def test_stopped_as_a_segment_is_decoded(tiny: Path, tmp_path: Path) -> None:
    """One way on is told, that of the whole."""
    words = [*SETTINGS, "--extend", "0.2", "--overlap", "1", "--output_filename", "a.mp4"]
    stopped = run(tmp_path, "--config", str(CONFIG), *words, stage="decode", fault=CTRL_C.format(at=1))
    assert stopped.returncode == 130, stopped.stderr
    assert stopped.stderr.count("python test.py") == 1 and "--resume\n" in stopped.stderr
    assert "--decode_latents" not in stopped.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGINT")
def test_stopped_twice_from_the_keyboard(tiny: Path, tmp_path: Path) -> None:
    """At once, and while there is no step to wait for as well."""
    impatient = CTRL_C.format(at=1).replace("== 1", "<= 2")
    for stage, fault in (("step", impatient), ("encode", CTRL_C.format(at=1))):
        stopped = generate(tmp_path, stage, fault)
        assert stopped.returncode == 130 and "interrupted; nothing was written" in stopped.stderr
        assert not visible(tmp_path)
