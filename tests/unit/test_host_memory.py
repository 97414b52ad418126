"""What this machine's memory comes to: installed, and within the limits of the groups that a process is in."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest

from kandinsky.common.host_memory import host_memory

UNLIMITED = 9223372036854771712  # what version 1 says where there is no limit


def memory_with(folder: Path, own: str, **limits: str) -> int:
    """Where /proc/self/cgroup is `own`, and files with a limit are below /sys/fs/cgroup."""
    (folder / "own").write_text(own)
    for path, words in limits.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(words)
    return host_memory(folder, folder / "own")


def test_memory_of_a_container(tmp_path: Path) -> None:
    installed = host_memory(tmp_path / "none", tmp_path / "none")
    assert installed > 2**28
    for words, expected in (("max\n", installed), (f"{2**27}\n", 2**27), (f"{2**60}\n", installed)):
        assert memory_with(tmp_path, "0::/\n", **{"memory.max": words}) == expected


def test_the_smallest_limit_of_the_groups_around_holds(tmp_path: Path) -> None:
    """As in a batch job, whose group is below that of its user."""
    limits = {"user/memory.max": f"{2**26}", "user/job/memory.max": f"{2**27}", "other/memory.max": "1"}
    assert memory_with(tmp_path, "0::/user/job\n", **limits) == 2**26
    # A container does not see its own group by the name that it has outside.
    assert memory_with(tmp_path, "0::/docker/a1b2\n", **{"memory.max": f"{2**25}"}) == 2**25


def test_limits_of_version_1(tmp_path: Path) -> None:
    own = "9:name=systemd:/x\n5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n"
    limits = {"memory/memory.limit_in_bytes": f"{UNLIMITED}", "cpu/job/memory.limit_in_bytes": "1"}
    installed = host_memory(tmp_path / "none", tmp_path / "none")
    assert memory_with(tmp_path, own, **limits) == installed
    assert memory_with(tmp_path, own, **{"memory/job/memory.limit_in_bytes": f"{2**27}"}) == 2**27


def test_memory_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no os.sysconf, Windows' own call is asked, with a structure of the size that it demands."""

    class Kernel:
        def GlobalMemoryStatusEx(self, reference: Any) -> int:
            status = ctypes.cast(reference, ctypes.POINTER(ctypes.c_uint8 * 64)).contents
            assert int.from_bytes(status[:4], "little") == 64
            status[8:16] = (3 * 2**30).to_bytes(8, "little")
            return 1

    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setattr(ctypes, "windll", type("Dlls", (), {"kernel32": Kernel()}), raising=False)
    assert host_memory(tmp_path / "none", tmp_path / "none") == 3 * 2**30
