"""The VAE's memory budget: which tiles it comes to, and what decoding does with them and when memory runs out.

Whether the formula is right is for test_memory.py, which measures.
"""

from __future__ import annotations

import dataclasses
import logging
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kandinsky.config.defaults import HD_SIZES, SD_SIZES
from kandinsky.config.reading import load_config
from kandinsky.config.schema import Config
from kandinsky.loading.assemble import PIPELINES
from kandinsky.models import vae_memory
from kandinsky.models.vae_flux import AutoencoderKL
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
from kandinsky.models.vae_memory import GB, Decoding
from kandinsky.models.vae_tiling import VAETiling, apply_tiled
from kandinsky.pipelines.base import Pipeline
from kandinsky.pipelines.decode import to_unit
from kandinsky.runtime.placement import FixedPlacement

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PUBLISHED = Decoding("hunyuan", (128, 256, 512, 512), 2, 1280, 768, 121, 64)


def test_constants_are_the_models() -> None:
    assert VAETiling().frames == vae_memory.WINDOW_FRAMES


@given(
    budget=st.floats(0.5, 40),
    size=st.sampled_from((*SD_SIZES, *HD_SIZES)),
    frames=st.sampled_from((1, 13, 121, 241)),
    vae=st.sampled_from(("hunyuan", "flux")),
    spatial_tile=st.sampled_from((128, 256, 448, 768, 1408)),
)
def test_tile_of_a_budget(budget: float, size: tuple[int, int], frames: int, vae: str, spatial_tile: int) -> None:
    """It fits, and nothing with fewer tiles does; it is never larger than the explicit tile."""
    frames = frames if vae == "hunyuan" else 1
    decoding = dataclasses.replace(PUBLISHED, vae=vae, width=size[0], height=size[1], num_frames=frames)
    tile = decoding.tile_within(budget * GB, spatial_tile)
    allowed = [spatial_tile, *range(256, spatial_tile, 64)]
    assert tile in allowed
    fitting = [other for other in allowed if decoding.peak_bytes(other) <= budget * GB]
    if fitting:
        assert tile in fitting
        assert decoding.num_tiles(tile) == min(map(decoding.num_tiles, fitting))
    else:
        assert tile == min(allowed)
    assert decoding.num_tiles(decoding.tile_within(2 * budget * GB, spatial_tile)) <= decoding.num_tiles(tile)


def test_tiles_of_published_sizes() -> None:
    """Written down, because they decide pixels: a change of the formula is a change of results."""
    lite = dataclasses.replace(PUBLISHED, width=768, height=512)
    tiles = {budget: lite.tile_within(budget * GB, 768) for budget in (2, 4, 6, 8)}
    assert tiles == {2: 256, 4: 448, 6: 512, 8: 768}
    hd = {budget: PUBLISHED.tile_within(budget * GB, 768) for budget in (4, 6, 9, 13)}
    assert hd == {4: 384, 6: 512, 9: 512, 13: 768}
    pictures = dataclasses.replace(PUBLISHED, vae="flux", width=1024, height=1024, num_frames=1)
    assert [pictures.tile_within(b * GB, 1408) for b in (0.2, 0.5, 1.5)] == [384, 576, 1408]


@pytest.mark.parametrize("size", [*SD_SIZES, *HD_SIZES])
def test_what_is_tried_next_is_what_a_budget_for_it_gives(size: tuple[int, int]) -> None:
    """So a plan that counts with a budget and a decoder that has run out of memory come to the same tiles."""
    decoding = dataclasses.replace(PUBLISHED, width=size[0], height=size[1])
    tile, tried = 768, []
    while (smaller := decoding.smaller_tile(tile)) is not None:
        assert smaller < tile and decoding.peak_bytes(smaller) < decoding.peak_bytes(tile)
        assert smaller == decoding.tile_within(decoding.peak_bytes(smaller), tile)
        tried.append(tile := smaller)
    assert tried[-1] == 256 and 2 <= len(tried) <= 4


