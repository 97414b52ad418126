"""The documents' commands do what they say: every one in a code block is run here, or known to be run elsewhere.

On the tiny checkpoints they run, in fewer steps where they don't say how many. Those for published weights, which are
not here, must get as far as finding that out: flags, config, sizes and pictures are then right.
"""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from kandinsky.checkpoints import inspect as checkpoints

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    REPOSITORY / "README.md",
    REPOSITORY / "assets" / "tiny" / "README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
TEXT = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
# What runs them instead, or why nobody does: the beginnings of commands.
ELSEWHERE = {
    "make demo": ".ci/run",
    "make test": ".ci/run",
    "make gpu": "tests/unit/test_first_hour.py, dry",
    "make rehearse": "tests/rehearsal/test_rehearsal.py, on small models",
    "make kernels": "tests/rehearsal/test_kernels.py, of one variant",
    "python -m venv": "the Makefile does",
    ". .venv/bin/activate": "the Makefile does",
    "pip install -r requirements.txt": "the Makefile does",
    "pip install fastapi": "the Makefile does",
    "pip install 'ray[serve]": "the Makefile does",
    "python serve.py": "tests/e2e/test_serve.py; tests/unit/test_docs.py parses each",
    "python download_models.py": "tests/unit/test_download_models.py",
    "python tools/contact_sheet.py": "tests/unit/test_contact_sheet.py; the pictures take minutes",
    "python -m kandinsky.outputs.post": "tests/unit/test_post.py",
    "python tools/convert_upscaler.py": "tests/unit/test_post.py",
    "torchrun": "tests/e2e/test_many_prompts.py",
    "python -m torch.distributed": "tests/equivalence/test_parallel.py",
}


def commands() -> list[str]:
    without_python = re.sub(r"```python\n.*?```", "", TEXT, flags=re.DOTALL)
    blocks = re.findall(r"```\n(.*?)```", without_python, flags=re.DOTALL)
    lines = [re.sub(r"\s+#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    first_words = ("python", "make", "pip", "torchrun", ".")
    return list(dict.fromkeys(line for line in lines if line.split(" ")[0] in first_words))


def is_elsewhere(command: str) -> bool:
    return any(command.startswith(beginning) for beginning in ELSEWHERE)


FEWER = "model.num_steps=6"  # what 16 steps look like is looked at elsewhere
HERE = [command for command in commands() if not is_elsewhere(command)]


def test_all_commands_are_found() -> None:
    assert len(HERE) >= 10
    assert all(any(command.startswith(beginning) for command in commands()) for beginning in ELSEWHERE)
    assert all(command.startswith(("python test.py ", "python -m kandinsky.checkpoints ")) for command in HERE)
    for command in commands():
        if command.startswith("python download_models.py"):
            module = runpy.run_path(str(REPOSITORY / "download_models.py"), run_name="download_models")
            module["build_parser"]().parse_args(shlex.split(command)[2:])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone, with the prompts that the documents speak of."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "assets"):
        (folder / name).symlink_to(REPOSITORY / name, target_is_directory=True)
    (folder / "prompts.csv").write_text("prompt,seed\na cat in a boat,1\n")
    (folder / "segments.yaml").write_text("- {prompt: a cat, seconds: 0.2}\n- {prompt: a dog, seconds: 0.2}\n")
    return folder


def no_cluster(address: str, **_: object) -> None:
    raise ConnectionError(f"Could not find any running Ray instance at {address}.")


@pytest.mark.parametrize("command", HERE)
def test_every_command(
    command: str,
    tiny: Path,
    cli: ModuleType,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In their order: later ones read what earlier ones write."""
    monkeypatch.chdir(workplace)
    if importlib.util.find_spec("ray"):  # `--ray_address auto` would join the cluster of a test that runs beside this
        monkeypatch.setattr("ray.init", no_cluster)
    words = shlex.split(command)[2:]
    if command.startswith("python -m"):
        assert checkpoints.main(words[1:]) == 0
        return
    if "config_tiny_" in command and not re.search("num_steps|sample_steps|--resume", command):
        words.append(FEWER)
    status = cli.main(words)
    captured = capsys.readouterr()
    if "config_tiny_" in command or "--plan" in words:
        assert status == 0, captured.err
        if "--plan" not in words:
            assert (workplace / captured.out.strip()).is_file()
    else:
        missing = "Ray" if "--ray_address" in words else "weights not found"
        missing = "no such file" if "--decode_latents" in words else missing
        assert status == 2 and missing in captured.err, captured.err
