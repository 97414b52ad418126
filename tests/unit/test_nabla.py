"""NABLA's map against the published formula written out, and block-sparse attention against masked dense attention."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kandinsky.attention import block_sparse
from kandinsky.attention.block_sparse import (
    BLOCK_SPARSE_ENGINES,
    block_lists,
    flex_block_sparse,
    masked_dense,
    resolve_block_sparse,
    run_flex_attention,
    sdpa_block_sparse,
    triton_options,
)
from kandinsky.attention.engines import sdpa
from kandinsky.attention.nabla import (
    NablaConfig,
    block_grid,
    block_order,
    fast_sta_nabla,
    get_sparse_params,
    heaviest,
    nabla_attention,
    nabla_block_map,
    nabla_tables,
)

CPU = torch.device("cpu")
TOLERANCE = 1e-5
FEW_EXAMPLES = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def published_map(q: Tensor, k: Tensor, sta: Tensor, P: float) -> Tensor:
    """The published formula step by step: sort, cumulative mass, threshold, a second sort to put the mask back."""
    batch, heads, tokens, head_dim = q.shape
    blocks = tokens // 64
    q_mean = q.float().reshape(batch, heads, blocks, 64, head_dim).mean(-2)
    k_mean = k.float().reshape(batch, heads, blocks, 64, head_dim).mean(-2)
    mass = torch.softmax(q_mean @ k_mean.transpose(-2, -1) / math.sqrt(head_dim), dim=-1)
    values, indices = mass.sort(-1)
    keep_sorted = values.cumsum(-1) >= 1 - P
    original_places = indices.argsort(-1)
    return keep_sorted.gather(-1, original_places) | sta


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def constant_blocks(means: Tensor) -> Tensor:
    """Tokens (B, heads, 64 n, d) of which each block's mean is a row of `means` (B, heads, n, d), exactly."""
    return means.repeat_interleave(64, dim=2)


def random_map(batch: int, heads: int, blocks: int, density: float, seed: int = 0) -> Tensor:
    """A map like NABLA's: each row keeps its own block and random others, each row another number of them."""
    drawn = torch.rand(batch, heads, blocks, blocks, generator=torch.Generator().manual_seed(seed)) < density
    return drawn | torch.eye(blocks, dtype=torch.bool)


def largest_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()


