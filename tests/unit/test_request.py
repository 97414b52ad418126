"""What a person may ask for: defaults from the YAML, and one clear line for everything that can't be done."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kandinsky.common.given import shown
from kandinsky.config.reading import load_config
from kandinsky.config.schema import Config
from kandinsky.request import MAX_SEED, Request, Sample, resolve_request, warn_about_size

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(REPOSITORY / "configs" / "config_5s_sft.yaml")


def test_defaults_are_the_yamls(config: Config) -> None:
    request = resolve_request(config, "a cat", seed=7)
    negative = config.generation.negative_caption
    assert request == Request(
        samples=(Sample("a cat", negative, 7),),
        width=768,
        height=512,
        num_frames=121,
        num_steps=50,
        guidance_weight=5.0,
        scheduler_scale=5.0,
    )
    assert negative.startswith("Static, 2D cartoon")


def test_defaults_follow_the_yaml() -> None:
    overrides = [
        "metrics.scheduler_scale=7.5",
        "model.num_steps=12",
        "model.guidance_weight=2.5",
        "generation.width=512",
        "generation.time_length=2",
        "generation.negative_caption=blurry",
    ]
    request = resolve_request(load_config(REPOSITORY / "configs" / "config_5s_sft.yaml", overrides), "a cat", seed=0)
    assert request == Request((Sample("a cat", "blurry", 0),), 512, 512, 49, 12, 2.5, 7.5)


GIVEN = {
    "width": 512,
    "height": 768,
    "num_steps": 3,
    "guidance_weight": 1.0,
    "scheduler_scale": 8.0,
    "max_sequence_length": 100,
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_is_given_wins_and_none_is_the_yamls(config: Config, name: str) -> None:
    default = resolve_request(config, "a cat", seed=1)
    given = resolve_request(config, "a cat", **{"seed": 1, name: GIVEN[name]})
    assert getattr(given, name) == GIVEN[name] != getattr(default, name)
    others = {field.name for field in dataclasses.fields(Request)} - {name}
    assert all(getattr(given, other) == getattr(default, other) for other in others)
    assert resolve_request(config, "a cat", **{"seed": 1, name: None}) == default


def seeds_of(request: Request) -> list[int | None]:
    return [sample.seed for sample in request.samples]


def test_several_prompts_and_several_outputs_of_each(config: Config) -> None:
    """Prompt after prompt; further seeds count up, past the last number to 0."""
    request = resolve_request(config, ["a cat", "a dog"], samples_per_prompt=2, seed=MAX_SEED - 1, negative_caption="x")
    assert request.samples == (
        Sample("a cat", "x", MAX_SEED - 1, 0),
        Sample("a cat", "x", MAX_SEED, 0),
        Sample("a dog", "x", 0, 1),
        Sample("a dog", "x", 1, 1),
    )
    assert request.num_prompts == 2
    request = resolve_request(config, ["a cat", "a dog"], seed=[9, 3], negative_caption=["x", "y"])
    assert request.samples == (Sample("a cat", "x", 9, 0), Sample("a dog", "y", 3, 1))


def test_one_prompt_in_a_list_is_one_prompt(config: Config) -> None:
    assert resolve_request(config, ["a cat"], seed=[5]) == resolve_request(config, "a cat", seed=5)


def test_embeddings_and_generators_take_the_place_of_words_and_seeds(config: Config) -> None:
    request = resolve_request(config, None, num_prompts=2, seeded=False)
    assert [(sample.text, sample.seed, sample.prompt) for sample in request.samples] == [
        (None, None, 0),
        (None, None, 1),
    ]


def test_frames_instead_of_seconds(config: Config) -> None:
    by_frames = resolve_request(config, "a cat", seed=1, num_frames=49)
    assert by_frames == resolve_request(config, "a cat", seed=1, time_length=2)


@pytest.mark.parametrize(
    ("seconds", "frames", "latent_frames"),
    [(0, 1, 1), (0.01, 1, 1), (1, 25, 7), (1.5, 37, 10), (2, 49, 13), (5, 121, 31), (10, 241, 61), (21, 505, 127)],
)
def test_lengths(config: Config, seconds: float, frames: int, latent_frames: int) -> None:
    """24 frames a second, one frame and then four to a latent frame."""
    request = resolve_request(config, "a cat", time_length=seconds)
    assert request.num_frames == frames
    assert request.latent_size == (latent_frames, 64, 96)
    assert request.is_image == (frames == 1)


def test_seed_is_drawn_anew_each_time(config: Config) -> None:
    seeds = {seed for _ in range(8) for seed in seeds_of(resolve_request(config, "a cat")) if seed is not None}
    assert len(seeds) == 8 and all(0 <= seed <= MAX_SEED for seed in seeds)


@pytest.mark.parametrize("whole", [np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("real", [np.float32, np.float64, np.float16])
def test_numpy_numbers_are_numbers(config: Config, whole: type, real: type) -> None:
    """And become Python's own: a record of them is JSON."""
    theirs = {"seed": whole(7), "num_steps": whole(3), "width": whole(128), "samples_per_prompt": whole(2)}
    theirs |= {"time_length": real(0.5), "guidance_weight": real(2.5), "guidance_interval": (real(0.25), whole(1))}
    theirs |= {"guidance_every": whole(2), "max_sequence_length": whole(100), "scheduler_scale": real(3)}
    ours = {"seed": 7, "num_steps": 3, "width": 128, "samples_per_prompt": 2, "time_length": 0.5}
    ours |= {"guidance_weight": 2.5, "guidance_interval": (0.25, 1), "guidance_every": 2, "max_sequence_length": 100}
    ours |= {"scheduler_scale": 3}
    request = resolve_request(config, "a cat", **theirs)
    assert request == resolve_request(config, "a cat", **ours)
    assert json.loads(json.dumps(dataclasses.asdict(request)))["num_steps"] == 3
    with_frames = {"num_frames": np.int64(49), "seed": 1}
    assert type(resolve_request(config, "a cat", **with_frames).num_frames) is int


