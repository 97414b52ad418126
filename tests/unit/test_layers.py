"""The DiT's parts against their formulas, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from kandinsky.attention.nabla import NablaConfig
from kandinsky.models.dit import DiffusionTransformer3D
from kandinsky.models.layers import (
    FeedForward,
    Modulation,
    MultiheadAttention,
    OutLayer,
    TextProjection,
    TimeEmbeddings,
    VisualEmbeddings,
    gated_residual,
    modulated_norm,
)

B, N, D, E = 2, 5, 32, 24


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def randomised(module: nn.Module) -> nn.Module:
    for i, parameter in enumerate(module.parameters()):
        parameter.copy_(normal(*parameter.shape, seed=i + 1) / math.sqrt(parameter.shape[-1]))
    return module.eval()


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    out = x.double() @ layer.weight.double().T
    return out if layer.bias is None else out + layer.bias.double()


def layer_norm(x: Tensor) -> Tensor:
    x = x.double()
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + 1e-5).sqrt()


# --- norms and residuals ----------------------------------------------------------------------------------------------


def test_modulated_norm() -> None:
    """A batch of two with a modulation each."""
    x, shift, scale = 3 * normal(B, N, D) + 1, normal(B, 1, D, seed=1), normal(B, 1, D, seed=2)
    expected = layer_norm(x) * (1 + scale.double()) + shift.double()
    assert torch.allclose(modulated_norm(x, shift, scale).double(), expected, atol=1e-5)
    for i in range(B):
        alone = modulated_norm(x[i : i + 1], shift[i : i + 1], scale[i : i + 1])
        assert torch.allclose(modulated_norm(x, shift, scale)[i], alone[0], atol=1e-6)


def test_gated_residual() -> None:
    x, update, gate = normal(B, N, D), normal(B, N, D, seed=1), normal(B, 1, D, seed=2)
    expected = x.double() + gate.double() * update.double()
    assert torch.allclose(gated_residual(x, update, gate).double(), expected, atol=1e-6)
    assert not torch.allclose(gated_residual(x, update, gate), gated_residual(x, update, gate.flip(0)), atol=1e-2)


def test_low_precision_is_rounded_once_at_the_end() -> None:
    """bfloat16 in, float32 inside, bfloat16 out: the float32 result, rounded."""
    x, update = normal(B, N, D).bfloat16(), normal(B, N, D, seed=1).bfloat16()
    shift, scale = normal(B, 1, D, seed=2), normal(B, 1, D, seed=3)
    assert torch.equal(modulated_norm(x, shift, scale), modulated_norm(x.float(), shift, scale).bfloat16())
    assert torch.equal(gated_residual(x, update, scale), gated_residual(x.float(), update.float(), scale).bfloat16())


# --- embeddings -------------------------------------------------------------------------------------------------------


def test_time_embedding() -> None:
    layer = randomised(TimeEmbeddings(D, E))
    timesteps = torch.tensor([723.4567, 12.5])
    args = timesteps.double()[:, None] * torch.tensor([10000 ** (-i / (D / 2)) for i in range(D // 2)]).double()
    hidden = linear(layer.in_layer, torch.cat((args.cos(), args.sin()), dim=-1))
    expected = linear(layer.out_layer, hidden * hidden.sigmoid())
    # float32 arguments up to 723 are right to 1e-4
    assert torch.allclose(layer(timesteps).double(), expected, atol=1e-3)


def test_time_is_float32_in_a_bfloat16_model() -> None:
    """Timesteps of the schedule that bfloat16 can't tell apart are told apart."""
    layer = randomised(TimeEmbeddings(D, E)).bfloat16()
    timesteps = torch.tensor([995.0, 997.0])
    assert timesteps.bfloat16().unique().numel() == 1
    near, far = layer(timesteps)
    assert near.dtype == torch.float32
    assert (near - far).abs().max() > 1e-2
    exact = TimeEmbeddings(D, E)
    exact.load_state_dict(layer.state_dict())
    assert torch.equal(layer(timesteps), exact(timesteps))


