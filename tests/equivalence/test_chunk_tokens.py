"""A DiT whose feed-forwards and projections run over chunks of tokens gives what it gives without."""

from __future__ import annotations

import dataclasses
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kandinsky.attention.nabla import NablaConfig
from kandinsky.config.reading import load_config
from kandinsky.config.schema import DiTConfig
from kandinsky.loading.assemble import load_pipeline
from kandinsky.models.dit import DiffusionTransformer3D, Execution
from kandinsky.models.layers import by_chunks
from tests.equivalence.products import assert_the_same, depend_on_rows
from tests.unit.small_pipelines import randomised

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PARAMS = DiTConfig(
    in_text_dim=24, in_text_dim2=12, time_dim=16, model_dim=128, ff_dim=200, num_text_blocks=1, num_visual_blocks=2,
    axes_dims=(16, 24, 24), visual_cond=True,
)  # fmt: skip
SPARSE = NablaConfig(0.8, 3, 3, 3)


def build() -> DiffusionTransformer3D:
    return randomised(DiffusionTransformer3D(**dataclasses.asdict(PARAMS)))


def inputs(batch: int, grid: tuple[int, int, int], generator: torch.Generator) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    t, h, w = grid
    mask = torch.ones(batch, 20, dtype=torch.bool)
    mask[-1, 13:] = False
    return {
        "latents": normal(batch, t, 2 * h, 2 * w, 33),
        "text_embeds": normal(batch, 20, 24),
        "pooled_embeds": normal(batch, 12),
        "timesteps": torch.linspace(100, 900, batch),
        "text_mask": mask,
    }


def rows_of_linears(dit: nn.Module, rows: list[int]) -> None:
    """Have the visual blocks' feed-forwards and self-attentions write down how many tokens they see at a time."""
    for name, module in dit.named_modules():
        if name.startswith("visual_") and name.endswith(("feed_forward.in_layer", "to_query", "self_attention.to_key")):
            module.register_forward_hook(lambda _module, given, _out: rows.append(given[0].shape[1]))


@pytest.mark.processor
@pytest.mark.parametrize(
    ("batch", "grid", "nabla"), [(1, (2, 8, 16), None), (1, (2, 16, 16), SPARSE), (2, (1, 8, 16), None)]
)
@torch.no_grad()
def test_bit_for_bit_in_float32(batch: int, grid: tuple[int, int, int], nabla: NablaConfig | None) -> None:
    """With chunks that divide the tokens, and with a last one that is smaller."""
    dit, given = build(), inputs(batch, grid, torch.Generator().manual_seed(1))
    expected, rows = dit(**given, nabla=nabla), []
    bits = not depend_on_rows(dit, prod(grid))
    rows_of_linears(dit, rows)
    for chunk in (64, 100, 10_000):
        rows.clear()
        found = dit(**given, nabla=nabla, execution=Execution(chunk_tokens=chunk))
        assert_the_same(found, expected, bits, chunk)
        tokens = grid[0] * grid[1] * grid[2]
        last = {tokens % chunk} - {0} if chunk < tokens else set()
        assert set(rows) == {min(chunk, tokens), *last}
    rows.clear()
    assert torch.equal(dit(**given, nabla=nabla), expected) and set(rows) == {tokens}


@torch.no_grad()
def test_close_with_any_number_of_threads_and_quantised_layers() -> None:
    from kandinsky.runtime.quantization import quantize_dit

    torch.set_num_threads(2)
    dit = build()
    weights = dit.state_dict()
    with torch.device("meta"):
        quantised = DiffusionTransformer3D(**dataclasses.asdict(PARAMS))
    convert = quantize_dit(quantised, {}, "int8")
    assert convert is not None
    state: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        state |= convert(name, tensor) or {name: tensor}
    quantised.load_state_dict(state, assign=True)
    given = inputs(1, (2, 8, 16), torch.Generator().manual_seed(1))
    for model in (dit, quantised.eval()):
        expected = model(**given)
        chunked = model(**given, execution=Execution(chunk_tokens=100))
        assert ((chunked - expected).abs().max() / expected.abs().max()).item() <= 1e-5


def test_chunks_are_in_their_places() -> None:
    """Of a function that makes other widths, and looks at which tokens it is given."""
    x = torch.arange(2 * 7 * 3.0).view(2, 7, 3)

    def function(rows: Tensor, tokens: slice) -> Tensor:
        return torch.stack((rows.sum(-1), torch.arange(7.0)[tokens].expand(2, -1)), dim=-1)

    for chunk in (1, 2, 7, 8, None):
        assert torch.equal(by_chunks(function, x, chunk), function(x, slice(7)))


def test_the_setting_reaches_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pictures = []
    for chunk in (None, 64):
        overrides = ["model.num_steps=2", f"runtime.chunk_tokens={chunk or 'null'}"]
        pipe: Any = load_pipeline(load_config(CONFIGS / "config_tiny_t2v.yaml", overrides), "cpu")
        assert pipe.execution.chunk_tokens == chunk
        pictures.append(pipe("a red circle", seed=1, time_length=0.5, progress=False))
    assert torch.equal(*pictures)
