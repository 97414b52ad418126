"""download_models.py as a person runs it, against a hub on this machine that is asked over real HTTP."""

import fcntl
import functools
import hashlib
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import file_download
from huggingface_hub.utils import WeakFileLock

from kandinsky.checkpoints import hub
from kandinsky.checkpoints.files import find_weights, resolve_path
from kandinsky.config.reading import load_config
from tests.hub_stand_in import (
    TOKEN,
    Fault,
    HubStandIn,
    Repo,
    client_environment,
    point_client_at,
    published_repositories,
    running_hub,
    safetensors,
)
from tests.limits import PATIENCE

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import download_models  # noqa: E402

DIT_REPO, DIT = "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s", "model/kandinsky5lite_t2v_sft_5s.safetensors"
QWEN, CLIP = "Qwen/Qwen2.5-VL-7B-Instruct", "openai/clip-vit-large-patch14"
FLUX, VAE_REPO = "black-forest-labs/FLUX.1-dev", "hunyuanvideo-community/HunyuanVideo"
NAMES = sorted(path.stem.removeprefix("config_") for path in (REPOSITORY / "configs").glob("config_*.yaml"))
NAMES = [name for name in NAMES if not name.startswith("tiny")]

ENCODERS = {
    *(f"text_encoder/model-0000{i}-of-00005.safetensors" for i in range(1, 6)),
    *(f"text_encoder/{name}.json" for name in ("config", "generation_config", "preprocessor_config")),
    *(f"text_encoder/{name}.json" for name in ("tokenizer", "tokenizer_config", "model.safetensors.index")),
    *(f"text_encoder2/{name}.json" for name in ("config", "tokenizer", "tokenizer_config")),
    "text_encoder2/model.safetensors",
}


@pytest.fixture(scope="module")
def server() -> Iterator[HubStandIn]:
    with running_hub() as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def configs_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "known_models", functools.cache(hub.known_models))
        yield


@pytest.fixture
def stand_in(server: HubStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HubStandIn:
    server.reset()
    server.repos = published_repositories()
    point_client_at(server.url, monkeypatch, tmp_path)
    return server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "weights"


@pytest.fixture
def run(stand_in: HubStandIn, folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Run the command with `--cache_dir folder`; an error is always one line."""

    def run(*arguments: str, cache_dir: Path = folder) -> SimpleNamespace:
        code = download_models.main([*arguments, "--cache_dir", str(cache_dir)])
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("error:")]
        assert len(errors) == (code in (1, 2)), err
        return SimpleNamespace(code=code, out=out, error="".join(errors))

    return run


def in_diffusers_layout(transformer: str) -> set[str]:
    """What is fetched of a repository in diffusers' layout."""
    stem = f"{transformer}diffusion_pytorch_model"
    shards = {f"{stem}-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    scheduler = transformer.replace("transformer/", "scheduler/scheduler_config.json")
    return shards | {f"{transformer}config.json", f"{stem}.safetensors.index.json", scheduler}


def files_in(folder: Path) -> set[str]:
    """Every file but the lock."""
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return paths - {".download.lock"}


# --- which files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_model_gets_the_files_that_its_config_names_and_no_more(stand_in, run, folder, name):
    assert run("--models", name, "--hf_token", TOKEN).code == 0
    config = load_config(REPOSITORY / "configs" / f"config_{name}.yaml")
    vae = "flux/vae" if config.task in ("t2i", "i2i") else "vae"
    dit = config.model.checkpoint_path.removeprefix("./weights/")
    in_diffusers = str(config.model.hub_repo).endswith("-Diffusers")
    assert files_in(folder) == ENCODERS | {
        *(in_diffusers_layout(dit) if in_diffusers else {dit}),
        f"{vae}/config.json",
        f"{vae}/diffusion_pytorch_model.safetensors",
    }
    assert len(stand_in.fetched()) == len(files_in(folder))

    encoders = config.model.text_embedder
    for path, repo, count in (
        (config.model.checkpoint_path, config.model.hub_repo, 3 if in_diffusers else 1),
        (config.model.vae.checkpoint_path, FLUX if vae == "flux/vae" else VAE_REPO, 1),
        (encoders.qwen.checkpoint_path, QWEN, 5),
        (encoders.clip.checkpoint_path, CLIP, 1),
    ):
        weights = find_weights(resolve_path(path, config, folder))
        assert len(weights) == count
        for file in weights:
            assert file.is_relative_to(folder)
            assert file.read_bytes() in stand_in.repos[repo].files.values()
    assert hub.sources(config, folder, only_missing=True) == []


def test_all_models_share_what_they_share(stand_in, run, folder):
    done = run("--models", "all", "--hf_token", TOKEN)
    assert done.code == 0
    fetched = stand_in.fetched()
    # Both VAEs; 16 files for 21 models, and 4 repositories of 6 files for the 6 that are in diffusers' layout.
    assert len(fetched) == len(set(fetched)) == len(ENCODERS) + 2 * 2 + 16 + 4 * 6
    assert len({repo for repo, _ in fetched}) == 24
    assert done.out.count(QWEN) == 1


def test_without_names_it_is_the_first_model(stand_in, run):
    done = run()
    assert done.code == 0
    assert (DIT_REPO, DIT) in stand_in.fetched()
    assert "configs/config_5s_sft.yaml" in done.out and "--image" not in done.out


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("5s_sft", ["5s_sft"]),
        ("t2i, 5s_i2v_pro_hd,t2i", ["t2i", "5s_i2v_pro_hd"]),
        ("kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s", ["5s_sft"]),
        ("Kandinsky-5.0-I2I-Lite", ["i2i"]),
        ("kandinskylab/kandinsky-5.0-t2v-pro-sft-10s", ["10s_t2v_pro"]),  # which serves the _hd config as well
        ("configs/config_10s_distil.yaml", ["10s_distil"]),
        ("all", NAMES),
    ],
)
def test_names(words, names):
    assert hub.choose(words, hub.known_models()) == names


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("5s_destil", "5s_distil"),
        ("kandinskylab/Kandinsky-5.0-T2V-Lite-sft-6s", "5s_sft"),
        ("kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers", "5s_sft"),
        ("tiny_t2v", "t2v"),
        ("???", "10s_t2v_pro_hd"),
    ],
)
def test_an_unknown_name_is_told_with_those_that_are_near(stand_in, run, word, near):
    done = run("--models", f"5s_sft,{word}")
    assert done.code == 2
    assert repr(word) in done.error and near in done.error.split("did you mean")[1]
    assert not stand_in.requests


