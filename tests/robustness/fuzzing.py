"""What the fuzzers share: cases with fixed seeds, bounds for each, and how seeds of valid input are spoiled.

A fuzzer is a test whose name begins with test_fuzz:

    def test_fuzz_indices(tmp_path: Path) -> None:
        def case(rng: Random) -> None:
            index.write_bytes(spoiled_json(rng, VALID))
            find_weights(index)

        fuzz(case)

A case succeeds, or raises ValueError or OSError with one clear line. Anything else is a failure that names the case's
number, and so are minutes of processor time, waiting for what never comes, and gigabytes. In the suite a few hundred
cases run; `make fuzz` runs at least 10,000 of each, and goes on until FUZZ_SECONDS are over. Case i is the same in each
of them and on every machine: FUZZ_CASE=i runs it alone.
"""

from __future__ import annotations

import copy
import json
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, NoReturn

CASES = 300  # in the suite
CASES_OF_MAKE_FUZZ = 10_000
CPU_SECONDS = 20  # of one case; what is measured here in milliseconds does not get there on any machine
WALL_SECONDS = 300  # only what waits for ever gets there
MEMORY = 1 << 30  # bytes of addresses that a fuzzer may take besides what the process has

LONGEST_LINE = 1200  # characters; a name that is quoted may be long
# What only a programmer reads.
NOISE = re.compile(r"Traceback|object at 0x|<class '|Errno \d+\] *$|^\s*$|KeyError|AttributeError|NoneType|unhashable")


class OutOfTime(BaseException):
    """Not an Exception, so that nobody on the way takes it for a mistake of the input."""


def fuzz(case: Callable[[Random], object], cases: int = CASES) -> None:
    """Run `case` with one source of randomness after the other; see this module's docstring.

    Raises AssertionError for a case that neither succeeds nor is refused in one clear line, or is out of bounds.
    """
    seconds, alone = os.environ.get("FUZZ_SECONDS"), os.environ.get("FUZZ_CASE")
    cases = max(cases, CASES_OF_MAKE_FUZZ) if seconds else cases
    end = time.monotonic() + float(seconds or 0)
    with bounded_memory():
        for number in [int(alone)] if alone else count():
            if not alone and number >= cases and time.monotonic() >= end:
                return
            try:
                with bounded_time():
                    clearly_refused(lambda: case(Random(number)))  # noqa: B023  (it is called at once)
            except (Exception, OutOfTime) as error:
                what = f"{type(error).__name__}: {error}"
                raise AssertionError(f"case {number} (FUZZ_CASE={number} runs it alone): {what}") from error


def clearly_refused(call: Callable[[], object]) -> str | None:
    """The one line that a call is refused with, None where it succeeds. Other errors are not caught."""
    try:
        call()
    except (ValueError, OSError) as error:
        message = str(error)
        assert_clear(message)
        return message
    return None


def assert_clear(message: str) -> None:
    """A person reads it: one line, not too long, no traceback and none of Python's own names."""
    assert message.strip(), "refused without a word"
    assert len(message.splitlines()) == 1, f"more than one line: {message!r}"
    assert len(message) <= LONGEST_LINE, f"{len(message)} characters: {message[:200]!r}..."
    assert message.isprintable(), f"what a terminal may choke on or obey: {message!r}"
    assert not NOISE.search(message), f"not for people: {message!r}"


@contextmanager
def bounded_time() -> Iterator[None]:
    """Raise OutOfTime for what computes for ever, and for what waits for ever."""

    def stop(number: int, frame: object) -> NoReturn:
        raise OutOfTime(f"it takes more than {CPU_SECONDS} s of a processor, or waits more than {WALL_SECONDS} s")

    timers = (signal.ITIMER_PROF, signal.SIGPROF, CPU_SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, WALL_SECONDS)
    before = [(number, signal.signal(number, stop)) for _, number, _ in timers]
    try:
        for timer, _, seconds in timers:
            signal.setitimer(timer, seconds)
        yield
    finally:
        for timer, _, _ in timers:
            signal.setitimer(timer, 0)
        for number, handler in before:
            signal.signal(number, handler)


