"""Attention of 64-token blocks to the blocks that a map keeps, and to no others.

A kernel is a callable `attention(q, k, v, block_map) -> out`. Two of them compute only what is kept: `flex`, compiled,
for a GPU, and `sdpa`, in plain PyTorch, for every device. `masked_dense` is the definition that they are compared with.
Nothing here knows where the map comes from.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kandinsky.attention.engines import deviation, first_line, log_level
from kandinsky.common.limits import BLOCK_TOKENS, MAP_ENTRIES_AT_ONCE

logger = logging.getLogger(__name__)

# Keys and values that the sdpa kernel gathers at once. On a CPU they then stay in a core's second-level cache.
GATHERED_BYTES_PER_THREAD = 2**19
GATHERED_BYTES_ON_A_GPU = 2**28
# Sizes that one process may compile flex_attention for. Unless told otherwise PyTorch stops compiling after 8.
LARGEST_NUMBER_OF_SIZES = 64


class BlockSparseAttention(Protocol):
    """Attention with scale 1/sqrt(head_dim) where `block_map` says so.

    q, k, v (B, heads, N, d), N a multiple of 64; block_map (B, heads, N / 64, N / 64) bool: entry (i, j) says that the
    64 queries of block i see the 64 keys of block j. Every row keeps at least one block. Returns (B, heads, N, d).
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, block_map: Tensor) -> Tensor: ...


def masked_dense(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor) -> Tensor:
    """The definition: dense attention under a mask of all pairs of tokens. Time and memory grow with N squared."""
    mask = block_map.repeat_interleave(BLOCK_TOKENS, -2).repeat_interleave(BLOCK_TOKENS, -1)  # (B, heads, N, N)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


# --- plain PyTorch ----------------------------------------------------------------------------------------------------


