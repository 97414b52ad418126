"""MagCache on a tiny checkpoint, from its calibration to a picture made with it, as a person would go about it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from kandinsky.config.reading import load_config
from kandinsky.runtime.magcache import skip_plan
from tools import calibrate_magcache

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "config_tiny_t2i.yaml"
PROMPT = "a red circle on a white background"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The tiny config as for 4 steps and without its section on MagCache."""
    path = tmp_path / "config.yaml"
    text = re.sub(r"\nmagcache:\n(  .*\n)+", "", CONFIG.read_text())
    path.write_text(text.replace("num_steps: 16", "num_steps: 4"))
    assert load_config(path).magcache.mag_ratios is None
    return path


def test_from_calibration_to_a_picture(
    cli: ModuleType, tiny: Path, bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.png"
    words = ["--config", str(bare), "--prompt", PROMPT, "--seed", "1", "--output_filename", str(output), "--magcache"]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert "no magcache.mag_ratios" in error and not output.exists()
    # What it says to do, done.
    command = re.search(r"python tools/calibrate_magcache.py --config (\S+) --prompt '...' --write", error)
    assert command is not None and command[1] == str(bare)
    before = bare.read_text()
    printed_only = ["--config", str(bare), "--prompt", PROMPT, "--prompt", "a blue square", "--device", "cpu"]
    assert calibrate_magcache.main(printed_only) == 0
    printed = capsys.readouterr().out
    assert bare.read_text() == before
    assert calibrate_magcache.main([*printed_only, "--write"]) == 0
    assert bare.read_text().startswith(before)

    ratios = load_config(bare).magcache.mag_ratios
    assert ratios is not None and len(ratios) == 6 and all(0.5 < ratio < 1.5 for ratio in ratios)
    assert ", ".join(map(str, ratios)) in " ".join(printed.split())
    # Thresholds in between: some evaluations are skipped, and the record says how many.
    settings = ["magcache.threshold=0.2", "magcache.retention=0.25"]
    assert cli.main([*words, *settings]) == 0, capsys.readouterr().err
    facts = json.loads(output.with_suffix(".json").read_text())
    plan = skip_plan(ratios, 4, True, 0.2, 2, 0.25)
    assert 0 < sum(plan) < 6
    assert facts["evaluations"] == {"all": 8, "skipped": sum(plan)}
    assert facts["config"]["magcache"]["enabled"] is True


@pytest.mark.parametrize("task", ["t2v", "i2v", "t2i", "i2i"])
def test_shipped_ratios_skip_nearly_half(cli: ModuleType, tiny: Path, task: str, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (128, 128), (240, 240, 240)).save(tmp_path / "white.png")
    output = tmp_path / ("a.mp4" if task.endswith("v") else "a.png")
    picture = ["--image", str(tmp_path / "white.png")] if task in ("i2v", "i2i") else []
    short = ["--video_duration", "0.2"] if task.endswith("v") else []
    words = ["--config", str(CONFIG.with_name(f"config_tiny_{task}.yaml")), "--prompt", PROMPT, "--magcache"]
    assert cli.main([*words, *picture, *short, "--output_filename", str(output)]) == 0
    evaluations = json.loads(output.with_suffix(".json").read_text())["evaluations"]
    assert evaluations["all"] == 32 and evaluations["skipped"] / 32 >= 0.45


def test_guidance_flags(cli: ModuleType, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "a.png"
    words = ["--config", str(CONFIG), "--prompt", PROMPT, "--sample_steps", "4", "--output_filename", str(output)]
    for flags, evaluations in (([], 8), (["--guidance_interval", "0.25", "1", "--guidance_every", "2"], 6)):
        assert cli.main([*words, *flags]) == 0, capsys.readouterr().err
        facts = json.loads(output.with_suffix(".json").read_text())
        assert facts["evaluations"] == {"all": evaluations, "skipped": 0}
    assert (facts["guidance_interval"], facts["guidance_every"]) == ([0.25, 1.0], 2)
    capsys.readouterr()
    assert cli.main([*words, "--guidance_interval", "0.5", "0.2"]) == 2
    assert "guidance_interval is [0.5, 0.2]; it must be two shares" in capsys.readouterr().err
