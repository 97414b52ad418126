"""The classes of diffusers' names: settings, adapters and arguments; what can't be honoured is one line of error."""

from __future__ import annotations

import inspect
import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_pipelines import build, latents_of

import kandinsky
from kandinsky.checkpoints.diffusers_layout import config_of, published_shift, tell_shift
from kandinsky.checkpoints.hub import Source
from kandinsky.config.reading import config_to_dict, load_config, with_settings
from kandinsky.loading import device_map
from kandinsky.outputs.records import recorded_config
from tests.diffusers_repositories import NABLA, SIZES, build_parts, crop, write_repository

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
TASKS = ("t2v", "i2v", "t2i", "i2i")
SMALL: dict[str, Any] = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}


def ours(task: str) -> Any:
    return getattr(kandinsky, f"Kandinsky5{task.upper()}Pipeline")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A repository for each task, and one with block-sparse attention."""
    root = tmp_path_factory.mktemp("repositories")
    found = {task: write_repository(root / task, task) for task in TASKS}
    found["nabla"] = write_repository(root / "nabla", "t2v", build_parts("t2v", attention=NABLA))
    return found


@pytest.fixture(scope="module")
def shared(folders: dict[str, Path]) -> Iterator[Any]:
    pipe = ours("t2v").from_pretrained(folders["t2v"], overrides=crop("t2v"))
    pipe.set_progress_bar_config(disable=True)
    yield pipe


def generate(pipe: Any, **options: Any) -> Any:
    return pipe("a red circle", generator=torch.Generator().manual_seed(1), **{**SMALL, **options})[0]


# --- signatures -------------------------------------------------------------------------------------------------------

METHODS = ("__call__", "encode_prompt", "prepare_latents", "fast_sta_nabla", "get_sparse_params")
SETTINGS = ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS + SETTINGS)
def test_arguments_and_defaults_are_theirs(task: str, method: str) -> None:
    """In their order; ours may have more behind them."""
    their_class = getattr(diffusers, f"Kandinsky5{task.upper()}Pipeline")
    if not hasattr(their_class, method):
        assert task.endswith("2i") and method in METHODS  # pictures have no block-sparse attention there
        return
    theirs = inspect.signature(getattr(their_class, method)).parameters
    mine = inspect.signature(getattr(ours(task), method)).parameters
    assert list(mine)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        default = mine[name].default
        if name == "max_sequence_length" and method == "__call__":
            default = ours(task).max_tokens
        same = list(default) == parameter.default if isinstance(default, tuple) else default == parameter.default
        assert same or str(default) == str(parameter.default), name


def test_names_are_public_and_lazy() -> None:
    assert {f"Kandinsky5{task.upper()}Pipeline" for task in TASKS} | {"load_image", "export_to_video"} <= set(
        kandinsky.__all__
    )


# --- repositories -----------------------------------------------------------------------------------------------------


def test_the_repository_s_json_goes_before_the_yaml(folders: dict[str, Path], tmp_path: Path) -> None:
    config = config_of(folders["nabla"], "t2v", "kandinskylab/Kandinsky-5.0-T2V-Pro-sft-10s-Diffusers", crop("t2v"))
    assert config.source is not None and config.source.stem == "config_10s_t2v_pro"
    assert config.metrics.scheduler_scale == 5  # the YAML has 10
    assert (config.model.attention.type, config.model.attention.P) == ("nabla", 0.8)
    assert config.model.dit_params.model_dim == SIZES["model_dim"] and config.model.dit_params.visual_cond
    assert (config.generation.schedule, config.generation.first_frame_statistics) == ("diffusers", "together")
    edit = config_of(folders["i2i"], "i2i", "Kandinsky-5.0-I2I-Lite-sft-Diffusers", crop("i2i"))
    assert edit.model.dit_params.instruct_type == "channel" and not edit.model.dit_params.visual_cond
    assert edit.source is not None and edit.source.stem == "config_i2i"
    assert config_of(folders["t2i"], "t2i", "mine", crop("t2i")).source.stem == "config_t2i"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("folder", "task", "right"), [("t2i", "t2v", "T2I"), ("i2i", "t2i", "I2I"), ("t2v", "i2i", "T2V")]
)
def test_another_task_s_repository(folders: dict[str, Path], folder: str, task: str, right: str) -> None:
    with pytest.raises(ValueError, match=f"no repository for {task}: load it with .*Kandinsky5{right}Pipeline"):
        ours(task).from_pretrained(folders[folder], overrides=crop(folder))


def changed(folder: Path, target: Path, file: str, **values: Any) -> Path:
    """A copy of a repository with other values in one of its JSON files; None takes one out."""
    shutil.copytree(folder, target)
    content = json.loads((target / file).read_text()) | values
    (target / file).write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    return target


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("transformer/config.json", {"model_dim": 96}, "the config says .*dim 96"),
        ("transformer/config.json", {"model_dim": "a lot"}, "model.dit_params.model_dim = 'a lot'"),
        ("transformer/config.json", {"attention_type": "nabla", "attention_P": 7}, "model.attention.P = 7"),
        ("scheduler/scheduler_config.json", {"shift": -1}, "metrics.scheduler_scale = -1"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting = True"),
        ("scheduler/scheduler_config.json", {"_class_name": "UniPCMultistepScheduler"}, "UniPCMultistepScheduler"),
    ],
)
def test_json_that_is_not_as_it_should_be(
    folders: dict[str, Path], tmp_path: Path, file: str, values: dict[str, Any], message: str
) -> None:
    folder = changed(folders["t2v"], tmp_path / "repository", file, **values)
    with pytest.raises(ValueError, match=message) as error:
        ours("t2v").from_pretrained(folder, overrides=crop("t2v"))
    assert "\n" not in str(error.value)


def test_what_is_missing_is_told_at_once(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    shutil.copytree(folders["t2v"], folder)
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(ValueError, match="text_encoder_2"):
        ours("t2v").from_pretrained(folder, overrides=crop("t2v"))
    with pytest.raises(ValueError, match=r"config\.json.*diffusers' layout"):
        ours("t2v").from_pretrained(tmp_path)
    for name in ("nowhere", "../elsewhere", "a/b/c", "owner/.."):
        with pytest.raises(ValueError, match="neither a folder here nor a name on the hub"):
            ours("t2v").from_pretrained(name)
    with pytest.raises(ValueError, match="local_files_only"):
        ours("t2v").from_pretrained("owner/name", cache_dir=tmp_path, local_files_only=True)


def test_variants_of_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    shutil.copytree(folders["t2v"], folder)
    with pytest.raises(ValueError, match="0 weights of the variant fp16"):
        ours("t2v").from_pretrained(folder, variant="fp16", overrides=crop("t2v"))
    stem = folder / "transformer" / "diffusion_pytorch_model"
    stem.with_suffix(".safetensors").rename(stem.with_suffix(".fp16.safetensors"))
    pipe = ours("t2v").from_pretrained(folder, variant="fp16", overrides=crop("t2v"))
    assert generate(pipe, guidance_scale=1.0).isfinite().all()


@pytest.mark.parametrize("name", ["revision", "quantization_config", "transformer", "custom_pipeline"])
def test_what_from_pretrained_can_t_honour(folders: dict[str, Path], name: str) -> None:
    with pytest.raises(ValueError, match=f"can't honour {name}"):
        ours("t2v").from_pretrained(folders["t2v"], **{name: "x"})


def test_a_shift_that_the_yaml_does_not_have_is_named(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(folders["t2v"], "t2v", "", crop("t2v"))
    path = folders["t2v"] / "transformer"
    assert published_shift(path) == published_shift(path / "diffusion_pytorch_model.safetensors") == 5
    caplog.set_level(logging.INFO)
    tell_shift(path, config)
    assert not caplog.records
    tell_shift(path, config_of(folders["t2v"], "t2v", "", [*crop("t2v"), "metrics.scheduler_scale=10"]))
    assert re.search("the shift 5, and .* has 10, which is used", caplog.text)
    assert published_shift(folders["t2v"]) is None


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_cost_nothing_until_the_first_call(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_map, "_checked_device", torch.device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    pipe = ours("t2v").from_pretrained(folders["nabla"], torch_dtype=torch.bfloat16, overrides=crop("t2v"))
    assert (pipe.device.type, pipe.dtype) == ("cpu", torch.bfloat16)
    assert pipe.to("cuda:1", torch.float16) is pipe and (pipe.device, pipe.dtype) == (
        torch.device("cuda:1"),
        torch.float16,
    )
    pipe.to(dtype=torch.float32)
    pipe.to(torch.device("cpu"))
    assert (pipe.transformer.device.type, pipe.vae.dtype) == ("cpu", torch.float32)
    pipe.enable_model_cpu_offload(gpu_id=1)
    assert (pipe.device, pipe._config.runtime.offload) == (torch.device("cuda:1"), "on")
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert (pipe.device.type, pipe._config.runtime.blocks_on_gpu) == ("cpu", 1)
    pipe.enable_group_offload("cuda", num_blocks_per_group=2, use_stream=True)
    assert pipe._config.runtime.blocks_on_gpu == 2
    pipe.enable_group_offload(torch.device("cuda"), offload_type="leaf_level")
    assert pipe._config.runtime.blocks_on_gpu == 1
    pipe.transformer.compile(mode="max-autotune-no-cudagraphs", dynamic=True, fullgraph=True)
    assert (pipe._config.runtime.compile, pipe._config.runtime.compile_mode) == ("on", "max-autotune-no-cudagraphs")
    pipe.transformer.set_attention_backend("flex")
    assert pipe._engine == "flex"
    pipe.vae.enable_tiling()
    assert (pipe._config.model.vae.spatial_tile, pipe._config.model.vae.spatial_overlap) == (256, 64)
    pipe.vae.disable_tiling()
    assert pipe._config.model.vae.spatial_tile == 768
    pipe.vae.enable_slicing()
    assert pipe._loaded is None and pipe.vae.config.scaling_factor == pytest.approx(0.476986)


def test_another_shift(shared: Any) -> None:
    before, scheduler = shared.scheduler.config.shift, diffusers.FlowMatchEulerDiscreteScheduler
    levels: list[float] = []
    shared.scheduler = scheduler.from_config(scheduler(shift=before).config, shift=9.0)
    assert shared.scheduler.config.shift == 9
    generate(shared, num_inference_steps=3, callback_on_step_end=lambda p, i, t, x: levels.append(float(t)) or {})
    theirs = scheduler(shift=9.0)
    theirs.set_timesteps(3)
    assert levels == pytest.approx(theirs.timesteps.tolist(), abs=1e-3)
    shared.scheduler = scheduler(shift=before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda pipe: setattr(pipe, "scheduler", diffusers.UniPCMultistepScheduler()), "UniPCMultistepScheduler"),
        (lambda pipe: setattr(pipe, "text_encoder", None), "text_encoder can't be set"),
        (lambda pipe: pipe.to("gpu"), "not a device"),
        (lambda pipe: pipe.to(dtype=torch.int8), "dtype is 'int8'"),
        (lambda pipe: pipe.to("cpu", memory_format=1), "can't honour memory_format"),
        (lambda pipe: pipe.enable_group_offload("cpu"), "needs num_blocks_per_group"),
        (lambda pipe: pipe.enable_group_offload("cpu", offload_to_disk_path="x"), "lie in their files"),
        (lambda pipe: pipe.enable_group_offload("cpu", offload_type="row"), "block_level or leaf_level"),
        (lambda pipe: pipe.transformer.compile(mode="reduce-overhead"), "runtime.compile_mode = 'reduce-overhead'"),
        (lambda pipe: pipe.transformer.compile(backend="eager"), "compiled with inductor"),
        (lambda pipe: pipe.transformer.compile(dynamic=False), "compiled with inductor"),
        (lambda pipe: pipe.transformer.set_attention_backend("xformers"), "choose one of native"),
        (lambda pipe: pipe.vae.enable_tiling(tile_sample_min_height=128), "square"),
        (lambda pipe: pipe.vae.enable_tiling(256, 256, 32), "windows in time"),
        (lambda pipe: pipe.vae.enable_tiling(250, 250), "multiples of 8"),
        (lambda pipe: pipe.set_adapters("style"), "loaded are none"),
        (lambda pipe: pipe.delete_adapters("style"), "there is no adapter 'style'"),
        (lambda pipe: pipe.load_lora_weights({}), "not a dict"),
    ],
)
def test_settings_that_can_t_be_honoured(shared: Any, wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong(shared)


def test_kernels_without_block_maps(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    pipe = ours("t2v").from_pretrained(folders["nabla"], overrides=crop("t2v"))
    for name in ("flash", "_flash_3", "sage"):
        with pytest.raises(ValueError, match="takes no block maps"):
            pipe.transformer.set_attention_backend(name)
    pipe.transformer.set_attention_backend("native")
    assert generate(pipe, width=128, height=128).isfinite().all()  # in diffusers an error
    caplog.set_level(logging.INFO)
    dense = ours("t2v").from_pretrained(folders["t2v"], overrides=crop("t2v"))
    dense.transformer.set_attention_backend("flex")
    assert "attention is dense" in caplog.text and dense._engine == "auto"
    dense.transformer.reset_attention_backend()
    assert dense._engine is None


def test_a_setting_after_the_first_call_counts(folders: dict[str, Path]) -> None:
    pipe = ours("t2v").from_pretrained(folders["t2v"], overrides=crop("t2v"))
    before = generate(pipe)
    loaded = pipe.pipeline
    pipe.to("cpu", torch.float32)
    pipe.vae.enable_tiling(64, 64, tile_sample_stride_height=48, tile_sample_stride_width=48)
    assert pipe.pipeline is loaded and loaded.config.model.vae.spatial_tile == 64  # nothing to load anew
    pipe.enable_sequential_cpu_offload()
    assert pipe.pipeline is not loaded and torch.equal(generate(pipe), before)


# --- adapters ---------------------------------------------------------------------------------------------------------


def write_lora(path: Path, seed: int) -> Path:
    generator, layer = torch.Generator().manual_seed(seed), "visual_transformer_blocks.0.self_attention.to_query"
    tensors = {f"transformer.{layer}.lora_{part}.weight": torch.randn(shape, generator=generator)
               for part, shape in (("A", (4, 64)), ("B", (64, 4)))}  # fmt: skip
    save_file(tensors, path, metadata={"trigger": "magic words "})
    return path


def test_adapters(folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = ours("t2v").from_pretrained(folders["t2v"], overrides=crop("t2v"))
    plain = generate(pipe)
    one, _ = (write_lora(tmp_path / f"{name}.safetensors", seed) for name, seed in (("one", 1), ("two", 2)))
    pipe.load_lora_weights(one, adapter_name="one")
    with_one = generate(pipe)
    pipe.load_lora_weights(tmp_path, weight_name="two.safetensors")
    assert pipe.get_active_adapters() == ["default_1"]
    pipe.set_adapters(["one", "default_1"], [0.5, 2.0])
    mixed = generate(pipe)
    assert len({tuple(x.flatten().tolist()) for x in (plain, with_one, mixed)}) == 3
    pipe.enable_model_cpu_offload()  # loads anew, and has the same adapters
    assert torch.equal(generate(pipe), mixed)
    pipe.delete_adapters("default_1")
    assert pipe.get_active_adapters() == ["one"]
    pipe.set_adapters("one")
    assert torch.equal(generate(pipe), with_one)
    pipe.disable_lora()
    assert torch.equal(generate(pipe), plain)
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), plain)
    with pytest.raises(ValueError, match="loaded are none"):
        pipe.set_adapters("one")


def test_an_adapter_from_the_hub(shared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Source] = []

    def download(wanted: list[Source], *rest: Any) -> None:
        asked.extend(wanted)
        (tmp_path / "a-lora").mkdir()
        write_lora(tmp_path / "a-lora" / "lora.safetensors", 3)

    monkeypatch.setattr("kandinsky.checkpoints.hub.download", download)
    shared.load_lora_weights("owner/a-lora", weight_name="lora.safetensors", adapter_name="a", cache_dir=tmp_path)
    assert [(source.repo, source.names) for source in asked] == [("owner/a-lora", ("*",))]
    assert shared.get_active_adapters() == ["a"]
    shared.unload_lora_weights()


# --- text -------------------------------------------------------------------------------------------------------------


def test_encoded_prompts(shared: Any) -> None:
    qwen, clip, ends = shared.encode_prompt(["a red circle", "a blue cross on white"], num_videos_per_prompt=2)
    assert ends.dtype == torch.int32 and len(ends) == 5 and ends[0] == 0
    lengths = ends.diff().tolist()
    assert lengths[0] == lengths[1] < lengths[2] == lengths[3] == qwen.shape[1]
    assert qwen.shape == (4, lengths[2], 128) and clip.shape == (4, 128) and torch.equal(qwen[0], qwen[1])
    single, _, _ = shared.encode_prompt(" a &amp;lt; red\n  circle ")
    cleaned, _, _ = shared.encode_prompt("a < red circle")
    assert torch.equal(single, cleaned)  # HTML and spaces, as there
    cut, _, ends = shared.encode_prompt("a red circle", max_sequence_length=2, dtype=torch.float16)
    assert cut.shape[1] == ends[-1] == 2 and cut.dtype == torch.float16


def test_embeddings_are_as_good_as_words(shared: Any) -> None:
    words = ["a red circle", "a blue cross on a white background"]
    names = ("prompt_embeds_qwen", "prompt_embeds_clip", "prompt_cu_seqlens")
    given = dict(zip(names, shared.encode_prompt(words), strict=True))
    given |= {f"negative_{name}": value for name, value in zip(names, shared.encode_prompt("ugly"), strict=True)}
    options = {**SMALL, "negative_prompt": "ugly"}
    expected = shared(words, **options, generator=torch.Generator().manual_seed(1)).frames
    del options["negative_prompt"]
    found = shared(**options, **given, generator=torch.Generator().manual_seed(1)).frames
    assert torch.equal(found, expected)
    first = shared(words[0], **SMALL, negative_prompt="ugly", generator=torch.Generator().manual_seed(1)).frames
    assert (first - expected[:1]).abs().max() < 1e-5  # the longer prompt beside it changes nothing


def test_an_edit_sees_the_picture_as_it_was_given(folders: dict[str, Path]) -> None:
    pipe = ours("i2i").from_pretrained(folders["i2i"], overrides=crop("i2i"))
    large = PICTURE.resize((240, 160))
    qwen, _, _ = pipe.encode_prompt("make it blue", large)
    larger, _, _ = pipe.encode_prompt("make it blue", PICTURE.resize((480, 320)))
    assert larger.shape[1] > qwen.shape[1]
    with pytest.raises(ValueError, match="max_sequence_length is 3"):
        pipe.encode_prompt("make it blue", large, max_sequence_length=3)


# --- calls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 500}, "height is 500; it must be a multiple of 16"),
        ({"width": "wide"}, "width is 'wide'"),
        ({"prompt": None}, "there is no prompt"),
        ({"prompt": 7}, "prompt is 7"),
        ({"prompt": []}, "prompt is"),
        ({"negative_prompt": 7}, "negative_prompt is 7"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"prompt_embeds_qwen": torch.zeros(1, 2, 128)}, "belong together"),
        ({"negative_prompt_cu_seqlens": torch.tensor([0, 2])}, "belong together"),
        ({"max_sequence_length": 2000}, "from 1 to 1024"),
        ({"callback_on_step_end_tensor_inputs": ["timesteps"]}, "it may have latents"),
        ({"callback_on_step_end": 7}, "callback_on_step_end is 7|not callable"),
        ({"output_type": "mp4"}, "output_type is 'mp4'"),
        ({"generator": 7}, "generator is 7"),
        ({"generator": [torch.Generator()] * 3}, "3 generators for 1 outputs"),
        ({"latents": torch.zeros(1, 2, 4, 4, 16)}, "latents are"),
        ({"latents": "noise"}, "latents are"),
        ({"num_frames": "many"}, "num_frames is 'many'"),
        ({"num_inference_steps": 0}, "number of steps is 0"),
        ({"guidance_scale": "much"}, "guidance_weight is 'much'"),
        ({"num_videos_per_prompt": 0}, "outputs per prompt"),
        ({"schedule": "karras"}, "schedule is 'karras'"),
        ({"scheduler_scale": -1}, "scheduler_scale is -1"),
    ],
)
def test_calls_that_can_t_be_honoured(shared: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        shared(**{"prompt": "a red circle", **SMALL, **options})
    assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="unexpected keyword"):
        shared("a red circle", eta=1)


def test_pictures_that_are_missing_or_too_many(folders: dict[str, Path]) -> None:
    pipe = ours("i2v").from_pretrained(folders["i2v"], overrides=crop("i2v"))
    with pytest.raises(ValueError, match="image is missing"):
        pipe(None, "it moves")
    with pytest.raises(ValueError, match="3 pictures for 2 outputs"):
        pipe([PICTURE] * 3, ["it moves", "it stays"], **SMALL)
    with pytest.raises(ValueError, match="image is missing"):
        pipe.check_inputs("it moves", None, None, 64, 64)
    pipe.check_inputs("it moves", None, PICTURE, 64, 64, max_sequence_length=8)
    with pytest.raises(ValueError, match="no arguments"):
        pipe.check_inputs("it moves", None, PICTURE, 64, 64, eta=1)


def test_outputs(shared: Any) -> None:
    options = {**SMALL, "guidance_scale": 1.0, "num_inference_steps": 1}
    del options["output_type"]
    output = shared("a red circle", **options)
    assert output.frames is output[0] and len(output.frames[0]) == 5 and output.frames[0][0].size == (32, 32)
    (pixels,) = shared("a red circle", **options, output_type="np", return_dict=False)
    assert pixels.shape == (1, 5, 32, 32, 3) and 0 <= pixels.min() <= pixels.max() <= 1
    options["num_frames"] = 1
    assert len(shared("a red circle", **options).frames[0]) == 1
    assert shared("a red circle", **options, output_type="pt").frames.shape == (1, 1, 3, 32, 32)


def test_the_original_s_noise_levels_on_request(shared: Any) -> None:
    theirs, levels = generate(shared), []
    original = generate(
        shared, schedule="original", callback_on_step_end=lambda pipe, i, t, tensors: levels.append(float(t)) or {}
    )
    assert levels == pytest.approx([1000, 1000 * 2.5 / 3]) and not torch.equal(theirs, original)


def test_callbacks_that_return_nonsense(shared: Any) -> None:
    def returns(value: Any) -> Any:
        return lambda pipe, step, timestep, tensors: value(tensors)

    for value, message in (
        (lambda tensors: {"noise": 1}, "it may replace"),
        (lambda tensors: {"latents": tensors["latents"][..., :16]}, "own channels"),
        (lambda tensors: {"latents": tensors["latents"] + 1}, "own channels"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(shared, callback_on_step_end=returns(value))
    assert torch.equal(generate(shared, callback_on_step_end=returns(lambda tensors: None)), generate(shared))


# --- pictures and videos ----------------------------------------------------------------------------------------------


def test_load_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    PICTURE.save(path)

    class Answer:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def read(self, limit: int) -> bytes:
            return self.content[:limit]

        def __enter__(self) -> Answer:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    answers = {"https://here/picture.png": path.read_bytes(), "https://here/text": b"no picture"}
    monkeypatch.setattr("urllib.request.urlopen", lambda request, timeout: Answer(answers[request.full_url]))
    for source in (path, str(path), PICTURE, "https://here/picture.png"):
        assert np.array_equal(np.asarray(kandinsky.load_image(source)), np.asarray(PICTURE))
    assert kandinsky.load_image(path, lambda picture: picture.resize((8, 8))).size == (8, 8)
    with pytest.raises(ValueError, match="is no picture"):
        kandinsky.load_image("https://here/text")
    monkeypatch.setattr("kandinsky.diffusers_calls.media.MAX_BYTES", 100)
    with pytest.raises(ValueError, match="more than"):
        kandinsky.load_image("https://here/picture.png")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="can't be fetched"):
        kandinsky.load_image("http://127.0.0.1:9/picture.png")


def test_export_to_video(tmp_path: Path) -> None:
    frames = [PICTURE.resize((32, 32)).rotate(90 * i) for i in range(4)]
    arrays = [np.asarray(frame).astype(np.float32) / 255 for frame in frames]
    for i, video in enumerate((frames, arrays, np.stack(arrays))):
        path = kandinsky.export_to_video(video, tmp_path / f"{i}.mp4", fps=24, quality=9)
        assert path == str(tmp_path / f"{i}.mp4")
    assert (tmp_path / "0.mp4").read_bytes() == (tmp_path / "1.mp4").read_bytes() == (tmp_path / "2.mp4").read_bytes()
    worse = kandinsky.export_to_video(frames, quality=2)
    assert Path(worse).stat().st_size < (tmp_path / "0.mp4").stat().st_size
    for options, message in (
        ({"bitrate": 1000}, "bitrate"),
        ({"quality": 11}, "quality is 11"),
        ({"macro_block_size": 24}, "no multiples"),
    ):
        with pytest.raises(ValueError, match=message):
            kandinsky.export_to_video(frames, tmp_path / "x.mp4", **options)
    for wrong in ([], ["frame"], [frames[0], frames[1].resize((16, 16))], [np.zeros((16, 16, 3), dtype=np.int64)]):
        with pytest.raises(ValueError, match="frame"):
            kandinsky.export_to_video(wrong, tmp_path / "x.mp4")  # type: ignore[arg-type]


# --- the same settings in our own calls -------------------------------------------------------------------------------


def test_schedule_of_our_own_calls(tmp_path: Path) -> None:
    """By argument and by YAML; it is in the record, and counts as much as any other setting."""
    pipe = build("t2i")
    levels: list[float] = []

    def note(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        levels.append(float(timestep))

    original = latents_of(pipe, callback_on_step_end=note)
    theirs = latents_of(pipe, callback_on_step_end=note, schedule="diffusers")
    lowest = 3 * 0.001 / (1 + 2 * 0.001)  # a shift of 3, applied twice
    assert levels == pytest.approx([1000, 750, 1000, 1000 * 3 * lowest / (1 + 2 * lowest)])
    assert not torch.equal(original, theirs)
    pipe.config = with_settings(pipe.config, generation={"schedule": "diffusers"})
    assert torch.equal(latents_of(pipe), theirs)
    latents_of(pipe, output_type="pil", save_path=tmp_path / "picture.png")
    assert json.loads((tmp_path / "picture.json").read_text())["schedule"] == "diffusers"
    with pytest.raises(ValueError, match="schedule is 'karras'; it must be original or diffusers"):
        latents_of(pipe, schedule="karras")


def test_a_condition_without_a_picture_is_refused() -> None:
    configs = Path(__file__).resolve().parents[2] / "configs"
    with pytest.raises(ValueError, match=r"generation\.visual_cond = 'image' .* zeros for task t2v"):
        load_config(configs / "config_5s_sft.yaml", ["generation.visual_cond=image"])
    assert (
        load_config(configs / "config_5s_i2v.yaml", ["generation.visual_cond=image"]).generation.visual_cond == "image"
    )
    record = {"config": config_to_dict(load_config(configs / "config_5s_i2v.yaml"))}
    for key in ("visual_cond=image", "schedule=diffusers"):
        with pytest.raises(ValueError, match="goes on with what its run began with"):
            recorded_config(record, [f"generation.{key}"], "x.stopped.safetensors", decoding=False)
