"""Caches without calibration, in the pipelines of all tasks: what they leave out, that nothing else changes or stays.

On small random models, as for MagCache: which evaluations run and what is made of them is checked, to the bit, not that
the result is good.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import json
import math
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_pipelines import PICTURE, TASKS, Abort, abort_at, build, call, count_name, latents_of, randomised

from kandinsky.config.reading import load_config, with_magcache, with_settings
from kandinsky.config.schema import CACHE_DEFAULTS, CacheConfig
from kandinsky.models.dit import DiffusionTransformer3D, Execution
from kandinsky.outputs.resume import Stopped, load_run
from kandinsky.planning.activations import cache_bytes
from kandinsky.request import resolve_request
from kandinsky.runtime.adaptive_caches import (
    KINDS,
    UNSEEN,
    AdaptiveCache,
    TaylorCache,
    TrackedCache,
    interpolation_weights,
)
from kandinsky.runtime.block_parts import with_blocks_in_parts
from kandinsky.runtime.block_swap import BlockSwap
from kandinsky.runtime.caches import cache_maker
from kandinsky.runtime.magcache import MagCache
from kandinsky.runtime.offload import Offloaded, take_weights

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STEPS, BLOCKS = 7, 5
MIDDLE = {"firstblock": 4, "dbcache": 3, "taylorseer": 5, "tracked": 5}  # blocks of 5 that a skipped evaluation spares
ORDERS = {"firstblock": 0, "dbcache": 0, "taylorseer": 1, "tracked": 1}
# Random models tell little of their residuals: with these, by order, some evaluations are skipped, not all that may be.
THRESHOLDS = (1.1, 2.5, 5.0)


@functools.cache
def plain(task: str) -> Any:
    """A pipeline with more blocks than others have, and no cache. All tests share its models."""
    pipe: Any = build(task)
    dit = dataclasses.replace(pipe.config.model.dit_params, num_visual_blocks=BLOCKS)
    pipe.config = dataclasses.replace(pipe.config, model=dataclasses.replace(pipe.config.model, dit_params=dit))
    pipe.dit = randomised(DiffusionTransformer3D(**dataclasses.asdict(dit)))
    return pipe


def with_cache(task: str, kind: str, agree: Any = bool, **settings: Any) -> Any:
    order = settings.setdefault("order", ORDERS[kind])
    settings.setdefault("threshold", THRESHOLDS[order if kind in ("taylorseer", "tracked") else 0])
    pipe = copy.copy(plain(task))
    pipe.config = dataclasses.replace(pipe.config, cache=CacheConfig(kind=kind, **settings))  # type: ignore[arg-type]
    pipe.make_cache = cache_maker(pipe.config, agree)
    return pipe


def spied(pipe: Any) -> list[AdaptiveCache]:
    """The caches of the requests to come."""
    caches: list[AdaptiveCache] = []
    make_cache = pipe.make_cache
    pipe.make_cache = lambda *steps: caches.append(make_cache(*steps)) or caches[-1]
    return caches


# One video and one picture, one of words alone and one of a picture too, unless it is to be all of them.
@pytest.fixture(
    params=[pytest.param(task, marks=[pytest.mark.exhaustive] * (task in ("i2v", "t2i"))) for task in TASKS]
)
def task(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


# --- what they do -----------------------------------------------------------------------------------------------------


def test_threshold_zero_is_bit_for_bit_no_cache(task: str, kind: str) -> None:
    expected = latents_of(plain(task), num_steps=STEPS)
    for order in (0, 1, 2) if task == "i2i" else (1,):
        for nothing in ({"threshold": 0.0}, {"max_skips": 0}):
            assert torch.equal(latents_of(with_cache(task, kind, order=order, **nothing), num_steps=STEPS), expected)
        assert not torch.equal(latents_of(with_cache(task, kind, order=order), num_steps=STEPS), expected)


def test_record_says_what_ran(task: str, kind: str, tmp_path: Path) -> None:
    """Of each output its own: two samples need not skip the same evaluations."""
    pipe, path = with_cache(task, kind), tmp_path / ("a.mp4" if task.endswith("v") else "a.png")
    pipe.dit = copy.deepcopy(pipe.dit)
    ran = 0

    def count(*_: object) -> None:
        nonlocal ran
        ran += 1

    for block in pipe.dit.visual_transformer_blocks:
        block.register_forward_hook(count)
    caches = spied(pipe)
    call(pipe, num_steps=STEPS, save_path=path, **{count_name(pipe): 2})
    for sample in range(2):  # both branches of a step skip, or none
        cond, uncond = (caches[0].tracks[branch, sample].skipped for branch in ("cond", "uncond"))
        assert cond == uncond
    facts = [json.loads((tmp_path / name).read_text()) for name in ("a.json", "a_2.json")]
    for sample, one in enumerate(facts):
        skipped = caches[0].skipped_of(sample)
        assert 0 < skipped < 2 * STEPS
        assert one["evaluations"] == {"all": 2 * STEPS, "skipped": skipped}
        assert one["blocks"] == {"all": 2 * STEPS * BLOCKS, "skipped": skipped * MIDDLE[kind]}
    assert ran == sum(one["blocks"]["all"] - one["blocks"]["skipped"] for one in facts)
    call(plain(task), num_steps=2, save_path=path)
    facts = json.loads((tmp_path / "a.json").read_text())
    assert facts["blocks"] == {"all": 4 * BLOCKS, "skipped": 0}


def test_samples_of_a_batch_get_what_each_gets_alone_to_the_bit(task: str, kind: str) -> None:
    pipe = with_cache(task, kind)
    together = latents_of(pipe, ["a red cat", "a fat dog"], seed=[4, 5], num_steps=STEPS)
    alone = [latents_of(pipe, text, seed=seed, num_steps=STEPS) for text, seed in (("a red cat", 4), ("a fat dog", 5))]
    assert torch.equal(together, torch.cat(alone))


def test_all_processes_have_to_agree(kind: str) -> None:
    asked: list[bool] = []
    undivided = with_cache("t2i", kind)
    refusing = with_cache("t2i", kind, agree=asked.append)  # None: somebody says no
    assert torch.equal(latents_of(refusing, num_steps=STEPS), latents_of(plain("t2i"), num_steps=STEPS))
    assert any(asked)
    agreeing = with_cache("t2i", kind, agree=bool)
    assert torch.equal(latents_of(agreeing, num_steps=STEPS), latents_of(undivided, num_steps=STEPS))


@pytest.mark.parametrize("options", [{"guidance_interval": (0.2, 0.7)}, {"guidance_every": 2}, {"guidance_weight": 1}])
def test_guidance_in_some_steps(kind: str, options: dict[str, Any]) -> None:
    pipe = with_cache("t2i", kind, order=0)
    caches = spied(pipe)
    latents_of(pipe, num_steps=STEPS, **options)
    assert caches[0].skipped_of(0) > 0
    assert {branch: caches[0].done[branch, 0] for branch in caches[0].steps} == {
        branch: len(steps) for branch, steps in caches[0].steps.items()
    }


def test_runs_that_begin_late(kind: str, tmp_path: Path) -> None:
    """With a picture to begin from, where MagCache stays out."""
    PICTURE.save(tmp_path / "picture.png")
    options: dict[str, Any] = {"num_steps": 12, "image": tmp_path / "picture.png", "strength": 0.5}
    pipe = with_cache("t2i", kind)
    caches = spied(pipe)
    assert not torch.equal(latents_of(pipe, **options), latents_of(plain("t2i"), **options))
    assert caches[0].skipped_of(0) > 0 and caches[0].done["cond", 0] == 6
    zero = with_cache("t2i", kind, threshold=0.0)
    assert torch.equal(latents_of(zero, **options), latents_of(plain("t2i"), **options))


# --- with what else wraps or hands out blocks -------------------------------------------------------------------------


def test_blocks_that_write_over_their_input(kind: str) -> None:
    """What such a block is given is not what it was any more when it is done."""
    whole, pipe = with_cache("t2v", kind), with_cache("t2v", kind)
    pipe.execution = with_blocks_in_parts(Execution(), heads_at_once=1, on_host=False)
    caches = spied(whole), spied(pipe)
    assert torch.allclose(latents_of(whole, num_steps=STEPS), latents_of(pipe, num_steps=STEPS), atol=1e-4)
    assert caches[0][0].skipped_of(0) == caches[1][0].skipped_of(0) > 0


def test_blocks_that_stream(kind: str) -> None:
    """Also where a run ends in the middle of an evaluation."""
    whole, pipe = with_cache("t2i", kind), with_cache("t2i", kind)
    pipe.dit = dit = copy.deepcopy(pipe.dit)
    weights = take_weights(dit)
    swap = BlockSwap(dit.visual_transformer_blocks, weights, "visual_transformer_blocks.", 1, torch.device("cpu"))
    for part in (Offloaded(dit, weights, torch.device("cpu")), swap):
        part.begin()
    pipe.execution = Execution(hand_out=swap)
    expected = latents_of(whole, num_steps=STEPS)
    assert torch.equal(latents_of(pipe, num_steps=STEPS), expected)
    with pytest.raises(Abort):
        latents_of(pipe, num_steps=STEPS, callback_on_step_end=abort_at(3))
    assert torch.equal(latents_of(pipe, num_steps=STEPS), expected)


def test_bfloat16_stays_bfloat16(kind: str) -> None:
    pipe = with_cache("t2i", kind)
    pipe.dit = copy.deepcopy(pipe.dit).to(torch.bfloat16)
    head, seen = pipe.dit.head, set()
    pipe.dit.head = lambda hidden, inputs: seen.add(hidden.dtype) or head(hidden, inputs)
    caches = spied(pipe)
    latents_of(pipe, num_steps=STEPS)
    assert seen == {torch.bfloat16} and caches[0].skipped_of(0) > 0


# --- nothing stays behind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last_step", [0, 3, STEPS - 2])
def test_after_an_abort_everything_is_as_new(kind: str, last_step: int) -> None:
    fresh = latents_of(with_cache("t2i", kind), num_steps=STEPS)
    pipe = with_cache("t2i", kind)
    with pytest.raises(Abort):
        latents_of(pipe, "a blue dog", seed=8, num_steps=STEPS, callback_on_step_end=abort_at(last_step))
    assert torch.equal(latents_of(pipe, num_steps=STEPS), fresh)


def test_calls_do_not_notice_each_other(task: str, kind: str) -> None:
    """Other steps, guidance on and off, one after the other."""
    pipe = with_cache(task, kind)
    calls: list[dict[str, Any]] = [{"num_steps": STEPS}, {"num_steps": 9}, {"num_steps": 5, "guidance_weight": 1.0}]
    expected = [latents_of(with_cache(task, kind), **options) for options in calls]
    for _ in range(2):
        for options, latents in zip(calls, expected, strict=True):
            assert torch.equal(latents_of(pipe, **options), latents), options


def test_runs_in_the_middle_of_each_other(kind: str) -> None:
    """In every step of a run a whole run of another pipeline, and one of the same."""
    expected = latents_of(with_cache("t2i", kind), num_steps=STEPS)
    inner = latents_of(with_cache("t2i", kind), "rain", seed=3, num_steps=5)
    pipe, other = with_cache("t2i", kind), with_cache("t2i", kind)

    def run_others(*_: object) -> None:
        for running in (other, pipe):
            assert torch.equal(latents_of(running, "rain", seed=3, num_steps=5), inner)

    assert torch.equal(latents_of(pipe, num_steps=STEPS, callback_on_step_end=run_others), expected)


@pytest.mark.parametrize("order", [0, 2])
def test_state_is_the_requests_and_as_large_as_planned(kind: str, order: int) -> None:
    pipe = with_cache("t2i", kind, order=order, max_skips=1)
    made, caches, kept = pipe.make_cache, [], []
    pipe.make_cache = lambda *steps: caches.append(weakref.ref(cache := made(*steps))) or cache

    def watch(*_: object) -> None:
        tracks = caches[-1]().tracks.values()
        tensors = [tensor for track in tracks for tensor in (*track.values, track.probe) if tensor is not None]
        kept.append(sum(tensor.nbytes for tensor in tensors))

    before = set(vars(pipe)), set(vars(pipe.dit))
    latents_of(pipe, num_steps=STEPS, callback_on_step_end=watch, num_images_per_prompt=2)
    gc.collect()
    assert [cache() for cache in caches] == [None]
    assert (set(vars(pipe)), set(vars(pipe.dit))) == before
    settings, params = pipe.config.block_cache, pipe.config.model.dit_params
    tokens = 2 * 2  # 32 x 32 pixels
    planned = cache_bytes(params, tokens, settings, samples=2, branches=2, element_size=4, writes_over=False)
    velocity = 4 * 4 * params.out_visual_dim * 4  # 4 x 4 latents
    size = velocity if settings.keeps_velocities else tokens * params.model_dim * 4
    assert max(kept) == planned - 4 * settings.replaced * size
    assert kept[-1] == 0  # after the last step there is no use for it


# --- stop and resume --------------------------------------------------------------------------------------------------


def stopped_after(pipe: Any, step: int, path: Path) -> Path:
    request = resolve_request(
        pipe.config, ["a red cat", "a dog in the snow"], seed=3, num_steps=STEPS, guidance_every=2
    )

    def interrupt(pipe: Any, done: int, *_: Any) -> None:
        pipe.interrupt = done + 1 == step

    with pytest.raises(Stopped) as stopped:
        pipe.generate(request, save_path=path, progress=False, callback=interrupt, keep_stopped=True)
    return stopped.value.path


def test_a_stopped_run_goes_on_to_the_same_bytes(kind: str, tmp_path: Path) -> None:
    make = functools.partial(with_cache, "t2i", kind, order=2)
    whole = make()
    request = resolve_request(
        whole.config, ["a red cat", "a dog in the snow"], seed=3, num_steps=STEPS, guidance_every=2
    )
    whole.generate(request, save_path=tmp_path / "whole.png", progress=False)
    record = json.loads((tmp_path / "whole.json").read_text())
    assert record["evaluations"]["skipped"] > 0
    for step in (1, 3, STEPS - 1):
        path = stopped_after(make(), step, tmp_path / f"{step}.png")
        if step == 3:  # and once more
            pipe = make()

            def interrupt(pipe: Any, done: int, *_: Any) -> None:
                pipe.interrupt = done == 4

            with pytest.raises(Stopped) as stopped:
                pipe.resume(load_run(path), tmp_path / f"{step}.png", progress=False, callback=interrupt)
            path = stopped.value.path
        make().resume(load_run(path), tmp_path / f"{step}.png", progress=False)
        for suffix in (".png", "_2.png"):
            assert (tmp_path / f"{step}{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes(), step
        found = json.loads((tmp_path / f"{step}.json").read_text())
        assert (found["evaluations"], found["blocks"]) == (record["evaluations"], record["blocks"])


def test_another_cache_cannot_go_on(tmp_path: Path) -> None:
    path = stopped_after(with_cache("t2i", "tracked"), STEPS - 1, tmp_path / "a.png")
    for other in (with_cache("t2i", "taylorseer"), with_cache("t2i", "tracked", order=2), with_cache("t2i", "dbcache")):
        with pytest.raises(ValueError, match="cache settings that it began with, or with cache"):
            other.resume(load_run(path), tmp_path / "a.png", progress=False)
    run = load_run(path)
    assert min(run.skipped) > 0
    plain("t2i").resume(run, tmp_path / "a.png", progress=False)
    facts = json.loads((tmp_path / "a.json").read_text())  # what was left out before is not forgotten
    assert facts["evaluations"]["skipped"] == run.skipped[0] and facts["cache"] is None
    assert facts["blocks"]["skipped"] == run.skipped[0] * MIDDLE["tracked"]


# --- the rules --------------------------------------------------------------------------------------------------------


def evaluated(cache: AdaptiveCache, velocity: float) -> float:
    """What the next evaluation gives, where the DiT would give this velocity."""
    return float(cache.evaluate("cond", 0, lambda execution: torch.full((1, 3, 2), velocity), Execution())[0, 0, 0])


@pytest.mark.parametrize("rule", [TaylorCache, TrackedCache])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_polynomials_of_its_order_are_forecast(rule: type[AdaptiveCache], order: int) -> None:
    """It needs a value more than the order to know the polynomial, and one to see that this is right; then it skips."""
    cache = rule({"cond": range(12), "uncond": ()}, [1.0] * 12, 1, threshold=1e-3, max_skips=3, order=order)
    ran = []
    for step in range(12):
        before, velocity = cache.skipped_of(0), (1 + 0.3 * step) ** order
        assert evaluated(cache, velocity) == pytest.approx(velocity, rel=1e-5)
        if cache.skipped_of(0) == before:
            ran.append(step)
    if rule is TaylorCache:
        assert ran == [*range(order + 2), *range(order + 5, 12, 4)]
    else:  # what it saw of lower degrees is forgotten in time
        assert ran[: order + 2] == [*range(order + 2)] and len(ran) < 12


def test_a_long_step_weighs_more() -> None:
    """The velocity doubles: to repeat it is as wrong in all steps, and weighs twice in one twice the mean."""
    lengths = [1.0, 1.0, 1.0, 0.5, 0.5, 2.0]
    cache = TaylorCache({"cond": range(6), "uncond": ()}, lengths, 1, threshold=0.6, max_skips=1, order=0)
    ran = []
    for step in range(6):
        before = cache.skipped_of(0)
        evaluated(cache, 2.0**step)
        if cache.skipped_of(0) == before:
            ran.append(step)
    # 1 is skipped, as nothing has been seen; at 2 it is off by 3/4 after two steps, 3/8 after one.
    assert ran == [0, 2, 4, 5]


def test_interpolation_weights() -> None:
    assert interpolation_weights([3], 8) == [1]
    assert interpolation_weights([3, 5], 6) == pytest.approx([-0.5, 1.5])
    weights = interpolation_weights([1, 2, 5], 7)
    assert sum(w * place**2 for w, place in zip(weights, (1, 2, 5), strict=True)) == pytest.approx(49)


def test_errors_grow_with_the_distance_and_the_newest_counts() -> None:
    cache = TaylorCache({"cond": range(9), "uncond": ()}, [1.0] * 9, 1, threshold=0.5, max_skips=9, order=1)
    track: Any = SimpleNamespace(numbers=[], values=[0, 0])
    assert cache.expected_error(track, 1, None) == UNSEEN
    cache.learn(track, 2, 0.4)
    assert [cache.expected_error(track, distance, None) for distance in (1, 2, 3)] == pytest.approx([0.1, 0.4, 0.9])
    cache.learn(track, 1, 0.3)
    assert cache.expected_error(track, 1, None) == pytest.approx(0.3)


def test_filter_smooths_what_it_sees() -> None:
    """A steady error is what is expected in the end; an outlier moves it by less than all the way."""
    cache = TrackedCache({"cond": range(9), "uncond": ()}, [1.0] * 9, 1, threshold=0.5, max_skips=9, order=0)
    track: Any = SimpleNamespace(numbers=[], values=[0])
    for _ in range(30):
        cache.learn(track, 1, 0.1)
    mean, variance = track.numbers
    assert math.exp(mean) == pytest.approx(0.1) and 0 < variance < cache.NOISE
    assert 0.1 < cache.expected_error(track, 1, None) < 0.13
    cache.learn(track, 1, 0.2)
    assert 0.11 < math.exp(track.numbers[0]) < 0.19


# --- the config -------------------------------------------------------------------------------------------------------


def test_which_cache_a_config_has() -> None:
    tiny, without_ratios = CONFIGS / "config_tiny_t2v.yaml", CONFIGS / "config_i2i.yaml"

    def kind_of(path: Path, *overrides: str) -> str | None:
        config = load_config(path, overrides)
        return None if config.block_cache is None else config.block_cache.kind

    assert kind_of(tiny) is None
    assert kind_of(tiny, "magcache.enabled=true") == kind_of(tiny, "cache.kind=auto") == "magcache"
    assert kind_of(tiny, "magcache.enabled=true", "cache.kind=off") is None
    assert kind_of(without_ratios, "cache.kind=auto") in CACHE_DEFAULTS
    settings = load_config(tiny, ["cache.kind=magcache", "cache.threshold=0.3"])
    make_cache = cache_maker(settings)
    assert make_cache is not None and isinstance(make_cache([True] * 16), MagCache)
    assert settings.block_cache == ("magcache", 0.3, 2, 0)
    assert set(CACHE_DEFAULTS) == set(KINDS)
    for path, overrides, message in (
        (without_ratios, ["cache.kind=magcache"], r"cache.kind = 'magcache' .* another one, auto or off"),
        (tiny, ["magcache.enabled=true", "cache.kind=dbcache"], "a request has one cache"),
        (tiny, ["cache.kind=tracked", "runtime.cfg_parallel=2"], "magcache or off with runtime.cfg_parallel = 2"),
        (tiny, ["cache.kind=dbcache", "generation.coarse_steps={share: 0.5, scale: 0.5}"], "0 with cache.kind"),
        (tiny, ["cache.threshold=-1"], "cache.threshold = -1.0 .* 0 or more"),
        (tiny, ["cache.order=3"], "cache.order = 3 .* 0, 1 or 2"),
        (tiny, ["cache.kind=fast"], "cache.kind = 'fast' .* tracked or auto or off"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(path, overrides)


def test_magcache_takes_the_place_of_another_cache() -> None:
    config = with_settings(load_config(CONFIGS / "config_tiny_t2v.yaml"), cache={"kind": "tracked"})
    assert with_magcache(config, False) is config
    switched = with_magcache(config, True)
    assert switched.uses_magcache and switched.cache.kind is None
    assert with_magcache(switched, True) is switched and with_magcache(switched, False).block_cache is None


def test_what_a_forecast_is_made_from_stays_as_it_is() -> None:
    cache = TaylorCache({"cond": range(6), "uncond": ()}, [1.0] * 6, 1, threshold=1.0, max_skips=3, order=0)
    velocity = torch.ones(1, 3, 2)
    results = [cache.evaluate("cond", 0, lambda execution: velocity, Execution()) for _ in range(6)]
    assert cache.skipped_of(0) == 4 and torch.equal(velocity, torch.ones(1, 3, 2))
    assert all(torch.equal(result, velocity) for result in results)


def test_a_line_is_along_the_noise_level_and_not_along_the_steps() -> None:
    """The velocity changes evenly with the noise level, which falls by ever more a step: forecasts are exact."""
    lengths = [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    cache = TaylorCache({"cond": range(6), "uncond": ()}, lengths, 1, threshold=1e-4, max_skips=1, order=1)
    level = 0.0
    for step, length in enumerate(lengths):
        assert evaluated(cache, 1 + level) == pytest.approx(1 + level, rel=1e-5)
        assert cache.skipped_of(0) == (0, 0, 0, 1, 1, 2)[step]
        level += length
