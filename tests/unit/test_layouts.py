"""What weights are, said from their headers, and what is wrong with them, said by `inspect` and by loading alike."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kandinsky.checkpoints import files as checkpoints
from kandinsky.checkpoints.dit_layout import COMFY_PREFIX, expected_dit_shapes, quantized_parts
from kandinsky.checkpoints.files import find_weights
from kandinsky.checkpoints.headers import BITS, Header
from kandinsky.checkpoints.inspect import VAE_TENSORS, inspect
from kandinsky.config.reading import load_config
from kandinsky.loading.assemble import load_pipeline
from kandinsky.loading.dit import load_dit
from kandinsky.loading.vae import load_vae
from kandinsky.models.vae_flux import AutoencoderKL
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / "assets" / "tiny" / "t2v"
CONFIG = load_config(REPOSITORY / "configs" / "config_tiny_t2v.yaml", ["model.num_steps=1"])
NAMES = sorted(path.stem.removeprefix("config_") for path in (REPOSITORY / "configs").glob("config_*.yaml"))
NAMES = [name for name in NAMES if not name.startswith("tiny")]
FAMILIES = {"t2i": "Text to Image Lite (50 ", "i2i": "Image to Image Lite (50 "}
PARTS = {"dit": "model", "vae": "vae", "text_encoder": "text_encoder", "text_encoder2": "text_encoder2"}


def write_sparse(path: Path, header: Header) -> int:
    """A safetensors file as large as a real one, of which only the header takes space; returns the tensors' bytes."""
    entries, end = {}, 0
    for name, (dtype, shape) in header.items():
        begin, end = end, end + prod(shape) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


