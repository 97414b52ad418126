"""serve.py with the tiny checkpoints, as people use it: through OpenAI's client, killed, and started again."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest
from PIL import Image

from kandinsky.config.reading import load_config
from kandinsky.outputs.media import write_video
from tests.limits import PATIENCE
from tests.lora_files import write_lora

openai = pytest.importorskip("openai")
REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = {
    name: REPOSITORY / "configs" / f"config_{name}.yaml" for name in ("tiny_t2v", "tiny_t2i", "tiny_i2i", "tiny_flf")
}
CIRCLE = "a red circle moves left on a white background"
SQUARE = "a yellow square on a navy background"
SHORT = {"steps": 2, "seed": 1}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="signals"),
    pytest.mark.filterwarnings("ignore:The Sora API"),
]


class Served:
    """A running serve.py, in a process of its own."""

    started: ClassVar[list[subprocess.Popen[str]]] = []

    def __init__(self, folder: Path, *flags: str, models: tuple[str, ...] = tuple(CONFIGS)) -> None:
        configs = [word for name in models for word in ("--config", str(CONFIGS[name]))]
        self.folder = folder
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(REPOSITORY / "serve.py"),
                *configs,
                "--port",
                "0",
                "--device",
                "cpu",
                "--no_page",
                *flags,
            ],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=(folder / "log").open("a"),
            text=True,
        )
        self.started.append(self.process)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("http://127.0.0.1:"), (folder / "log").read_text()
        self.http = httpx.Client(base_url=self.address, timeout=PATIENCE)
        self.openai = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", timeout=PATIENCE, max_retries=0)

    def post(self, address: str, **fields: Any) -> dict[str, Any]:
        response = self.http.post(address, json=fields)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get(f"/v1/jobs/{job_id}").json()
        return found

    def until(self, job_id: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The job, once its events tell that it is so."""
        with self.http.stream("GET", f"/v1/jobs/{job_id}/events") as events:
            for line in events.iter_lines():
                if line.startswith("data: ") and condition(found := json.loads(line.removeprefix("data: "))):
                    return dict(found)
        raise AssertionError(f"it ended before: {self.job(job_id)}")

    def ended(self, job_id: str) -> dict[str, Any]:
        return self.until(job_id, lambda job: job.get("state") in ("done", "failed", "cancelled"))

    def content(self, job_id: str) -> bytes:
        return self.http.get(f"/v1/jobs/{job_id}/content").content

    def workers(self) -> list[int]:
        """Processes that it has started."""
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True)
        return [int(line) for line in found.stdout.split()]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(PATIENCE)
        self.http.close()
        return code