def sdpa_block_sparse(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor) -> Tensor:
    """Query blocks that keep equally many key blocks form a batch, their keys and values gathered: no padding, no mask.

    Time and memory are in proportion to the kept blocks.
    """
    shape, num_blocks, head_dim = q.shape, block_map.shape[-1], q.shape[-1]
    # (R, 64, d), a row for every block and head.
    q, k, v = (rearrange(x, "b h (n k) d -> (b h n) k d", k=BLOCK_TOKENS) for x in (q, k, v))
    counts = block_map.sum(-1).flatten()  # (R,)
    first = counts.cumsum(0) - counts  # (R,) where a row's blocks begin in `kept`
    map_rows, map_columns = block_map.reshape(-1, num_blocks).nonzero(as_tuple=True)
    kept = (
        map_rows - map_rows % num_blocks + map_columns
    )  # (K,) rows of k and v: where the head begins, plus the column

    sorted_counts, rows = counts.sort(stable=True)
    distinct, sizes = sorted_counts.unique_consecutive(return_counts=True)
    assert distinct[0] > 0, "a row of the block map keeps nothing"
    budget = GATHERED_BYTES_ON_A_GPU
    if q.device.type == "cpu":
        budget = GATHERED_BYTES_PER_THREAD * torch.get_num_threads()
    blocks_at_once = budget // (2 * BLOCK_TOKENS * head_dim * q.element_size())
    # The same memory for every batch: it stays in the cache.
    buffers = k.new_empty(2, max(blocks_at_once, num_blocks), BLOCK_TOKENS, head_dim)

    out = torch.empty_like(q)
    for count, group in zip(distinct.tolist(), rows.split(sizes.tolist()), strict=True):
        blocks_of_group = kept[first[group, None] + torch.arange(count, device=q.device)]  # (rows of the group, count)
        size = max(1, blocks_at_once // count)
        for batch, blocks in zip(group.split(size), blocks_of_group.split(size), strict=True):  # (G,), (G, count)
            queries = q.index_select(0, batch)[:, None]  # (G, 1, 64, d)
            keys, values = (
                gather(x, blocks.flatten(), buffer).view(len(batch), 1, -1, head_dim)  # (G, 1, count * 64, d)
                for x, buffer in zip((k, v), buffers, strict=True)
            )
            out.index_copy_(0, batch, F.scaled_dot_product_attention(queries, keys, values)[:, 0])
    return out.view(shape)


def gather(x: Tensor, rows: Tensor, buffer: Tensor) -> Tensor:
    """x[rows], written into `buffer` unless autograd has to see it."""
    if x.requires_grad and torch.is_grad_enabled():
        return x.index_select(0, rows)
    return torch.index_select(x, 0, rows, out=buffer[: len(rows)])


# --- flex_attention ---------------------------------------------------------------------------------------------------


def block_lists(block_map: Tensor) -> tuple[Tensor, Tensor]:
    """Map (B, heads, n, n) -> counts (B, heads, n) and indices (B, heads, n, n), int32.

    The first `counts` entries of a row of `indices` are its kept blocks in their order, the rest are the others: the
    place of a block follows from how many were kept up to it, so nothing has to be sorted.
    """
    num_blocks = block_map.shape[-1]
    maps = block_map.flatten(0, 1)  # (B * heads, n, n)
    columns = torch.arange(num_blocks, device=maps.device)
    counts = maps.sum(-1, dtype=torch.int32)
    indices = torch.empty_like(maps, dtype=torch.int32)
    for part in head_chunks(*maps.shape[:2]):
        kept_so_far = maps[part].cumsum(-1)
        place = torch.where(maps[part], kept_so_far - 1, counts[part, :, None] + columns - kept_so_far)
        indices[part].scatter_(-1, place, columns.int().expand_as(place))
    return counts.view(block_map.shape[:-1]), indices.view(block_map.shape)


def head_chunks(heads: int, num_blocks: int) -> list[slice]:
    """Slices of heads whose maps of (num_blocks, num_blocks) together have a bounded number of entries."""
    step = max(1, MAP_ENTRIES_AT_ONCE // num_blocks**2)
    return [slice(begin, begin + step) for begin in range(0, heads, step)]


def flex_block_sparse(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor) -> Tensor:
    """PyTorch's flex_attention, compiled, once for every size; without autograd.

    Raises RuntimeError where it can't be compiled: not compiled it would not be block-sparse.
    """
    mask = make_block_mask(*block_lists(block_map))
    try:
        with torch._dynamo.config.patch(recompile_limit=LARGEST_NUMBER_OF_SIZES):
            return compiled_flex_attention()(q, k, v, mask, kernel_options(q))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise RuntimeError(
            f"NABLA's kernel, flex_attention, could not be compiled or run on {q.device} "
            f"({type(error).__name__}: {first_line(error)}); model.attention.engine=sdpa computes the same without a "
            "compiler, slower"
        ) from error


def make_block_mask(counts: Tensor, indices: Tensor) -> Any:
    """flex_attention's BlockMask in which all kept blocks are full ones, and no function masks inside of a block."""
    from torch.nn.attention.flex_attention import BlockMask

    make: Callable[..., Any] = BlockMask.from_kv_blocks
    # Only the backward pass needs the lists of query blocks, and they cost a sort. Older versions always make them.
    options = {"compute_q_blocks": False} if "compute_q_blocks" in inspect.signature(make).parameters else {}
    # The lists of partly masked blocks are empty, but have to be tensors of their own, and as wide; of one column that
    # stands for all, as none of them counts.
    empty = torch.zeros_like(counts), torch.zeros_like(indices[..., :1]).expand_as(indices)
    return make(*empty, counts, indices, BLOCK_SIZE=BLOCK_TOKENS, **options)


@functools.cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    """`run_flex_attention`, compiled where it is called first. fullgraph: what can't be compiled is an error."""
    return torch.compile(run_flex_attention, fullgraph=True, dynamic=False)


def run_flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: Any, options: Any) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    # Not compiled, flex_attention reads a mask's function and not its lists: this would silently be dense attention.
    if not torch.compiler.is_compiling():
        raise RuntimeError("torch.compile is switched off")
    out = flex_attention(q, k, v, block_mask=mask, kernel_options=options)
    assert isinstance(out, Tensor)
    return out


def kernel_options(q: Tensor) -> dict[str, Any] | None:
    """Options of the Triton kernel for queries like `q`; None on a CPU, which has another one."""
    if q.device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(q.device)
    # Attribute of torch >= 2.9. 99 KiB is what the cards have that have least.
    shared_memory = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    return triton_options(q.shape[-1], q.element_size(), shared_memory)


def triton_options(head_dim: int, element_size: int, shared_memory: int) -> dict[str, Any]:
    """Tiles of the map's own 64 x 64 and as many pipeline stages, up to 3, as fit into `shared_memory` bytes.

    A kernel holds a tile of queries, and tiles of keys and values for every stage. PyTorch's own choice is larger
    than a block on some cards, and 3 stages of head_dim 128 are 112 KiB where 24 GB cards have 99.
    """
    tile = 64
    while 3 * tile * head_dim * element_size > shared_memory and tile > 16:
        tile //= 2
    tile_bytes = tile * head_dim * element_size
    stages = min(3, (shared_memory - tile_bytes) // (2 * tile_bytes))
    # The window keeps the diagonal, so no row of queries is without keys.
    return {
        "BLOCK_M": tile,
        "BLOCK_N": tile,
        "num_stages": max(1, stages),
        "num_warps": 4,
        "ROWS_GUARANTEED_SAFE": True,
    }


# --- the choice -------------------------------------------------------------------------------------------------------

BLOCK_SPARSE_ENGINES: dict[str, BlockSparseAttention] = {"flex": flex_block_sparse, "sdpa": sdpa_block_sparse}


def resolve_block_sparse(
    name: str, device: torch.device, dtype: torch.dtype | None = None, head_dim: int | None = None
) -> BlockSparseAttention:
    """The kernel called `name`; "auto" is flex on a GPU and sdpa elsewhere. Called once, when a model is loaded.

    flex is compiled here for a small input and compared with the definition: what can't be compiled, or isn't
    block-sparse, shows now. Raises ValueError for a name that there isn't and where there is no such kernel for the
    device, RuntimeError for a kernel that fails.
    """
    chosen = ("flex" if device.type == "cuda" else "sdpa") if name == "auto" else name
    if chosen not in BLOCK_SPARSE_ENGINES:
        raise ValueError(
            f"attention engine {name!r} takes no block maps, and attention.type nabla needs one that does: "
            f"choose one of auto, {', '.join(BLOCK_SPARSE_ENGINES)}"
        )
    if chosen == "flex" and device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"attention engine 'flex' is compiled for CPUs and CUDA devices, not for {device}: choose sdpa"
        )
    kernel = BLOCK_SPARSE_ENGINES[chosen]
    if chosen != "sdpa":
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        wrong = block_sparse_deviation(kernel, device, dtype, head_dim or 64)
        if wrong is not None:
            raise RuntimeError(f"attention engine {chosen!r} cannot be used here: {wrong}; choose sdpa")
    why = f"chosen for {device}" if name == "auto" else "as asked for"
    logger.log(log_level(device), "block-sparse attention: %s, %s", chosen, why)
    return kernel


@torch.no_grad()
def block_sparse_deviation(
    kernel: BlockSparseAttention, device: torch.device, dtype: torch.dtype, head_dim: int
) -> str | None:
    """What is wrong with the kernel's result on a small input with a sparse map; None where nothing is."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 4 * BLOCK_TOKENS, head_dim, generator=generator).to(device, dtype) for _ in range(3))
    # Each block sees itself, and in the second head the one before it: far from dense.
    diagonal = torch.eye(4, dtype=torch.bool, device=device)
    block_map = torch.stack((diagonal, diagonal | diagonal.roll(1, dims=1)))[None]
    reference = masked_dense(q.float(), k.float(), v.float(), block_map)
    return deviation(kernel(q, k, v, block_map), reference)
