"""MagCache's plan against the published counter, written out again here, and what holds a request's residuals."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kandinsky.config.reading import load_config, with_settings
from kandinsky.config.schema import MagCacheConfig
from kandinsky.models.dit import Execution
from kandinsky.runtime.magcache import MagCache, cache_for_request, skip_plan, stretched
from kandinsky.sampling.sampler import guided_steps

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def published_decisions(
    mag_ratios: list[float], num_steps: int, use_cfg: bool, threshold: float, max_skips: int, retention: float
) -> list[bool]:
    """The published code's counter, evaluation after evaluation. It counts 2 * num_steps evaluations also without
    guidance, where it advances by two. Where it would skip before it has a residual, it is made to compute."""
    ratios = np.array([1.0, 1.0, *mag_ratios])
    if len(ratios) != 2 * num_steps:
        columns = []
        for column in (ratios[0::2], ratios[1::2]):
            if num_steps == 1:
                columns.append(column[-1:])
            else:
                scale = (len(column) - 1) / (num_steps - 1)
                columns.append(column[np.round(np.arange(num_steps) * scale).astype(int)])
        ratios = np.stack(columns, axis=1).ravel()

    accumulated_ratio, accumulated_error, consecutive = [1.0, 1.0], [0.0, 0.0], [0, 0]
    computed_before = [False, False]
    decisions = []
    count = 0
    while count < 2 * num_steps:
        branch = count % 2
        skip = False
        if count >= int(2 * num_steps * retention) and computed_before[branch]:
            accumulated_ratio[branch] = accumulated_ratio[branch] * ratios[count]
            consecutive[branch] += 1
            accumulated_error[branch] += abs(1 - accumulated_ratio[branch])
            if accumulated_error[branch] < threshold and consecutive[branch] <= max_skips:
                skip = True
            else:
                accumulated_ratio[branch], accumulated_error[branch], consecutive[branch] = 1.0, 0.0, 0
        computed_before[branch] = True
        decisions.append(skip)
        count += 1 if use_cfg else 2
    return decisions


RATIO = st.floats(0.5, 1.5) | st.floats(0.95, 1.05) | st.sampled_from([0.0, 1.0])


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "skipped", "of"), [("5s_sft", 52, 100), ("5s_nocfg", 26, 50), ("t2i", 54, 100)])
def test_published_variants_skip_as_published(name: str, skipped: int, of: int) -> None:
    config = load_config(CONFIGS / f"config_{name}.yaml")
    model, ratios = config.model, config.magcache.mag_ratios
    assert ratios is not None
    plan = skip_plan(ratios, model.num_steps, model.guidance_weight != 1)
    assert (sum(plan), len(plan)) == (skipped, of)
    settings_of_file = config.magcache.threshold, config.magcache.max_skips, config.magcache.retention
    assert skip_plan(ratios, model.num_steps, model.guidance_weight != 1, *settings_of_file) == plan


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS.glob("*.yaml") if "mag_ratios" in path.read_text()])
def test_shipped_ratios_are_read_as_the_published_code_reads_them(name: str) -> None:
    ratios = load_config(CONFIGS / f"{name}.yaml").magcache.mag_ratios
    assert ratios is not None
    for num_steps in (1, 2, 4, 16, 30, 49, 50, 51, 100):
        for use_cfg in (True, False):
            expected = published_decisions(list(ratios), num_steps, use_cfg, 0.12, 2, 0.2)
            assert skip_plan(ratios, num_steps, use_cfg) == tuple(expected), (num_steps, use_cfg)


@given(
    ratios=st.lists(st.tuples(RATIO, RATIO), min_size=1, max_size=60).map(lambda pairs: [r for p in pairs for r in p]),
    num_steps=st.integers(1, 70),
    use_cfg=st.booleans(),
    threshold=st.floats(0, 0.5),
    max_skips=st.integers(0, 5),
    retention=st.floats(0, 1),
)
@example(ratios=[0.99] * 98, num_steps=50, use_cfg=True, threshold=0.12, max_skips=2, retention=0.0)
@settings(deadline=None, max_examples=300)
def test_plan_is_the_published_counter(
    ratios: list[float], num_steps: int, use_cfg: bool, threshold: float, max_skips: int, retention: float
) -> None:
    expected = published_decisions(ratios, num_steps, use_cfg, threshold, max_skips, retention)
    assert skip_plan(ratios, num_steps, use_cfg, threshold, max_skips, retention) == tuple(expected)


def test_steady_ratios_skip_in_turn() -> None:
    """Nothing grows: only the number in a row ends the skipping; the first two tenths are computed."""
    plan = skip_plan([1.0] * 18, 10, use_cfg=False, max_skips=2, retention=0.2)
    assert plan == (False, False, True, True, False, True, True, False, True, True)
    assert skip_plan([1.0] * 18, 10, use_cfg=False, max_skips=2, retention=0.0)[:4] == (False, True, True, False)


def test_errors_of_skipped_steps_add_up() -> None:
    """0.9, 0.9 * 0.9, ...: errors 0.1 and 0.19, their sum 0.29 is what the threshold is held against."""
    ratios = [0.9] * 10
    assert skip_plan(ratios, 6, False, threshold=0.30, max_skips=9, retention=0)[:4] == (False, True, True, False)
    assert skip_plan(ratios, 6, False, threshold=0.28, max_skips=9, retention=0)[:4] == (False, True, False, True)
    assert not any(skip_plan(ratios, 6, False, threshold=0.1 - 1e-9, max_skips=9, retention=0))


def test_branches_add_up_apart() -> None:
    plan = skip_plan([1.0, 0.5] * 9, 10, True, max_skips=9, retention=0)
    assert plan[0::2] == (False, *[True] * 9) and not any(plan[1::2])


@pytest.mark.parametrize("nothing", [{"threshold": 0.0}, {"max_skips": 0}, {"retention": 1.0}])
def test_settings_that_never_skip(nothing: dict[str, float]) -> None:
    assert not any(skip_plan([1.0] * 98, 50, True, **nothing))  # type: ignore[arg-type]


def test_stretching_takes_the_nearest() -> None:
    assert stretched([1, 2, 3], 5) == [1, 1, 2, 3, 3]  # halves to the even place
    assert stretched([1, 2, 3, 4], 2) == [1, 4]
    assert stretched([1, 2, 3, 4], 3) == [1, 3, 4]
    assert stretched([1, 2, 3], 3) == [1, 2, 3]
    assert stretched([1, 2, 3], 1) == [3]
    assert stretched([1], 4) == [1, 1, 1, 1]


# --- the plan where guidance runs in some steps only ------------------------------------------------------------------


@given(
    ratios=st.lists(RATIO, min_size=2, max_size=60).map(lambda r: r[: len(r) // 2 * 2]),
    guided=st.lists(st.booleans(), min_size=1, max_size=40),
    threshold=st.floats(0, 0.5),
    max_skips=st.integers(0, 4),
    retention=st.floats(0, 1),
)
@example(ratios=[1.0] * 8, guided=[True, True, False, True, True], threshold=0.1, max_skips=4, retention=0.0)
@settings(deadline=None, max_examples=200)
def test_guidance_in_some_steps(
    ratios: list[float], guided: list[bool], threshold: float, max_skips: int, retention: float
) -> None:
    num_steps, rules = len(guided), (threshold, max_skips, retention)
    plan = iter(skip_plan(ratios, num_steps, True, *rules, guided=guided))
    by_step = [(next(plan), next(plan) if is_guided else None) for is_guided in guided]
    assert next(plan, None) is None
    # The conditional branch does not notice.
    assert tuple(cond for cond, _ in by_step) == skip_plan(ratios, num_steps, False, *rules)
    everywhere = skip_plan(ratios, num_steps, True, *rules)[1::2]
    for step, (_, uncond) in enumerate(by_step):
        if uncond:  # never right after a gap, and what is added up never reaches over one
            begin = max((s for s in range(step) if not guided[s]), default=-1) + 1
            assert begin < step
            assert not by_step[begin][1]
    if all(guided):
        assert tuple(uncond for _, uncond in by_step) == everywhere


def test_accumulation_restarts_after_a_gap() -> None:
    """Errors 0.05 and 0.1 in each stretch of guided steps: both are skipped again in the second one."""
    guided = [True, True, True, False, True, True, True]
    ratios = [0.0, 0.95] * 6  # the conditional branch always computes
    plan = skip_plan(ratios, 7, True, threshold=0.15, max_skips=9, retention=0, guided=guided)
    uncond = [False, True, True, False, True, True]
    assert [plan[i] for i in (1, 3, 5, 8, 10, 12)] == uncond and sum(plan) == sum(uncond)


@pytest.mark.parametrize(
    ("interval", "every", "length"), [((0.0, 1.0), 2, 15), ((0.2, 0.6), 1, 14), ((0.0, 0.0), 1, 10)]
)
def test_plan_of_a_request_is_that_of_its_guidance(interval: tuple[float, float], every: int, length: int) -> None:
    guided = [step == "new" for step in guided_steps(10, 5.0, interval, every)]
    assert len(skip_plan([1.0] * 18, 10, True, guided=guided)) == length
    cache = cache_for_request(MagCacheConfig(mag_ratios=(1.0,) * 18, enabled=True), guided)
    assert len(cache.skips["cond"]) == 10 and len(cache.skips["uncond"]) == length - 10
    if every == 2:  # every one of them comes after a gap
        assert not any(cache.skips["uncond"])


# --- one request's residuals ------------------------------------------------------------------------------------------

BLOCK_INPUTS = SimpleNamespace(execution=Execution())  # passed on, and asked whether blocks write over


def evaluate(cache: MagCache, branch: str, hidden: Tensor, sample: int = 0, growth: float = 10.0) -> Tensor:
    """An evaluation whose blocks add `growth`; they see what they are given."""

    def blocks(given: Tensor, inputs: object) -> Tensor:
        assert given is hidden and inputs is BLOCK_INPUTS
        return given + growth

    return cache.run_blocks(branch, sample, blocks)(hidden, BLOCK_INPUTS)  # type: ignore[arg-type]


def test_a_skipped_evaluation_adds_the_last_computed_residual() -> None:
    cache = MagCache({"cond": [False, True, True, False, True], "uncond": []})
    hidden = torch.zeros(1, 3, 2)
    values = [evaluate(cache, "cond", hidden + i, growth=10.0 * (i + 1)) for i in range(5)]
    assert [value[0, 0, 0].item() for value in values] == [10, 11, 12, 43, 44]
    assert cache.skipped == 3


def test_branches_and_samples_have_their_own_residuals() -> None:
    cache = MagCache({"cond": [False, True], "uncond": [False, True]})
    hidden = torch.zeros(1, 2, 2)
    keys = [("cond", 0), ("cond", 1), ("uncond", 0), ("uncond", 1)]
    for i, (branch, sample) in enumerate(keys):
        evaluate(cache, branch, hidden, sample, growth=float(i))
    assert [evaluate(cache, branch, hidden, sample)[0, 0, 0].item() for branch, sample in keys] == [0, 1, 2, 3]


@pytest.mark.parametrize("plan", ["....", ".#.#", ".##.", "..##.", ".###", "."])
def test_residuals_are_kept_no_longer_than_they_are_needed(plan: str) -> None:
    skips = [letter == "#" for letter in plan]
    cache = MagCache({"cond": skips, "uncond": []})
    for i in range(len(skips)):
        evaluate(cache, "cond", torch.zeros(1, 3, 2))
        assert len(cache.residuals) == (i + 1 < len(skips) and skips[i + 1]), f"after evaluation {i} of {plan}"


def test_memory_of_a_residual_is_freed() -> None:
    cache = MagCache({"cond": [False, True, False], "uncond": []})
    evaluate(cache, "cond", torch.zeros(1, 3, 2))
    (residual,) = map(weakref.ref, cache.residuals.values())
    evaluate(cache, "cond", torch.zeros(1, 3, 2))
    gc.collect()
    assert residual() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_the_models(dtype: torch.dtype) -> None:
    cache = MagCache({"cond": [False, True], "uncond": []})
    hidden = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert evaluate(cache, "cond", hidden).dtype == dtype
    assert {residual.dtype for residual in cache.residuals.values()} == {dtype}
    assert evaluate(cache, "cond", hidden).dtype == dtype


# --- the config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["5s_pretrain", "i2i"])
def test_without_ratios_it_says_how_to_make_them(name: str) -> None:
    path = CONFIGS / f"config_{name}.yaml"
    config = load_config(path)
    for switch_on in (
        lambda: load_config(path, ["magcache.enabled=true"]),
        lambda: with_settings(config, magcache={"enabled": True}),
    ):
        with pytest.raises(ValueError) as error:
            switch_on()
        message = str(error.value)
        assert message.startswith(f"{path}: magcache.enabled = True") and "\n" not in message
        assert f"python tools/calibrate_magcache.py --config {path} --prompt '...' --write" in message


@pytest.mark.parametrize("task", ["t2v", "i2v", "t2i", "i2i"])
def test_tiny_configs_ship_with_ratios_of_their_steps(task: str) -> None:
    config = load_config(CONFIGS / f"config_tiny_{task}.yaml", ["magcache.enabled=true"])
    ratios, cache = config.magcache.mag_ratios, config.magcache
    assert ratios is not None and len(ratios) == 2 * (config.model.num_steps - 1)
    plan = skip_plan(ratios, config.model.num_steps, True, cache.threshold, cache.max_skips, cache.retention)
    assert sum(plan) >= 0.45 * len(plan)
