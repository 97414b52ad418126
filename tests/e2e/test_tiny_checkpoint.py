"""The checkpoint that comes with the repository: small, safe to open, laid out as real weights are, able to draw."""

from pathlib import Path

import pytest

from kandinsky.checkpoints.dit_layout import check_dit_header
from kandinsky.checkpoints.files import resolve_path
from kandinsky.checkpoints.headers import read_header
from kandinsky.config.reading import load_config

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "config_tiny_t2v.yaml"


def test_size_and_kinds_of_files(tiny: Path) -> None:
    files = [path for path in tiny.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 34_000_000  # three transformers, a quarter of it each
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt"}


def test_layout_is_that_of_real_weights(tiny: Path) -> None:
    files = {path.relative_to(tiny).as_posix() for path in tiny.rglob("*.safetensors")}
    assert files == {
        "model/tiny_t2v.safetensors",
        "model/tiny_t2v_10s.safetensors",
        "model/tiny_flf.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "vae/tiny_decoder.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder2/model.safetensors",
    }
    for folder in ("vae", "text_encoder", "text_encoder2"):
        assert (tiny / folder / "config.json").is_file()
    for folder in ("text_encoder", "text_encoder2"):
        assert (tiny / folder / "tokenizer.json").is_file()


def test_config_belongs_to_it(tiny: Path) -> None:
    config = load_config(CONFIG)
    encoders = config.model.text_embedder
    paths = (config.model.checkpoint_path, config.model.vae.checkpoint_path,
             encoders.qwen.checkpoint_path, encoders.clip.checkpoint_path)  # fmt: skip
    names = ("model/tiny_t2v.safetensors", "vae", "text_encoder", "text_encoder2")
    assert [resolve_path(path, config).resolve() for path in paths] == [(tiny / name).resolve() for name in names]
    header = read_header(tiny / "model" / "tiny_t2v.safetensors")
    check_dit_header(header, config.model.dit_params)


@pytest.mark.slow
def test_it_draws_what_unseen_captions_say(tiny: Path) -> None:
    """Three captions whose combinations were never trained on; tools/eval_tiny.py measures a hundred."""
    from kandinsky import get_T2V_pipeline
    from tools.eval_tiny import evaluate

    pipe = get_T2V_pipeline("cpu", conf_path=CONFIG)
    report, _ = evaluate(lambda text, seed: pipe(text, seed=seed, progress=False)[0], num=3)
    assert report["right"]["background"] == 3, report["samples"]
    assert report["right"]["colour"] >= 2, report["samples"]
