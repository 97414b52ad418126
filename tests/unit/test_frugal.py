"""What is proposed where a stage has run out of memory: always less, never another result, and it has an end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from kandinsky.config.reading import load_config, with_settings
from kandinsky.config.schema import Config
from kandinsky.models.vae_memory import GB
from kandinsky.planning.choices import Choice
from kandinsky.planning.frugal import ENOUGH, LESS, more_frugal
from kandinsky.planning.machine import CUDA_CONTEXT, HOST_OF_CPU_RUN, Machine
from kandinsky.planning.plan import default_request, make_plan, models_in
from kandinsky.planning.stages import estimate

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = {field.name for field in dataclasses.fields(Choice)}
STAGES = ("expand prompt", "encode text", "denoise", "decode")


def on(machine: Machine, name: str, *settings: str) -> Config:
    """As it would be run there."""
    config = load_config(CONFIGS / f"config_{name}.yaml", settings)
    return make_plan(config, default_request(config), machine, {}, "bfloat16").config


@pytest.mark.parametrize("gpu_gb", [None, 8, 80])
@pytest.mark.parametrize("name", ["5s_sft", "10s_t2v_pro_hd"])
def test_always_less_until_nothing_is_left(name: str, gpu_gb: float | None) -> None:
    machine = Machine(64 * GB, None if gpu_gb is None else gpu_gb * 1e9)
    first = on(machine, name)
    request = dataclasses.replace(default_request(first), expand_prompts=True)
    models = models_in("bfloat16", first, {}, machine)
    for stage in STAGES:
        config, seen = first, 0

        def needs(config: Config, stage: str = stage) -> float:
            found = next(s for s in estimate(config, request, machine, models) if s.name == stage)
            return found.host - HOST_OF_CPU_RUN if gpu_gb is None else found.gpu - CUDA_CONTEXT

        def peaks(config: Config) -> dict[str, int]:
            return {s.name: s.gpu for s in estimate(config, request, machine, models)}

        while settings := more_frugal(config, request, machine, models, stage):
            assert set(settings) <= NAMES and (seen or config.runtime.offload == "on" or settings["offload"] == "on")
            after = with_settings(config, runtime=settings)
            assert needs(after) <= LESS * needs(config)
            assert all(peaks(after)[other] <= size for other, size in peaks(config).items())
            config, seen = after, seen + 1
        assert seen < 30
        # What is left in the end is little: two layers or blocks and what they work on, or the decoder alone.
        if stage == "denoise" and gpu_gb:
            assert config.runtime.blocks_on_gpu == 0 and config.runtime.heads_at_once is not None
        if stage == "encode text":
            assert config.runtime.stream_encoders == "on"
        assert config.runtime.offload == "on"


def test_what_changes_no_bit_comes_first() -> None:
    """Blocks stream before they run in parts; the next step is enough at once; what people have set stays."""
    machine = Machine(64 * GB, 24 * GB)
    config = on(machine, "5s_t2v_pro", "runtime.chunk_tokens=4096")
    request, models = default_request(config), models_in("bfloat16", config, {}, machine)
    assert config.runtime.heads_at_once is None
    settings = more_frugal(config, request, machine, models, "denoise")
    assert set(settings) == {"blocks_on_gpu"}
    before, after = (
        next(s for s in estimate(c, request, machine, models) if s.name == "denoise").gpu - CUDA_CONTEXT
        for c in (config, with_settings(config, runtime=settings))
    )
    assert 0.9 * ENOUGH * before < after <= ENOUGH * before
    # Where the host has no room for more blocks, they come from their file.
    small = dataclasses.replace(machine, host_memory=10 * GB)
    resident = with_settings(config, runtime={"blocks_on_gpu": None, "offload": "on"})
    settings = more_frugal(resident, request, small, models, "denoise")
    assert settings["blocks_from"] == "file"


def test_memory_of_the_host_beside_a_gpu() -> None:
    machine = Machine(64 * GB, 24 * GB)
    config = on(machine, "5s_t2v_pro")
    request, models = default_request(config), models_in("bfloat16", config, {}, machine)
    assert config.runtime.blocks_from == "memory" and config.runtime.blocks_on_gpu is not None
    assert more_frugal(config, request, machine, models, "denoise", on_host=True)["blocks_from"] == "file"


def test_a_stage_that_plans_do_not_have() -> None:
    """A video's frames are encoded by the VAE: the other models go."""
    machine = Machine(64 * GB, 80 * GB)
    config = on(machine, "5s_sft")
    models = models_in("bfloat16", config, {}, machine)
    assert more_frugal(config, default_request(config), machine, models, "encode video")["offload"] == "on"
