"""Other people's formats: GGUF, ComfyUI's fp8, encoders as single files. What they hold is what is computed with."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kandinsky import get_T2V_pipeline
from kandinsky.checkpoints.dit_layout import COMFY_PREFIX
from kandinsky.checkpoints.encoder_config import CLIP, QWEN, encoder_config
from kandinsky.checkpoints.formats import open_weights
from kandinsky.checkpoints.gguf_file import BLOCKS
from kandinsky.checkpoints.inspect import inspect
from kandinsky.config.reading import load_config
from kandinsky.config.schema import DiTConfig
from kandinsky.loading.dit import load_dit, reread
from kandinsky.loading.text_encoders import load_text_embedder
from kandinsky.models.dit import DiffusionTransformer3D
from kandinsky.planning.weights import models
from kandinsky.runtime.gguf_blocks import dequantize_blocks
from kandinsky.runtime.quantization import BlockLinear, Int8Linear
from kandinsky.runtime.weight_changes import LowRank
from tests.gguf_files import llama_cpp_names, random_blocks, write_gguf

TINY = Path(__file__).resolve().parents[2] / "assets" / "tiny" / "t2v"
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "config_tiny_t2v.yaml"
PARAMS = DiTConfig(
    in_text_dim=48,
    in_text_dim2=24,
    time_dim=256,
    model_dim=256,
    ff_dim=512,
    num_text_blocks=1,
    num_visual_blocks=2,
    axes_dims=(16, 24, 24),
    visual_cond=True,
)
QUERY = "visual_transformer_blocks.1.self_attention.to_query"
MODULATION = "visual_transformer_blocks.0.visual_modulation.out_layer"


def random_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    dit = DiffusionTransformer3D(**dataclasses.asdict(PARAMS))
    return {name: 0.02 * torch.randn_like(tensor) for name, tensor in dit.state_dict().items()}


@torch.inference_mode()
def velocity(dit: DiffusionTransformer3D, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 1, 8, 8, 33, generator=draw).to(dtype)
    text, pooled = torch.randn(1, 5, 48, generator=draw).to(dtype), torch.randn(1, 24, generator=draw).to(dtype)
    return dit(latents, text, pooled, torch.tensor([500.0]))


@pytest.mark.parametrize("scheme", BLOCKS)
def test_blocks_are_the_packages_numbers_to_the_bit(scheme: str) -> None:
    packed = random_blocks(scheme, 7, 1024)
    expected = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[scheme.upper()])
    found = dequantize_blocks(torch.from_numpy(packed), scheme).numpy()
    assert found.shape == expected.shape and np.array_equal(found.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("prefix", ["", COMFY_PREFIX])
@pytest.mark.parametrize("scheme", ["q8_0", "q6_k", "q5_k", "q4_k", "q4_0", "BF16", "F16", "F32"])
def test_dit_from_gguf(tmp_path: Path, scheme: str, prefix: str) -> None:
    """Velocities are those of the numbers in the file; layers and modulations stay in their blocks."""
    path = tmp_path / "dit.gguf"
    inside = write_gguf(path, {prefix + name: tensor for name, tensor in random_state().items()}, scheme)
    plain = DiffusionTransformer3D(**dataclasses.asdict(PARAMS))
    plain.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in inside.items()})
    dit = load_dit(path, PARAMS, "cpu", torch.float32)
    assert torch.equal(velocity(dit), velocity(plain))
    if scheme in BLOCKS:
        for name in (QUERY, MODULATION):
            layer = dit.get_submodule(name)
            assert isinstance(layer, BlockLinear) and layer.scheme == scheme
    assert velocity(load_dit(path, PARAMS, "cpu", torch.bfloat16), torch.bfloat16).isfinite().all()


def test_gguf_in_our_own_scheme(tmp_path: Path) -> None:
    path = tmp_path / "dit.gguf"
    inside = write_gguf(path, random_state(), "q8_0")
    dit = load_dit(path, PARAMS, "cpu", torch.float32, "int8")
    layer = dit.get_submodule(QUERY)
    assert isinstance(layer, Int8Linear)
    integers, _ = Int8Linear.quantize(inside[f"{QUERY}.weight"])
    assert torch.equal(layer.weight_int8, integers)


def test_lora_on_blocks(tmp_path: Path) -> None:
    """A layer's and a modulation's, beside what is the adapters' original of a layer that is not kept in blocks."""
    path = tmp_path / "dit.gguf"
    inside = write_gguf(path, random_state(), "q4_0")
    dit = load_dit(path, PARAMS, "cpu", torch.float32)
    up, down = torch.randn(256, 2), torch.randn(2, 256)
    layer = dit.get_submodule(QUERY)
    assert isinstance(layer, BlockLinear)
    layer.changes = (LowRank(up, down),)
    x = torch.randn(3, 256)
    expected = torch.nn.functional.linear(x, inside[f"{QUERY}.weight"] + up @ down, layer.bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
    modulation = dit.get_submodule(MODULATION)
    assert isinstance(modulation, BlockLinear)
    before = modulation.weight
    modulation.changes = (LowRank(torch.ones(len(before), 1), torch.ones(1, 256)),)
    torch.testing.assert_close(modulation.weight, before + 1)
    name = "visual_embeddings.in_layer.weight"
    assert torch.equal(reread(path)()[name], inside[name])


def test_plan_counts_a_gguf(tmp_path: Path) -> None:
    """Of the tiny checkpoint, whose rows of 192 and 512 have blocks of 32: what is loaded is what was counted."""
    config = load_config(CONFIG)
    path = tmp_path / "dit.gguf"
    write_gguf(path, load_file(TINY / "model" / "tiny_t2v.safetensors"), "q8_0")
    for scheme in (None, "int8"):
        runtime = dataclasses.replace(config.runtime, dit_quantization=scheme)
        counted = models(dataclasses.replace(config, runtime=runtime), {"dit": path}, 4)
        loaded = load_dit(path, config.model.dit_params, "cpu", torch.float32, scheme)
        assert counted.dit.size == sum(tensor.nbytes for tensor in loaded.state_dict().values())
        assert counted.dit_quantization == (scheme or "gguf")


@pytest.mark.parametrize("scales", ["scale_weight", "weight_scale", None])
def test_comfyui_fp8(tmp_path: Path, scales: str | None) -> None:
    state, expected = {}, {}
    for name, tensor in random_state().items():
        if not name.endswith(".weight") or tensor.ndim != 2:
            eight = tensor.to(torch.float8_e4m3fn) if scales is None else tensor
            state[COMFY_PREFIX + name], expected[name] = eight, eight.float()
            continue
        scale = tensor.abs().max() / 448 if scales else torch.tensor(1.0)
        eight = (tensor / scale).to(torch.float8_e4m3fn)
        state[COMFY_PREFIX + name], expected[name] = eight, eight.float() * scale
        if scales:
            layer = COMFY_PREFIX + name.removesuffix(".weight")
            state[f"{layer}.{scales}"] = scale
            state[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    if scales:
        state[f"{COMFY_PREFIX}scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    path = tmp_path / "dit.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    plain = DiffusionTransformer3D(**dataclasses.asdict(PARAMS))
    plain.load_state_dict(expected)
    torch.testing.assert_close(velocity(load_dit(path, PARAMS, "cpu", torch.float32)), velocity(plain))
    assert "F8_E4M3" in inspect(path).dtype and "fp8" in inspect(path).variant


@pytest.mark.parametrize("with_scale", [True, False])
def test_fp8_e5m2(tmp_path: Path, with_scale: bool) -> None:
    """Is not kept in 8 bits: as it is it fits into bfloat16, and times its scale into float32."""
    state = {name: tensor.float() for name, tensor in random_state().items()}
    layer, scale = QUERY, torch.tensor(0.37)
    eight = state[f"{layer}.weight"].to(torch.float8_e5m2)
    expected = state | {f"{layer}.weight": eight.float() * scale if with_scale else eight.float()}
    state[f"{layer}.weight"] = eight
    if with_scale:
        state[f"{layer}.weight_scale"] = scale
    path = tmp_path / "dit.safetensors"
    save_file(state, path)
    with open_weights(path) as tensors:
        read = tensors.get_tensor(f"{layer}.weight")
    assert read.dtype == (torch.float32 if with_scale else torch.bfloat16)
    assert torch.equal(read.float(), expected[f"{layer}.weight"])
    plain = DiffusionTransformer3D(**dataclasses.asdict(PARAMS))
    plain.load_state_dict(expected)
    torch.testing.assert_close(velocity(load_dit(path, PARAMS, "cpu", torch.float32)), velocity(plain))


@pytest.mark.parametrize(
    ("note", "of_all", "message"),
    [
        ('{"format": "mxfp8"}', None, "says 'mxfp8'; ComfyUI's float8_e4m3fn and float8_e5m2 are read"),
        ('{"format": 5}', None, "says '5'"),
        ("{", None, "can't be read"),
        ("[]", None, "can't be read"),
        (None, '{"layers": {"a": {"format": "nvfp4"}}}', "a says 'nvfp4'"),
        (None, '{"layers": []}', "can't be read"),
        (None, "[" * 100_000, "can't be read"),
    ],
)
def test_notes_that_say_something_else(tmp_path: Path, note: str | None, of_all: str | None, message: str) -> None:
    state = random_state()
    state[f"{QUERY}.weight"] = state[f"{QUERY}.weight"].to(torch.float8_e4m3fn)
    if note is not None:
        state[f"{QUERY}.comfy_quant"] = torch.tensor(list(note.encode()), dtype=torch.uint8)
    path = tmp_path / "dit.safetensors"
    save_file(state, path, metadata=None if of_all is None else {"_quantization_metadata": of_all})
    with pytest.raises(ValueError, match=message):
        load_dit(path, PARAMS, "cpu", torch.float32)
    assert message in "".join(inspect(path).problems)


def test_nvfp4_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dit.safetensors"
    layer = f"{COMFY_PREFIX}{QUERY}"
    save_file(
        {
            f"{layer}.weight": torch.zeros(256, 128, dtype=torch.uint8),
            f"{layer}.weight_scale": torch.zeros(256, 16).to(torch.float8_e4m3fn),
            f"{layer}.weight_scale_2": torch.tensor(1.0),
        },
        path,
    )
    with pytest.raises(ValueError, match="NVFP4"):
        load_dit(path, PARAMS, "cpu", torch.float32)
    assert "NVFP4" in "".join(inspect(path).problems)


# --- text encoders ----------------------------------------------------------------------------------------------------


def embed(qwen: Path, clip: Path) -> tuple[Tensor, Tensor]:
    encoders = load_text_embedder(
        qwen, clip, qwen_max_length=64, clip_max_length=32, crop=125, device="cpu", dtype=torch.float32
    )
    found = encoders.encode(["a red circle"])
    return found.text_embeds, found.pooled_embeds


QWEN_FOLDER, CLIP_FOLDER = TINY / "text_encoder", TINY / "text_encoder2"
JSON = ("config.json", "tokenizer.json", "tokenizer_config.json")


def folder_with(folder: Path, source: Path, names: tuple[str, ...]) -> Path:
    folder.mkdir()
    for name in names:
        shutil.copy(source / name, folder / name)
    return folder


@pytest.mark.parametrize("scheme", ["q8_0", "q4_0", "BF16"])
def test_qwen_from_gguf(tmp_path: Path, scheme: str) -> None:
    """By llama.cpp's names, and the number of heads from its metadata: no config.json."""
    tensors = load_file(QWEN_FOLDER / "model.safetensors")
    names = dict(zip(llama_cpp_names(tensors), (name for name in tensors if "visual." not in name), strict=True))
    qwen = folder_with(tmp_path / "gguf", QWEN_FOLDER, JSON[1:]) / "qwen.gguf"
    metadata = {"qwen2vl__attention__head_count": 4, "qwen2vl__attention__head_count_kv": 2}
    inside = write_gguf(qwen, llama_cpp_names(tensors), scheme, "qwen2vl", **metadata)
    same = folder_with(tmp_path / "same", QWEN_FOLDER, JSON)
    save_file({names[name]: tensor for name, tensor in inside.items()}, same / "model.safetensors")
    found, expected = embed(qwen, CLIP_FOLDER), embed(same, CLIP_FOLDER)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    assert inspect(qwen).kind == "Qwen2.5-VL" and not inspect(qwen).problems


def test_qwen_in_comfyuis_fp8(tmp_path: Path) -> None:
    tensors = load_file(QWEN_FOLDER / "model.safetensors")
    state, expected = {}, {}
    for name, tensor in tensors.items():
        state[name] = expected[name] = tensor
        if name.endswith("_proj.weight") and tensor.ndim == 2:
            scale = tensor.float().abs().max() / 448
            state[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            state[name.removesuffix("weight") + "scale_weight"] = scale
            expected[name] = state[name].float() * scale
    eight = folder_with(tmp_path / "eight", QWEN_FOLDER, JSON) / "qwen_fp8_scaled.safetensors"
    save_file(state, eight)
    same = folder_with(tmp_path / "same", QWEN_FOLDER, JSON)
    save_file(expected, same / "model.safetensors")
    torch.testing.assert_close(embed(eight, CLIP_FOLDER)[0], embed(same, CLIP_FOLDER)[0], atol=1e-5, rtol=1e-5)


def test_sizes_of_single_files(tmp_path: Path) -> None:
    """Of the published models' shapes, in heads of 128 and 64."""
    clip = tmp_path / "clip_l.safetensors"
    save_file(load_file(CLIP_FOLDER / "model.safetensors"), clip)
    found = encoder_config(clip, CLIP)
    assert (found["hidden_size"], found["num_hidden_layers"], found["num_attention_heads"]) == (128, 2, 2)
    qwen = tmp_path / "qwen.safetensors"
    shapes = {
        "embed_tokens": (16, 256),
        "layers.0.self_attn.q_proj": (256, 256),
        "layers.0.self_attn.k_proj": (128, 256),
    }
    shapes |= {"layers.0.mlp.gate_proj": (512, 256), "layers.1.mlp.gate_proj": (512, 256)}
    save_file({f"model.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}, qwen)
    text = encoder_config(qwen, QWEN)["text_config"]
    assert (text["num_attention_heads"], text["num_key_value_heads"], text["num_hidden_layers"]) == (2, 1, 2)
    save_file({"model.embed_tokens.weight": torch.zeros(16, 256)}, qwen)
    with pytest.raises(ValueError, match=r"put the model's config.json beside it"):
        encoder_config(qwen, QWEN)


def test_clip_as_one_file(tmp_path: Path) -> None:
    """With heads of 64, as published: the tiny one has others, so its config.json says 2 of them here."""
    alone = folder_with(tmp_path / "alone", CLIP_FOLDER, JSON[1:]) / "clip_l.safetensors"
    save_file(load_file(CLIP_FOLDER / "model.safetensors"), alone)
    same = folder_with(tmp_path / "same", CLIP_FOLDER, JSON)
    text = (same / "config.json").read_text().replace('"num_attention_heads": 4', '"num_attention_heads": 2')
    (same / "config.json").write_text(text)
    shutil.copy(alone, same / "model.safetensors")
    assert torch.equal(embed(QWEN_FOLDER, alone)[1], embed(QWEN_FOLDER, same)[1])


def test_a_pipeline_of_a_gguf(tmp_path: Path) -> None:
    """What the getters load, and what a run with it says of its weights."""
    path = tmp_path / "dit.gguf"
    write_gguf(path, load_file(TINY / "model" / "tiny_t2v.safetensors"), "q8_0")
    pipe = get_T2V_pipeline("cpu", conf_path=str(CONFIG), dit_path=str(path))
    assert any(isinstance(module, BlockLinear) for module in pipe.dit.modules())
    options = {"time_length": 0, "width": 64, "height": 64, "seed": 1, "num_steps": 2, "progress": False}
    (found,) = pipe("a red circle", **options)
    (plain,) = get_T2V_pipeline("cpu", conf_path=str(CONFIG))("a red circle", **options)
    difference = np.abs(np.asarray(found).astype(int) - np.asarray(plain))
    assert difference.max() > 0 and difference.mean() < 4
