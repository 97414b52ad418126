"""Fixtures for comparisons with diffusers."""

import pytest


@pytest.fixture
def exact_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers without its rounding of rotated queries and keys to bfloat16, for the length of a test."""
    from diffusers_reference import remove_hard_rounding

    remove_hard_rounding(monkeypatch)