# --- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"P": 0}, "P is 0; .* more than 0 and at most 1"),
        ({"P": 1.01}, "P is 1.01"),
        ({"P": math.nan}, "P is nan"),
        ({"wT": 0}, "wT is 0; a window is at least 1 block wide"),
        ({"wH": -1}, "wH is -1"),
        ({"wW": 0}, "wW is 0"),
    ],
)
def test_impossible_configs(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NablaConfig(**values)


def test_published_config() -> None:
    assert NablaConfig() == NablaConfig(P=0.9, wT=11, wH=3, wW=3)


# --- window -----------------------------------------------------------------------------------------------------------


@FEW_EXAMPLES
@given(
    grid=st.tuples(*[st.integers(1, 6)] * 3),
    window=st.tuples(*[st.integers(1, 12)] * 3),
)
@example(grid=(5, 4, 6), window=(11, 3, 3))
def test_window(grid: tuple[int, int, int], window: tuple[int, int, int]) -> None:
    sta = fast_sta_nabla(*grid, *window, "cpu")
    positions = list(itertools.product(*map(range, grid)))
    assert sta.dtype == torch.bool
    assert sta.tolist() == [
        [all(abs(a - b) <= w // 2 for a, b, w in zip(query, key, window, strict=True)) for key in positions]
        for query in positions
    ]


@pytest.mark.parametrize(
    ("latent_frames", "rows", "columns", "density"),
    # 5 s and 10 s at 768x512, 5 s at 1280x768 and 1024x1024: the densities that the published window has.
    [(31, 4, 6, 0.090), (61, 4, 6, 0.048), (31, 6, 10, 0.040), (31, 8, 8, 0.038)],
)
def test_density_of_the_published_window(latent_frames: int, rows: int, columns: int, density: float) -> None:
    sta = fast_sta_nabla(latent_frames, rows, columns, 11, 3, 3)
    assert sta.shape == (latent_frames * rows * columns,) * 2
    assert sta.float().mean().item() == pytest.approx(density, abs=5e-4)
    assert torch.equal(sta, sta.T) and sta.diagonal().all()


# --- token order ------------------------------------------------------------------------------------------------------


@FEW_EXAMPLES
@given(frames=st.integers(1, 4), rows=st.integers(1, 3), columns=st.integers(1, 3))
def test_token_order(frames: int, rows: int, columns: int) -> None:
    """Blocks frame by frame, row by row; in a block the 8 x 8 patches of one frame, row by row."""
    grid = (frames, 8 * rows, 8 * columns)
    order = block_order(grid, "cpu").tolist()
    expected = [
        (t * 8 * rows + 8 * block_row + row) * 8 * columns + 8 * block_column + column
        for t, block_row, block_column in itertools.product(range(frames), range(rows), range(columns))
        for row, column in itertools.product(range(8), range(8))
    ]
    assert order == expected


def test_tables() -> None:
    tables = nabla_tables((3, 16, 24), NablaConfig(0.8, 3, 1, 3), "cpu")
    tokens = normal(3 * 16 * 24)
    assert torch.equal(tokens[tables.order][tables.inverse], tokens)
    assert not torch.equal(tables.order, tables.inverse)
    assert torch.equal(tables.window, fast_sta_nabla(3, 2, 3, 3, 1, 3))


@pytest.mark.parametrize("grid", [(3, 12, 16), (3, 16, 12), (1, 4, 8)])
def test_grids_that_do_not_divide_into_blocks(grid: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=rf"{grid[1]}x{grid[2]} patches do not divide .* multiples of 128 pixels"):
        block_grid(grid)
    with pytest.raises(ValueError, match="multiples of 128 pixels"):
        nabla_tables(grid, NablaConfig(), "cpu")


def test_sparse_params() -> None:
    latents = torch.empty(2, 5, 32, 48, 16)
    params = get_sparse_params(latents, "cpu")
    assert params is not None
    window = params.pop("sta_mask")
    assert window.dtype == torch.bool and torch.equal(window, fast_sta_nabla(5, 2, 3, 11, 3, 3)[None, None])
    assert params == {
        "attention_type": "nabla",
        "to_fractal": True,
        "P": 0.9,
        "wT": 11,
        "wW": 3,
        "wH": 3,
        "add_sta": True,
        "visual_shape": (5, 16, 24),
        "method": "topcdf",
    }
    other = get_sparse_params(latents, CPU, NablaConfig(0.8, 3, 3, 5))
    assert other is not None and (other["P"], other["wT"], other["wW"]) == (0.8, 3, 5)
    assert get_sparse_params(latents, "cpu", None) is None
    with pytest.raises(ValueError, match="multiples of 128 pixels"):
        get_sparse_params(torch.empty(2, 5, 30, 48, 16), "cpu")


# --- map --------------------------------------------------------------------------------------------------------------


def keys_for(scores: Tensor) -> tuple[Tensor, Tensor]:
    """q and k of which the blocks' means have the products `scores` (heads, n, n), times the square root of d = n."""
    heads, n, _ = scores.shape
    q = constant_blocks(torch.eye(n).expand(1, heads, n, n))
    return q, constant_blocks(scores.mT[None] * math.sqrt(n))


def adversarial_inputs() -> Iterator[tuple[str, Tensor, Tensor]]:
    n, d = 12, 64
    q, k = normal(1, 2, 64 * n, d), normal(1, 2, 64 * n, d, seed=1)
    yield "random", q, k
    yield "peaked", q, 20 * constant_blocks(normal(1, 2, n, d, seed=2))
    yield "queries alike", constant_blocks(normal(1, 1, 1, d).expand(1, 2, n, d)), 5 * constant_blocks(k[:, :, :n])
    yield "all tied", torch.zeros_like(q), k
    yield "tied in groups", *keys_for((torch.arange(n) // 4).float().expand(2, n, n).clone())
    yield "tied in pairs, out of order", *keys_for((torch.arange(n) % 6).float().expand(2, n, n).clone())
    yield "one has all the mass", *keys_for(200 * torch.eye(n).expand(2, n, n))
    yield "mass decreasing by halves", *keys_for(-math.log(2) * torch.arange(n).float().expand(2, n, n))
    yield "mass increasing by halves", *keys_for(math.log(2) * torch.arange(n).float().expand(2, n, n))
    yield "subnormal mass", *keys_for(-90 + 89 * (torch.arange(n) == 5).float().expand(2, n, n))
    yield "huge", 1e4 * q, 1e4 * k
    yield "tiny", 1e-20 * q, 1e-20 * k
    yield "batch of three", normal(3, 2, 64 * n, d), 10 * constant_blocks(normal(3, 2, n, d, seed=1))
    yield "one block", q[:, :, :64], k[:, :, :64]


@pytest.mark.parametrize(("q", "k"), [pytest.param(q, k, id=name) for name, q, k in adversarial_inputs()])
@pytest.mark.parametrize("P", [1.0, 0.999, 0.9, 0.75, 0.5, 0.2, 1e-3, 1e-12])
def test_map_is_the_published_one(q: Tensor, k: Tensor, P: float) -> None:
    blocks = q.shape[2] // 64
    for sta in (torch.zeros(blocks, blocks, dtype=torch.bool), fast_sta_nabla(blocks, 1, 1, 3, 1, 1)):
        ours = nabla_block_map(q, k, sta, P)
        assert ours.dtype == torch.bool and ours.shape == (*q.shape[:2], blocks, blocks)
        assert torch.equal(ours, published_map(q, k, sta, P))


@FEW_EXAMPLES
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    blocks=st.integers(1, 20),
    head_dim=st.sampled_from([8, 64, 128]),
    P=st.floats(1e-6, 1.0),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    levels=st.sampled_from([0, 2, 5]),
    seed=st.integers(0, 2**31),
)
def test_map_properties(
    batch: int, heads: int, blocks: int, head_dim: int, P: float, scale: float, levels: int, seed: int
) -> None:
    """The published map; the window is in it; each row's mass is kept up to less than 1 - P; more P keeps more."""
    q, k = (scale * constant_blocks(normal(batch, heads, blocks, head_dim, seed=seed + i)) for i in (0, 1))
    if levels:  # few different values: many ties
        q, k = ((x * levels / scale).round() * scale / levels for x in (q, k))
    sta = fast_sta_nabla(blocks, 1, 1, 5, 1, 1)
    kept = nabla_block_map(q, k, sta, P)
    assert torch.equal(kept, published_map(q, k, sta, P))
    assert kept[..., sta].all()
    q_mean, k_mean = (x.double().unflatten(2, (-1, 64)).mean(3) for x in (q, k))
    mass = (q_mean @ k_mean.mT / math.sqrt(head_dim)).softmax(-1)
    assert (mass * ~kept).sum(-1).max() <= 1 - P + 1e-5
    assert (nabla_block_map(q, k, sta, (1 + P) / 2) >= kept).all()


def test_limits_of_the_map() -> None:
    """P = 1 keeps everything; P near 0 the window and at most the heaviest block of a row."""
    q, k = normal(1, 2, 64 * 10, 64), 10 * constant_blocks(normal(1, 2, 10, 64, seed=1))
    window = fast_sta_nabla(10, 1, 1, 3, 1, 1)
    nothing = torch.zeros_like(window)
    assert nabla_block_map(q, k, window, 1.0).all()
    assert (nabla_block_map(q, k, nothing, 1e-9).sum(-1) <= 1).all()
    assert (nabla_block_map(q, k, window, 1e-9).sum(-1) <= window.sum(-1) + 1).all()


def test_map_of_a_known_mass() -> None:
    """Mass 1/2, 1/4, 1/8, 1/16, 1/16: the smallest that together stay below 1 - P go."""
    mass = torch.tensor([1 / 2, 1 / 16, 1 / 4, 1 / 16, 1 / 8])
    q, k = keys_for(mass.log().expand(1, 5, 5))
    nothing = torch.zeros(5, 5, dtype=torch.bool)
    for P, expected in (
        (0.99, [1, 1, 1, 1, 1]),
        (0.80, [1, 0, 1, 0, 1]),  # 1/16 + 1/16 < 0.2, and 1/8 more is not
        (0.70, [1, 0, 1, 0, 0]),
        (0.40, [1, 0, 0, 0, 0]),
    ):
        assert nabla_block_map(q, k, nothing, P)[0, 0].int().tolist() == [expected] * 5


def test_mass_is_float32_in_a_bfloat16_model() -> None:
    """bfloat16 queries and keys give the map of the same numbers in float32, where bfloat16 sums would not."""
    q, k = normal(1, 4, 64 * 40, 64).bfloat16(), normal(1, 4, 64 * 40, 64, seed=1).bfloat16()
    sta = fast_sta_nabla(10, 2, 2, 3, 3, 3)
    ours = nabla_block_map(q, k, sta, 0.6)
    assert torch.equal(ours, nabla_block_map(q.float(), k.float(), sta, 0.6))
    q_mean, k_mean = (x.unflatten(2, (-1, 64)).mean(3) for x in (q, k))
    rounded = (q_mean @ k_mean.mT / 8).softmax(-1)
    values, indices = rounded.sort(-1)
    in_bfloat16 = (values.cumsum(-1) >= 0.4).gather(-1, indices.argsort(-1)) | sta
    assert (in_bfloat16 != ours).float().mean() > 0.001


def test_map_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many heads are worked on at once, the map and its lists are the same."""
    q, k = normal(2, 3, 64 * 9, 64), 10 * constant_blocks(normal(2, 3, 9, 64, seed=1))
    sta = fast_sta_nabla(9, 1, 1, 3, 1, 1)
    whole = nabla_block_map(q, k, sta, 0.7)
    lists = block_lists(whole)
    for entries in (1, 81, 4 * 81):
        monkeypatch.setattr(block_sparse, "MAP_ENTRIES_AT_ONCE", entries)
        assert torch.equal(nabla_block_map(q, k, sta, 0.7), whole)
        for part, expected in zip(block_lists(whole), lists, strict=True):
            assert torch.equal(part, expected)


@FEW_EXAMPLES
@given(
    rows=st.integers(1, 5),
    n=st.integers(1, 200),
    P=st.floats(1e-9, 1.0),
    levels=st.sampled_from([0, 1, 3, 30]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_heaviest_is_the_published_choice(
    rows: int, n: int, P: float, levels: int, dtype: torch.dtype, seed: int
) -> None:
    """By a threshold as by a sort of pairs, ties included, and where not everything is a number."""
    scores = 3 * normal(rows, n, seed=seed).to(dtype)
    mass = (scores.mul(levels).round() / levels if levels else scores).softmax(-1)
    mass[0] = math.nan if seed % 5 == 0 else mass[0]
    values, indices = mass.sort(-1)
    expected = (values.cumsum(-1) >= 1 - P).gather(-1, indices.argsort(-1))
    assert torch.equal(heaviest(mass, P), expected)


def test_no_pairs_are_sorted_on_a_cpu() -> None:
    """Neither for the map, where the formula sorts masses with their columns, nor for its lists."""
    q, k = normal(1, 2, 64 * 9, 64), normal(1, 2, 64 * 9, 64, seed=1)
    with recorded_operations() as operations:
        block_lists(nabla_block_map(q, k, fast_sta_nabla(9, 1, 1), 0.7))
    sorts = [name for name, _ in operations if "sort" in name or "topk" in name]
    assert sorts == []


@FEW_EXAMPLES
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    blocks=st.integers(1, 30),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_block_lists(batch: int, heads: int, blocks: int, density: float, seed: int) -> None:
    block_map = torch.rand(batch, heads, blocks, blocks, generator=torch.Generator().manual_seed(seed)) < density
    counts, indices = block_lists(block_map)
    assert counts.dtype == indices.dtype == torch.int32
    assert counts.shape == (batch, heads, blocks) and indices.shape == block_map.shape
    for row, count, listed in zip(block_map.flatten(0, 2), counts.flatten(), indices.flatten(0, 2), strict=True):
        kept = row.nonzero().flatten().tolist()
        assert count == len(kept)
        assert listed[:count].tolist() == kept
        assert sorted(listed.tolist()) == list(range(blocks))


# --- attention in proportion to what is kept --------------------------------------------------------------------------


@contextmanager
def recorded_operations() -> Iterator[list[tuple[str, int]]]:
    """(name, number of elements of the largest result) of every operation of PyTorch."""
    operations: list[tuple[str, int]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            tensors = [x for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, Tensor)]
            operations.append((str(func), max((x.numel() for x in tensors), default=0)))
            return result

    with Recorder():
        yield operations


@FEW_EXAMPLES
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    blocks=st.integers(1, 12),
    head_dim=st.sampled_from([8, 64, 128]),
    density=st.floats(0, 1),
    gathered_blocks=st.sampled_from([1, 7, 10_000]),
    seed=st.integers(0, 2**31),
)
def test_sdpa_kernel_is_masked_dense_attention(
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    heads: int,
    blocks: int,
    head_dim: int,
    density: float,
    gathered_blocks: int,
    seed: int,
) -> None:
    """For all shapes and maps, tokens-first layouts as the model has them, and however little is gathered at once."""
    bytes_of_a_block = 2 * 64 * head_dim * 4
    threads = torch.get_num_threads()
    monkeypatch.setattr(block_sparse, "GATHERED_BYTES_PER_THREAD", gathered_blocks * bytes_of_a_block // threads)
    q, k, v = (normal(batch, 64 * blocks, heads, head_dim, seed=seed + i).transpose(1, 2) for i in range(3))
    block_map = random_map(batch, heads, blocks, density, seed)
    out = sdpa_block_sparse(q, k, v, block_map)
    assert largest_difference(out, masked_dense(q, k, v, block_map)) <= TOLERANCE


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003), (torch.float64, 1e-12)]
)
def test_sdpa_kernel_in_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = (normal(1, 2, 64 * 6, 64, seed=i).to(dtype) for i in range(3))
    block_map = random_map(1, 2, 6, 0.3)
    out = sdpa_block_sparse(q, k, v, block_map)
    assert out.dtype == dtype
    assert largest_difference(out, masked_dense(q.double(), k.double(), v.double(), block_map)) <= tolerance


def test_masked_dense_sees_kept_blocks_only() -> None:
    """The reference itself, written out for one head."""
    q, k, v = (normal(1, 1, 64 * 3, 8, seed=i) for i in range(3))
    block_map = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1]], dtype=torch.bool)[None, None]
    out = masked_dense(q, k, v, block_map)
    for i, seen in enumerate(([0], [0, 1], [1, 2])):
        keys, values = (torch.cat([x[0, 0, 64 * j : 64 * (j + 1)] for j in seen]) for x in (k, v))
        expected = (q[0, 0, 64 * i : 64 * (i + 1)] @ keys.T / math.sqrt(8)).softmax(-1) @ values
        assert largest_difference(out[0, 0, 64 * i : 64 * (i + 1)], expected) <= TOLERANCE


def test_work_is_in_proportion_to_kept_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one pair of blocks more is multiplied than the map keeps."""
    pairs = []

    def counting(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pairs.append(q.shape[:-2].numel() * (q.shape[-2] // 64) * (k.shape[-2] // 64))
        return real(q, k, v)

    real = F.scaled_dot_product_attention
    monkeypatch.setattr(block_sparse.F, "scaled_dot_product_attention", counting)
    q, k, v = (normal(2, 3, 64 * 20, 16, seed=i) for i in range(3))
    for density in (0.0, 0.1, 0.5, 1.0):
        pairs.clear()
        block_map = random_map(2, 3, 20, density)
        sdpa_block_sparse(q, k, v, block_map)
        assert sum(pairs) == block_map.sum()


def test_memory_grows_with_tokens_not_with_their_square() -> None:
    """8,192 tokens: nothing is larger than a few times the queries; a mask or scores of all pairs are 64 times that."""
    heads, tokens, head_dim = 2, 8192, 16
    q, k, v = (normal(1, heads, tokens, head_dim, seed=i) for i in range(3))
    window = fast_sta_nabla(32, 2, 2, 3, 1, 1)
    with recorded_operations() as operations:
        nabla_attention(
            q,
            k,
            v,
            tables=nabla_tables((32, 16, 16), NablaConfig(1e-3, 3, 1, 1), "cpu"),
            kernel=sdpa_block_sparse,
        )
    largest = max(size for _, size in operations)
    assert window.sum() < 0.03 * window.numel()
    assert q.numel() <= largest <= 4 * q.numel()
    with recorded_operations() as operations:
        masked_dense(q[:, :, :2048], k[:, :, :2048], v[:, :, :2048], window[None, None, :32, :32])
    assert max(size for _, size in operations) >= 2048**2  # the recorder sees what is large


def test_gradients_of_the_sdpa_kernel() -> None:
    block_map = random_map(1, 2, 4, 0.4)
    q, k, v = (normal(1, 2, 64 * 4, 8, seed=i).double().requires_grad_() for i in range(3))
    weights = normal(1, 2, 64 * 4, 8, seed=9).double()
    ours = torch.autograd.grad((sdpa_block_sparse(q, k, v, block_map) * weights).sum(), (q, k, v))
    expected = torch.autograd.grad((masked_dense(q, k, v, block_map) * weights).sum(), (q, k, v))
    for a, b in zip(ours, expected, strict=True):
        assert b.abs().max() > 1e-3
        assert largest_difference(a, b) <= 1e-12


def test_empty_rows_are_a_mistake() -> None:
    q = normal(1, 1, 128, 8)
    with pytest.raises(AssertionError, match="keeps nothing"):
        sdpa_block_sparse(q, q, q, torch.tensor([[True, True], [False, False]])[None, None])


def test_nabla_that_keeps_everything_is_dense() -> None:
    tables = nabla_tables((2, 16, 16), NablaConfig(P=1.0, wT=1, wH=1, wW=1), "cpu")
    q, k, v = (normal(1, 3, 512, 64, seed=i) for i in range(3))
    out = nabla_attention(q, k, v, tables=tables, kernel=sdpa_block_sparse)
    assert largest_difference(out, sdpa(q, k, v)) <= TOLERANCE


@pytest.mark.parametrize("kernel", [sdpa_block_sparse, masked_dense])
def test_nabla_is_not_dense_on_a_peaked_map(kernel: Any) -> None:
    """What the model was trained with is not what dense attention gives; a kernel that ignores the map fails here."""
    tables = nabla_tables((4, 16, 16), NablaConfig(P=0.5, wT=1, wH=1, wW=1), "cpu")
    q, k = (3 * constant_blocks(normal(1, 3, 16, 64, seed=i)) for i in (0, 1))
    v = normal(1, 3, 1024, 64, seed=2)
    block_map = nabla_block_map(q, k, tables.window, 0.5)
    assert block_map.float().mean() < 0.3
    out = nabla_attention(q, k, v, tables=tables, kernel=kernel)
    assert largest_difference(out, masked_dense(q, k, v, block_map)) <= TOLERANCE
    assert largest_difference(out, sdpa(q, k, v)) > 0.1


# --- flex_attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("shared_memory", [99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("element_size", [2, 4])
def test_kernel_options_fit_the_card(head_dim: int, shared_memory: int, element_size: int) -> None:
    """99 KiB: 24 GB cards (compute capability 8.6, 8.9); 163: A100; 227: Hopper."""
    options = triton_options(head_dim, element_size, shared_memory)
    assert options["BLOCK_M"] == options["BLOCK_N"] and 64 % options["BLOCK_M"] == 0
    tile = options["BLOCK_M"] * head_dim * element_size
    assert tile * (1 + 2 * options["num_stages"]) <= shared_memory
    assert 1 <= options["num_stages"] <= 3


def test_kernel_options_of_bfloat16_models() -> None:
    """Whole blocks everywhere; head_dim 128 with a stage less where 112 KiB are too much."""
    for head_dim, shared_memory, stages in ((64, 99, 3), (128, 99, 2), (128, 163, 3), (128, 227, 3)):
        options = triton_options(head_dim, 2, shared_memory * 1024)
        assert (options["BLOCK_M"], options["num_stages"]) == (64, stages)


def test_flex_without_a_compiler_is_an_error() -> None:
    """Not compiled, flex_attention would compute dense attention without a word."""
    q = normal(1, 1, 128, 64)
    block_map = torch.eye(2, dtype=torch.bool)[None, None]
    with (
        torch._dynamo.config.patch(disable=True),
        pytest.raises(RuntimeError, match=r"switched off.*; model.attention.engine=sdpa computes the same"),
    ):
        flex_block_sparse(q, q, q, block_map)
    mask = block_sparse.make_block_mask(*block_lists(block_map))
    with pytest.raises(RuntimeError, match=r"torch.compile is switched off"):
        run_flex_attention(q, q, q, mask, None)
    for ours, others in ((mask.kv_indices, mask.full_kv_indices), (mask.kv_num_blocks, mask.full_kv_num_blocks)):
        assert ours.data_ptr() != others.data_ptr()
    assert mask.kv_num_blocks.sum() == 0 and mask.full_kv_num_blocks.tolist() == [[[1, 1]]]
    assert torch.equal(mask.to_dense().bool(), block_map)


def test_flex_that_fails_to_compile_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: Exception) -> Any:
        def compiled(*args: Any) -> Tensor:
            raise error

        return lambda: compiled

    q = normal(1, 1, 64, 64)
    block_map = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    monkeypatch.setattr(
        block_sparse, "compiled_flex_attention", failing(ValueError("out of resource: shared memory\n."))
    )
    with pytest.raises(
        RuntimeError, match=r"on cpu \(ValueError: out of resource: shared memory\); model.attention.engine=sdpa"
    ):
        flex_block_sparse(q, q, q, block_map)
    monkeypatch.setattr(block_sparse, "compiled_flex_attention", failing(torch.OutOfMemoryError("the device is full")))
    with pytest.raises(torch.OutOfMemoryError, match="the device is full"):
        flex_block_sparse(q, q, q, block_map)


def test_more_sizes_than_are_compiled_for_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch would otherwise go on without compiling; the backend that makes no kernels stands in for the slow one."""
    torch._dynamo.reset()
    compiled = torch.compile(run_flex_attention, backend="eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(block_sparse, "compiled_flex_attention", lambda: compiled)
    monkeypatch.setattr(block_sparse, "LARGEST_NUMBER_OF_SIZES", 2)
    for blocks in (1, 2, 3):
        q = normal(1, 1, 64 * blocks, 16)
        block_map = torch.ones(1, 1, blocks, blocks, dtype=torch.bool)
        if blocks <= 2:
            assert largest_difference(flex_block_sparse(q, q, q, block_map), sdpa(q, q, q)) <= TOLERANCE
        else:
            with pytest.raises(RuntimeError, match=r"could not be compiled.*model.attention.engine=sdpa"):
                flex_block_sparse(q, q, q, block_map)


# --- the choice of a kernel -------------------------------------------------------------------------------------------


def test_kernels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    assert resolve_block_sparse("auto", CPU) is sdpa_block_sparse
    assert resolve_block_sparse("sdpa", CPU) is sdpa_block_sparse
    assert caplog.messages == [
        "block-sparse attention: sdpa, chosen for cpu",
        "block-sparse attention: sdpa, as asked for",
    ]
    with pytest.raises(ValueError, match=r"'flash_attention_2' takes no block maps.*choose one of auto, flex, sdpa"):
        resolve_block_sparse("flash_attention_2", CPU)


def test_a_kernel_that_ignores_the_map_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCK_SPARSE_ENGINES, "flex", lambda q, k, v, block_map: sdpa(q, k, v))
    with pytest.raises(RuntimeError, match=r"'flex' cannot be used here: it computes something else .*; choose sdpa"):
        resolve_block_sparse("flex", CPU, torch.float32, 64)
    monkeypatch.setitem(BLOCK_SPARSE_ENGINES, "flex", masked_dense)
    assert resolve_block_sparse("flex", CPU, torch.float32, 64) is masked_dense


# --- with a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", ["flex", "sdpa"])
def test_kernels_on_a_gpu(kernel: str, head_dim: int) -> None:
    device = torch.device("cuda")
    attention = resolve_block_sparse(kernel, device, torch.bfloat16, head_dim)
    q, k, v = (normal(1, 4096, 4, head_dim, seed=i).to(device, torch.bfloat16).transpose(1, 2) for i in range(3))
    for density in (0.05, 0.4):
        block_map = random_map(1, 4, 64, density).to(device)
        expected = masked_dense(q.double(), k.double(), v.double(), block_map)
        error = (attention(q, k, v, block_map).double() - expected).square().mean().sqrt()
        assert error / expected.square().mean().sqrt() < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_map_on_a_gpu() -> None:
    q, k = normal(1, 4, 64 * 200, 64), 10 * constant_blocks(normal(1, 4, 200, 64, seed=1))
    sta = fast_sta_nabla(50, 2, 2, 11, 3, 3)
    on_gpu = nabla_block_map(q.cuda(), k.cuda(), sta.cuda(), 0.9)
    assert torch.equal(on_gpu, published_map(q.cuda(), k.cuda(), sta.cuda(), 0.9))
    assert (on_gpu.cpu() != nabla_block_map(q, k, sta, 0.9)).float().mean() < 1e-3
