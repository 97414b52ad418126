"""What strangers wrote, or a disk damaged: files, JSON and names, read within bounds or refused in one line.

Everything that comes with weights (configs, indices, adapters, records, listings of a hub) goes through here before
anybody relies on it. A file is a regular one: a FIFO would be waited for, a device read for ever. JSON is limited in
size and depth, and its numbers are finite and fit into a float. Names lead nowhere but into their own folder. What is
told of them is printable, and short.

Knows nothing of what the files mean.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO, NoReturn

from kandinsky.common.given import as_number, shortened, shown, why_no_file

MAX_JSON_BYTES = 25_000_000  # the largest published index has 60,000, the largest header 200,000
MAX_DEPTH = 50
MAX_NAME = 255  # bytes of a file's name, the limit of file systems


def reason(error: BaseException) -> str:
    """What an error says in its first line, or its kind where it says nothing."""
    return shortened(str(error).strip().partition("\n")[0] or type(error).__name__)


# --- files ------------------------------------------------------------------------------------------------------------


def home_path(path: str | Path) -> Path:
    """The path with a leading ~ or ~user resolved. Raises ValueError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{named(path)}: there is no user {Path(path).parts[0][1:]!r} on this machine") from None


def named(path: str | Path) -> str:
    """A path as a message has it: whole, unless no terminal can show it or no file has such a name."""
    text = str(path)
    return text if text.isprintable() and len(text) <= 1000 else shortened(text)


def open_file(path: str | Path) -> BinaryIO:
    """The file, for reading. Raises ValueError where there is no regular file, OSError where it can't be opened."""
    if why := why_no_file(path):
        raise ValueError(f"{named(path)}: {why}")
    # Without waiting, should somebody have put a FIFO there since.
    return os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")


def read_bytes(path: str | Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """What is in a file. Raises ValueError for more than `limit` bytes and as `open_file` does."""
    with open_file(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{named(path)}: more than {limit:,} bytes, which no such file has")
    return content


# --- JSON -------------------------------------------------------------------------------------------------------------


def parse_json(text: str | bytes, what: str | Path, *, unique: bool = False) -> Any:
    """The value that JSON text stands for. `what` begins each message.

    Raises ValueError where it isn't UTF-8 or JSON, is nested deeper than MAX_DEPTH, or has numbers that are not finite
    or text that no encoding has; with `unique` also for an object that has a name twice.
    """
    once = _each_once if unique else None
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=once)
        _check(value)
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not JSON (it is not UTF-8)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is not JSON ({error.msg}, line {error.lineno})") from None
    except RecursionError:
        raise ValueError(f"{what} is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # also Python's, for numbers of more than 4300 digits
        why = str(error) if isinstance(error, _Refused) else "a number of thousands of digits in it"
        raise ValueError(f"{what} has {why}") from None
    return value


def read_json(path: str | Path, what: str | None = None) -> dict[str, Any]:
    """The object in a JSON file; `what` begins messages in place of its path.

    Raises ValueError as `parse_json` and `read_bytes` do, and where it can't be read or is no object.
    """
    what = what or named(path)
    try:
        value = parse_json(read_bytes(path), what)
    except OSError as error:
        raise ValueError(f"{what} is not readable ({error.strerror or 'unknown error'})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} is JSON, and not an object in it")
    return value


class _Refused(ValueError):
    """What JSON may have and ours may not."""


def _refuse_constant(name: str) -> NoReturn:
    raise _Refused(f"the number {name} in it; it must be finite")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise _Refused("one name twice in an object")
    return values


def _check(value: Any) -> None:
    left = [(value, 0)]
    while left:
        one, depth = left.pop()
        if depth > MAX_DEPTH:
            raise RecursionError
        if isinstance(one, dict):
            left += [(part, depth + 1) for pair in one.items() for part in pair]
        elif isinstance(one, list):
            left += [(part, depth + 1) for part in one]
        elif isinstance(one, str):
            if not one.isascii() and any("\ud800" <= letter <= "\udfff" for letter in one):
                raise _Refused(f"text that no encoding has ({shown(one)})")
        elif one is not None and not isinstance(one, bool) and not math.isfinite(as_number(one)):
            raise _Refused("a number in it that is too large; it must be finite")


# --- names ------------------------------------------------------------------------------------------------------------


def is_plain_name(name: object) -> bool:
    """Whether it is the name of a file in a folder on any system, and no way out of that folder."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and PureWindowsPath(name).name == name  # neither separators nor a drive; Windows knows all of them
        and name.isprintable()
        and len(name.encode("utf-8", "replace")) <= MAX_NAME
    )