def test_the_nearest_three_are_suggested(stand_in, run):
    done = run("--models", "nope")
    names = re.fullmatch(r"error: unknown model 'nope': did you mean (\S+), (\S+) or (\S+)\? .*", done.error.strip())
    assert done.code == 2 and names is not None and set(names.groups()) <= set(hub.known_models())
    assert len(set(names.groups())) == 3


def test_an_empty_choice_is_an_error(run):
    done = run("--models", ",")
    assert done.code == 2 and "5s_sft" in done.error


def test_the_list_asks_nobody_and_knows_what_is_there(stand_in, run):
    def listed() -> dict[str, str]:
        return {line.split()[0]: line for line in run("--models", "list").out.splitlines()}

    before = listed()
    assert sorted(before) == sorted([*NAMES, "taehv", "taef1"])
    assert "2.0 B" in before["5s_sft"] and "19.3 B" in before["5s_i2v_pro_hd"] and "6.0 B" in before["t2i"]
    assert not stand_in.requests and not any("downloaded" in line for line in before.values())
    run("--models", "5s_t2v_pro")
    after = [name for name, line in listed().items() if "downloaded" in line]
    assert after == ["5s_t2v_pro", "5s_t2v_pro_hd"]


def test_tiny_decoders_come_from_where_they_are(stand_in, run, folder, monkeypatch):
    """One from another host, by its sha256 and without the hub's token; one from the hub."""
    content = safetensors("taehv")
    stand_in.repos = {
        **stand_in.repos,
        "madebyollin/taef1": Repo({name: b"{}" for name in hub.VAE_FILES}),
        "else/where": Repo({"taehv.safetensors": content}),
    }
    commit = stand_in.repos["else/where"].commit
    monkeypatch.setattr(hub, "TAEHV_URL", f"{stand_in.cdn_url}/else/where/resolve/{commit}/taehv.safetensors")
    monkeypatch.setattr(hub, "TAEHV_SIZE", len(content))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    wrong = run("--models", "taehv")
    assert wrong.code == 1 and "checksum" in wrong.error and not (folder / "taehv" / "taehv.safetensors").exists()
    monkeypatch.setattr(hub, "TAEHV_SHA256", hashlib.sha256(content).hexdigest())
    stand_in.requests.clear()
    done = run("--models", "TAEHV,taef1")
    assert done.code == 0 and "Try:" not in done.out and "github.com/madebyollin/taehv" in done.out
    assert (folder / "taehv" / "taehv.safetensors").read_bytes() == content
    assert files_in(folder) == {"taehv/taehv.safetensors", *(f"taef1/{name}" for name in hub.VAE_FILES)}
    assert [request.token for request in stand_in.requests if request.repo == "else/where"] == [None]
    lines = {line.split()[0]: line for line in run("--models", "list").out.splitlines()}
    assert "(downloaded)" in lines["taehv"] and "(downloaded)" in lines["taef1"]
    assert "9.8 M parameters" in lines["taehv"] and "1.2 M parameters" in lines["taef1"]


