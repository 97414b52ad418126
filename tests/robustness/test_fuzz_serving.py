"""Requests that no client of ours would send: never a 500, never a job that is lost, never a file elsewhere.

They go past HTTP's own parsing, straight into the application: paths, queries and headers may be any bytes.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image

from kandinsky.config.reading import load_config
from kandinsky.outputs.media import sidecar_path
from kandinsky.planning.plan import Machine
from kandinsky.serving.lanes import Outcome, Report, Task
from kandinsky.serving.limits import Limits
from kandinsky.serving.variants import Catalogue, Variant
from tests.robustness.fuzzing import NASTY_TEXTS, assert_clear, fuzz, spoiled_bytes, spoiled_json

pytest.importorskip("fastapi")

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = ("tiny_t2v", "tiny_i2v", "tiny_t2i", "tiny_i2i")
CASES = 2000
LIMITS = Limits(body_mb=1, queue=50)


class Lane:
    """Makes everything at once, and some things not."""

    machine: Machine | None = Machine(1 << 40)

    def prepare(self) -> None:
        pass

    def make(self, task: Task, report: Report) -> Outcome:
        report({"step": 1, "preview": b"a picture"})
        if (task.order.request.samples[0].seed or 0) % 7 == 0:
            return Outcome("failed", "it fails", "invalid_request_error")
        if task.order.request.is_image:
            Image.new("RGB", (16, 16)).save(task.output)
        else:
            task.output.write_bytes(b"a video")
        sidecar_path(task.output).write_text("{}")
        return Outcome("done")

    def cancel(self, job_id: str) -> None:
        pass

    def close(self) -> None:
        pass


def png() -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").resize((40, 30)).save(buffer, format="PNG")
    return buffer.getvalue()


PNG = png()
FIELDS: dict[str, Any] = {
    "model": "tiny_t2v", "prompt": "a red circle", "negative_prompt": "", "size": "128x128", "seconds": 0.3, "seed": 5,
    "steps": 3, "guidance": 2.0, "guidance_interval": [0.0, 1.0], "guidance_every": 1, "scheduler_scale": 3.0,
    "expand_prompt": None, "magcache": True, "loras": [], "user": "me", "n": 1, "width": 128, "height": 128,
    "response_format": "url", "output_format": "png", "quality": "high", "strength": 0.5, "loop": True,
    "keyframe_seconds": [0.2], "extend": 0.5, "segments": [{"prompt": "a", "seconds": 1}], "overlap": 5,
    "colour_match": False, "fps": 48, "upscale": 2,
}  # fmt: skip
POSTS = ("videos", "images/generations", "images/edits", "jobs", "plan", "videos/{id}/remix", "jobs/{id}/cancel")
POSTS += ("jobs/{id}/retry",)
GETS = ("videos", "videos/{id}", "videos/{id}/content", "jobs", "jobs/{id}", "jobs/{id}/events", "jobs/{id}/preview")
GETS += ("jobs/{id}/content", "jobs/{id}/thumbnail", "jobs/{id}/record", "jobs/{id}/picture", "images/{id}/content")
GETS += ("jobs/{id}/given/video/0", "jobs/{id}/given/keyframe/9")
GETS += ("models", "models/{id}", "../health", "../metrics", "../openapi.json", "../docs")
QUERIES = ("limit", "after", "order", "state", "kind", "variant", "download", "signature")


def some_body(rng: Random) -> tuple[bytes, bytes]:
    """(content type, body)."""
    names = [*rng.sample(list(FIELDS), rng.randint(0, 6)), "prompt"]
    values = {name: FIELDS[name] for name in names}
    if rng.random() < 0.3:
        values["model"] = rng.choice(NAMES)
    if rng.random() < 0.3:
        content = spoiled_bytes(rng, PNG) if rng.random() < 0.5 else PNG
        url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        names = ("image", "input_reference", "images", "video", "mask", "last_image", "keyframe")
        values[rng.choice(names)] = rng.choice((url, [url], {"image_url": url}))
    if rng.random() < 0.6:
        body = spoiled_json(rng, values) if rng.random() < 0.8 else json.dumps(values).encode()
        kind = rng.choice((b"application/json",) * 8 + (b"application/json; charset=utf-16", b"text/plain", b""))
        return kind, body
    parts = b""
    for name, value in values.items():
        text = rng.choice(NASTY_TEXTS) if rng.random() < 0.2 else str(value)
        key = name.encode() if rng.random() < 0.9 else rng.choice(NASTY_TEXTS).encode("utf-8", "surrogatepass")
        parts += b'--x\r\nContent-Disposition: form-data; name="' + key + b'"\r\n\r\n'
        parts += text.encode("utf-8", "surrogatepass") + b"\r\n"
    if rng.random() < 0.5:
        file = rng.choice(("a.png", *NASTY_TEXTS)).encode("utf-8", "surrogatepass")
        name = rng.choice((b"image", b"video", b"mask", b"keyframe[]"))
        parts += b'--x\r\nContent-Disposition: form-data; name="' + name + b'"; filename="' + file + b'"\r\n\r\n'
        parts += spoiled_bytes(rng, PNG) + b"\r\n"
    parts += b"--x--\r\n"
    kind = b"multipart/form-data; boundary=x"
    if rng.random() < 0.3:
        kind, parts = spoiled_bytes(rng, kind), spoiled_bytes(rng, parts)
    if rng.random() < 0.1:
        return b"application/x-www-form-urlencoded", spoiled_bytes(rng, b"prompt=a&steps=3&image=x&seed=%zz")
    return kind, parts


def some_request(rng: Random, ids: list[str]) -> tuple[str, bytes, bytes, list[tuple[bytes, bytes]], bytes]:
    """Method, path, query, headers, body."""
    one = rng.choice([*ids, "video_0", *NASTY_TEXTS] if rng.random() < 0.7 else NASTY_TEXTS)
    method = rng.choice(("POST", "POST", "POST", "GET", "GET", "DELETE", "PUT", "HEAD"))
    path = "/v1/" + rng.choice(POSTS if method == "POST" else GETS).replace("{id}", one)
    raw = path.replace("/v1/../", "/").encode("utf-8", "surrogatepass")
    raw = spoiled_bytes(rng, raw) if rng.random() < 0.1 else raw
    pairs = [
        f"{rng.choice(QUERIES)}={rng.choice(('2', 'asc', 'done', 'video', one, *NASTY_TEXTS))}"
        for _ in range(rng.randint(0, 2))
    ]
    kind, body = some_body(rng) if method in ("POST", "PUT") else (b"", b"")
    headers = [(b"host", b"127.0.0.1"), (b"content-type", kind)]
    if rng.random() < 0.2:
        name = rng.choice(
            (b"range", b"x-client-id", b"authorization", b"content-length", b"origin", b"if-range", b"host")
        )
        nasty = rng.choice(("bytes=0-1", "bytes=5-2", "bytes=-", "0-0,1-1", *NASTY_TEXTS))
        headers.append((name, nasty.encode("utf-8", "surrogatepass")[:200]))
    return method, raw, "&".join(pairs).encode("utf-8", "surrogatepass"), headers, body


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Any]:
    from kandinsky.serving.engine import Engine

    variants = [Variant(name, load_config(REPOSITORY / "configs" / f"config_{name}.yaml")) for name in NAMES]
    engine = Engine(Catalogue(variants, limits=LIMITS), tmp_path / "outputs", [Lane()])
    engine.start()
    yield engine
    engine.stop()


def test_fuzz_requests(engine: Any, tmp_path: Path) -> None:
    from kandinsky.serving.app import create_app
    from kandinsky.serving.job_files import files_of

    app, loop = create_app(engine), asyncio.new_event_loop()
    statuses: dict[int, int] = {}

    async def ask(rng: Random) -> None:
        ids = [job.id for job in engine.page(20)]
        method, path, query, headers, body = some_request(rng, ids)
        cut = rng.randint(0, len(body))
        parts = [body[:cut], body[cut:]]
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            if parts:
                return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
            await asyncio.sleep(3600)
            raise AssertionError

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": method, "path": path.decode("utf-8", "replace"), "raw_path": path,
            "query_string": query, "headers": headers, "http_version": "1.1", "scheme": "http", "root_path": "",
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
        }  # fmt: skip
        await app(scope, receive, send)  # what is no answer of ours is raised here
        status = sent[0]["status"]
        statuses[status] = statuses.get(status, 0) + 1
        assert status < 500, (status, method, path, body[:300])
        content = b"".join(part.get("body", b"") for part in sent[1:])
        if status >= 400 and method != "HEAD" and status not in (416, 499):
            assert_clear(json.loads(content)["error"]["message"])

    try:
        fuzz(lambda rng: loop.run_until_complete(ask(rng)), CASES)
    finally:
        loop.close()
    assert statuses[200] > 100 and statuses[400] > 100, statuses  # not all alike
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}
    known = {path.name for job in engine.page(10**6) for path in files_of(engine.folder, job)}
    for path in (tmp_path / "outputs").rglob("*"):
        assert path.name in known or path.name.startswith("jobs.sqlite") or path.name == "pictures", path