BAD = [
    ({"text": ""}, ["empty", "say what"]),
    ({"text": " \n\t"}, ["empty", "say what"]),
    ({"text": 5}, ["5", "string"]),
    ({"text": []}, ["[]", "string or a list"]),
    ({"text": ["a cat", ""]}, ["empty", "say what"]),
    ({"text": ["a cat", 5]}, ["5", "string"]),
    ({"text": None}, ["no prompt", "prompt_embeds"]),
    ({"num_prompts": 1}, ["both", "prompt_embeds"]),
    ({"negative_caption": 5}, ["negative prompt", "5", "string"]),
    ({"negative_caption": ["a", "b"]}, ["2 negative prompts for 1"]),
    ({"samples_per_prompt": 0}, ["0", "whole number from 1"]),
    ({"samples_per_prompt": 1.5}, ["1.5", "whole number from 1"]),
    ({"seed": [1, 2]}, ["2 seeds for 1 outputs"]),
    ({"seed": ["1"]}, ["seed", "'1'", "whole number"]),
    ({"num_frames": 24}, ["24", "4n + 1", "nearest is 25"]),
    ({"num_frames": 0}, ["0", "nearest is 1"]),
    ({"num_frames": 600}, ["600", "nearest is 509"]),
    ({"num_frames": 25, "time_length": 1}, ["both time_length and num_frames"]),
    ({"max_sequence_length": 0}, ["0", "1 to 1024"]),
    ({"max_sequence_length": 1025}, ["1025", "1 to 1024"]),
    ({"image_sizes": [(512, 512)]}, ["t2v", "takes none"]),
    ({"width": 500}, ["width", "500", "multiple of 16", "496"]),
    ({"width": 776}, ["width", "776", "multiple of 16", "nearest is 768"]),
    ({"width": 0}, ["width", "0", "from 16 to 2048"]),
    ({"width": -512}, ["width", "-512", "from 16 to 2048"]),
    ({"height": 2064}, ["height", "2064", "from 16 to 2048", "nearest is 2048"]),
    ({"height": 512.0}, ["height", "512.0", "multiple of 16"]),
    ({"height": True}, ["height", "True", "multiple of 16"]),
    ({"height": "512"}, ["height", "512", "multiple of 16"]),
    ({"time_length": -1}, ["-1 s", "from 0", "21 s"]),
    ({"time_length": 22}, ["22 s", "21 s"]),
    ({"time_length": "5"}, ["'5';", "a number", "21 s"]),
    ({"time_length": float("nan")}, ["nan", "21 s"]),
    ({"time_length": True}, ["True", "21 s"]),
    ({"seed": -1}, ["seed", "-1", "from 0 to 4294967295"]),
    ({"seed": 2**32}, ["seed", "4294967296", "from 0 to 4294967295"]),
    ({"seed": 1.5}, ["seed", "1.5", "whole number"]),
    ({"seed": True}, ["seed", "True", "whole number"]),
    ({"num_steps": 0}, ["steps", "0", "from 1 to 1000"]),
    ({"num_steps": -5}, ["steps", "-5", "from 1 to 1000"]),
    ({"num_steps": 1001}, ["steps", "1001", "from 1 to 1000"]),
    ({"num_steps": 10.0}, ["steps", "10.0", "whole number"]),
    ({"guidance_weight": -0.5}, ["guidance_weight", "-0.5", "from 0 to 100"]),
    ({"guidance_weight": float("inf")}, ["guidance_weight", "inf", "from 0 to 100"]),
    ({"guidance_weight": float("nan")}, ["guidance_weight", "nan", "from 0 to 100"]),
    ({"guidance_weight": "5"}, ["guidance_weight", "5", "number"]),
    ({"scheduler_scale": 0}, ["scheduler_scale", "0", "from 0.01 to 100"]),
    ({"scheduler_scale": -3}, ["scheduler_scale", "-3", "from 0.01 to 100"]),
    ({"scheduler_scale": 10**400}, ["scheduler_scale is 1000", "from 0.01 to 100"]),
    ({"time_length": -(10**400)}, ["the duration is -1000", "0 (an image)"]),
    ({"seed": 10**5000}, ["the seed is a number of thousands of digits", "from 0 to"]),
    ({"samples_per_prompt": 10**9}, ["1000000000 outputs", "to 10000"]),
    ({"num_frames": "25"}, ["num_frames is '25'", "whole number"]),
    ({"num_steps": np.bool_(True)}, ["steps", "whole number"]),
    ({"num_steps": np.float64(3)}, ["steps", "3.0", "whole number"]),
    ({"seed": 7j}, ["the seed is 7j", "whole number"]),
    ({"negative_caption": {"a": 300 * "x"}}, ["negative prompt is {'a': 'xxx", " ... ", "string"]),
]


