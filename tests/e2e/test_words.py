"""What a person types by mistake on the command line, and terminals that cannot show what they typed."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs"
T2V = ("--config", str(CONFIGS / "config_tiny_t2v.yaml"))
I2V = ("--config", str(CONFIGS / "config_tiny_i2v.yaml"))
QUICK = (*T2V, "--video_duration", "0", "--sample_steps", "1", "--device", "cpu")
RUSSIAN = "красный круг 😀"


def refused(cli: ModuleType, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that is told, without its "error: "."""
    try:
        code = cli.main(words)
    except SystemExit as error:
        code = error.code
    told = capsys.readouterr()
    assert code == 2 and not told.out, told
    assert told.err.startswith("error: ") and told.err.count("\n") == 1 and told.err.endswith("\n"), told.err
    return told.err.removeprefix("error: ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--prompt", "a", "red", "circle"), "--prompt takes 'a' alone here: text with spaces belongs in quotes"),
        (("--prompt", "a", "red", "circle"), '--prompt "a red circle"'),
        (("--prompt=a", "red", "circle", "model.num_steps=2"), '--prompt "a red circle"'),
        (("--prompt", "a", "model", "walks", "--seed", "1"), '--prompt "a model walks"'),
        (("model.num_steps=2", "--prompt", "x", "--negative_prompt", "ugly,", "bad"), '--negative_prompt "ugly, bad"'),
        (("--prompt", "x", "--image", "my", "cat.png"), '--image "my cat.png"'),
        (("--prompt", "x", "--output_filename", "my", "cat.mp4"), '--output_filename "my cat.mp4"'),
        (("--prompt", "x", "model.num_steps"), "override 'model.num_steps' is not of the form key.key=value"),
        (("--seed", "1", "2", "--prompt", "x"), "override '2' is not of the form key.key=value"),
        (("--prompt", "x", "--image", "a.png", "--image", "b.jpg"), "--image is given twice, a.png and b.jpg: give o"),
        (("--prompt", "x", "--video_duration", "0.1"), "--video_duration 0.1 is too short: a video has at least 5 fr"),
        (("--prompt", "x", "--video_duration", "1e-9"), "0 makes a picture"),
        (("--prompt", "x", "--plan", "--video_duration", "0.1"), "--video_duration 0.1 is too short"),
        (("--prompt", "x", "generation.time_length=0.1"), "generation.time_length = 0.1 is not allowed: it must"),
        (("--prompt", "x", "--seed", "1" + 400 * "0"), "the seed is 1000"),
        (("--prompt", "x", "--seed", "1" + 5000 * "0"), "--seed: invalid int value"),
        (("--prompt", "x", "--width", "1" + 400 * "0"), "the nearest is 2048"),
        (("--prompt", "x", "\x1b[2J=1"), r"override '\x1b[2J=1' is not of the form"),
    ],
)  # fmt: skip
def test_words_that_went_astray(
    cli: ModuleType, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    assert says in refused(cli, capsys, *T2V, *words)


def test_words_of_a_video_of_a_sixth_of_a_second_are_taken(cli: ModuleType) -> None:
    from kandinsky.commands.flags import wishes_of

    args = cli.build_parser().parse_intermixed_args(["--video_duration", "0.167", "--prompt", "x"])
    assert wishes_of(args)["time_length"] == 0.167


def test_a_picture_on_the_web(cli: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    says = refused(cli, capsys, *I2V, "--prompt", "x", "--image", "https://example.org/cat.png")
    assert says.startswith("the image https://example.org/cat.png is an address and no file: download the picture")


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "abc"}, "the variable RANK is 'abc'; a launcher sets it to a number: unset it"),
        ({"WORLD_SIZE": "two"}, "the variable WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": ""}, "the variable WORLD_SIZE is ''"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1"}, "the variable LOCAL_RANK is '-1'"),
        ({"RANK": "9" * 400}, "the variable RANK is '999"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "the variable RANK is 2 of WORLD_SIZE 2: it counts from 0"),
        ({"RANK": "1"}, "the variable RANK is 1 of WORLD_SIZE 1"),
        ({"WORLD_SIZE": "0"}, "the variable RANK is 0 of WORLD_SIZE 0"),
        ({"WORLD_SIZE": "2"}, "the variable WORLD_SIZE is 2, and MASTER_ADDR, where they meet, is not set: start them"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "and MASTER_PORT, where they meet, is not set"),
    ],
)
def test_variables_that_no_launcher_has_set(
    cli: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    environment: dict[str, str],
    says: str,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert says in refused(cli, capsys, *T2V, "--prompt", "x")
    (tmp_path / "a.txt").write_text("x\n")
    file = ("--prompts_file", str(tmp_path / "a.txt"), "--data_parallel", "--output_dir", str(tmp_path))
    if "MASTER" not in says:  # those of a file of prompts need not meet
        assert says in refused(cli, capsys, *T2V, *file)


def test_too_large_a_picture_is_one_line(cli: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("1", (12000, 9000)).save(tmp_path / "a.png")
    says = refused(cli, capsys, *I2V, "--prompt", "x", "--image", str(tmp_path / "a.png"))
    assert "it has 108 megapixels, and at most 80 are read: scale it down" in says


# ----------------------------------------------------------------------------- terminals and pipes of other encodings


@pytest.fixture(params=["ascii", "cp1252"])
def run(request: pytest.FixtureRequest, cli: ModuleType) -> Callable[..., tuple[int, str, str]]:
    """The command line with a stdout and a stderr that cannot encode every character: status, and what they got."""

    def run_words(*words: str) -> tuple[int, str, str]:
        streams = io.BytesIO(), io.BytesIO()
        with pytest.MonkeyPatch.context() as patch:
            for name, stream in zip(("stdout", "stderr"), streams, strict=True):
                patch.setattr(sys, name, io.TextIOWrapper(stream, encoding=request.param))
            patch.setattr(logging.getLogger(), "handlers", [])  # which main sets up anew, for this stderr
            code = cli.main(words)
            sys.stdout.flush()
            sys.stderr.flush()
            out, err = (stream.getvalue().decode("ascii") for stream in streams)
        return code, out, err

    return run_words


Run = Callable[..., tuple[int, str, str]]


def test_a_run_is_not_failed_by_its_terminal(run: Run, tiny: Path, tmp_path: Path) -> None:
    code, out, err = run(*QUICK, "--prompt", RUSSIAN, "--seed", "1", "--output_dir", str(tmp_path))
    assert code == 0, err
    (picture,) = tmp_path.glob("*.png")
    assert picture.name == "красный-круг_seed1.png"
    assert out == f"{picture}\n".encode("ascii", "backslashreplace").decode()
    assert "codec" not in err and "Logging error" not in err
    assert json.loads(picture.with_suffix(".json").read_text())["prompt"] == RUSSIAN


def test_all_rows_are_made_whatever_the_terminal_can_show(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"one\n{RUSSIAN}\nthree\n", encoding="utf-8")
    code, out, err = run(*QUICK, "--prompts_file", str(tmp_path / "a.txt"), "--output_dir", str(tmp_path / "out"))
    assert code == 0, err
    assert len(list((tmp_path / "out").glob("*.png"))) == 3 and len(out.splitlines()) == 3
    assert "codec" not in err and "Logging error" not in err


def test_a_mistake_with_letters_that_the_terminal_has_not(run: Run) -> None:
    code, _, err = run(*T2V, "--prompt", "x", "--output_filename", "видео.avi")
    assert code == 2 and err.count("\n") == 1
    assert err.startswith(r"error: \u0432\u0438\u0434\u0435\u043e.avi ends in '.avi'")
