"""The four tasks on their tiny checkpoints, through the command line and the public call."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

import kandinsky

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs"
PROMPTS = {
    "t2v": "a red circle moves left on a white background",
    "i2v": "a red circle moves left on a white background",
    "t2i": "a red circle on a white background",
    "i2i": "make the circle blue",
}
WITH_PICTURE = ("i2v", "i2i")


def config_of(task: str) -> Path:
    return CONFIGS / f"config_tiny_{task}.yaml"


def suffix_of(task: str) -> str:
    return ".mp4" if task.endswith("v") else ".png"


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A red circle on white."""
    rows, columns = np.mgrid[:128, :128]
    inside = (rows - 64) ** 2 + (columns - 64) ** 2 < 25**2
    pixels = np.where(inside[..., None], (215, 30, 35), (240, 240, 240)).astype(np.uint8)
    path = tmp_path_factory.mktemp("picture") / "circle.png"
    Image.fromarray(pixels).save(path)
    return path


def words(task: str, picture: Path | None, *more: object) -> list[str]:
    given: list[object] = ["--config", config_of(task), "--prompt", PROMPTS[task], "--seed", 1, "--sample_steps", 2]
    given += ["--image", picture] if picture is not None and task in WITH_PICTURE else []
    return [str(word) for word in (*given, *more)]


def read(path: Path) -> np.ndarray:
    """uint8 (T, H, W, 3), a picture with T = 1."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            return np.asarray(image)[None]
    with imageio.get_reader(path, format="FFMPEG") as reader:
        return np.stack(list(reader.iter_data()))


@pytest.mark.parametrize("task", PROMPTS)
def test_command_line(
    cli: ModuleType, tiny: Path, picture: Path, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Sizes, length and steps are the config's; the name is made from the prompt."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(words(task, picture)) == 0, capsys.readouterr().err
    path = Path(capsys.readouterr().out.strip())
    assert path.parent == Path("outputs") and path.suffix == suffix_of(task)
    frames = read(path)
    assert frames.shape == (25 if task.endswith("v") else 1, 128, 128, 3)
    assert frames.std() > 1  # a picture, not one colour
    facts = json.loads(path.with_suffix(".json").read_text())
    assert (facts["task"], facts["prompt"], facts["seed"]) == (task, PROMPTS[task], 1)
    assert facts["image"] == (str(picture) if task in WITH_PICTURE else None)


def test_task_decides_and_not_the_name_of_the_file(
    cli: ModuleType, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(config_of("t2i"), tmp_path / "config_5s_i2v.yaml")
    arguments = words("t2i", None, "--output_filename", tmp_path / "a.png")
    arguments[1] = str(tmp_path / "config_5s_i2v.yaml")
    assert cli.main(arguments) == 0, capsys.readouterr().err
    assert read(tmp_path / "a.png").shape == (1, 128, 128, 3)


@pytest.mark.parametrize("task", PROMPTS)
def test_call_makes_what_the_command_line_makes(
    cli: ModuleType, tiny: Path, picture: Path, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"a{suffix_of(task)}"
    short = ["--video_duration", "0.2"] if task.endswith("v") else []
    assert cli.main(words(task, picture, "--output_filename", path, *short)) == 0, capsys.readouterr().err
    pipe = getattr(kandinsky, f"get_{task.upper()}_pipeline")("cpu", conf_path=config_of(task))
    options: dict[str, Any] = {"image": picture} if task in WITH_PICTURE else {}
    options |= {"time_length": 0.2} if task.endswith("v") else {}
    again = tmp_path / f"b{suffix_of(task)}"
    result = pipe(PROMPTS[task], seed=1, num_steps=2, save_path=again, progress=False, **options)
    if task.endswith("v"):
        assert isinstance(result, torch.Tensor) and tuple(result.shape) == (1, 3, 5, 128, 128)
    else:
        assert np.array_equal(np.asarray(result[0]), read(path)[0])
    assert np.array_equal(read(again), read(path))


def test_a_video_begins_with_its_picture(cli: ModuleType, tiny: Path, picture: Path, tmp_path: Path) -> None:
    assert cli.main(words("i2v", picture, "--output_filename", tmp_path / "a.mp4", "--video_duration", "0.2")) == 0
    first = read(tmp_path / "a.mp4")[0].astype(float)
    with Image.open(picture) as image:
        given = np.asarray(image).astype(float)
    error = np.abs(first - given).mean()
    assert error < 12  # the VAE's and the codec's
    assert error < 0.5 * np.abs(first - np.roll(given, 16, axis=1)).mean()  # and not a circle somewhere else


def test_pictures_from_cameras_and_drawing_programs(cli: ModuleType, tiny: Path, picture: Path, tmp_path: Path) -> None:
    """Lying on its side by EXIF, and transparent: a tall video, as the picture is looked at."""
    with Image.open(picture) as image:
        tall = image.crop((32, 0, 96, 128)).convert("RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° to look at it
    tall.rotate(90, expand=True).save(tmp_path / "tall.png", exif=exif)
    output = tmp_path / "a.mp4"
    arguments = words("i2v", tmp_path / "tall.png", "--output_filename", output, "--video_duration", "0.2")
    assert cli.main(arguments) == 0
    assert read(output).shape == (5, 176, 96, 3)


@pytest.fixture
def mistakes(tmp_path: Path, picture: Path) -> Path:
    (tmp_path / "text.png").write_text("no picture at all")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (640, 64)).save(tmp_path / "strip.png")
    shutil.copy(picture, tmp_path / "circle.png")
    return tmp_path


MISTAKES = [
    ("i2v", (), "which needs a picture: give --image FILE"),
    ("i2i", (), "which needs a picture: give --image FILE"),
    ("t2v", ("--image", "circle.png"), "t2v, which takes none"),
    ("t2i", ("--image", "circle.png"), "t2i, which takes none"),
    ("i2v", ("--image", "nothing.png"), "there is no image nothing.png"),
    ("i2i", ("--image", "text.png"), "can't read the image text.png"),
    ("i2v", ("--image", "."), "can't read the image ."),
    ("i2v", ("--image", "dot.png"), "1x1"),
    ("i2i", ("--image", "strip.png"), "640x64"),
    ("i2v", ("--image", "circle.png", "--width", "128"), "width and height belong together"),
    ("i2v", ("--image", "circle.png", "--width", "100", "--height", "128"), "width is 100"),
    ("t2i", ("--width", "256", "--height", "256"), "256x256 is not a size that this model draws: 128x128"),
    ("t2i", ("--video_duration", "2"), "makes images: leave the duration out"),
]


@pytest.mark.parametrize(("task", "more", "says"), MISTAKES, ids=[f"{t} {' '.join(m)}" for t, m, _ in MISTAKES])
def test_mistakes_are_one_line(
    cli: ModuleType, mistakes: Path, task: str, more: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(mistakes)
    monkeypatch.setattr("kandinsky.loading.assemble.load_pipeline", lambda *_, **__: pytest.fail("models were loaded"))
    assert cli.main(words(task, None, *more)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error: ") and says in line
    assert not (mistakes / "outputs").exists()
