"""/v1/jobs and /v1/plan, our own: any task without waiting, with everything that a page shows of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response, StreamingResponse

from kandinsky.models.vae_memory import GB
from kandinsky.outputs import media
from kandinsky.serving import fields, views
from kandinsky.serving.bodies import Body
from kandinsky.serving.door import Door, file_response
from kandinsky.serving.engine import NoSuchJob
from kandinsky.serving.store import State
from kandinsky.serving.thumbnails import thumbnail_of
from kandinsky.serving.variants import Order, settings_of
from kandinsky.serving.videos import Limit, page
from kandinsky.serving.waiting import events


def routes(door: Door) -> APIRouter:
    router, engine, keys = APIRouter(prefix="/v1/jobs", tags=["jobs"]), door.engine, door.keys

    @router.post("", openapi_extra=fields.schema(fields.OF_JOBS))
    async def create(request: Request) -> dict[str, Any]:
        """Queue outputs of any model; with n, several."""
        async with door.bodies.read(request, fields.OF_JOBS) as body:
            orders = await run_in_threadpool(orders_of, door, body)
            kind: Literal["video", "image"] = "image" if engine.catalogue[orders[0].model].makes_images else "video"
            jobs = await door.submit(request, body, kind)
        return {"object": "list", "data": [views.job(job, engine, keys) for job in jobs]}

    @router.get("")
    def listed(
        limit: Limit = 20,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
        state: Annotated[list[State] | None, Query()] = None,
        kind: Annotated[list[Literal["video", "image"]] | None, Query()] = None,
    ) -> dict[str, Any]:
        """The gallery: newest first, of these states and kinds, or of all."""
        jobs = engine.page(limit + 1, after=after, newest_first=order == "desc", states=state or (), kinds=kind or ())
        return page([views.job(job, engine, keys) for job in jobs], limit)

    @router.get("/{job_id}")
    def retrieve(job_id: str) -> dict[str, Any]:
        return views.job(door.job(job_id), engine, keys)

    @router.delete("/{job_id}")
    def delete(job_id: str) -> dict[str, Any]:
        """Remove a job with its files; one that runs is cancelled."""
        engine.delete(job_id)
        return {"id": job_id, "object": "job.deleted", "deleted": True}

    @router.post("/{job_id}/cancel")
    def cancel(job_id: str) -> dict[str, Any]:
        """End a job after the step that runs; asked a second time, at once."""
        return views.job(engine.cancel(job_id), engine, keys)

    @router.post("/{job_id}/retry")
    def retry(job_id: str) -> dict[str, Any]:
        """Queue a job again that failed or was cancelled; what is kept of it is gone on with."""
        return views.job(engine.retry(job_id), engine, keys)

    @router.get("/{job_id}/events", response_class=StreamingResponse)
    def watch(job_id: str) -> StreamingResponse:
        """Server-sent events: step (the job), preview (a WebP as a data: URL), done (the job) as the last one."""
        door.job(job_id)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(events(engine, job_id, keys), media_type="text/event-stream", headers=headers)

    @router.get("/{job_id}/preview", response_class=Response)
    def preview(job_id: str) -> Response:
        """What there is to see of a job that runs, as WebP; of a video it moves."""
        door.job(job_id)
        live = engine.live.get(job_id)
        if live is None or live.preview is None:
            raise NoSuchJob("there is no preview of that job now")
        return Response(live.preview, media_type="image/webp", headers={"Cache-Control": "no-store"})

    @router.get("/{job_id}/content")
    def content(job_id: str, download: bool = False) -> FileResponse:
        job = door.job(job_id)
        return file_response(engine.output_path(job), job.file_name if download else None)

    @router.get("/{job_id}/thumbnail")
    def thumbnail(job_id: str) -> FileResponse:
        output = engine.output_path(door.job(job_id))
        return file_response(thumbnail_of(output) if output.exists() else output)

    @router.get("/{job_id}/record")
    def record(job_id: str) -> FileResponse:
        """The JSON file beside the output: every setting, versions and times."""
        job = door.job(job_id)
        return file_response(media.sidecar_path(engine.output_path(job)), f"{job.id}.json")

    @router.get("/{job_id}/picture")
    def picture(job_id: str) -> FileResponse:
        """What the job begins with."""
        return file_response(engine.picture_path(door.job(job_id)))

    @router.get("/{job_id}/given/{field}/{number}")
    def given(job_id: str, field: str, number: int) -> FileResponse:
        """A file that the job was given beside its picture: video, mask, last_image or keyframe."""
        files = engine.given_files(door.job(job_id)).get(field, [])
        if not 0 <= number < len(files):
            raise NoSuchJob("the job was given no such file")
        return file_response(*files[number])

    return router


def orders_of(door: Door, body: Body) -> list[Order]:
    size = None if body.picture is None else body.picture.size
    return door.engine.catalogue.orders(body.fields, size, files=body.files)


def plan_routes(door: Door) -> APIRouter:
    router, engine = APIRouter(prefix="/v1/plan", tags=["jobs"]), door.engine

    @router.post("", openapi_extra=fields.schema(fields.OF_JOBS))
    async def plan(request: Request) -> dict[str, Any]:
        """What a request would come to, as POST /v1/jobs would take it: settings, peak of memory, seconds.

        What is not known yet is null: memory until a first model is loaded, seconds until one of its jobs was made.
        """

        def work_out(body: Body) -> dict[str, Any]:
            order = (orders := orders_of(door, body))[0]
            seconds = engine.seconds_for(order)
            return {
                "object": "plan",
                "model": order.model,
                "count": len(orders),
                "settings": settings_of(order.as_dict, order.magcache, order.loras, order.extras.as_dict),
                "num_frames": order.num_frames,
                "seconds": None if seconds is None else round(seconds * len(orders), 2),
                "seconds_until_free": engine.seconds_until_free(),
                "memory": memory_of(door, order),
            }

        async with door.bodies.read(request, fields.OF_JOBS) as body:
            return await run_in_threadpool(work_out, body)

    return router


def memory_of(door: Door, order: Order) -> dict[str, Any] | None:
    """The plan in GB of 2^30 bytes; None where the machine isn't known yet."""
    engine, machine = door.engine, door.engine.machine
    if machine is None:
        return None
    plan = engine.catalogue.plan(order, machine, engine.dtype)

    def gb(count: float) -> float:
        return round(count / GB, 3)

    return {
        "gpu_gb": None if machine.gpu_memory is None else gb(machine.gpu_memory),
        "host_gb": gb(machine.host_memory),
        "gpu_peak_gb": None if machine.gpu_memory is None else gb(max(stage.gpu for stage in plan.stages)),
        "host_peak_gb": gb(max(stage.host for stage in plan.stages)),
        "stages": [{"name": one.name, "gpu_gb": gb(one.gpu), "host_gb": gb(one.host)} for one in plan.stages],
        "because": plan.reason,
        "refusal": plan.refusal,
    }
