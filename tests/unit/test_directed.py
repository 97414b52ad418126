"""Sampling that starts from a video or a picture, wholly or in part: its ends are what they should be, to the bit."""

from __future__ import annotations

import json
import subprocess
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from kandinsky import clips
from kandinsky.clips import iterate_clip, open_clip, read_clip, stream_clip
from kandinsky.outputs.media import write_video
from kandinsky.outputs.resume import Stopped, load_run
from kandinsky.outputs.sources import read_mask
from kandinsky.pipelines.base import Pipeline
from kandinsky.pipelines.inputs import Inputs
from kandinsky.request import FPS, resolve_request
from kandinsky.sampling.conditioning import Item, compose, frame_item, latent_mask
from tests.limits import PATIENCE
from tests.unit.small_pipelines import PICTURE, build, latents_of

FRAMES = np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
STEPS = {"num_steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of five frames as MP4 and as a folder, a picture, and masks: black, white, and white on the right."""
    path = tmp_path_factory.mktemp("sources")
    write_video(FRAMES, path / "clip.mp4", FPS)
    (path / "frames").mkdir()
    for i, frame in enumerate(FRAMES):
        Image.fromarray(frame).save(path / "frames" / f"{i}.png")
    PICTURE.save(path / "picture.png")
    right = np.zeros((32, 32), np.uint8)
    right[:, 16:] = 255
    for name, mask in (("black", 0 * right), ("white", 0 * right + 255), ("right", right)):
        Image.fromarray(mask).save(path / f"{name}.png")
    return path


@pytest.fixture(scope="module")
def pipes() -> dict[str, Pipeline]:
    return {task: build(task) for task in ("t2v", "t2i", "i2v")}


def source_of(task: str, folder: Path) -> dict[str, Any]:
    """The frames folder as it is: no loss of compression."""
    return {"video": folder / "frames"} if task == "t2v" else {"image": folder / "picture.png"}


def reconstruction(pipe: Pipeline, folder: Path) -> torch.Tensor:
    if pipe.config.task == "t2v":
        return pipe.encode_video(FRAMES)
    from kandinsky.outputs.media import fit_image

    return pipe.encode_video(np.asarray(fit_image(PICTURE, 48, 32))[None])


@pytest.mark.parametrize("task", ["t2v", "t2i"])
def test_the_ends_are_exact(task: str, pipes: dict[str, Pipeline], folder: Path) -> None:
    """Strength 1 is the plain run, 0 the VAE's reconstruction; a white mask is no mask, a black one strength 0."""
    pipe, source = pipes[task], source_of(task, folder)
    size = {} if task == "t2v" else {"width": 48, "height": 32}
    plain = latents_of(pipe, **STEPS, **size)
    whole = latents_of(pipe, **STEPS, **source, strength=1.0)
    assert torch.equal(plain, whole)
    same = latents_of(pipe, **STEPS, **source, strength=0)
    assert torch.equal(same, reconstruction(pipe, folder))
    half = latents_of(pipe, **STEPS, **source, strength=0.5)
    assert not torch.equal(half, plain) and not torch.equal(half, same)
    assert torch.equal(half, latents_of(pipe, **STEPS, **source, strength=0.5, mask=folder / "white.png"))
    assert torch.equal(same, latents_of(pipe, **STEPS, **source, strength=0.5, mask=folder / "black.png"))


def test_outside_of_the_mask_nothing_changes(pipes: dict[str, Pipeline], folder: Path) -> None:
    """But for the feather, a latent wide; inside it all does. At every step the outside has that step's noise."""
    pipe, seen = pipes["t2v"], []

    def look(pipe: Any, step: int, timestep: Any, tensors: Any) -> None:
        seen.append(tensors["latents"])

    made = latents_of(
        pipe, **STEPS, video=folder / "frames", mask=folder / "right.png", strength=1.0, callback_on_step_end=look
    )
    source = reconstruction(pipe, folder)
    assert torch.equal(made[..., :1, :], source[..., :1, :])
    assert (made[..., 2:, :] != source[..., 2:, :]).all()
    distances = [(one - source)[..., :1, :].abs().mean() for one in seen]
    assert all(later < earlier for earlier, later in pairwise(distances))


@pytest.mark.parametrize("step", [3, 4])
def test_goes_on_after_a_stop(step: int, folder: Path, tmp_path: Path) -> None:
    """To the same bytes, with its items; guidance that is kept for a step begins with a new one."""

    def run(path: Path, callback: Any = None) -> Pipeline:
        pipe = build("t2v")
        request = resolve_request(
            pipe.config, "a cat", seed=3, num_steps=6, guidance_weight=3.0, guidance_every=2, strength=0.67,
            clip=(32, 32, 5), mask=True, width=32, height=32,
        )  # fmt: skip
        assert request.first_step == 2
        mask = np.zeros((1, 32, 32), np.uint8)
        mask[..., 16:] = 255
        inputs = Inputs(source=FRAMES, source_name="clip.mp4", mask=mask)
        pipe.generate(request, inputs, path, progress=False, callback=callback, keep_stopped=True)
        return pipe

    def interrupt(pipe: Any, done: int, *_: Any) -> None:
        pipe.interrupt = done + 1 == step

    run(tmp_path / "whole.mp4")
    record = json.loads((tmp_path / "whole.json").read_text())
    (condition,) = record["conditions"]
    assert condition["name"] == "source" and condition["hold"] == "noised" and condition["origin"] == "clip.mp4"
    assert record["strength"] == 0.67 and record["evaluations"]["all"] == 6
    with pytest.raises(Stopped) as stopped:
        run(tmp_path / "out.mp4", interrupt)
    build("t2v").resume(load_run(stopped.value.path), tmp_path / "out.mp4", progress=False)
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("i2v", {"clip": (32, 32, 5), "image_sizes": [(32, 32)]}, "goes with t2v configs.*takes --image"),
    ("t2i", {"clip": (32, 32, 5)}, "goes with t2v configs.*give --image"),
    ("t2v", {"strength": 0.5}, "strength is about what sampling starts from: give --video"),
    ("t2v", {"mask": True}, "a mask is about what sampling starts from: give --video"),
    ("t2i", {"mask": True}, "give --image"),
    ("i2v", {"strength": 0.5, "image_sizes": [(32, 32)]}, "i2v configs have none"),
    ("t2v", {"clip": (32, 32, 5), "strength": 1.5}, "strength is 1.5; it must be from 0"),
    ("t2v", {"clip": (32, 32, 5), "num_frames": 13}, "the video has 0.21 s and 0.54 s are asked for"),
    ("t2v", {"clip": (32, 32, 1)}, "one frame"),
    ("t2v", {"clip": (320, 32, 5)}, "at most 4 times"),
    ("t2i", {"strength": 0.5, "image_sizes": [(32, 32)] * 2}, "2 pictures to start from"),
]