@pytest.fixture(autouse=True, scope="module")
def none_outlives_its_test() -> Iterator[None]:
    """Also where a test fails on the way."""
    yield
    for process in Served.started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def served(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    dit = load_config(CONFIGS["tiny_t2i"]).model.dit_params
    write_lora(folder / "loras" / "strange look", dit, config={"r": 4, "lora_alpha": 4}, trigger="Strange. ")
    served = Served(folder, "--lora_dir", str(folder / "loras"))
    yield served
    served.stop()


def from_command_line(cli: ModuleType, folder: Path, model: str, prompt: str, *flags: str) -> bytes:
    output = folder / f"cli.{'png' if model in ('tiny_t2i', 'tiny_i2i') else 'mp4'}"
    words = ["--config", str(CONFIGS[model]), "--prompt", prompt, "--seed", "1", "--device", "cpu", *flags]
    assert cli.main([*words, "--output_filename", str(output)]) == 0
    return output.read_bytes()


def test_openai_s_client(served: Served, cli: ModuleType, tmp_path: Path) -> None:
    client = served.openai
    assert [model.id for model in client.models.list()] == list(CONFIGS)

    def one_client(seed: int) -> bytes:
        extra = {"steps": 2, "seed": seed}
        video = client.videos.create(
            model="tiny_t2v",
            prompt=CIRCLE,
            seconds="0.3",
            size="128x128",
            extra_body=extra,
            extra_headers={"X-Client-Id": str(seed)},
        )
        assert video.status == "queued"
        video = client.videos.poll(video.id, poll_interval_ms=50)
        assert video.status == "completed" and video.progress == 100, video
        return bytes(client.videos.download_content(video.id).read())

    with ThreadPoolExecutor(2) as pool:  # two at once
        first, second = pool.map(one_client, (1, 2))
    flags = ("--sample_steps", "2", "--video_duration", "0.3")
    assert first == from_command_line(cli, tmp_path, "tiny_t2v", CIRCLE, *flags)
    assert second != first

    pages = [video.id for video in client.videos.list(limit=1)]
    assert len(pages) == 2 == len(set(pages))
    thumbnail = client.videos.download_content(pages[0], variant="thumbnail").read()
    assert Image.open(io.BytesIO(thumbnail)).size == (128, 128)
    assert client.videos.delete(pages[0]).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(pages[0])
    with pytest.raises(openai.BadRequestError, match="the number of steps is 0; it must be"):
        client.videos.create(prompt=CIRCLE, extra_body={"steps": 0})


def test_pictures_drawn_and_edited(served: Served, cli: ModuleType, tmp_path: Path) -> None:
    made = served.openai.images.generate(model="tiny_t2i", prompt=SQUARE, size="128x128", n=2, extra_body=SHORT)
    pictures = [base64.b64decode(one.b64_json or "") for one in made.data]
    assert pictures[0] == from_command_line(cli, tmp_path, "tiny_t2i", SQUARE, "--sample_steps", "2")
    assert pictures[1] != pictures[0]
    jpeg = tmp_path / "a.jpg"  # decoded once, here or there
    Image.radial_gradient("L").convert("RGB").resize((140, 130)).save(jpeg)
    edited = served.openai.images.edit(
        model="tiny_i2i", prompt="make it red", image=jpeg, response_format="url", extra_body=SHORT
    )
    content = httpx.get(edited.data[0].url).content
    flags = ("--sample_steps", "2", "--image", str(jpeg))
    assert content == from_command_line(cli, tmp_path, "tiny_i2i", "make it red", *flags)


def test_an_adapter_by_its_name(served: Served, cli: ModuleType, tmp_path: Path) -> None:
    def drawn(**more: Any) -> bytes:
        made = served.openai.images.generate(model="tiny_t2i", prompt=SQUARE, extra_body={**SHORT, **more})
        return base64.b64decode(made.data[0].b64_json or "")

    plain, changed = drawn(), drawn(loras=["strange look:0.5"])
    lora = f"{served.folder / 'loras' / 'strange look'}:0.5"
    assert changed == from_command_line(cli, tmp_path, "tiny_t2i", SQUARE, "--sample_steps", "2", "--lora", lora)
    assert drawn() == plain != changed


def test_previews_magcache_and_cancelling(served: Served) -> None:
    (job,) = served.post("/v1/jobs", model="tiny_t2v", prompt=CIRCLE, steps=400, magcache=True)["data"]
    with served.http.stream("GET", job["urls"]["events"]) as events:
        preview = next(line for line in events.iter_lines() if '"image": "data:image/webp' in line)
    image = Image.open(io.BytesIO(base64.b64decode(preview.partition(";base64,")[2].rstrip('"}'))))
    assert image.format == "WEBP" and image.size == (64, 64) and image.n_frames > 1
    served.post(f"/v1/jobs/{job['id']}/cancel")
    assert served.ended(job["id"])["state"] == "cancelled"
    assert not list((served.folder / "outputs" / "served").glob(f"{job['id']}*"))
    again = served.post("/v1/jobs", **{**job["settings"], "steps": 8, "seconds": 0.3})["data"][0]
    assert served.ended(again["id"])["state"] == "done"
    record = served.http.get(f"/v1/jobs/{again['id']}/record").json()
    assert record["config"]["magcache"]["enabled"] and record["evaluations"]["skipped"] > 0


def test_what_is_made_of_videos_and_further_pictures(served: Served, cli: ModuleType, tmp_path: Path) -> None:
    """The bytes of the command line: a part of a video, a longer one that is processed after it, a last picture, and a
    picture that is drawn anew."""
    frames = np.full((9, 64, 64, 3), (40, 160, 60), dtype=np.uint8)
    frames[:, :, 32:] = (120, 40, 140)
    paths = {name: tmp_path / name for name in ("clip.mp4", "mask.png", "red.png", "blue.png")}
    write_video(frames, paths["clip.mp4"], 24)
    Image.linear_gradient("L").rotate(90).resize((64, 64)).save(paths["mask.png"])
    for name in ("red", "blue"):
        Image.new("RGB", (128, 128), name).save(paths[f"{name}.png"])

    def made(model: str, files: dict[str, str], **fields: Any) -> bytes:
        sent = {field: (name, paths[name].read_bytes()) for field, name in files.items()}
        data = {"model": model, "prompt": CIRCLE, "steps": 2, "seed": 1, **fields}
        response = served.http.post("/v1/jobs", data=data, files=sent)
        assert response.status_code == 200, response.text
        (job,) = response.json()["data"]
        ended = served.ended(job["id"])
        assert ended["state"] == "done", ended
        return served.content(job["id"])

    def expected(model: str, *flags: object) -> bytes:
        words = ["--sample_steps", 2, *(paths.get(str(flag), flag) for flag in flags)]
        return from_command_line(cli, tmp_path, model, CIRCLE, *map(str, words))

    size = ("--width", 64, "--height", 64)
    part = made("tiny_t2v", {"video": "clip.mp4", "mask": "mask.png"}, strength=1, size="64x64")
    assert part == expected("tiny_t2v", "--video", "clip.mp4", "--mask", "mask.png", "--strength", 1, *size)
    longer = made("tiny_t2v", {"video": "clip.mp4"}, extend=0.4, seconds=0.34, size="64x64", upscale=2)
    words = ("--video", "clip.mp4", "--extend", 0.4, "--video_duration", 0.34, *size, "--upscale", 2)
    assert longer == expected("tiny_t2v", *words)
    last = made("tiny_flf", {"image": "red.png", "last_image": "blue.png"}, seconds=0.2)
    assert last == expected("tiny_flf", "--image", "red.png", "--last_image", "blue.png", "--video_duration", 0.2)
    drawn = made("tiny_t2i", {"image": "red.png"}, strength=0.5)
    assert drawn == expected("tiny_t2i", "--image", "red.png", "--strength", 0.5)
    outputs = served.folder / "outputs" / "served"
    assert not list(outputs.glob("*.segments"))


def resident(pid: int) -> int:
    """Megabytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc")
def test_memory_stays_flat(served: Served) -> None:
    """benchmarks/serving.py goes on for longer."""

    def draw(count: int) -> None:
        for _ in range(count):
            served.openai.images.generate(model="tiny_t2i", prompt=SQUARE, extra_body={"steps": 1})

    draw(8)
    processes = [served.process.pid, *served.workers()]
    before = [resident(pid) for pid in processes]
    draw(24)
    grown = [resident(pid) - was for pid, was in zip(processes, before, strict=True)]
    assert max(grown) < 25, grown  # less than a megabyte a job, and it does not go on


def test_a_killed_worker_and_a_killed_server(tiny: Path, cli: ModuleType, tmp_path: Path) -> None:
    settings = {"model": "tiny_t2v", "prompt": CIRCLE, "seconds": 0.3, "steps": 24, "seed": 1}
    served = Served(tmp_path, models=("tiny_t2v",))
    (job,) = served.post("/v1/jobs", **settings)["data"]
    served.until(job["id"], lambda job: job.get("step", 0) >= 2)
    (worker,) = served.workers()
    os.kill(worker, signal.SIGKILL)
    failed = served.ended(job["id"])
    assert failed["state"] == "failed" and "was killed" in failed["error"]["message"]
    served.post(f"/v1/jobs/{job['id']}/retry")  # by a new worker

    (waiting, other) = (served.post("/v1/jobs", **{**settings, "steps": 2})["data"][0]["id"] for _ in range(2))
    step = served.until(job["id"], lambda one: one.get("step", 0) >= 3)["step"]
    served.process.kill()
    served.process.wait()
    # The new one waits until the other's worker has kept what it was making.
    served = Served(tmp_path, models=("tiny_t2v",))
    begun = served.until(job["id"], lambda one: one.get("step", 0) >= 1)
    assert begun["step"] > step, "it began anew"
    for one in (job["id"], waiting, other):
        assert served.ended(one)["state"] == "done"
    flags = ("--video_duration", "0.3", "--sample_steps")
    assert served.content(job["id"]) == from_command_line(cli, tmp_path, "tiny_t2v", CIRCLE, *flags, "24")
    assert served.content(waiting) == served.content(other)
    # As docker stop does: the running job waits for the next start.
    (last,) = served.post("/v1/jobs", **{**settings, "steps": 400})["data"]
    served.until(last["id"], lambda one: one.get("step", 0) >= 1)
    assert served.stop() in (0, -signal.SIGTERM)
    outputs = tmp_path / "outputs" / "served"
    assert (outputs / f"{last['id']}.stopped.safetensors").exists()
    assert {path.name for path in outputs.iterdir() if path.suffix == ".mp4"} == {
        f"{one}.mp4" for one in (job["id"], waiting, other)
    }


def test_half_sent_and_slow_requests(served: Served) -> None:
    """They cost their own connection, and nobody else's time."""
    import socket

    host, port = served.address.removeprefix("http://").split(":")
    sockets = []
    post = b"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    for sent in (
        post + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
        post + b"Content-Type: multipart/form-data; boundary=x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n--x\r\n",
        b"GET /v1/vid",
        b"\x16\x03\x01\x02\x00\x01\x00",  # a client that speaks TLS
        b"GET / HTTP/9.9\r\n\r\n\0\0\0",
    ):
        sockets.append(socket.create_connection((host, int(port)), PATIENCE))
        sockets[-1].sendall(sent)
    assert served.http.get("/health").json()["status"] == "ok"
    for one in sockets[::2]:
        one.close()
    for one in sockets[1::2]:
        one.shutdown(socket.SHUT_WR)
        while answer := one.recv(65536):
            assert b" 500 " not in answer
        one.close()
    assert served.http.get("/health").json()["status"] == "ok"
    assert "Traceback" not in (served.folder / "log").read_text()


