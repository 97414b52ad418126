"""The fuzzers' own tools can say no, and find what they are there to find."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from random import Random

import pytest

from tests.robustness import fuzzing
from tests.robustness.fuzzing import (
    NASTY_VALUES,
    assert_clear,
    clearly_refused,
    fuzz,
    spoiled_bytes,
    spoiled_json,
    spoiled_value,
)


def test_only_clear_lines_pass() -> None:
    def raising(error: Exception) -> None:
        raise error

    assert clearly_refused(lambda: None) is None
    assert clearly_refused(lambda: raising(ValueError("x is 3; it must be 4"))) == "x is 3; it must be 4"
    for error in (ValueError(""), ValueError("two\nlines"), ValueError("\x1b[2J"), OSError("y" * 5000)):
        with pytest.raises(AssertionError):
            clearly_refused(lambda error=error: raising(error))
    with pytest.raises(KeyError):
        clearly_refused(lambda: raising(KeyError("a")))
    with pytest.raises(AssertionError, match="not for people"):
        assert_clear("'NoneType' object is not subscriptable")


def test_a_failure_names_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUZZ_SECONDS", raising=False)

    def case(rng: Random) -> None:
        if rng.random() > 0.9:
            raise KeyError("found")

    with pytest.raises(AssertionError, match="KeyError") as raised:
        fuzz(case)
    number = re.search(r"FUZZ_CASE=(\d+)", str(raised.value))
    assert number is not None
    monkeypatch.setenv("FUZZ_CASE", number[1])
    with pytest.raises(AssertionError, match=f"case {number[1]} "):
        fuzz(case)


@pytest.mark.parametrize(("environment", "expected"), [({}, 300), ({"FUZZ_SECONDS": "0"}, 10_000)])
def test_how_many_cases_run(environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUZZ_SECONDS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    seen: list[float] = []
    fuzz(lambda rng: seen.append(rng.random()))
    assert len(seen) == expected
    assert len(set(seen)) == expected
    again: list[float] = []
    fuzz(lambda rng: again.append(rng.random()))
    assert seen == again


def test_bounds_of_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "CPU_SECONDS", 0.2)

    def computes(rng: Random) -> None:
        while True:
            pass

    with pytest.raises(AssertionError, match="of a processor"):
        fuzz(computes)
    monkeypatch.setattr(fuzzing, "CPU_SECONDS", 20)
    with pytest.raises(AssertionError, match="MemoryError"):
        fuzz(lambda rng: bytearray(3 << 30))
    bytearray(1 << 30)  # and afterwards there is no bound


def test_what_waits_for_ever_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr(fuzzing, "WALL_SECONDS", 0.2)
    with pytest.raises(AssertionError, match="waits more than"):
        fuzz(lambda rng: (tmp_path / "fifo").read_text())


def test_spoiling_spoils_and_leaves_the_seed_alone() -> None:
    value = {"a": {"b": [1, 2, 3]}, "c": "text", "d": None}
    text = json.dumps(value)
    before = copy.deepcopy(NASTY_VALUES)
    texts = {json.dumps(spoiled_value(Random(i), value)) for i in range(500)}
    assert len(texts) > 200
    assert before == NASTY_VALUES  # a case must not depend on those before it
    assert json.dumps(value) == text
    assert len({spoiled_bytes(Random(i), text.encode()) for i in range(500)}) > 300

    readable = 0
    for i in range(500):
        try:
            json.loads(spoiled_json(Random(i), value))
            readable += 1
        except (ValueError, RecursionError):
            pass
    assert 200 < readable < 480  # most can be read, and say something else
