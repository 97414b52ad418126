"""The tiny checkpoint, which the end-to-end tests start from."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The folder of the tiny checkpoint."""
    folder = REPOSITORY / "assets" / "tiny" / "t2v"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: make it with tools/train_tiny.py, or restore it with git checkout")
    return folder
