"""MagCache and cheaper guidance in the pipelines: what they save, that nothing else changes, that nothing stays behind.

On small random models, whose residuals are no better for caching than any others: what is checked is that the right
evaluations run and what is made of them, to the bit, not that the result is good.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_pipelines import TASKS, Abort, abort_at, build, call, count_name, latents_of
from torch import Tensor

from kandinsky import get_I2I_pipeline
from kandinsky.config.reading import load_config
from kandinsky.config.schema import MagCacheConfig
from kandinsky.loading.assemble import load_pipeline
from kandinsky.pipelines.base import Pipeline
from kandinsky.runtime.magcache import MagCache, cache_for_request, skip_plan
from kandinsky.sampling.sampler import flow_timesteps

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STEPS = 6
MAGCACHE = MagCacheConfig(mag_ratios=(0.98, 1.01) * (STEPS - 1), enabled=True)


def with_cache(task: str, **changes: Any) -> Any:
    return build(task, make_cache=functools.partial(cache_for_request, dataclasses.replace(MAGCACHE, **changes)))


@contextmanager
def counted(pipe: Any) -> Iterator[dict[str, int]]:
    """How often the DiT and how often its first visual block ran."""
    counts = {"evaluations": 0, "blocks": 0}

    def hook(name: str) -> Any:
        def count(*_: object) -> None:
            counts[name] += 1

        return count

    handles = [
        pipe.dit.register_forward_hook(hook("evaluations")),
        pipe.dit.visual_transformer_blocks[0].register_forward_hook(hook("blocks")),
    ]
    yield counts
    for handle in handles:
        handle.remove()


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return request.param


# --- what it does -----------------------------------------------------------------------------------------------------


def test_skipped_evaluations_run_no_visual_block(task: str) -> None:
    pipe = with_cache(task)
    for guidance_weight, branches in ((4.0, 2), (1.0, 1)):
        plan = skip_plan(MAGCACHE.mag_ratios or (), STEPS, branches == 2)
        assert 0 < sum(plan) < len(plan)
        with counted(pipe) as counts:
            latents_of(pipe, num_steps=STEPS, guidance_weight=guidance_weight)
        assert counts == {"evaluations": branches * STEPS, "blocks": branches * STEPS - sum(plan)}


@torch.no_grad()
def test_result_is_that_of_the_loop_by_hand() -> None:
    pipe = with_cache("t2i")
    dit, sigmas = pipe.dit, flow_timesteps(STEPS, 3.0)
    texts = {"cond": pipe.encode_prompt("a red cat"), "uncond": pipe.encode_prompt("")}
    plan = iter(skip_plan(MAGCACHE.mag_ratios or (), STEPS, True))
    latents = torch.randn((1, 4, 4, 16), generator=torch.Generator().manual_seed(1))[None]
    residuals: dict[str, Tensor] = {}
    for step in range(STEPS):
        velocity = {}
        for branch, text in texts.items():
            tables = dit.request_tables((1, 4, 4), text.text_embeds.shape[1], (1.0, 1.0, 1.0), "cpu")
            time = (1000 * sigmas[step]).expand(1)
            before, inputs = dit.embed(latents, text.text_embeds, text.pooled_embeds, time, tables, None)
            if not next(plan):
                residuals[branch] = dit.run_blocks(before, inputs) - before
            velocity[branch] = dit.head(before + residuals[branch], inputs)
        guided = velocity["uncond"] + 2.0 * (velocity["cond"] - velocity["uncond"])
        latents = latents + (sigmas[step + 1] - sigmas[step]) * guided
    result = latents_of(pipe, num_steps=STEPS, guidance_weight=2.0, scheduler_scale=3.0, negative_caption="")
    assert torch.allclose(result, latents, atol=1e-4)
    assert not torch.allclose(result, latents_of(build("t2i"), num_steps=STEPS, guidance_weight=2.0), atol=1e-2)


def test_threshold_zero_is_bit_for_bit_no_cache(task: str) -> None:
    plain = latents_of(build(task), num_steps=STEPS)
    assert torch.equal(latents_of(with_cache(task, threshold=0.0), num_steps=STEPS), plain)
    assert not torch.equal(latents_of(with_cache(task), num_steps=STEPS), plain)


def test_samples_of_a_batch_get_what_each_gets_alone_to_the_bit(task: str) -> None:
    pipe = with_cache(task)
    together = latents_of(pipe, ["a red cat", "a fat dog"], seed=[4, 5], num_steps=STEPS)
    alone = [latents_of(pipe, text, seed=seed, num_steps=STEPS) for text, seed in (("a red cat", 4), ("a fat dog", 5))]
    assert torch.equal(together, torch.cat(alone))
    several = latents_of(pipe, seed=4, num_steps=STEPS, **{count_name(pipe): 2})
    assert torch.equal(several[0], together[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_and_head_see_the_models_dtype(dtype: torch.dtype) -> None:
    pipe = with_cache("t2i")
    pipe.dit.to(dtype)
    head, seen = pipe.dit.head, set()

    def spied(hidden: Tensor, inputs: Any) -> Tensor:
        seen.add(hidden.dtype)
        return head(hidden, inputs)

    pipe.dit.head = spied
    latents_of(pipe, num_steps=STEPS)
    assert seen == {dtype}


# --- nothing stays behind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last_step", range(STEPS - 1))
def test_after_an_abort_everything_is_as_new(last_step: int) -> None:
    fresh = latents_of(with_cache("t2i"), num_steps=STEPS)
    pipe = with_cache("t2i")
    with pytest.raises(Abort):
        latents_of(pipe, "a blue dog", seed=8, num_steps=STEPS, callback_on_step_end=abort_at(last_step))
    assert torch.equal(latents_of(pipe, num_steps=STEPS), fresh)


def test_calls_do_not_notice_each_other(task: str) -> None:
    """Other steps, guidance on and off, guidance in an interval, an interrupted call: one after the other."""
    pipe = with_cache(task)

    def interrupt(pipe: Pipeline, step: int, *_: object) -> None:
        pipe.interrupt = step == 2

    calls: list[dict[str, Any]] = [
        {"num_steps": STEPS},
        {"num_steps": 9},
        {"num_steps": 3, "guidance_weight": 1.0},
        {"num_steps": STEPS, "callback_on_step_end": interrupt},
        {"num_steps": 9, "guidance_interval": (0.3, 0.8), "guidance_weight": 2.0},
        {"num_steps": STEPS, "guidance_weight": 1.0},
    ]
    expected = [latents_of(with_cache(task), **options) for options in calls]
    for _ in range(2):
        for options, latents in zip(calls, expected, strict=True):
            assert torch.equal(latents_of(pipe, **options), latents), options


def test_runs_in_the_middle_of_each_other() -> None:
    """In every step of a run a whole run of another pipeline, and one of the same."""
    expected = latents_of(with_cache("t2i"), num_steps=STEPS)
    inner = latents_of(with_cache("t2i"), "rain", seed=3, num_steps=4)
    pipe, other = with_cache("t2i"), with_cache("t2i")

    def run_others(*_: object) -> None:
        for running in (other, pipe):
            assert torch.equal(latents_of(running, "rain", seed=3, num_steps=4), inner)

    assert torch.equal(latents_of(pipe, num_steps=STEPS, callback_on_step_end=run_others), expected)


def test_cache_is_made_for_the_request_and_gone_with_it() -> None:
    caches: list[weakref.ref[MagCache]] = []
    held: list[int] = []

    def make_cache(guided: Any, lengths: Any) -> MagCache:
        cache = cache_for_request(MAGCACHE, guided, lengths)
        caches.append(weakref.ref(cache))
        return cache

    def watch(pipe: Pipeline, step: int, *_: object) -> None:
        cache = caches[-1]()
        assert cache is not None
        held.append(len(cache.residuals))

    pipe = build("t2i", make_cache=make_cache)
    before = set(vars(pipe)), set(vars(pipe.dit))
    for _ in range(2):
        latents_of(pipe, num_steps=STEPS, callback_on_step_end=watch, num_images_per_prompt=2)
    gc.collect()
    assert len(caches) == 2 and [cache() for cache in caches] == [None, None]
    assert (set(vars(pipe)), set(vars(pipe.dit))) == before
    # Two branches of two samples each, and none after a step that is not followed by a skipped one.
    assert set(held) == {0, 4} and held[STEPS - 1] == 0


# --- guidance ---------------------------------------------------------------------------------------------------------


def test_guidance_as_by_default_is_bit_for_bit_guidance_in_full(task: str) -> None:
    pipe = build(task)
    plain = latents_of(pipe, num_steps=STEPS)
    assert torch.equal(latents_of(pipe, num_steps=STEPS, guidance_interval=(0, 1), guidance_every=1), plain)
    assert torch.equal(latents_of(pipe, num_steps=STEPS, guidance_interval=[0.0, 0.0]),
                       latents_of(pipe, num_steps=STEPS, guidance_weight=1.0))  # fmt: skip


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [
        ({}, 12),
        ({"guidance_interval": (0.5, 1.0)}, 9),
        ({"guidance_every": 2}, 9),
        ({"guidance_every": 6}, 7),
        ({"guidance_interval": (0.5, 1.0), "guidance_every": 2}, 8),
        ({"guidance_interval": (0.5, 1.0), "guidance_weight": 1.0}, 6),
    ],
)
def test_guidance_asked_for_in_the_call_or_in_the_config(
    task: str, options: dict[str, Any], evaluations: int, tmp_path: Path
) -> None:
    pipe: Any = build(task)
    with counted(pipe) as counts:
        latents = latents_of(pipe, num_steps=STEPS, **options)
    assert counts["evaluations"] == evaluations
    pipe.config = dataclasses.replace(pipe.config, model=dataclasses.replace(pipe.config.model, **options))
    assert torch.equal(latents_of(pipe, num_steps=STEPS), latents)
    # What the call says comes before what the config says.
    in_full = {"guidance_interval": (0, 1), "guidance_every": 1, "guidance_weight": 2.0}
    assert torch.equal(latents_of(pipe, num_steps=STEPS, **in_full),
                       latents_of(build(task), num_steps=STEPS, guidance_weight=2.0))  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"guidance_interval": (0.5, 0.2)}, r"guidance_interval is \(0.5, 0.2\); it must be two shares"),
        ({"guidance_interval": (0.0, 1.5)}, "two shares of the steps from 0 to 1"),
        ({"guidance_interval": (-0.1, 1.0)}, "two shares"),
        ({"guidance_interval": (0.0, float("nan"))}, "two shares"),
        ({"guidance_interval": (0.5,)}, "two shares"),
        ({"guidance_interval": 0.5}, "guidance_interval is 0.5"),
        ({"guidance_interval": (False, True)}, "two shares"),
        ({"guidance_interval": "01"}, "two shares"),
        ({"guidance_every": 0}, "guidance_every is 0; it must be a whole number from 1"),
        ({"guidance_every": 2.0}, "whole number"),
        ({"guidance_every": True}, "whole number"),
    ],
)
def test_wrong_guidance_is_refused(task: str, wrong: dict[str, Any], message: str) -> None:
    pipe = build(task)
    with pytest.raises(ValueError, match=message):
        latents_of(pipe, **wrong)
    assert pipe.text_embedder.calls == []  # type: ignore[attr-defined]


# --- what the record says ---------------------------------------------------------------------------------------------


def test_record_says_how_many_evaluations_were_skipped(task: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.mp4" if task.endswith("v") else "a.png")

    def record(pipe: Any, name: str = "a.json", **options: Any) -> Any:
        call(pipe, num_steps=STEPS, save_path=path, **options)
        return json.loads((tmp_path / name).read_text())

    assert record(build(task))["evaluations"] == {"all": 12, "skipped": 0}
    skipped = sum(skip_plan(MAGCACHE.mag_ratios or (), STEPS, True))
    facts = record(with_cache(task), "a_2.json", **{count_name(build(task)): 2})
    assert facts["evaluations"] == {"all": 12, "skipped": skipped}

    def interrupt(pipe: Pipeline, step: int, *_: object) -> None:
        pipe.interrupt = step == 2

    facts = record(with_cache(task), callback_on_step_end=interrupt, guidance_interval=(0.3, 1), guidance_every=3)
    assert facts["evaluations"] == {"all": 4, "skipped": 2}
    assert (facts["guidance_interval"], facts["guidance_every"]) == ([0.3, 1.0], 3)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_without_ratios_loading_says_so_before_it_looks_for_weights(tmp_path: Path) -> None:
    path = CONFIGS / "config_i2i.yaml"
    with pytest.raises(ValueError, match=r"config_i2i.yaml: magcache.enabled.*python tools/calibrate_magcache.py"):
        get_I2I_pipeline("cpu", cache_dir=tmp_path, conf_path=path, magcache=True)


def test_only_a_config_that_says_so_has_a_cache() -> None:
    for enabled in (False, True):
        config = load_config(CONFIGS / "config_tiny_t2i.yaml", [f"magcache.enabled={enabled}"])
        pipe = load_pipeline(config, "cpu")
        assert (pipe.make_cache is not None) == enabled
        if pipe.make_cache is not None:
            cache: Any = pipe.make_cache([True] * 16)
            cache_config = config.magcache
            plan = skip_plan(
                cache_config.mag_ratios or (), 16, True,
                cache_config.threshold, cache_config.max_skips, cache_config.retention,
            )  # fmt: skip
            assert (tuple(cache.skips["cond"]), tuple(cache.skips["uncond"])) == (plan[0::2], plan[1::2])