@contextmanager
def bounded_memory(more: int = MEMORY) -> Iterator[None]:
    """MemoryError, or torch's RuntimeError, for whoever asks for more than `more` bytes besides what there is now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# --- how input is spoiled ---------------------------------------------------------------------------------------------

NASTY_NUMBERS = (
    *(0, 1, -1, 2, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400),
    *(0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan"), True, False),
)
NASTY_TEXTS = (
    *("", " ", "\n", "\t", "\0", "\x1b[2J", "\u202e", "\ufeff", "\ud800", "😀", "я", "é" * 300, "x" * 10_000),
    *(
        ".",
        "..",
        "../x",
        "/etc/passwd",
        "/dev/zero",
        "~nosuchuser/x",
        "C:\\x",
        "a/../../b",
        "-",
        "--help",
        "%s%n",
        "{}",
    ),
    *("null", "NaN", "1e999", "0x10", "1_000", "true", "[", "a{99999999999}", r"(\w+\.?)+!", "(" * 5000, "*", "\\"),
)
NASTY_VALUES = (None, *NASTY_NUMBERS, *NASTY_TEXTS, [], {}, [None], {"a": 1}, [[]], {"": {}}, [0] * 1000)
NASTY_BYTES = (
    *(
        b"",
        b"\0",
        b"\xff",
        b"\xfe\xff",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\n",
        b"\r\n",
        b"\x1a",
        b'"',
        b"\\",
        b"{",
        b"}",
    ),
    *(b"[" * 200_000, b"null", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"9" * 400, b"\\ud800", b"\\u0000"),
)


def spoiled_bytes(rng: Random, content: bytes) -> bytes:
    """`content` with one to four changes: bits, cuts, doubled and moved pieces, and what NASTY_BYTES has."""
    for _ in range(rng.randint(1, 4)):
        a, b = sorted((rng.randint(0, len(content)), rng.randint(0, len(content))))
        b = min(b, a + rng.choice((1, 4, 100, 1 << 30)))
        match rng.randrange(7):
            case 0 if content:
                at = rng.randrange(len(content))
                content = content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
            case 1:
                content = content[:a] + rng.choice(NASTY_BYTES) + content[b if rng.random() < 0.5 else a :]
            case 2:
                content = content[:a] + content[b:]
            case 3:
                content = content[:a] + content[a:b] * 2 + content[b:]
            case 4:
                content = content[:a]
            case 5:
                content = content[:a] + rng.randbytes(min(b - a, 64)) + content[b:]
            case _:
                content = content[:a] + content[a:b][::-1] + content[b:]
    return content


def spoiled_value(rng: Random, value: Any, nasty: tuple[Any, ...] = NASTY_VALUES) -> Any:
    """A copy of what JSON or YAML can hold with one to three changes: entries replaced, renamed, dropped, wrapped.

    nasty: what entries are replaced with, besides each other.
    """
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(value))
        if not places or rng.random() < 0.02:
            return copy.deepcopy(rng.choice(nasty))
        holder, key = rng.choice(places)
        match rng.randrange(8):
            case 0 | 1 | 2 | 3:
                holder[key] = copy.deepcopy(rng.choice(nasty))
            case 4:
                del holder[key]
            case 5:
                holder[key] = [holder[key]] if rng.random() < 0.5 else {"x": holder[key]}
            case 6 if isinstance(holder, dict):
                holder[rng.choice(NASTY_TEXTS)] = holder.pop(key)
            case _:
                other, there = rng.choice(places)
                holder[key] = copy.deepcopy(other[there]) if _has(other, there) else None
    return value


def spoiled_json(rng: Random, value: Any, nasty: tuple[Any, ...] = NASTY_VALUES) -> bytes:
    """JSON text that mostly can be read and says something else, and sometimes can't."""
    kind = rng.random()
    if kind < 0.7:
        text = json.dumps(spoiled_value(rng, value, nasty), ensure_ascii=rng.random() < 0.9)
        return text.encode(rng.choice(("utf-8",) * 8 + ("utf-16", "utf-8-sig")), "surrogatepass")
    content = json.dumps(value).encode()
    if kind < 0.75:
        depth = rng.choice((10, 500, 2000, 200_000))
        opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
        return (opening * depth + "1" + (closing * depth if rng.random() < 0.5 else "")).encode()
    return spoiled_bytes(rng, content)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (holder, key) below a value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)