@pytest.mark.parametrize("size", [(768, 512), (1280, 768), (1024, 1024)])
@pytest.mark.parametrize("tile", [256, 448, 512, 768])
def test_work_is_what_is_decoded(size: tuple[int, int], tile: int) -> None:
    width, height = size
    decoded = 0

    def count(z: Tensor) -> Tensor:
        nonlocal decoded
        decoded += 64 * z.shape[-1] * z.shape[-2]
        return z.repeat_interleave(8, -1).repeat_interleave(8, -2)

    apply_tiled(count, torch.zeros(1, 1, height // 8, width // 8), VAETiling(size=tile).spatial_axes(8, True))
    work = dataclasses.replace(PUBLISHED, width=width, height=height).work(tile)
    assert decoded / (width * height) == pytest.approx(work, rel=0.03)  # blocks of 8 pixels


# --- decoding ---------------------------------------------------------------------------------------------------------


def small_pipeline(task: str, **vae_settings: object) -> Pipeline:
    """A pipeline that can do nothing but decode."""
    config: Config = load_config(CONFIGS / f"config_{'5s_sft' if task == 't2v' else 't2i'}.yaml")
    model = dataclasses.replace(config.model, vae=dataclasses.replace(config.model.vae, **vae_settings))
    torch.manual_seed(0)
    kind = AutoencoderKLHunyuanVideo if task == "t2v" else AutoencoderKL
    vae = kind(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4).eval().requires_grad_(False)
    devices = dict.fromkeys(("dit", "vae", "text_embedder"), torch.device("cpu"))
    nothing = nn.Module()
    config = dataclasses.replace(config, model=model)
    return PIPELINES[task](config, nothing, nothing, vae, FixedPlacement(devices))  # type: ignore[arg-type]


def latents(samples: int = 1, frames: int = 1, width: int = 448, height: int = 320) -> Tensor:
    shape = (samples, frames, height // 8, width // 8, 16)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class Memory:
    """A double for a GPU's: decoding tiles of more than `pixels` on a side runs out of it."""

    def __init__(self, pipe: Pipeline, pixels: int) -> None:
        self.pixels = pixels
        self.tiles: list[int] = []  # the larger side of every tile, in pixels
        self.failed: list[weakref.ref[Tensor]] = []  # what the last attempt was working on
        pipe.vae.decoder.register_forward_pre_hook(self.look)

    def look(self, module: nn.Module, arguments: tuple[Tensor]) -> None:
        z = arguments[0]
        assert all(tile() is None for tile in self.failed), "tensors of the failed attempt are still there"
        self.tiles.append(8 * max(z.shape[-2:]))
        if self.tiles[-1] > self.pixels:
            self.failed.append(weakref.ref(z))
            raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("task", ["t2v", "t2i"])
@torch.no_grad()
def test_budget_is_the_tile_it_comes_to(task: str) -> None:
    """Bit for bit; and of a budget and an explicit tile the smaller wins."""
    z = latents()
    budget = small_pipeline(task)._decoding(z).peak_bytes(320) / GB
    expected = small_pipeline(task, spatial_tile=320).decode(z)
    pipe = small_pipeline(task, memory_budget_gb=budget, spatial_tile=768)
    tiles = Memory(pipe, 4096).tiles
    assert torch.equal(pipe.decode(z), expected)
    assert max(tiles) == 320 and len(tiles) == 2
    assert not torch.equal(small_pipeline(task).decode(z), expected)  # tiles do change pixels: the test can tell
    smaller = small_pipeline(task, memory_budget_gb=100.0, spatial_tile=320)
    assert torch.equal(smaller.decode(z), expected)


@pytest.mark.parametrize("task", ["t2v", "t2i"])
@torch.no_grad()
def test_out_of_memory_goes_on_with_smaller_tiles(task: str, caplog: pytest.LogCaptureFixture) -> None:
    """For both samples, the failed attempt's tensors gone, and the log names the setting that gives the same result."""
    z = latents(samples=2)
    pipe = small_pipeline(task)
    memory = Memory(pipe, 330)
    with caplog.at_level(logging.WARNING):
        pixels = pipe.decode(z)
    assert memory.tiles[0] == 448 and memory.tiles.count(448) == 1 and set(memory.tiles[1:]) == {320}
    assert "ran out of memory in tiles of" in caplog.text
    assert "pixels and starts again with 320; model.vae.spatial_tile=320 does so" in caplog.text
    assert torch.equal(pixels, small_pipeline(task, spatial_tile=320).decode(z))


@torch.no_grad()
def test_out_of_memory_down_to_the_smallest_tile(caplog: pytest.LogCaptureFixture) -> None:
    pipe = small_pipeline("t2i")
    memory = Memory(pipe, 100)
    with pytest.raises(torch.OutOfMemoryError, match=r"even in tiles of 256 pixels.*CUDA out of memory"):
        pipe.decode(latents(width=640, height=640))
    assert memory.tiles == [640, 384, 256]
    assert len(caplog.records) == len(memory.tiles) - 1


@torch.no_grad()
def test_other_errors_pass() -> None:
    pipe = small_pipeline("t2i")
    pipe.vae.decoder.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        pipe.decode(latents())


@torch.no_grad()
def test_a_budget_that_is_too_small_for_any_tile_takes_the_smallest() -> None:
    """All the denoising is done by then; plans and loading refuse such a budget beforehand."""
    pipe = small_pipeline("t2i", memory_budget_gb=1e-6)
    tiles = Memory(pipe, 4096).tiles
    assert pipe.decode(latents()).shape == (1, 3, 1, 320, 448)
    assert set(tiles) == {256}


@torch.no_grad()
def test_small_tiles_have_an_overlap_that_they_have_room_for() -> None:
    pipe = small_pipeline("t2i", memory_budget_gb=1e-6, spatial_overlap=256)
    assert pipe.decode(latents()).shape == (1, 3, 1, 320, 448)


@torch.no_grad()
def test_frames_are_finished_a_few_at_a_time() -> None:
    """What `finish` makes of all at once, without its memory."""
    pipe, z = small_pipeline("t2v"), latents(frames=4, width=64, height=48)
    lengths: list[int] = []

    def finish(pixels: Tensor) -> Tensor:
        lengths.append(pixels.shape[2])
        return to_unit(pixels)

    video = pipe.decode(z, finish)
    assert lengths == [8, 5] and video.shape == (1, 3, 13, 48, 64)
    whole = pipe.vae.decode((z / pipe.vae.scaling_factor).permute(0, 4, 1, 2, 3))
    assert torch.equal(video, to_unit(whole))
