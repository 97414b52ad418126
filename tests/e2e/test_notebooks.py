"""The notebooks run from top to bottom on the tiny checkpoints, and show what they make."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.limits import PATIENCE

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted(REPOSITORY.glob("inference_example*.ipynb"))


def outputs_of(notebook: nbformat.NotebookNode) -> list[set[str]]:
    """For each code cell the kinds of what it shows."""
    return [
        {kind for output in cell.outputs for kind in output.get("data", {})}
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_there_is_one_for_every_task() -> None:
    assert [path.stem.removeprefix("inference_example") for path in NOTEBOOKS] == ["", "_i2i", "_i2v", "_t2i"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_in_the_repository_was_run(path: Path) -> None:
    """Pictures are in the file, for those who only look; errors and folders of somebody's machine are not."""
    notebook = nbformat.read(path, as_version=4)
    assert any("image/png" in kinds for kinds in outputs_of(notebook))
    assert "Traceback" not in path.read_text() and "site-packages" not in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.exhaustive] * path.stem.endswith(("i2i", "i2v"))) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_runs_from_top_to_bottom(path: Path, tiny: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    expected = outputs_of(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = NotebookClient(
        notebook, timeout=int(PATIENCE), kernel_name="python3", resources={"metadata": {"path": REPOSITORY}}
    )
    client.execute()
    assert outputs_of(notebook) == expected
    assert any(expected)
