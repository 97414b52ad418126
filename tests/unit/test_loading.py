"""From files to models: values, dtypes, strictness, and one clear line for every file that is not what it should be."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kandinsky.attention.block_sparse import sdpa_block_sparse
from kandinsky.checkpoints import headers
from kandinsky.checkpoints.dit_layout import COMFY_PREFIX, expected_dit_shapes
from kandinsky.config.reading import load_config
from kandinsky.config.schema import DiTConfig
from kandinsky.loading import devices, weights
from kandinsky.loading import dit as dit_loading
from kandinsky.loading.devices import resolve_dtype
from kandinsky.loading.dit import load_dit
from kandinsky.loading.getters import get_T2V_pipeline
from kandinsky.loading.vae import load_vae
from kandinsky.models.causal_conv import CausalConv3d
from kandinsky.models.dit import DiffusionTransformer3D
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
from kandinsky.text.prompts import get_template, prefix_length
from tools.make_tiny_text_encoders import make_text_encoders

REPOSITORY = Path(__file__).resolve().parents[2]
LITE_YAML = REPOSITORY / "configs" / "config_5s_sft.yaml"
TINY_YAML = REPOSITORY / "configs" / "config_tiny_t2v.yaml"

PARAMS = DiTConfig(
    in_text_dim=48,
    in_text_dim2=24,
    time_dim=32,
    model_dim=128,
    ff_dim=128,
    num_text_blocks=1,
    num_visual_blocks=2,
    visual_cond=True,
)
VAE_CONFIG = {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 16}
PUBLISHED_PRO = DiTConfig(
    time_dim=1024,
    model_dim=4096,
    ff_dim=16384,
    num_text_blocks=4,
    num_visual_blocks=60,
    axes_dims=(32, 48, 48),
    visual_cond=True,
)
State = dict[str, Tensor]


def random_state(model: nn.Module, seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in model.state_dict().items()}


@pytest.fixture(scope="module")
def dit_state() -> State:
    return random_state(DiffusionTransformer3D(**dataclasses.asdict(PARAMS)))


@pytest.fixture(scope="module")
def vae_state() -> State:
    return random_state(AutoencoderKLHunyuanVideo(**VAE_CONFIG))


def write_sharded(state: State, folder: Path, stem: str = "diffusion_pytorch_model") -> None:
    folder.mkdir()
    names = list(state)
    shards = {f"{stem}-00001-of-00002.safetensors": names[::2], f"{stem}-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def write_vae(state: State, folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_one_line(error: pytest.ExceptionInfo[ValueError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


def assert_loaded(model: nn.Module, state: State, dtype: torch.dtype) -> None:
    loaded = model.state_dict()
    assert list(loaded) == list(type(model)(**_arguments(model)).state_dict())
    for name, tensor in loaded.items():
        assert tensor.device.type == "cpu" and torch.equal(tensor, state[name].to(dtype)), name
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def _arguments(model: nn.Module) -> dict[str, Any]:
    return dataclasses.asdict(PARAMS) if isinstance(model, DiffusionTransformer3D) else VAE_CONFIG


# --- DiT --------------------------------------------------------------------------------------------------------------


def keeps_precision(name: str) -> bool:
    return name.startswith("time_embeddings.") or "modulation.out_layer." in name


def test_dit_in_float32(dit_state: State, tmp_path: Path) -> None:
    save_file(dit_state, tmp_path / "dit.safetensors")
    assert_loaded(load_dit(tmp_path / "dit.safetensors", PARAMS, "cpu", torch.float32), dit_state, torch.float32)


def test_dit_in_bfloat16_keeps_time_and_modulation(dit_state: State, tmp_path: Path) -> None:
    save_file(dit_state, tmp_path / "dit.safetensors")
    loaded = load_dit(tmp_path / "dit.safetensors", PARAMS, "cpu", torch.bfloat16).state_dict()
    assert sum(map(keeps_precision, loaded)) == 4 + 2 * (1 + 2 + 1)
    for name, tensor in loaded.items():
        expected = dit_state[name] if keeps_precision(name) else dit_state[name].bfloat16()
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name


def test_bfloat16_file_does_not_grow(dit_state: State, tmp_path: Path) -> None:
    """Time and modulation keep their file's precision: bfloat16 stays, and is computed with in float32."""
    low = {name: tensor.bfloat16() for name, tensor in dit_state.items()}
    save_file(low, tmp_path / "dit.safetensors")
    dit = load_dit(tmp_path / "dit.safetensors", PARAMS, "cpu", torch.bfloat16)
    assert_loaded(dit, low, torch.bfloat16)
    params = dit.text_transformer_blocks[0].text_modulation(torch.ones(1, 32))
    assert all(p.dtype == torch.float32 for p in params)


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model"])
def test_sharded_folder(dit_state: State, tmp_path: Path, stem: str) -> None:
    write_sharded(dit_state, tmp_path / "dit", stem)
    assert_loaded(load_dit(tmp_path / "dit", PARAMS, "cpu", torch.float32), dit_state, torch.float32)


