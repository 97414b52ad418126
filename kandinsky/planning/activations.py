"""What exists besides the weights while a model runs, as formulas, in bytes.

Counted from the tensors that exist at once in the eager code of models/ at its peak; a compiled model needs less. On a
CPU that is within 15 % of the measured peak (tests/unit/test_memory_model.py). On a GPU it has not been measured: the
count is the same there, but kernels may want memory of their own, and PyTorch keeps some that nobody uses.
"""

from __future__ import annotations

from math import prod

from kandinsky.checkpoints.tiny_decoder import BLOCKS, TIMES, TinyLayout
from kandinsky.common.limits import BLOCK_TOKENS, CHUNK_TOKENS, MAP_ENTRIES_AT_ONCE
from kandinsky.config.schema import CacheSettings, DiTConfig

FLOAT32 = 4

NABLA_DENSITY = 0.2  # share of its blocks that NABLA is taken to keep; it depends on what is generated


def dit_activations(
    dit: DiTConfig,
    tokens: int,
    text_tokens: int,
    element_size: int,
    *,
    nabla: bool = False,
    flex: bool = False,
    on_gpu: bool = False,
    chunk_tokens: int | None = None,
    quantization: str | None = None,
    heads_at_once: int | None = None,
    attention_on_host: bool = False,
    adapted: bool = False,
    processes: int = 1,
) -> int:
    """Peak of one forward of the DiT for one sample, its rotary tables included.

    nabla: attention is block-sparse, by flex_attention's kernel (`flex`, what a GPU gets) or in plain PyTorch.
    on_gpu: kernels that work on two dtypes cast as they read; on a CPU PyTorch first makes copies in the wider one.
    chunk_tokens: what `runtime.chunk_tokens` says; queries, keys and values are then taken to be written into their
        places chunk by chunk, and the feed-forward's result likewise.
    quantization: of the linear layers, each of which is made into numbers again while it is used.
    heads_at_once, attention_on_host: as `runtime` has them: blocks run in parts (models/block_in_parts.py).
    adapted: whether LoRA adapters are added to quantised layers whenever these are made into numbers.
    processes: how many share the tokens (runtime/parallel.py); the peak of each of them.
    """
    if processes > 1:
        assert heads_at_once is None, "processes share the heads"
        return _of_one_process(dit, tokens, text_tokens, element_size, processes, nabla, flex, on_gpu, chunk_tokens)
    if heads_at_once is not None:
        return _in_parts(
            *(dit, tokens, text_tokens, element_size, nabla, flex, chunk_tokens or CHUNK_TOKENS, quantization),
            *(heads_at_once, attention_on_host, adapted),
        )
    hidden = tokens * dit.model_dim * element_size  # one tensor of the size of all tokens
    wide = tokens * dit.model_dim * FLOAT32
    cast = 0 if element_size == FLOAT32 else 1  # whether float32 is a copy
    rows = min(tokens, chunk_tokens or tokens)
    share = rows / tokens
    rope = 2 * tokens * dit.head_dim * FLOAT32  # cosines and sines, and once more as complex numbers

    # The patch embedding, the block's input, its hidden states so far, the last normalised ones; layer norm in float32.
    norm = 4 * hidden + (1 + cast) * wide
    # The same without hidden states of its own, then q, and k in float32, normalised, rotated; v comes after them.
    turned = max(2 * wide, cast * (2 * wide + hidden)) + cast * wide
    qkv = 5 * hidden + share * (turned + (hidden if rows < tokens else 0))
    # Block map and kernel; then the result, its projection, and where v is as its product left it a copy of that.
    attention = 6 * hidden + max(
        (2 if rows < tokens else 3) * hidden, _nabla_bytes(dit, tokens, hidden, flex) if nabla else 0
    )
    # The four of `norm`, and the feed-forward's wide middle with what comes of it, or with a weight; of chunks also the
    # result of all of them.
    middle = rows * dit.ff_dim * element_size
    weight = dequantized_bytes(quantization, dit.model_dim * dit.ff_dim, element_size, adapted)
    feed_forward = 4 * hidden + middle + max(share * hidden, weight) + (hidden if rows < tokens else 0)

    # The four of `norm`, what is added to the hidden states, and the sum: in float32 and then cast.
    residual = 5 * hidden + (hidden if not cast else wide + hidden if on_gpu else 3 * wide)

    text = 2 * text_tokens * dit.model_dim * element_size
    return int(max(norm, qkv, attention, feed_forward, residual)) + rope + text


