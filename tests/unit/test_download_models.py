"""download_models.py as a person runs it, with the hub replaced by a recorder."""

import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import download_models  # noqa: E402


@pytest.fixture
def hub(monkeypatch):
    """Records the calls and writes what a repository would have."""
    calls = []

    def snapshot_download(repo, *, allow_patterns, local_dir, token):
        calls.append((repo, tuple(allow_patterns), Path(local_dir), token))
        for pattern in allow_patterns:
            file = Path(local_dir) / pattern.replace("*", "weights")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_one_model_and_what_it_shares(hub, tmp_path, capsys):
    assert download_models.main(["--models", "5s_sft", "--cache_dir", str(tmp_path), "--hf_token", "secret"]) == 0
    assert [(repo, folder) for repo, _, folder, _ in hub] == [
        ("kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s", tmp_path),
        ("hunyuanvideo-community/HunyuanVideo", tmp_path),
        ("Qwen/Qwen2.5-VL-7B-Instruct", tmp_path / "text_encoder"),
        ("openai/clip-vit-large-patch14", tmp_path / "text_encoder2"),
    ]
    assert hub[0][1] == ("model/kandinsky5lite_t2v_sft_5s.safetensors",)
    assert all(pattern.startswith("vae/") for pattern in hub[1][1])
    assert {token for *_, token in hub} == {"secret"}
    output = capsys.readouterr()
    assert "secret" not in output.out + output.err
    assert "configs/config_5s_sft.yaml" in output.out


def test_never_a_pickle(hub, tmp_path):
    assert download_models.main(["--models", "all", "--cache_dir", str(tmp_path)]) == 0
    patterns = [pattern for _, patterns, _, _ in hub for pattern in patterns]
    assert patterns and all(pattern.endswith((".safetensors", ".json", ".txt")) for pattern in patterns)


def test_several_models_share_the_rest(hub, tmp_path):
    assert download_models.main(["--models", "5s_sft, 10s_distil,5s_sft", "--cache_dir", str(tmp_path)]) == 0
    repos = [repo for repo, *_ in hub]
    assert len(repos) == len(set(repos)) == 5
    assert "kandinskylab/Kandinsky-5.0-T2V-Lite-distilled16steps-10s" in repos


def test_files_land_where_the_configs_look(hub, tmp_path):
    from kandinsky.checkpoints import find_weights, resolve_path

    assert download_models.main(["--models", "10s_nocfg", "--cache_dir", str(tmp_path)]) == 0
    config = download_models.known_models()["10s_nocfg"]
    for path in (
        config.model.checkpoint_path,
        config.model.vae.checkpoint_path,
        config.model.text_embedder.qwen.checkpoint_path,
        config.model.text_embedder.clip.checkpoint_path,
    ):
        (file,) = find_weights(resolve_path(path, config, tmp_path))
        assert file.is_relative_to(tmp_path)


def test_list_names_every_model_that_can_be_downloaded(hub, capsys):
    assert download_models.main(["--models", "list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {f"{s}_{kind}" for s in ("5s", "10s") for kind in ("sft", "pretrain", "nocfg", "distil")} <= set(names)
    assert "tiny_t2v" not in names
    assert not hub


def test_unknown_name_is_one_line_and_exit_2(hub, capsys):
    assert download_models.main(["--models", "5s_sft,5s_destil"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "'5s_destil'" in error and "5s_distil" in error
    assert not hub


def test_empty_choice(hub, capsys):
    assert download_models.main(["--models", ","]) == 2
    assert "5s_sft" in capsys.readouterr().err


def test_what_the_hub_says_is_one_line_and_exit_1(monkeypatch, tmp_path, capsys):
    def offline(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert download_models.main(["--cache_dir", str(tmp_path)]) == 1
    assert "error: no route to host" in capsys.readouterr().err


def test_a_repository_without_the_file_is_an_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: None)
    assert download_models.main(["--cache_dir", str(tmp_path)]) == 1
    assert "has no file model/kandinsky5lite_t2v_sft_5s.safetensors" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = (
        "import sys, download_models\n"
        "try: download_models.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'huggingface_hub', 'omegaconf'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, capture_output=True, text=True)
    assert "5s_sft" in done.stdout
