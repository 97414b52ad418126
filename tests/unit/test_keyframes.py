"""Pictures after a video's first frame: what is given comes out, what is not given is the plain run, to the bit."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kandinsky.config.reading import load_config
from kandinsky.keyframes import keyframe_words, read_keyframes
from kandinsky.models.vae_tiling import VAETiling
from kandinsky.outputs.resume import Stopped, load_run
from kandinsky.pipelines.base import Pipeline
from kandinsky.pipelines.inputs import Inputs
from kandinsky.request import resolve_request
from tests.unit.small_pipelines import PICTURE, build, latents_of

OTHER = Image.fromarray(np.random.default_rng(5).integers(0, 256, (40, 60, 3), dtype=np.uint8))
SIZES = {"num_frames": 13, "width": 32, "height": 32}  # four latent frames
I2V = load_config(Path(__file__).resolve().parents[2] / "configs" / "config_5s_i2v.yaml")


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return build("i2v")


def test_nothing_given_is_the_plain_run(pipe: Pipeline) -> None:
    plain = latents_of(pipe, **SIZES)
    assert torch.equal(plain, latents_of(pipe, **SIZES, last_image=None, loop=False, keyframes={}))
    assert torch.equal(plain[:, 0], latents_of(pipe, **SIZES, last_image=OTHER)[:, 0])  # nor is other noise drawn
    assert not torch.equal(plain[:, 1:-1], latents_of(pipe, **SIZES, last_image=OTHER)[:, 1:-1])


def test_what_is_given_comes_out(pipe: Pipeline) -> None:
    """In its latent frame, of every prompt's video, whatever else is given."""
    from kandinsky.outputs.media import fit_image

    def latents_alone(picture: Image.Image) -> torch.Tensor:
        return pipe.encode_video(np.asarray(fit_image(picture, 32, 32))[None])[:, 0]

    made = latents_of(pipe, ["a cat", "a dog"], **SIZES, last_image=OTHER, keyframes={0.25: PICTURE})
    assert torch.equal(made[:, -1], latents_alone(OTHER).expand(2, -1, -1, -1))
    assert torch.equal(made[:, 2], latents_alone(PICTURE).expand(2, -1, -1, -1))  # frame 6 is of the frames 5 to 8
    assert torch.equal(latents_of(pipe, **SIZES, keyframes={0.5: OTHER}), latents_of(pipe, **SIZES, last_image=OTHER))


def test_what_is_learnt_is_shown(pipe: Pipeline) -> None:
    """A checkpoint that has learnt keyframes begins with its first picture, and sees the others in its condition
    channels: what it makes of them is its own."""
    learnt = build("i2v")
    generation = dataclasses.replace(learnt.config.generation, given_frames="any")
    learnt.config = dataclasses.replace(learnt.config, generation=generation)
    seen: list[torch.Tensor] = []
    learnt.dit.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    made = latents_of(learnt, **SIZES, last_image=OTHER)
    channels, picture = made.shape[-1], latents_of(pipe, **SIZES, last_image=OTHER)[:, -1]
    for x in seen:
        shown, mask = x[..., channels:-1], x[..., -1]
        torch.testing.assert_close(shown[0, -1].float(), picture[0], rtol=1e-2, atol=1e-2)
        assert not shown[:, :-1].any() and mask[0, :, 0, 0].tolist() == [1, 0, 0, 1]
        torch.testing.assert_close(x[0, 0, ..., :channels].float(), made[0, 0], rtol=1e-2, atol=1e-2)
    assert not torch.equal(seen[0][0, -1], seen[-1][0, -1])
    assert torch.equal(made[:, 0], latents_of(pipe, **SIZES)[:, 0]) and not torch.equal(made[:, -1], picture)
    assert torch.equal(latents_of(learnt, **SIZES), latents_of(pipe, **SIZES))  # where nothing more is given


def test_a_loop_is_its_first_picture_as_the_last_one(pipe: Pipeline) -> None:
    """To the bit. What goes round are the twelve frames between, those after the first one from the second round."""
    options = {**SIZES, "seed": 1, "progress": False}
    latents = pipe("a cat", PICTURE, loop=True, output_type="latent", **options)  # type: ignore[operator]
    ended = pipe("a cat", PICTURE, last_image=PICTURE, output_type="latent", **options)  # type: ignore[operator]
    assert torch.equal(latents, ended)
    looped = pipe("a cat", PICTURE, loop=True, **options)  # type: ignore[operator]
    twice = pipe.decode(torch.cat((latents, latents[:, 1:3]), dim=1))
    assert torch.equal(looped, torch.cat((twice[:, :, 12:], twice[:, :, 9:12]), dim=2))
    both = pipe(["a cat", "a dog"], [PICTURE, OTHER], loop=True, **options)  # type: ignore[operator]
    assert torch.equal(both[:1], looped) and not torch.equal(both[1:], looped)