def _of_one_process(
    dit: DiTConfig,
    tokens: int,
    text_tokens: int,
    element_size: int,
    processes: int,
    nabla: bool,
    flex: bool,
    on_gpu: bool,
    chunk_tokens: int | None,
) -> int:
    """`dit_activations` of a process that has a slice of the tokens, and in attention some heads of all of them."""
    per_block = BLOCK_TOKENS if nabla else 1
    slice_tokens = -(-tokens // (processes * per_block)) * per_block
    whole, part = (count * dit.model_dim * element_size for count in (processes * slice_tokens, slice_tokens))
    wide = whole * FLOAT32 // element_size
    cast = 0 if element_size == FLOAT32 else 1
    # All that a block works with, of a slice alone; beside the tokens that came in, which are all of them.
    block = dit_activations(dit, slice_tokens, text_tokens, element_size, on_gpu=on_gpu, chunk_tokens=chunk_tokens)
    block += whole - part
    # Queries, keys and values beside three others; as they are sent and received; then attention's results in the place
    # of what was sent, with what its map takes.
    heads = max(1, dit.num_heads // processes)
    map_bytes = _nabla_bytes(dit, processes * slice_tokens, whole, flex, heads) if nabla else 0
    attention = whole + 5 * part + max(6 * part, 3 * part + max(3 * part, map_bytes))
    # Slices come together: what came in, the own one, those of all, and these in one.
    gathered = 3 * whole + part
    # The last norm is of all tokens: in float32, in it as well, and then as they were.
    rows = min(tokens, chunk_tokens or tokens) / tokens
    head = whole + int(rows * max((1 + cast) * wide, wide + cast * whole))
    rope, text = tokens * dit.head_dim * FLOAT32, 2 * text_tokens * dit.model_dim * element_size
    return max(block, rope + text + max(attention, gathered, head))


def _in_parts(
    dit: DiTConfig,
    tokens: int,
    text_tokens: int,
    element_size: int,
    nabla: bool,
    flex: bool,
    chunk_tokens: int,
    quantization: str | None,
    heads: int,
    attention_on_host: bool,
    adapted: bool,
) -> int:
    """`dit_activations` where blocks run in parts: one tensor of all tokens, or that and attention's result."""
    hidden, rows = tokens * dit.model_dim * element_size, min(tokens, chunk_tokens)
    group = hidden * heads // dit.num_heads  # of a tensor of some heads, of all tokens
    chunk, wide = rows * dit.model_dim * element_size, rows * dit.model_dim * FLOAT32
    cast = 0 if element_size == FLOAT32 else 1
    rope = tokens * dit.head_dim * FLOAT32  # cosines and sines; as complex numbers of a chunk alone
    before = 0 if attention_on_host else hidden - group  # of the other heads
    aside = 0 if attention_on_host else hidden
    weights = 3 * heads * dit.head_dim * dit.model_dim * element_size if quantization else 0
    made = dequantized_bytes(quantization, dit.model_dim**2, element_size, adapted)

    # Queries, keys and values of the group in one, and of a chunk the same twice beside what is normalised.
    share = heads / dit.num_heads
    qkv = before + 3 * group + max((1 + cast) * wide + chunk, chunk + int(share * (6 * chunk + 2 * wide)))
    qkv = max(qkv + weights, before + weights + made)
    attention = before + 3 * group + max(2 * group, _nabla_bytes(dit, tokens, hidden, flex, heads) if nabla else 0)
    middle = rows * dit.ff_dim * element_size
    of_layer = dequantized_bytes(quantization, dit.model_dim * dit.ff_dim, element_size, adapted)
    feed_forward = aside + 2 * chunk + middle + max(chunk, of_layer)
    residual = aside + 3 * chunk + (1 + 2 * cast) * wide
    text = 2 * text_tokens * dit.model_dim * element_size
    return hidden + max(qkv, attention, feed_forward, residual) + rope + text


def _nabla_bytes(dit: DiTConfig, tokens: int, hidden: int, flex: bool, heads: int | None = None) -> int:
    """The map of blocks and what the kernel makes of it, besides q, k and v, for all heads or so many of them."""
    row = tokens // BLOCK_TOKENS
    heads = heads or dit.num_heads
    hidden = hidden * heads // dit.num_heads
    entries = heads * row**2
    worked_on = min(entries, max(MAP_ENTRIES_AT_ONCE, row**2))
    if flex:
        # The map (a byte), lists of full and of partly masked blocks (int32 both), and running counts in int64.
        return entries * 9 + worked_on * 24
    # The map, and the kept blocks as int64 indices in five lists; v block by block, as q and k are already, the result
    # twice; and keys and values of one row of blocks.
    kept = int(entries * (1 + 5 * 8 * NABLA_DENSITY))
    return kept + 3 * hidden + 2 * hidden // heads


def dequantized_bytes(scheme: str | None, weights: int, element_size: int, adapted: bool = False) -> int:
    """Peak of making a quantised layer's weights into numbers: in float32 first, but for nf4, whose kernel casts.

    With adapters all are in float32 until what these add has been added, which makes another copy.

    GGUF's are taken apart as bytes before that, several copies of them.
    """
    if scheme is None:
        return 0
    if adapted:
        return max(dequantized_bytes(scheme, weights, FLOAT32), 2 * FLOAT32 * weights)
    cast = element_size if element_size < FLOAT32 else 0
    return weights * {"int8": FLOAT32 + cast, "fp8": 2 * FLOAT32, "gguf": 2 * FLOAT32, "nf4": element_size}[scheme]


def denoising_state(dit: DiTConfig, tokens: int, samples: int) -> int:
    """What the sampler holds: noise, latents, what conditions them, velocities of both branches; all float32."""
    cells = tokens * prod(dit.patch_size)
    conditioned = dit.visual_cond or dit.instruct_type == "channel"
    extra = dit.in_visual_dim + 1 if conditioned else 0
    channels = 2 * dit.in_visual_dim + extra + (dit.in_visual_dim + extra) + 3 * dit.out_visual_dim
    return samples * cells * channels * FLOAT32


def cache_bytes(
    dit: DiTConfig, tokens: int, cache: CacheSettings, samples: int, branches: int, element_size: int, writes_over: bool
) -> int:
    """What a cache of blocks keeps from step to step; what was there before a step is kept until it is done, and the
    tokens before the blocks are, where these write over them."""
    tensors = samples * branches * (cache.kept + cache.replaced)
    if cache.keeps_velocities:
        return tensors * tokens * prod(dit.patch_size) * dit.out_visual_dim * element_size
    return (tensors + writes_over) * tokens * dit.model_dim * element_size


def text_activations(
    width: int, intermediate: int, tokens: int, element_size: int, quantization: str | None = None
) -> int:
    """Qwen's peak for one prompt: its feed-forward's gate, that activated, the other half and their product; six hidden
    states. With quantised weights, one of the feed-forward's in place of two of these."""
    middle = tokens * intermediate * element_size
    weight = dequantized_bytes(quantization, width * intermediate, element_size)
    return int(6 * tokens * width * element_size + 2 * middle + max(2 * middle, weight))


def tiny_bytes(tiny: TinyLayout, width: int, height: int, element_size: int) -> int:
    """A tiny decoder's peak, whatever the length: of each level what its blocks remember and what grows out of it, and
    of the last level a frame that is enlarged and what its convolution makes of it."""
    pixels = width * height
    if tiny.kind == "image":
        inner, outer = tiny.widths[-2:]
        # What is enlarged, and what is made of it; or a block's input, a convolution's input and its result.
        return int(max(inner + outer, 3 * outer) * pixels * element_size)
    held = sum(
        (BLOCKS + 1 + times) * channels / 4 ** (len(TIMES) - level)
        for level, (channels, times) in enumerate(zip(tiny.widths, TIMES, strict=False))
    )
    return int((tiny.widths[-2] + tiny.widths[-1] + held) * pixels * element_size)


def encode_bytes(vae: str, channels: tuple[int, ...], width: int, height: int, element_size: int, work: int) -> int:
    """The peak of a VAE ("hunyuan" or "flux") in encoding a picture; `work` is the bytes of a number that it convolves.

    In its first block. Flux: input, hidden, hidden normalised, result. HunyuanVideo: input, hidden, two padded copies
    and the result; or input, hidden, and float32 twice while normalising.
    """
    if vae == "flux":
        cast = work if work > element_size else 0
        of_channel = 3 * element_size + cast + work
    else:
        of_channel = 2 * element_size + max(3 * work, 2 * FLOAT32)
    return channels[0] * width * height * of_channel
