"""Writing files so that nothing is lost: under their names they are whole or not there, whatever happens meanwhile.

Everything that this package writes goes through `atomic_path`: into a hidden file beside the target, which is brought
to the disk and then takes the target's name. Whatever goes wrong with that (a full disk, a quota, a folder that may not
be written to or is gone) is one `WriteError` with one line, and what was there before is still there.

A hidden file is locked by the process that writes it, and the system drops a lock together with its process. That tells
`remove_leftovers` the files of the dead from those of the living, also of other containers and machines that share a
disk, which process numbers would not. Windows has no such locks: there leftovers stay.

Knows nothing of pictures, models or runs.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


logger = logging.getLogger(__name__)


if os.name == "posix":
    import fcntl

HIDDEN = re.compile(r"\.[0-9a-f]{16}\.tmp(\..*)?")  # what hidden files are called
NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # of file systems that can't be told to
ELSEWHERE = "kandinsky5-"  # what folders for temporary files are called, and something at random
ALIGNMENT = 64  # bytes: what the tensors of a file begin at a multiple of
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


class WriteError(OSError):
    """Something could not be written; the message is one line with the file and the reason."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"can't write {path}: {error.strerror or ' '.join(str(error).split())}")
        self.errno, self.strerror = error.errno, error.strerror

    def __str__(self) -> str:
        return str(self.args[0])


class Kept(KeyboardInterrupt):
    """A run was interrupted, and what there is of it lies in the file `path`; `flags` of test.py go on from there."""

    def __init__(self, message: str, path: Path, flags: str) -> None:
        super().__init__(message)
        self.path, self.flags = path, flags


def flags_for(flag: str, path: Path, output: Path) -> str:
    """What test.py is to be called with to go on with what is kept in `path`, to the output that it was for."""
    words = [flag, str(path)]
    if path.parent != output.parent:  # otherwise the output's name follows from that of what is kept
        words += ["--output_filename", str(output)]
    return shlex.join(words)


# ------------------------------------------------------------------------------------------------------ whole files


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A hidden name with the same suffix in the same folder; takes the name `path` if the block succeeds.

    If the block raises, nothing is left behind, and what was at `path` before is still there. Makes the folder where
    there is none. Raises WriteError for every OSError, of the block as well.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, handle = _hidden_file(path)
        try:
            yield temporary
            _sync(temporary)  # a full disk may show only now, and a name must not come to the disk before its content
            os.replace(temporary, path)
            _sync(path.parent)
        finally:  # also when interrupted from the keyboard
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            os.close(handle)
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(path, error) from error


def hidden_name(path: Path) -> Path:
    """A name of its own beside `path` for what is not finished."""
    # Not tempfile's: its files are private to the user, and would stay so under their final name.
    return path.parent / f".{secrets.token_hex(8)}.tmp{path.suffix[:16]}"


def write_somewhere(path: Path, write: Callable[[Path], None]) -> Path:
    """`write` to `path` or, where that can't be, under the same name into a new folder for temporary files.

    Returns where it went; a warning says so if that is elsewhere. Raises WriteError, that of `path`, where both fail.
    """
    try:
        write(path)
        return path
    except OSError as error:
        try:
            folder = Path(tempfile.mkdtemp(prefix=ELSEWHERE))
        except OSError:
            raise error from None
        try:
            write(folder / path.name)
        except BaseException as second:
            with contextlib.suppress(OSError):
                folder.rmdir()
            if isinstance(second, OSError):
                raise error from None
            raise
        logger.warning("%s: it goes to %s", error, folder / path.name)
        return folder / path.name


def discard(path: Path) -> None:
    """Remove a file that is needed no more, with its folder where `write_somewhere` made that for it.

    One that can't be removed is only told of.
    """
    try:
        path.unlink(missing_ok=True)
        if path.parent.name.startswith(ELSEWHERE):
            with contextlib.suppress(OSError):  # not empty
                path.parent.rmdir()
    except OSError as error:
        logger.warning("%s is needed no more and can't be removed: %s", path, error.strerror)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, one tensor after the other; replaces what is there. Raises WriteError.

    By hand, because the package's own writer hides its errors and its temporary files from us. The format is a length
    (8 bytes, little-endian), as many bytes of JSON that say where each tensor is, and the tensors.
    """
    import torch

    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    # The widest numbers first: so each tensor begins at a multiple of the size of its numbers.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in names:
        tensor, begin = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _sync(path: Path) -> None:
    """Have what is in a file, or which files are in a folder, on the disk."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------- who is writing, or was


def remove_leftovers(folder: str | Path) -> None:
    """Remove the hidden files in a folder whose processes are dead. What can't be removed stays, without a word."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # there may be no such folder
        for name in os.listdir(folder):
            if not HIDDEN.fullmatch(name):
                continue
            with contextlib.suppress(OSError):
                handle = os.open(Path(folder, name), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where somebody is alive
                    os.unlink(Path(folder, name))
                finally:
                    os.close(handle)


@contextmanager
def reserved(path: Path) -> Iterator[bool]:
    """Whether the name `path` is this process's to write to, until the block ends, and nobody else's who asks here.

    Nothing is at `path` meanwhile; who dies reserves nothing any more.
    """
    marker = path.parent / f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.tmp.reserved"
    handle = _locked(marker)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                marker.unlink(missing_ok=True)
            os.close(handle)


def _hidden_file(path: Path) -> tuple[Path, int]:
    """A new hidden file beside `path`, and what holds its lock."""
    while True:
        temporary = hidden_name(path)
        if (handle := _locked(temporary)) is not None:
            return temporary, handle


def _locked(path: Path) -> int | None:
    """What holds the lock of a file that is made where there is none; None where another process has it."""
    if os.name != "posix":  # an open file could not take another name there
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            return None
        return os.open(os.devnull, os.O_RDONLY)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # a file system without locks: on it nobody removes leftovers either
        return handle
    if os.fstat(handle).st_nlink == 0:  # `remove_leftovers` was faster
        os.close(handle)
        return None
    return handle