def test_a_picture_is_a_still_clip(pipe: Pipeline) -> None:
    """Every latent frame of a clip in which nothing moves is the picture's own: the VAE is causal, and repeats the
    first frame where there is none before it."""
    picture = torch.rand(1, 3, 1, 32, 32) * 2 - 1
    alone = pipe.vae.encode(picture).mode()
    for frames in (5, 25):
        still = pipe.vae.encode(picture.expand(-1, -1, frames, -1, -1), VAETiling()).mode()
        torch.testing.assert_close(still, alone.expand_as(still), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("step", [1, 3])
def test_goes_on_after_a_stop(step: int, pipe: Pipeline, tmp_path: Path) -> None:
    """To the same bytes; the record has the pictures and where they came from."""
    OTHER.save(tmp_path / "last.png")

    def run(path: Path, callback: Any = None) -> None:
        request = resolve_request(
            pipe.config, "a cat", image_sizes=[(60, 40)], seed=3, num_steps=4, loop=True, num_frames=13, width=32,
            height=32,
        )  # fmt: skip
        keyframes = read_keyframes(pipe.config, 13, loop=True, keyframes=[(0.2, tmp_path / "last.png")])
        inputs = Inputs([PICTURE], ["first.png"], keyframes=keyframes)
        pipe.generate(request, inputs, path, progress=False, callback=callback, keep_stopped=True)

    def interrupt(pipe: Any, done: int, *_: Any) -> None:
        pipe.interrupt = done + 1 == step

    run(tmp_path / "whole.mp4")
    record = json.loads((tmp_path / "whole.json").read_text())
    names = [(one["name"], one["frame"], one["hold"], one["marked"]) for one in record["conditions"]]
    assert names == [
        ("first frame", 0, "clean", True),
        ("keyframe at 0.2 s", 2, "clean", True),
        ("first frame again", 3, "clean", True),
    ]
    assert record["loop"] is True and record["conditions"][1]["origin"] == str(tmp_path / "last.png")
    with pytest.raises(Stopped) as stopped:
        run(tmp_path / "out.mp4", interrupt)
    pipe.resume(load_run(stopped.value.path), tmp_path / "out.mp4", progress=False)
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


REFUSED: list[tuple[str, int, dict[str, Any], str]] = [
    ("t2v", 13, {"last_image": OTHER}, "a last picture goes with i2v configs.*this one is t2v"),
    ("t2i", 1, {"loop": True}, "a loop goes with i2v configs"),
    ("i2i", 1, {"keyframes": {1: OTHER}}, "a keyframe goes with i2v configs"),
    ("i2v", 1, {"last_image": OTHER}, "ask for a video"),
    ("i2v", 5, {"loop": True}, "at least 9 frames"),
    ("i2v", 13, {"loop": True, "last_image": OTHER}, "leave the last picture out, or the loop"),
    ("i2v", 13, {"keyframes": {0: OTHER}}, "keyframe at 0 s is the picture that the video begins with, --image"),
    ("i2v", 13, {"keyframes": {2.5: OTHER}}, "keyframe at 2.5 s is not in the video: give one from 0.04 to 0.50 s"),
    ("i2v", 13, {"keyframes": {float("nan"): OTHER}}, "keyframe at nan s is not in the video"),
    ("i2v", 13, {"keyframes": {"soon": OTHER}}, "keyframe at 'soon' s is not in the video"),
    ("i2v", 13, {"keyframes": {0.25: OTHER, 0.3: OTHER}}, "keyframe at 0.25 s and keyframe at 0.3 s are of the same"),
    ("i2v", 13, {"keyframes": {0.5: OTHER}, "loop": True}, "0.5 s and first frame again are of the same four frames"),
    ("i2v", 13, {"last_image": "missing.png"}, "the last frame: there is no image missing.png"),
    ("i2v", 13, {"last_image": Image.new("RGB", (320, 32))}, "the last frame: .*at most 4 times"),
]


@pytest.mark.parametrize(("task", "num_frames", "given", "says"), REFUSED)
def test_what_does_not_go_together(task: Any, num_frames: int, given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        read_keyframes(dataclasses.replace(I2V, task=task), num_frames, **given)
    assert "\n" not in str(refused.value)


def test_words_of_the_command_line() -> None:
    assert keyframe_words(["2.5:a.png", r"1:C:\b.png"]) == [(2.5, "a.png"), (1.0, r"C:\b.png")]
    for words in ("a.png", "2.5:", ":a.png", "x:a.png"):
        with pytest.raises(ValueError, match="it must be SECONDS:FILE"):
            keyframe_words([words])


def test_says_where_it_is_experimental(caplog: pytest.LogCaptureFixture) -> None:
    """With checkpoints that were trained on the first frame alone, and only where more is given."""
    learnt = dataclasses.replace(I2V, generation=dataclasses.replace(I2V.generation, given_frames="any"))
    with caplog.at_level(logging.WARNING):
        assert read_keyframes(I2V, 13) == ()
        read_keyframes(learnt, 13, loop=True)
        assert not caplog.records
        read_keyframes(I2V, 13, loop=True)
    assert "experimental" in caplog.text and "the first frame alone" in caplog.text


def test_given_frames_stay_as_they_are() -> None:
    """The first ones are not normalised where others are given, which they would move away from."""
    pipe = build("i2v")
    options = {"num_frames": 25, "width": 32, "height": 32, "num_steps": 2}
    alone, given = latents_of(pipe, **options), latents_of(pipe, **options, loop=True)
    assert not torch.equal(alone[:, 0], given[:, 0])
    assert (given[:, 0] - given[:, -1]).abs().max() < 1.5  # apart by the noise that the VAE's posterior has
