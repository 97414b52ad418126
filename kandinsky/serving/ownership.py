"""Whose a folder of outputs is: one server's, and that of the workers it has started, until the last of them is gone.

The lock is an open file's, which workers inherit. So a server that starts after one was killed waits until that one's
worker has kept what it was making.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from pathlib import Path

if os.name == "posix":
    import fcntl

logger = logging.getLogger(__name__)

LOCK = ".server.lock"
PAUSE = 0.2  # seconds between two looks


def own(folder: Path, seconds: float) -> int:
    """What holds the folder's lock, to be inherited by workers. Raises ValueError where others hold it for longer."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    end, has_told = time.monotonic() + seconds, False
    while os.name == "posix":
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                break  # a file system without locks
        if not has_told:
            logger.warning("%s is in use; waiting until the other server, or what it was making, has ended", folder)
            has_told = True
        if time.monotonic() >= end:
            os.close(handle)
            raise ValueError(f"another server works in {folder}: end it first, or name another --output_dir")
        time.sleep(PAUSE)
    return handle