def test_sizes_are_told_and_a_dry_run_fetches_nothing(stand_in, run, folder):
    listing = huggingface_hub.HfApi.model_info

    def large(self, repo, **options):  # one file as large as on the real hub
        info = listing(self, repo, **options)
        for sibling in info.siblings:
            if sibling.rfilename == DIT:
                sibling.lfs.size = 8_030_000_000
        return info

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.HfApi, "model_info", large)
        patch.setattr(hub.shutil, "disk_usage", lambda path: SimpleNamespace(free=100e9))
        done = run("--dry_run")
    assert done.code == 0
    assert f"{DIT_REPO}: 1 file, 8.0 GB -> {folder}/model\n" in done.out
    assert f"to download: 8.0 GB; free in {folder.parent}: 100.0 GB" in done.out
    assert not stand_in.fetched() and not folder.exists()


def test_help_loads_nothing_heavy():
    code = (
        "import sys, download_models\n"
        "try: download_models.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'huggingface_hub', 'omegaconf'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, capture_output=True, text=True)
    assert "5s_sft" in done.stdout


# --- what is there already --------------------------------------------------------------------------------------------


def test_complete_files_are_not_fetched_again(stand_in, run, folder):
    assert run().code == 0
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    stand_in.reset()
    done = run()
    assert done.code == 0 and "nothing to download" in done.out
    assert not stand_in.fetched()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")} == before

    (folder / "text_encoder" / "model-00003-of-00005.safetensors").unlink()
    with (folder / "vae" / "diffusion_pytorch_model.safetensors").open("ab") as file:
        file.write(b"x")
    done = run()
    assert stand_in.fetched() == [
        (VAE_REPO, "vae/diffusion_pytorch_model.safetensors"),
        (QWEN, "model-00003-of-00005.safetensors"),
    ]
    assert "bytes of it is there" in done.out or "KB of it is there" in done.out


def test_verify_finds_damage_of_the_same_size(stand_in, run, folder):
    assert run().code == 0
    right = {}
    for name in (DIT, "text_encoder/config.json"):
        right[name] = (folder / name).read_bytes()
        (folder / name).write_bytes(right[name][:-1] + bytes([right[name][-1] ^ 1]))
    stand_in.reset()
    run()
    assert not stand_in.fetched()
    assert run("--verify").code == 0
    assert stand_in.fetched() == [(DIT_REPO, DIT), (QWEN, "config.json")]
    assert {name: (folder / name).read_bytes() for name in right} == right


def test_a_new_version_of_another_size_replaces_the_old_one_and_its_parts(stand_in, run, folder):
    assert run().code == 0
    old_part = folder / f"{DIT}.0123456789ab.incomplete"
    old_part.touch()
    new = safetensors("another", 300)
    stand_in.repos[DIT_REPO].files[DIT] = new
    assert run().code == 0
    assert (folder / DIT).read_bytes() == new
    assert not old_part.exists()


def test_a_folder_with_spaces_and_other_letters(run, tmp_path):
    folder = tmp_path / "мои веса" / "Gewichte ü" / "重み [1]"
    done = run(cache_dir=folder)
    assert done.code == 0 and f"--cache_dir '{folder}'" in done.out
    assert len(files_in(folder)) == len(ENCODERS) + 3


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_steps(monkeypatch):
    """The client writes every 64 bytes, and does not wait between its attempts."""
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 64)
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))


def test_a_broken_connection_is_resumed(stand_in, run, folder, small_steps):
    stand_in.faults[DIT] = [Fault(sends=130), Fault(sends=70)]
    assert run().code == 0
    assert stand_in.ranges(DIT) == [None, "bytes=128-", "bytes=192-"]
    assert (folder / DIT).read_bytes() == stand_in.repos[DIT_REPO].files[DIT]


