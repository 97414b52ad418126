"""test.py --lora: adapters on the command line and in the YAML, what the facts say of them, and mistakes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kandinsky.config.reading import load_config
from tests.lora_files import write_lora

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "config_tiny_t2v.yaml"
DIT = load_config(CONFIG).model.dit_params


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With blanks, letters of other alphabets and what YAML has a meaning for, in which two adapters lie."""
    folder = tmp_path / "мои адаптеры, [a]: {b} #1"
    write_lora(folder / "dolly in", DIT, config={"r": 4, "lora_alpha": 4}, trigger="Dolly in. ", seed=1)
    write_lora(folder / "arc.safetensors", DIT, prefix="diffusion_model.", seed=2)
    return folder


@pytest.fixture
def generate(cli: ModuleType, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*flags: str) -> tuple[np.ndarray, dict[str, Any]]:
        path = tmp_path / "a.png"
        words = ["--prompt", "a red circle", "--seed", "1", "--video_duration", "0", "--sample_steps", "1"]
        words += ["--config", str(CONFIG), "--output_filename", str(path), *flags]
        assert cli.main(words) == 0, capsys.readouterr().err
        with Image.open(path) as image:
            return np.asarray(image), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))

    return run


def test_flags_config_and_facts(generate: Any, folder: Path) -> None:
    plain, facts = generate()
    assert facts["adapters"] == [] and facts["config"]["model"]["loras"] == []
    dolly, arc = str(folder / "dolly in"), str(folder / "arc.safetensors")
    one, facts = generate("--lora", dolly)
    path = str(folder / "dolly in" / "lora.safetensors")
    assert facts["adapters"] == [{"name": "dolly in", "path": path, "scale": 1.0, "trigger": "Dolly in. "}]
    assert facts["prompt"] == "a red circle"
    two, facts = generate("--lora", f"{dolly}:0.5", "--lora", f"{arc}:-0.25")
    assert [(a["name"], a["scale"]) for a in facts["adapters"]] == [("dolly in", 0.5), ("arc", -0.25)]
    assert facts["config"]["model"]["loras"] == [f"{dolly}:0.5", f"{arc}:-0.25"]
    assert not any(np.array_equal(a, b) for a, b in ((plain, one), (one, two), (plain, two)))
    # The YAML's key says the same; flags stand in its place.
    from_yaml, _ = generate(f"model.loras={json.dumps([f'{dolly}:0.5', f'{arc}:-0.25'])}")
    assert np.array_equal(from_yaml, two)
    instead, _ = generate("model.loras=[missing]", "--lora", dolly)
    assert np.array_equal(instead, one)


def test_with_everything_else(generate: Any, folder: Path) -> None:
    """Offloaded, streamed, quantised and cached at once, against what stays where it is."""
    lora = "--lora", f"{folder / 'arc.safetensors'}:0.5"
    more = "--dit_quantization", "int8", "--magcache"
    expected, _ = generate(*lora, *more)
    found, facts = generate(*lora, *more, "--offload", "--blocks_on_gpu", "1")
    assert np.array_equal(found, expected) and facts["adapters"][0]["name"] == "arc"
    assert not np.array_equal(expected, generate(*more)[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("missing", "missing: no such file or folder"),
        ("missing:0.5", "missing: no such file or folder"),
        ("arc.safetensors:nan", "give PATH or PATH:scale"),
        ("wrong.safetensors", "this LoRA is for another model"),
        ("", "give PATH or PATH:scale"),
    ],
)
def test_mistakes_are_told_before_anything_loads(
    text: str, message: str, folder: Path, cli: ModuleType, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In one line: neither a download nor the weights are waited for."""
    write_lora(folder / "wrong.safetensors", DIT, prefix="text_encoder.")
    monkeypatch.setitem(sys.modules, "kandinsky.loading.assemble", None)  # whoever imports it fails otherwise
    monkeypatch.setitem(sys.modules, "kandinsky.checkpoints.hub", None)
    monkeypatch.chdir(folder)
    words = ["--config", str(CONFIG), "--prompt", "a", "--output_filename", "a.mp4", "--download", "--lora", text]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not list(folder.glob("a.*"))


def test_latents_are_decoded_without_their_adapters(
    cli: ModuleType, generate: Any, folder: Path, tmp_path: Path
) -> None:
    """They are in the latents already: whoever decodes them later needs no file of theirs."""
    picture, _ = generate("--lora", str(folder / "dolly in"), "--save_latents")
    shutil.rmtree(folder)
    output = tmp_path / "again.png"
    assert (
        cli.main(["--decode_latents", str(tmp_path / "a.latents.safetensors"), "--output_filename", str(output)]) == 0
    )
    with Image.open(output) as image:
        assert np.array_equal(np.asarray(image), picture)
    facts = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    assert [adapter["name"] for adapter in facts["adapters"]] == ["dolly in"]


def test_stopped_runs_go_on_with_their_adapters(generate: Any, cli: ModuleType, folder: Path, tmp_path: Path) -> None:
    """From the command line by themselves; where a pipeline has others, it says so."""
    from kandinsky.loading.assemble import load_pipeline
    from kandinsky.outputs.resume import Stopped, load_run
    from kandinsky.request import resolve_request

    text = f"{folder / 'dolly in'}:0.5"
    expected, _ = generate("--lora", text, "--sample_steps", "2")
    config = load_config(CONFIG, [f"model.loras={json.dumps([text])}"])
    request = resolve_request(config, "a red circle", seed=1, time_length=0, num_steps=2)
    pipe = load_pipeline(config, "cpu")

    def stop(pipe: Any, *_: Any) -> None:
        pipe.interrupt = True

    with pytest.raises(Stopped) as stopped:
        pipe.generate(request, save_path=tmp_path / "b.png", callback=stop, keep_stopped=True, progress=False)
    pipe.set_adapter("dolly in", 0.25)
    with pytest.raises(ValueError, match=r"stopped with the adapters \[\('dolly in', 0\.5\)\] active.*0\.25"):
        pipe.resume(load_run(stopped.value.path), tmp_path / "b.png")
    pipe.disable_adapters()
    with pytest.raises(ValueError, match="now there are none: go on with the same ones"):
        pipe.resume(load_run(stopped.value.path), tmp_path / "b.png")
    assert cli.main(["--resume_from", str(stopped.value.path)]) == 0
    with Image.open(tmp_path / "b.png") as image:
        assert np.array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("flag", ["--resume_from", "--decode_latents"])
def test_adapters_are_settled_by_a_file(flag: str, cli: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([flag, "a.safetensors", "--lora", "b"])
    assert "leave out --lora" in capsys.readouterr().err
