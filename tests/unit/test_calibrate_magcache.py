"""Calibrating MagCache: ratios against residuals taken by hand, and a YAML file in which nothing else changes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_pipelines import PICTURE, build
from torch import Tensor

from kandinsky.config.reading import load_config
from tools import calibrate_magcache
from tools.calibrate_magcache import measure, prompt_calls, tiny_calls, with_ratios, write_ratios

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RATIOS = [0.91607, 0.0, 1.0, 1.02345]

# --- measuring --------------------------------------------------------------------------------------------------------


def residuals_of(pipe: Any, call: dict[str, Any], num_steps: int) -> list[Tensor]:
    """What the visual blocks add in every evaluation of a call, (N, D), watched from outside."""
    found: list[Tensor] = []
    blocks = pipe.dit.visual_transformer_blocks
    first = blocks[0].register_forward_pre_hook(lambda _, inputs: found.append(-inputs[0][0]))
    last = blocks[-1].register_forward_hook(lambda _, inputs, output: found.append(found.pop() + output[0]))
    pipe(**call, num_steps=num_steps, output_type="latent", progress=False)
    first.remove()
    last.remove()
    return found


@pytest.mark.parametrize("task", ["t2v", "i2i"])
def test_ratios_are_means_over_tokens_and_prompts(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: Any = build(task)
    picture = {"image": PICTURE} if task == "i2i" else {}
    calls = [{"text": text, "seed": seed, **picture} for text, seed in (("a red cat", 1), ("rain", 2))]
    expected = torch.zeros(6)
    for call in calls:
        found = residuals_of(pipe, call, 4)
        assert len(found) == 8  # cond, uncond, cond, ...
        for i in range(6):
            of_tokens = found[i + 2].double().square().sum(1).sqrt() / found[i].double().square().sum(1).sqrt()
            expected[i] += of_tokens.mean() / 2
    ratios = measure(pipe, [call | {"num_steps": 4} for call in calls])
    assert ratios == pytest.approx(expected.tolist(), abs=2e-5)
    assert pipe.make_cache is None and len(set(ratios)) == 6


def test_without_guidance_there_are_zeros_for_it() -> None:
    ratios = measure(build("t2i"), [{"text": "a cat", "seed": 0, "num_steps": 4, "guidance_weight": 1.0}])
    assert ratios[1::2] == [0.0] * 3 and all(ratio > 0 for ratio in ratios[0::2])


def test_blocks_that_do_nothing_cannot_be_measured() -> None:
    pipe: Any = build("t2i")
    for block in pipe.dit.visual_transformer_blocks:
        block.visual_modulation.out_layer.weight.zero_()
        block.visual_modulation.out_layer.bias.zero_()
    with pytest.raises(ValueError, match="nothing to measure"):
        measure(pipe, [{"text": "a cat", "seed": 0, "num_steps": 3}])


def test_prompts_and_pictures() -> None:
    assert prompt_calls(["a", "b"], [], 5) == [{"text": "a", "seed": 5}, {"text": "b", "seed": 6}]
    assert [call["image"] for call in prompt_calls(["a", "b"], ["x.png"], 0)] == ["x.png", "x.png"]
    assert [call["image"] for call in prompt_calls(["a", "b"], ["x.png", "y.png"], 0)] == ["x.png", "y.png"]
    with pytest.raises(ValueError, match="2 pictures for 3 prompts"):
        prompt_calls(["a", "b", "c"], ["x.png", "y.png"], 0)
    for task in ("t2v", "i2v", "t2i", "i2i"):
        calls = tiny_calls(task, 3, 7, 32)
        assert [call["seed"] for call in calls] == [7, 8, 9] and all(call["text"] for call in calls)
        assert all(call["image"].shape == (32, 32, 3) for call in calls) if task[0] == "i" else "image" not in calls[0]


# --- the YAML file ----------------------------------------------------------------------------------------------------

NEW = "mag_ratios: [0.91607, 0, 1.0, 1.02345]"
FILES = {
    "a list over several lines": (
        "a: 1  # one\nmagcache:\n  # why\n  mag_ratios: [1.0, 2,\n    3.0, 4]  # and\n  enabled: true # on\nb: 2\n",
        f"a: 1  # one\nmagcache:\n  # why\n  {NEW}  # and\n  enabled: true # on\nb: 2\n",
    ),
    "a list of lines": (
        "magcache:\n    mag_ratios:\n    - 1.0\n    - 2.0  # two\n    # end\n\nb: 2 # b\n",
        f"magcache:\n    {NEW}  # two\n    # end\n\nb: 2 # b\n",
    ),
    "a list of lines at the end": ("magcache:\n  mag_ratios:\n    - 1.0\n    - 2.0", f"magcache:\n  {NEW}"),
    "other keys": (
        "magcache:\n  # how far\n  threshold: 0.1  # t\nb: 2\n",
        f"magcache:\n  # how far\n  {NEW}\n  threshold: 0.1  # t\nb: 2\n",
    ),
    "in braces": ("magcache: {enabled: true}  # on\nb: 2\n", f"magcache: {{{NEW}, enabled: true}}  # on\nb: 2\n"),
    "empty braces": ("magcache: {}\nb: 2\n", f"magcache: {{{NEW}}}\nb: 2\n"),
    "ratios in braces": ("magcache: {mag_ratios: [1, 2], max_skips: 3}\n", f"magcache: {{{NEW}, max_skips: 3}}\n"),
    "an empty section": ("magcache:\nb: 2\n", f"magcache:\n  {NEW}\nb: 2\n"),
    "an empty section with a comment": ("magcache:  # later\nb: 2\n", f"magcache:\n  {NEW}  # later\nb: 2\n"),
    "none": ("magcache:\n  mag_ratios: null  # none\n", f"magcache:\n  {NEW}  # none\n"),
    "an empty list": ("magcache:\n  mag_ratios: []\n", f"magcache:\n  {NEW}\n"),
    "the same key elsewhere": (
        "other:\n  mag_ratios: [1]\nmagcache:\n  max_skips: 1\n",
        f"other:\n  mag_ratios: [1]\nmagcache:\n  {NEW}\n  max_skips: 1\n",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_only_the_ratios_change(name: str, tmp_path: Path) -> None:
    before, after = FILES[name]
    path = tmp_path / "a.yaml"
    path.write_text(before)
    write_ratios(path, RATIOS)
    assert path.read_text() == after
    assert yaml.safe_load(after)["magcache"]["mag_ratios"] == RATIOS
    write_ratios(path, RATIOS)  # and again
    assert path.read_text() == after
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_without_the_section_gets_one_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: 1  # one\r\nb: 2\r\n", newline="")
    write_ratios(path, RATIOS)
    text = path.read_bytes().decode()
    assert text.startswith("a: 1  # one\r\nb: 2\r\n") and text.count("\nmagcache:\n  # How much") == 1
    assert yaml.safe_load(text) == {"a": 1, "b": 2, "magcache": {"mag_ratios": RATIOS}}


@pytest.mark.parametrize("name", ["config_5s_sft", "config_tiny_i2i", "config_5s_distil"])
def test_our_own_files(name: str, tmp_path: Path) -> None:
    """Lines that fit; a file whose ratios the tool wrote, with them written into it again, is as it was."""
    path = tmp_path / f"{name}.yaml"
    original = (CONFIGS / path.name).read_text()
    config = load_config(CONFIGS / path.name)
    if "tiny" in name:  # written by the tool
        assert with_ratios(original, config.magcache.mag_ratios or ()) == original
    path.write_text(original)
    ratios = [round(1 + i / 777, 5) for i in range(98)]
    write_ratios(path, ratios)
    text = path.read_text()
    assert load_config(path).magcache.mag_ratios == tuple(ratios)
    assert max(map(len, text.splitlines())) <= 120
    if config.magcache.mag_ratios is None:
        assert text.startswith(original)
    else:
        without = [re.sub(r"mag_ratios: \[[^]]*\]", "", words) for words in (original, text)]
        assert without[0] == without[1] != original


def test_what_cannot_be_written_stays_as_it_is(tmp_path: Path) -> None:
    """An anchor: the same section under another name would change with it."""
    path = tmp_path / "a.yaml"
    text = "magcache: &m\n  mag_ratios: [1.0, 2.0]\nother: *m\n"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.yaml: can't write magcache\.mag_ratios"):
        write_ratios(path, RATIOS)
    assert path.read_text() == text and list(tmp_path.iterdir()) == [path]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nothing.yaml", "--prompt", "a"], "no such config file"),
        (["--config", str(CONFIGS / "config_tiny_t2i.yaml"), "--prompt", "a", "model.num_steps=1"], "a single step"),
        (["--config", str(CONFIGS / "config_tiny_i2v.yaml"), "--prompt", "a"], "needs a picture"),
        (["--config", str(CONFIGS / "config_5s_sft.yaml"), "--prompt", "a", "--cache_dir", "nowhere"], "not found"),
        (["--config", str(CONFIGS / "config_tiny_t2i.yaml"), "--tiny_cases", "0"], "--tiny_cases is 0"),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert calibrate_magcache.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and message in error