def test_after_many_broken_connections_a_rerun_goes_on(stand_in, run, folder, small_steps):
    stand_in.faults[DIT] = [Fault(sends=130), *[Fault(sends=0) for _ in range(6)]]
    done = run()
    assert done.code == 1 and "same command goes on" in done.error
    (part,) = (folder / "model").iterdir()
    assert part.name.endswith(".incomplete") and part.stat().st_size == 128

    stand_in.requests.clear()
    stand_in.faults.clear()
    assert run().code == 0
    assert stand_in.ranges(DIT) == ["bytes=128-"]
    assert files_in(folder / "model") == {Path(DIT).name}
    assert (folder / DIT).read_bytes() == stand_in.repos[DIT_REPO].files[DIT]


def test_a_server_that_ignores_ranges_sends_it_all_again(stand_in, run, folder, small_steps):
    stand_in.faults[DIT] = [Fault(sends=130), Fault(ignores_range=True)]
    assert run().code == 0
    assert (folder / DIT).read_bytes() == stand_in.repos[DIT_REPO].files[DIT]


def test_a_part_that_is_too_long_is_dropped(stand_in, run, folder):
    (file,) = hub.list_files(hub.sources(hub.known_models()["5s_sft"], folder)[1])
    file.partial.parent.mkdir(parents=True)
    file.partial.write_bytes(b"x" * (file.size + 1))
    assert run().code == 0
    assert stand_in.ranges(DIT) == [None]
    assert (folder / DIT).read_bytes() == stand_in.repos[DIT_REPO].files[DIT]


def test_a_file_too_large_for_one_answer_comes_in_segments(stand_in, run, folder, small_steps, monkeypatch):
    monkeypatch.setattr(hub, "SEGMENT", 128)
    monkeypatch.setattr(huggingface_hub.constants, "MAX_HTTP_DOWNLOAD_SIZE", 150)
    size = len(stand_in.repos[DIT_REPO].files[DIT])
    assert 256 < size < 384
    stand_in.faults[DIT] = [Fault(), Fault(sends=70), *[Fault(sends=0) for _ in range(6)]]
    assert run().code == 1
    assert stand_in.ranges(DIT)[:3] == ["bytes=0-127", "bytes=128-255", "bytes=192-255"]
    stand_in.requests.clear()
    stand_in.faults.clear()
    assert run().code == 0
    assert stand_in.ranges(DIT) == ["bytes=192-255", f"bytes=256-{size - 1}"]
    assert (folder / DIT).read_bytes() == stand_in.repos[DIT_REPO].files[DIT]


def test_ctrl_c(stand_in, run, folder, small_steps):
    main = threading.main_thread().ident
    assert main is not None

    def press() -> None:
        time.sleep(0.5)  # what was sent has arrived
        signal.pthread_kill(main, signal.SIGINT)
        stand_in.closing.wait(1)

    stand_in.faults[DIT] = [Fault(sends=200, then=press)]
    done = run()
    assert done.code == 130
    assert "the same command goes on" in done.out.splitlines()[-1]
    (part,) = (folder / "model").iterdir()
    assert part.stat().st_size == 192
    assert run().code == 0
    assert stand_in.ranges(DIT) == [None, "bytes=192-"]


