"""The HTTP API over an engine whose lane makes outputs of a few bytes: shapes, mistakes, limits, keys and events."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from kandinsky.config.reading import load_config
from kandinsky.outputs.media import sidecar_path, write_video
from kandinsky.planning.machine import Machine
from kandinsky.serving.app import create_app
from kandinsky.serving.engine import Engine
from kandinsky.serving.gate import Gate, Keys
from kandinsky.serving.lanes import Outcome, Report, Task
from kandinsky.serving.limits import Limits
from kandinsky.serving.server import wants_page
from kandinsky.serving.variants import Catalogue, Variant

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = ("tiny_t2v", "tiny_i2v", "tiny_t2i", "tiny_i2i")
PATIENCE = 60  # seconds, only to end what hangs


class QuickLane:
    """Makes each output at once; of a prompt that begins with "fail" or "crash" it says so, and "wait" waits."""

    machine: Machine | None = Machine(1 << 40)

    def __init__(self) -> None:
        import threading

        self.released = threading.Event()
        self.cancelled: set[str] = set()

    def prepare(self) -> None:
        pass

    def make(self, task: Task, report: Report) -> Outcome:
        (sample,) = task.order.request.samples
        text = sample.text or ""
        report({"stage": "denoising", "step": 1})
        report({"preview": b"a small picture"})
        if text.startswith("wait"):
            self.released.wait(PATIENCE)
        if task.id in self.cancelled:
            return Outcome("cancelled", "it was cancelled", "cancelled")
        if text.startswith("fail"):
            return Outcome("failed", "out of memory", "out_of_memory")
        if task.order.request.is_image:
            Image.new("RGB", (16, 16), "blue").save(task.output)
        else:
            task.output.write_bytes(bytes(range(200)))
        sidecar_path(task.output).write_text(json.dumps({"prompt": text}))
        return Outcome("done", seconds={"denoise": 1.0, "decode": 1.0})

    def cancel(self, job_id: str) -> None:
        self.cancelled.add(job_id)
        self.released.set()

    def close(self) -> None:
        self.released.set()


class Site:
    """A client of an application in this process."""

    def __init__(self, engine: Engine, lane: QuickLane, api_key: str | None = None) -> None:
        self.engine, self.lane, self.app = engine, lane, create_app(engine, api_key)

    def client(self, **options: Any) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
        return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=PATIENCE, **options)

    def ask(self, method: str, address: str, headers: dict[str, str] | None = None, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with self.client() as client:
                return await client.request(method, address, headers=headers, **options)

        return asyncio.run(ask())

    def post(self, address: str, **fields: Any) -> httpx.Response:
        return self.ask("POST", address, json=fields)

    def done(self, job_id: str) -> dict[str, Any]:
        """The job when it has ended, told by its events."""
        events = self.ask("GET", f"/v1/jobs/{job_id}/events").text
        found: dict[str, Any] = json.loads(events.strip().split("data: ")[-1])
        return found


@pytest.fixture(scope="module")
def variants() -> list[Variant]:
    return [Variant(name, load_config(REPOSITORY / "configs" / f"config_{name}.yaml")) for name in NAMES]


@pytest.fixture
def make_site(tmp_path: Path, variants: list[Variant]) -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def make(limits: Limits | None = None, api_key: str | None = None, lora_dir: Path | None = None) -> Site:
        lane = QuickLane()
        engine = Engine(Catalogue(variants, lora_dir, limits), tmp_path / "outputs", [lane])
        engine.start()
        sites.append(Site(engine, lane, api_key))
        return sites[-1]

    yield make
    for site in sites:
        site.engine.stop()


@pytest.fixture
def site(make_site: Callable[..., Site]) -> Site:
    return make_site()


def png(size: tuple[int, int] = (64, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, format="PNG")
    return buffer.getvalue()


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def message(response: httpx.Response) -> str:
    text = response.json()["error"]["message"]
    assert isinstance(text, str) and len(text.splitlines()) == 1
    return text


def test_a_video_from_request_to_file(site: Site) -> None:
    made = site.post("/v1/videos", model="tiny_t2v", prompt="a circle", seconds="1", size="128x128", seed=5, steps=3)
    video = made.json()
    assert made.status_code == 200 and video["object"] == "video" and video["status"] == "queued"
    assert (video["seconds"], video["size"], video["seed"], video["steps"]) == ("1", "128x128", 5, 3)
    done = site.done(video["id"])
    assert done["state"] == "done" and done["settings"]["seed"] == 5
    found = site.ask("GET", f"/v1/videos/{video['id']}").json()
    assert (found["status"], found["progress"]) == ("completed", 100)
    content = site.ask("GET", f"/v1/videos/{video['id']}/content")
    assert content.content == bytes(range(200)) and content.headers["content-type"] == "video/mp4"
    part = site.ask("GET", f"/v1/videos/{video['id']}/content", headers={"Range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == bytes(range(10, 20))
    assert part.headers["content-range"] == "bytes 10-19/200"
    assert site.ask("GET", done["urls"]["record"]).json() == {"prompt": "a circle"}
    again = site.post("/v1/jobs", **done["settings"]).json()["data"][0]
    assert again["settings"] == done["settings"]  # "use these"
    assert site.ask("DELETE", f"/v1/videos/{video['id']}").json()["deleted"]
    assert site.ask("GET", f"/v1/videos/{video['id']}").status_code == 404


def test_events_tell_steps_previews_and_the_end(site: Site) -> None:
    async def watch() -> list[tuple[str, dict[str, Any]]]:
        async with site.client() as client:
            job = (await client.post("/v1/jobs", json={"model": "tiny_t2v", "prompt": "wait"})).json()["data"][0]
            asyncio.get_running_loop().call_later(0.5, site.lane.released.set)  # in-process streams come at once
            text = (await client.get(job["urls"]["events"])).text
        return [(kind, json.loads(data)) for kind, data in re.findall(r"event: (\w+)\ndata: (.*)\n\n", text)]

    seen = asyncio.run(watch())
    assert {kind for kind, _ in seen} == {"step", "preview", "done"} and seen[-1][0] == "done"
    steps = [data["step"] for kind, data in seen if kind == "step"]
    assert steps == sorted(steps) and max(steps) == 1
    preview = next(data for kind, data in seen if kind == "preview")
    assert preview["image"] == f"data:image/webp;base64,{base64.b64encode(b'a small picture').decode()}"


def test_pictures_come_with_the_answer(site: Site) -> None:
    made = site.post("/v1/images/generations", prompt="a square", n=2, seed=7, size="128x128").json()
    assert [entry["seed"] for entry in made["data"]] == [7, 8]
    picture = Image.open(io.BytesIO(base64.b64decode(made["data"][0]["b64_json"])))
    assert picture.size == (16, 16)
    for sent in (
        {"files": {"image": ("../../a.png", png(), "image/png")}, "data": {"prompt": "red", "response_format": "url"}},
        {"json": {"image": data_url(png()), "prompt": "red", "response_format": "url"}},
        {"json": {"images": [{"image_url": data_url(png())}], "prompt": "red", "response_format": "url"}},
    ):
        edited = site.ask("POST", "/v1/images/edits", **sent)
        assert edited.status_code == 200, edited.text
        assert site.ask("GET", edited.json()["data"][0]["url"]).headers["content-type"] == "image/png"
    failed = site.post("/v1/images/generations", prompt="fail")
    assert failed.status_code == 503 and message(failed) == "out of memory"
    assert failed.headers["x-should-retry"] == "false"


def test_a_picture_begins_a_video(site: Site) -> None:
    form = {"files": {"input_reference": ("cat.png", png(), "image/png")}, "data": {"prompt": "it jumps", "seed": "3"}}
    video = site.ask("POST", "/v1/videos", **form).json()
    assert video["model"] == "tiny_i2v" and video["seed"] == 3
    done = site.done(video["id"])
    assert done["picture"] == "cat.png"
    stored = Image.open(io.BytesIO(site.ask("GET", done["urls"]["picture"]).content))
    assert stored.size == (64, 48) and stored.getpixel((0, 0)) == (255, 0, 0)
    remix = site.post(f"/v1/videos/{video['id']}/remix", prompt="it sleeps").json()
    assert (remix["remixed_from_video_id"], remix["seed"], remix["prompt"]) == (video["id"], 3, "it sleeps")


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """25 frames of 64x48."""
    path = tmp_path_factory.mktemp("mp4") / "clip.mp4"
    write_video(np.zeros((25, 48, 64, 3), np.uint8), path, 24)
    return path.read_bytes()


def test_videos_masks_and_further_pictures(site: Site, mp4: bytes) -> None:
    """They are chosen a model for, kept for the job, told of, used again by a remix, and go with it."""
    sent = [("video", ("a cat.mp4", mp4)), ("mask", ("mask.png", png()))]
    made = site.ask("POST", "/v1/videos", files=sent, data={"prompt": "a dog", "strength": "0.5"}).json()
    assert (made["model"], made["strength"], made["size"]) == ("tiny_t2v", 0.5, "144x112"), made
    done = site.done(made["id"])
    assert done["files"] == [["video", "a cat.mp4"], ["mask", "mask.png"]]
    assert site.ask("GET", f"/v1/jobs/{made['id']}/given/video/0").content == mp4
    assert site.ask("GET", f"/v1/jobs/{made['id']}/given/mask/1").status_code == 404
    remix = site.post(f"/v1/videos/{made['id']}/remix", prompt="a bird").json()
    assert remix["strength"] == 0.5 and site.ask("GET", f"/v1/jobs/{remix['id']}/given/video/0").content == mp4
    for one in (made, remix):
        site.done(one["id"])
        site.ask("DELETE", f"/v1/jobs/{one['id']}")
    assert not list((site.engine.folder / "pictures").iterdir())

    sent = [("input_reference", ("a.png", png())), ("last_image", ("b.png", png()))]
    sent += [("keyframe", (f"{i}.png", png())) for i in range(2)]
    data = {"prompt": "a dog", "keyframe_seconds": ["0.3", "0.6"], "fps": "48", "upscale": "2"}
    made = site.ask("POST", "/v1/videos", files=sent, data=data).json()
    assert made["model"] == "tiny_i2v" and made["keyframe_seconds"] == [0.3, 0.6], made
    assert (made["fps"], made["upscale"]) == (48, 2)
    loop = site.post("/v1/videos", prompt="a", input_reference=data_url(png()), loop=True).json()
    assert (loop["model"], loop["loop"]) == ("tiny_i2v", True)
    fields = {"prompt": "a", "image": data_url(png()), "strength": 0.5, "mask": data_url(png()), "n": 2}
    drawn = site.post("/v1/jobs", **fields).json()["data"]
    assert [one["model"] for one in drawn] == ["tiny_t2i"] * 2 and drawn[1]["files"] == [["mask", "mask.png"]]


def test_longer_videos(site: Site, mp4: bytes) -> None:
    """By seconds or by a list; their plan and their steps are those of all segments."""
    made = site.post("/v1/jobs", model="tiny_t2v", prompt="a", seed=7, seconds=1, steps=4, extend=2).json()["data"][0]
    assert made["steps"] == 4 * len(made["settings"]["segments"]) > 4
    frames = [round(24 * one["seconds"]) for one in made["settings"]["segments"]]
    assert frames[0] == 24 and sum(frames) == 72 and made["settings"]["segments"][1]["seed"] == 8
    again = site.post("/v1/jobs", **made["settings"]).json()["data"][0]
    assert again["settings"] == made["settings"]

    rows = [{"seconds": 0.5}, {"prompt": "b", "seconds": 0.5, "seed": 3}]
    form = {"prompt": "a", "segments": json.dumps(rows), "colour_match": "false", "overlap": "5"}
    sent = {"files": {"video": ("v.mp4", mp4)}, "data": form}
    plan = site.ask("POST", "/v1/plan", **sent).json()
    assert plan["num_frames"] == 24 and plan["settings"]["overlap"] == 5 and plan["memory"]["refusal"] is None
    made = site.ask("POST", "/v1/videos", **sent).json()
    assert made["seconds"] == "1" and not made["colour_match"], made
    assert [(one["prompt"], one["seconds"]) for one in made["segments"]] == [("a", 0.5), ("b", 0.5)]
    remix = site.post(f"/v1/videos/{made['id']}/remix", prompt="c").json()
    assert [one["prompt"] for one in remix["segments"]] == ["c", "c"]
    assert [one["seed"] for one in remix["segments"]] == [one["seed"] for one in made["segments"]]


def test_rows_of_the_version_before_are_taken_over(tmp_path: Path) -> None:
    import sqlite3

    from kandinsky.serving.store import DATABASE, Job, Store

    store = Store(tmp_path)
    store.add([Job("video_1", "video", "me", "tiny_t2v", {"num_steps": 3, "num_frames": 5}, 1.0)])
    store.close()
    with sqlite3.connect(tmp_path / DATABASE) as database:
        database.executescript("ALTER TABLE jobs DROP COLUMN extras; PRAGMA user_version = 1;")
    for _ in range(2):
        store = Store(tmp_path)
        job = store.get("video_1")
        assert job is not None and job.extras == {} and job.num_steps == 3
        store.close()


def test_lists_page_through_all(site: Site) -> None:
    ids = [site.post("/v1/videos", prompt=f"video {i}").json()["id"] for i in range(5)]
    site.post("/v1/images/generations", prompt="a picture")
    seen: list[str] = []
    after = ""
    while True:
        listed = site.ask("GET", f"/v1/videos?limit=2{after}").json()
        seen += [one["id"] for one in listed["data"]]
        if not listed["has_more"]:
            break
        after = f"&after={listed['last_id']}"
    assert seen == ids[::-1]
    assert len(site.ask("GET", "/v1/jobs").json()["data"]) == 6
    assert len(site.ask("GET", "/v1/jobs?kind=image&state=done&state=failed").json()["data"]) == 1
    for query in ("limit=0", "limit=x", "order=up", "after=video_0", "state=lost", f"limit={10**400}"):
        refused = site.ask("GET", f"/v1/jobs?{query}")
        assert refused.status_code == 400 and message(refused)


def test_models_say_what_can_be_asked(site: Site) -> None:
    models = {one["id"]: one for one in site.ask("GET", "/v1/models").json()["data"]}
    assert list(models) == list(NAMES)
    assert models["tiny_i2i"]["sizes"] == ["128x128"] and models["tiny_i2i"]["needs_picture"]
    assert models["tiny_t2v"]["defaults"]["steps"] == 16 and models["tiny_t2v"]["magcache"]
    assert site.ask("GET", "/v1/models/tiny_t2v").json() == models["tiny_t2v"]
    assert site.ask("GET", "/v1/models/sora-2").status_code == 404


def test_a_plan_before_anything_is_queued(site: Site) -> None:
    first = site.post("/v1/plan", model="tiny_t2v", prompt="a", steps=8, seconds=1).json()
    assert first["seconds"] is None and first["memory"]["refusal"] is None
    assert first["memory"]["host_peak_gb"] > 0 and first["settings"]["steps"] == 8
    job = site.post("/v1/jobs", model="tiny_t2v", prompt="a", steps=8, seconds=1).json()["data"][0]
    site.done(job["id"])
    assert site.post("/v1/plan", model="tiny_t2v", prompt="a", steps=16, seconds=1).json()["seconds"] == 3.0
    assert len(site.ask("GET", "/v1/jobs").json()["data"]) == 1
    assert site.post("/v1/plan", model="tiny_t2v", prompt="a", steps=0).status_code == 400


@pytest.mark.parametrize(
    ("address", "sent", "words"),
    [
        ("videos", {"json": {"prompt": "a", "stpes": 3}}, "unknown field stpes; did you mean steps?"),
        ("videos", {"json": {"prompt": 3}}, "prompt is 3; it must be text"),
        ("videos", {"json": {}}, "there is no prompt"),
        ("videos", {"json": []}, "the request is []; it must be an object"),
        ("videos", {"json": {"prompt": "a", "seed": "abc"}}, "the seed is 'abc'; it must be a whole number from 0"),
        ("videos", {"json": {"prompt": "a", "model": "tiny_t2i"}}, "tiny_t2i is a model for t2i, and this makes t2v"),
        ("videos", {"json": {"prompt": "a", "magcache": 3}}, "magcache is 3; it must be true or false"),
        ("videos", {"json": {"prompt": "a", "input_reference": "/etc/passwd"}}, "nothing is fetched here"),
        ("videos", {"json": {"prompt": "a", "input_reference": "https://a/b.png"}}, "nothing is fetched here"),
        ("videos", {"content": b"{", "headers": {"content-type": "application/json"}}, "the request is not JSON"),
        ("videos", {"content": b"[" * 9999, "headers": {"content-type": "application/json"}}, "nested deeper"),
        ("images/generations", {"json": {"prompt": "a", "size": "64x64"}}, "64x64 is not a size that this model draws"),
        ("images/generations", {"json": {"prompt": "a", "response_format": "gif"}}, "response_format is 'gif'"),
        ("images/generations", {"json": {"prompt": "a", "image": data_url(b"x")}}, "this takes none: leave it out"),
        ("images/edits", {"json": {"prompt": "a"}}, "needs a picture"),
        ("images/edits", {"json": {"prompt": "a", "image": data_url(b"none")}}, "can't read the image that was sent"),
        ("images/edits", {"json": {"prompt": "a", "image": data_url(png((8, 8)))}}, "the picture is 8x8 pixels"),
        ("images/edits", {"json": {"prompt": "a", "mask": data_url(png())}}, "mask is a file, and this takes none"),
        ("images/generations", {"json": {"prompt": "a", "fps": 48}}, "unknown field fps"),
        ("videos", {"json": {"prompt": "a", "strength": 0.5}}, "strength is about what sampling starts from"),
        ("videos", {"json": {"prompt": "a", "video": "/etc/passwd"}}, "nothing is fetched here"),
        ("videos", {"files": {"video": ("a.mp4", b"none")}, "data": {"prompt": "a"}}, "can't read the video a.mp4"),
        ("videos", {"json": {"prompt": "a", "mask": data_url(png())}}, "a mask is about what sampling starts from"),
        ("videos", {"json": {"prompt": "a", "loop": True}}, "needs a picture"),
        ("videos", {"json": {"prompt": "a", "keyframe_seconds": [1]}}, "0 pictures are sent as keyframe"),
        (
            "videos",
            {
                "json": {
                    "prompt": "a",
                    "keyframe_seconds": [{}],
                    "keyframe": data_url(png()),
                    "input_reference": data_url(png()),
                }
            },
            "give the time of each",
        ),
        (
            "videos",
            {
                "json": {
                    "prompt": "a",
                    "input_reference": data_url(png()),
                    "keyframe": data_url(png()),
                    "keyframe_seconds": [9],
                }
            },
            "a keyframe at 9.0 s is not in the video",
        ),
        (
            "videos",
            {"json": {"prompt": "a", "input_reference": data_url(png()), "last_image": data_url(b"x")}},
            "the last frame: can't read the image",
        ),
        ("videos", {"json": {"prompt": "a", "extend": "long"}}, "extend is 'long'; it must be a number of seconds"),
        ("videos", {"json": {"prompt": "a", "extend": 1, "loop": True}}, "loop is about one video"),
        ("videos", {"json": {"prompt": "a", "overlap": 5}}, "overlap is about segments: give extend or segments"),
        ("videos", {"json": {"prompt": "a", "segments": "[1]"}}, "it must be a list of objects"),
        ("videos", {"json": {"prompt": "a", "segments": []}}, "adds nothing"),
        ("videos", {"json": {"prompt": "a", "segments": [{"size": 3}]}}, "segment 1: a segment has prompt, seconds"),
        ("videos", {"json": {"prompt": "a", "segments": [{}] * 21}}, "at most 20 in a job"),
        ("videos", {"json": {"prompt": "a", "extend": 100}}, "at most 20 in a job"),
        ("videos", {"json": {"prompt": "a", "fps": 300}}, "runtime.fps = 300 is not allowed: it must be 1 to 240"),
        ("videos", {"json": {"prompt": "a", "upscale": 3}}, "runtime.upscale = 3 is not allowed"),
        (
            "videos",
            {"json": {"prompt": "a", "seconds": 20, "fps": 240, "upscale": 4, "size": "512x512"}},
            "this server writes at most 4000",
        ),
        ("jobs", {"json": {"model": "tiny_t2i", "prompt": "a", "fps": 48}}, "runtime.fps = 48 is not allowed"),
        ("jobs", {"json": {"model": "tiny_t2i", "prompt": "a", "extend": 1}}, "makes videos longer"),
    ],
)
def test_mistakes_are_one_sentence(site: Site, address: str, sent: dict[str, Any], words: str) -> None:
    refused = site.ask("POST", f"/v1/{address}", **sent)
    assert refused.status_code == 400 and words in message(refused)
    assert refused.json()["error"]["type"] == "invalid_request_error"
    assert site.engine.store.counts()["queued"] == 0


def test_mistakes_are_the_command_line_s(site: Site) -> None:
    from kandinsky.request import resolve_request

    config = site.engine.catalogue["tiny_t2v"].config
    for fields, wishes in (
        ({"size": "100x100"}, {"width": 100, "height": 100}),
        ({"seconds": 99}, {"time_length": 99}),
        ({"guidance": -1}, {"guidance_weight": -1}),
        ({"guidance_interval": [2, 1]}, {"guidance_interval": [2, 1]}),
        ({"steps": 10**6}, {"num_steps": 10**6}),
    ):
        with pytest.raises(ValueError) as error:
            resolve_request(config, "a", **wishes)  # type: ignore[arg-type]
        assert message(site.post("/v1/videos", model="tiny_t2v", prompt="a", **fields)) == str(error.value)


def bomb() -> bytes:
    """A PNG of some bytes that says it has 10,000 x 10,000 pixels."""
    head = bytearray(png())
    head[16:24] = (10_000).to_bytes(4, "big") * 2
    import zlib

    head[29:33] = zlib.crc32(bytes(head[12:29])).to_bytes(4, "big")
    return bytes(head)


def text_bomb() -> bytes:
    """A PNG with 100 MB of text in 100 kB."""
    import zlib

    content = b"Comment\0\0" + zlib.compress(bytes(10**8))
    chunk = b"zTXt" + content
    head = png()
    return head[:33] + len(content).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + head[33:]


def test_too_much_is_refused(make_site: Callable[..., Site], tmp_path: Path) -> None:
    site = make_site(Limits(body_mb=1, queue=2))
    large = site.ask("POST", "/v1/images/edits", files={"image": ("a.png", bytes(2_000_000))}, data={"prompt": "a"})
    assert large.status_code == 413 and "at most 1 MB are read" in message(large)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100_000

    unknown = site.ask("POST", "/v1/videos", content=chunks(), headers={"content-type": "application/json"})
    assert unknown.status_code == 413
    pixels = site.ask("POST", "/v1/images/edits", files={"image": ("a.png", bomb())}, data={"prompt": "a"})
    assert pixels.status_code == 400 and "it has 100 megapixels" in message(pixels)

    text = site.ask("POST", "/v1/images/edits", files={"image": ("a.png", text_bomb())}, data={"prompt": "a"})
    assert text.status_code == 400 and "the file is damaged" in message(text)

    first = site.post("/v1/videos", prompt="wait").json()
    while site.ask("GET", f"/v1/jobs/{first['id']}").json()["state"] == "queued":
        pass
    for _ in range(2):
        assert site.post("/v1/videos", prompt="wait").status_code == 200
    full = site.post("/v1/videos", prompt="wait")
    assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
    assert "2 jobs are waiting" in message(full)
    many = site.post("/v1/images/generations", prompt="a", n=3)  # all or none
    assert many.status_code == 429 and site.engine.store.counts()["queued"] == 2
    assert len(list((tmp_path / "outputs" / "pictures").iterdir())) == 0


def test_two_hundred_jobs_wait(site: Site) -> None:
    site.post("/v1/videos", prompt="wait")
    ids = {site.post("/v1/videos", prompt="a").json()["id"] for _ in range(200)}
    assert len(ids) == 200
    site.lane.released.set()
    last = max(ids, key=lambda one: site.engine.job(one).number)
    assert site.done(last)["state"] == "done"
    assert site.engine.store.counts()["done"] == 201


def test_the_key_is_asked_for(make_site: Callable[..., Site]) -> None:
    site = make_site(api_key="s3cret ключ")
    bearer = {"Authorization": "Bearer s3cret ключ".encode()}
    assert site.ask("GET", "/health").status_code == 200
    for given in ({}, {"Authorization": "Bearer s3cret"}, {"Authorization": "s3cret ключ".encode()}):
        refused = site.ask("GET", "/v1/models", headers=given)  # type: ignore[arg-type]
        assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication_error"
        assert site.ask("POST", "/v1/videos", headers=given, json={"prompt": "a"}).status_code == 401  # type: ignore[arg-type]
    job = site.ask("POST", "/v1/jobs", headers=bearer, json={"model": "tiny_t2v", "prompt": "a"}).json()["data"][0]  # type: ignore[arg-type]
    events = site.ask("GET", job["urls"]["events"]).text  # a signed link needs no header
    content = json.loads(events.strip().split("data: ")[-1])["urls"]["content"]
    assert site.ask("GET", content).status_code == 200
    path, signature = content.split("?")
    for forged in (path, f"{path}?signature=0", f"{path.replace('content', 'record')}?{signature}"):
        assert site.ask("GET", forged).status_code == 401
    assert site.ask("DELETE", f"{path.removesuffix('/content')}?{signature}").status_code == 401


def test_without_a_key_other_sites_stay_out(site: Site) -> None:
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
        refused = site.ask("POST", "/v1/videos", headers=headers, json={"prompt": "a"})
        assert refused.status_code == 403 and message(refused)
    own = {"Origin": "http://127.0.0.1:8000", "Host": "127.0.0.1:8000"}
    assert site.ask("POST", "/v1/videos", headers=own, json={"prompt": "a"}).status_code == 200
    plain = site.ask("POST", "/v1/videos", headers={"content-type": "text/plain"}, content=b'{"prompt": "a"}')
    assert plain.status_code == 415


def scope(path: str) -> dict[str, Any]:
    """Of a POST with JSON that is yet to come."""
    return {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"), (b"content-length", b"10")],
        "http_version": "1.1", "scheme": "http", "root_path": "", "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }  # fmt: skip


async def ignore(message: Any) -> None:
    """Who does not listen to the answer."""


def test_a_body_that_does_not_come(site: Site) -> None:
    sent: list[dict[str, Any]] = []

    async def never() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(part: Any) -> None:
        sent.append(part)

    app = Gate(site.app, Keys(None), Limits(body_seconds=0.05))
    asyncio.run(asyncio.wait_for(app(scope("/v1/videos"), never, send), PATIENCE))
    assert sent[0]["status"] == 408

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    sent.clear()
    asyncio.run(asyncio.wait_for(app(scope("/v1/videos"), gone, send), PATIENCE))
    assert sent[0]["status"] == 499 and site.engine.store.counts()["queued"] == 0


def test_a_client_that_goes_cancels_its_pictures(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kandinsky.serving.waiting.LOOK", 0.01)
    body = [b'{"prompt": "wait"}']

    async def receive() -> dict[str, Any]:
        if body:
            return {"type": "http.request", "body": body.pop()}
        while not site.engine.live:
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    asyncio.run(asyncio.wait_for(site.app(scope("/v1/images/generations"), receive, ignore), PATIENCE))
    (job,) = site.engine.page(10)
    assert site.done(job.id)["state"] == "cancelled"


def test_a_full_disk_is_said(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlite3

    def full(jobs: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(site.engine.store, "add", full)
    refused = site.ask("POST", "/v1/videos", files={"input_reference": ("a.png", png())}, data={"prompt": "a"})
    assert refused.status_code == 507 and "disk is full" in message(refused)
    assert not list((site.engine.folder / "pictures").iterdir())


def test_cancel_and_retry(site: Site) -> None:
    first, second = (site.post("/v1/videos", prompt=text).json()["id"] for text in ("wait", "wait too"))
    assert site.ask("POST", f"/v1/jobs/{second}/cancel").json()["state"] == "cancelled"
    site.ask("POST", f"/v1/jobs/{first}/cancel")
    assert site.done(first)["error"]["code"] == "cancelled"
    assert site.ask("GET", f"/v1/videos/{first}").json()["status"] == "failed"
    assert site.ask("GET", f"/v1/videos/{first}/content").status_code == 404
    assert site.ask("POST", f"/v1/jobs/{second}/retry").json()["state"] == "queued"
    assert site.done(second)["state"] == "done"
    assert site.ask("POST", f"/v1/jobs/{second}/retry").status_code == 409


def test_metrics_health_and_documents(site: Site) -> None:
    site.done(site.post("/v1/videos", prompt="a", model="tiny_t2v").json()["id"])
    metrics = site.ask("GET", "/metrics").text
    assert 'kandinsky_jobs{state="done"} 1.0' in metrics
    assert 'kandinsky_stage_seconds_total{model="tiny_t2v",stage="denoise"} 1.0' in metrics
    assert site.ask("GET", "/health").json() == {"status": "ok", "queued": 0, "running": 0}
    paths = site.ask("GET", "/openapi.json").json()["paths"]
    body = paths["/v1/videos"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "magcache" in body["properties"] and "/v1/jobs/{job_id}/events" in paths
    assert site.ask("GET", "/nothing").status_code == 404 and site.ask("PUT", "/v1/videos").status_code == 405


def test_adapters_are_those_of_the_folder(make_site: Callable[..., Site], tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "dolly.safetensors").write_bytes(b"no adapter")
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    site = make_site(lora_dir=tmp_path / "loras")
    assert site.ask("GET", "/v1/models").json()["data"][0]["loras"] == ["dolly"]
    for name in ("../secret", str(tmp_path / "secret.safetensors"), "secret", "dolly.safetensors"):
        refused = site.post("/v1/videos", prompt="a", loras=[name])
        assert refused.status_code == 400 and "this server has dolly" in message(refused)
    assert site.post("/v1/videos", prompt="a", loras=["dolly:0.5"]).status_code == 400  # it is damaged


def test_without_a_page_the_root_leads_to_the_documentation(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer = site.ask("GET", "/")
    assert (answer.status_code, answer.headers["location"]) == (307, "/docs")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert wants_page(SimpleNamespace(no_page=False))  # type: ignore[arg-type]
    assert not wants_page(SimpleNamespace(no_page=True))  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with caplog.at_level("INFO"):
        assert not wants_page(SimpleNamespace(no_page=False))  # type: ignore[arg-type]
    assert "pip install gradio" in caplog.text
