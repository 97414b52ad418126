"""Which whole runs benchmarks/speed.py measures beside diffusers when it is not told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.speed import CONFIGS, SAME_AS_I2V, THEIR_PIPELINES, generation_configs, measured_density
from kandinsky.config.reading import load_config
from kandinsky.models.vae_memory import GB
from kandinsky.planning.machine import Machine

PUBLISHED = {path.stem for path in CONFIGS.glob("*.yaml") if "tiny" not in path.stem}


def test_on_a_cpu_every_tiny_config() -> None:
    chosen, skipped = generation_configs("cpu")
    assert set(chosen) == set(CONFIGS.glob("config_tiny_*.yaml")) - {SAME_AS_I2V} and not skipped
    assert {load_config(path).task for path in chosen} == set(THEIR_PIPELINES)
    assert chosen[0].stem == "config_tiny_t2v"  # the one that _chart.py draws


@pytest.mark.parametrize("gpu_gb", [48, 139])
def test_on_a_gpu_what_fits_and_why_the_rest_does_not(gpu_gb: int) -> None:
    chosen, skipped = generation_configs("cuda", Machine(128 * GB, gpu_gb * GB))
    names = {path.stem for path in chosen}
    assert names | set(skipped) == PUBLISHED and not names & set(skipped)
    assert all(f"there are {gpu_gb:.1f}" in why or "it takes" in why for why in skipped.values())
    if gpu_gb == 139:  # all four tasks, dense and NABLA
        configs = [load_config(path) for path in chosen]
        assert {config.task for config in configs} == set(THEIR_PIPELINES)
        assert {config.model.attention.type for config in configs} == {"full", "nabla"}
    if gpu_gb == 48:  # beside 14 GB of Qwen
        assert "config_5s_sft" in names and "config_5s_t2v_pro" in skipped


def test_density_is_the_mean_over_calls() -> None:
    """And what is computed is the kernel's."""
    q = torch.zeros(1)

    def call(kernel: Any) -> None:
        for kept in (1, 3):
            assert kernel(q, q, q, torch.arange(4) < kept) is q

    assert measured_density(lambda q, k, v, block_map: q, call) == 0.5
