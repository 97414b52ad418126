"""What a plan chooses changes no pixel: each kind of choice for a published variant, made with the tiny one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kandinsky.config.reading import load_config
from kandinsky.config.schema import Config, RuntimeConfig
from kandinsky.loading.assemble import load_pipeline
from kandinsky.models.vae_memory import GB
from kandinsky.planning.machine import Machine
from kandinsky.planning.plan import default_request, make_plan

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TINY = "config_tiny_t2v.yaml"
# GB of the GPU and of the host, for which the four variants are planned that want the most different things.
MACHINES = ((8, 8), (8, 64), (12, 16), (24, 32), (80, 64), (None, 48), (None, 128))
VARIANTS = ("5s_sft", "5s_t2v_pro_hd", "10s_t2v_pro_hd", "t2i")


def for_the_tiny_one(runtime: RuntimeConfig, planned: Config, tiny: Config) -> tuple[str, ...]:
    """The settings of a plan as overrides: counts of blocks and heads in proportion, tokens in chunks that divide."""
    blocks, heads = (
        (config.model.dit_params.num_visual_blocks, config.model.dit_params.num_heads) for config in (planned, tiny)
    )

    def share(count: int, of: tuple[int, int]) -> int:
        return -(-count * of[1] // of[0])

    blocks_of, heads_of = zip(blocks, heads, strict=True)
    settings: dict[str, Any] = {
        "offload": runtime.offload,
        "stream_encoders": runtime.stream_encoders,
        "blocks_from": runtime.blocks_from,
    }
    if runtime.blocks_on_gpu is not None:
        settings["blocks_on_gpu"] = min(share(runtime.blocks_on_gpu, blocks_of), blocks_of[1] - 1)
    if runtime.chunk_tokens is not None:
        settings["chunk_tokens"] = 64
    if runtime.heads_at_once is not None:
        settings["heads_at_once"] = share(runtime.heads_at_once, heads_of)
        settings["attention_on_host"] = str(runtime.attention_on_host).lower()
    return tuple(f"runtime.{name}={value}" for name, value in settings.items())


def test_each_choice_gives_the_same_pixels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny, chosen = load_config(CONFIGS / TINY), set()
    for name in VARIANTS:
        config = load_config(CONFIGS / f"config_{name}.yaml")
        for gpu, host in MACHINES:
            machine = Machine(host * GB, None if gpu is None else gpu * 1e9)
            plan = make_plan(config, default_request(config), machine, {}, "bfloat16")
            assert plan.refusal is None, plan.refusal
            chosen.add(for_the_tiny_one(plan.config.runtime, config, tiny))
    # Every setting that a plan has to choose was chosen by one, and left alone by another.
    for setting in ("offload=on", "stream_encoders=on", "blocks_from=file", "blocks_on_gpu", "heads_at_once"):
        assert 0 < sum(any(f"runtime.{setting}" in words for words in each) for each in chosen) < len(chosen), setting

    def pixels(*settings: str) -> torch.Tensor:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(len(list(tmp_path.iterdir())))))
        pipe: Any = load_pipeline(load_config(CONFIGS / TINY, ("model.num_steps=2", *settings)), "cpu")
        found: torch.Tensor = pipe("a red circle", seed=1, time_length=0.2, progress=False)
        return found

    usual = pixels("runtime.offload=off", "runtime.stream_encoders=off")
    for settings in sorted(chosen):
        assert torch.equal(pixels(*settings), usual), settings
