"""First steps on a smaller grid: off is off to the bit, and on, what is held, kept, counted and refused is right."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kandinsky.coarse import coarse_steps
from kandinsky.config.reading import load_config
from kandinsky.config.schema import CoarseConfig, Config
from kandinsky.outputs.records import latent_size_at, recorded_config
from kandinsky.outputs.resume import Stopped, load_run
from kandinsky.pipelines.base import Pipeline
from kandinsky.pipelines.inputs import Inputs
from kandinsky.planning.costs import denoising_flops, forward_flops, num_evaluations
from kandinsky.request import resolve_request
from kandinsky.sampling.coarse import coarsened, enlarged, grids_of, pooled, pooled_noise
from kandinsky.sampling.conditioning import compose, frame_item, from_source, overlap_items
from tests.unit.small_pipelines import CONFIGS, TASKS, build, call, latents_of, two_prompts

STEPS = 4


def with_coarse(pipe: Any, share: float = 0.5, scale: float = 0.5) -> Any:
    generation = dataclasses.replace(pipe.config.generation, coarse_steps=CoarseConfig(share=share, scale=scale))
    pipe.config = dataclasses.replace(pipe.config, generation=generation)
    return pipe


def config_of(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"config_{name}.yaml", overrides)


# --- in a pipeline ---


@pytest.mark.parametrize("task", TASKS)
def test_none_is_the_plain_run_to_the_bit(task: str) -> None:
    assert torch.equal(
        latents_of(with_coarse(build(task), 0, 0.75), num_steps=STEPS), latents_of(build(task), num_steps=STEPS)
    )


def test_a_share_that_comes_to_no_step_is_told(caplog: pytest.LogCaptureFixture) -> None:
    pipe = with_coarse(build("t2i"), 0.1)
    call(pipe, num_steps=STEPS)
    assert caplog.messages.count(
        "generation.coarse_steps is 0.1 of 4 steps, which rounds to none (the last one never counts): all are at full "
        "size"
    ) == 1  # fmt: skip
    caplog.clear()
    call(with_coarse(pipe, 0), num_steps=STEPS)
    assert "coarse" not in caplog.text


@pytest.mark.parametrize("task", TASKS)
def test_first_steps_are_small(task: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Latents, tokens and positions; what comes out is as large as ever, and log and record say what was done."""
    caplog.set_level(logging.INFO)
    pipe, sizes, shapes, scales = with_coarse(build(task)), [], [], []
    pipe.dit.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[2:4])))
    tables = pipe.dit.request_tables

    def request_tables(size: Any, length: int, scale: Any, *more: Any) -> Any:
        scales.append((size[1:], [*scale]))
        return tables(size, length, scale, *more)

    pipe.dit.request_tables = request_tables

    def look(_: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> None:
        sizes.append(tuple(tensors["latents"].shape[2:4]))

    output = tmp_path / ("a.mp4" if task.endswith("v") else "a.png")
    call(pipe, num_steps=STEPS, callback_on_step_end=look, save_path=output, width=32, height=32)
    assert caplog.messages.count("32x32, of which the first 2 of 4 steps are made at 16x16") == 1
    assert sizes == [(2, 2), (4, 4), (4, 4), (4, 4)]  # what enters the third step is large already
    assert shapes == [(2, 2)] * 4 + [(4, 4)] * 4  # two evaluations a step
    full = list(pipe.config.metrics.scale_factor)
    assert scales == [((2, 2), [full[0], full[1] / 2, full[2] / 2]), ((4, 4), full)]
    facts = json.loads(output.with_suffix(".json").read_text())
    assert facts["coarse_steps"] == {"steps": 2, "width": 16, "height": 16}
    assert facts["config"]["generation"]["coarse_steps"] == {"share": 0.5, "scale": 0.5}
    assert (facts["width"], facts["height"]) == (32, 32)


def test_the_switch_is_noise_on_the_enlarged_estimate() -> None:
    """With a velocity that is always the way from the noise to one clean value, the estimate is exact."""
    pipe = with_coarse(build("t2v"))
    seen: list[Tensor] = []
    grids: list[Any] = []

    def velocity(latents: Tensor, *_: Any, **__: Any) -> Tensor:
        grid = grids[0].at(0 if latents.shape[2] == 2 else STEPS)
        return grid.noise - 3.0  # noise - clean

    request = resolve_request(pipe.config, "a red cat", seed=1, num_steps=STEPS, guidance_weight=1)
    run = pipe._encoded(request, Inputs(), _watch())
    grids.append(grids_of(run.conditioning, pipe._coarse(request)))
    assert torch.equal(run.state.latents, pooled_noise(run.conditioning.noise, 2, 2))
    pipe.dit.forward = velocity
    pipe.denoise(run, progress=False, callback=lambda _, step, t, tensors: seen.append(tensors["latents"].clone()))
    level = float(_levels(request)[2])
    torch.testing.assert_close(seen[1], (1 - level) * 3.0 + level * run.conditioning.noise)
    torch.testing.assert_close(seen[-1], torch.full_like(seen[-1], 3.0), atol=1e-5, rtol=0)


def _watch() -> Any:
    from kandinsky.pipelines.stopwatch import Stopwatch

    return Stopwatch()


def _levels(request: Any) -> Tensor:
    from kandinsky.sampling.sampler import flow_timesteps

    return flow_timesteps(request.num_steps, request.scheduler_scale, request.schedule)


def arguments(pipe: Pipeline) -> tuple[Any, Inputs]:
    """The first step after the switch goes on with guidance's difference from before it."""
    return two_prompts(pipe, STEPS, width=32, height=32, guidance_every=3)


@pytest.mark.parametrize("task", TASKS)
def test_the_same_bytes_from_every_step(task: str, tmp_path: Path) -> None:
    """A run that is stopped before, at and after the switch goes on to what the whole one makes."""
    name = "out.png" if task.endswith("i") else "out.mp4"

    def made(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".mp4", ".png")}

    expected = with_coarse(build(task))
    expected.generate(*arguments(expected), tmp_path / "whole" / name, progress=False)
    for step in range(1, STEPS):
        folder = tmp_path / str(step)

        def interrupt(pipe: Any, done: int, *_: Any, step: int = step) -> None:
            pipe.interrupt = done + 1 == step

        pipe = with_coarse(build(task))
        with pytest.raises(Stopped) as stopped:
            pipe.generate(*arguments(pipe), folder / name, progress=False, callback=interrupt, keep_stopped=True)
        run = load_run(stopped.value.path)
        assert run.state.latents.shape[2] == (
            run.request.latent_size[1] // 2 if step < 2 else run.request.latent_size[1]
        )
        with_coarse(build(task)).resume(run, folder / name, progress=False)
        assert made(folder) == made(tmp_path / "whole"), step