def test_text_projection() -> None:
    layer = randomised(TextProjection(12, D))
    x = normal(B, N, 12)
    expected = layer_norm(linear(layer.in_layer, x)) * layer.norm.weight.double() + layer.norm.bias.double()
    assert torch.allclose(layer(x).double(), expected, atol=1e-5)
    assert layer.bfloat16()(x).dtype == torch.bfloat16


def test_patches() -> None:
    """A patch's features are ordered frame, row, column, channel; patches frame by frame, row by row."""
    layer = randomised(VisualEmbeddings(3, D, (1, 2, 2)))
    x = normal(B, 2, 4, 6, 3)
    tokens = layer(x)
    assert tokens.shape == (B, 12, D)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(layer(x, order), tokens[:, order], atol=1e-6)
    out = tokens.view(B, 2, 2, 3, D)
    for b, t, h, w in ((0, 0, 0, 0), (1, 1, 1, 2), (0, 1, 0, 1)):
        rows = [x[b, t, 2 * h + i, 2 * w + j] for i in (0, 1) for j in (0, 1)]
        assert torch.allclose(out[b, t, h, w].double(), linear(layer.in_layer, torch.cat(rows)), atol=1e-5)


def test_patches_are_put_back() -> None:
    """On the way out the channel is a patch's slowest index."""
    layer = randomised(OutLayer(D, E, 3, (1, 2, 2)))
    grid, time_embed = (2, 2, 3), normal(B, E, seed=9)
    x = normal(B, 12, D)
    out = layer(x, time_embed, grid)
    assert out.shape == (B, 2, 4, 6, 3)
    embed = time_embed.double()
    shift, scale = linear(layer.modulation.out_layer, embed * embed.sigmoid())[:, None].chunk(2, dim=-1)
    features = linear(layer.out_layer, layer_norm(x) * (1 + scale) + shift)  # (B, 12, 3 * 4)
    for b, t, h, w in ((0, 0, 0, 0), (1, 1, 1, 2), (0, 1, 0, 1)):
        token = features[b, (t * 2 + h) * 3 + w].view(3, 2, 2)  # channel, row, column
        for i in (0, 1):
            for j in (0, 1):
                assert torch.allclose(out[b, t, 2 * h + i, 2 * w + j].double(), token[:, i, j], atol=1e-5)


# --- modulation -------------------------------------------------------------------------------------------------------


def test_modulation() -> None:
    layer = randomised(Modulation(E, D, 6))
    time_embed = normal(B, E)
    params = layer(time_embed)
    assert len(params) == 6 and all(p.shape == (B, 1, D) for p in params)
    expected = linear(layer.out_layer, time_embed * time_embed.sigmoid())
    assert torch.allclose(torch.cat(params, dim=-1)[:, 0].double(), expected, atol=1e-5)


def test_modulation_computes_in_float32() -> None:
    layer = randomised(Modulation(E, D, 2)).bfloat16()
    exact = Modulation(E, D, 2)
    exact.load_state_dict(layer.state_dict())
    time_embed = normal(B, E)
    for low, high in zip(layer(time_embed), exact(time_embed), strict=True):
        assert low.dtype == torch.float32 and torch.equal(low, high)


def test_fresh_modulation_is_the_identity() -> None:
    assert all(p.count_nonzero() == 0 for p in Modulation(E, D, 9)(normal(B, E)))


# --- attention and feed-forward ---------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 2**-23).sqrt() * weight.double()


def plain_attention(layer: MultiheadAttention, x: Tensor, context: Tensor) -> Tensor:
    """One sample: x (N, D), context (M, D)."""
    q, k, v = linear(layer.to_query, x), linear(layer.to_key, context), linear(layer.to_value, context)
    head_dim, outs = D // layer.num_heads, []
    for head in range(layer.num_heads):
        part = slice(head * head_dim, (head + 1) * head_dim)
        queries, keys = rms_norm(q[:, part], layer.query_norm.weight), rms_norm(k[:, part], layer.key_norm.weight)
        outs.append(((queries @ keys.T) / math.sqrt(head_dim)).softmax(-1) @ v[:, part])
    return linear(layer.out_layer, torch.cat(outs, dim=-1))


