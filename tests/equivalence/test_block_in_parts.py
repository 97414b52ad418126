"""A DiT whose visual blocks run in parts, over its hidden states, gives what it gives with whole blocks."""

from __future__ import annotations

import dataclasses
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from kandinsky.attention.nabla import NablaConfig
from kandinsky.config.reading import load_config
from kandinsky.config.schema import DiTConfig
from kandinsky.loading.assemble import load_pipeline
from kandinsky.models.dit import DiffusionTransformer3D, Execution
from kandinsky.runtime.block_parts import to_host, with_blocks_in_parts
from tests.equivalence.products import assert_the_same, depend_on_rows
from tests.equivalence.test_chunk_tokens import inputs
from tests.unit.small_pipelines import randomised

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PARAMS = DiTConfig(
    in_text_dim=24, in_text_dim2=12, time_dim=16, model_dim=256, ff_dim=200, num_text_blocks=1, num_visual_blocks=2,
    axes_dims=(16, 24, 24), visual_cond=True,
)  # fmt: skip
SPARSE = NablaConfig(0.8, 3, 3, 3)


@pytest.mark.processor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "grid", "nabla"), [(1, (2, 8, 16), None), (1, (2, 16, 16), SPARSE), (2, (1, 8, 16), None)]
)
@torch.no_grad()
def test_the_same(batch: int, grid: tuple[int, int, int], nabla: NablaConfig | None, dtype: torch.dtype) -> None:
    """Bit for bit in float32, with groups of heads and chunks that divide what there is and such that don't."""
    dit = randomised(DiffusionTransformer3D(**dataclasses.asdict(PARAMS))).to(dtype)
    given = inputs(batch, grid, torch.Generator().manual_seed(1))
    expected, seen = dit(**given, nabla=nabla), set()
    attention, bits = Execution.attention, not depend_on_rows(dit, prod(grid))
    for heads, chunk, on_host in ((1, 64, True), (3, 100, False), (4, None, True)):
        execution = with_blocks_in_parts(Execution(chunk_tokens=chunk), heads, on_host)
        if nabla is None:

            def watched(q: Any, k: Any, v: Any) -> Any:
                seen.add(q.shape[1])
                return attention(q, k, v)

            execution = dataclasses.replace(execution, attention=watched)
        found = dit(**given, nabla=nabla, execution=execution)
        if dtype == torch.float32:
            assert_the_same(found, expected, bits, (heads, chunk))
        else:
            assert ((found - expected).abs().max() / expected.abs().max()).item() <= 0.02
    assert nabla is not None or seen == {1, 3, 4}


@torch.no_grad()
def test_nothing_else_is_as_large_as_the_hidden_states() -> None:
    dit = randomised(DiffusionTransformer3D(**dataclasses.asdict(PARAMS)))
    given = inputs(1, (4, 16, 16), torch.Generator().manual_seed(1))
    whole = 4 * 16 * 16 * PARAMS.model_dim
    places = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.numel() >= whole:
                places.add(result.data_ptr())
            return result

    with Watch():
        dit(**given, execution=with_blocks_in_parts(Execution(chunk_tokens=64), 1, False))
    assert len(places) == 1


@torch.no_grad()
def test_quantised_layers() -> None:
    from kandinsky.runtime.quantization import quantize_dit

    weights = randomised(DiffusionTransformer3D(**dataclasses.asdict(PARAMS))).state_dict()
    with torch.device("meta"):
        dit = DiffusionTransformer3D(**dataclasses.asdict(PARAMS))
    convert = quantize_dit(dit, {}, "int8")
    assert convert is not None
    state: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        state |= convert(name, tensor) or {name: tensor}
    dit.load_state_dict(state, assign=True)
    given = inputs(1, (1, 8, 16), torch.Generator().manual_seed(1))
    expected = dit.eval()(**given)
    assert torch.equal(dit(**given, execution=with_blocks_in_parts(Execution(), 3, True)), expected)


def test_what_waits_on_the_host_is_a_copy() -> None:
    result = torch.ones(1, 2, 3)
    host = to_host(result)
    assert torch.equal(host, result) and host.data_ptr() != result.data_ptr()


def test_the_settings_reach_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With MagCache, which looks at what the blocks wrote over; and with all blocks streaming from their file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pictures = []
    parts = ["runtime.heads_at_once=1", "runtime.attention_on_host=true", "runtime.chunk_tokens=64"]
    mapped = ["runtime.offload=on", "runtime.blocks_on_gpu=0", "runtime.blocks_from=file"]
    for settings in ([], parts, [*parts, *mapped]):
        overrides = ["model.num_steps=6", "magcache.enabled=true", "magcache.retention=0", *settings]
        pipe: Any = load_pipeline(load_config(CONFIGS / "config_tiny_t2v.yaml", overrides), "cpu")
        assert pipe.execution.writes_over == bool(settings)
        pictures.append(pipe("a red circle", seed=1, time_length=0.5, progress=False))
    assert torch.equal(pictures[0], pictures[1]) and torch.equal(pictures[0], pictures[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["runtime.heads_at_once=99"], r"heads_at_once = 99 is not allowed: it must be 1 to \d+"),
        (["runtime.heads_at_once=1", "runtime.compile=on"], "whole blocks are what is compiled"),
        (["runtime.attention_on_host=true"], "false without runtime.heads_at_once"),
    ],
)
def test_settings_that_contradict(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(CONFIGS / "config_tiny_t2v.yaml", settings)
