"""A video that goes on: what is held at joints, what is on disk in between, and colours that are brought back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

from kandinsky.clips import open_clip
from kandinsky.outputs.colour import MOST_SHIFT, colours_of, corrected
from kandinsky.outputs.media import join_videos, write_video
from kandinsky.outputs.post import Post
from kandinsky.outputs.resume import Stopped
from kandinsky.outputs.sources import Media
from kandinsky.pipelines.base import Pipeline
from kandinsky.pipelines.inputs import Inputs
from kandinsky.request import FPS
from kandinsky.serving.extend_video import extend_video
from kandinsky.serving.prompts_file import read_prompts
from kandinsky.serving.segments import (
    LongVideo,
    Part,
    check_folder,
    checked_overlap,
    divided,
    folder_of,
    make_long,
    recorded_seed,
    request_of,
)
from tests.unit.small_pipelines import build

FRAMES = np.random.default_rng(1).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pipes() -> dict[str, Pipeline]:
    return {task: build(task) for task in ("t2v", "i2v")}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine frames as pictures, without a loss."""
    path = tmp_path_factory.mktemp("clip")
    for i, frame in enumerate(FRAMES):
        Image.fromarray(frame).save(path / f"{i}.png")
    return path


def long_video(pipe: Pipeline, clip: Path, overlap: int, **options: Any) -> LongVideo:
    """The clip and two segments more, of 8 and 4 frames."""
    parts = [Part("a red cat", 8, 3), Part("a dog", 4, 4)]
    requests = [request_of(pipe.config, part, (32, 32), overlap) for part in parts]
    return LongVideo(tuple(requests), overlap, clip=open_clip(clip, FPS, 100), **options)


def frames_of(path: Path) -> np.ndarray:
    with imageio.get_reader(path, format="FFMPEG") as reader:
        return np.stack(list(reader.iter_data()))


@pytest.mark.parametrize(("task", "overlap"), [("t2v", 9), ("i2v", 1), ("i2v", 5)])
def test_what_is_there_is_held(task: str, overlap: int, pipes: dict[str, Pipeline]) -> None:
    """To the bit, also where a config normalises first frames; the frames that are there are no part of the output."""
    pipe = pipes[task]
    request = request_of(pipe.config, Part("a red cat", 21 - overlap, 3), (32, 32), overlap)
    inputs = Inputs(overlap=FRAMES[-overlap:])
    made = pipe.generate(request, inputs, progress=False, output_type="latent")
    held = pipe.encode_video(FRAMES[-overlap:])
    assert made.shape[1] > 5 and pipe.config.generation.first_frame_normalization
    assert torch.equal(made[:, : held.shape[1]], held)
    pixels = pipe.generate(request, inputs, progress=False)
    assert torch.equal(pixels, pipe.decode(made)[:, :, overlap:])
    saved = pipe.sample(request, inputs, progress=False)
    assert [item["name"] for item in saved.records[0]["conditions"]] == ["overlap"] * (2 if overlap == 5 else 1)
    assert torch.equal(pipe.finish(saved, None), pixels)


def test_no_frame_twice_and_all_is_told(clip: Path, pipes: dict[str, Pipeline], tmp_path: Path) -> None:
    output = tmp_path / "long.mp4"
    last = make_long(pipes["t2v"], long_video(pipes["t2v"], clip, 5), Media(), output, progress=False)
    found = frames_of(output)
    assert found.shape == (9 + 8 + 4, 32, 32, 3) and not folder_of(output).exists()
    assert last is not None and np.abs(found[-1].astype(int) - last).mean() < 12
    record = json.loads(output.with_suffix(".json").read_text())
    extended = record["extended"]
    assert record["num_frames"] == 21 and extended["overlap"] == 5 and extended["frames_before"] == 9
    assert [(one["prompt"], one["seed"], one["added_frames"]) for one in extended["segments"]] == [
        ("a red cat", 3, 8),
        ("a dog", 4, 4),
    ]
    assert all(one["corrected"] and "held" in one["how"] for one in extended["segments"])


def test_the_call_from_python(clip: Path, pipes: dict[str, Pipeline], tmp_path: Path) -> None:
    """The bytes of the same segments made one by one; what can't be is told before anything is made."""
    pipe = pipes["t2v"]
    make_long(pipe, long_video(pipe, clip, 5), Media(), tmp_path / "a.mp4", progress=False)
    rows = [{"seconds": 8 / 24, "seed": 3}, {"prompt": "a dog", "seconds": 4 / 24, "seed": 4}]
    size = {"width": 32, "height": 32, "progress": False}
    output = extend_video(pipe, "a red cat", video=clip, segments=rows, save_path=tmp_path / "b.mp4", **size)
    assert output.read_bytes() == (tmp_path / "a.mp4").read_bytes()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "and not both"),
        ({"seconds": 1, "image": Image.new("RGB", (32, 32))}, "leave the picture or the video out"),
        ({"seconds": 0}, "adds nothing to the video"),
        ({"seconds": 1, "save_path": tmp_path / "c.png"}, "mp4"),
    ]
    for more, says in wrong:
        with pytest.raises(ValueError, match=says):
            extend_video(pipe, "a cat", **{"video": clip, "save_path": tmp_path / "c.mp4", **more})