def test_a_run_goes_on_with_the_grids_that_it_began_with() -> None:
    record = {"config": json.loads(json.dumps(dataclasses.asdict(config_of("tiny_t2v")), default=str))}
    for override in ("generation.coarse_steps.share=0.5", "generation.coarse_steps={share: 0.5}"):
        with pytest.raises(ValueError, match="goes on with what its run began with"):
            recorded_config(record, [override], "a.stopped.safetensors", decoding=False)


def test_what_ends_early_is_as_large_as_was_asked_for() -> None:
    def stop(pipe: Any, *_: Any) -> None:
        pipe.interrupt = True

    assert latents_of(with_coarse(build("t2v")), num_steps=STEPS, callback_on_step_end=stop).shape[2:4] == (4, 4)


def test_given_frames_are_held_on_both_grids() -> None:
    """The first frame of a video from a picture: pooled before the switch, as it is after it."""
    pipe, seen = with_coarse(build("i2v")), []
    generation = dataclasses.replace(pipe.config.generation, first_frame_normalization=False)
    pipe.config = dataclasses.replace(pipe.config, generation=generation)
    last = latents_of(
        pipe,
        num_steps=STEPS,
        width=32,
        height=32,
        callback_on_step_end=lambda _, step, t, tensors: seen.append(tensors["latents"][:, :1].clone()),
    )
    assert torch.equal(seen[1], last[:, :1]) and torch.equal(seen[2], seen[1])
    torch.testing.assert_close(seen[0], pooled(last[:, :1], 2, 2))


# --- on tensors ---


def test_everything_becomes_coarse() -> None:
    noise, picture = torch.randn(2, 3, 6, 8, 4), torch.randn(2, 6, 8, 4)
    keep = torch.rand(1, 2, 6, 8, 1)
    item = dataclasses.replace(overlap_items(torch.randn(2, 2, 6, 8, 4), False)[0], region=keep)
    for conditioning in (
        compose(noise, 9, [frame_item("first frame", picture, 0, "image"), frame_item("last", picture, 2)]),
        compose(noise, 9, [item]),
        from_source(noise[:, :1], picture),
    ):
        small = coarsened(conditioning, 3, 4)
        assert small.noise.shape == (*conditioning.noise.shape[:2], 3, 4, 4)
        assert small.extra is not None and small.extra.shape[2:4] == (3, 4)
        assert set(small.extra[..., -1].unique().tolist()) <= {0.0, 1.0}  # frames are marked wholly or not
        for one, full in zip(small.items, conditioning.items, strict=True):
            assert one.facts() == full.facts() and one.latents.shape[2:4] == (3, 4)
        held = small.hold(torch.zeros_like(small.noise), 0.5)
        torch.testing.assert_close(
            small.model_input(held).shape[-1], conditioning.model_input(conditioning.noise).shape[-1]
        )
    assert coarsened(compose(noise, 9, [item]), 3, 4).items[0].region.shape == (1, 2, 3, 4, 1)  # type: ignore[union-attr]


