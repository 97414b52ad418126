"""Qwen2.5-VL as far as it is needed here: its language model, and how pictures come into it.

The published network: grouped-query attention with biases on queries, keys and values, SwiGLU, RMS norms in front, and
rotary positions in three parts (time, row, column), which for words are one and the same number. State-dict keys are
the checkpoints'. There is no head: the last hidden states are the text embeddings, and who writes with them
(text/generator.py) brings one. Numbers are those of transformers' implementation, to the bit in every dtype.

Knows no files, tokenizers or devices. Paper: Qwen2.5-VL (arXiv 2502.13923).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky.models.embedding import embedding
from kandinsky.models.qwen_vision import QwenVision, QwenVisionConfig, RMSNorm, SwiGLU, rotate_half

Grid = Sequence[int]  # of a picture: 1, rows and columns of patches


@dataclass(frozen=True)
class QwenTextConfig:
    """Sizes of the language model. mrope_section: of half a head's channels, how many turn with time, row, column."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_attention_heads) or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.hidden_size} channels, {self.num_attention_heads} heads and {self.num_key_value_heads} heads "
                "of keys do not divide"
            )
        if 2 * sum(self.mrope_section) != self.head_dim or len(self.mrope_section) != 3:
            raise ValueError(f"mrope_section {list(self.mrope_section)} is not three parts of {self.head_dim // 2}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class QwenConfig:
    """Sizes of the whole, and the token that stands for a picture."""

    text_config: QwenTextConfig
    vision_config: QwenVisionConfig
    image_token_id: int
    tie_word_embeddings: bool = False


@dataclass
class KeysValues:
    """What attention has seen so far, for writing a token at a time: keys and values of each layer (B, heads, N, d)."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def extended(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, with those of the new tokens."""
        if layer in self.layers:
            k, v = (torch.cat(both, dim=2) for both in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = k, v
        return k, v


class Attention(nn.Module):
    """Causal self-attention; several heads of queries share one of keys and values."""

    def __init__(self, config: QwenTextConfig) -> None:
        super().__init__()
        dim, keys = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, keys)
        self.v_proj = nn.Linear(dim, keys)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, cache: KeysValues | None) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, N, d)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (tokens * cos + rotate_half(tokens) * sin for tokens in (q, k))
        if cache is not None:
            k, v = cache.extended(layer, k, v)
        shared = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=shared)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, config: QwenTextConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=False)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, cache: KeysValues | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layer, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class QwenText(nn.Module):
    """Qwen's language model: token ids in, hidden states after the last norm out."""

    def __init__(self, config: QwenTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, cache: KeysValues | None = None) -> Tensor:
        """(B, N) ids of words alone -> (B, N, D). No mask: padding goes behind, where no real token sees it."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand(3, *input_ids.shape)
        return self.run(self.embed_tokens(input_ids), positions, cache)

    def run(self, x: Tensor, positions: Tensor, cache: KeysValues | None = None) -> Tensor:
        """Embedded tokens x (B, N, D) at positions (3, B, N) -> (B, N, D).

        With a cache, which is extended, N = 1 token goes on from those before.
        """
        cos, sin = self.rotary_table(positions, x.dtype)
        for number, layer in enumerate(self.layers):
            x = layer(x, cos, sin, number, cache)
        return self.norm(x)

    def rotary_table(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (B, 1, N, head_dim) of positions (3, B, N): computed in float32, handed out in `dtype`."""
        config = self.config
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        frequencies = (1.0 / config.rope_theta**exponents).to(positions.device)
        angles = positions[..., None].float() * frequencies  # (3, B, N, head_dim / 2)
        parts = angles.split(config.mrope_section, dim=-1)
        angles = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)[:, None]
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class Qwen(nn.Module):
    """Qwen with its vision tower: token ids and pictures in, hidden states out."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = QwenVision(config.vision_config)
        self.language_model = QwenText(config.text_config)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """(B, N) ids, and pictures as `with_pictures` takes them -> (B, N, D)."""
        return self.language_model.run(
            *with_pictures(self.language_model, self.visual, self.config, input_ids, pixel_values, image_grid_thw)
        )


def with_pictures(
    language_model: QwenText,
    visual: QwenVision,
    config: QwenConfig,
    input_ids: Tensor,
    pixel_values: Tensor,
    image_grid_thw: Tensor,
) -> tuple[Tensor, Tensor]:
    """Embedded tokens (B, N, D) and their positions (3, B, N) of ids (B, N) in which pictures have a place.

    pixel_values (patches of all pictures, channels x 2 x 14 x 14); image_grid_thw (pictures, 3). Pictures belong to the
    runs of `config.image_token_id` in their order. Raises ValueError where there are not as many places as tokens.
    """
    grids = image_grid_thw.tolist()
    x = language_model.embed_tokens(input_ids)
    seen = visual(pixel_values.to(visual.patch_embed.proj.weight.dtype), grids).to(x.dtype)  # (tokens of pictures, D)
    places = input_ids == config.image_token_id
    if int(places.sum()) != len(seen):
        raise ValueError(f"the text has room for {int(places.sum())} tokens of pictures, and they make {len(seen)}")
    x = x.masked_scatter(places[..., None], seen)
    return x, positions_of(places, grids, config.vision_config.spatial_merge_size)


def positions_of(places: Tensor, grids: Sequence[Grid], merge: int) -> Tensor:
    """Positions (3, B, N) in time, rows and columns of tokens, some of them `places` (B, N) of pictures.

    A word is one further on along all three. A picture stands still in time, its tokens count on in rows and columns,
    and what follows it goes on behind its longer side.
    """
    rows = []
    next_grid = iter(grids)
    for row in places.tolist():
        parts: list[Tensor] = []
        here = index = 0
        while index < len(row):
            if row[index]:
                t, h, w = next(next_grid)
                h, w = h // merge, w // merge
                axes = torch.meshgrid(*(torch.arange(length) for length in (t, h, w)), indexing="ij")
                parts.append(torch.stack(axes).flatten(1) + here)
                here += max(h, w)
                index += t * h * w
            else:
                end = row.index(True, index) if True in row[index:] else len(row)
                parts.append(torch.arange(here, here + end - index).expand(3, -1))
                here += end - index
                index = end
        rows.append(torch.cat(parts, dim=1))
    return torch.stack(rows, dim=1).to(places.device)
