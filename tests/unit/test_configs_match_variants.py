"""The configs are the published variants: against a small table, and in full where the full table is at hand."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest

from kandinsky.config.defaults import HD_SIZES, SD_SIZES, VIDEO_NEGATIVE_CAPTION
from kandinsky.config.reading import load_config
from kandinsky.config.schema import AttentionConfig, DiTConfig

REPOSITORY = Path(__file__).resolve().parents[2]

LITE = DiTConfig(visual_cond=True)
PRO = DiTConfig(
    time_dim=1024,
    model_dim=4096,
    ff_dim=16384,
    num_text_blocks=4,
    num_visual_blocks=60,
    axes_dims=(32, 48, 48),
    visual_cond=True,
)
T2I = DiTConfig(model_dim=2560, ff_dim=10240, num_visual_blocks=50, axes_dims=(32, 48, 48))
I2I = dataclasses.replace(T2I, instruct_type="channel")
DISTIL = "distilled16steps"

# name: model, checkpoint, hub repository, steps, guidance, shift, NABLA's P (None: dense attention),
#       MagCache ratios: first, last, sum (None: none)
VARIANTS = {
    "5s_sft": (LITE, "lite_t2v_sft_5s", "T2V-Lite-sft-5s", 50, 5.0, 5.0, None, (0.91607, 0.84193, 98.99138)),
    "5s_pretrain": (LITE, "lite_t2v_pretrain_5s", "T2V-Lite-pretrain-5s", 50, 5.0, 5.0, None, None),
    "5s_nocfg": (LITE, "lite_t2v_nocfg_5s", "T2V-Lite-nocfg-5s", 50, 1.0, 5.0, None, (0.8827, 0.0, 49.2884)),
    "5s_distil": (LITE, f"lite_t2v_{DISTIL}_5s", f"T2V-Lite-{DISTIL}-5s", 16, 1.0, 5.0, None, None),
    "10s_sft": (LITE, "lite_t2v_sft_10s", "T2V-Lite-sft-10s", 50, 5.0, 10.0, 0.9, (0.92261, 0.83746, 99.05806)),
    "10s_pretrain": (LITE, "lite_t2v_pretrain_10s", "T2V-Lite-pretrain-10s", 50, 5.0, 10.0, 0.9, None),
    "10s_nocfg": (LITE, "lite_t2v_nocfg_10s", "T2V-Lite-nocfg-10s", 50, 1.0, 10.0, 0.9, (0.8736, 0.0, 49.33012)),
    "10s_distil": (LITE, f"lite_t2v_{DISTIL}_10s", f"T2V-Lite-{DISTIL}-10s", 16, 1.0, 10.0, 0.9, None),
    "5s_i2v": (LITE, "lite_i2v_5s", "I2V-Lite-5s", 50, 5.0, 10.0, None, (0.90524, 0.83375, 98.84296)),
    "5s_i2v_pro": (PRO, "pro_i2v_sft_5s", "I2V-Pro-sft-5s", 50, 5.0, 10.0, None, (0.95295, 0.84801, 98.047)),
    "5s_i2v_pro_hd": (PRO, "pro_i2v_sft_5s", "I2V-Pro-sft-5s", 50, 5.0, 5.0, 0.8, (1.03563, 0.81322, 97.71571)),
    "5s_t2v_pro": (PRO, "pro_t2v_sft_5s", "T2V-Pro-sft-5s", 50, 5.0, 5.0, None, (1.05108, 0.80511, 97.67604)),
    "5s_t2v_pro_hd": (PRO, "pro_t2v_sft_5s", "T2V-Pro-sft-5s", 50, 5.0, 5.0, 0.8, (1.06133, 0.80726, 97.76061)),
    "10s_t2v_pro": (PRO, "pro_t2v_sft_10s", "T2V-Pro-sft-10s", 50, 5.0, 10.0, 0.9, (0.98023, 0.82574, 97.56566)),
    "10s_t2v_pro_hd": (PRO, "pro_t2v_sft_10s", "T2V-Pro-sft-10s", 50, 5.0, 10.0, 0.7, (0.98274, 0.82369, 97.51588)),
    "t2i": (T2I, "lite_t2i", "T2I-Lite", 50, 3.5, 3.0, None, (0.83479, 0.99927, 98.36949)),
    "i2i": (I2I, "lite_i2i", "I2I-Lite", 50, 3.5, 3.0, None, None),
}
# Published since, and not in the full table; a repository in diffusers' layout is what there is of some.
T2V_DISTIL, I2V_DISTIL = (f"{task}-Pro-distilled-5s-Diffusers" for task in ("T2V", "I2V"))
LATER = {
    "5s_t2v_pro_distil": (PRO, T2V_DISTIL, T2V_DISTIL, 16, 1.0, 5.0, None, None),
    "5s_t2v_pro_distil_hd": (PRO, T2V_DISTIL, T2V_DISTIL, 16, 1.0, 5.0, 0.8, None),
    "5s_i2v_pro_distil": (PRO, I2V_DISTIL, I2V_DISTIL, 16, 1.0, 5.0, None, None),
    "5s_i2v_pro_distil_hd": (PRO, I2V_DISTIL, I2V_DISTIL, 16, 1.0, 5.0, 0.8, None),
    "5s_t2v_pro_pretrain": (PRO, "pro_t2v_pretrain_5s", "T2V-Pro-pretrain-5s", 50, 5.0, 5.0, None, None),
    "5s_t2v_pro_pretrain_hd": (PRO, "pro_t2v_pretrain_5s", "T2V-Pro-pretrain-5s", 50, 5.0, 5.0, 0.8, None),
    "10s_t2v_pro_pretrain": (PRO, "pro_t2v_pretrain_10s", "T2V-Pro-pretrain-10s", 50, 5.0, 10.0, 0.9, None),
    "10s_t2v_pro_pretrain_hd": (PRO, "pro_t2v_pretrain_10s", "T2V-Pro-pretrain-10s", 50, 5.0, 10.0, 0.7, None),
    "t2i_pretrain": (T2I, *2 * ("T2I-Lite-pretrain-Diffusers",), 50, 3.5, 3.0, None, None),
    "i2i_pretrain": (I2I, *2 * ("I2I-Lite-pretrain-Diffusers",), 50, 3.5, 3.0, None, None),
}


@pytest.mark.parametrize("name", VARIANTS | LATER)
def test_config_is_the_published_variant(name):
    dit, file, repo, steps, guidance, shift, P, ratios = (VARIANTS | LATER)[name]
    config = load_config(REPOSITORY / "configs" / f"config_{name}.yaml")
    model = config.model
    task = next(task for task in ("t2v", "i2v", "t2i", "i2i") if task in file.lower())
    is_image = task in ("t2i", "i2i")
    is_hd = is_image or name.endswith("_hd")

    assert config.task == task
    in_diffusers = f"./weights/Kandinsky-5.0-{repo}/transformer/"
    in_one_file = f"./weights/model/kandinsky5{file}.safetensors"
    assert model.checkpoint_path == (in_diffusers if repo.endswith("-Diffusers") else in_one_file)
    assert model.hub_repo == f"kandinskylab/Kandinsky-5.0-{repo}"
    assert (model.num_steps, model.guidance_weight) == (steps, guidance)
    assert model.dit_params == dit
    assert config.metrics.resolution == (1024 if is_hd else 512)
    assert config.metrics.scale_factor == ((1, 1, 1) if is_image else (1, 3.16, 3.16) if is_hd else (1, 2, 2))
    assert config.metrics.scheduler_scale == shift

    if P is None:
        assert model.attention.type == "full"
    else:
        window = {"wT": 11, "wH": 3, "wW": 3, "add_sta": True, "method": "topcdf"}
        assert model.attention == AttentionConfig(type="nabla", P=P, **window)

    vae = ("flux", "./weights/flux/vae/") if is_image else ("hunyuan", "./weights/vae/")
    assert (model.vae.name, model.vae.checkpoint_path) == vae
    qwen, clip = model.text_embedder.qwen, model.text_embedder.clip
    assert (qwen.checkpoint_path, qwen.emb_size) == ("./weights/text_encoder/", 3584)
    assert qwen.max_length == (512 if is_image else 256)
    assert (clip.checkpoint_path, clip.emb_size, clip.max_length) == ("./weights/text_encoder2/", 768, 77)
    assert qwen.crop is None

    generation = config.generation
    size = (1024, 1024) if is_image else (1280, 768) if is_hd else (768, 512)
    assert (generation.width, generation.height) == size
    assert generation.resolutions == (HD_SIZES if is_hd else SD_SIZES)
    assert generation.time_length == (0 if is_image else 10 if name.startswith("10s") else 5)
    assert generation.negative_caption == ("" if is_image else VIDEO_NEGATIVE_CAPTION)
    assert generation.first_frame_normalization
    assert (generation.noise_device, generation.noise_dtype) == ("cpu", "float32")

    found = config.magcache.mag_ratios
    if ratios is None:
        assert found is None
    else:
        assert found is not None and len(found) == 98
        assert (found[0], found[-1]) == ratios[:2]
        assert math.fsum(found) == pytest.approx(ratios[2], abs=1e-9)


def test_every_config_is_a_variant_or_tiny():
    names = {path.stem.removeprefix("config_") for path in (REPOSITORY / "configs").glob("*.yaml")}
    assert {name for name in names if not name.startswith("tiny_")} == {*VARIANTS, *LATER}


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
    assert set(table) == {f"config_{name}" for name in VARIANTS}
    for name, variant in table.items():
        config = load_config(REPOSITORY / "configs" / f"{name}.yaml")
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
        assert found == {key: variant[key] for key in found}, name
        for section, values in ((model.dit_params, variant["dit"]), (model.attention, variant["attention"])):
            for key, value in values.items():
                got = getattr(section, key)
                assert (list(got) if isinstance(got, tuple) else got) == value, f"{name}: {key}"


# What the original repository's files hold besides, without effect there or here.
WITHOUT_EFFECT = {"causal": False, "local": False, "glob": False, "window": 3}


def test_files_of_the_original_repository_load_as_they_are(tmp_path):
    """They say no task, no generation and mostly no shift; dense attention is called flash. All that is inferred."""
    for name, variant in variants().items():
        attention, is_nabla = variant["attention"], variant["attention"]["type"] == "nabla"
        qwen = {
            "emb_size": 3584,
            "checkpoint_path": "./weights/text_encoder/",
            "max_length": variant["qwen_max_length"],
        }
        clip = {"checkpoint_path": "./weights/text_encoder2/", "emb_size": 768, "max_length": 77}
        original = {
            "metrics": {"scale_factor": variant["rope_scale_factor"], "resolution": variant["resolution"]},
            "model": {
                "checkpoint_path": f"./weights/{variant['checkpoint']}",
                "num_steps": variant["num_steps"],
                "guidance_weight": variant["guidance_weight"],
                "dit_params": variant["dit"],
                "attention": {**(attention | {"chunk": False} if is_nabla else {"type": "flash"}), **WITHOUT_EFFECT},
                "vae": {"checkpoint_path": "./weights/vae/", "name": variant["vae"]},
                "text_embedder": {"qwen": qwen, "clip": clip},
            },
        }
        if variant["mag_ratios"]:
            original["magcache"] = {"mag_ratios": variant["mag_ratios"]}
        path = tmp_path / variant["upstream_config"]
        path.write_text(json.dumps(original))  # JSON is YAML
        theirs, ours = load_config(path), load_config(REPOSITORY / "configs" / f"{name}.yaml")
        # Where weights come from, and lie, is all that differs.
        vae = dataclasses.replace(theirs.model.vae, checkpoint_path=ours.model.vae.checkpoint_path)
        model = dataclasses.replace(theirs.model, hub_repo=ours.model.hub_repo, vae=vae)
        assert dataclasses.replace(theirs, model=model, source=ours.source) == ours, name

        for key in ("num_steps", "guidance_weight"):  # the first release had neither
            del original["model"][key]
        path.write_text(json.dumps(original))
        model = load_config(path).model
        assert (model.num_steps, model.guidance_weight) == (variant["num_steps"], variant["guidance_weight"]), name
