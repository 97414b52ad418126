"""The config: strict about what it does not know, lenient about YAML files that people already have."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from kandinsky.config.defaults import HD_SIZES, SD_SIZES, VIDEO_NEGATIVE_CAPTION
from kandinsky.config.reading import config_from_dict, config_to_dict, load_config, with_settings

REPOSITORY = Path(__file__).resolve().parents[2]
SFT = REPOSITORY / "configs" / "config_5s_sft.yaml"

# The layout of the original repository: no task, no generation, no scheduler_scale, and attention keys without effect.
ORIGINAL_LAYOUT = """
metrics:
  scale_factor:
  - 1.0
  - 2.0
  - 2.0
  resolution: 512
model:
  checkpoint_path: "./weights/model/kandinsky5lite_t2v_sft_5s.safetensors"
  num_steps: 50
  guidance_weight: 5.0
  dit_params:
    in_visual_dim: 16
    out_visual_dim: 16
    time_dim: 512
    patch_size:
    - 1
    - 2
    - 2
    model_dim: 1792
    ff_dim: 7168
    num_text_blocks: 2
    num_visual_blocks: 32
    axes_dims:
    - 16
    - 24
    - 24
    visual_cond: true
    in_text_dim: 3584
    in_text_dim2: 768
  attention:
    type: flash
    causal: false
    local: false
    glob: false
    window: 3
  vae:
    checkpoint_path: "./weights/vae/"
    name: "hunyuan"
  text_embedder:
    qwen:
      emb_size: 3584
      checkpoint_path: "./weights/text_encoder/"
      max_length: 256
    clip:
      checkpoint_path: "./weights/text_encoder2/"
      emb_size: 768
      max_length: 77
magcache:
  mag_ratios: [0.91607, 0.91507, 0.95254, 1]
