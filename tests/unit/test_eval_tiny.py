"""The scores of the tiny checkpoints, with callables that draw instead of models: right is right and wrong is wrong."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import kandinsky
from tools import contact_sheet, eval_tiny, tiny_world
from tools.eval_tiny import Case, evaluate, make_cases, score
from tools.tiny_world import Scene, measure_picture, parse_caption, parse_picture_caption, render, render_picture

SIZE = 64


def as_video(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames.copy()).permute(3, 0, 1, 2)


def draw_clip(text: str, seed: int, picture: Image.Image | None = None) -> torch.Tensor:
    """The clip that was asked for. It starts with the given picture, as place and size come from the seed."""
    return as_video(render(tiny_world.scene_for(parse_caption(text), np.random.default_rng(seed)), 13, SIZE))


def draw_picture(text: str, seed: int) -> Image.Image:
    look = parse_picture_caption(text)
    return Image.fromarray(render_picture(tiny_world.picture_for(look, np.random.default_rng(seed)), SIZE))


def edit_picture(text: str, seed: int, picture: Image.Image) -> Image.Image:
    """Does what the instruction says, from the instruction and the given pixels alone."""
    seen = measure_picture(np.asarray(picture))
    _, after = tiny_world.parse_instruction(text)
    look = [getattr(after, name) or getattr(seen, name) for name in tiny_world.Look._fields]
    place = {name: seen.diagnostics[name] for name in ("x", "y", "radius")}
    return Image.fromarray(render_picture(Scene(look[0], look[1], "still", look[2], **place), SIZE))


DRAWN: dict[str, Callable[..., Any]] = {
    "t2v": draw_clip,
    "i2v": draw_clip,
    "t2i": draw_picture,
    "i2i": edit_picture,
}


# --- cases ---


@pytest.mark.parametrize("task", eval_tiny.TASKS)
@pytest.mark.parametrize("split", ["test", "train"])
def test_cases_are_fixed_and_of_their_split(task: str, split: str) -> None:
    cases = make_cases(task, 40, seed=3, split=split)
    assert cases == make_cases(task, 40, seed=3, split=split)
    assert [case.seed for case in cases] == list(range(3, 43))
    held_out = {"t2v": tiny_world.test_combinations(), "t2i": tiny_world.test_looks()}
    for case in cases:
        if case.source is not None:
            assert tiny_world.edit_split(case.source.look, case.wanted.look) == split
        else:
            assert (case.asked in held_out["t2i" if task == "t2i" else "t2v"]) == (split == "test")
    if task == "i2i":
        kinds = [tiny_world.edit_kind(case.source.look, case.wanted.look) for case in cases if case.source]
        assert kinds[:7] == kinds[7:14] == list(tiny_world.EDIT_KINDS)
    else:
        assert len({case.asked for case in cases}) == (16 if (task, split) == ("t2i", "test") else 40)


def test_unknown_tasks_and_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="t2v, i2v, t2i, i2i"):
        make_cases("v2v", 1)
    with pytest.raises(ValueError, match="'train' or 'test'"):
        make_cases("t2v", 1, split="validation")


# --- what is drawn as asked is all right ---


@pytest.mark.parametrize(("task", "num"), [("t2v", 8), ("i2v", 8), ("t2i", 32), ("i2i", 42)])
@pytest.mark.parametrize("split", ["test", "train"])
def test_what_is_drawn_as_asked_scores_100_percent(task: str, num: int, split: str) -> None:
    report, results = evaluate(DRAWN[task], num, task=task, split=split, size=SIZE)
    assert report["all_right"] == report["num"] == num and set(report["percent"].values()) == {100.0}
    assert not any(report["wrong"].values())
    assert all(sample["text"] == result.case.text for sample, result in zip(report["samples"], results, strict=True))
    names = {
        "t2v": ["shape", "colour", "motion", "background"],
        "i2v": ["shape", "colour", "motion", "background"],
        "t2i": ["shape", "colour", "background"],
        "i2i": ["shape", "colour", "background", "place", "size", "edit", "rest"],
    }
    assert list(report["right"]) == names[task]
    if task == "i2v":  # it starts with exactly the given picture
        assert report["first_frame_psnr"]["worst"] == float("inf")
    if task == "i2i":
        assert {tuple(counts) for counts in report["kinds"].values()} == {(6, 6)}


def test_targets_at_full_size_are_all_right() -> None:
    for case in make_cases("i2i", 70):
        right, _ = score(render_picture(case.wanted)[None], case)
        assert all(right.values()), case


# --- what is not as asked is wrong, and nothing else is ---


def test_an_unedited_picture_is_no_edit() -> None:
    report, _ = evaluate(lambda text, seed, picture: picture, 42, task="i2i", size=SIZE)
    assert report["right"]["edit"] == 0 == report["all_right"]
    assert report["right"]["rest"] == report["right"]["place"] == report["right"]["size"] == 42


def test_half_an_edit_is_no_edit() -> None:
    case = next(c for c in make_cases("i2i", 7) if c.source and len(edit_kind_of(c)) == 2)
    assert case.source is not None
    changed = edit_kind_of(case)[0]
    look = case.source.look._replace(**{changed: getattr(case.wanted.look, changed)})
    half = Scene(look.shape, look.colour, "still", look.background, case.source.x, case.source.y, case.source.radius)
    right, _ = score(render_picture(half, SIZE)[None], case)
    assert right[changed] and not right["edit"] and right["rest"]


def edit_kind_of(case: Case) -> tuple[str, ...]:
    assert case.source is not None
    return tiny_world.edit_kind(case.source.look, case.wanted.look)


def edited(**place: float) -> dict[str, bool]:
    """What scores right where a red circle was to become blue, and is blue at this place and in this size."""
    source = Scene("circle", "red", "still", "white")
    case = Case("i2i", "make the circle blue", 0, Scene("circle", "blue", "still", "white"), source)
    return score(render_picture(Scene("circle", "blue", "still", "white", **place), SIZE)[None], case)[0]


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        ({}, set()),
        ({"x": 0.55}, set()),
        ({"x": 0.58}, {"place", "rest"}),
        ({"x": 0.55, "y": 0.45}, {"place", "rest"}),  # 7 % away
        ({"radius": 0.23}, set()),
        ({"radius": 0.25}, {"size", "rest"}),
        ({"radius": 0.155}, {"size", "rest"}),
    ],
)
def test_an_object_that_moved_or_grew_is_not_the_rest_unchanged(place: dict[str, float], wrong: set[str]) -> None:
    assert {name for name, ok in edited(**place).items() if not ok} == wrong


def test_an_edit_that_changes_something_else_too() -> None:
    source = Scene("circle", "red", "still", "white")
    case = Case("i2i", "make the circle blue", 0, Scene("circle", "blue", "still", "white"), source)
    right, _ = score(render_picture(Scene("circle", "blue", "still", "navy"), SIZE)[None], case)
    assert [name for name, ok in right.items() if not ok] == ["background", "rest"]
    right, _ = score(np.full((1, SIZE, SIZE, 3), 240, np.uint8), case)  # the object is gone
    assert [name for name, ok in right.items() if ok] == ["background"]


def test_a_clip_that_moves_otherwise_or_starts_otherwise() -> None:
    def backwards(text: str, seed: int, picture: Image.Image) -> torch.Tensor:
        return draw_clip(text, seed).flip(1)

    report, results = evaluate(backwards, 8, task="i2v", size=SIZE)
    same = sum(result.case.wanted.motion in ("still", "bounce") for result in results)  # the same backwards
    assert 0 < same < 8
    assert report["right"] == {"shape": 8, "colour": 8, "motion": same, "background": 8}
    assert report["all_right"] == same and sum(report["wrong"]["motion"].values()) == 8 - same
    assert report["first_frame_psnr"]["worst"] < 25

    case = results[0].case
    other = case.wanted.look._replace(colour="red" if case.wanted.colour != "red" else "blue")
    frames = render(Scene(other.shape, other.colour, case.wanted.motion, other.background), 13, SIZE)
    assert [name for name, ok in score(frames, case)[0].items() if not ok] == ["colour"]


def test_a_picture_of_something_else_is_counted() -> None:
    report, _ = evaluate(lambda text, seed: draw_picture("a red circle on a white background", seed), 16, task="t2i")
    assert report["right"]["shape"] == 4 and report["right"]["colour"] == 2 and report["all_right"] == 0
    assert report["wrong"]["colour"]["blue -> red"] == 2
    assert "all of these" in eval_tiny.format_table(report)


# --- the command ---


class DrawingPipeline:
    def __init__(self, task: str) -> None:
        self.task = task
        self.config = types.SimpleNamespace(task=task, generation=types.SimpleNamespace(width=SIZE))
        self.overrides: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.vae = IdentityVAE()

    def __call__(self, *, text: str, seed: int, progress: bool, save_path: Path | None = None, **options: Any) -> Any:
        assert progress is False
        self.calls.append(options)
        picture = (options["image"],) if "image" in options else ()
        output = DRAWN[self.task](text, seed, *picture)
        skipped = 3 * len(self.overrides)
        if skipped and isinstance(output, torch.Tensor):  # every pixel above 0 is a level darker
            output = output - output.clamp(max=1)
        elif skipped:
            output = output.point(lambda level: max(level - 1, 0))
        if save_path is not None:
            assert save_path.suffix == (".mp4" if self.task in ("t2v", "i2v") else ".png")
            record = {"evaluations": {"all": 8, "skipped": skipped}, "seconds": {"denoise": 4.0 / (1 + skipped)}}
            save_path.with_suffix(".json").write_text(json.dumps(record))
        return output[None] if isinstance(output, torch.Tensor) else [output]


class IdentityVAE:
    """Off by one level in 255, everywhere."""

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])

    def encode(self, x: torch.Tensor, tiling: object = None) -> Any:
        assert x.shape[:2] == (1, 3) and x.min() >= -1 and x.max() <= 1
        assert (tiling is None) == (x.dim() == 4)
        return types.SimpleNamespace(mode=lambda: x)

    def decode(self, z: torch.Tensor, tiling: object = None) -> torch.Tensor:
        return z + 1 / 127.5


@pytest.fixture(params=eval_tiny.TASKS)
def pipe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> DrawingPipeline:
    """Stands for the pipeline of its task, and for the config that names the task."""
    made = DrawingPipeline(request.param)

    def load_config(path: str, overrides: list[str]) -> Any:
        made.overrides = list(overrides)
        return made.config

    def get_pipeline(device_map: str, config: Any) -> Any:
        assert config is made.config
        return made

    monkeypatch.setattr(kandinsky, "load_config", load_config, raising=False)
    monkeypatch.setattr(kandinsky, f"get_{made.task.upper()}_pipeline", get_pipeline, raising=False)
    return made


def test_the_config_chooses_pipeline_and_score(
    pipe: DrawingPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, sheet = tmp_path / "report.json", tmp_path / "sheet.png"
    options = ["--num", "4", "--guidance_weight", "3", "--split", "train"]
    eval_tiny.main([*options, "--output", str(output), "--sheet", str(sheet)])
    assert len(pipe.calls) == 4 and all(call["guidance_weight"] == 3 for call in pipe.calls)
    report = json.loads(output.read_text())
    assert (report["task"], report["split"], report["options"]) == (pipe.task, "train", {"guidance_weight": 3.0})
    assert report["all_right"] == 4 and len(report["samples"]) == 4
    out = capsys.readouterr().out
    assert "4/4" in out and ("first frame" in out) == (pipe.task == "i2v")
    with Image.open(sheet) as drawn:
        tiles = {"t2v": 7, "i2v": 8, "t2i": 4, "i2i": 9}[pipe.task]  # frames, the given and the wanted picture
        assert drawn.width // SIZE == tiles


def test_a_case_with_other_settings_too(
    pipe: DrawingPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report.json"
    others = ["--against", "magcache.enabled=true", "--against", "model.guidance_every=2", "model.num_steps=8"]
    eval_tiny.main(["--num", "2", "--output", str(output), *others])
    assert len(pipe.calls) == 6 and not list(tmp_path.glob("*.mp4"))
    report = json.loads(output.read_text())
    assert [other["overrides"] for other in report["against"]] == [
        ["magcache.enabled=true"],
        ["model.guidance_every=2", "model.num_steps=8"],
    ]
    for other, ran, seconds in zip(report["against"], (5.0, 2.0), (1.0, 4 / 7), strict=True):
        assert other["all_right"] == 2
        assert other["comparison"]["psnr"]["mean"] == pytest.approx(20 * math.log10(255), abs=0.3)
        assert other["comparison"]["evaluations"] == [8.0, ran]
        assert other["comparison"]["seconds"] == [4.0, seconds]
    out = capsys.readouterr().out
    assert out.count("all of these") == 3
    assert "with magcache.enabled=true:" in out and "with model.guidance_every=2 model.num_steps=8:" in out
    assert "model evaluations: 5 instead of 8, 37.5 % saved" in out
    assert "model evaluations: 2 instead of 8, 75.0 % saved" in out


def test_the_vae_alone(pipe: DrawingPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    eval_tiny.main(["--vae", "2", "--vae_size", str(SIZE)])
    assert not pipe.calls
    out = capsys.readouterr().out
    assert "PSNR: mean 48.13 dB, worst 48.13 dB" in out  # 20 log10(255), an error of one level
    assert ("motion" in out) == (pipe.task in ("t2v", "i2v"))
    assert "2/2" in out


def test_the_sheet_for_the_readme(pipe: DrawingPipeline, tmp_path: Path) -> None:
    contact_sheet.main(["--held_out", "2", "--columns", "1", "--output", str(tmp_path / "sheet.png")])
    tiles = {"t2v": 7, "i2v": 8, "t2i": 1, "i2i": 2}[pipe.task]
    with Image.open(tmp_path / "sheet.png") as drawn:
        assert drawn.width // SIZE == tiles and drawn.height > 2 * SIZE


@pytest.mark.parametrize(("given", "pictures"), [("last", 2), ("loop", 1)])
def test_the_sheet_of_given_frames(
    given: str, pictures: int, pipe: DrawingPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pictures that are given stand before what is made of them; they are the caption's first and last frame."""
    words = ["--held_out", "1", "--given", given, "--output", str(tmp_path / "sheet.png")]
    if pipe.task != "i2v":
        with pytest.raises(SystemExit):
            contact_sheet.main(words)
        assert f"--given {given} is for i2v configs" in capsys.readouterr().err
        return
    contact_sheet.main(words)
    wanted = tiny_world.render(eval_tiny.make_cases("i2v", 1)[0].wanted, 25, SIZE)
    (call,) = pipe.calls
    assert np.array_equal(call["image"], wanted[0])
    assert call.get("loop", False) == (given == "loop")
    assert given == "loop" or np.array_equal(call["last_image"], wanted[-1])
    with Image.open(tmp_path / "sheet.png") as drawn:
        assert drawn.width // SIZE == 7 + pictures


def test_zero_cases_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        eval_tiny.main(["--num", "0"])
    assert "--num must be at least 1, got 0" in capsys.readouterr().err