def test_a_killed_process_loses_nothing_that_was_written(stand_in, run, folder, tmp_path):
    """The connection breaks, the client goes on by itself, then the process is killed; the next one goes on."""
    step = 10 * 2**20  # what the client writes at once
    content = safetensors("large", 3 * step)
    stand_in.repos[DIT_REPO].files[DIT] = content
    stalled = threading.Event()

    def stall() -> None:
        stalled.set()
        stand_in.closing.wait(PATIENCE)

    stand_in.faults[DIT] = [Fault(sends=step + 999), Fault(sends=step + 999, then=stall)]
    command = [sys.executable, "download_models.py", "--cache_dir", str(folder)]
    environment = os.environ | client_environment(stand_in.url, tmp_path)
    screen, terminal = pty.openpty()  # bars are for terminals only
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=terminal)
    try:
        assert stalled.wait(PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while sum(file.stat().st_size for file in (folder / "model").iterdir()) < 2 * step:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        shown = os.read(screen, 2**16).decode()
    finally:
        process.kill()
        process.communicate()
        os.close(terminal)
        os.close(screen)
    assert re.search(r"kandinsky5lite_t2v_sft_5s.safetensors: +(33%\|.* 10.5M|67%\|.* 21.0M)/31.5M ", shown)
    assert files_in(folder / "model") != {Path(DIT).name}
    assert stand_in.ranges(DIT) == [None, f"bytes={step}-"]

    stand_in.requests.clear()
    assert run().code == 0
    assert stand_in.ranges(DIT) == [f"bytes={2 * step}-"]
    assert (folder / DIT).read_bytes() == content


def test_two_at_once_take_turns(stand_in, run, folder):
    folder.mkdir()
    with WeakFileLock(folder / ".download.lock"):
        waiting = threading.Event()
        lines = []

        def say(line: str) -> None:
            lines.append(line)
            waiting.set()

        wanted = hub.sources(hub.known_models()["5s_sft"], folder)
        other = threading.Thread(target=hub.download, args=(wanted, folder), kwargs={"say": say}, daemon=True)
        other.start()
        assert waiting.wait(5)
        assert "waiting for it" in lines[0] and not stand_in.requests
    other.join(10)
    assert not other.is_alive() and len(stand_in.fetched()) == len(ENCODERS) + 3


# --- what can go wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repo", "path", "place"),
    [
        (DIT_REPO, DIT, DIT),  # sha256, as large files have
        (QWEN, "preprocessor_config.json", "text_encoder/preprocessor_config.json"),  # git's sha1
    ],
)
def test_damage_on_the_way_is_found_and_removed(stand_in, run, folder, repo, path, place):
    right = stand_in.repos[repo].files[path]
    stand_in.faults[path] = [Fault(content=right[:-1] + b"~")]
    done = run()
    assert done.code == 1
    assert f"{repo}/{path} arrived damaged" in done.error and "run the same command again" in done.error
    assert not (folder / place).exists() and not list(folder.rglob("*.incomplete"))
    assert run().code == 0
    assert (folder / place).read_bytes() == right


@pytest.mark.parametrize("token", [None, "hf_of_somebody_else"])
def test_a_gated_repository_is_explained_before_anything_is_fetched(stand_in, run, token):
    done = run("--models", "5s_sft,t2i", *(["--hf_token", token] if token else []))
    assert done.code == 1
    assert ("(403: " if token else "(401: ") in done.error
    for part in (f"https://huggingface.co/{FLUX},", "settings/tokens", "--hf_token", "HF_TOKEN"):
        assert part in done.error
    assert "hf_of" not in done.error + done.out
    assert not stand_in.fetched()
    # it matters only while something of it is missing
    assert run("--models", "5s_sft").code == 0


def test_the_token_comes_from_the_environment_too_and_stays_with_the_hub(stand_in, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = run("--models", "t2i")
    assert done.code == 0 and TOKEN not in done.out
    seen = {server: {r.token for r in stand_in.requests if r.server == server} for server in ("hub", "cdn")}
    assert seen == {"hub": {TOKEN}, "cdn": {None}}


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("hf_any", 404)])
def test_a_repository_that_is_not_there(stand_in, run, token, status):
    del stand_in.repos[DIT_REPO]
    done = run(*(["--hf_token", token] if token else []))
    assert done.code == 1
    assert f"has no {DIT_REPO}" in done.error and f"({status})" in done.error and "check the name" in done.error


def test_a_file_that_is_not_there_is_told_with_those_that_are_near(stand_in, run, folder):
    files = stand_in.repos[DIT_REPO].files
    files["model/kandinsky5lite_t2v_sft_5s_v2.safetensors"] = files.pop(DIT)
    done = run()
    assert done.code == 1
    assert f"{DIT_REPO} has no {DIT} (it has " in done.error
    assert "model/kandinsky5lite_t2v_sft_5s_v2.safetensors" in done.error
    assert not stand_in.fetched()


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (503, b"busy", "answers 503 for .*: try again later"),
        (429, b"slowly", "answers 429 for .*: try again later"),
        (200, b"<html>please sign in</html>", "does not answer as a hub does: .*login"),
    ],
)
def test_strange_answers(stand_in, run, status, body, expected):
    stand_in.api_answer = (status, body)
    done = run()
    assert done.code == 1
    assert re.search(expected, done.error)


