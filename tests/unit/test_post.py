"""Outputs processed further: larger, with more frames, in bounded memory, for as long as before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from kandinsky.clips import open_clip, read_clip
from kandinsky.config.reading import load_config
from kandinsky.frames import wanted_frames
from kandinsky.models.upscaler import CompactUpscaler, upscaler_of
from kandinsky.outputs import media, post
from kandinsky.outputs.post import Frames, Post, interpolated, load_upscaler, process_file, processed, upscaled
from tests.unit.small_pipelines import build

REPOSITORY = Path(__file__).resolve().parents[2]
T2V, T2I = (REPOSITORY / "configs" / f"config_tiny_{task}.yaml" for task in ("t2v", "t2i"))


def moving(count: int = 9, width: int = 64, height: int = 48, step: int = 2) -> np.ndarray:
    """A soft bright square over a dark background, that goes right."""
    x, y = np.arange(width)[None, None, :], np.arange(height)[None, :, None]
    centre = 16 + step * np.arange(count)[:, None, None]
    inside = np.clip(10 - np.maximum(abs(x - centre), abs(y - height // 2)), 0, 1)[..., None]
    return (inside * np.array([220, 60, 40]) + (1 - inside) * np.array([20, 40, 90])).astype(np.uint8)


def frames_of(video: np.ndarray, fps: float = 24) -> Frames:
    return Frames(video, len(video), video.shape[2], video.shape[1], fps)


def network(scale: int = 4, convolutions: int = 2) -> CompactUpscaler:
    """Small, and random but near what it starts from."""
    torch.manual_seed(0)
    made = CompactUpscaler(8, convolutions, scale)
    with torch.no_grad():
        made.body[-1].weight.mul_(0.3)  # type: ignore[operator]
    return made.eval()


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("upscaler") / "small.safetensors"
    save_file(network().state_dict(), path)
    return path


def test_published_layout() -> None:
    """Of realesr-animevideov3: 18 convolutions, 17 PReLUs, 621,424 numbers."""
    made = CompactUpscaler()
    shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    assert shapes["body.0.weight"] == (64, 3, 3, 3) and shapes["body.1.weight"] == (64,)
    assert shapes["body.33.weight"] == (64,) and shapes["body.34.weight"] == (48, 64, 3, 3)
    assert len(shapes) == 18 * 2 + 17 and sum(p.numel() for p in made.parameters()) == 621_424 and made.reach == 18
    assert upscaler_of({**shapes}).scale == 4
    with pytest.raises(ValueError, match="are not those of Real-ESRGAN's small network"):
        upscaler_of({**shapes, "conv_first.weight": (64, 3, 3, 3)})
    with pytest.raises(ValueError, match="are not those"):
        upscaler_of({"body.x.weight": (1,)})


def test_starts_from_the_repeated_picture() -> None:
    made = network()
    torch.nn.init.zeros_(made.body[-1].weight)  # type: ignore[arg-type]
    torch.nn.init.zeros_(made.body[-1].bias)  # type: ignore[arg-type]
    x = torch.rand(1, 3, 5, 7)
    assert torch.equal(made(x), x.repeat_interleave(4, 2).repeat_interleave(4, 3))


@pytest.mark.parametrize("tile", [16, 23, 64])
@torch.no_grad()
def test_tiles_have_no_seams(tile: int) -> None:
    made, x = network(convolutions=3), torch.rand(1, 3, 50, 61)
    torch.testing.assert_close(made.in_tiles(x, tile), made(x), rtol=0, atol=1e-5)
    if tile < 50:  # a pixel less around them would show
        short = type("Short", (CompactUpscaler,), {"reach": made.reach - 1})(8, 3, 4)
        short.load_state_dict(made.state_dict())
        assert (short.in_tiles(x, tile) - made(x)).abs().max() > 1e-6


def test_larger(upscaler: Path) -> None:
    """By either way: the same picture, larger; by a network of scale 4 averaged down to 2."""
    frame = moving(1)[0]
    for way in (Post(upscale=2), Post(upscale=4), Post(upscale=2, upscaler=str(upscaler))):
        (large,) = upscaled([frame], way)
        assert large.shape == (48 * way.upscale, 64 * way.upscale, 3) and large.dtype == np.uint8
        small = np.asarray(Image.fromarray(large).resize((64, 48), Image.Resampling.BOX))
        assert abs(small.astype(int) - frame).mean() < (3 if way.upscaler is None else 60)
    by_hand = network()(torch.from_numpy(frame).permute(2, 0, 1)[None] / 255).clamp(0, 1)
    by_hand = torch.nn.functional.avg_pool2d(by_hand, 2)[0].permute(1, 2, 0).mul(255).round()
    (large,) = upscaled([frame], Post(upscale=2, upscaler=str(upscaler)))
    assert abs(large.astype(int) - by_hand.detach().numpy()).max() <= 1


def test_frames_between() -> None:
    """Twice as many in the same time: those there were stay, and between them the square is half way."""
    video = moving(9)
    made = interpolated(frames_of(video), 48)
    found = np.stack(list(made.frames))
    assert made.count == len(found) == 18 and made.fps == 48
    kept = abs(found[::2].astype(int) - video).mean((1, 2, 3))
    assert kept.max() < 2, kept
    red = found[1:15, ..., 0].astype(float) - 20
    centre = (red.sum(1) * np.arange(64)).sum(1) / red.sum((1, 2))
    assert abs(np.diff(centre) - 1).max() < 0.4, centre
    assert interpolated(frames_of(video), 30).count == 11


def test_an_error_of_the_source_is_told() -> None:
    def broken() -> Any:
        yield moving(1)[0]
        raise ValueError("the source broke")

    with pytest.raises(ValueError, match="the source broke"):
        list(interpolated(Frames(broken(), 9, 64, 48, 24), 48).frames)


def test_frame_after_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more frames are made than are asked for: a long video is never in memory as a whole."""
    asked = 0

    def endless() -> Any:
        nonlocal asked
        while True:
            asked += 1
            yield moving(1)[0]

    taken = iter(processed(Frames(endless(), 10**6, 64, 48, 24), Post(upscale=2)).frames)
    for _ in range(3):
        next(taken)
    assert asked == 3


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    media.write_video(moving(9), path, 24)
    media.write_sidecar(path, {"prompt": "a square", "seed": 3, "versions": {}, "num_frames": 9})
    return path


