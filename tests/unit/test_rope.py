"""Rotary tables against the formula written out number by number, and the limits of the published tables."""

from __future__ import annotations

import math

import pytest
import torch

from kandinsky.models.rope import RotaryTable, apply_rotary, axis_angles, text_rotary_table, visual_rotary_table


def angle(position: int, pair: int, dim: int, scale: float = 1.0) -> float:
    return position / scale * 10000 ** (-pair / (dim / 2))


def test_text_table() -> None:
    table = text_rotary_table(300, 64, "cpu")
    assert table.cos.shape == table.sin.shape == (300, 32)
    assert table.cos.dtype == table.sin.dtype == torch.float32
    for position in (0, 1, 17, 299):
        for pair in range(32):
            expected = angle(position, pair, 64)
            # float32 angles are right to about 1e-7 of themselves
            assert table.cos[position, pair] == pytest.approx(math.cos(expected), abs=1e-4)
            assert table.sin[position, pair] == pytest.approx(math.sin(expected), abs=1e-4)


@pytest.mark.parametrize(("axes", "scale"), [((16, 24, 24), (1.0, 2.0, 2.0)), ((32, 48, 48), (1.0, 3.16, 3.16))])
def test_visual_table(axes: tuple[int, int, int], scale: tuple[float, float, float]) -> None:
    """Tokens are ordered frames, rows, columns; a head's pairs belong to time, then height, then width."""
    frames, rows, columns = 3, 4, 5
    table = visual_rotary_table((frames, rows, columns), axes, scale, "cpu")
    assert table.cos.shape == (frames * rows * columns, sum(axes) // 2)
    for t, h, w in ((0, 0, 0), (1, 0, 0), (0, 3, 0), (0, 0, 4), (2, 1, 3)):
        expected = [
            angle(position, pair, dim, s)
            for position, dim, s in zip((t, h, w), axes, scale, strict=True)
            for pair in range(dim // 2)
        ]
        token = (t * rows + h) * columns + w
        assert table.cos[token].tolist() == pytest.approx([math.cos(a) for a in expected], abs=1e-5)
        assert table.sin[token].tolist() == pytest.approx([math.sin(a) for a in expected], abs=1e-5)


def test_reordered_table() -> None:
    """The table goes with the tokens: rotating and reordering them commute."""
    table = visual_rotary_table((2, 3, 4), (16, 24, 24), (1.0, 2.0, 2.0), "cpu")
    generator = torch.Generator().manual_seed(0)
    x, order = torch.randn(1, 2, 24, 64, generator=generator), torch.randperm(24, generator=generator)
    assert torch.equal(apply_rotary(x[:, :, order], table.reordered(order)), apply_rotary(x, table)[:, :, order])
    assert not torch.equal(apply_rotary(x[:, :, order], table), apply_rotary(x, table)[:, :, order])


def test_scale_divides_positions() -> None:
    plain, scaled = axis_angles(9, 24, "cpu"), axis_angles(9, 24, "cpu", scale=2.0)
    assert torch.equal(scaled[8], plain[4])
    assert torch.equal(scaled * 2, plain)


def test_rotation_is_multiplication_by_a_unit_number() -> None:
    """Each pair (x[2i], x[2i + 1]) as a complex number times exp(i * angle)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 7, 8, generator=generator, dtype=torch.float64)
    angles = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    rotated = apply_rotary(x, RotaryTable(angles.cos(), angles.sin()))
    expected = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angles), angles)
    assert torch.allclose(rotated, torch.view_as_real(expected).flatten(-2), atol=1e-12)


def test_products_depend_on_distances_only() -> None:
    table = text_rotary_table(64, 64, "cpu")
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(64, generator=generator).expand(64, 64) for _ in range(2))
    products = apply_rotary(q, table) @ apply_rotary(k, table).T
    assert products[5, 2] == pytest.approx(products[45, 42].item(), abs=1e-4)
    assert abs(products[5, 2] - products[2, 5]) > 1e-3


def test_rounds_once_and_keeps_the_dtype() -> None:
    x = torch.randn(1, 2, 9, 64, generator=torch.Generator().manual_seed(0))
    table = text_rotary_table(9, 64, "cpu")
    assert apply_rotary(x, table).dtype == torch.float32
    low = x.bfloat16()
    assert torch.equal(apply_rotary(low, table), apply_rotary(low.float(), table).bfloat16())


def test_longest_text() -> None:
    assert text_rotary_table(1024, 64, "cpu").cos.shape == (1024, 32)
    with pytest.raises(ValueError, match=r"1025 tokens.*at most 1024.*shorten"):
        text_rotary_table(1025, 64, "cpu")


@pytest.mark.parametrize(("axis", "name"), [(0, "time"), (1, "height"), (2, "width")])
def test_largest_grid(axis: int, name: str) -> None:
    grid = [1, 1, 1]
    grid[axis] = 128
    assert visual_rotary_table(tuple(grid), (16, 24, 24), (1, 2, 2), "cpu").cos.shape == (128, 32)
    grid[axis] = 129
    with pytest.raises(ValueError, match=rf"129 patches along {name}.*at most 128"):
        visual_rotary_table(tuple(grid), (16, 24, 24), (1, 2, 2), "cpu")


def test_parts_are_made_once() -> None:
    """Every block asks for the same parts in every step: none of them is made anew, nor its rotations."""
    table = text_rotary_table(100, 64, "cpu")
    assert table.of(slice(0, 100)) is table and table.of(slice(64, 128)) is table.of(slice(64, 100))
    part = table.of(slice(64, 128))
    assert torch.equal(part.cos, table.cos[64:]) and torch.equal(part.sin, table.sin[64:])
    assert torch.equal(part.rotations, torch.complex(part.cos, part.sin))
    assert part.rotations.data_ptr() == table.rotations[64:].data_ptr()
