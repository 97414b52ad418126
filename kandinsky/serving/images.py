"""/v1/images as OpenAI has it: a request waits until its pictures are there."""

from __future__ import annotations

import time
from base64 import b64encode
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from kandinsky.common.given import shown
from kandinsky.serving import fields, views
from kandinsky.serving.bodies import Body
from kandinsky.serving.door import Door, file_response
from kandinsky.serving.errors import NO_RETRY, answer
from kandinsky.serving.store import Job
from kandinsky.serving.waiting import until_ended


def routes(door: Door) -> APIRouter:
    router, engine = APIRouter(prefix="/v1/images", tags=["images"]), door.engine

    async def made(request: Request, body: Body, task: str) -> Any:
        form = body.fields.get("response_format", "b64_json")
        if form not in ("b64_json", "url"):
            raise ValueError(f"response_format is {shown(form)}; it must be b64_json or url")
        if body.fields.get("output_format", "png") != "png":
            raise ValueError(f"output_format is {shown(body.fields['output_format'])}; it must be png")
        jobs = await door.submit(request, body, "image", [task])
        try:
            ended = [await until_ended(engine, job.id, request) for job in jobs]
        except BaseException:
            for job in jobs:
                engine.cancel(job.id)
            raise
        for job in ended:
            if job.state != "done":
                return failure(job)
        data = [await run_in_threadpool(entry, job, form, request) for job in ended]
        return {
            "created": int(time.time()),
            "data": data,
            "output_format": "png",
            "size": views.video(ended[0])["size"],
        }

    def entry(job: Job, form: str, request: Request) -> dict[str, Any]:
        sample = job.request["samples"][0]
        found: dict[str, Any] = {"id": job.id, "seed": sample["seed"], "revised_prompt": None}
        if form == "url":
            path = door.keys.sign(f"/v1/images/{job.id}/content")
            return {**found, "url": str(request.base_url).rstrip("/") + path}
        return {**found, "b64_json": b64encode(engine.output_path(job).read_bytes()).decode()}

    def failure(job: Job) -> Response:
        status = 400 if job.code == "invalid_request_error" else 503
        return answer(status, job.error or "it was not made", job.code, NO_RETRY)

    @router.post("/generations", openapi_extra=fields.schema(fields.OF_IMAGES))
    async def generate(request: Request) -> Any:
        """Draw pictures."""
        async with door.bodies.read(request, fields.OF_IMAGES) as body:
            return await made(request, body, "t2i")

    @router.post("/edits", openapi_extra=fields.schema(fields.OF_EDITS, ("prompt", "image")))
    async def edit(request: Request) -> Any:
        """Edit a picture."""
        async with door.bodies.read(request, fields.OF_EDITS) as body:
            return await made(request, body, "i2i")

    @router.get("/{image_id}/content")
    def content(image_id: str) -> FileResponse:
        return file_response(engine.output_path(door.job(image_id, "image")))

    return router