@pytest.mark.parametrize(("task", "wishes", "says"), REFUSED)
def test_what_does_not_go_together(task: str, wishes: dict[str, Any], says: str, pipes: dict[str, Pipeline]) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        resolve_request(pipes[task].config, "a cat", **wishes)
    assert "\n" not in str(refused.value)


def test_items_compose() -> None:
    """Held with noise before clean; two that want one frame are refused."""
    noise = torch.randn(1, 3, 2, 2, 4)
    first, last = (frame_item(name, torch.full((1, 2, 2, 4), float(i)), 2 * i) for i, name in enumerate("ab"))
    source = Item("s", torch.full((1, 3, 2, 2, 4), 7.0), hold="noised", from_step=2)
    made = compose(noise, 9, [first, source, last])
    assert made.extra is not None and made.extra[0, :, 0, 0, -1].tolist() == [1, 0, 1]
    assert made.hold(noise, 0.5, 1)[0, :, 0, 0, 0].tolist() == [0, noise[0, 1, 0, 0, 0], 1]
    assert torch.equal(made.hold(noise, 0.5, 2)[:, 1], 3.5 + noise[:, 1] / 2)
    with pytest.raises(ValueError, match="a and c both fix latent frame 0"):
        compose(noise, 9, [first, frame_item("c", torch.zeros(1, 2, 2, 4))])