"""


def write(folder, edit=None, drop=()):
    """The original layout as a file; `edit` changes the parsed dict, `drop` removes dotted keys."""
    raw = yaml.safe_load(ORIGINAL_LAYOUT)
    if edit is not None:
        edit(raw)
    for key in drop:
        *sections, name = key.split(".")
        section = raw
        for part in sections:
            section = section[part]
        del section[name]
    path = folder / "old.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def set_checkpoint(path, **sections):
    def edit(raw):
        raw["model"]["checkpoint_path"] = path
        for name, values in sections.items():
            target = raw if name in ("metrics", "magcache") else raw["model"]
            target.setdefault(name, {}).update(values)

    return edit


def test_import_and_loading_are_free_of_torch():
    code = (
        "import sys, kandinsky.checkpoints; from kandinsky.config import load_config; "
        f"load_config({str(SFT)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


# --- what people already have -----------------------------------------------------------------------------------------


def test_original_layout_loads_with_exactly_one_warning(tmp_path, caplog):
    path = tmp_path / "k5.yaml"
    path.write_text(ORIGINAL_LAYOUT)
    with caplog.at_level(logging.WARNING):
        config = load_config(path)
    assert len(caplog.records) == 1
    for key in ("causal", "local", "glob", "window"):
        assert f"model.attention.{key}" in caplog.text
    assert config.task == "t2v"
    assert config.source == path
    assert config.model.attention.type == "full"
    assert config.model.dit_params.visual_cond is True
    assert (config.model.dit_params.head_dim, config.model.dit_params.num_heads) == (64, 28)
    assert config.metrics.scheduler_scale == 5.0
    assert config.magcache.mag_ratios == (0.91607, 0.91507, 0.95254, 1.0)
    assert all(type(ratio) is float for ratio in config.magcache.mag_ratios)
    assert config.generation.resolutions == SD_SIZES
    assert (config.generation.width, config.generation.height, config.generation.time_length) == (768, 512, 5.0)
    assert config.generation.negative_caption == VIDEO_NEGATIVE_CAPTION
    assert config.generation.first_frame_normalization is True


def test_our_own_configs_load_without_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        paths = sorted((REPOSITORY / "configs").glob("*.yaml"))
        assert len(paths) >= 18
        for path in paths:
            load_config(path)
    assert not caplog.records


def test_fork_layout_loads(tmp_path, caplog):
    """A known fork has a block_swap section, no attention section, and the engine among the dit_params."""

    def edit(raw):
        raw["block_swap"] = {"enabled": True, "blocks_in_memory": 6}
        raw["model"]["dit_params"]["attention_engine"] = "sdpa"
        raw["model"]["text_embedder"]["qwen"]["processor_path"] = "tokenizer"
        raw["model"]["vae"]["is_parallel"] = True

    with caplog.at_level(logging.WARNING):
        config = load_config(write(tmp_path, edit, drop=["model.attention", "magcache"]))
    assert len(caplog.records) == 1
    assert "block_swap" in caplog.text and "processor_path" in caplog.text and "is_parallel" in caplog.text
    assert config.model.attention.engine == "sdpa"
    assert config.model.attention.type == "full"
    assert config.magcache.mag_ratios is None


def test_attention_engine_of_the_attention_section_wins(tmp_path):
    def edit(raw):
        raw["model"]["dit_params"]["attention_engine"] = "sdpa"
        raw["model"]["attention"]["engine"] = "auto"

    assert load_config(write(tmp_path, edit)).model.attention.engine == "auto"


def test_first_release_had_neither_steps_nor_guidance(tmp_path):
    drop = ["model.num_steps", "model.guidance_weight", "magcache"]
    config = load_config(write(tmp_path, drop=drop))
    assert (config.model.num_steps, config.model.guidance_weight) == (50, 5.0)
    edit = set_checkpoint("./weights/model/kandinsky5lite_t2v_distilled16steps_5s.safetensors")
    config = load_config(write(tmp_path, edit, drop))
    assert (config.model.num_steps, config.model.guidance_weight) == (16, 1.0)


@pytest.mark.parametrize(
    ("checkpoint", "sections", "task", "scale", "size", "seconds"),
    [
        ("m/k5lite_t2v_sft_10s.safetensors", {"attention": {"type": "nabla"}}, "t2v", 10.0, (768, 512), 10.0),
        ("m/renamed.safetensors", {"attention": {"type": "nabla"}}, "t2v", 10.0, (768, 512), 5.0),
        ("m/k5lite_i2v_5s.safetensors", {}, "i2v", 10.0, (768, 512), 5.0),
        ("K5-I2V-Pro-5s/transformer/diffusion_pytorch_model.safetensors", {}, "i2v", 10.0, (768, 512), 5.0),
        ("i2v_trials/k5lite_t2v_5s.safetensors", {}, "t2v", 5.0, (768, 512), 5.0),
        ("m/k5pro_t2v_sft_5s.safetensors", {"metrics": {"resolution": 1024}}, "t2v", 5.0, (1280, 768), 5.0),
        ("m/k5pro_t2v_sft_10s.safetensors", {"metrics": {"resolution": 1024}}, "t2v", 10.0, (1280, 768), 10.0),
        ("m/k5pro_i2v_sft_5s.safetensors", {"metrics": {"resolution": 1024}}, "i2v", 5.0, (1280, 768), 5.0),
        (
            "m/k5lite_t2i.safetensors",
            {"metrics": {"resolution": 1024}, "vae": {"name": "flux"}},
            "t2i",
            3.0,
            (1024, 1024),
            0.0,
        ),
        (
            "m/k5lite_i2i.safetensors",
            {
                "metrics": {"resolution": 1024},
                "vae": {"name": "flux"},
                "dit_params": {"instruct_type": "channel", "visual_cond": False},
            },
            "i2i",
            3.0,
            (1024, 1024),
            0.0,
        ),
    ],
)
def test_what_an_old_file_does_not_say(tmp_path, checkpoint, sections, task, scale, size, seconds):
    config = load_config(write(tmp_path, set_checkpoint(checkpoint, **sections)))
    assert config.task == task
    assert config.metrics.scheduler_scale == scale
    assert (config.generation.width, config.generation.height) == size
    assert config.generation.time_length == seconds
    assert config.generation.resolutions == (HD_SIZES if config.metrics.resolution == 1024 else SD_SIZES)
    assert config.generation.negative_caption == ("" if task in ("t2i", "i2i") else VIDEO_NEGATIVE_CAPTION)


def test_what_a_file_says_is_kept(tmp_path):
    def edit(raw):
        raw["task"] = "t2v"
        raw["model"]["checkpoint_path"] = "k5_i2v_10s.safetensors"
        raw["metrics"]["scheduler_scale"] = 7
        raw["generation"] = {"resolutions": [[256, 128]], "time_length": 2, "negative_caption": "fog"}

    config = load_config(write(tmp_path, edit))
    assert (config.task, config.metrics.scheduler_scale) == ("t2v", 7.0)
    assert (config.generation.width, config.generation.height) == (
        256,
        128,
    )  # the first size where the usual is not one
    assert (config.generation.time_length, config.generation.negative_caption) == (2.0, "fog")


@pytest.mark.parametrize("alias", ["flash", "regular", "sdpa", "full"])
def test_names_of_dense_attention(tmp_path, alias):
    config = load_config(write(tmp_path), [f"model.attention.type={alias}"])
    assert config.model.attention.type == "full"


# --- overrides --------------------------------------------------------------------------------------------------------


def test_override_wins_over_yaml_and_yaml_over_default():
    assert load_config(SFT).model.num_steps == 50
    config = load_config(
        SFT,
        [
            "model.num_steps=20",
            "model.guidance_weight=1",
            "generation.width=512",
            "metrics.scale_factor=[1,3.16,3.16]",
            "generation.negative_caption=a, b = c",
            "generation.first_frame_normalization=false",
            "model.text_embedder.qwen.crop=5",
        ],
    )
    assert config.model.num_steps == 20
    assert config.model.guidance_weight == 1.0
    assert (config.generation.width, config.generation.height) == (512, 512)
    assert config.metrics.scale_factor == (1.0, 3.16, 3.16)
    assert config.generation.negative_caption == "a, b = c"
    assert config.generation.first_frame_normalization is False
    assert config.model.text_embedder.qwen.crop == 5


@pytest.mark.parametrize("override", ["model.num_steps", "=3", "model.num_steps 3", ".num_steps=3", "a[0]=3", ""])
def test_override_of_a_bad_form(override):
    with pytest.raises(ValueError, match="is not of the form") as error:
        load_config(SFT, [override])
    assert repr(override) in str(error.value)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "unknown", "nearest"),
    [
        ("model.num_step=20", "model.num_step", "model.num_steps"),
        ("num_steps=20", "num_steps", "model.num_steps"),
        ("model.dit_params.modle_dim=20", "model.dit_params.modle_dim", "model.dit_params.model_dim"),
        ("generation.widht=512", "generation.widht", "generation.width"),
        ("metric.resolution=512", "metric", "metrics"),
        ("model.attention.wt=3", "model.attention.wt", "model.attention.wT"),
        ("source=x", "source", ""),
    ],
)
def test_unknown_key_names_the_nearest(override, unknown, nearest):
    with pytest.raises(ValueError) as error:
        load_config(SFT, [override])
    assert f"unknown key {unknown};" in str(error.value)
    assert f"did you mean {nearest}" in str(error.value)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.num_steps=0", ["model.num_steps = 0", "at least 1"]),
        ("model.num_steps=-5", ["model.num_steps = -5", "at least 1"]),
        ("model.num_steps=2.5", ["model.num_steps = 2.5", "a whole number"]),
        ("model.num_steps=true", ["model.num_steps = True", "a whole number"]),
        ("model.num_steps='20'", ["model.num_steps = '20'", "a whole number"]),
        ("model.num_steps=", ["model.num_steps", "a whole number"]),
        ("model.guidance_weight=-1", ["model.guidance_weight = -1.0", "0 or more"]),
        ("model.guidance_weight=.nan", ["model.guidance_weight = nan", "a finite number"]),
        ("model.guidance_weight=strong", ["model.guidance_weight = 'strong'", "a finite number"]),
        ("metrics.scheduler_scale=0", ["metrics.scheduler_scale", "more than 0"]),
        ("metrics.scale_factor=[1,2]", ["metrics.scale_factor", "3 values"]),
        ("metrics.scale_factor=2", ["metrics.scale_factor = 2", "a list"]),
        ("metrics.scale_factor=[1,2,0]", ["metrics.scale_factor", "positive"]),
        ("task=v2v", ["task = 'v2v'", "t2v or i2v or t2i or i2i"]),
        ("task=t2i", ["model.vae.name = 'hunyuan'", "flux for task t2i"]),
        ("model=5", ["model = 5", "section", "checkpoint_path"]),
        ("model.checkpoint_path=''", ["model.checkpoint_path", "not empty"]),
        ("model.attention.type=dense", ["model.attention.type = 'dense'", "full or nabla"]),
        ("model.attention.P=0", ["model.attention.P = 0.0", "at most 1"]),
        ("model.attention.P=1.1", ["model.attention.P = 1.1", "at most 1"]),
        ("model.attention.P=[]", ["model.attention.P = ()", "at most 1, or a list of such shares"]),
        ("model.attention.P=[0.9,0]", ["model.attention.P = (0.9, 0.0)", "at most 1, or a list of such shares"]),
        ("model.attention.P=[0.9,much]", ["model.attention.P[1] = 'much'", "a finite number"]),
        ("model.attention.P=", ["model.attention.P = None", "a finite number"]),
        ("model.attention.exact_steps=[0.5,0.2]", ["exact_steps = (0.5, 0.2)", "two shares of the steps"]),
        ("model.attention.exact_steps=0.5", ["exact_steps = 0.5", "a list"]),
        ("model.attention.exact_blocks=[0,32]", ["exact_blocks = [0, 32]", "32 visual blocks: 0 to 31", "-1 to -32"]),
        ("model.attention.exact_blocks=[-33]", ["exact_blocks = [-33]", "-1 to -32"]),
        ("model.attention.exact_blocks=[0.5]", ["exact_blocks[0] = 0.5", "a whole number"]),
        ("model.attention.wT=0", ["model.attention.wT = 0", "at least 1"]),
        ("model.dit_params.num_visual_blocks=0", ["model.dit_params.num_visual_blocks = 0", "at least 1"]),
        ("model.dit_params.axes_dims=[17,24,23]", ["model.dit_params.axes_dims", "even"]),
        ("model.dit_params.axes_dims=[8,8,8]", ["model.dit_params.axes_dims", "24", "divides model_dim = 1792"]),
        ("model.dit_params.in_text_dim=99", ["qwen.emb_size = 3584", "in_text_dim = 99"]),
        ("model.dit_params.instruct_type=token", ["model.dit_params.instruct_type = 'token'", "channel"]),
        ("model.text_embedder.clip.emb_size=99", ["clip.emb_size = 99", "in_text_dim2 = 768"]),
        ("model.text_embedder.qwen.max_length=2000", ["qwen.max_length = 2000", "1 to 1024"]),
        ("model.text_embedder.qwen.crop=-1", ["qwen.crop = -1", "0 or more"]),
        ("model.vae.name=other", ["model.vae.name = 'other'", "hunyuan or flux"]),
        ("model.vae.spatial_tile=100", ["model.vae.spatial_tile = 100", "multiple of 8"]),
        ("model.vae.spatial_overlap=512", ["model.vae.spatial_overlap = 512", "half"]),
        ("magcache.mag_ratios=[1.0,x]", ["magcache.mag_ratios[1] = 'x'", "a finite number"]),
        ("magcache.mag_ratios=[1.0]", ["mag_ratios = 1", "even"]),
        ("generation.resolutions=[[500,500]]", ["generation.resolutions", "(500, 500)", "multiples of 16"]),
        ("generation.resolutions=[[4096,512]]", ["generation.resolutions", "up to 2048"]),
        ("generation.resolutions=[]", ["generation.resolutions", "one [width, height] or more"]),
        ("generation.width=100", ["100x512", "512x512, 768x512, 512x768"]),
        ("generation.time_length=-1", ["generation.time_length = -1.0", "0 to 21"]),
        ("generation.time_length=60", ["generation.time_length = 60.0", "0 to 21"]),
        ("generation.time_length=0.1", ["generation.time_length = 0.1", "the shortest video has 0.17"]),
        ("metrics.scheduler_scale=1" + 400 * "0", ["metrics.scheduler_scale = 1000", " ... ", "a finite number"]),
        ("metrics.scale_factor=[1,2,1" + 400 * "0" + "]", ["metrics.scale_factor[2] = 1000", "a finite number"]),
        ("model.num_steps=1" + 400 * "0", ["model.num_steps = 1000", "at most 15 digits"]),
        ("model.num_steps=1" + 5000 * "0", ["not readable as YAML", "4300 digits"]),
        ("model.num_steps=0x" + 5000 * "f", ["a number of thousands of digits", "at most 15 digits"]),
        ("model.num_steps=[1", ["not readable as YAML"]),
        ("model.checkpoint_path={x: " + 1000 * "y" + "}", ["checkpoint_path = {'x': 'yyy", " ... ", "must be text"]),
        ("model.num_steps=" + 30 * "[" + 30 * "]", ["model.num_steps = [[[[", "a whole number"]),
        ("generation.first_frame_normalization=1", ["first_frame_normalization = 1", "true or false"]),
        ("generation.noise_device=tpu", ["generation.noise_device = 'tpu'", "cpu or cuda"]),
        ("generation.noise_dtype=float16", ["generation.noise_dtype = 'float16'", "float32 or bfloat16"]),
    ],
)
def test_wrong_value_names_key_value_and_what_is_allowed(override, parts):
    with pytest.raises(ValueError) as error:
        load_config(SFT, [override])
    message = str(error.value)
    assert "\n" not in message
    assert "config_5s_sft.yaml" in message
    for part in parts:
        assert part in message


def test_nabla_wants_multiples_of_128(tmp_path):
    resolutions = "generation.resolutions=[[768,512],[576,320]]"
    load_config(SFT, [resolutions])
    with pytest.raises(ValueError, match=r"\(576, 320\).*multiples of 128"):
        load_config(SFT, [resolutions, "model.attention.type=nabla"])


def test_image_to_video_needs_the_condition_channels(tmp_path):
    path = write(tmp_path)
    assert load_config(path, ["task=i2v"]).task == "i2v"
    with pytest.raises(ValueError, match=r"visual_cond = False .* true for task i2v"):
        load_config(path, ["task=i2v", "model.dit_params.visual_cond=false"])


@pytest.mark.parametrize(
    "key",
    [
        "metrics",
        "metrics.resolution",
        "metrics.scale_factor",
        "model.checkpoint_path",
        "model.vae",
        "model.vae.checkpoint_path",
        "model.text_embedder.qwen",
        "model.text_embedder.clip.checkpoint_path",
    ],
)
def test_missing_key_is_named(tmp_path, key):
    with pytest.raises(ValueError, match=f"the key {key}.* is missing"):
        load_config(write(tmp_path, drop=[key]))


def test_missing_file_names_a_near_one():
    with pytest.raises(ValueError, match=r"no such config file; did you mean config_5s_sft.yaml"):
        load_config(REPOSITORY / "configs" / "config_5s_stf.yaml")
    with pytest.raises(ValueError, match="no such config file"):
        load_config("/nowhere/at/all.yaml")


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1", "a: 1\na: 2\n", "just words", "\x00\x01", "model: ${nothing}"])
def test_not_a_config_is_one_line(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_config(path)
    assert "bad.yaml" in str(error.value) and "\n" not in str(error.value)


def test_binary_file_is_one_line(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x80weights")
    with pytest.raises(ValueError, match=r"bad.yaml"):
        load_config(path)


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_config_is_frozen():
    config = load_config(SFT)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.num_steps = 3


def test_dict_is_json_and_loads_again(tmp_path):
    config = load_config(SFT, ["model.num_steps=7"])
    plain = config_to_dict(config)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["model"]["num_steps"] == 7
    assert plain["metrics"]["scale_factor"] == [1.0, 2.0, 2.0]
    assert plain.pop("source") == str(SFT)
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(plain))
    assert dataclasses.replace(load_config(path), source=SFT) == config


# --- files that are none, and numbers that are not Python's ----------------------------------------------------------


def refused(path: Path, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ValueError) as error:
        load_config(path, overrides)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 1000
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a config: there is nothing in the file"),
        ("# nothing\n---\n", "not a config: there is nothing in the file"),
        ("- 1\n", "not a mapping"),
        ("".join(f"{' ' * i}a:\n" for i in range(990)), "nested too deeply"),
        ("a: " + 200_000 * "[", "not readable as YAML"),
        ("a: &a [*a]\n", "not readable as YAML"),
        ("a: \x00\n", "not readable as YAML"),
        ("'5'\n", "not readable as YAML: it is not a mapping of keys to values"),
        ("a cat\n in a boat", "not a config: the file is text, and not a mapping of keys to values"),
        ("null: 1\n", "not readable as YAML: Incompatible key type 'null'"),
        ("a: {b: '${oc.env:NO_SUCH}'}\n", "a.b: what ${...} stands for is not there, or not text"),
    ],
)
def test_files_that_are_no_configs(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    message = refused(tmp_path / "a.yaml")
    assert message.startswith(f"{tmp_path / 'a.yaml'}: ") and says in message
    assert message.isprintable()


def test_unknown_keys_are_shown_as_one_short_line(tmp_path: Path) -> None:
    for key in ("a\nb", "\x1b[2J", "x" * 5000, 7, True):
        (tmp_path / "a.yaml").write_text(yaml.safe_dump({key: 1}))
        assert "unknown key" in refused(tmp_path / "a.yaml") and refused(tmp_path / "a.yaml").isprintable()


def test_a_name_that_is_no_file_is_not_told_its_own(tmp_path: Path) -> None:
    """A folder is told a file in it; what neither is nor is alike, where configs are. No pipe is opened for that."""
    (tmp_path / "configs.yaml").mkdir()
    assert refused(tmp_path / "configs.yaml").endswith("configs.yaml: no such config file: it is a folder")
    (tmp_path / "configs.yaml" / "a.yaml").write_text("")
    assert refused(tmp_path / "configs.yaml").endswith("it is a folder; name a file in it, like a.yaml")
    os.mkfifo(tmp_path / "config.yaml")  # who opens it waits for ever
    assert refused(tmp_path / "config.yaml").endswith("no such config file: it is a pipe, a socket or a device")
    where = "no such config file; the models' configs are in configs"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        assert refused(tmp_path / "a picture.yaml").endswith(where)
        assert refused(tmp_path / "a\0.yaml").endswith(where)
    assert "config.yaml" not in refused(tmp_path / "confix.yaml")


def test_candidates_are_configs_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "compose.yaml").write_text("services: {model: a}\n")
    assert refused(Path("composed.yaml")).endswith(f"the models' configs are in {REPOSITORY / 'configs'}")
    (tmp_path / "composing.yaml").write_text("# mine\nmodel: {}\n")
    assert refused(Path("composed.yaml")).endswith("did you mean composing.yaml?")
    named = REPOSITORY / "configs" / "config_5s_sft.yaml"
    assert refused(Path("config_5s_sft.yaml")).endswith(f"did you mean {named}?")


def test_recorded_configs_under_overrides_that_are_none() -> None:
    recorded = config_to_dict(load_config(SFT))
    assert config_from_dict(recorded, ["model.num_steps=7"]).model.num_steps == 7
    for override in ("model.num_steps=[1", "model.num_steps={a", "num_steps"):
        with pytest.raises(ValueError, match=r"not readable as YAML|is not of the form") as error:
            config_from_dict(recorded, [override])
        assert len(str(error.value).splitlines()) == 1


def test_numpy_numbers_are_numbers() -> None:
    config = with_settings(
        load_config(SFT), runtime={"blocks_on_gpu": np.int64(4)}, magcache={"threshold": np.float32(0.5)}
    )
    assert (config.runtime.blocks_on_gpu, config.magcache.threshold) == (4, 0.5)
    assert type(config.runtime.blocks_on_gpu) is int and type(config.magcache.threshold) is float
    with pytest.raises(ValueError, match="a finite number"):
        with_settings(load_config(SFT), magcache={"threshold": np.bool_(True)})