def test_more_frames_and_larger_ones_are_made_of_the_whole(
    clip: Path, pipes: dict[str, Pipeline], tmp_path: Path
) -> None:
    """And not of what the next segment goes on from."""
    output, told = tmp_path / "long.mp4", list[int]()

    def callback(number: int) -> Any:
        return lambda *_: told.append(number)

    video = long_video(pipes["t2v"], clip, 5, post=Post(48, 2))
    last = make_long(pipes["t2v"], video, Media(), output, progress=False, callback=callback)
    assert frames_of(output).shape == (2 * 21, 64, 64, 3) and last is not None and last.shape == (32, 32, 3)
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["post"]["frames"] == 42 and record["num_frames"] == 21
    assert told == [0, 0, 1, 1] and not folder_of(output).exists()


def test_goes_on_after_a_stop(clip: Path, tmp_path: Path) -> None:
    """In the middle of the second segment; to the same bytes. Other wishes are refused."""
    pipe = build("i2v")
    video = long_video(pipe, clip, 1)
    make_long(pipe, video, Media(), tmp_path / "whole.mp4", progress=False)
    calls = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        pipe.interrupt = pipe.interrupt or calls == 2 * 2 + 1  # two steps with guidance, and one evaluation more

    output = tmp_path / "stopped.mp4"
    hook = pipe.dit.register_forward_hook(interrupt)
    with pytest.raises(Stopped):
        make_long(pipe, video, Media(), output, progress=False)
    hook.remove()
    names = {path.name for path in folder_of(output).iterdir()}
    assert {"0000.mp4", "0000.npz", "0001.mp4", "0001.npz", "0002.stopped.safetensors"} <= names and not output.exists()
    with pytest.raises(ValueError, match="--resume goes on"):
        check_folder(output, video, pipe.config, resume=False)
    with pytest.raises(ValueError, match="of another request"):
        check_folder(output, long_video(pipe, clip, 5), pipe.config, resume=True)
    check_folder(output, video, pipe.config, resume=True)
    assert recorded_seed(output) == 3
    make_long(pipe, video, Media(), output, progress=False)
    assert output.read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_colours_are_brought_back() -> None:
    """Slowly after a joint, within limits; nothing happens to what has not drifted, or has one colour."""
    rng = np.random.default_rng(0)
    plain = rng.integers(60, 190, (24, 16, 16, 3), dtype=np.uint8)
    wanted = colours_of(plain)
    assert np.array_equal(corrected(plain, wanted, wanted), plain)
    drifted = np.rint((plain.astype(float) - 125) * 1.05 + 125 + 4).astype(np.uint8)
    back = corrected(drifted, colours_of(drifted), wanted)
    assert np.abs(back[12:].astype(int) - plain[12:]).max() <= 1
    assert np.abs(back[0].astype(int) - drifted[0]).max() <= 1
    far = corrected(plain, wanted, colours_of(plain // 4))
    assert abs((plain[-1].mean() - far[-1].mean()) - MOST_SHIFT) < 0.5
    flat = np.full((2, 8, 8, 3), 9, np.uint8)
    assert np.array_equal(corrected(flat, colours_of(flat), colours_of(flat)), flat)


def test_videos_are_joined_as_they_are(tmp_path: Path) -> None:
    """Names with quotes too; a part that is none is told of, and nothing is left."""
    parts = [tmp_path / "it's 1.mp4", tmp_path / "2.mp4"]
    for path, frames in zip(parts, (FRAMES[:5], FRAMES[5:]), strict=True):
        write_video(frames, path, FPS)
    assert join_videos(parts, tmp_path / "both.mp4") == 9
    assert np.array_equal(frames_of(tmp_path / "both.mp4"), np.concatenate([frames_of(path) for path in parts]))
    (tmp_path / "3.mp4").write_bytes(parts[1].read_bytes()[:600])
    with pytest.raises((OSError, RuntimeError)):
        join_videos([*parts, tmp_path / "3.mp4"], tmp_path / "all.mp4")
    assert not (tmp_path / "all.mp4").exists()


def test_lengths(pipes: dict[str, Pipeline]) -> None:
    config = pipes["t2v"].config  # 0.2 s, 5 frames
    assert divided(config, 20, 1) == [4] * 5
    assert divided(config, 40, 9, longest=1) == [12, 12, 16] and sum(divided(config, 100, 1, longest=1)) == 100
    with pytest.raises(ValueError, match="adds nothing: ask for a longer"):
        divided(config, 20, 5)
    with pytest.raises(ValueError, match="segments; at most 1000"):
        divided(config, 4 * 1001, 1)
    assert checked_overlap("t2v", None, None) == 5 and checked_overlap("t2v", None, 4) == 1
    for overlap, there in ((2, None), (0, None), (True, None), (9, 5)):
        with pytest.raises(ValueError, match="the overlap is"):
            checked_overlap("t2v", overlap, there)
    with pytest.raises(ValueError, match=r"a segment of 30.00 s"):
        Part("a cat", 720)


def test_lists_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "segments.yaml"
    path.write_text("- prompt: a cat\n  seconds: 1.5\n- a dog\n- {prompt: a bird, seed: 7}\n")
    assert [(row.line, dict(row.values)) for row in read_prompts(path)] == [
        (1, {"prompt": "a cat", "seconds": 1.5}),
        (3, {"prompt": "a dog"}),
        (4, {"prompt": "a bird", "seed": 7}),
    ]
    for text, says in (
        ("prompt: a cat", "must be a list"),
        ("- [", "not readable as YAML"),
        ("- 7", "neither a prompt"),
        ("- {prompt: a, prompt: b}", "prompt is there twice"),
        ("- {prompt: a, seconds: long}", "seconds is 'long'"),
        ("[" * 3000, "not readable as YAML"),
        ("", "must be a list"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=says):
            read_prompts(path)
