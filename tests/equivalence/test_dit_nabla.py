"""The DiT with NABLA beside the DiT without, with itself under other kernels, and in other batches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kandinsky.attention import nabla
from kandinsky.attention.block_sparse import BlockSparseAttention, masked_dense, sdpa_block_sparse
from kandinsky.attention.engines import sdpa
from kandinsky.attention.nabla import NablaConfig
from kandinsky.models.dit import DiffusionTransformer3D, Execution

TOLERANCE = 1e-5
LATENT_SIZE = (3, 32, 48)  # 2 x 3 blocks a frame, 18 blocks
SPARSE = NablaConfig(P=0.5, wT=3, wH=1, wW=1)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def dit() -> DiffusionTransformer3D:
    """Random weights; queries and keys are large, so that their map is peaked as a trained model's is."""
    model = DiffusionTransformer3D(
        in_text_dim=24,
        in_text_dim2=12,
        time_dim=32,
        model_dim=128,
        ff_dim=256,
        num_text_blocks=1,
        num_visual_blocks=2,
        visual_cond=True,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(values / math.sqrt(parameter.shape[1]))
            elif name.endswith("norm.weight") and "self_attention" in name:
                parameter.copy_(2.5 + 0.2 * values)
            else:
                parameter.copy_(0.2 * values + (1 if name.endswith("norm.weight") else 0))
    return model.eval()


def make_inputs(dit: DiffusionTransformer3D, batch: int = 1, latent_size: tuple[int, int, int] = LATENT_SIZE) -> Inputs:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    # Smooth over neighbouring patches, as videos are: else the blocks' means are all alike.
    coarse = normal(batch, latent_size[0], latent_size[1] // 16, latent_size[2] // 16, dit.in_channels)
    latents = 0.3 * normal(batch, *latent_size, dit.in_channels)
    latents += coarse.repeat_interleave(16, 2).repeat_interleave(16, 3)
    timesteps = torch.tensor([723.4567, 41.875])[:batch]
    return latents, normal(batch, 7, 24), normal(batch, 12), timesteps


@torch.no_grad()
def run(dit: DiffusionTransformer3D, inputs: Inputs, kernel: BlockSparseAttention | None = None, **options) -> Tensor:
    return dit(*inputs, execution=Execution(block_sparse=kernel or sdpa_block_sparse), **options)


def largest_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.mark.parametrize("latent_size", [LATENT_SIZE, (1, 16, 16), (2, 16, 48)])
def test_keeping_everything_is_dense(dit: DiffusionTransformer3D, latent_size: tuple[int, int, int]) -> None:
    """P = 1: the order of the tokens and their rotary positions go there and come back."""
    inputs = make_inputs(dit, latent_size=latent_size)
    dense = run(dit, inputs)
    assert dense.shape == (1, *latent_size, 16) and 0.1 < dense.std() < 10
    everything = NablaConfig(P=1.0, wT=1, wH=1, wW=1)
    assert largest_difference(run(dit, inputs, nabla=everything), dense) <= TOLERANCE


def test_dropping_blocks_is_not_dense(dit: DiffusionTransformer3D) -> None:
    """Were NABLA ever computed as dense attention, silently, this would fail."""
    densities = []

    def watching(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor) -> Tensor:
        densities.append(block_map.float().mean().item())
        return sdpa_block_sparse(q, k, v, block_map)

    def ignoring_the_map(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor) -> Tensor:
        return sdpa(q, k, v)

    inputs = make_inputs(dit)
    dense = run(dit, inputs)
    sparse = run(dit, inputs, watching, nabla=SPARSE)
    assert len(densities) == 2 and max(densities) < 0.6, densities
    assert largest_difference(sparse, dense) > 0.05
    assert largest_difference(run(dit, inputs, ignoring_the_map, nabla=SPARSE), dense) <= TOLERANCE


def test_kernels_agree(dit: DiffusionTransformer3D) -> None:
    inputs = make_inputs(dit)
    sparse = run(dit, inputs, nabla=SPARSE)
    assert largest_difference(sparse, run(dit, inputs, masked_dense, nabla=SPARSE)) <= TOLERANCE


def test_a_map_of_its_own_for_every_sample(dit: DiffusionTransformer3D) -> None:
    inputs = make_inputs(dit, batch=2)
    together = run(dit, inputs, nabla=SPARSE)
    for i in range(2):
        alone = run(dit, tuple(x[i : i + 1] for x in inputs), nabla=SPARSE)
        assert largest_difference(together[i : i + 1], alone) <= TOLERANCE


def test_config_is_heard(dit: DiffusionTransformer3D) -> None:
    inputs = make_inputs(dit)
    sparse = run(dit, inputs, nabla=SPARSE)
    for change in ({"P": 0.3}, {"wT": 1}, {"wH": 3}, {"wW": 3}):
        assert largest_difference(run(dit, inputs, nabla=replace(SPARSE, **change)), sparse) > 1e-3, change


def test_tables_are_made_once_a_request(dit: DiffusionTransformer3D, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `request_tables` a step makes no window and no token order, and computes the same."""
    inputs = make_inputs(dit)
    expected = run(dit, inputs, nabla=SPARSE)
    tables = dit.request_tables(LATENT_SIZE, 7, (1.0, 2.0, 2.0), "cpu", SPARSE)
    made = []
    for name in ("fast_sta_nabla", "block_order"):
        make = getattr(nabla, name)
        monkeypatch.setattr(nabla, name, lambda *args, name=name, make=make: made.append(name) or make(*args))
    assert torch.equal(run(dit, inputs, tables=tables), expected)
    assert torch.equal(run(dit, inputs, tables=tables, nabla=SPARSE), expected)
    assert made == []
    run(dit, inputs, nabla=SPARSE)
    assert sorted(made) == ["block_order", "fast_sta_nabla"]


def test_dense_tables_have_no_blocks(dit: DiffusionTransformer3D) -> None:
    """Dense attention takes sizes that NABLA can't, and its tokens stay in their order."""
    tables = dit.request_tables((3, 10, 12), 7, (1.0, 2.0, 2.0), "cpu")
    assert tables.nabla is None
    with pytest.raises(ValueError, match="multiples of 128 pixels"):
        dit.request_tables((3, 10, 12), 7, (1.0, 2.0, 2.0), "cpu", SPARSE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flex_on_a_gpu(dit: DiffusionTransformer3D) -> None:
    from kandinsky.attention.block_sparse import flex_block_sparse

    inputs = tuple(x.cuda() for x in make_inputs(dit))
    dit.cuda()
    try:
        sparse = run(dit, inputs, flex_block_sparse, nabla=SPARSE)
        assert largest_difference(sparse, run(dit, inputs, masked_dense, nabla=SPARSE)) <= 1e-2  # TF32 products
    finally:
        dit.cpu()
