"""What a variant is made of, as frozen dataclasses: each setting with its type, its default and what it may be.

The layout is that of the original repository's YAML files. Three things are ours and optional: `task`, `generation` and
`model.hub_repo`. This module does not know torch, devices, or whether any file named here exists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from kandinsky.common.limits import MAX_TEXT_TOKENS

MAX_SECONDS = 21  # 24 fps, 4 frames to a latent frame: 21 s are 127 latent frames
MOST_FPS = 240  # frames a second that a file is given
MIN_SECONDS = 4 / 24  # the shortest video has 5 frames: the first one and those of one more latent frame


@dataclass(frozen=True)
class Allowed:
    """Metadata of a field: which of its type's values it takes, and the same in words."""

    test: Callable[[Any], bool]
    words: str


def at_least(smallest: float, words: str = "") -> Allowed:
    """Of several numbers, each."""
    return Allowed(lambda value: _smallest(value) >= smallest, words or f"at least {smallest:g}")


def more_than_0(words: str = "more than 0") -> Allowed:
    return Allowed(lambda value: _smallest(value) > 0, words)


def between(lowest: float, highest: float, words: str) -> Allowed:
    return Allowed(lambda value: lowest <= value <= highest, words)


def _smallest(value: Any) -> Any:
    return min(value) if isinstance(value, tuple) else value


NOT_EMPTY = Allowed(lambda text: bool(text.strip()), "not empty")
OR_MORE = at_least(0, "0 or more")
SHARES = Allowed(
    lambda pair: 0 <= pair[0] <= pair[1] <= 1, "two shares of the steps, 0 to 1, the first one not the larger"
)
MASS = Allowed(
    lambda shares: (
        all(0 < share <= 1 for share in (shares if isinstance(shares, tuple) else (shares,))) and shares != ()
    ),
    "more than 0 and at most 1, or a list of such shares, one for each part of the steps",
)
SECONDS = Allowed(
    lambda seconds: seconds == 0 or MIN_SECONDS <= seconds <= MAX_SECONDS,
    f"0 to {MAX_SECONDS} seconds; 0 is a picture, and the shortest video has {MIN_SECONDS:.2f}",
)
TILE = Allowed(lambda side: side >= 64 and side % 8 == 0, "a multiple of 8, at least 64 (pixels)")

