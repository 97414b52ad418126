"""test.py --download: the tiny model, published as the large ones are, fetched from a hub on this machine and run."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save

from tests.hub_stand_in import HubStandIn, Repo, point_client_at, running_hub

REPOSITORY = Path(__file__).resolve().parents[2]
DIT_REPO = "kandinskylab/Kandinsky-5.0-T2V-Tiny"
QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"


@pytest.fixture
def hub(tiny: Path) -> Iterator[HubStandIn]:
    def files(folder: str, prefix: str = "") -> dict[str, bytes]:
        return {prefix + file.name: file.read_bytes() for file in (tiny / folder).iterdir()}

    qwen = files("text_encoder")
    tensors = load_file(tiny / "text_encoder" / "model.safetensors")
    del qwen["model.safetensors"]
    weight_map = {}
    for shard, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        file = f"model-0000{shard}-of-00002.safetensors"
        qwen[file] = save({name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    qwen["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    qwen |= {"generation_config.json": b"{}", "preprocessor_config.json": b"{}"}

    with running_hub() as hub:
        hub.repos = {
            DIT_REPO: Repo(files("model", "model/")),
            "hunyuanvideo-community/HunyuanVideo": Repo(files("vae", "vae/")),
            QWEN: Repo(qwen),
            "openai/clip-vit-large-patch14": Repo(files("text_encoder2")),
        }
        yield hub


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The tiny config with paths and a repository like those of the published models."""
    text = (REPOSITORY / "configs" / "config_tiny_t2v.yaml").read_text(encoding="utf-8")
    text = text.replace("./assets/tiny/t2v/", "./weights/")
    text = text.replace("  num_steps: 16\n", f"  num_steps: 1\n  hub_repo: {DIT_REPO}\n")
    path = tmp_path / "configs" / "config_5s_tiny.yaml"
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_missing_is_fetched_and_then_it_runs(hub, config, cli, tmp_path, monkeypatch, capsys, caplog):
    weights, picture = tmp_path / "the weights", tmp_path / "a.png"
    arguments = ["--config", str(config), "--prompt", "a red circle", "--video_duration", "0", "--seed", "1"]
    arguments += ["--output_filename", str(picture), "--cache_dir", str(weights)]
    assert cli.main(arguments) == 2
    assert "--download does it too" in capsys.readouterr().err

    point_client_at(hub.url, monkeypatch, tmp_path)
    caplog.set_level(logging.INFO)
    assert cli.main([*arguments, "--download"]) == 0
    assert {repo for repo, _ in hub.fetched()} == set(hub.repos)
    assert f"{DIT_REPO}: 1 file, 8.4 MB -> {weights}/model" in caplog.messages
    assert capsys.readouterr().out == f"{picture}\n"  # what is said about the download is not in the way of a script
    first = picture.read_bytes()
    picture.unlink()

    point_client_at("http://127.0.0.1:9", monkeypatch, tmp_path)
    assert cli.main([*arguments, "--download"]) == 0  # nothing is missing: nobody is asked
    assert picture.read_bytes() == first
    (weights / "text_encoder" / "model-00002-of-00002.safetensors").unlink()
    capsys.readouterr()
    assert cli.main([*arguments, "--download"]) == 2
    assert "the connection to http://127.0.0.1:9 for Qwen/" in capsys.readouterr().err


def test_the_token_goes_along(hub, config, cli, tmp_path, monkeypatch, capsys):
    hub.repos[DIT_REPO].gated = True
    point_client_at(hub.url, monkeypatch, tmp_path)
    arguments = ["--config", str(config), "--prompt", "a red circle", "--cache_dir", str(tmp_path / "weights")]
    assert cli.main([*arguments, "--download", "--hf_token", "hf_of_somebody_else"]) == 2
    error = capsys.readouterr().err
    assert f"{DIT_REPO} is only for those who accept its licence (403: " in error
    assert "hf_of_somebody_else" in {request.token for request in hub.requests}
    assert not hub.fetched()


def test_a_model_of_this_repository_needs_no_hub(cli, tmp_path, monkeypatch):
    point_client_at("http://127.0.0.1:9", monkeypatch, tmp_path)
    config = REPOSITORY / "configs" / "config_tiny_t2v.yaml"
    arguments = ["--config", str(config), "--prompt", "a red circle", "--video_duration", "0", "--download"]
    assert cli.main([*arguments, "--sample_steps", "1", "--output_filename", str(tmp_path / "a.png")]) == 0
