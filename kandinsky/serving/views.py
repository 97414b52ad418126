"""Jobs as clients see them: OpenAI's video object, and our own with everything that a page shows."""

from __future__ import annotations

from typing import Any

from kandinsky.serving.directed import total_seconds
from kandinsky.serving.engine import Engine
from kandinsky.serving.gate import Keys
from kandinsky.serving.store import ENDED, Job
from kandinsky.serving.variants import settings_of

STATUS = {"queued": "queued", "running": "in_progress", "done": "completed", "failed": "failed", "cancelled": "failed"}


def progress_of(job: Job) -> int:
    """Per cent; the last ones are for decoding."""
    return 100 if job.state == "done" else min(99, 95 * job.step // job.num_steps)


def error_of(job: Job) -> dict[str, str] | None:
    return None if job.error is None else {"code": job.code or "server_error", "message": job.error}


def video(job: Job) -> dict[str, Any]:
    """OpenAI's object, with our settings beside it."""
    settings = settings_of(job.request, job.magcache, job.loras, job.extras)
    seconds = total_seconds(job.request, job.extras)
    return {
        **settings,
        "id": job.id,
        "object": "video",
        "created_at": int(job.created),
        "completed_at": None if job.ended is None or job.state != "done" else int(job.ended),
        "expires_at": None,
        "error": error_of(job),
        "model": job.model,
        "progress": progress_of(job),
        "remixed_from_video_id": job.remix_of,
        "seconds": f"{seconds:g}",
        "status": STATUS[job.state],
    }


def job(job: Job, engine: Engine, keys: Keys) -> dict[str, Any]:
    """Ours: state, settings as the fields of a request that makes it again, and where its files are."""
    live, base = engine.live.get(job.id), f"/v1/jobs/{job.id}"
    has_output = job.state == "done"
    stage = job.state if job.state != "running" or live is None else live.stage
    return {
        "id": job.id,
        "object": "job",
        "kind": job.kind,
        "model": job.model,
        "state": job.state,
        "stage": None if job.state in ENDED else stage,
        "step": job.step,
        "steps": job.num_steps,
        "progress": progress_of(job),
        "created_at": job.created,
        "started_at": job.started,
        "ended_at": job.ended,
        "seconds": job.seconds,
        "settings": {"model": job.model, **settings_of(job.request, job.magcache, job.loras, job.extras)},
        "picture": job.picture,
        "files": [list(pair) for pair in job.extras.get("files", [])],
        "remix_of": job.remix_of,
        "error": error_of(job),
        "urls": {
            "events": None if job.state in ENDED else keys.sign(f"{base}/events"),
            "preview": keys.sign(f"{base}/preview") if live is not None and live.preview is not None else None,
            "content": keys.sign(f"{base}/content") if has_output else None,
            "thumbnail": keys.sign(f"{base}/thumbnail") if has_output else None,
            "record": keys.sign(f"{base}/record") if has_output else None,
            "picture": keys.sign(f"{base}/picture") if job.picture is not None else None,
        },
    }