@pytest.mark.parametrize(("given", "parts"), BAD, ids=[shown(given) for given, _ in BAD])
def test_bad_input_is_one_line_with_what_was_given_and_what_is_allowed(
    config: Config, given: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        resolve_request(config, **{"text": "a cat", **given})
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


@pytest.mark.parametrize("side", ["width", "height"])
def test_nabla_takes_whole_blocks_only(side: str) -> None:
    config = load_config(REPOSITORY / "configs" / "config_10s_sft.yaml")
    request = resolve_request(config, "a cat", **{side: 640})
    assert getattr(request, side) == 640 and request.latent_size[0] == 61
    for wrong, nearest in ((560, 512), (16, 128), (1040, 1024), (5000, 2048)):
        with pytest.raises(ValueError, match=rf"multiple of 128 .*NABLA.*the nearest is {nearest}") as error:
            resolve_request(config, "a cat", **{side: wrong})
        assert "\n" not in str(error.value)


def test_nabla_can_be_switched_on_and_off() -> None:
    path = REPOSITORY / "configs" / "config_5s_sft.yaml"
    with pytest.raises(ValueError, match="multiple of 128"):
        resolve_request(load_config(path, ["model.attention.type=nabla", "model.attention.P=0.8"]), "a cat", width=528)
    path = REPOSITORY / "configs" / "config_10s_sft.yaml"
    assert resolve_request(load_config(path, ["model.attention.type=full"]), "a cat", width=528).width == 528


# --- pictures ---------------------------------------------------------------------------------------------------------


def variant(name: str, *overrides: str) -> Config:
    return load_config(REPOSITORY / "configs" / f"config_{name}.yaml", overrides)


def test_a_video_takes_the_shape_of_its_picture() -> None:
    request = resolve_request(variant("5s_i2v"), "it moves", image_sizes=[(1920, 1080)])
    assert (request.width, request.height, request.num_frames) == (832, 464, 121)
    request = resolve_request(variant("5s_i2v"), "it moves", image_sizes=[(1920, 1080)], width=512, height=512)
    assert (request.width, request.height) == (512, 512)


def test_an_edited_picture_takes_the_nearest_shape() -> None:
    request = resolve_request(variant("i2i"), "make it blue", image_sizes=[(640, 1000)])
    assert (request.width, request.height, request.num_frames) == (768, 1280, 1)


def test_pictures_need_no_size() -> None:
    request = resolve_request(variant("t2i"), "a cat")
    assert (request.width, request.height, request.is_image) == (1024, 1024, True)
    assert request.samples[0].negative_caption == ""


BAD_PICTURES = [
    ("5s_i2v", {}, ["i2v", "needs a picture", "--image"]),
    ("i2i", {}, ["i2i", "needs a picture", "--image"]),
    ("t2i", {"image_sizes": [(512, 512)]}, ["t2i", "takes none"]),
    ("t2i", {"width": 512}, ["512x1024", "1024x1024", "nearest in shape is 640x1408"]),
    ("t2i", {"time_length": 5}, ["makes images"]),
    ("i2i", {"image_sizes": [(800, 600)], "width": 800, "height": 608}, ["800x608", "nearest in shape is 1152x896"]),
    ("5s_i2v", {"image_sizes": [(1, 1)]}, ["1x1"]),
    ("5s_i2v", {"image_sizes": [(1000, 100)]}, ["1000x100"]),
    ("5s_i2v", {"image_sizes": [(600, 400)], "width": 768}, ["width and height belong together"]),
    ("5s_i2v", {"image_sizes": [(600, 400)] * 2}, ["2 pictures for 1 prompts"]),
    ("5s_i2v", {"text": ["a", "b"], "image_sizes": [(600, 400), (400, 600)]}, ["different sizes", "give a width"]),
]


@pytest.mark.parametrize(("name", "given", "parts"), BAD_PICTURES)
def test_pictures_that_cannot_be_taken(name: str, given: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        resolve_request(variant(name), **{"text": "a cat", **given})
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_unusual_sizes_are_warned_about(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    warn_about_size(config, resolve_request(config, "a cat", width=512))
    assert not caplog.records
    warn_about_size(config, resolve_request(config, "a cat", width=640))
    (record,) = caplog.records
    assert "640x512" in record.getMessage() and "768x512" in record.getMessage()


def test_needs_no_torch() -> None:
    code = "import sys, kandinsky.request; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