def test_missing_shard(dit_state: State, tmp_path: Path) -> None:
    write_sharded(dit_state, tmp_path / "dit")
    (tmp_path / "dit" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError) as error:
        load_dit(tmp_path / "dit", PARAMS, "cpu", torch.float32)
    assert_one_line(error, "1 of 2 shards are missing", "diffusion_pytorch_model-00002-of-00002.safetensors")


def test_comfy_prefix(dit_state: State, tmp_path: Path) -> None:
    save_file({COMFY_PREFIX + name: tensor for name, tensor in dit_state.items()}, tmp_path / "dit.safetensors")
    assert_loaded(load_dit(tmp_path / "dit.safetensors", PARAMS, "cpu", torch.float32), dit_state, torch.float32)


def test_loaded_dit_computes_what_the_saved_one_did(dit_state: State, tmp_path: Path) -> None:
    source = DiffusionTransformer3D(**dataclasses.asdict(PARAMS)).eval()
    source.load_state_dict(dit_state)
    save_file(dit_state, tmp_path / "dit.safetensors")
    inputs = (torch.randn(1, 2, 4, 4, 33), torch.randn(1, 5, 48), torch.randn(1, 24), torch.tensor([700.0]))
    with torch.no_grad():
        expected = source(*inputs)
    out = load_dit(tmp_path / "dit.safetensors", PARAMS, "cpu", torch.float32)(*inputs)
    assert not out.requires_grad and torch.equal(out, expected)