def test_latents_of_a_mask() -> None:
    pixels = torch.zeros(5, 32, 32)
    pixels[3, :8, :4] = 1  # half of one latent in one of the four frames of the second latent frame
    mask = latent_mask(pixels)
    assert mask.shape == (1, 2, 4, 4, 1) and mask[0, 0].count_nonzero() == 0
    assert mask[0, 1, 0, :, 0].tolist() == [0.5, 0.25, 0, 0]


def ffmpeg(*arguments: object) -> None:
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True)


def test_any_clip_at_one_rate_and_size(folder: Path, tmp_path: Path) -> None:
    """Rate, varying rate, rotation, odd sides, pixels that are not square, transparency, WebM and GIF."""
    made = {
        "rate.webm": ["-f", "lavfi", "-i", "testsrc=s=64x36:r=60:d=0.5"],
        "odd.gif": ["-f", "lavfi", "-i", "testsrc=s=33x35:r=10:d=0.5"],
        "vfr.mp4": [
            *("-f", "lavfi", "-i", "testsrc=s=64x36:r=30:d=0.5"),
            *("-vf", r"select='lt(n\,5)+gt(n\,9)'", "-fps_mode", "vfr"),
        ],
        "wide.mp4": ["-f", "lavfi", "-i", "testsrc=s=32x36:r=24:d=0.5", "-vf", "setsar=2"],
    }  # fmt: skip
    for name, arguments in made.items():
        ffmpeg(*arguments, tmp_path / name)
    ffmpeg("-display_rotation", 90, "-i", tmp_path / "vfr.mp4", "-c", "copy", tmp_path / "turned.mp4")
    sizes = {"rate.webm": (64, 36), "odd.gif": (33, 35), "vfr.mp4": (64, 36), "wide.mp4": (64, 36)}
    for name, size in {**sizes, "turned.mp4": (36, 64)}.items():
        clip = open_clip(tmp_path / name, FPS, 100)
        assert clip.size == size and 11 <= clip.frames <= 13, (name, clip)
        assert read_clip(clip, 13, 32, 48).shape == (13, 48, 32, 3)
    assert open_clip(tmp_path / "rate.webm", FPS, 3).frames == 3
    colours = np.broadcast_to(np.uint8([[[[200, 40, 40]]], [[[40, 200, 40]]], [[[40, 40, 200]]]]), (3, 32, 32, 3))
    write_video(np.ascontiguousarray(colours), tmp_path / "colours.mp4", FPS)
    found = read_clip(open_clip(tmp_path / "colours.mp4", FPS, 5), 5, 32, 32)
    assert np.abs(found.astype(int) - colours[[0, 1, 2, 2, 2]]).max() <= 4
    transparent = Image.new("P", (32, 32), 0)
    transparent.save(tmp_path / "clear.gif", transparency=0)
    assert (read_clip(open_clip(tmp_path / "clear.gif", FPS, 2), 1, 32, 32) == 255).all()


