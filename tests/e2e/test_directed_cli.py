"""What sampling starts from, by the command line; and an encoder that streams makes the same video."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import imageio.v2 as imageio
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from kandinsky.models.upscaler import CompactUpscaler

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "config_tiny_t2v.yaml"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Nine frames: green on the left, purple on the right."""
    frames = np.full((9, 64, 64, 3), (40, 160, 60), dtype=np.uint8)
    frames[:, :, 32:] = (120, 40, 140)
    imageio.mimwrite(tmp_path / "source.mp4", list(frames), fps=24, macro_block_size=8)
    return tmp_path / "source.mp4"


def run(cli: ModuleType, output: Path, *more: object) -> np.ndarray:
    words = ["--config", CONFIG, "--prompt", "a red circle", "--seed", 1, "--sample_steps", 4, "--video_duration", 0.34]
    words += ["--width", 64, "--height", 64, "--output_filename", output, *more]
    assert cli.main([str(word) for word in words]) == 0
    with imageio.get_reader(output, format="FFMPEG") as reader:
        return np.stack(list(reader.iter_data())).astype(np.int32)


def test_from_a_video_in_part(cli: ModuleType, tiny: Path, source: Path, tmp_path: Path) -> None:
    """Strength 0 is the source; a mask keeps its black half of it, and the white half is another thing."""
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:, 40:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    kept = run(cli, tmp_path / "kept.mp4", "--video", source, "--strength", 0)
    half = run(cli, tmp_path / "half.mp4", "--video", source, "--strength", 1, "--mask", tmp_path / "mask.png")
    record = json.loads((tmp_path / "half.json").read_text())
    assert record["strength"] == 1 and record["conditions"]
    assert abs(kept[..., 4:24, :] - half[..., 4:24, :]).mean() < 8
    assert abs(kept[..., 48:, :] - half[..., 48:, :]).mean() > 12


def test_an_encoder_that_streams(cli: ModuleType, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for how in ("off", "on"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / how))  # what one has encoded is not the other's
        made.append(run(cli, tmp_path / f"{how}.mp4", "--stream_encoders", how))
        assert json.loads((tmp_path / f"{how}.json").read_text())["config"]["runtime"]["stream_encoders"] == how
    assert np.array_equal(*made)


def test_processed_further(cli: ModuleType, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file has more and larger frames and lasts as long; an upscaler that is none is told before anything loads."""
    network = CompactUpscaler(channels=4, convolutions=1, scale=2)
    save_file(network.state_dict(), tmp_path / "small.safetensors")
    words = ["--fps", 48, "--upscale", 2, "--upscaler", tmp_path / "small.safetensors"]
    assert run(cli, tmp_path / "a.mp4", *words).shape == (2 * 9, 128, 128, 3)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["post"]["upscaled_by"] == str(tmp_path / "small.safetensors") and record["post"]["frames"] == 18
    (tmp_path / "small.safetensors").write_bytes(b"none")
    capsys.readouterr()
    wrong = ["--config", CONFIG, "--prompt", "a", "--output_filename", tmp_path / "b.mp4", *words]
    assert cli.main([str(word) for word in wrong]) == 2
    said = capsys.readouterr().err
    assert f"the upscaler {tmp_path / 'small.safetensors'}" in said and said.count("\n") == 1, said
