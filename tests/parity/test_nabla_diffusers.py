"""NABLA against diffusers': the helpers, the map, and the whole DiT with their compiled flex_attention.

diffusers computes NABLA only where flex_attention is compiled: not compiled it ignores the map and is dense without a
word. On a CPU the compiler (torch 2.13) takes no BlockMask whose two lists are one tensor, which theirs are, so one of
them is copied here on the way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import Kandinsky5T2VPipeline, Kandinsky5Transformer3DModel
from diffusers.models import attention_dispatch
from diffusers.models.transformers.transformer_kandinsky import fractal_flatten, fractal_unflatten, nablaT_v2
from diffusers_reference import LITE, Inputs, build_pair, largest_difference, make_inputs, rms, run_ours
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention

from kandinsky.attention.block_sparse import block_lists, flex_block_sparse, masked_dense, sdpa_block_sparse
from kandinsky.attention.nabla import (
    NablaConfig,
    block_order,
    fast_sta_nabla,
    get_sparse_params,
    nabla_block_map,
    nabla_tables,
)
from kandinsky.models.dit import DiffusionTransformer3D, Execution
from kandinsky.models.rope import visual_rotary_table

TOLERANCE = 1e-5
SCALE_FACTOR = (1.0, 2.0, 2.0)
LATENT_SIZE = (4, 32, 48)  # 2 x 3 blocks a frame, 24 blocks
NABLA = NablaConfig(P=0.5, wT=3, wH=1, wW=1)
FEW_EXAMPLES = settings(max_examples=25, deadline=None)

Pair = tuple[DiffusionTransformer3D, Kandinsky5Transformer3DModel]


# --- helpers ----------------------------------------------------------------------------------------------------------


@FEW_EXAMPLES
@given(grid=st.tuples(*[st.integers(1, 7)] * 3), window=st.tuples(*[st.integers(1, 12)] * 3))
def test_window(grid: tuple[int, int, int], window: tuple[int, int, int]) -> None:
    theirs = Kandinsky5T2VPipeline.fast_sta_nabla(*grid, *window, device="cpu")
    assert torch.equal(fast_sta_nabla(*grid, *window, "cpu"), theirs)


def test_window_without_sizes() -> None:
    assert torch.equal(fast_sta_nabla(5, 6, 7), Kandinsky5T2VPipeline.fast_sta_nabla(5, 6, 7, device="cpu"))


@pytest.mark.parametrize("config", [NablaConfig(), NablaConfig(0.8, 5, 3, 1)])
def test_sparse_params(config: NablaConfig) -> None:
    attention = {f"attention_{name}": value for name, value in dataclasses.asdict(config).items()}
    theirs = SimpleNamespace(
        transformer=SimpleNamespace(
            config=SimpleNamespace(
                patch_size=(1, 2, 2),
                attention_type="nabla",
                attention_add_sta=True,
                attention_method="topcdf",
                **attention,
            )
        ),
        fast_sta_nabla=Kandinsky5T2VPipeline.fast_sta_nabla,
    )
    latents = torch.empty(1, *LATENT_SIZE, 16)
    expected = Kandinsky5T2VPipeline.get_sparse_params(theirs, latents, "cpu")
    params = get_sparse_params(latents, "cpu", config)
    assert params is not None and params.keys() == expected.keys()
    assert torch.equal(params.pop("sta_mask"), expected.pop("sta_mask"))
    assert params == expected


@FEW_EXAMPLES
@given(frames=st.integers(1, 3), rows=st.integers(1, 3), columns=st.integers(1, 3))
def test_token_order_and_rotary_table(frames: int, rows: int, columns: int) -> None:
    grid = (frames, 8 * rows, 8 * columns)
    tokens = torch.arange(frames * 64 * rows * columns)
    table = visual_rotary_table(grid, (16, 24, 24), SCALE_FACTOR, "cpu")
    hidden, cos = fractal_flatten(tokens.view(1, *grid, 1), table.cos.view(1, *grid, 32), (1, *grid), block_mask=True)
    tables = nabla_tables(grid, NABLA, "cpu")
    assert torch.equal(tokens[block_order(grid, "cpu")], hidden.flatten())
    assert torch.equal(table.reordered(tables.order).cos, cos[0])
    back = fractal_unflatten(hidden, (1, *grid), block_mask=True)
    assert torch.equal(tokens[tables.order][tables.inverse], back.flatten())


# --- map --------------------------------------------------------------------------------------------------------------


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("P", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("peak", [0.0, 3.0, 30.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_map(peak: float, P: float, head_dim: int) -> None:
    """The same blocks, and the same lists of blocks up to their order, in float32."""
    blocks, heads = 24, 3
    q, k = (
        normal(2, 64 * blocks, heads, head_dim, seed=i)
        + peak * normal(2, blocks, heads, head_dim, seed=9 + i).repeat_interleave(64, 1)
        for i in range(2)
    )
    sta = fast_sta_nabla(4, 2, 3, 3, 1, 1)
    theirs = nablaT_v2(q, k, sta[None, None], thr=P)
    ours = nabla_block_map(q.transpose(1, 2), k.transpose(1, 2), sta, P)
    assert torch.equal(ours, theirs.to_dense().bool())
    assert torch.equal(block_lists(ours)[0], theirs.full_kv_num_blocks)
    assert ours.float().mean() < (0.999 if peak == 0 else 0.85)


# --- the whole model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> Pair:
    """Random weights, and norms of queries and keys that make their map a peaked one."""
    ours, theirs = build_pair(LITE, seed=5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "self_attention" in name and ("query_norm" in name or "key_norm" in name):
                parameter.mul_(2.5)
    ours.load_state_dict(theirs.state_dict())
    theirs.set_attention_backend("flex")
    return ours, theirs


@pytest.fixture(scope="module")
def inputs(pair: Pair) -> Inputs:
    """Latents smooth over a block, as those of videos are."""
    made = make_inputs(pair[0], SCALE_FACTOR, latent_size=LATENT_SIZE)
    coarse = normal(1, 4, 2, 3, 33, seed=7).repeat_interleave(16, 2).repeat_interleave(16, 3)
    return dataclasses.replace(made, latents=0.3 * made.latents + coarse)


@pytest.fixture
def flex_by(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[..., Tensor]], None]]:
    """flex_by(function): what diffusers calls for flex_attention in visual self-attention, for the length of a test."""

    def use(function: Callable[..., Tensor]) -> None:
        def call(**arguments: Any) -> Tensor:
            mask = arguments["block_mask"]
            if mask is None:  # text and cross-attention are dense
                return torch.nn.functional.scaled_dot_product_attention(
                    *(arguments[x] for x in ("query", "key", "value"))
                )
            mask.full_kv_indices = mask.full_kv_indices.clone()
            return function(arguments["query"], arguments["key"], arguments["value"], block_mask=mask)

        module = SimpleNamespace(flex_attention=call, BlockMask=flex_attention.BlockMask)
        monkeypatch.setattr(attention_dispatch, "flex_attention", module)

    return use


@torch.no_grad()
def run_theirs(model: Kandinsky5Transformer3DModel, inputs: Inputs, config: NablaConfig) -> Tensor:
    frames, height, width = LATENT_SIZE
    return model(
        hidden_states=inputs.latents,
        encoder_hidden_states=inputs.text_embeds,
        pooled_projections=inputs.pooled_embeds,
        timestep=inputs.timesteps,
        visual_rope_pos=[torch.arange(frames), torch.arange(height // 2), torch.arange(width // 2)],
        text_rope_pos=torch.arange(inputs.text_embeds.shape[1]),
        scale_factor=inputs.scale_factor,
        sparse_params=get_sparse_params(inputs.latents, "cpu", config),
        return_dict=False,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("exact_diffusers")
def test_same_velocity_as_compiled_flex_attention(
    pair: Pair, inputs: Inputs, flex_by: Callable[[Callable[..., Tensor]], None]
) -> None:
    """Float32, block-sparse in both, each with its own map; and our own flex kernel, compiled, gives it too."""
    ours, theirs = pair
    torch._dynamo.reset()
    flex_by(torch.compile(flex_attention.flex_attention, fullgraph=True, dynamic=False))
    expected = run_theirs(theirs, inputs, NABLA)
    densities = []

    def watching(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor) -> Tensor:
        densities.append(block_map.float().mean().item())
        return sdpa_block_sparse(q, k, v, block_map)

    velocity = run_ours(ours, inputs, nabla=NABLA, execution=Execution(block_sparse=watching))
    assert max(densities) < 0.7, densities
    assert 0.1 < rms(velocity) < 10
    assert largest_difference(velocity, expected) <= TOLERANCE
    assert largest_difference(velocity, run_ours(ours, inputs)) > 1e-2  # and not dense attention
    by_flex = run_ours(ours, inputs, nabla=NABLA, execution=Execution(block_sparse=flex_block_sparse))
    assert largest_difference(by_flex, expected) <= TOLERANCE


@pytest.mark.usefixtures("exact_diffusers")
def test_same_velocity_as_the_map_applied_densely(
    pair: Pair, inputs: Inputs, flex_by: Callable[[Callable[..., Tensor]], None]
) -> None:
    """Their model, their map, the plain formula for attention: at several P, without a compiler."""
    ours, theirs = pair
    flex_by(lambda q, k, v, block_mask: masked_dense(q, k, v, block_mask.to_dense().bool()))
    for P in (0.9, 0.5, 0.2):
        config = dataclasses.replace(NABLA, P=P)
        velocity = run_ours(ours, inputs, nabla=config)
        assert largest_difference(velocity, run_theirs(theirs, inputs, config)) <= TOLERANCE


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
@pytest.mark.usefixtures("exact_diffusers")
def test_what_diffusers_computes_without_a_compiler_is_dense(
    pair: Pair, inputs: Inputs, flex_by: Callable[[Callable[..., Tensor]], None]
) -> None:
    """Why ours refuses to run flex_attention uncompiled. If this fails, theirs no longer is silently dense."""
    ours, theirs = pair
    flex_by(flex_attention.flex_attention)
    silent = run_theirs(theirs, inputs, NABLA)
    assert largest_difference(silent, run_ours(ours, inputs)) <= TOLERANCE
    assert largest_difference(silent, run_ours(ours, inputs, nabla=NABLA)) > 1e-2