def test_command(clip: Path, upscaler: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both at once, on a file: rate, size and duration; the record has what was there and what was done."""
    output = tmp_path / "out.mp4"
    words = [str(clip), "--fps", "48", "--upscale", "2", "--upscaler", str(upscaler), "--output_filename", str(output)]
    assert post.main(words) == 0 and capsys.readouterr().out == f"{output}\n"
    made = open_clip(output, 48, 100)
    assert made.size == (128, 96) and made.frames == 18  # at 48 a second: 9 / 24 s, as before
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["prompt"] == "a square" and record["num_frames"] == 9 and record["source"] == str(clip)
    assert record["post"] == {
        "upscale": 2, "upscaled_by": str(upscaler), "width": 128, "height": 96, "fps": 48,
        "interpolated_by": "ffmpeg minterpolate", "frames": 18,
    }  # fmt: skip
    assert process_file(clip, Post(upscale=2)) == clip.with_name("clip_2x.mp4")
    large = read_clip(open_clip(clip.with_name("clip_2x.mp4"), 24, 100), 9, 64, 48)
    assert abs(large.astype(int) - moving(9)).mean() < 4


def read_count(path: Path) -> int:
    return imageio_ffmpeg.count_frames_and_secs(str(path))[0]


def test_any_rate_and_container(clip: Path, tmp_path: Path) -> None:
    """At its own rate, which is what a second is counted by; a file may leave frames out."""
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error"]
    for name, rate, words in (("a.gif", 10, ["-r", "10"]), ("b.mkv", 30000 / 1001, ["-r", "30000/1001"])):
        subprocess.run([*ffmpeg, "-i", str(clip), *words, str(tmp_path / name)], check=True)
        found = post.open_video(tmp_path / name)
        assert found.fps == pytest.approx(rate) and found.count == len(list(found.frames))
        assert abs(found.count - read_count(tmp_path / name)) <= 1


def test_a_picture(tmp_path: Path) -> None:
    Image.fromarray(moving(1)[0]).save(tmp_path / "a.png")
    output = process_file(tmp_path / "a.png", Post(upscale=4))
    assert output.name == "a_4x.png" and Image.open(output).size == (256, 192)
    assert json.loads(output.with_suffix(".json").read_text())["post"]["upscaled_by"] == "Lanczos"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "there is nothing to do: give --fps 48"),
        (["--upscale", "3"], "it must be 2 or 4"),
        (["--fps", "0"], "it must be from 1 to 240"),
        (["--fps", "48", "--upscaler", "x.safetensors"], "give --upscale 2 or 4"),
        (["--upscale", "2", "--upscaler", "missing.safetensors"], "there is no upscaler missing.safetensors"),
        (["--upscale", "2", "--output_filename", "{clip}"], "can't be its own result"),
        (["--upscale", "2", "--output_filename", "out.avi"], "call it"),
        (["--upscale", "2", "--device", "banana"], "'banana' is not a device: use cpu, cuda or cuda:0"),
        (["--fps", "241"], "it must be from 1 to 240"),
    ],
)
def test_refused_in_one_line(words: list[str], says: str, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert post.main([str(clip), *(word.format(clip=clip) for word in words)]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "the following arguments are required: file (python -m kandinsky.outputs.post --help shows every flag)"),
        (["a.mp4", "--upscale", "two"], "argument --upscale: invalid int value: 'two'"),
    ],
)
def test_flags_are_refused_in_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        post.main(words)
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.startswith(f"error: {says}") and told.count("\n") == 1


def test_an_upscaler_on_a_device_that_is_not_there(upscaler: Path) -> None:
    with pytest.raises(ValueError, match=r"the upscaler can't be brought to xpu: .*; use cpu"):
        load_upscaler(upscaler, "xpu")


def test_rates_are_the_same_everywhere() -> None:
    """1 to 240, also fewer than there are; a config's are those of the file."""
    for fps in (1, 12, 24, 240):
        assert load_config(T2V, [f"runtime.fps={fps}"]).runtime.fps == fps
        post.check(Post(fps), is_picture=False)
    for fps in (0, 241):
        with pytest.raises(ValueError, match="1 to 240"):
            load_config(T2V, [f"runtime.fps={fps}"])
        with pytest.raises(ValueError, match="1 to 240"):
            post.check(Post(fps), is_picture=False)
    fewer = interpolated(frames_of(moving(12)), 12)
    assert fewer.count == len(list(fewer.frames)) == 6


def test_files_that_are_none(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    Image.fromarray(moving(1)[0]).save(tmp_path / "a.png")
    Image.fromarray(moving(1)[0]).save(tmp_path / "a.jpg")
    (tmp_path / "folder.png").mkdir()
    for words, says in (
        (["text.mp4", "--upscale", "2"], "can't read the video"),
        (["text.mp4", "--upscale", "2"], "or MPEG file, or with --upscale a PNG"),
        ([".", "--upscale", "2"], "is a folder: give a video, or with --upscale a PNG"),
        (["folder.png", "--upscale", "2"], "is a folder: give a video, or with --upscale a PNG"),
        (["a.jpg", "--upscale", "2"], "a.jpg is a picture that is no PNG: save it as one"),
        (["missing.mp4", "--upscale", "2"], "there is no video"),
        (["a.png", "--fps", "48"], "a picture has no frames a second"),
        ([str(clip), "--upscale", "2", "--upscaler", str(tmp_path / "other.safetensors")], "are not those of Real"),
    ):
        assert post.main([str(tmp_path / words[0]), *words[1:]]) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1, said


def test_a_pickle_is_refused_and_converted(tmp_path: Path) -> None:
    """With the command that makes a file of it that is read; which runs nothing that stands in it."""
    made = network()
    torch.save({"params": made.state_dict()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"is a pickle.*python tools/convert_upscaler\.py .*a\.pth makes"):
        load_upscaler(tmp_path / "a.pth", "cpu")
    from tools import convert_upscaler

    assert convert_upscaler.main([str(tmp_path / "a.pth")]) == 0
    read = load_upscaler(tmp_path / "a.safetensors", "cpu")
    x = torch.rand(1, 3, 9, 9)
    assert torch.equal(read(x), made(x)) and read.scale == 4

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"params": Evil()}, tmp_path / "evil.pth")
    assert convert_upscaler.main([str(tmp_path / "evil.pth")]) == 2
    assert not (tmp_path / "ran").exists() and not (tmp_path / "evil.safetensors").exists()


def test_of_a_run(tmp_path: Path) -> None:
    """The file is processed, and what the call returns is not; the record says so."""
    pipe = build("t2v")
    pipe.config = load_config(T2V, ["runtime.fps=48", "runtime.upscale=2"])
    pixels = pipe("a cat", num_frames=5, width=32, height=32, save_path=tmp_path / "a.mp4", seed=1)  # type: ignore[operator]
    assert pixels.shape == (1, 3, 5, 32, 32)
    clip = open_clip(tmp_path / "a.mp4", 48, 100)
    assert clip.size == (64, 64) and clip.frames == 10
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["post"]["fps"] == 48 and record["width"] == 32 and record["config"]["runtime"]["upscale"] == 2


def test_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match=r"runtime\.fps = 48 is not allowed: it must be left out for task t2i"):
        load_config(T2I, ["runtime.fps=48"])
    with pytest.raises(ValueError, match=r"runtime.upscaler = 'x' is not allowed: it must be left out, or with"):
        load_config(T2V, ["runtime.upscaler=x"])
    with pytest.raises(ValueError, match=r"runtime\.upscale = 3"):
        load_config(T2V, ["runtime.upscale=3"])
    with pytest.raises(ValueError, match="a picture has no frames a second"):
        wanted_frames(load_config(T2V, ["runtime.fps=48"]), 0)
    with pytest.raises(ValueError, match="a picture has no frames a second"):
        wanted_frames(load_config(T2V, ["runtime.fps=48"]), num_frames=1)


def test_needs_no_torch_without_a_network(clip: Path) -> None:
    code = (
        "import sys; from kandinsky.outputs import post; "
        f"assert post.main([{str(clip)!r}, '--upscale', '2']) == 0; print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "False"