def test_pooled_noise_is_noise() -> None:
    """Of unit variance in every cell, also where cells do not divide the grid evenly; and the mean of what is there."""
    noise = torch.randn(64, 4, 10, 6, 16, generator=torch.Generator().manual_seed(0))
    for rows, columns in ((5, 3), (7, 4)):
        small = pooled_noise(noise, rows, columns)
        std = small.flatten(0, 1).permute(1, 2, 0, 3).flatten(2).std(-1)  # (rows, columns)
        torch.testing.assert_close(std, torch.ones(rows, columns), atol=0.06, rtol=0)
    torch.testing.assert_close(pooled_noise(noise, 5, 3), pooled(noise, 5, 3) * 2)
    flat = torch.full((1, 2, 3, 4, 5), 7.0)
    torch.testing.assert_close(enlarged(flat, torch.empty(1, 2, 6, 8, 5)), torch.full((1, 2, 6, 8, 5), 7.0))


# --- sizes, costs, refusals ---


@pytest.mark.parametrize(
    ("name", "scale", "size", "small"),
    [
        ("5s_sft", 0.5, (768, 512), (384, 256)),
        ("5s_sft", 0.5, (832, 464), (416, 224)),  # half of 464 is no multiple of 16: rounded, half to even
        ("10s_sft", 0.5, (768, 512), (384, 256)),
        ("5s_t2v_pro_hd", 0.5, (1280, 768), (640, 384)),
        ("tiny_t2v", 0.75, (128, 128), (96, 96)),
    ],
)
def test_sizes(name: str, scale: float, size: tuple[int, int], small: tuple[int, int]) -> None:
    config = config_of(name, f"generation.coarse_steps={{share: 0.4, scale: {scale}}}")
    found = coarse_steps(config, 50, *size)
    assert found is not None and (found.steps, found.width, found.height) == (20, *small)
    request = resolve_request(config, "a cat", width=size[0], height=size[1], seed=1, num_steps=50)
    assert latent_size_at(config, request, 19)[1:] == (small[1] // 8, small[0] // 8)
    assert latent_size_at(config, request, 20) == request.latent_size
    early = dataclasses.replace(request, width=small[0], height=small[1])
    count, first = num_evaluations(request), num_evaluations(request, 20)
    assert first == 40 and count == 100
    expected = first * forward_flops(config, early) + 60 * forward_flops(config, request)
    assert denoising_flops(config, request) == expected < count * forward_flops(config, request)


def test_few_steps() -> None:
    config = config_of("tiny_t2v", "generation.coarse_steps.share=0.9")
    assert coarse_steps(config, 1, 128, 128) is None  # the last step is never coarse
    assert coarse_steps(config, 2, 128, 128).steps == 1  # type: ignore[union-attr]
    assert coarse_steps(config_of("tiny_t2v"), 16, 128, 128) is None


@pytest.mark.parametrize(
    ("name", "override", "asked", "message"),
    [
        ("tiny_t2v", "share: 1", {}, "generation.coarse_steps.share = 1.0 is not allowed: it must be 0"),
        ("tiny_t2v", "share: 0.5, scale: 1", {}, "scale = 1.0 is not allowed: it must be more than 0"),
        ("tiny_t2v", "share: 0.5, scale: 0.99", {}, "128x128 would become 128x128"),
        ("tiny_t2v", "share: 0.5", {"width": 16, "height": 16}, "16x16 would become 16x16"),
        ("10s_sft", "share: 0.5", {"width": 640, "height": 384}, "in multiples of 128 pixels"),
        ("tiny_t2v", "share: 0.5", {"clip": (128, 128, 9)}, "a video or picture to start from"),
        ("tiny_t2i", "share: 0.5", {"image_sizes": [(128, 128)], "strength": 0.5}, "a video or picture to start from"),
    ],
)
def test_refusals(name: str, override: str, asked: dict[str, Any], message: str) -> None:
    """From the config and the wishes alone, in one line."""
    with pytest.raises(ValueError, match=message.replace("+", r"\+")) as error:
        resolve_request(config_of(name, f"generation.coarse_steps={{{override}}}"), "a cat", **asked)
    assert "\n" not in str(error.value)


def test_magcache_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0 with magcache\.enabled"):
        config_of("tiny_t2v", "generation.coarse_steps.share=0.5", "magcache.enabled=true")
