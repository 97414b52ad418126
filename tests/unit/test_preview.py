"""Previews: a linear map from latents to colours, and pictures of it beside the output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kandinsky.config.reading import load_config, with_settings
from kandinsky.outputs.preview import FILE, LatentRGB, Previews, load_latent_rgb
from kandinsky.sampling.sampler import flow_timesteps
from tests.unit.small_pipelines import build, call
from tools.fit_latent_rgb import colours_of, explained, fit

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "config_tiny_t2i.yaml"


def plain(channels: int = 4) -> LatentRGB:
    """The first three channels are the colours."""
    return LatentRGB(torch.eye(channels)[:, :3], torch.tensor([0.0, 0.0, 0.5]), shift=0.25)


def test_colours_are_the_formula() -> None:
    latents = torch.zeros(2, 3, 5, 4)
    latents[..., 0], latents[..., 1] = 1.25, -0.75
    frames = plain()(latents)
    assert frames.shape == (3, 2, 12, 20) and frames.dtype == torch.uint8
    # 1.25 - 0.25 = 1 -> 255; -0.75 - 0.25 = -1 -> 0; -0.25 + 0.5 = 0.25 -> 159
    assert frames[:, 1, 6, 7].tolist() == [255, 0, 159]


def test_published_maps_and_a_vae_s_own(tmp_path: Path) -> None:
    hunyuan, flux = load_latent_rgb(tmp_path, "hunyuan"), load_latent_rgb(tmp_path, "flux")
    assert hunyuan.factors.shape == flux.factors.shape == (16, 3)
    assert hunyuan.shift == 0 and flux.shift == pytest.approx(0.1159 * 0.3611)
    values = {"factors": [[1, 0, 0]] * 16, "bias": [0, 0, 1]}
    (tmp_path / FILE).write_text(json.dumps(values))
    assert load_latent_rgb(tmp_path, "flux").bias.tolist() == [0, 0, 1]
    (tmp_path / FILE).write_text('{"factors": [[1, 2]], "bias": [0, 0, 0]}')
    with pytest.raises(ValueError, match="holds no linear map"):
        load_latent_rgb(tmp_path, "flux")


def test_every_nth_step_and_not_the_last(tmp_path: Path) -> None:
    previews = Previews(2, plain(), [tmp_path / "a.png", tmp_path / "a_2.png"])
    written = []
    for step in range(6):
        previews(step, 6, torch.full((2, 1, 2, 2, 4), step / 10))
        if (tmp_path / "a.preview.png").exists():
            written.append(step)
            for path in previews.paths:
                path.unlink()
            assert list(tmp_path.iterdir()) == []
    assert written == [1, 3]


def test_a_run_shows_its_estimate_and_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a straight line to the data every step's estimate is the data."""
    pipe: Any = build("t2v", latent_rgb=plain(16))
    pipe.config = with_settings(pipe.config, runtime={"preview": 1})
    data = torch.linspace(-1, 1, 2 * 4 * 4 * 16).view(1, 2, 4, 4, 16)
    start = torch.randn(1, 2, 4, 4, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(type(pipe.dit), "forward", lambda self, x, *args, **kwargs: start - data)
    seen = []
    monkeypatch.setattr(Previews, "__call__", lambda self, step, steps, latents: seen.append((step, latents)))
    call(pipe, latents=start, num_steps=4, guidance_weight=1.0, save_path=tmp_path / "a.mp4")
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    for _, latents in seen:
        torch.testing.assert_close(latents, data, atol=1e-5, rtol=0)
    assert float(flow_timesteps(4, 5.0)[1]) < 1  # the estimate is not simply the latents


def test_files_beside_the_output(tmp_path: Path) -> None:
    pipe: Any = build("t2v", latent_rgb=plain(16))
    pipe.config = with_settings(pipe.config, runtime={"preview": 1})
    there: list[set[str]] = []
    call(
        pipe,
        num_steps=3,
        num_videos_per_prompt=2,
        save_path=tmp_path / "a.mp4",
        callback_on_step_end=lambda *_: there.append({path.name for path in tmp_path.iterdir()}),
    )
    assert there == [{"a.preview.mp4", "a_2.preview.mp4"}] * 3
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.json", "a_2.mp4", "a_2.json"}


def test_without_an_output_there_is_no_preview(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipe: Any = build("t2i", latent_rgb=plain(16))
    pipe.config = with_settings(pipe.config, runtime={"preview": 1})
    call(pipe)
    assert not list(tmp_path.iterdir())


def test_zero_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"runtime.preview = 0 is not allowed: .*at least 1 step"):
        load_config(CONFIG, ["runtime.preview=0"])


def test_fit_finds_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(200, 6, generator=generator)
    factors, bias = torch.randn(6, 3, generator=generator), torch.tensor([0.1, 0.2, 0.3])
    found, found_bias = fit(latents, latents @ factors + bias)
    torch.testing.assert_close(found, factors, atol=1e-5, rtol=0)
    torch.testing.assert_close(found_bias, bias, atol=1e-5, rtol=0)
    assert explained(latents, latents @ factors + bias, found, found_bias) == pytest.approx(1)
    assert explained(latents, latents @ factors + bias, torch.zeros(6, 3), (latents @ factors + bias).mean(0)) < 1e-6


def test_colours_of_latent_pixels() -> None:
    pixels = torch.zeros(3, 5, 16, 8)
    pixels[:, 0], pixels[:, 1:3, 8:] = 1, 0.5
    colours = colours_of(pixels)
    assert colours.shape == (2, 2, 1, 3)
    assert colours[..., 0].flatten().tolist() == [1, 1, 0, 0.25]


@pytest.mark.parametrize("task", ["t2v", "image"])
def test_the_tiny_maps_are_near_the_colours(task: str) -> None:
    """Of a red and a blue picture, encoded by the tiny VAEs."""
    from kandinsky.loading.vae import load_vae

    path = CONFIG.parents[1] / "assets" / "tiny" / task / "vae"
    vae: Any = load_vae(path, "cpu", torch.float32, "hunyuan" if task == "t2v" else "flux")
    to_rgb = load_latent_rgb(path, "hunyuan")
    for name in ("red", "blue"):
        rgb = np.array(Image.new("RGB", (64, 64), name))
        pixels = torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            latents = vae.encode(pixels[:, :, None] if task == "t2v" else pixels).mode() * vae.scaling_factor
        found = to_rgb(latents.view(16, 1, 8, 8).permute(1, 2, 3, 0)).float().mean((1, 2, 3)) / 255
        assert found.argmax() == (0 if name == "red" else 2), found
