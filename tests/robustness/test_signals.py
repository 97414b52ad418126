"""TERM, INT, HUP and KILL in every stage, of one run, of a file of prompts, and of two processes.

What was finished is there, the printed command goes on to the same bytes as a run that nothing happens to, and nothing
hidden is left behind.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.limits import EVERYTHING
from tests.robustness.forks import REPOSITORY, STAGES, Cell, Run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="signals and forks")]

CONFIG = ["--config", str(REPOSITORY / "configs" / "config_tiny_t2v.yaml"), "--device", "cpu"]
STEPS = 3  # of two evaluations each
PLAIN = [*CONFIG, "--sample_steps", str(STEPS), "--seed", "1", "--width", "64", "--height", "64"]
VIDEO = [*PLAIN, "--video_duration", "0.2", "--prompt", "a red circle grows", "--output_filename", "a.mp4"]
ROWS = [*PLAIN, "--video_duration", "0", "--prompts_file", "rows.csv", "--output_dir", "."]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL] if os.name == "posix" else []
# In the middle of the run, and of the second of three rows.
AT = {
    "single": {"step": 3},
    "two": {"step": 3},
    "rows": {"encode": 2, "step": 2 * STEPS + 3, "save": 2, "decode": 2, "write": 2},
}
MODES = {"single": VIDEO, "rows": ROWS, "two": VIDEO}


def meetings() -> list[tuple[str, str, signal.Signals]]:
    """(mode, stage, signal): all of them, or in every stage of every mode one of the four, in turn, so that each comes
    in every mode. One handler serves those that a process can hear."""
    found = []
    for m, mode in enumerate(MODES):
        for s, stage in enumerate(STAGES):
            sent = SIGNALS if EVERYTHING else SIGNALS[(m + s) % len(SIGNALS) :][:1]
            found += [(mode, stage, number) for number in sent]
    return found


def then(mode: str, stage: str) -> list[str]:
    """What a person does after a KILL, of which nobody can tell."""
    if mode == "rows":
        return [*ROWS, "--resume"]
    return ["--decode_latents", "a.latents.safetensors"] if stage in ("decode", "write") else VIDEO


def cells(folder: Path) -> dict[str, Cell]:
    found = {}
    for mode, words in MODES.items():
        found[mode] = Cell(str(folder / mode), words, processes=2 if mode == "two" else 1)
    for mode, stage, number in meetings():
        name = f"{mode} {stage} {int(number)}"
        next_words = then(mode, stage) if number == signal.SIGKILL else None
        at, processes = AT[mode].get(stage, 1), found[mode].processes
        found[name] = Cell(str(folder / name), MODES[mode], stage, number, at, processes, then=next_words)
    # Where a launcher or somebody reaches one process only.
    for stage in ("step", "encode", "decode"):
        name = f"second process {stage}"
        alone = {"rank": 1, "whole_group": False, "processes": 2}
        found[name] = Cell(str(folder / name), VIDEO, stage, signal.SIGTERM, AT["two"].get(stage, 1), **alone)  # type: ignore[arg-type]
    return found


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Run]]:
    folder = tmp_path_factory.mktemp("signals")
    plan = cells(folder)
    for cell in plan.values():
        Path(cell.folder).mkdir()
        if "rows.csv" in cell.words:
            (Path(cell.folder) / "rows.csv").write_text(
                "prompt,output\na red circle,1.png\na square,2.png\nsnow,3.png\n"
            )
    (folder / "plan.json").write_text(json.dumps([dataclasses.asdict(cell) for cell in plan.values()]))
    command = [sys.executable, "-m", "tests.robustness.forks", str(folder / "plan.json"), str(folder / "results.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results: list[list[dict[str, Any]]] = json.loads((folder / "results.json").read_text())
    return {name: [Run(**one) for one in found] for name, found in zip(plan, results, strict=True)}


def outputs(run: Run) -> dict[str, str]:
    return {name: checksum for name, checksum in run.files.items() if name.endswith((".mp4", ".png"))}


def test_runs_that_nothing_happens_to(runs: dict[str, list[Run]]) -> None:
    for mode, names in (("single", {"a.mp4"}), ("two", {"a.mp4"}), ("rows", {"1.png", "2.png", "3.png"})):
        (run,) = runs[mode]
        assert set(run.statuses) == {0}, run.err
        assert set(outputs(run)) == names and not run.hidden


@pytest.mark.parametrize(("mode", "stage", "number"), meetings(), ids=lambda value: getattr(value, "name", value))
def test_ended_and_gone_on_with(mode: str, stage: str, number: signal.Signals, runs: dict[str, list[Run]]) -> None:
    ended, again = [*runs[f"{mode} {stage} {int(number)}"], None][:2]
    assert ended is not None
    killed = number == signal.SIGKILL
    assert ended.statuses[0] == 128 + number, ended.err
    assert all(ended.statuses) or (mode, stage) == ("two", "write")  # of which the second has no part
    assert "Traceback" not in ended.err and "error:" not in ended.err
    left = {name for name in ended.files if name != "rows.csv"}
    name = "2" if mode == "rows" else "a"
    expected = set()
    if stage in ("decode", "write") or (stage == "save" and not killed):
        expected = {f"{name}.latents.safetensors"}
    elif stage == "step" and not killed:
        expected = {f"{name}.stopped.safetensors"}
    expected |= {"1.png", "1.json"} if mode == "rows" and stage not in ("load", "encode") else set()
    assert left == expected, ended.err
    assert bool(ended.hidden) == (killed and stage in ("save", "write"))  # what had no name yet
    assert (ended.err.count("interrupted;") == 1) != killed
    assert ("nothing was written" in ended.err) == (not killed and mode != "rows" and stage in ("load", "encode"))
    if again is None:
        assert stage in ("load", "encode") and mode != "rows"
        return
    assert set(again.statuses) == {0}, again.err
    assert outputs(again) == outputs(runs[mode][0])
    assert set(again.files) == set(runs[mode][0].files) and not again.hidden
    # What was done is not done again.
    kept = {"load": 0, "encode": 0, "step": 0 if killed else 2, "save": 0 if killed else STEPS}.get(stage, STEPS)
    steps = (STEPS - kept) if mode != "rows" else (3 if stage in ("load", "encode") else 2) * STEPS - kept
    assert again.forwards[0] == 2 * steps, again.err


@pytest.mark.parametrize("stage", ["encode", "step", "decode"])
def test_a_signal_to_one_of_two_processes(stage: str, runs: dict[str, list[Run]]) -> None:
    ended, again = [*runs[f"second process {stage}"], None][:2]
    assert ended is not None
    assert all(ended.statuses), ended.err
    assert "Traceback" not in ended.err and "error:" not in ended.err
    assert ended.err.count("interrupted;") == 1
    kept = {"encode": set(), "step": {"a.stopped.safetensors"}, "decode": {"a.latents.safetensors"}}
    assert set(ended.files) == kept[stage], ended.err
    if stage != "encode":
        assert again is not None and set(again.statuses) == {0}
        assert outputs(again) == outputs(runs["two"][0])
