"""/v1/videos as OpenAI has it: create, list, retrieve, download, remix, delete."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse

from kandinsky.serving import fields, views
from kandinsky.serving.door import Door, file_response
from kandinsky.serving.errors import Refused
from kandinsky.serving.thumbnails import thumbnail_of
from kandinsky.serving.variants import VIDEO_TASKS

Limit = Annotated[int, Query(ge=1, le=100)]


def page(jobs: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A list as OpenAI's clients page through it, of `limit` + 1 that were looked for."""
    shown = jobs[:limit]
    ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
    return {"object": "list", "data": shown, **ends, "has_more": len(jobs) > limit}


def routes(door: Door) -> APIRouter:
    router, engine = APIRouter(prefix="/v1/videos", tags=["videos"]), door.engine

    @router.post("", openapi_extra=fields.schema(fields.OF_VIDEOS))
    async def create(request: Request) -> dict[str, Any]:
        """Queue a video; with a picture, one that begins with it; with a video, one that is made of it or goes on."""
        async with door.bodies.read(request, fields.OF_VIDEOS) as body:
            (job,) = await door.submit(request, body, "video", VIDEO_TASKS)
        return views.video(job)

    @router.get("")
    def listed(limit: Limit = 20, after: str | None = None, order: Literal["asc", "desc"] = "desc") -> dict[str, Any]:
        jobs = engine.page(limit + 1, after=after, newest_first=order == "desc", kinds=["video"])
        return page([views.video(job) for job in jobs], limit)

    @router.get("/{video_id}")
    def retrieve(video_id: str) -> dict[str, Any]:
        return views.video(door.job(video_id, "video"))

    @router.get("/{video_id}/content")
    def content(video_id: str, variant: str = "video") -> FileResponse:
        """The file, or the part that a Range header asks for; variant=thumbnail: a small picture."""
        job = door.job(video_id, "video")
        if variant not in ("video", "thumbnail"):
            raise ValueError(f"variant is {variant[:60]!r}; it must be video or thumbnail")
        if job.state != "done":
            raise Refused(404, f"the video is {views.STATUS[job.state]}: there is nothing to download")
        path = engine.output_path(job)
        return file_response(path if variant == "video" or not path.exists() else thumbnail_of(path))

    @router.delete("/{video_id}")
    def delete(video_id: str) -> dict[str, Any]:
        """Remove a video; one that is being made is cancelled."""
        engine.delete(door.job(video_id, "video").id)
        return {"id": video_id, "object": "video.deleted", "deleted": True}

    @router.post("/{video_id}/remix", openapi_extra=fields.schema(("prompt",)))
    async def remix(video_id: str, request: Request) -> dict[str, Any]:
        """The same settings, seed, picture and files with another prompt."""
        job = door.job(video_id, "video")
        async with door.bodies.read(request, ("prompt", "user")) as body:
            if "prompt" not in body.fields:
                raise ValueError("there is no prompt: say what to show")
            client = door.client_of(request, body)
        return views.video(await run_in_threadpool(engine.remix, job, client, body.fields["prompt"]))

    return router
