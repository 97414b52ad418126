"""download_models.py as a person runs it, with the hub replaced by a recorder."""

import functools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import download_models  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def configs_read_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download_models, "known_models", functools.cache(download_models.known_models))
        yield


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
        ("hunyuanvideo-community/HunyuanVideo", tmp_path),
        ("kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s", tmp_path),
        ("Qwen/Qwen2.5-VL-7B-Instruct", tmp_path / "text_encoder"),
        ("openai/clip-vit-large-patch14", tmp_path / "text_encoder2"),
    ]
    assert hub[1][1] == ("model/kandinsky5lite_t2v_sft_5s.safetensors",)
    assert all(pattern.startswith("vae/") for pattern in hub[0][1])
    assert {token for *_, token in hub} == {"secret"}
    output = capsys.readouterr()
    assert "secret" not in output.out + output.err
    assert "configs/config_5s_sft.yaml" in output.out and "--image" not in output.out


def test_never_a_pickle(hub, tmp_path):
    assert download_models.main(["--models", "all", "--cache_dir", str(tmp_path)]) == 0
    patterns = [pattern for _, patterns, _, _ in hub for pattern in patterns]
    assert patterns and all(pattern.endswith((".safetensors", ".json", ".txt")) for pattern in patterns)


def test_several_models_share_the_rest(hub, tmp_path):
    assert download_models.main(["--models", "5s_sft, 10s_distil,5s_sft", "--cache_dir", str(tmp_path)]) == 0
    repos = [repo for repo, *_ in hub]
    assert len(repos) == len(set(repos)) == 5
    assert "kandinskylab/Kandinsky-5.0-T2V-Lite-distilled16steps-10s" in repos


def test_sd_and_hd_share_one_file(hub, tmp_path):
    names = "5s_t2v_pro,5s_t2v_pro_hd,5s_i2v_pro_hd,5s_i2v_pro"
    assert download_models.main(["--models", names, "--cache_dir", str(tmp_path)]) == 0
    assert [patterns for repo, patterns, *_ in hub if "Pro" in repo] == [
        ("model/kandinsky5pro_t2v_sft_5s.safetensors",),
        ("model/kandinsky5pro_i2v_sft_5s.safetensors",),
    ]


def test_image_models_have_a_vae_of_their_own(hub, tmp_path, capsys):
    assert download_models.main(["--models", "i2i,t2i", "--cache_dir", str(tmp_path)]) == 0
    assert hub[0][0] == "black-forest-labs/FLUX.1-dev"  # first: it may be refused
    assert not any("HunyuanVideo" in repo for repo, *_ in hub)
    assert (tmp_path / "flux" / "vae" / "weights.safetensors").is_file()
    assert not (tmp_path / "vae").exists()
    assert "--image" in capsys.readouterr().out


def test_files_land_where_the_configs_look(hub, tmp_path):
    from kandinsky.checkpoints import find_weights, resolve_path

    assert download_models.main(["--models", "all", "--cache_dir", str(tmp_path)]) == 0
    configs = download_models.known_models()
    assert len(configs) >= 17
    for config in configs.values():
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
    lite = {f"{s}_{kind}" for s in ("5s", "10s") for kind in ("sft", "pretrain", "nocfg", "distil")}
    pro = {f"{kind}{hd}" for kind in ("5s_t2v_pro", "10s_t2v_pro", "5s_i2v_pro") for hd in ("", "_hd")}
    assert set(names) == lite | pro | {"5s_i2v", "t2i", "i2i"}  # and no tiny ones
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
    error = capsys.readouterr().err
    assert "error: no route to host" in error and error.count("\n") == 1


@pytest.mark.parametrize(("status", "wrapped"), [(401, False), (403, True)])
def test_a_gated_repository_says_where_to_accept_and_how_to_sign_in(monkeypatch, tmp_path, capsys, status, wrapped):
    def refuse(*args, **kwargs):
        response = SimpleNamespace(status_code=status, headers={}, request=None)
        error = GatedRepoError("Client Error.\n\nCannot access gated repo", response=response)
        if wrapped:  # as the client does with what it doesn't know, a token without this permission for one
            raise LocalEntryNotFoundError("please check your connection") from error
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert download_models.main(["--models", "t2i", "--cache_dir", str(tmp_path), "--hf_token", "secret"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in (f"({status})", "licence at https://huggingface.co/black-forest-labs/FLUX.1-dev,", "--hf_token"):
        assert part in error
    assert "HF_TOKEN" in error and "secret" not in error


def test_other_answers_of_the_hub_are_not_about_licences(monkeypatch, tmp_path, capsys):
    def fail(*args, **kwargs):
        response = SimpleNamespace(status_code=503, headers={}, request=None)
        raise huggingface_hub.errors.HfHubHTTPError("busy", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert download_models.main(["--models", "t2i", "--cache_dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "busy" in error and "licence" not in error


def test_a_repository_without_the_file_is_an_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: None)
    assert download_models.main(["--cache_dir", str(tmp_path)]) == 1
    assert "vae/*.safetensors did not arrive: hunyuanvideo-community/HunyuanVideo" in capsys.readouterr().err


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
