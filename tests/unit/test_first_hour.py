"""`tools/first_hour.py` goes through its steps without a GPU, goes on where it was, and names each assumption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kandinsky.attention.nabla import sorted_heaviest
from tools import first_hour
from tools.gpu_measurements import DRY, STEPS, bisected_heaviest


def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(first_hour, "run_program", lambda words: asked.append(words) or {"seconds": 1.0})
    monkeypatch.setattr(first_hour, "run_step", lambda name, dry: STEPS[name](DRY))  # here, and no process of its own
    first_hour.take_steps(tmp_path, dry=True, again=[])
    found = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert found.keys() == {*first_hour.STEPS, *first_hour.PROGRAMS}
    assert not [name for name, figures in found.items() if "error" in figures], found
    assert found["forward"]["compiled"] > 0 and found["rates"]["link"] > 0
    assert len(asked) == len(set(asked)) and all(words[-1] == "--help" for words in asked)

    asked.clear()
    first_hour.take_steps(tmp_path, dry=True, again=["nabla"])
    assert asked == [first_hour.help_of(first_hour.PROGRAMS["nabla"])]  # all else has its figures

    # What only a GPU has or does is not measured here; everything else has its figure.
    table = first_hour.table(tmp_path)
    assert all(f"| {one.what} | " in table for one in first_hour.ASSUMED)
    missing = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if "not measured" in line]
    assert missing == [
        "share of a copy that hides behind computing", "allocator and kernels beside the plan",
        "`auto`'s engines, head_dim 128",
    ]  # fmt: skip


def test_a_step_that_fails_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves its error, is ended, and is taken again the next time."""
    assert first_hour.run_step("context", dry=True)["device"] == "cpu"
    assert "KeyError" in first_hour.run_step("no such step", dry=True)["error"]
    monkeypatch.setattr(first_hour, "LIMIT", 0)
    assert "more than 0 s" in first_hour.run_step("forward", dry=True)["error"]
    assert "more than 0 s" in first_hour.run_program(("-c", "import time; time.sleep(60)"))["error"]
    (tmp_path / "rates.json").write_text('{"error": "before"}')
    monkeypatch.setattr(first_hour, "run_step", lambda name, dry: {"link": 7})
    first_hour.take_steps(tmp_path, dry=True, again=[], programs={})
    assert json.loads((tmp_path / "rates.json").read_text()) == {"link": 7}


def test_programs_and_lines_are_there() -> None:
    for words in first_hour.PROGRAMS.values():
        assert words[0] == "-m" or (first_hour.ROOT / words[0]).is_file()
    for one in first_hour.ASSUMED:
        assert one.step in first_hour.STEPS
        file, number = one.where().rsplit(":", 1)
        assert (first_hour.ROOT / file).read_text(encoding="utf-8").splitlines()[int(number) - 1].strip()


def test_bisection_keeps_what_the_sort_keeps() -> None:
    mass = torch.softmax(3 * torch.randn(64, 48, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert torch.equal(bisected_heaviest(mass, 0.9), sorted_heaviest(mass, 0.9))