def test_two_hundred_at_once(served: Served) -> None:
    """Queued by two clients at the same time, and removed again."""
    before = served.http.get("/health").json()["queued"]
    (first,) = served.post("/v1/jobs", model="tiny_t2v", prompt=CIRCLE, steps=400)["data"]

    def hundred(client: str) -> list[str]:
        with httpx.Client(base_url=served.address, timeout=PATIENCE, headers={"X-Client-Id": client}) as http:
            fields = {"model": "tiny_t2v", "prompt": CIRCLE}
            return [http.post("/v1/videos", json=fields).json()["id"] for _ in range(100)]

    begin = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        ids = [one for part in pool.map(hundred, "ab") for one in part]
    print(f"200 jobs were queued in {time.monotonic() - begin:.2f} s")
    assert len(set(ids)) == 200
    assert served.http.get("/health").json()["queued"] >= before + 200
    for one in [*ids, first["id"]]:
        assert served.http.delete(f"/v1/jobs/{one}").status_code == 200
    gone = threading.Event()
    while served.http.get("/health").json()["running"] and not gone.wait(0.05):
        pass
    assert served.http.get("/health").json() == {"status": "ok", "queued": before, "running": 0}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in: give --api_key"),
        (["--port", "70000"], "--port is 70000"),
        (["--replicas", "2"], "give --ray_address with it"),
        (["--max_queue", "0"], "--max_queue is 0; it must be at least 1"),
        (["--lora_dir", "nowhere"], "there is no such folder"),
        (["--device", "banana"], "'banana' is not a device: use cpu, cuda or cuda:0, mps, xpu"),
        (["--config", str(CONFIGS["tiny_t2v"])], "give one or more, each once"),
        (["model.nonsense=1"], "unknown key model.nonsense"),
        (["--api_key", " "], "--api_key is empty"),
    ],
)
def test_flags_are_checked_first(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KANDINSKY_API_KEY", raising=False)
    monkeypatch.syspath_prepend(str(REPOSITORY))
    import serve

    assert serve.main(["--config", str(CONFIGS["tiny_t2v"]), *flags]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1