def test_a_failing_file_server(stand_in, run):
    stand_in.faults[DIT] = [Fault(status=500)]
    done = run()
    assert done.code == 1 and "answers 500" in done.error and "goes on from there" in done.error
    assert run().code == 0


def test_no_network(stand_in, run, monkeypatch, tmp_path):
    point_client_at("http://127.0.0.1:9", monkeypatch, tmp_path)
    done = run()
    assert done.code == 1
    for part in ("the connection to http://127.0.0.1:9", "check the network", "HTTPS_PROXY", "HF_ENDPOINT"):
        assert part in done.error


def test_offline_mode(stand_in, run, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    done = run()
    assert done.code == 1 and "HF_HUB_OFFLINE" in done.error


def test_too_little_space_is_told_before_anything_starts(stand_in, run, folder, monkeypatch):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    done = run()
    assert done.code == 1
    assert f"not enough disk space in {folder}" in done.error and "1.0 KB are free" in done.error
    assert "--cache_dir" in done.error
    assert not stand_in.fetched()


def test_space_is_not_asked_for_what_has_arrived(stand_in, run, folder, small_steps, monkeypatch):
    stand_in.faults[DIT] = [Fault(sends=130), *[Fault(sends=0) for _ in range(6)]]
    assert run().code == 1
    files = hub.list_files(hub.sources(hub.known_models()["5s_sft"], folder)[1])
    rest = len(stand_in.repos[DIT_REPO].files[DIT]) - 128
    assert [file.missing_bytes for file in files] == [rest]
    others = sum(
        file.size for source in hub.sources(hub.known_models()["5s_sft"], folder)[2:] for file in hub.list_files(source)
    )
    stand_in.faults.clear()
    free = [rest + others - 1]
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    assert "make room for 1 bytes more" in run().error
    free[0] += 1
    assert run().code == 0


def test_every_disk_is_asked(stand_in, run, folder, tmp_path, monkeypatch):
    """A folder of the weights may be a link to another disk."""
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    folder.mkdir()
    target = other / f"test_{os.getpid()}_{tmp_path.name}"
    target.mkdir()
    try:
        (folder / "text_encoder").symlink_to(target)
        full = lambda path: SimpleNamespace(free=0 if Path(path).resolve() == target else 1e12)  # noqa: E731
        monkeypatch.setattr(hub.shutil, "disk_usage", full)
        assert f"not enough disk space in {folder}/text_encoder" in run().error
    finally:
        target.rmdir()


def test_a_disk_that_fills_up(stand_in, run, folder, small_steps):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (file,) = hub.list_files(hub.sources(hub.known_models()["5s_sft"], folder)[1])
    file.partial.parent.mkdir(parents=True)
    file.partial.symlink_to("/dev/full")
    done = run()
    assert done.code == 1 and "the disk is full" in done.error and "make room" in done.error


def test_a_folder_that_cannot_be(run, tmp_path):
    (tmp_path / "file").touch()
    done = run(cache_dir=tmp_path / "file" / "weights")
    assert done.code == 1 and "cannot write: " in done.error and str(tmp_path / "file") in done.error


# --- configs of one's own ---------------------------------------------------------------------------------------------


def test_only_what_is_missing(stand_in, run, folder, tmp_path):
    config = hub.known_models()["5s_sft"]
    assert [source.repo for source in hub.sources(config, folder)] == [VAE_REPO, DIT_REPO, QWEN, CLIP]
    assert run().code == 0
    (folder / "text_encoder" / "model-00002-of-00005.safetensors").unlink()
    (folder / DIT).write_bytes((folder / DIT).read_bytes()[:-1])  # truncated by something else
    assert [source.repo for source in hub.sources(config, folder, only_missing=True)] == [DIT_REPO, QWEN]


@pytest.mark.parametrize(
    "change", ["model.hub_repo=null", "model.checkpoint_path=/nowhere/x.safetensors", "model.vae.checkpoint_path=vae"]
)
def test_a_config_that_does_not_say_where_from(folder, change):
    config = load_config(REPOSITORY / "configs" / "config_5s_sft.yaml", [change])
    with pytest.raises(ValueError, match=r"config_5s_sft.yaml does not say where to download .* from: .*hub_repo"):
        hub.sources(config, folder)


def test_sizes():
    sizes = (0, 999, 1000, 168_000_000, 77_245_300_992)
    assert [hub.size_text(size) for size in sizes] == ["0 bytes", "999 bytes", "1.0 KB", "168.0 MB", "77.2 GB"]