def header_of(model: nn.Module, dtype: str = "F32", rename: Callable[[str], str] = str) -> Header:
    return {rename(name): (dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


# --- what it is -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_published_files_are_recognised(name: str, tmp_path: Path) -> None:
    """In their real sizes, up to 77 GB: nothing but headers can have been read."""
    config = load_config(REPOSITORY / "configs" / f"config_{name}.yaml")
    shapes = expected_dit_shapes(config.model.dit_params)
    family = FAMILIES.get(name[:3], "Pro (60 " if "pro" in name else "Lite (32 ")
    repo = str(config.model.hub_repo).split("/")[1]
    only_diffusers = repo.endswith("-Diffusers")
    original = tmp_path / config.model.checkpoint_path
    comfy = tmp_path / "checkpoints" / original.name
    published = repo.removesuffix("-Diffusers")
    diffusers = tmp_path / f"models--kandinskylab--{published}-Diffusers" / "snapshots" / "0123" / "transformer"
    if only_diffusers:
        diffusers = original  # where it is downloaded to
    for path, dtype, prefix, fmt in (
        (original, "BF16", "", "original"),
        (comfy, "F16", COMFY_PREFIX, "ComfyUI"),
        (diffusers / "diffusion_pytorch_model.safetensors", "F32", "", "diffusers"),
    )[2 if only_diffusers else 0 :]:
        size = write_sparse(path, {prefix + key: (dtype, shape) for key, shape in shapes.items()})
        if fmt == "diffusers":
            written = {"_class_name": "Kandinsky5Transformer3DModel", "axes_dims": config.model.dit_params.axes_dims}
            (diffusers / "config.json").write_text(json.dumps(written))
            path = diffusers.parent
        report = inspect(path)
        assert report.problems == ()
        report = report.parts[0] if fmt == "diffusers" else report
        assert (report.kind, report.task, report.format, report.dtype) == ("DiT", config.task, fmt, dtype)
        assert report.variant.startswith(family) and f"configs/config_{name}.yaml" in report.configs
        assert 0 < report.size - size < 1e6 and "WRONG" not in str(report)


def test_what_the_name_does_not_say(tmp_path: Path) -> None:
    dit = load_config(REPOSITORY / "configs" / "config_5s_sft.yaml").model.dit_params
    header: Header = {name: ("BF16", shape) for name, shape in expected_dit_shapes(dit).items()}
    for name, task in (("mine", "t2v or i2v"), ("my_i2v", "i2v")):
        write_sparse(tmp_path / f"{name}.safetensors", header)
        report = inspect(tmp_path / f"{name}.safetensors")
        assert (report.task, report.configs, report.problems) == (task, ("configs/config_5s_sft.yaml",), ())
    layer = "visual_transformer_blocks.0.self_attention.to_key"
    header |= {f"{layer}.{part}": value for part, value in quantized_parts("fp8", 1792, 1792).items()}
    del header[f"{layer}.weight"]
    write_sparse(tmp_path / "fp8.safetensors", header)
    assert "quantised to fp8" in inspect(tmp_path / "fp8.safetensors").variant


def test_a_published_repository(tmp_path: Path) -> None:
    """The real JSON files of one in diffusers' layout around empty weights of the real names and sizes."""
    transformers = pytest.importorskip("transformers")
    beside = REPOSITORY.parent / "shared" / "reference" / "hub_layout"
    published = Path(os.environ.get("KANDINSKY_HUB_LAYOUT", beside))
    if not (published / "text_encoder" / "model.safetensors.index.json").is_file():
        pytest.skip(f"no published JSON files in {published}; set KANDINSKY_HUB_LAYOUT to a folder that has them")
    repo = Path(shutil.copytree(published, tmp_path / "Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers"))
    pro = load_config(REPOSITORY / "configs" / "config_5s_i2v_pro.yaml").model.dit_params
    write_sparse(
        repo / "transformer" / "diffusion_pytorch_model.safetensors",
        {name: ("F32", shape) for name, shape in expected_dit_shapes(pro).items()},
    )
    with torch.device("meta"):
        vae = AutoencoderKLHunyuanVideo(block_out_channels=(128, 256, 512, 512))
        qwen = transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig.from_pretrained(repo / "text_encoder")
        )
        clip = transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(repo / "text_encoder_2"))
    write_sparse(repo / "vae" / "diffusion_pytorch_model.safetensors", header_of(vae))
    write_sparse(repo / "text_encoder_2" / "model.safetensors", header_of(clip) | {"x.position_ids": ("I64", (1, 77))})
    index = json.loads((repo / "text_encoder" / "model.safetensors.index.json").read_text())
    old = header_of(qwen, "BF16", lambda name: name.replace("model.language_model", "model").replace("model.v", "v"))
    assert set(old) == set(index["weight_map"])
    size = 0
    for shard in sorted(set(index["weight_map"].values())):
        size += write_sparse(
            repo / "text_encoder" / shard, {k: v for k, v in old.items() if index["weight_map"][k] == shard}
        )
    assert size == index["metadata"]["total_size"]

    report = inspect(repo)
    assert report.problems == () and report.format == "diffusers"
    dit, video_vae, text_encoder, text_encoder2 = report.parts
    assert dit.task == "i2v" and dit.variant.startswith("Pro") and dit.dtype == "F32" and 77.2e9 < dit.size < 77.3e9
    assert (video_vae.kind, video_vae.variant) == ("video VAE", "HunyuanVideo")
    assert (text_encoder.variant, text_encoder.format) == ("7B", "names of transformers 4, 5 shards")
    assert (text_encoder2.variant, text_encoder2.format) == ("ViT-L/14", "the whole model")
    shutil.rmtree(repo / "tokenizer_2")
    (repo / "text_encoder" / "model-00003-of-00005.safetensors").unlink()
    missing = "\n".join(inspect(repo).problems)
    assert "no tokenizer_2/, which model_index.json names" in missing and "1 of 5 shards are missing" in missing
    assert "no tokenizer, neither" in missing


def test_vaes_have_their_published_tensors() -> None:
    with torch.device("meta"):
        video = AutoencoderKLHunyuanVideo(block_out_channels=(128, 256, 512, 512))
        image = AutoencoderKL(block_out_channels=(128, 256, 512, 512))
    assert {"video VAE": len(video.state_dict()), "image VAE": len(image.state_dict())} == VAE_TENSORS


@pytest.mark.parametrize(
    ("name", "kind", "problem"),
    [
        ("transformer_blocks.0.attn.weight", "unknown", "no part of Kandinsky 5; it has tensors like transformer_bl"),
        ("decoder.mid.block_1.weight", "image VAE", "the folder vae/ of black-forest-labs/FLUX.1-dev"),
        ("visual_transformer_blocks.0.self_attention.to_key.lora_A.weight", "LoRA", None),
        ("visual_transformer_blocks.0.feed_forward.in_layer.weight", "DiT", "no fitting out_layer.out_layer.bias"),
    ],
)
def test_other_files(name: str, kind: str, problem: str | None, tmp_path: Path) -> None:
    header: Header = {name: ("F32", (4, 8))}
    if kind == "image VAE":
        header["decoder.conv_in.weight"] = ("F32", (512, 16, 3, 3))
    write_sparse(tmp_path / "x.safetensors", header)
    report = inspect(tmp_path / "x.safetensors")
    assert report.kind == kind
    assert problem in report.problems[0] if problem else report.variant == "rank 4" and not report.problems


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kandinsky.checkpoints"]
    good = subprocess.run([*command, str(TINY)], cwd=REPOSITORY, capture_output=True, text=True)
    assert good.returncode == 0 and not good.stderr
    assert "DiT, a model of its own (6 visual blocks, dim 192)" in good.stdout and "Qwen2.5-VL" in good.stdout
    bad = subprocess.run([*command, str(TINY), "nowhere"], cwd=REPOSITORY, capture_output=True, text=True)
    assert bad.returncode == 1 and "WRONG     nowhere: no such file or folder" in bad.stdout


