"""From settings to a server that listens: the engine with its lanes, the application, uvicorn."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import uvicorn

from kandinsky.common.host_memory import host_memory
from kandinsky.planning.machine import Machine
from kandinsky.planning.plan import element_size
from kandinsky.serving.app import create_app
from kandinsky.serving.bench import Bench
from kandinsky.serving.engine import Engine
from kandinsky.serving.gate import LOOPBACK
from kandinsky.serving.lanes import Lane
from kandinsky.serving.ownership import own
from kandinsky.serving.variants import Catalogue
from kandinsky.serving.worker_process import Options

logger = logging.getLogger(__name__)

PATIENCE = 180  # seconds that an earlier server's worker has to keep what it was making
GRACE = 3  # seconds that open connections have when the server ends
CONNECTIONS = 1000  # at a time; more get 503


class Settings(Protocol):
    """serve.py's flags."""

    host: str
    port: int
    api_key: str | None
    output_dir: Path
    keep_seconds: float
    no_previews: bool
    no_page: bool
    device: str | None
    dtype: str | None
    attention_engine: str | None
    ray_address: str | None
    replicas: int | None


class Server(uvicorn.Server):
    """Tells its address, on standard output, when it can be asked."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            sys.stdout.write(f"http://{f'[{host}]' if ':' in host else host}:{port}\n")
            sys.stdout.flush()


def serve(catalogue: Catalogue, settings: Settings) -> None:
    """Until a signal comes. Raises ValueError for a folder that another server works in, and for what is no dtype."""
    if settings.dtype is not None:
        element_size(settings.dtype)
    options = Options(
        device=settings.device,
        dtype=settings.dtype,
        attention_engine=settings.attention_engine,
        preview=not settings.no_previews,
        keep_seconds=settings.keep_seconds,
    )
    handle = own(settings.output_dir, PATIENCE)
    try:
        with lanes(catalogue, settings, options, handle) as them:
            listen(Engine(catalogue, settings.output_dir, them, settings.dtype), settings)
    finally:
        os.close(handle)


@contextmanager
def lanes(catalogue: Catalogue, settings: Settings, options: Options, handle: int) -> Iterator[list[Lane]]:
    """On this machine, or on Ray."""
    if settings.ray_address is not None:
        from kandinsky.serving.replicas import on_ray

        with on_ray(catalogue, options, settings.ray_address, settings.replicas or 1) as found:
            yield found
    else:
        machine = Machine(host_memory()) if settings.device == "cpu" else None
        yield [Bench(catalogue, options, machine, [handle])]


def wants_page(settings: Settings) -> bool:
    """Whether there is to be a page at /, and what it is made with is installed."""
    if settings.no_page:
        return False
    if importlib.util.find_spec("gradio") is None:
        logger.info("there is no page at / : for one, pip install gradio")
        return False
    return True


def listen(engine: Engine, settings: Settings) -> None:
    """Answer requests until a signal comes."""
    app = create_app(engine, settings.api_key, (*LOOPBACK, settings.host), wants_page(settings))
    config = uvicorn.Config(
        app,
        settings.host,
        settings.port,
        log_level="warning",
        timeout_graceful_shutdown=GRACE,
        limit_concurrency=CONNECTIONS,
        server_header=False,
        ws="none",
        http="h11",  # the same whatever else is installed
        loop="asyncio",
    )
    Server(config).run()
