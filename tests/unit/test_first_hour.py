"""`tools/first_hour.py` goes through its steps without a GPU, goes on where it was, and names each assumption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import first_hour


def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(first_hour, "run_program", lambda words, dry: asked.append(words) or {"seconds": 1.0})
    first_hour.take_steps(tmp_path, dry=True, again=[])
    found = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert found.keys() == {*first_hour.STEPS, *first_hour.PROGRAMS}
    assert not [name for name, figures in found.items() if "error" in figures], found
    assert found["forward"]["compiled"] > 0 and found["rates"]["link"] > 0

    asked.clear()
    first_hour.take_steps(tmp_path, dry=True, again=["nabla"])
    assert asked == [first_hour.PROGRAMS["nabla"]]  # all else has its figures

    table = first_hour.table(tmp_path)
    assert all(f"| {what} | {assumed} |" in table for what, assumed, *_ in first_hour.ASSUMED)


def test_programs_and_places_are_there() -> None:
    for words in first_hour.PROGRAMS.values():
        assert words[0] == "-m" or (first_hour.ROOT / words[0]).is_file()
    for what, _, step, _, where in first_hour.ASSUMED:
        name = what.split(",")[0].rpartition(".")[2]
        assert step in first_hour.STEPS
        assert " " in name or name in (first_hour.ROOT / where).read_text(encoding="utf-8")