def test_colours_are_the_files(tmp_path: Path) -> None:
    """Squares of random 4:2:0, compressed without loss, are what BT.601 makes of them, also where they get smaller."""
    rng = np.random.default_rng(0)
    planes = [rng.integers(*levels, (2, 2)) for levels in ((16, 236), (100, 156), (100, 156))]
    y, u, v = (plane.repeat(32, 0).repeat(32, 1).astype(float) for plane in planes)
    raw = b"".join(plane[:: 64 // side, :: 64 // side].astype(np.uint8).tobytes()
                   for plane, side in ((y, 64), (u, 32), (v, 32)))  # fmt: skip
    words = ["-f", "rawvideo", "-pix_fmt", "yuv420p", "-s", "64x64", "-r", str(FPS), "-i", "-", "-c:v", "ffv1"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *words, str(tmp_path / "squares.mkv")]
    subprocess.run(command, input=raw, check=True)
    y, u, v = (y - 16) * 255 / 219, (u - 128) * 255 / 224, (v - 128) * 255 / 224
    expected = np.stack([y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u], -1).clip(0, 255)
    clip = open_clip(tmp_path / "squares.mkv", FPS, 5)
    for side in (64, 32):
        (found,) = read_clip(clip, 1, side, side)
        centres = slice(side // 4, side, side // 2)  # of the four squares
        wanted = expected[16::32, 16::32]
        assert np.abs(found[centres, centres] - wanted).max() <= 0.6, side  # rounding, and ffmpeg's fixed point
    (streamed,) = stream_clip(clip)
    assert np.array_equal(streamed, read_clip(clip, 1, 64, 64)[0])


def test_only_waiting_for_ffmpeg_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who takes frames may be slow; when no time is left, that is an error in the middle as at the end."""
    now = [0.0]
    monkeypatch.setattr(clips, "time", SimpleNamespace(monotonic=lambda: now[0]))
    made: list[clips.Patience] = []

    class Remembered(clips.Patience):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(clips, "Patience", Remembered)
    clip = open_clip(folder / "clip.mp4", FPS, 100)
    for _ in stream_clip(clip):
        now[0] += 1000
    assert made[-1].left == pytest.approx(clips.MOST_SECONDS + clips.FRAME_SECONDS * 4)
    with made[-1]:
        now[0] += 10
        assert made[-1].left == pytest.approx(clips.MOST_SECONDS + clips.FRAME_SECONDS * 4 - 10)
    now[0] += 10
    assert made[-1].left == pytest.approx(clips.MOST_SECONDS + clips.FRAME_SECONDS * 4 - 10)
    frames = iterate_clip(clip, 5, 32, 32)
    next(frames)
    with made[-1]:
        now[0] += 1000
    with pytest.raises(ValueError, match=r"clip\.mp4 took more than 300 s and 0\.1 s a frame: cut out the part"):
        list(frames)


def test_a_process_that_takes_too_long_is_ended() -> None:
    ended = threading.Event()
    with clips.Patience(0.01, ended.set):
        assert ended.wait(PATIENCE)
    ended.clear()
    before = set(threading.enumerate())
    patience = clips.Patience(10 * PATIENCE, ended.set)
    (looking,) = set(threading.enumerate()) - before
    patience.stop_looking()
    looking.join(PATIENCE)
    assert not looking.is_alive() and not ended.is_set()


def test_files_that_are_none(folder: Path, tmp_path: Path) -> None:
    """A line each; a playlist that names another file is not followed."""
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{folder / 'clip.mp4'}'\n")
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\n{folder / 'clip.mp4'}\n#EXT-X-ENDLIST\n")
    (tmp_path / "half.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:600])
    (tmp_path / "empty").mkdir()
    for name in ("text.mp4", "list.mp4", "list.m3u8", "half.mp4", "empty", "missing.mp4"):
        with pytest.raises(ValueError, match=r"there (is|are) no|can't read the video") as refused:
            open_clip(tmp_path / name, FPS, 5)
        assert "\n" not in str(refused.value) and name in str(refused.value)
        assert " @ 0x" not in str(refused.value)
    (tmp_path / "mask.txt").write_text("no mask")
    with pytest.raises(ValueError, match=r"the mask: can't read the video .*, or one picture \(\.png, "):
        read_mask(SimpleNamespace(width=64, height=64, num_frames=5), tmp_path / "mask.txt")
