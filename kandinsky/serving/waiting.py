"""Waiting for a job: until it ends, or as a stream of events."""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import ClientDisconnect, Request

from kandinsky.serving import views
from kandinsky.serving.engine import Engine, NoSuchJob
from kandinsky.serving.errors import Refused
from kandinsky.serving.gate import Keys
from kandinsky.serving.store import ENDED, Job

LOOK = 1.0  # seconds between two looks whether the client is still there
HEARTBEAT = 15.0  # seconds of silence, after which a comment keeps the connection


async def until_ended(engine: Engine, job_id: str, request: Request) -> Job:
    """The job when it has ended. Raises ClientDisconnect where its client goes, Refused where the server ends first."""
    with engine.watchers.watch(job_id) as news:
        while True:
            news.clear()
            job = engine.job(job_id)
            if job.state in ENDED:
                return job
            if engine.is_stopping:
                raise Refused(503, "the server ends; the job goes on when it is started again")
            try:
                await asyncio.wait_for(news.wait(), LOOK)
            except TimeoutError:
                if await request.is_disconnected():
                    raise ClientDisconnect from None


async def events(engine: Engine, job_id: str, keys: Keys) -> AsyncIterator[bytes]:
    """Server-sent events: "step" whenever the job has changed, "preview", and as the last one "done".

    Who reads slowly misses steps and no state.
    """
    seen: Any = None
    seen_preview: bytes | None = None
    with engine.watchers.watch(job_id) as news:
        while True:
            news.clear()
            try:
                job = engine.job(job_id)
            except NoSuchJob:  # deleted meanwhile
                yield _event("done", {"id": job_id, "state": "deleted"})
                return
            live = engine.live.get(job_id)
            if job.state in ENDED:
                yield _event("done", views.job(job, engine, keys))
                return
            now = job.state, job.step, None if live is None else live.stage
            if now != seen:
                seen = now
                yield _event("step", views.job(job, engine, keys))
            preview = None if live is None else live.preview
            if live is not None and preview is not None and preview is not seen_preview:
                seen_preview = preview
                image = f"data:image/webp;base64,{b64encode(preview).decode()}"
                yield _event("preview", {"id": job_id, "step": live.preview_step, "image": image})
            if engine.is_stopping:
                return
            try:
                await asyncio.wait_for(news.wait(), HEARTBEAT)
            except TimeoutError:
                yield b": still here\n\n"


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
