"""The tiny checkpoint, and the command line as a module: what the end-to-end tests start from."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The folder of the tiny checkpoint."""
    folder = REPOSITORY / "assets" / "tiny" / "t2v"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: make it with tools/train_tiny.py, or restore it with git checkout")
    return folder


@pytest.fixture(scope="session")
def cli() -> ModuleType:
    """test.py by its path: by its name it would be Python's own `test` package."""
    spec = importlib.util.spec_from_file_location("kandinsky_cli", REPOSITORY / "test.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
