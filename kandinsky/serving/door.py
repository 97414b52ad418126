"""What all routes share: the engine, the key, and from a request's body to jobs that wait."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse

from kandinsky.common.given import shortened
from kandinsky.serving.bodies import Bodies, Body
from kandinsky.serving.engine import Engine, NoSuchJob
from kandinsky.serving.gate import Keys
from kandinsky.serving.store import Job

CLIENT = "x-client-id"  # who asks, where one address stands for many
TYPES = {".mp4": "video/mp4", ".png": "image/png", ".webp": "image/webp", ".json": "application/json"}
LONGEST_CLIENT = 64  # characters


class Door:
    def __init__(self, engine: Engine, keys: Keys) -> None:
        self.engine, self.keys = engine, keys
        self.bodies = Bodies(engine.catalogue.limits.files)

    async def submit(
        self, request: Request, body: Body, kind: Literal["video", "image"], tasks: Sequence[str] = ()
    ) -> list[Job]:
        """Queue what a body asks for. Errors are those of `Catalogue.orders` and `Engine.submit`."""
        client = self.client_of(request, body)

        def submit() -> list[Job]:
            size = None if body.picture is None else body.picture.size
            orders = self.engine.catalogue.orders(body.fields, size, tasks, body.files)
            return self.engine.submit(kind, client, orders, body.picture, body.picture_name, body.files)

        return await run_in_threadpool(submit)

    def client_of(self, request: Request, body: Body) -> str:
        """Whose turn it is: what the header or the field says, else the address."""
        address = request.client.host if request.client else "unknown"
        return shortened(request.headers.get(CLIENT) or body.fields.get("user") or address)[:LONGEST_CLIENT]

    def job(self, job_id: str, kind: str | None = None) -> Job:
        """Raises NoSuchJob, also for one of another kind."""
        job = self.engine.job(job_id)
        if kind is not None and job.kind != kind:
            raise NoSuchJob(f"there is no {kind} of that id")
        return job


def file_response(path: Path, name: str | None = None) -> FileResponse:
    """A file, or the part of it that a Range asks for. name: what a browser saves it as. Raises NoSuchJob."""
    try:
        stat = os.stat(path)
    except OSError:
        raise NoSuchJob("there is no such file: the job has not ended, has failed, or its output was removed") from None
    headers = {"Cache-Control": "private, no-cache", "X-Content-Type-Options": "nosniff"}
    return FileResponse(path, headers=headers, media_type=TYPES.get(path.suffix), filename=name, stat_result=stat)
