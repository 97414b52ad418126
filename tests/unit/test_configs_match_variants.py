"""The configs are the published variants: against a small table, and in full where the full table is at hand."""

import json
import math
import os
from pathlib import Path

import pytest

from kandinsky.config import SD_SIZES, VIDEO_NEGATIVE_CAPTION, DiTConfig, load_config

REPOSITORY = Path(__file__).resolve().parents[2]

# name: checkpoint, hub repository, steps, guidance, shift, attention, MagCache ratios: first, last, sum (None: none)
LITE_T2V = {
    "5s_sft": ("sft_5s", "sft-5s", 50, 5.0, 5.0, "full", (0.91607, 0.84193, 98.99138)),
    "5s_pretrain": ("pretrain_5s", "pretrain-5s", 50, 5.0, 5.0, "full", None),
    "5s_nocfg": ("nocfg_5s", "nocfg-5s", 50, 1.0, 5.0, "full", (0.8827, 0.0, 49.2884)),
    "5s_distil": ("distilled16steps_5s", "distilled16steps-5s", 16, 1.0, 5.0, "full", None),
    "10s_sft": ("sft_10s", "sft-10s", 50, 5.0, 10.0, "nabla", (0.92261, 0.83746, 99.05806)),
    "10s_pretrain": ("pretrain_10s", "pretrain-10s", 50, 5.0, 10.0, "nabla", None),
    "10s_nocfg": ("nocfg_10s", "nocfg-10s", 50, 1.0, 10.0, "nabla", (0.8736, 0.0, 49.33012)),
    "10s_distil": ("distilled16steps_10s", "distilled16steps-10s", 16, 1.0, 10.0, "nabla", None),
}


@pytest.mark.parametrize("name", LITE_T2V)
def test_config_is_the_published_variant(name):
    file, repo, steps, guidance, shift, attention, ratios = LITE_T2V[name]
    config = load_config(REPOSITORY / "configs" / f"config_{name}.yaml")
    model = config.model

    assert config.task == "t2v"
    assert model.checkpoint_path == f"./weights/model/kandinsky5lite_t2v_{file}.safetensors"
    assert model.hub_repo == f"kandinskylab/Kandinsky-5.0-T2V-Lite-{repo}"
    assert (model.num_steps, model.guidance_weight) == (steps, guidance)
    assert model.dit_params == DiTConfig(visual_cond=True)
    assert (config.metrics.resolution, config.metrics.scale_factor) == (512, (1.0, 2.0, 2.0))
    assert config.metrics.scheduler_scale == shift

    assert model.attention.type == attention
    if attention == "nabla":
        assert (model.attention.P, model.attention.wT, model.attention.wH, model.attention.wW) == (0.9, 11, 3, 3)
        assert (model.attention.add_sta, model.attention.method) == (True, "topcdf")

    assert (model.vae.name, model.vae.checkpoint_path) == ("hunyuan", "./weights/vae/")
    qwen, clip = model.text_embedder.qwen, model.text_embedder.clip
    assert (qwen.checkpoint_path, qwen.emb_size, qwen.max_length) == ("./weights/text_encoder/", 3584, 256)
    assert (clip.checkpoint_path, clip.emb_size, clip.max_length) == ("./weights/text_encoder2/", 768, 77)
    assert qwen.crop is None

    generation = config.generation
    assert (generation.width, generation.height) == (768, 512)
    assert generation.resolutions == SD_SIZES
    assert generation.time_length == (10 if name.startswith("10s") else 5)
    assert generation.negative_caption == VIDEO_NEGATIVE_CAPTION

    found = config.magcache.mag_ratios
    if ratios is None:
        assert found is None
    else:
        assert found is not None and len(found) == 98
        assert (found[0], found[-1]) == ratios[:2]
        assert math.fsum(found) == pytest.approx(ratios[2], abs=1e-9)


def test_tiny_config():
    config = load_config(REPOSITORY / "configs" / "config_tiny_t2v.yaml")
    assert config.task == "t2v"
    assert config.model.hub_repo is None  # nothing to download
    paths = (
        config.model.checkpoint_path,
        config.model.vae.checkpoint_path,
        config.model.text_embedder.qwen.checkpoint_path,
        config.model.text_embedder.clip.checkpoint_path,
    )
    assert all(path.startswith("./assets/tiny/t2v/") for path in paths)
    assert config.model.dit_params.visual_cond
    assert (config.generation.width, config.generation.height) == (128, 128)


def variants():
    """The published variants' full table, which is not part of this repository."""
    path = Path(os.environ.get("KANDINSKY_VARIANTS", REPOSITORY.parent / "shared" / "reference" / "variants.json"))
    if not path.is_file():
        pytest.skip(f"no table of variants at {path} (KANDINSKY_VARIANTS names another place)")
    return json.loads(path.read_text())


def test_every_number_is_that_of_the_full_table():
    table = variants()
    compared = 0
    for path in sorted((REPOSITORY / "configs").glob("*.yaml")):
        if path.stem not in table:
            assert path.stem.startswith("config_tiny_"), f"{path.name} is no published variant"
            continue
        compared += 1
        variant, config = table[path.stem], load_config(path)
        model = config.model
        found = {
            "task": config.task,
            "hub_repo": model.hub_repo,
            "checkpoint": model.checkpoint_path.removeprefix("./weights/"),
            "resolution": config.metrics.resolution,
            "num_steps": model.num_steps,
            "guidance_weight": model.guidance_weight,
            "rope_scale_factor": list(config.metrics.scale_factor),
            "vae": model.vae.name,
            "qwen_max_length": model.text_embedder.qwen.max_length,
            "clip_max_length": model.text_embedder.clip.max_length,
            "mag_ratios": config.magcache.mag_ratios and list(config.magcache.mag_ratios),
            "scheduler_scale": config.metrics.scheduler_scale,
        }
        assert found == {key: variant[key] for key in found}, path.name
        for section, values in ((model.dit_params, variant["dit"]), (model.attention, variant["attention"])):
            for key, value in values.items():
                got = getattr(section, key)
                assert (list(got) if isinstance(got, tuple) else got) == value, f"{path.name}: {key}"
    assert compared >= 8


def test_defaults_of_old_files_are_those_of_the_full_table(tmp_path):
    """A YAML file that says no task, shift, steps or guidance gets what its variant is published with."""
    for name, variant in variants().items():
        lines = [
            f"metrics: {{resolution: {variant['resolution']}, scale_factor: {variant['rope_scale_factor']}}}",
            "model:",
            f"  checkpoint_path: ./weights/{variant['checkpoint']}",
            f"  dit_params: {json.dumps(variant['dit'])}",
            f"  attention: {json.dumps(variant['attention'])}",
            f"  vae: {{name: {variant['vae']}, checkpoint_path: ./weights/vae/}}",
            "  text_embedder:",
            "    qwen: {checkpoint_path: ./weights/text_encoder/}",
            "    clip: {checkpoint_path: ./weights/text_encoder2/}",
        ]
        path = tmp_path / f"{name}.yaml"
        path.write_text("\n".join(lines))
        config = load_config(path)
        assert config.task == variant["task"], name
        assert config.metrics.scheduler_scale == variant["scheduler_scale"], name
        assert config.model.num_steps == variant["num_steps"], name
        assert config.model.guidance_weight == variant["guidance_weight"], name
