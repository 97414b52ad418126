"""What sampling starts from, by the command line; and an encoder that streams makes the same video."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import imageio.v2 as imageio
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from kandinsky.models.upscaler import CompactUpscaler
from tools import tiny_world

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "config_tiny_t2v.yaml"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Nine frames: green on the left, purple on the right."""
    frames = np.full((9, 64, 64, 3), (40, 160, 60), dtype=np.uint8)
    frames[:, :, 32:] = (120, 40, 140)
    imageio.mimwrite(tmp_path / "source.mp4", list(frames), fps=24, macro_block_size=8)
    return tmp_path / "source.mp4"


def run(cli: ModuleType, output: Path, *more: object) -> np.ndarray:
    words = ["--config", CONFIG, "--prompt", "a red circle", "--seed", 1, "--sample_steps", 4, "--video_duration", 0.34]
    words += ["--width", 64, "--height", 64, "--output_filename", output, *more]
    assert cli.main([str(word) for word in words]) == 0
    with imageio.get_reader(output, format="FFMPEG") as reader:
        return np.stack(list(reader.iter_data())).astype(np.int32)


def test_from_a_video_in_part(cli: ModuleType, tiny: Path, tmp_path: Path) -> None:
    """Strength 0 is the source; a mask keeps its black half of it, and the white half is another thing. What the source
    shows is of the tiny VAE's world, which can't decode anything else."""
    frames = np.full((9, 64, 64, 3), tiny_world.BACKGROUNDS["navy"], dtype=np.uint8)
    frames[:, 24:44, 42:62] = tiny_world.COLOURS["blue"]
    source = tmp_path / "source.mp4"
    imageio.mimwrite(source, list(frames), fps=24, macro_block_size=8)
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:, 40:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    kept = run(cli, tmp_path / "kept.mp4", "--video", source, "--strength", 0)
    half = run(cli, tmp_path / "half.mp4", "--video", source, "--strength", 1, "--mask", tmp_path / "mask.png")
    record = json.loads((tmp_path / "half.json").read_text())
    assert record["strength"] == 1 and record["conditions"]
    whole = run(cli, tmp_path / "whole.mp4", "--video", source, "--strength", 1)
    left, right = np.s_[..., 4:24, :], np.s_[..., 48:, :]
    assert abs(kept[left] - half[left]).mean() < min(8, 0.1 * abs(kept[left] - whole[left]).mean())
    assert abs(kept[right] - half[right]).mean() > 12


def test_an_encoder_that_streams(cli: ModuleType, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for how in ("off", "on"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / how))  # what one has encoded is not the other's
        made.append(run(cli, tmp_path / f"{how}.mp4", "--stream_encoders", how))
        assert json.loads((tmp_path / f"{how}.json").read_text())["config"]["runtime"]["stream_encoders"] == how
    assert np.array_equal(*made)


