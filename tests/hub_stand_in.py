"""A hub for tests: what huggingface_hub asks for, over real HTTP on this machine, with trees like the published ones.

Two servers, as with the real hub: one lists repositories and hands out small files, and sends those who want a large
file on to the other one (the CDN), which must never see a token.
"""

import hashlib
import http.server
import json
import random
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

LARGE = (".safetensors", ".bin", ".h5", ".msgpack", ".mp4", ".png")  # in Git LFS or Xet, the others in git
TOKEN = "hf_thisTokenMay"


class Request(NamedTuple):
    server: str  # "hub" or "cdn"
    method: str
    path: str  # the file in its repository; for the API "api"
    repo: str
    range: str | None
    token: str | None


@dataclass
class Repo:
    files: dict[str, bytes]
    gated: bool = False
    commit: str = field(init=False)

    def __post_init__(self) -> None:
        self.commit = hashlib.sha1(repr(sorted(self.files)).encode()).hexdigest()


@dataclass
class Fault:
    """What goes wrong with one answer to a GET: `sends` bytes of the body, then `then` is called, then it is closed."""

    sends: int | None = None
    then: Callable[[], object] = lambda: None
    content: bytes | None = None  # instead of the right one
    ignores_range: bool = False
    status: int | None = None


class HubStandIn:
    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.faults: dict[str, list[Fault]] = {}  # by the file's path in its repository; each is used once
        self.api_answer: tuple[int, bytes] | None = None  # instead of every listing
        self.closing = threading.Event()
        self.servers = []
        for name in ("hub", "cdn"):
            handler = type("Handler", (_Handler,), {"stand_in": self, "name": name})
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            self.servers.append(server)
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers)

    def reset(self) -> None:
        self.requests.clear()
        self.faults.clear()
        self.api_answer = None

    def close(self) -> None:
        self.closing.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def fetched(self) -> list[tuple[str, str]]:
        """(repository, path) of every body that was asked for, in order."""
        # A large file's GET is seen twice: the hub sends it on to the CDN.
        is_body = {"hub": lambda path: not path.endswith(LARGE), "cdn": lambda path: True}
        return [
            (request.repo, request.path)
            for request in self.requests
            if request.method == "GET" and request.path != "api" and is_body[request.server](request.path)
        ]

    def ranges(self, path: str) -> list[str | None]:
        """The Range headers with which a large file was asked for."""
        return [request.range for request in self.requests if request.server == "cdn" and request.path == path]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms between its headers and its body
    stand_in: HubStandIn
    name: str

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        try:
            self._answer()
        except OSError:  # the client has gone
            self.close_connection = True

    def _answer(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        is_api = parts[0] == "api"
        repo_name = "/".join(parts[2:4] if is_api else parts[:2])
        path = "api" if is_api else "/".join(parts[4:])
        self.stand_in.requests.append(
            Request(self.name, self.command, path, repo_name, self.headers["Range"], token),
        )
        repo = self.stand_in.repos.get(repo_name)
        if repo is None:
            # Who has no token is not told whether a repository exists.
            self._send(404 if token else 401, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif is_api:
            status, body = self.stand_in.api_answer or (200, self._listing(repo_name, repo))
            self._send(status, body, {"Content-Type": "application/json"})
        elif self.name == "hub" and repo.gated and token != TOKEN:
            self._send(403 if token else 401, b"Access is restricted", {"X-Error-Code": "GatedRepo"})
        elif parts[3] != repo.commit or path not in repo.files:
            self._send(404, b"Entry not found", {"X-Error-Code": "EntryNotFound"})
        else:
            self._send_file(repo_name, repo, path)

    def _listing(self, name: str, repo: Repo) -> bytes:
        siblings = []
        for path, content in repo.files.items():
            sibling: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": git_sha1(content)}
            if path.endswith(LARGE):
                sibling["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 135}
            siblings.append(sibling)
        gated = "auto" if repo.gated else False
        info = {"id": name, "modelId": name, "sha": repo.commit, "gated": gated, "private": False, "siblings": siblings}
        return json.dumps(info).encode()

    def _send_file(self, repo_name: str, repo: Repo, path: str) -> None:
        content = repo.files[path]
        large = path.endswith(LARGE)
        headers = {"X-Repo-Commit": repo.commit, "ETag": f'"{git_sha1(content)}"', "Accept-Ranges": "bytes"}
        if large and self.name == "hub":
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{sha256(content)}"'}
            self._send(302, b"", headers | {"Location": f"{self.stand_in.cdn_url}{self.path}"})
            return
        faults = self.stand_in.faults.get(path, []) if self.command == "GET" else []
        fault = faults.pop(0) if faults else Fault()
        content = content if fault.content is None else fault.content
        status, body = 200, content
        if self.headers["Range"] and not fault.ignores_range:
            begin, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
            body = content[int(begin) : int(end) + 1 if end else None]
            headers["Content-Range"] = f"bytes {begin}-{int(begin) + len(body) - 1}/{len(content)}"
            status = 206
        if fault.status is not None:
            status, body = fault.status, b"no"
        self._send(status, body, headers, fault)

    def _send(self, status: int, body: bytes, headers: dict[str, str], fault: Fault | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = fault is not None and fault.sends is not None
        self.wfile.write(body[: fault.sends] if fault is not None and cut else body)
        if fault is not None:
            self.wfile.flush()
            fault.then()
            self.close_connection = self.close_connection or cut


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def safetensors(seed: str, size: int = 256) -> bytes:
    """A file with one small tensor; other seeds make other contents."""
    values = random.Random(seed).randbytes(size)
    header = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + values


def tree(repo: str, *paths: str) -> Repo:
    """A repository with these files, each with contents of its own."""
    files = {}
    for path in (".gitattributes", "README.md", *paths):
        seed = f"{repo}/{path}"
        files[path] = safetensors(seed) if path.endswith(LARGE) else json.dumps({"this is": seed}).encode()
    return Repo(files)


def published_repositories() -> dict[str, Repo]:
    """Every repository that a config or the shared parts come from, with what else lies in them."""
    dits = {
        "T2V-Lite-sft-5s": "kandinsky5lite_t2v_sft_5s",
        "T2V-Lite-sft-10s": "kandinsky5lite_t2v_sft_10s",
        "T2V-Lite-pretrain-5s": "kandinsky5lite_t2v_pretrain_5s",
        "T2V-Lite-pretrain-10s": "kandinsky5lite_t2v_pretrain_10s",
        "T2V-Lite-nocfg-5s": "kandinsky5lite_t2v_nocfg_5s",
        "T2V-Lite-nocfg-10s": "kandinsky5lite_t2v_nocfg_10s",
        "T2V-Lite-distilled16steps-5s": "kandinsky5lite_t2v_distilled16steps_5s",
        "T2V-Lite-distilled16steps-10s": "kandinsky5lite_t2v_distilled16steps_10s",
        "I2V-Lite-5s": "kandinsky5lite_i2v_5s",
        "T2I-Lite": "kandinsky5lite_t2i",
        "I2I-Lite": "kandinsky5lite_i2i",
        "T2V-Pro-sft-5s": "kandinsky5pro_t2v_sft_5s",
        "T2V-Pro-sft-10s": "kandinsky5pro_t2v_sft_10s",
        "I2V-Pro-sft-5s": "kandinsky5pro_i2v_sft_5s",
        "T2V-Pro-pretrain-5s": "kandinsky5pro_t2v_pretrain_5s",
        "T2V-Pro-pretrain-10s": "kandinsky5pro_t2v_pretrain_10s",
    }
    repos = {}
    for name, file in dits.items():
        repo = f"kandinskylab/Kandinsky-5.0-{name}"
        repos[repo] = tree(repo, f"model/{file}.safetensors", f"model/{file}.bin", "assets/demo.mp4", "LICENSE")

    vae = ("vae/config.json", "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin")
    shards = [f"transformer/diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    encoders = ("text_encoder/model.safetensors", "text_encoder_2/model.safetensors", "tokenizer/tokenizer.json")
    others = ("model_index.json", "scheduler/scheduler_config.json", *shards, *encoders)
    index = "transformer/diffusion_pytorch_model.safetensors.index.json"
    in_diffusers = ("transformer/config.json", index, *vae, *others)
    for name in ("T2V-Pro-distilled-5s", "I2V-Pro-distilled-5s", "T2I-Lite-pretrain", "I2I-Lite-pretrain"):
        repo = f"kandinskylab/Kandinsky-5.0-{name}-Diffusers"
        repos[repo] = tree(repo, *in_diffusers)
        weight_map = {f"tensor.{i}": Path(shard).name for i, shard in enumerate(shards)}
        repos[repo].files[index] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    repo = "hunyuanvideo-community/HunyuanVideo"
    repos[repo] = tree(repo, *vae, *others)
    repo = "black-forest-labs/FLUX.1-dev"
    repos[repo] = tree(repo, *vae, *others, "ae.safetensors", "flux1-dev.safetensors", "LICENSE.md", "grid.png")
    repos[repo].gated = True

    tokenizer = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
    repo = "Qwen/Qwen2.5-VL-7B-Instruct"
    qwen_shards = [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    index = "model.safetensors.index.json"
    settings = ("config.json", "generation_config.json", "preprocessor_config.json", "chat_template.json")
    repos[repo] = tree(repo, *settings, *tokenizer, *qwen_shards, index, "LICENSE")
    weight_map = {f"tensor.{i}": shard for i, shard in enumerate(qwen_shards)}
    repos[repo].files[index] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    repo = "openai/clip-vit-large-patch14"
    weights = ("model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack")
    settings = ("config.json", "preprocessor_config.json", "special_tokens_map.json")
    repos[repo] = tree(repo, *weights, *settings, *tokenizer)
    return repos


@contextmanager
def running_hub() -> Iterator[HubStandIn]:
    hub = HubStandIn()
    try:
        yield hub
    finally:
        hub.close()


def point_client_at(url: str, patch: pytest.MonkeyPatch, home: Path) -> None:
    """What HF_ENDPOINT=url does in a fresh process, here in this one; and nobody's own token is used."""
    constants = huggingface_hub.constants
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "ENDPOINT", url)
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
        patch.setattr(constants, name, str(home / "no_token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)


def client_environment(url: str, home: Path) -> dict[str, str]:
    """The variables with which another process talks to this hub, and to no other."""
    return {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": "", "no_proxy": "127.0.0.1", "PYTHONUNBUFFERED": "1"}
