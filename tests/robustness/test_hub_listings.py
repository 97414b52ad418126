"""What a hub lists is what a stranger says: nothing is written but what was looked for, where it was to be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from huggingface_hub import HfApi

from kandinsky.checkpoints import hub
from kandinsky.config.reading import load_config
from tests.hub_stand_in import HubStandIn, Repo, point_client_at, published_repositories, running_hub
from tests.robustness.fuzzing import NASTY_VALUES, assert_clear, clearly_refused, fuzz, spoiled_json

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"
EVIL = "model-/../../../victim/evil.safetensors"


@pytest.fixture(scope="module")
def server() -> Iterator[HubStandIn]:
    with running_hub() as server:
        yield server


@pytest.fixture
def stand_in(server: HubStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HubStandIn:
    server.reset()
    server.repos = published_repositories()
    point_client_at(server.url, monkeypatch, tmp_path)
    return server


def source(folder: Path) -> hub.Source:
    return hub.Source(*hub.QWEN, folder / "weights" / "text_encoder")


def listing(stand_in: HubStandIn) -> dict[str, Any]:
    """What the stand-in says of Qwen."""
    info = HfApi(endpoint=stand_in.url).model_info(QWEN, files_metadata=True)
    siblings = [
        {"rfilename": one.rfilename, "size": one.size, "blobId": one.blob_id}
        | ({"lfs": {"sha256": one.lfs.sha256, "size": one.lfs.size, "pointerSize": 1}} if one.lfs else {})
        for one in info.siblings or []
    ]
    return {"id": QWEN, "modelId": QWEN, "sha": info.sha, "gated": False, "private": False, "siblings": siblings}


def test_fuzz_listings(stand_in: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file that would be fetched has a plain name, a place in its source's folder, a size and a checksum."""
    whole = listing(stand_in)
    wanted = source(tmp_path)
    assert {file.target.name for file in hub.list_files(wanted)} >= {"config.json", "model-00003-of-00005.safetensors"}
    nasty = (
        *NASTY_VALUES, EVIL, "/model-1.safetensors", "model-\\..\\x.safetensors", "../config.json", "a" * 40, "f" * 64,
        "model-\0.safetensors", "../" * 13 + "x", "model-x/y.safetensors", {"sha256": "0" * 64, "size": 1},
    )  # fmt: skip

    def case(rng: Random) -> None:
        stand_in.api_answer = (rng.choice((200,) * 9 + (500,)), spoiled_json(rng, whole, nasty))
        stand_in.requests.clear()
        for file in hub.list_files(wanted):
            assert file.target.parent == file.partial.parent == wanted.target
            assert file.target.name == file.path and "/" not in file.target.name
            assert isinstance(file.size, int) and file.size >= 0
            assert len(file.checksum) in (40, 64) and len(file.commit) in (40, 64)

    fuzz(case)


@pytest.mark.parametrize(
    "evil", [EVIL, "model-/../x.safetensors", "model-\\..\\..\\x.safetensors", "model-a/b.safetensors"]
)
def test_nothing_outside_of_its_folder(evil: str, stand_in: HubStandIn, tmp_path: Path) -> None:
    """The other files are fetched, and nothing else appears anywhere."""
    repo = stand_in.repos[QWEN]
    stand_in.repos[QWEN] = Repo({evil: b"evil", **repo.files})
    wanted = source(tmp_path)
    (tmp_path / "victim").mkdir()
    hub.download([wanted], tmp_path / "weights", say=lambda line: None)
    found = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert all(path.parent == Path("weights/text_encoder") or path.name == ".download.lock" for path in found)
    assert (wanted.target / "model-00001-of-00005.safetensors").read_bytes() == repo.files[
        "model-00001-of-00005.safetensors"
    ]
    assert not any(request.path == evil for request in stand_in.requests)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"[" * 200_000, "does not answer as a hub does"),
        (b"null", "does not answer as a hub does"),
        (b"5", "does not answer as a hub does"),
        (b'{"id": "x"}', "does not answer as a hub does"),
        (b'{"id": "x", "siblings": 5}', "does not answer as a hub does"),
        (b"<html>log in</html>", "does not answer as a hub does"),
        (b"\xff\xfe", "does not answer as a hub does"),
    ],
)
def test_answers_of_somebody_else(answer: bytes, says: str, stand_in: HubStandIn, tmp_path: Path) -> None:
    stand_in.api_answer = (200, answer)
    message = clearly_refused(lambda: hub.list_files(source(tmp_path)))
    assert message is not None and says in message


@pytest.mark.parametrize("checksum", ["../../../../x", "", "0" * 39, "g" * 40, None, 5])
def test_checksums_that_are_none(checksum: Any, stand_in: HubStandIn, tmp_path: Path) -> None:
    """They become a part of a file's name."""
    answer = listing(stand_in)
    for one in answer["siblings"]:
        if one["rfilename"] == "config.json":
            one["blobId"] = checksum
    stand_in.api_answer = (200, json.dumps(answer).encode())
    with pytest.raises(hub.DownloadError, match=f"lists no size and checksum of {QWEN}/config.json: take another hub"):
        hub.list_files(source(tmp_path))


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"ALL_PROXY": "socks5h://127.0.0.1:9"}, "the proxy in ALL_PROXY, HTTPS_PROXY or HTTP_PROXY is of a kind"),
        ({"ALL_PROXY": "gopher://127.0.0.1:9"}, "Unknown scheme for proxy URL"),
        ({"SSL_CERT_FILE": "/nowhere/cert.pem"}, "certificates can't be read .* SSL_CERT_FILE"),
        ({"SSL_CERT_FILE": __file__}, "certificates can't be read or are not accepted .* SSL_CERT_FILE"),
    ],
)
def test_what_variables_ask_of_the_client(
    variables: dict[str, str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kind of proxy that needs another package, certificates that are not there: a line, and not about the disk."""
    from huggingface_hub.utils import close_session

    point_client_at("https://127.0.0.1:9", monkeypatch, tmp_path)
    for name in (
        "ALL_PROXY",
        "all_proxy",
        "HTTPS_PROXY",
        "https_proxy",
        "HTTP_PROXY",
        "http_proxy",
        "NO_PROXY",
        "no_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    close_session()  # a client that there is has read them
    try:
        with pytest.raises(hub.DownloadError, match=says) as error:
            hub.list_files(source(tmp_path))
    finally:
        close_session()
    assert_clear(str(error.value))
    assert "cannot write" not in str(error.value)


def test_a_cache_of_nobody() -> None:
    config = load_config(CONFIGS / "config_5s_sft.yaml")
    with pytest.raises(ValueError, match="there is no user 'nosuchuser'"):
        hub.sources(config, "~nosuchuser/weights")
