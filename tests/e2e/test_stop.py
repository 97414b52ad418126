"""Runs that are stopped from the keyboard, and go on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.faulty_runs import CTRL_C, generate, run, undisturbed, visible


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


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGINT")
def test_stopped_twice_from_the_keyboard(tiny: Path, tmp_path: Path) -> None:
    """At once, and while there is no step to wait for as well."""
    impatient = CTRL_C.format(at=1).replace("== 1", "<= 2")
    for stage, fault in (("step", impatient), ("encode", CTRL_C.format(at=1))):
        stopped = generate(tmp_path, stage, fault)
        assert stopped.returncode == 130 and "interrupted; nothing was written" in stopped.stderr
        assert not visible(tmp_path)
