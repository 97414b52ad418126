"""What a person may ask for: defaults from the YAML, and one clear line for everything that can't be done."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kandinsky.config import Config, load_config
from kandinsky.request import MAX_SEED, Request, resolve_request, warn_about_size

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(REPOSITORY / "configs" / "config_5s_sft.yaml")


def test_defaults_are_the_yamls(config: Config) -> None:
    request = resolve_request(config, "a cat")
    assert request == Request(
        text="a cat",
        negative_caption=config.generation.negative_caption,
        width=768,
        height=512,
        num_frames=121,
        seed=request.seed,
        num_steps=50,
        guidance_weight=5.0,
        scheduler_scale=5.0,
    )
    assert request.negative_caption.startswith("Static, 2D cartoon")


def test_defaults_follow_the_yaml() -> None:
    overrides = [
        "metrics.scheduler_scale=7.5",
        "model.num_steps=12",
        "model.guidance_weight=2.5",
        "generation.width=512",
        "generation.time_length=2",
        "generation.negative_caption=blurry",
    ]
    request = resolve_request(load_config(REPOSITORY / "configs" / "config_5s_sft.yaml", overrides), "a cat")
    assert dataclasses.replace(request, seed=0) == Request("a cat", "blurry", 512, 512, 49, 0, 12, 2.5, 7.5)


GIVEN = {
    "width": 512,
    "height": 768,
    "seed": 42,
    "num_steps": 3,
    "guidance_weight": 1.0,
    "scheduler_scale": 8.0,
    "negative_caption": "",
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_is_given_wins_and_none_is_the_yamls(config: Config, name: str) -> None:
    default = resolve_request(config, "a cat", seed=1)
    given = resolve_request(config, "a cat", **{"seed": 1, name: GIVEN[name]})
    assert getattr(given, name) == GIVEN[name] != getattr(default, name)
    others = {field.name for field in dataclasses.fields(Request)} - {name}
    assert all(getattr(given, other) == getattr(default, other) for other in others)
    if name != "seed":
        assert resolve_request(config, "a cat", **{"seed": 1, name: None}) == default


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
    seeds = {resolve_request(config, "a cat").seed for _ in range(8)}
    assert len(seeds) == 8 and all(0 <= seed <= MAX_SEED for seed in seeds)


BAD = [
    ({"text": ""}, ["empty", "say what"]),
    ({"text": " \n\t"}, ["empty", "say what"]),
    ({"text": 5}, ["5", "string"]),
    ({"text": None}, ["None", "string"]),
    ({"negative_caption": 5}, ["negative prompt", "5", "string"]),
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
    ({"time_length": "5"}, ["5 s", "21 s"]),
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
]


@pytest.mark.parametrize(("given", "parts"), BAD, ids=[str(given) for given, _ in BAD])
def test_bad_input_is_one_line_with_what_was_given_and_what_is_allowed(
    config: Config, given: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        resolve_request(config, **{"text": "a cat", **given})
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


@pytest.mark.parametrize("name", ["config_10s_sft", "config_10s_nocfg", "config_10s_pretrain", "config_10s_distil"])
def test_nabla_variants_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(ValueError) as error:
        resolve_request(load_config(REPOSITORY / "configs" / f"{name}.yaml"), "a cat")
    message = str(error.value)
    assert "\n" not in message
    assert f"{name}.yaml" in message and "NABLA" in message and "configs/config_5s_sft.yaml" in message
    assert (REPOSITORY / "configs" / "config_5s_sft.yaml").is_file()


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
