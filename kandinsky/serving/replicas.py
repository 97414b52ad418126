"""Lanes on Ray: as many as there are replicas (see below)."""

from __future__ import annotations

from kandinsky.serving.lanes import Lane
from kandinsky.serving.variants import Catalogue
from kandinsky.serving.worker_process import Options


def on_ray(catalogue: Catalogue, options: Options, address: str, replicas: int) -> list[Lane]:
    raise NotImplementedError
