"""--vae tiny on the command line: a quick look at a result, and what it says where there is no decoder to do it."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest
from PIL import Image

from kandinsky.outputs.preview import Previews
from tools.eval_tiny import psnr

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def words(task: str, output: Path, *more: str | Path) -> list[str]:
    plain = [
        "--config",
        CONFIGS / f"config_tiny_{task}.yaml",
        "--prompt",
        "a red circle moves left on a white background",
    ]
    return [str(word) for word in (*plain, "--seed", 1, "--output_filename", output, *more)]


def frames_of(path: Path) -> np.ndarray:
    if path.suffix == ".png":
        return np.asarray(Image.open(path))[None]
    with imageio.get_reader(path, format="FFMPEG") as reader:
        return np.stack(list(reader.iter_data()))


def facts_of(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("task", ["t2v", "t2i"])
def test_a_quick_look_at_the_same_latents(
    task: str, cli: ModuleType, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The full result, its latents decoded again with --vae tiny, and what a preview has looked like on the way."""
    shown: list[np.ndarray] = []
    monkeypatch.setattr(
        Previews, "__call__", lambda self, step, steps, latents: shown.append(self.to_pictures(latents[0]).numpy())
    )
    suffix = ".mp4" if task == "t2v" else ".png"
    output, look = tmp_path / f"a{suffix}", tmp_path / f"look{suffix}"
    steps = ["--sample_steps", "4"]
    assert cli.main(words(task, output, *steps, "--save_latents", "--preview", "1")) == 0
    latents = tmp_path / "a.latents.safetensors"
    assert cli.main(["--decode_latents", str(latents), "--output_filename", str(look), "--vae", "tiny"]) == 0
    assert (facts_of(output)["decoder"], facts_of(look)["decoder"]) == ("full", "tiny")
    full, quick = frames_of(output), frames_of(look)
    assert full.shape == quick.shape
    assert 15 < psnr(full, quick) < 60  # of what four steps make, which no decoder has seen
    last = shown[-1].transpose(1, 2, 3, 0)
    assert last.shape == full.shape and psnr(last, quick) > 25  # but for the MP4's own losses the same


def test_one_line_before_anything_loads(
    cli: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*more: str | Path) -> str:
        assert cli.main(words("t2v", tmp_path / "a.mp4", "--vae", "tiny", *more)) != 0
        line = capsys.readouterr().err.strip()
        assert line.startswith("error: ") and "\n" not in line
        return line

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr("kandinsky.loading.assemble.load_dit", loaded)
    monkeypatch.setattr("kandinsky.loading.assemble.load_vae", loaded)
    assert "download_models.py --models taehv" in refused(f"model.vae.tiny_path={tmp_path}/none.safetensors")
    (tmp_path / "taehv.pth").write_bytes(b"PK")
    line = refused(f"model.vae.tiny_path={tmp_path}/taehv.pth")
    assert "s.save_file(torch.load(sys.argv[1]), sys.argv[2])" in line and f"{tmp_path}/taehv.safetensors" in line
    vae = CONFIGS.parent / "assets" / "tiny" / "t2v" / "vae" / "diffusion_pytorch_model.safetensors"
    assert "not a tiny decoder of HunyuanVideo's latents" in refused(f"model.vae.tiny_path={vae}")
    assert "the config has no model.vae.tiny_path" in refused("model.vae.tiny_path=null")
