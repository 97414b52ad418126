"""Numbers and settings as plans write them."""

from __future__ import annotations

from typing import Any

from kandinsky.models.vae_memory import GB


def gb_text(count: float) -> str:
    return f"{count / GB:.1f}"


def yaml_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
