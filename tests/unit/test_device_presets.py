"""Presets for devices: a few keys, over any variant, under what a person says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from kandinsky.config.reading import DEVICE_PRESETS, load_config, preset_file
from kandinsky.config.schema import Config
from kandinsky.loading.getters import get_T2V_pipeline

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = ("8gb", "12gb", "16gb", "24gb", "48gb", "80gb", "cpu")
VARIANTS = [CONFIGS / f"config_{name}.yaml" for name in ("10s_sft", "5s_i2v_pro_hd", "t2i", "i2i", "tiny_t2v")]


def without_preset_keys(config: Config) -> Config:
    """The config with what a preset may set put back to its default."""
    runtime = type(config.runtime)()
    vae = dataclasses.replace(config.model.vae, memory_budget_gb=None)
    return dataclasses.replace(config, runtime=runtime, model=dataclasses.replace(config.model, vae=vae))


def test_all_are_there() -> None:
    assert {file.stem for file in DEVICE_PRESETS.glob("*.yaml")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_presets_fit_every_variant_and_change_nothing_else(name: str) -> None:
    keys = yaml.safe_load(preset_file(name).read_text())
    assert keys
    for variant in VARIANTS:
        config = load_config(variant, presets=[preset_file(name)])
        assert without_preset_keys(config) == without_preset_keys(load_config(variant))
        for key, value in keys.get("runtime", {}).items():
            assert getattr(config.runtime, key) == value
        assert config.model.vae.memory_budget_gb == keys.get("model", {}).get("vae", {}).get("memory_budget_gb")


def test_order_is_variant_then_presets_then_overrides(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("model: {num_steps: 7, guidance_weight: 2}\nruntime: {offload: on, blocks_on_gpu: 4}")
    second.write_text("model: {guidance_weight: 3}\nruntime: {blocks_on_gpu: 5}")
    overrides = ["runtime.blocks_on_gpu=6"]
    config = load_config(CONFIGS / "config_5s_sft.yaml", overrides, [first, second])
    assert (config.model.num_steps, config.model.guidance_weight) == (7, 3.0)
    assert (config.runtime.offload, config.runtime.blocks_on_gpu) == ("on", 6)
    assert config.source == CONFIGS / "config_5s_sft.yaml"


def test_mistakes_in_presets_are_told(tmp_path: Path) -> None:
    variant, preset = CONFIGS / "config_5s_sft.yaml", tmp_path / "mine.yaml"
    with pytest.raises(ValueError, match=r"no device preset '10gb': choose one of 8gb, \d+gb, .*, cpu$"):
        preset_file("10gb")
    with pytest.raises(ValueError, match="not readable"):
        load_config(variant, presets=[preset])
    preset.write_text("runtime: {ofload: on}")
    with pytest.raises(ValueError, match=r"unknown key runtime\.ofload; did you mean runtime\.offload"):
        load_config(variant, presets=[preset])
    preset.write_text("- runtime")
    with pytest.raises(ValueError, match="not a mapping"):
        load_config(variant, presets=[preset])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vae.memory_budget_gb=0", r"model\.vae\.memory_budget_gb = 0\.0 is not allowed: it must be more than 0"),
        ("model.vae.memory_budget_gb=lots", r"memory_budget_gb = 'lots' is not allowed: it must be a finite number"),
        ("runtime.chunk_tokens=8", r"runtime\.chunk_tokens = 8 is not allowed: it must be at least 64"),
    ],
)
def test_ranges_of_the_planners_settings(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(CONFIGS / "config_t2i.yaml", [override])


def test_getters_take_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []

    def stop(config: Config, *_: object, **__: object) -> None:
        seen.append(config)
        raise RuntimeError("enough")

    monkeypatch.setattr("kandinsky.loading.getters.load_pipeline", stop)
    with pytest.raises(RuntimeError, match="enough"):
        get_T2V_pipeline("cpu", device_preset="8gb", overrides=["model.num_steps=3"])
    assert seen[0].model.vae.memory_budget_gb == 6 and seen[0].model.num_steps == 3
    with pytest.raises(ValueError, match="no device preset"):
        get_T2V_pipeline("cpu", device_preset="8")