def test_float32_weights_are_not_copied(dit_state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is cast the model's parameters are the memory-mapped file itself."""
    save_file(dit_state, tmp_path / "dit.safetensors")
    read: dict[str, int] = {}
    original: Callable[[Sequence[Path]], Iterator[tuple[str, Tensor]]] = weights.read_tensors

    def recording(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in original(files):
            read[name] = tensor.data_ptr()
            yield name, tensor

    monkeypatch.setattr(weights, "read_tensors", recording)
    dit = load_dit(tmp_path / "dit.safetensors", PARAMS, "cpu", torch.float32)
    assert {name: tensor.data_ptr() for name, tensor in dit.state_dict().items()} == read


def test_tensors_are_cast_one_at_a_time(dit_state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a tensor is read, the float32 original of the one before it is already gone."""
    import weakref

    save_file(dit_state, tmp_path / "dit.safetensors")
    alive: list[int] = []
    originals: list[weakref.ref[Tensor]] = []
    original = weights.read_tensors

    def recording(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in original(files):
            if not keeps_precision(name):
                originals.append(weakref.ref(tensor))
            alive.append(sum(reference() is not None for reference in originals))
            yield name, tensor

    monkeypatch.setattr(weights, "read_tensors", recording)
    load_dit(tmp_path / "dit.safetensors", PARAMS, "cpu", torch.bfloat16)
    assert len(alive) == len(dit_state) and max(alive) <= 2


def test_no_parameter_is_allocated_before_it_is_read(
    dit_state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(dit_state, tmp_path / "dit.safetensors")
    devices = set()
    original = weights.load_weights

    def recording(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        devices.update(p.device.type for p in model.parameters())
        original(model, *args, **kwargs)

    monkeypatch.setattr(dit_loading, "load_weights", recording)
    load_dit(tmp_path / "dit.safetensors", PARAMS, "cpu", torch.float32)
    assert devices == {"meta"}


def test_wrong_variant_is_recognised_from_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with the table of contents of Pro and no tensors at all, given to the Lite config."""
    shapes = expected_dit_shapes(PUBLISHED_PRO)
    entries = {name: {"dtype": "TEST", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    text = json.dumps(entries).encode()
    path = tmp_path / "pro.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    monkeypatch.setitem(headers.BITS, "TEST", 0)  # takes no bytes
    monkeypatch.setattr(dit_loading, "DiffusionTransformer3D", lambda **_: pytest.fail("a model was built"))
    with pytest.raises(ValueError) as error:
        load_dit(path, load_config(LITE_YAML).model.dit_params, "cpu", torch.bfloat16)
    assert_one_line(
        error, str(path), "this file is Pro (60 visual blocks, dim 4096)", "the config says Lite (32 visual"
    )


@pytest.mark.parametrize("what", ["missing", "unexpected", "of another shape"])
def test_dit_is_loaded_strictly(dit_state: State, tmp_path: Path, what: str) -> None:
    state, name = dict(dit_state), "text_transformer_blocks.0.self_attention.to_key.bias"
    if what == "missing":
        del state[name]
    elif what == "unexpected":
        name = "visual_embeddings.extra.weight"
        state[name] = torch.zeros(2)
    else:
        state[name] = torch.zeros(7)
    save_file(state, tmp_path / "dit.safetensors")
    with pytest.raises(ValueError) as error:
        load_dit(tmp_path / "dit.safetensors", PARAMS, "cpu", torch.float32)
    assert_one_line(error, str(tmp_path / "dit.safetensors"), what, name)


@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_truncated_file(dit_state: State, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "dit.safetensors"
    save_file(dit_state, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError) as error:
        load_dit(path, PARAMS, "cpu", torch.float32)
    assert_one_line(error, str(path), "truncated", "download it again")


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "dit.pt")
    with pytest.raises(ValueError) as error:
        load_dit(tmp_path / "dit.pt", PARAMS, "cpu", torch.float32)
    assert_one_line(error, "safetensors only")


# --- VAE --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vae(vae_state: State, tmp_path: Path, dtype: torch.dtype) -> None:
    """Also with the entries that a published config.json has for other software."""
    others = {"_class_name": "AutoencoderKLHunyuanVideo", "act_fn": "silu", "down_block_types": ["A"] * 4}
    folder = write_vae(vae_state, tmp_path / "vae", VAE_CONFIG | others | {"scaling_factor": 0.5})
    vae = load_vae(folder, "cpu", dtype)
    assert_loaded(vae, vae_state, dtype)
    assert vae.scaling_factor == 0.5
    assert all(conv.by_frame for conv in vae.modules() if isinstance(conv, CausalConv3d))
    pixels = vae.decode(torch.zeros(1, 16, 2, 2, 2, dtype=dtype))
    assert pixels.shape == (1, 3, 5, 16, 16) and pixels.dtype == dtype
    assert is_channels_last(vae)


def is_channels_last(vae: AutoencoderKLHunyuanVideo) -> bool:
    weights = [weight for weight in vae.parameters() if weight.dim() == 5]
    return all(weight.is_contiguous(memory_format=torch.channels_last_3d) for weight in weights)


def test_vae_that_a_gpu_gets_later(vae_state: State, tmp_path: Path) -> None:
    """Three-dimensional convolutions in channels-last memory, which offloading keeps."""
    vae = load_vae(write_vae(vae_state, tmp_path / "vae", VAE_CONFIG), "cuda", torch.bfloat16, read=False)
    assert is_channels_last(vae) and next(vae.parameters()).is_meta
    assert not any(conv.by_frame or conv.for_cpu for conv in vae.modules() if isinstance(conv, CausalConv3d))


def test_vae_of_another_config(vae_state: State, tmp_path: Path) -> None:
    folder = write_vae(vae_state, tmp_path / "vae", VAE_CONFIG | {"layers_per_block": 2})
    with pytest.raises(ValueError) as error:
        load_vae(folder, "cpu", torch.float32)
    assert_one_line(error, str(folder), "tensors are missing, unknown or of another shape", "or its config is")


@pytest.mark.parametrize("text", [None, "{", ""])
def test_vae_without_a_readable_config(vae_state: State, tmp_path: Path, text: str | None) -> None:
    folder = write_vae(vae_state, tmp_path / "vae", VAE_CONFIG)
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(ValueError) as error:
        load_vae(folder, "cpu", torch.float32)
    assert_one_line(error, "config.json")


def test_truncated_vae(vae_state: State, tmp_path: Path) -> None:
    folder = write_vae(vae_state, tmp_path / "vae", VAE_CONFIG)
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError) as error:
        load_vae(folder, "cpu", torch.float32)
    assert_one_line(error, str(path), "truncated")


# --- the pipeline -----------------------------------------------------------------------------------------------------


def test_missing_weights_name_the_download_and_what_runs_without(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        get_T2V_pipeline("cpu", cache_dir=tmp_path, conf_path=LITE_YAML)
    assert_one_line(
        error,
        str(tmp_path / "model" / "kandinsky5lite_t2v_sft_5s.safetensors"),
        "python download_models.py --models 5s_sft",
        "configs/config_tiny_t2v.yaml",
    )


@pytest.mark.parametrize(
    ("device_map", "parts"),
    [
        ("gpu", ["'gpu' is not a device", "cpu"]),
        ({"dit": "cpu"}, ["['dit']", "vae", "text_embedder"]),
        ({"dit": "cpu", "vae": "cpu", "text_encoder": "cpu"}, ["text_encoder", "text_embedder"]),
        ("cuda:99", ["no cuda:99"]),
    ],
)
def test_wrong_devices(device_map: Any, parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        get_T2V_pipeline(device_map, conf_path=LITE_YAML)
    assert_one_line(error, *parts)


def test_unknown_dtype() -> None:
    for dtype, name in (("float8", "float8"), (torch.int8, "int8")):
        with pytest.raises(ValueError) as error:
            get_T2V_pipeline("cpu", conf_path=LITE_YAML, dtype=dtype)
        assert_one_line(error, name, "float32, bfloat16, float16")


def test_config_of_another_task() -> None:
    config = dataclasses.replace(load_config(LITE_YAML), task="i2v")
    with pytest.raises(ValueError) as error:
        get_T2V_pipeline("cpu", config=config)
    assert_one_line(error, "a config for i2v", "load it with get_I2V_pipeline")


def test_default_dtypes() -> None:
    assert resolve_dtype(None, torch.device("cpu")) == torch.float32
    assert resolve_dtype(None, torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert resolve_dtype(torch.float16, torch.device("cuda")) == torch.float16


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, vae_state: State) -> dict[str, Any]:
    """Random weights of everything, and the arguments of get_T2V_pipeline that find them."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("world")
    make_text_encoders([f"a {c} {s} moves" for c in ("red", "blue") for s in ("circle", "square")], folder, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "text_encoder")
    overrides = [
        f"model.text_embedder.qwen.crop={prefix_length(tokenizer, get_template('video'))}",
        "model.dit_params.num_visual_blocks=1",
        "model.dit_params.model_dim=64",
        "model.dit_params.ff_dim=64",
        "model.num_steps=2",
        "generation.width=32",
        "generation.height=32",
        "generation.resolutions=[[32,32]]",
    ]
    params = load_config(TINY_YAML, overrides).model.dit_params
    save_file(random_state(DiffusionTransformer3D(**dataclasses.asdict(params))), folder / "dit.safetensors")
    write_vae(vae_state, folder / "vae", VAE_CONFIG)
    return {
        "conf_path": TINY_YAML,
        "overrides": overrides,
        "dit_path": folder / "dit.safetensors",
        "vae_path": folder / "vae",
        "text_encoder_path": folder / "text_encoder",
        "text_encoder2_path": folder / "text_encoder2",
    }


def test_unknown_engine(world: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as error:
        get_T2V_pipeline("cpu", attention_engine="flash9", **world)
    assert_one_line(error, "'flash9'", "auto", "sdpa")


def test_nabla_has_engines_of_its_own(world: dict[str, Any]) -> None:
    """The name in `model.attention.engine` chooses among what can compute the config's kind of attention."""
    nabla = ["model.attention.type=nabla", "generation.width=128", "generation.height=128"]
    sizes = ["generation.resolutions=[[128,128]]"]
    pipe = get_T2V_pipeline("cpu", **world | {"overrides": [*world["overrides"], *nabla, *sizes]})
    assert pipe.execution.block_sparse is sdpa_block_sparse
    options = {"num_frames": 9, "seed": 1, "num_steps": 1, "progress": False, "output_type": "latent"}
    everything = dataclasses.replace(pipe.config.model.attention, P=1.0)
    dense = dataclasses.replace(everything, type="full")
    results = []
    for attention in (everything, dense, dataclasses.replace(everything, P=0.1, wT=1, wH=1, wW=1)):
        model = dataclasses.replace(pipe.config.model, attention=attention)
        pipe.config = dataclasses.replace(pipe.config, model=model)
        results.append(pipe("a red circle moves", **options))
    assert (results[0] - results[1]).abs().max() < 1e-5  # all of the mass is dense attention
    assert (results[2] - results[1]).abs().max() > 1e-4
    with pytest.raises(ValueError) as error:
        get_T2V_pipeline("cpu", attention_engine="sage", **world | {"overrides": [*world["overrides"], *nabla, *sizes]})
    assert_one_line(error, "'sage'", "takes no block maps", "flex, sdpa")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_pipeline_runs(world: dict[str, Any], dtype: str | None) -> None:
    pipe = get_T2V_pipeline("cpu", dtype=dtype, **world)
    video = pipe("a red circle moves", time_length=0.25, seed=3, progress=False)
    assert isinstance(video, Tensor)
    assert video.shape == (1, 3, 5, 32, 32) and video.dtype == torch.uint8
    assert torch.equal(video, pipe("a red circle moves", time_length=0.25, seed=3, progress=False))
    assert not torch.equal(video, pipe("a red circle moves", time_length=0.25, seed=4, progress=False))
    (image,) = pipe("a red circle moves", time_length=0, seed=3, progress=False)
    assert image.size == (32, 32) and image.mode == "RGB"


def test_each_path_reaches_its_component(world: dict[str, Any], tmp_path: Path) -> None:
    state = load_file(world["dit_path"])
    save_file({name: 2 * tensor for name, tensor in state.items()}, tmp_path / "double.safetensors")
    pipe = get_T2V_pipeline("cpu", **world | {"dit_path": tmp_path / "double.safetensors"})
    for name, tensor in pipe.dit.state_dict().items():
        assert torch.equal(tensor, 2 * state[name]), name
    for name in ("dit_path", "vae_path", "text_encoder_path", "text_encoder2_path"):
        with pytest.raises(ValueError) as error:
            get_T2V_pipeline("cpu", **world | {name: tmp_path / "nothing"})
        assert_one_line(error, str(tmp_path / "nothing"))


# --- what there is to compute with ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("t2v", "hunyuan"), ("t2i", "flux")])
def test_vae_where_the_processor_has_no_arithmetic_in_its_dtype(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VAE convolves in float32, and the plan of that machine counts it."""
    cpu, folder = torch.device("cpu"), REPOSITORY / "assets" / "tiny" / {"t2v": "t2v", "t2i": "image"}[name] / "vae"
    for native in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda native=native: native)
        assert load_vae(folder, cpu, torch.bfloat16, kind).float32_convolutions is not native
        assert ("bfloat16" in devices.machine_memory(cpu).float32_convolutions) is not native
        assert not load_vae(folder, cpu, torch.float32, kind).float32_convolutions
        assert not devices.convolves_in_float32(torch.bfloat16, torch.device("cuda"))


@pytest.mark.processor
def test_which_processors_have_no_arithmetic_in_bfloat16() -> None:
    """As torch says, whose answer follows ONEDNN_MAX_CPU_ISA: one of the machines that .ci/run plays."""
    asked_for = os.environ.get("ONEDNN_MAX_CPU_ISA")
    if asked_for != "AVX2" and torch.backends.cpu.get_cpu_capability() != "AVX2":
        pytest.skip("this processor may have it")
    assert devices.convolves_in_float32(torch.bfloat16, torch.device("cpu"))


def test_what_torch_keeps_on_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a pipeline that is gone: else a notebook could load a large one only once."""
    gb = 2**30
    numbers = {"memory_reserved": 30 * gb, "memory_allocated": 2 * gb}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * gb, 48 * gb))
    for name, number in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, number=number: number)
    found = devices.machine_memory(torch.device("cuda:0"))
    assert found.gpu_memory == 38 * gb + devices.CUDA_CONTEXT and found.float32_convolutions == ()