def test_self_attention() -> None:
    layer, x = randomised(MultiheadAttention(D, 8)), normal(B, N, D)
    assert layer.num_heads == 4
    for i in range(B):
        assert torch.allclose(layer(x)[i].double(), plain_attention(layer, x[i], x[i]), atol=1e-5)


def test_cross_attention_ignores_masked_keys() -> None:
    layer, x, context = randomised(MultiheadAttention(D, 8)), normal(B, N, D), normal(B, 7, D, seed=3)
    lengths = (7, 4)
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None])[:, None, None]
    out = layer(x, context=context, mask=mask)
    for i, length in enumerate(lengths):
        assert torch.allclose(out[i].double(), plain_attention(layer, x[i], context[i, :length]), atol=1e-5)


def test_attention_engine_is_called() -> None:
    """Whatever callable is handed in computes the attention: (B, heads, N, d) in and out, mask only if any."""
    layer, x = randomised(MultiheadAttention(D, 8)), normal(B, N, D)
    shapes = []

    def engine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shapes.append((q.shape, k.shape, v.shape))
        return torch.zeros_like(q)

    out = layer(x, attention=engine)
    assert shapes == [((B, 4, N, 8),) * 3]
    assert torch.allclose(out, layer.out_layer.bias.expand_as(out))


def test_feed_forward_uses_the_exact_gelu_and_no_biases() -> None:
    layer, x = randomised(FeedForward(D, 64)), 3 * normal(B, N, D)
    hidden = linear(layer.in_layer, x)
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    assert torch.allclose(layer(x).double(), linear(layer.out_layer, hidden), atol=1e-5)
    assert set(dict(layer.named_parameters())) == {"in_layer.weight", "out_layer.weight"}


# --- what the whole model refuses -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_dit() -> DiffusionTransformer3D:
    return DiffusionTransformer3D(
        in_text_dim=12, in_text_dim2=8, time_dim=16, model_dim=64, ff_dim=64, num_text_blocks=1, num_visual_blocks=1
    )


def test_fresh_model_ignores_blocks(small_dit: DiffusionTransformer3D) -> None:
    """Modulations start at zero, gates included: why the tests against diffusers randomise them."""
    inputs = (normal(1, 1, 4, 4, 16), normal(1, 3, 12), normal(1, 8), torch.tensor([500.0]))
    embedded = small_dit.visual_embeddings(inputs[0])
    expected = small_dit.out_layer(embedded, torch.zeros(1, 16), (1, 2, 2))
    assert torch.allclose(small_dit(*inputs), expected, atol=1e-6)


def test_wrong_inputs(small_dit: DiffusionTransformer3D) -> None:
    text, pooled, timesteps = normal(1, 3, 12), normal(1, 8), torch.tensor([500.0])
    with pytest.raises(ValueError, match="33 channels; this model takes 16"):
        small_dit(normal(1, 1, 4, 4, 33), text, pooled, timesteps)
    with pytest.raises(ValueError, match=r"\(1, 5, 4\) do not divide into patches of \(1, 2, 2\)"):
        small_dit(normal(1, 1, 5, 4, 16), text, pooled, timesteps)
    with pytest.raises(ValueError, match=r"2x2 patches do not divide into them: .* multiples of 128 pixels"):
        small_dit(normal(1, 1, 4, 4, 16), text, pooled, timesteps, nabla=NablaConfig())
    tables = small_dit.request_tables((1, 4, 4), 3, (1.0, 2.0, 2.0), "cpu")
    with pytest.raises(ValueError, match=r"nabla is NablaConfig.*, but the tables were made for another config"):
        small_dit(normal(1, 1, 4, 4, 16), text, pooled, timesteps, nabla=NablaConfig(), tables=tables)
    tables = small_dit.request_tables((1, 16, 16), 3, (1.0, 2.0, 2.0), "cpu", NablaConfig(P=0.8))
    with pytest.raises(ValueError, match=r"nabla is NablaConfig.*, but the tables were made for another config"):
        small_dit(normal(1, 1, 16, 16, 16), text, pooled, timesteps, nabla=NablaConfig(), tables=tables)


def test_wrong_dimensions() -> None:
    with pytest.raises(ValueError, match=r"model_dim 100 .* head dimension 64"):
        DiffusionTransformer3D(model_dim=100)
