"""Attention that is exact in some steps and blocks and approximate elsewhere; a share of NABLA's that changes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kandinsky.attention.engines import SAGE_QUERIES, rounded_to_int8, sage_emulated, sdpa
from kandinsky.config.reading import config_from_dict, config_to_dict
from kandinsky.config.schema import AttentionConfig
from kandinsky.models.dit import Execution
from kandinsky.outputs.resume import Stopped, load_run
from kandinsky.pipelines.base import Pipeline
from kandinsky.request import resolve_request
from tests.unit.small_pipelines import build, latents_of

STEPS, BLOCKS = 4, 2
NABLA = {"type": "nabla", "P": 0.3, "wT": 1, "wH": 1, "wW": 1}
SIZES = {"width": 256, "height": 128, "num_frames": 5, "num_steps": STEPS, "guidance_weight": 3.0}


def pipeline(engine: Any = None, **attention: Any) -> Pipeline:
    """An `engine` is dense attention that is exact where `attention` says so; without one there is NABLA."""
    attention = attention if engine else NABLA | attention
    pipe = build("t2v", execution=Execution(attention=engine or sdpa))
    changed = dataclasses.replace(pipe.config.model.attention, **attention)
    pipe.config = dataclasses.replace(
        pipe.config,
        model=dataclasses.replace(pipe.config.model, attention=changed),
        generation=dataclasses.replace(pipe.config.generation, width=256, height=128, resolutions=((256, 128),)),
    )
    return pipe


def made(engine: Any = None, **attention: Any) -> Tensor:
    return latents_of(pipeline(engine, **attention), **SIZES)


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


# --- what a step gets -------------------------------------------------------------------------------------------------


def test_blocks_of_a_step() -> None:
    last_half = AttentionConfig(exact_steps=(0.5, 1), exact_blocks=(0, -1))
    assert [sorted(last_half.exact_numbers(3, step, 4)) for step in range(4)] == [[0, 2], [0, 2], [0, 1, 2], [0, 1, 2]]
    assert AttentionConfig(exact_steps=(0, 1)).exact_numbers(2, 7, 8) == {0, 1}
    assert not any(AttentionConfig().exact_numbers(2, step, 8) for step in range(8))
    assert not AttentionConfig().is_ever_exact and not AttentionConfig(exact_steps=(0.5, 0.5)).is_ever_exact
    assert AttentionConfig(exact_blocks=(0,)).is_ever_exact and AttentionConfig(exact_steps=(0, 0.1)).is_ever_exact


def test_mass_of_a_step() -> None:
    assert [AttentionConfig(P=(0.9, 0.6, 0.3)).mass_kept(step, 7) for step in range(7)] == [0.9] * 3 + [0.6] * 2 + [
        0.3
    ] * 2
    assert [AttentionConfig(P=(0.9, 0.6, 0.3)).mass_kept(step, 2) for step in range(2)] == [0.9, 0.6]
    assert {AttentionConfig(P=0.7).mass_kept(step, 5) for step in range(5)} == {0.7}


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_neutral_settings_are_the_plain_run() -> None:
    """To the bit: one share given several times, exact everywhere, and what is exact anyway."""
    plain, sparse = made(sdpa), made()
    assert torch.equal(made(P=(0.3, 0.3, 0.3)), sparse)
    assert torch.equal(made(exact_steps=(0.5, 0.5)), sparse)
    assert torch.equal(made(sage_emulated, exact_steps=(0, 1)), plain)
    assert torch.equal(made(sage_emulated, exact_blocks=(0, -1)), plain)
    assert torch.equal(made(sdpa, exact_steps=(0, 0.5), exact_blocks=(1,)), plain)
    # Dense, with the tokens in NABLA's order: sums are added up in another one.
    assert difference(sparse, plain) > 1e-3 and difference(made(exact_steps=(0, 1)), plain) < 1e-5


def test_each_setting_changes_what_it_says() -> None:
    results = [
        made(),
        made(P=(0.6, 0.3)),
        made(P=(0.3, 0.6)),
        made(exact_steps=(0, 0.5)),
        made(exact_steps=(0.5, 1)),
        made(exact_blocks=(0,)),
        made(exact_blocks=(-1,)),
    ]
    for i, result in enumerate(results):
        assert all(difference(result, other) > 1e-5 for other in results[:i]), i


def record(pipe: Pipeline) -> dict[str, Any]:
    records: list[Any] = []
    pipe.decode_and_write = lambda latents, finish, facts, *_: records.extend(facts) or latents  # type: ignore
    pipe("a red cat", seed=1, progress=False, output_type="pt", **SIZES)
    return records[0]["attention_calls"]


def test_blocks_are_counted_by_what_computed_them() -> None:
    """Two evaluations in each of four steps, of two blocks."""
    assert record(pipeline(sdpa)) == {"sdpa": 16}
    assert record(pipeline(sdpa, exact_blocks=(0,))) == {"sdpa": 16}
    assert record(pipeline(sage_emulated)) == {"sage_emulated": 16}
    assert record(pipeline(sage_emulated, exact_steps=(0.75, 1))) == {"sage_emulated": 12, "sdpa": 4}
    assert record(pipeline(exact_steps=(0, 0.25), exact_blocks=(1,))) == {"nabla:sdpa_block_sparse": 6, "sdpa": 10}


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_goes_on_with_its_steps_settings(step: int, tmp_path: Path) -> None:
    pipe = pipeline(P=(0.9, 0.6, 0.3, 0.1), exact_steps=(0.25, 0.5), exact_blocks=(-1,))
    request = resolve_request(pipe.config, "a red cat", seed=1, **SIZES)
    pipe.generate(request, save_path=tmp_path / "whole.mp4", progress=False)

    def interrupt(pipe: Any, done: int, *_: Any) -> None:
        pipe.interrupt = done + 1 == step

    with pytest.raises(Stopped) as stopped:
        pipe.generate(
            request, save_path=tmp_path / "gone_on.mp4", progress=False, callback=interrupt, keep_stopped=True
        )
    again = pipeline()
    again.config = config_from_dict(json.loads(json.dumps(config_to_dict(pipe.config), default=str)))
    again.resume(load_run(stopped.value.path), tmp_path / "gone_on.mp4", progress=False)
    assert (tmp_path / "gone_on.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    calls = [json.loads((tmp_path / f"{name}.json").read_text())["attention_calls"] for name in ("whole", "gone_on")]
    assert calls[0] == calls[1] == {"nabla:sdpa_block_sparse": 6, "sdpa": 10}


# --- int8, emulated ---------------------------------------------------------------------------------------------------


def test_rounding_to_int8() -> None:
    """A scale for so many tokens: its largest number is 127, and nothing is off by more than half of a step."""
    x = torch.randn(2, 3, 300, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 300)[:, None]
    rounded, scales = rounded_to_int8(x, SAGE_QUERIES)
    assert torch.equal(rounded, rounded.round()) and scales.shape == (2, 3, 300, 1)
    for start in range(0, 300, SAGE_QUERIES):
        part = slice(start, start + SAGE_QUERIES)
        assert (rounded[:, :, part].abs().amax((-1, -2)) == 127).all()
        assert (scales[:, :, part] == scales[:, :, part][:, :, :1]).all()
    assert ((rounded * scales - x).abs() <= scales * 0.5001).all()
    zeros, _ = rounded_to_int8(torch.zeros(1, 1, 5, 8), SAGE_QUERIES)
    assert not zeros.any()


def test_emulated_products_are_close_and_smooth_keys_away() -> None:
    """Relative error about 1 % for normal numbers. What all keys have in common costs nothing, as it does for a GPU."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 333, 64, generator=generator) for _ in range(3))
    expected = sdpa(q, k, v)
    error = (sage_emulated(q, k, v) - expected).norm() / expected.norm()
    assert 1e-3 < error < 0.02
    shifted = (sage_emulated(q, k + 100, v) - expected).norm() / expected.norm()
    assert shifted < 1.2 * error
    with pytest.raises(ValueError, match="takes no mask"):
        sage_emulated(q, k, v, torch.ones(1, 1, 1, 333, dtype=torch.bool))
    half = sage_emulated(*(x.bfloat16() for x in (q, k, v)))
    assert half.dtype == torch.bfloat16 and (half.float() - expected).norm() / expected.norm() < 0.02