Count = Annotated[int, at_least(1)]
Counts = Annotated[tuple[int, int, int], at_least(1)]
Name = Annotated[str, NOT_EMPTY]


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """The scale that the model works at."""

    resolution: Annotated[int, at_least(16, "at least 16 pixels")]  # 512 (SD) or 1024 (HD)
    # Rotary positions are divided by it: time, height, width.
    scale_factor: Annotated[tuple[float, float, float], more_than_0("three positive numbers")]
    scheduler_scale: Annotated[float, more_than_0()]  # shift of the flow-matching schedule


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Keyword arguments of DiffusionTransformer3D. The defaults are the 2B video model's."""

    in_visual_dim: Count = 16
    in_text_dim: Count = 3584
    in_text_dim2: Count = 768
    time_dim: Count = 512
    out_visual_dim: Count = 16
    patch_size: Counts = (1, 2, 2)
    model_dim: Count = 1792
    ff_dim: Count = 7168
    num_text_blocks: Count = 2
    num_visual_blocks: Count = 32
    axes_dims: Counts = (16, 24, 24)
    visual_cond: bool = False
    instruct_type: Literal["channel"] | None = None

    @property
    def head_dim(self) -> int:
        return sum(self.axes_dims)

    @property
    def num_heads(self) -> int:
        return self.model_dim // self.head_dim


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Visual self-attention: dense, or NABLA's adaptive block-sparse map joined with a sliding window."""

    type: Literal["full", "nabla"] = "full"
    engine: Name = "auto"  # names are checked where engines are known, in kandinsky.attention
    # Share of the attention mass that NABLA keeps in each row of blocks; several: each in an equal part of the steps.
    P: Annotated[float | tuple[float, ...], MASS] = 0.9
    wT: Count = 11  # window in latent frames and in blocks of 8 patches
    wH: Count = 3
    wW: Count = 3
    add_sta: bool = True
    method: Literal["topcdf"] = "topcdf"
    # Dense and exact, whatever attention is elsewhere: in the steps between two shares of them, and in some visual
    # blocks (-1: the last one).
    exact_steps: Annotated[tuple[float, float], SHARES] = (0.0, 0.0)
    exact_blocks: tuple[int, ...] = ()

    @property
    def is_ever_exact(self) -> bool:
        begin, end = self.exact_steps
        return begin < end or bool(self.exact_blocks)

    def exact_numbers(self, blocks: int, step: int, num_steps: int) -> frozenset[int]:
        """Which of so many visual blocks are exact in a step, counted from 0."""
        begin, end = self.exact_steps
        everywhere = begin <= step / num_steps < end
        return frozenset(range(blocks) if everywhere else (block % blocks for block in self.exact_blocks))

    def mass_kept(self, step: int, num_steps: int) -> float:
        """P in a step, counted from 0."""
        return self.P[step * len(self.P) // num_steps] if isinstance(self.P, tuple) else self.P


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    checkpoint_path: Name
    name: Literal["hunyuan", "flux"] = "hunyuan"
    tiny_path: str | None = None  # a tiny decoder of the same latents, which previews use where its file is there
    decoder: Literal["full", "tiny"] = "full"  # what the result is decoded with; tiny: the file at tiny_path
    spatial_tile: Annotated[int, TILE] = 768  # pixels
    spatial_overlap: int = 64  # pixels, at least
    # For decoding: tiles shrink until it is enough.
    memory_budget_gb: Annotated[float | None, more_than_0("more than 0 (GB of 2^30 bytes)")] = None


@dataclass(frozen=True, kw_only=True)
class QwenConfig:
    checkpoint_path: Name
    emb_size: int = 3584
    # Tokens of the prompt, without the template.
    max_length: Annotated[int, between(1, MAX_TEXT_TOKENS, f"1 to {MAX_TEXT_TOKENS} tokens")] = 256
    # Tokens of the template before the prompt; None: the published template's.
    crop: Annotated[int | None, at_least(0, "0 or more, or left out")] = None


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    checkpoint_path: Name
    emb_size: int = 768
    max_length: Annotated[int, at_least(2, "at least 2 tokens")] = 77


@dataclass(frozen=True, kw_only=True)
class TextEmbedderConfig:
    qwen: QwenConfig
    clip: ClipConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    checkpoint_path: Name
    hub_repo: str | None = None  # where download_models.py finds checkpoint_path
    num_steps: Count
    guidance_weight: Annotated[float, OR_MORE]  # 1: no classifier-free guidance, one model evaluation a step
    # Shares of the steps between which there is guidance.
    guidance_interval: Annotated[tuple[float, float], SHARES] = (0.0, 1.0)
    guidance_every: Count = 1  # of the steps with guidance, each n-th evaluates the negative prompt
    loras: tuple[str, ...] = ()  # adapters that are merged into the DiT, each "PATH" or "PATH:scale"
    dit_params: DiTConfig
    attention: AttentionConfig
    vae: VAEConfig
    text_embedder: TextEmbedderConfig


@dataclass(frozen=True, kw_only=True)
class MagCacheConfig:
    # Calibrated magnitude ratios in the order of model evaluations: conditional, unconditional, conditional, ...
    mag_ratios: tuple[float, ...] | None = None
    enabled: bool = False
    threshold: Annotated[float, OR_MORE] = 0.12  # error that skipped evaluations in a row may add up to
    max_skips: Annotated[int, OR_MORE] = 2  # in a row
    # Share of the evaluations, the first ones, that are never skipped.
    retention: Annotated[float, between(0, 1, "0 to 1")] = 0.2


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Caches that need no calibration (runtime/adaptive_caches.py), and which cache there is at all."""

    # None: magcache where magcache.enabled says so. auto: magcache where there are ratios for it, else tracked.
    kind: Literal["magcache", "dbcache", "taylorseer", "firstblock", "tracked", "auto", "off"] | None = None
    # Relative error, times the step's length over the mean one's, below which blocks are left out, 0: they never are;
    # None, here and below: as `CACHE_DEFAULTS` says.
    threshold: Annotated[float | None, at_least(0, "0 or more, or left out")] = None
    max_skips: Annotated[int | None, at_least(0, "0 or more, or left out")] = None  # in a row
    # Degree of the polynomial that a forecast is; of no use to magcache.
    order: Annotated[int | None, between(0, 2, "0, 1 or 2, or left out")] = None


class CacheSettings(NamedTuple):
    """`CacheConfig` with nothing left open."""

    kind: str
    threshold: float
    max_skips: int
    order: int

    @property
    def kept(self) -> int:
        """Tensors of the tokens' size, or of the velocity's, that it keeps for every sample and branch of guidance."""
        return self.order + 1 + (self.kind in ("firstblock", "dbcache"))

    @property
    def keeps_velocities(self) -> bool:
        """Rather than what blocks add to the tokens."""
        return self.kind in ("taylorseer", "tracked")

    @property
    def replaced(self) -> int:
        """Of those, how many are new after an evaluation, beside the old ones, which a step that fails needs again."""
        return 0 if self.kind == "magcache" else self.kept - self.order


# Of caches without calibration: threshold, max_skips, order. Measured on the tiny checkpoint for videos alone
# (benchmarks/caches.py); what suits the published ones nobody has measured.
CACHE_DEFAULTS: Mapping[str, tuple[float, int, int]] = {
    "firstblock": (0.3, 2, 1),
    "dbcache": (0.3, 2, 1),
    "taylorseer": (0.15, 2, 1),
    "tracked": (0.08, 3, 1),
}


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """What makes a run fast or small and changes nothing else, or little and in known ways; and its files."""

    # Blocks, each as one graph; elementwise: only what lies between their products.
    compile: Literal["auto", "on", "off", "elementwise"] = "auto"
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"  # torch.compile's: how long it searches
    cache_prompts: bool = False  # keep embeddings on disk; those of the default negative prompt are kept in any case
    offload: Literal["auto", "on", "off"] = "auto"  # a model is on its device only while its stage runs
    # Qwen's layers come from the file one after the other, each when it runs: less memory, the same bits.
    stream_encoders: Literal["auto", "on", "off"] = "auto"
    # Visual blocks that stay there, the others stream in; None: as many as fit.
    blocks_on_gpu: Annotated[int | None, at_least(0, "at least 0, or left out")] = None
    # Where blocks come from that stream: the host's memory, or, slower, their mapped file; auto: as there is memory.
    blocks_from: Literal["auto", "memory", "file"] = "auto"
    dit_quantization: Literal["int8", "fp8", "nf4"] | None = None  # of the DiT's linear layers, weights only
    qwen_quantization: bool = False  # NF4
    # Feed-forward and QKV run over as many tokens at a time; None: over all at once.
    chunk_tokens: Annotated[int | None, at_least(64, "at least 64, or left out")] = None
    # Self-attention runs for as many heads at a time, and hidden states are written over; None: for all, as planned.
    heads_at_once: Annotated[int | None, at_least(1, "at least 1, or left out")] = None
    attention_on_host: bool = False  # with heads_at_once: what attention gives for some heads waits on the host
    # Write a small preview beside the output after every n-th step.
    preview: Annotated[int | None, at_least(1, "at least 1 step, or left out")] = None
    save_latents: bool = False  # keep what was denoised beside the output; while decoding it lies there in any case
    # Outputs that are processed further: frames a second, pixels a side, and a network's file in place of Lanczos'.
    fps: Annotated[int | None, between(1, MOST_FPS, f"1 to {MOST_FPS}, or left out: 24 frames a second are made")] = (
        None
    )
    upscale: Literal[1, 2, 4] = 1
    upscaler: str | None = None
    # 2: of several processes, one half evaluates the prompt, the other the negative prompt.
    cfg_parallel: Annotated[int, between(1, 2, "1 or 2")] = 1
    shard_weights: bool = False  # each process keeps a part of the DiT's weights, and gathers a block when it runs


@dataclass(frozen=True, kw_only=True)
class CoarseConfig:
    """First steps on a smaller grid: see sampling/coarse.py."""

    # Of the steps, the first ones; 0: none.
    share: Annotated[float, Allowed(lambda share: 0 <= share < 1, "0 (off) or more, and less than 1")] = 0.0
    # Of each side, rounded to what the model divides.
    scale: Annotated[float, Allowed(lambda scale: 0 < scale < 1, "more than 0 and less than 1")] = 0.5


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What a request gets that does not say otherwise."""

    width: int
    height: int
    # Seconds; 0: one image.
    time_length: Annotated[float, SECONDS]
    # (width, height), the sizes that the checkpoint was trained at; i2v: some of them.
    resolutions: Annotated[tuple[tuple[int, int], ...], Allowed(bool, "one [width, height] or more")]
    negative_caption: str
    noise_device: Literal["cpu", "cuda"] = "cpu"  # cpu + float32: a seed gives the same video on every machine
    noise_dtype: Literal["float32", "bfloat16"] = "float32"
    expand_prompts: bool | None = None  # have Qwen write the prompt out; None: where this Qwen can write
    schedule: Literal["original", "diffusers"] = "original"  # whose noise levels: see sampling/sampler.py
    first_frame_normalization: bool = True  # i2v: the first frames get the mean and contrast of those after them
    # Each of the first frames by itself; or all together, as in diffusers.
    first_frame_statistics: Literal["each", "together"] = "each"
    coarse_steps: CoarseConfig = CoarseConfig()  # off
    # i2v: which frames the checkpoint has learnt to be given; any: it is shown later ones in its condition channels.
    given_frames: Literal["first", "any"] = "first"
    visual_cond: Literal["zeros", "image"] = "zeros"  # i2v: what stands in the condition channels of the first frame


@dataclass(frozen=True, kw_only=True)
class Config:
    task: Literal["t2v", "i2v", "t2i", "i2i"]
    metrics: MetricsConfig
    model: ModelConfig
    magcache: MagCacheConfig
    cache: CacheConfig
    runtime: RuntimeConfig
    generation: GenerationConfig
    source: Path | None = dataclasses.field(default=None, metadata={"in_yaml": False})

    @property
    def block_cache(self) -> CacheSettings | None:
        """What spares a request passes through the DiT's blocks; None: nothing does."""
        kind = self.cache.kind or ("magcache" if self.magcache.enabled else "off")
        if kind == "off":
            return None
        if kind == "auto":
            kind = "magcache" if self.magcache.mag_ratios else "tracked"
        threshold, max_skips, order = CACHE_DEFAULTS.get(kind, (self.magcache.threshold, self.magcache.max_skips, 0))
        return CacheSettings(
            kind,
            threshold if self.cache.threshold is None else self.cache.threshold,
            max_skips if self.cache.max_skips is None else self.cache.max_skips,
            order if self.cache.order is None or kind == "magcache" else self.cache.order,
        )

    @property
    def uses_magcache(self) -> bool:
        return self.block_cache is not None and self.block_cache.kind == "magcache"