def test_given_frames(cli: ModuleType, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The last one and one between are what is given; a loop is shorter by the frame that would come twice."""
    for name, colour in (("first", "red"), ("between", "lime"), ("last", "blue")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    i2v = ["--config", CONFIG.with_name("config_tiny_i2v.yaml"), "--image", tmp_path / "first.png"]
    keyframe = f"0.17:{tmp_path / 'between.png'}"
    video = run(cli, tmp_path / "a.mp4", *i2v, "--keyframe", keyframe, "--last_image", tmp_path / "last.png")
    assert [int(video[i].mean((0, 1)).argmax()) for i in (0, 4, -1)] == [0, 1, 2]
    record = json.loads((tmp_path / "a.json").read_text())
    assert [one["frame"] for one in record["conditions"]] == [0, 1, 2] and not record["loop"]
    assert len(run(cli, tmp_path / "b.mp4", *i2v, "--loop")) == 8
    assert "experimental" in caplog.text and json.loads((tmp_path / "b.json").read_text())["loop"]


def test_given_frames_that_were_learnt(cli: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A clip between two frames of a drawn one passes through its middle, and ends where that ends."""
    scene = tiny_world.Scene("square", "yellow", "right", "navy")
    clip = tiny_world.render(scene)
    for name, i in (("first", 0), ("last", -1)):
        Image.fromarray(clip[i]).save(tmp_path / f"{name}.png")
    words = ["--config", CONFIG.with_name("config_tiny_flf.yaml"), "--width", 128, "--height", 128]
    words += ["--image", tmp_path / "first.png", "--last_image", tmp_path / "last.png", "--video_duration", 1]
    video = run(cli, tmp_path / "a.mp4", *words, "--sample_steps", 8, "--prompt", tiny_world.caption(scene))
    for i in (0, 12, -1):
        ours, theirs = (tiny_world.measure_picture(frame) for frame in (video[i].astype(np.uint8), clip[i]))
        assert (ours.shape, ours.colour, ours.background) == ("square", "yellow", "navy"), i
        assert abs(ours.diagnostics["x"] - theirs.diagnostics["x"]) < 0.06, i
    assert "experimental" not in caplog.text
    conditions = json.loads((tmp_path / "a.json").read_text())["conditions"]
    assert {one["name"]: one["hold"] for one in conditions} == {"first frame": "clean", "last frame": "no"}


def test_processed_further(cli: ModuleType, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file has more and larger frames and lasts as long; an upscaler that is none is told before anything loads."""
    network = CompactUpscaler(channels=4, convolutions=1, scale=2)
    save_file(network.state_dict(), tmp_path / "small.safetensors")
    words = ["--fps", 48, "--upscale", 2, "--upscaler", tmp_path / "small.safetensors"]
    assert run(cli, tmp_path / "a.mp4", *words).shape == (2 * 9, 128, 128, 3)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["post"]["upscaled_by"] == str(tmp_path / "small.safetensors") and record["post"]["frames"] == 18
    (tmp_path / "small.safetensors").write_bytes(b"none")
    capsys.readouterr()
    wrong = ["--config", CONFIG, "--prompt", "a", "--output_filename", tmp_path / "b.mp4", *words]
    assert cli.main([str(word) for word in wrong]) == 2
    said = capsys.readouterr().err
    assert f"the upscaler {tmp_path / 'small.safetensors'}" in said and said.count("\n") == 1, said


def test_a_video_that_goes_on(cli: ModuleType, tiny: Path, source: Path, tmp_path: Path) -> None:
    """Longer by nothing is the plain run, to the byte; by a file of segments, from a clip; with its last frame."""
    run(cli, tmp_path / "plain.mp4")
    run(cli, tmp_path / "same.mp4", "--extend", 0, "--save_last_frame")
    assert (tmp_path / "plain.mp4").read_bytes() == (tmp_path / "same.mp4").read_bytes()
    assert Image.open(tmp_path / "same.last.png").size == (64, 64)
    longer = run(cli, tmp_path / "longer.mp4", "--extend", 0.34, "--overlap", 5, "--upscale", 2)  # twice 4 frames
    assert len(longer) == 9 + 8 and longer.shape[1:] == (128, 128, 3)
    assert json.loads((tmp_path / "longer.json").read_text())["post"]["upscaled_by"] == "Lanczos"
    (tmp_path / "segments.yaml").write_text(
        "- {prompt: a cat, seconds: 0.2}\n- {prompt: a dog, seconds: 0.2, seed: 7}\n"
    )
    words = ["--config", CONFIG, "--video", source, "--segments", tmp_path / "segments.yaml", "--seed", 1]
    words += ["--width", 64, "--height", 64, "--sample_steps", 2, "--save_last_frame", "--no_colour_match"]
    assert cli.main([str(word) for word in (*words, "--output_filename", tmp_path / "all.mp4")]) == 0
    record = json.loads((tmp_path / "all.json").read_text())
    assert record["num_frames"] == 9 + 4 + 4 and record["extended"]["from"] == str(source)
    assert [one["seed"] for one in record["extended"]["segments"]] == [1, 7]
    assert not any(one["corrected"] for one in record["extended"]["segments"])
    assert Image.open(tmp_path / "all.last.png").size == (64, 64)


VIDEO, PICTURE, ROWS = ("--video", "source.mp4"), ("--image", "picture.png"), ("--prompts_file", "rows.txt")
# (configs of these tasks, what is given, what is said)
APART = [
    ("t2v", ("--strength", "0.5"), "give --video FILE"),
    ("t2v", ("--mask", "picture.png"), "give --video FILE"),
    ("t2v", (*VIDEO, "--strength", "2"), "must be from 0"),
    ("t2v", (*VIDEO, "--strength", "0.5", "--extend", "1"), "--strength is about one video that is changed"),
    ("t2v", (*VIDEO, "--mask", "picture.png", "--extend", "1"), "--mask is about one video"),
    ("t2v", (*VIDEO, "--extend", "0"), "adds nothing"),
    ("t2v", (*VIDEO, *PICTURE, "--extend", "1"), "--video's last frame"),
    ("t2v i2v", (*VIDEO, "--extend", "-1"), "a number of seconds from 0 to 21000"),
    ("t2v", ("--extend", "1e6"), "--extend is 1000000.0; it must be a number of seconds from 0 to 21000"),
    ("t2v", ("--extend", "1", "--overlap", "505"), "4n . 1 frames up to 501, fewer than a segment has"),
    ("t2v i2v", (*VIDEO, "--extend", "0.1"), "the least that can be added"),
    ("t2v i2v", (*VIDEO, "--extend", "1", "--overlap", "2"), "4n . 1 frames"),
    ("t2v i2v", (*VIDEO, "--extend", "1", "--overlap", "13"), "there are 9"),
    ("t2v i2v", (*VIDEO, "--extend", "1", "--video_duration", "0"), "makes a picture"),
    ("t2v i2v", (*VIDEO, "--extend", "1", "--width", "64"), "give both, or neither"),
    ("t2v i2v", (*VIDEO, "--extend", "1", "--resume"), "name it with --output_filename"),
    ("t2v i2v", ("--video", "text.mp4", "--extend", "1"), "can't read the video"),
    ("i2v", ("--extend", "1"), "needs a picture"),
    ("i2v", VIDEO, "a video from a picture takes --image"),
    ("i2v", (*PICTURE, "--strength", "0.5"), "i2v configs have none"),
    ("i2v", (*PICTURE, "--mask", "picture.png"), "i2v configs have none"),
    ("i2v i2i", (), "needs a picture"),
    ("i2v", (*PICTURE, "--loop", "--last_image", "picture.png"), "leave the last picture out, or the loop"),
    ("i2v", (*PICTURE, "--keyframe", "picture.png"), "it must be SECONDS:FILE"),
    ("i2v", (*PICTURE, "--keyframe", "9:picture.png"), "keyframe at 9.0 s is not in the video"),
    ("i2v", (*PICTURE, "--keyframe", "-1:picture.png"), "expected one argument, SECONDS:FILE, with a time in the vid"),
    ("i2v", (*PICTURE, "--keyframe=-1:picture.png"), "keyframe at -1.0 s is not in the video: give one from 0.04"),
    ("i2v", (*PICTURE, "--last_image", "text.mp4"), "the last frame: "),
    ("i2v", (*PICTURE, "--loop", "--extend", "1"), "--loop is about one video"),
    ("t2v", ("--loop",), "a loop goes with i2v configs"),
    ("t2v t2i", ("--last_image", "picture.png"), "a last picture goes with i2v configs"),
    ("i2i", (*PICTURE, "--keyframe", "1:picture.png"), "a keyframe goes with i2v configs"),
    ("t2v i2v t2i i2i", (*ROWS, "--loop"), "leave --prompts_file or --loop out"),
    ("t2v", PICTURE, "takes none: leave the picture out, or take an i2v config"),
    ("t2i", PICTURE, "takes none: .*an i2i config, which edits it, or give a strength below 1 to start from it"),
    ("t2i i2i", ("--extend", "1"), "makes videos longer"),
    ("t2i i2i", ("--segments", "rows.txt"), "makes videos longer"),
    ("t2i i2i", (*VIDEO,), "it makes pictures"),
    ("t2i i2i", (*PICTURE, "--strength", "1", "--save_last_frame"), "makes a picture|i2i configs have none"),
    ("t2v", ("--video_duration", "0", "--save_last_frame"), "makes a picture"),
    ("i2i", (*PICTURE, "--mask", "picture.png"), "i2i configs have none"),
    ("t2i", ("--mask", "picture.png"), "give --image FILE"),
    ("t2v i2v", ("--segments", "image.csv"), "and no image$"),
    ("t2v i2v", ("--segments", "typo.yaml"), r"typo.yaml, row 2 \(line 2\): a segment has .* no promt; did you mean p"),
    ("t2v i2v", ("--segments", "typo.jsonl"), r"typo.jsonl, row 1 \(line 1\): .* no secnds; did you mean seconds"),
    ("t2v i2v", ("--segments", "bare.yaml"), r"bare.yaml, row 1 \(line 1\): there is no prompt: say what to show"),
    ("t2v i2v", ("--segments", "seed.yaml"), r"seed.yaml, row 1 \(line 1\): the seed is -1"),
    ("t2v i2v", ("--segments", "long.yaml"), r"long.yaml, row 1 \(line 1\): a segment of 30.00 s is asked for"),
    ("t2v i2v", ("--segments", "missing.txt"), "No such file"),
    ("t2v i2v t2i i2i", ("--overlap", "5"), "give --extend SECONDS or --segments"),
    ("t2v i2v t2i i2i", ("--no_colour_match",), "give --extend SECONDS or --segments"),
    ("t2v i2v t2i i2i", ("--resume",), "give --prompts_file, or for a video of segments --extend or --segments"),
    ("t2v", ("--cache", "off", "--magcache"), "--magcache. switches .*--cache off. all"),
    ("t2v", ("magcache.enabled=true", "--cache", "off"), "leave one of the two out"),
    ("t2v i2v t2i i2i", ("--segments", "rows.txt", "--extend", "1"), "leave --extend out"),
    ("t2v i2v t2i i2i", (*ROWS, "--extend", "1"), "leave --extend or --prompts_file out"),
    ("t2v i2v t2i i2i", (*ROWS, "--save_last_frame"), "leave --save_last_frame or --prompts_file out"),
    ("t2v i2v t2i i2i", ("--plan", "--save_last_frame"), "leave --save_last_frame or --plan out"),
    ("t2i i2i", ("--plan", "--extend", "1"), "makes videos longer"),
    ("t2v i2v", ("--plan", *VIDEO, "--extend", "0"), "adds nothing"),
    ("t2v", ("--extend", "a.mp4"), "'a.mp4' is not how many seconds are to be added, like 2.5"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "words", "says"), [(task, words, says) for tasks, words, says in APART for task in tasks.split()]
)
def test_what_does_not_go_together_is_one_line(
    task: str,
    words: tuple[str, ...],
    says: str,
    cli: ModuleType,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything loads: nothing here has a pipeline."""
    import kandinsky.loading.assemble as assemble

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assemble, "load_pipeline", lambda *_, **__: pytest.fail("it was loaded"))
    Image.new("RGB", (64, 64)).save("picture.png")
    Path("text.mp4").write_text("no video")
    Path("rows.txt").write_text("a cat\n")
    Path("image.csv").write_text("prompt,image\na cat,picture.png\n")
    Path("typo.yaml").write_text("- a cat\n- {promt: a dog}\n")
    Path("typo.jsonl").write_text('{"prompt": "a cat", "secnds": 2}\n')
    for name, row in (
        ("bare", "{seconds: 1}"),
        ("seed", "{prompt: a, seed: -1}"),
        ("long", "{prompt: a, seconds: 30}"),
    ):
        Path(f"{name}.yaml").write_text(f"- {row}\n")
    prompt = () if {"--prompts_file", "--segments"} & set(words) else ("--prompt", "a red circle")
    try:
        status = cli.main(["--config", str(CONFIG.with_name(f"config_tiny_{task}.yaml")), *prompt, *words])
    except SystemExit as stop:
        status = int(str(stop.code))
    told = capsys.readouterr().err
    assert status == 2 and re.search(says, told), told
    assert len(told.splitlines()) == 1 and told.startswith("error: ")
