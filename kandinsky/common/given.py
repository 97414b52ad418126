"""What a person or a stranger's file gave: numbers as Python's own, values in words, and whether a name is a file's or
a device's.

Everything that checks what it was given starts here, so that a NumPy number is one, a number of four hundred digits is
out of range like any other, and a message that quotes what it was given stays one short line.
"""

from __future__ import annotations

import math
import os
import re
import stat
from numbers import Integral, Real
from pathlib import Path

MISSING = "there is nothing of that name"
LONGEST_LINE = 1000  # characters of a message
LONGEST_SHOWN = 200  # characters of a value that a message quotes
DEVICES = "cpu, cuda or cuda:0, mps, xpu or xpu:0"


def as_whole(value: object) -> int | None:
    """The whole number that `value` is, NumPy's included; None where it is anything else, like True or 7.0."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def as_number(value: object) -> float:
    """The number that `value` is, NumPy's included. NaN, which is in no range, where it is none: True, text, 7j.

    Whole numbers that are too large for a float become infinite.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return -math.inf if value < 0 else math.inf


def shown(value: object) -> str:
    """`value` as Python writes it, on one short line."""
    try:
        return shortened(repr(value))
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    except RecursionError:
        return f"a {type(value).__name__} nested without end"


def one_line(text: str) -> str:
    """`text` on one line; what a terminal would obey and not show, as escapes."""
    text = " ".join(text.split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shortened(text: str, longest: int = LONGEST_SHOWN) -> str:
    """`text` on one line, its middle left out where it is longer than that many characters."""
    text = one_line(text)
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"


def check_device_name(name: str) -> None:
    """Raise ValueError unless `name` is that of a device, on this machine or another."""
    if not re.fullmatch("cpu|(cuda|mps|xpu)(:[0-9]{1,4})?", name):
        raise ValueError(f"{shown(name)} is not a device: use {DEVICES}")


def why_no_file(path: str | Path) -> str | None:
    """Why there is no file at `path` whose content could be read, in a few words; None where there is one.

    A pipe is none: whoever opens it waits for somebody who may never write. Nor is a socket or a device.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return MISSING
    except OSError as error:
        return error.strerror or str(error)
    except ValueError:  # a zero byte, or half a character
        return "no file can have that name"
    if stat.S_ISDIR(mode):
        return "it is a folder"
    return None if stat.S_ISREG(mode) else "it is a pipe, a socket or a device"
