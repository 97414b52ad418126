"""How much memory this machine has for us: what is installed, or less where a container or a job may not use it all.

Linux limits groups of processes (cgroups): https://docs.kernel.org/admin-guide/cgroup-v2.html, `memory.max`, and of
version 1 `memory.limit_in_bytes`. A limit of a group above ours holds for us, too.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def host_memory(groups: Path = GROUPS, own_groups: Path = OWN_GROUPS) -> int:
    """Bytes of this machine's memory, or of what its container may use of it."""
    return min([_installed(), *_limits(groups, own_groups)])


def _limits(groups: Path, own_groups: Path) -> Iterator[int]:
    """Of the groups that this process is in, and of those around them."""
    try:
        lines = own_groups.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers == "":
            folder, name = groups, "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = groups / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(own.lstrip("/"))
        for each in (group, *group.parents):
            try:
                limit = (folder / each / name).read_text(encoding="utf-8").strip()
            except OSError:  # a group that is not to be seen from inside a container, or one without a limit
                continue
            if limit.isdecimal():  # and not "max"
                yield int(limit)


def _installed() -> int:
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined, unused-ignore]
    if not kernel.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("Windows does not say how much memory there is")
    return int(status.installed)


class _MemoryStatus(ctypes.Structure):
    """Windows' MEMORYSTATUSEX."""

    _fields_ = [
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("installed", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 6),
    ]