# --- what is wrong with it --------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny model, in a folder with spaces and letters of others."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(TINY, tmp_path / "мои веса" / "Gewichte ü 重み"))
    for other in ("tiny_t2v_10s", "tiny_flf"):
        (folder / "model" / f"{other}.safetensors").unlink()
    return folder


def read(file: Path) -> dict[str, Tensor]:
    """Copies: the file is going to be written over."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def load(folder: Path, *overrides: str) -> Any:
    config = load_config(REPOSITORY / "configs" / "config_tiny_t2v.yaml", ["model.num_steps=1", *overrides])
    paths = dict(zip(("dit_path", "vae_path", "text_encoder_path", "text_encoder2_path"), PARTS, strict=True))
    return load_pipeline(config, "cpu", **{key: folder / PARTS[part] for key, part in paths.items()})


def picture(pipe: Any) -> Tensor:
    return pipe("a red circle", width=32, height=32, time_length=0, seed=1, progress=False, output_type="uint8")


SMALL = "generation.resolutions=[[32,32],[128,128]]"


def test_spaces_and_other_letters(tiny: Path) -> None:
    assert inspect(tiny).problems == ()
    config = load_config(REPOSITORY / "configs" / "config_tiny_t2v.yaml", ["model.num_steps=1", SMALL])
    assert torch.equal(picture(load(tiny, SMALL)), picture(load_pipeline(config, "cpu")))


def damage(file: Path, how: str) -> str:
    """Damage a file and return what is to be said about it."""
    tensors = read(file)
    name = (
        next(name for name, tensor in tensors.items() if tensor.dim() == 2 and "embed" in name)
        if ("text" in file.parent.name)
        else next(name for name in tensors if "conv_in" in name or "to_key" in name)
    )
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        return "truncated"
    if how == "pickle":
        torch.save(tensors, file)
        return "this is a pickle"
    if how == "link to itself":
        file.unlink()
        file.symlink_to(file.name)
        return "a symbolic link that leads back to itself"
    if how == "integers":
        save_file(tensors | {name: tensors[name].to(torch.int32)}, file)
        return "of another dtype" if file.parent.name == "model" else f"{name} is in I32"
    if how == "fp8":
        save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, file)
        return "of another dtype" if file.parent.name == "model" else f"{name} is in F8_E4M3"
    if how == "extra key":
        save_file(tensors | {"extra.weight": torch.zeros(1)}, file)
        return "extra.weight"
    assert how == "missing shard"
    index = {"weight_map": dict.fromkeys(tensors, "model-00002-of-00002.safetensors")}
    file.unlink()
    (file.parent / "model.safetensors.index.json").write_text(json.dumps(index))
    return "1 of 1 shards are missing, like model-00002-of-00002.safetensors"


HOW = ["truncated", "pickle", "link to itself", "integers", "fp8", "missing shard"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", [*HOW, "extra key"])
def test_damage_is_told_by_loading_and_by_inspect(part: str, how: str, tiny: Path) -> None:
    (file,) = (file for file in (tiny / PARTS[part]).glob("*.safetensors") if file.name != "tiny_decoder.safetensors")
    words = damage(file, how)
    if how == "fp8" and part != "vae":  # a format, and read: see test_formats.py
        load(tiny)
        assert not inspect(tiny / PARTS[part]).problems
        return
    with_extra = how == "extra key"
    if with_extra and part.startswith("text"):  # a whole Qwen has a head, a whole CLIP sees: more is no mistake
        load(tiny)
        return
    with pytest.raises(ValueError) as error:
        load(tiny)
    assert words in str(error.value) and "\n" not in str(error.value)
    if not (with_extra and part == "vae"):  # nobody has told `inspect` what a small VAE is made of
        assert words in "".join(inspect(tiny / PARTS[part]).problems)


def test_links(tmp_path: Path) -> None:
    (tmp_path / "gone.safetensors").symlink_to("elsewhere.safetensors")
    (tmp_path / "transformer").symlink_to(".")
    with pytest.raises(ValueError, match=r"a symbolic link to elsewhere.safetensors, where there is nothing"):
        find_weights(tmp_path / "gone.safetensors")
    assert inspect(tmp_path).problems  # and comes back
    message = checkpoints.missing_weights_message(tmp_path / "gone.safetensors", CONFIG)
    assert "symbolic link" in message


def test_a_layer_that_lacks_a_tensor(tiny: Path) -> None:
    file = tiny / "text_encoder" / "model.safetensors"
    tensors = read(file)
    name = "model.layers.1.mlp.up_proj.weight"
    del tensors[name]
    save_file(tensors, file)
    (problem,) = inspect(file).problems
    assert f"1 tensors are missing, like {name}" in problem


NAN = {
    "dit": ("visual_transformer_blocks.3.feed_forward.in_layer.weight", "the DiT"),
    "vae": ("decoder.conv_out.conv.weight", "the VAE's decoder"),
    "text_encoder": ("model.layers.1.mlp.up_proj.weight", "Qwen2.5-VL"),
    "text_encoder2": ("text_model.encoder.layers.1.mlp.fc1.weight", "CLIP"),
}
PLACES = {"in memory": (), "offloaded": ("runtime.offload=on",), "streaming": ("runtime.blocks_on_gpu=1",)}


@pytest.mark.parametrize(("part", "place"), [*((part, "in memory") for part in NAN), ("dit", "offloaded"),
                                             ("dit", "streaming"), ("vae", "offloaded")])  # fmt: skip
def test_nan_is_found_and_named_when_it_is_first_used(part: str, place: str, tiny: Path) -> None:
    name, model = NAN[part]
    (file,) = (file for file in (tiny / PARTS[part]).glob("*.safetensors") if file.name != "tiny_decoder.safetensors")
    tensors = read(file)
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, file)
    assert inspect(file).problems == ()
    pipe = load(tiny, SMALL, *PLACES[place])
    own = name.removeprefix("model.").removeprefix("text_model.")
    with pytest.raises(ValueError, match=rf"{model} has NaN or infinite values in 1 of its tensors, .*{own}: "):
        picture(pipe)


def test_overflow_is_not_blamed_on_the_weights(tiny: Path) -> None:
    pipe = load(tiny, SMALL)
    with pytest.raises(ValueError, match="the DiT computes NaN or infinite values, though its weights have none"):
        pipe(
            "a red circle", width=32, height=32, time_length=0, seed=1, progress=False,
            latents=torch.full((1, 1, 4, 4, 16), 1e38),
        )  # fmt: skip


# --- diffusers' own files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"variant": "fp16"}, {"max_shard_size": "40KB"}], ids=str)
@pytest.mark.parametrize("name", ["hunyuan", "flux"])
def test_vaes_as_diffusers_saves_them(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    numbers = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 16}
    if name == "flux":
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        theirs = diffusers.AutoencoderKL(**numbers, **blocks, use_quant_conv=False, use_post_quant_conv=False)
    else:
        theirs = diffusers.AutoencoderKLHunyuanVideo(**numbers)
    theirs.save_pretrained(tmp_path / "vae", **options)
    report = inspect(tmp_path / "vae")
    assert report.kind == {"hunyuan": "video VAE", "flux": "image VAE"}[name] and report.problems == ()
    assert ("shards" in report.format, "variant fp16" in report.format) == (
        "max_shard_size" in options,
        "variant" in options,
    )
    paths = [tmp_path / "vae"] + ([] if "max_shard_size" in options else list((tmp_path / "vae").glob("*.safetensors")))
    for path in paths:
        ours = load_vae(path, "cpu", torch.float32, name).state_dict()
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.state_dict().items())


def test_which_file_of_a_folder_is_meant(tmp_path: Path) -> None:
    source = TINY / "model" / "tiny_t2v.safetensors"
    shutil.copy(source, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert find_weights(tmp_path) == [tmp_path / "diffusion_pytorch_model.fp16.safetensors"]
    assert load_dit(tmp_path, CONFIG.model.dit_params, "cpu", torch.float32)
    shutil.copy(source, tmp_path / "diffusion_pytorch_model.bf16.safetensors")
    with pytest.raises(ValueError, match=r"2 .safetensors files .*name the one that you mean"):
        find_weights(tmp_path)
    shutil.copy(source, tmp_path / "diffusion_pytorch_model.safetensors")
    assert find_weights(tmp_path) == [tmp_path / "diffusion_pytorch_model.safetensors"]
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(source, alone / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"1 shards without their .safetensors.index.json"):
        find_weights(alone)
