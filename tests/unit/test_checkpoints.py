"""Headers, files and paths of weights: what is wrong is said in one line before anything is loaded."""

import dataclasses
import json
import os
import struct
from pathlib import Path

import pytest

from kandinsky.checkpoints.dit_layout import (
    check_dit_header,
    dit_params_from_header,
    expected_dit_shapes,
    is_quantizable,
    quantization_from_header,
    quantized_layers,
    quantized_parts,
)
from kandinsky.checkpoints.files import find_weights, missing_weights_message, resolve_path
from kandinsky.checkpoints.headers import read_header
from kandinsky.config.reading import load_config
from kandinsky.config.schema import DiTConfig

REPOSITORY = Path(__file__).resolve().parents[2]
SFT = REPOSITORY / "configs" / "config_5s_sft.yaml"
TINY = REPOSITORY / "configs" / "config_tiny_t2v.yaml"

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


def header_of(dit):
    return {name: ("BF16", shape) for name, shape in expected_dit_shapes(dit).items()}


def safetensors_bytes(entries, data, metadata=None):
    if metadata is not None:
        entries = {"__metadata__": metadata, **entries}
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


TWO_TENSORS = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


# --- read_header ------------------------------------------------------------------------------------------------------


def test_reads_names_dtypes_and_shapes(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes(TWO_TENSORS, bytes(32), metadata={"format": "pt"}))
    assert read_header(path) == {"a": ("F32", (2, 3)), "b": ("BF16", (4,))}


def test_reads_what_the_reference_implementation_writes(tmp_path):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "x.safetensors"
    tensors = {"w": torch.zeros(3, 5, dtype=torch.bfloat16), "s": torch.tensor(1.0), "e": torch.zeros(0, 2)}
    save_file(tensors, path)
    assert read_header(path) == {"w": ("BF16", (3, 5)), "s": ("F32", ()), "e": ("F32", (0, 2))}


@pytest.mark.parametrize("missing", [1, 8, 31, 32, 33, 100, 170, 200])
def test_truncated_anywhere_is_a_value_error(tmp_path, missing):
    whole = safetensors_bytes(TWO_TENSORS, bytes(32))
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole[: max(0, len(whole) - missing)])
    with pytest.raises(ValueError, match="truncated") as error:
        read_header(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (safetensors_bytes(TWO_TENSORS, bytes(40)), "too long"),
        (struct.pack("<Q", 5) + b"hello", "not JSON"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        (struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe", "not JSON"),
        (b"GIF89a, or whatever it is", "not a safetensors file"),
        (b"PK\x03\x04\x00\x00\x08\x08 archive/data.pkl", "pickle"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (safetensors_bytes({"a": {"dtype": "F32", "shape": [2, 3]}}, bytes(24)), "entry of a"),
        (safetensors_bytes({"a": {"dtype": "F32", "shape": [7], "data_offsets": [0, 24]}}, bytes(24)), "entry of a"),
        (safetensors_bytes({"a": {"dtype": "F32", "shape": [-6], "data_offsets": [0, 24]}}, bytes(24)), "entry of a"),
        (safetensors_bytes({"a": {"dtype": "F32", "shape": [6], "data_offsets": [8, 32]}}, bytes(32)), "gaps"),
    ],
)
def test_not_safetensors_or_damaged(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_header(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.bin", "x.ckpt"])
def test_pickles_are_refused_by_name(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(safetensors_bytes(TWO_TENSORS, bytes(32)))
    for read in (read_header, find_weights):
        with pytest.raises(ValueError, match="safetensors only"):
            read(path)


def test_missing_file():
    with pytest.raises(ValueError, match="no such file"):
        read_header("/nowhere/x.safetensors")


# --- find_weights -----------------------------------------------------------------------------------------------------


def test_a_file_is_itself(tmp_path):
    path = tmp_path / "x.safetensors"
    path.touch()
    assert find_weights(path) == [path]


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "model.safetensors"])
def test_the_usual_names_win_in_a_folder(tmp_path, name):
    (tmp_path / "another.safetensors").touch()
    (tmp_path / name).touch()
    assert find_weights(tmp_path) == [tmp_path / name]


def test_the_only_file_of_a_folder(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "anything.safetensors").touch()
    assert find_weights(tmp_path) == [tmp_path / "anything.safetensors"]


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_shards(tmp_path, stem):
    index = tmp_path / f"{stem}.safetensors.index.json"
    shards = [tmp_path / f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index.write_text(json.dumps({"weight_map": {"a": shards[1].name, "b": shards[0].name, "c": shards[1].name}}))
    shards[0].touch()
    with pytest.raises(ValueError, match=f"1 of 2 shards are missing, like {shards[1].name}"):
        find_weights(tmp_path)
    shards[1].touch()
    assert find_weights(tmp_path) == shards
    assert find_weights(index) == shards


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../../x.safetensors"}}'])
def test_damaged_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index.json: damaged"):
        find_weights(tmp_path)


def test_folders_without_one_answer(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        find_weights(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no .safetensors file"):
        find_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="safetensors only"):
        find_weights(tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").touch()
    with pytest.raises(ValueError, match=r"2 .safetensors files .*one.safetensors, two.safetensors"):
        find_weights(tmp_path)
    (tmp_path / "text.txt").touch()
    with pytest.raises(ValueError, match=r"not a .safetensors file"):
        find_weights(tmp_path / "text.txt")


# --- which DiT --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dit", "keys", "parameters"),
    [
        (LITE, 814, 2_007_702_848),
        (PRO, 1514, 19_311_325_248),
        (T2I, 1246, 6_022_080_576),
        (I2I, 1246, 6_022_254_656),
    ],
)
def test_expected_shapes_have_the_published_counts(dit, keys, parameters):
    shapes = expected_dit_shapes(dit)
    assert len(shapes) == keys == 18 + 14 * dit.num_text_blocks + 24 * dit.num_visual_blocks
    total = 0
    for shape in shapes.values():
        size = 1
        for side in shape:
            size *= side
        total += size
    assert total == parameters


@pytest.mark.parametrize("dit", [LITE, T2I, I2I])
def test_expected_shapes_are_those_of_the_module(dit):
    torch = pytest.importorskip("torch")
    from kandinsky.models.dit import DiffusionTransformer3D

    small = dataclasses.replace(dit, num_visual_blocks=2, num_text_blocks=1)
    with torch.device("meta"):
        model = DiffusionTransformer3D(**dataclasses.asdict(small))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected_dit_shapes(small)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("dit", [LITE, PRO, T2I, I2I])
def test_a_header_says_what_it_is(dit, prefix):
    header = {prefix + name: entry for name, entry in header_of(dit).items()}
    params = dit_params_from_header(header)
    assert params.pop("extra_channels") == (dit.visual_cond or dit.instruct_type == "channel")
    assert params["axes_dims"] == dit.axes_dims
    assert params == {name: getattr(dit, name) for name in params}
    assert len(params) == 11
    check_dit_header(header, dit)


def test_another_variant_is_named_on_both_sides():
    with pytest.raises(ValueError) as error:
        check_dit_header(header_of(PRO), LITE)
    message = str(error.value)
    assert "this file is Pro (60 visual blocks, dim 4096)" in message
    assert "the config says Lite (32 visual blocks, dim 1792)" in message
    assert "or another checkpoint" in message
    assert "time_dim 1024 (config: 512)" in message
    assert "\n" not in message


def test_advice_names_a_config_that_exists():
    for found, wanted, name in (
        (LITE, PRO, "config_5s_sft"),
        (PRO, LITE, "config_5s_t2v_pro"),
        (T2I, I2I, "config_t2i"),
        (I2I, T2I, "config_i2i"),
    ):
        with pytest.raises(ValueError, match=f"use a config like configs/{name}.yaml, or another checkpoint"):
            check_dit_header(header_of(found), wanted)
        config = load_config(REPOSITORY / "configs" / f"{name}.yaml")
        check_dit_header(header_of(found), config.model.dit_params)  # the advice helps


def test_no_advice_where_no_config_helps():
    with pytest.raises(ValueError, match=r"this file is a model of its own .* use the config of that checkpoint, or"):
        check_dit_header(header_of(dataclasses.replace(LITE, model_dim=1024)), LITE)
    with pytest.raises(ValueError, match=r"use the config of that checkpoint, or .* ff_dim 7168 \(config: 4096\)"):
        check_dit_header(header_of(LITE), dataclasses.replace(LITE, ff_dim=4096))


@pytest.mark.parametrize(
    "change",
    [
        {"time_dim": 256},
        {"ff_dim": 4096},
        {"in_text_dim": 96},
        {"in_text_dim2": 48},
        {"num_text_blocks": 3},
        {"num_visual_blocks": 31},
        {"model_dim": 1024},
        {"axes_dims": (8, 12, 12)},
        {"visual_cond": False},
        {"out_visual_dim": 8},
        {"in_visual_dim": 8},
    ],
)
def test_every_number_is_compared(change):
    with pytest.raises(ValueError, match="the config says"):
        check_dit_header(header_of(LITE), dataclasses.replace(LITE, **change))


def test_missing_and_unexpected_keys_are_counted_with_examples():
    header = header_of(LITE)
    for i in range(5):
        del header[f"visual_transformer_blocks.{i}.feed_forward.out_layer.weight"]
    header["extra.weight"] = ("F32", (1,))
    header["out_layer.out_layer.weight"] = ("F32", (64, 17))
    with pytest.raises(ValueError) as error:
        check_dit_header(header, LITE)
    message = str(error.value)
    assert "814 parameters" in message
    assert "5 missing (visual_transformer_blocks.0.feed_forward.out_layer.weight" in message
    assert "1 unexpected (extra.weight)" in message
    assert "1 of another shape (out_layer.out_layer.weight)" in message


# --- quantised checkpoints --------------------------------------------------------------------------------------------


def quantized_header(dit, scheme, prefix=""):
    header = {}
    for name, entry in header_of(dit).items():
        layer = name.removesuffix(".weight")
        parts = quantized_parts(scheme, *entry[1]) if is_quantizable(layer) else {}
        header |= {f"{prefix}{layer}.{part}": value for part, value in parts.items()} or {prefix + name: entry}
    return header


@pytest.mark.parametrize("dit", [LITE, PRO, T2I, I2I])
def test_what_is_quantized(dit):
    """Attention's four and feed-forward's two linear layers, and nothing that only looks like them."""
    shapes = {name: s for name, s in expected_dit_shapes(dit).items() if is_quantizable(name.removesuffix(".weight"))}
    assert len(shapes) == 6 * dit.num_text_blocks + 10 * dit.num_visual_blocks
    dim, ff = dit.model_dim, dit.ff_dim
    assert set(shapes.values()) == {(dim, dim), (ff, dim), (dim, ff)}
    for layer in ("out_layer.out_layer", "visual_embeddings.in_layer", "time_embeddings.in_layer", "x.to_key",
                  "visual_transformer_blocks.0.visual_modulation.out_layer", "visual_transformer_blocks.0.to_query",
                  "visual_transformer_blocks.0.self_attention.query_norm"):  # fmt: skip
        assert not is_quantizable(layer), layer


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("scheme", ["int8", "fp8", "nf4"])
@pytest.mark.parametrize("dit", [LITE, PRO, I2I])
def test_a_quantized_header_says_what_it_is(dit, scheme, prefix):
    header = quantized_header(dit, scheme, prefix)
    assert quantization_from_header(header) == scheme
    assert len(quantized_layers(header)) == 6 * dit.num_text_blocks + 10 * dit.num_visual_blocks
    assert dit_params_from_header(header) == dit_params_from_header(header_of(dit))
    check_dit_header(header, dit)
    assert quantization_from_header(header_of(dit)) is None


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_fp8_scale_a_weight(shape):
    header = quantized_header(LITE, "fp8")
    scales = [name for name in header if name.endswith(".weight_scale")]
    check_dit_header(header | {name: ("F32", shape) for name in scales}, LITE)
    with pytest.raises(ValueError, match=f"1 of another shape .*{scales[0]}"):
        check_dit_header(header | {scales[0]: ("F32", (2,))}, LITE)


def test_layouts_are_the_documented_ones():
    assert quantized_parts("int8", 10, 256) == {"weight_int8": ("I8", (10, 256)), "weight_scales": ("F32", (10, 2))}
    assert quantized_parts("int8", 10, 200)["weight_scales"] == ("F32", (10, 2))
    assert quantized_parts("fp8", 10, 7) == {"weight_fp8": ("F8_E4M3", (10, 7)), "weight_scale": ("F32", (10, 1))}
    assert quantized_parts("nf4", 10, 70) == {"weight_nf4": ("U8", (10, 64)), "weight_scales": ("F32", (10, 2))}


def test_variant_and_scheme_are_named():
    with pytest.raises(ValueError, match=r"this file is Pro \(60 visual blocks, dim 4096, quantised to int8\)"):
        check_dit_header(quantized_header(PRO, "int8"), LITE)
    header = quantized_header(LITE, "nf4")
    name = "visual_transformer_blocks.3.feed_forward.in_layer.weight_scales"
    del header[name]
    with pytest.raises(ValueError, match=f"this config's model, quantised to nf4: 1 missing .{name}"):
        check_dit_header(header, LITE)


def test_mixed_schemes():
    header = quantized_header(LITE, "int8") | {
        name: entry for name, entry in quantized_header(LITE, "fp8").items() if name.startswith("text_transformer")
    }
    with pytest.raises(ValueError, match="mixes layers in fp8 and int8"):
        check_dit_header(header, LITE)


def test_another_model_altogether():
    with pytest.raises(ValueError, match="not a Kandinsky 5 DiT"):
        check_dit_header({"decoder.conv_in.weight": ("F32", (1, 2))}, LITE)


# --- paths and messages -----------------------------------------------------------------------------------------------


def test_weights_prefix_stands_for_the_cache_dir(tmp_path):
    assert resolve_path("./weights/model/x.safetensors", None, tmp_path) == tmp_path / "model" / "x.safetensors"
    assert resolve_path("weights/vae/", None, tmp_path) == tmp_path / "vae"
    assert resolve_path(tmp_path / "weights" / "x", None, "/elsewhere") == tmp_path / "weights" / "x"


def test_relative_paths_from_the_working_directory_then_the_repository(tmp_path, monkeypatch):
    config = load_config(SFT)
    monkeypatch.chdir(tmp_path)
    found = resolve_path("configs/config_5s_sft.yaml", config)
    assert os.path.samefile(found, SFT)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "config_5s_sft.yaml").touch()
    assert resolve_path("configs/config_5s_sft.yaml", config) == Path("configs/config_5s_sft.yaml")


def test_relative_paths_from_the_config_of_another_checkout(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "mine").mkdir()
    copy = tmp_path / "configs" / "config_mine.yaml"
    copy.write_text(SFT.read_text())
    assert os.path.samefile(resolve_path("./mine", load_config(copy)), tmp_path / "mine")


def test_what_is_nowhere_is_returned_as_first_expected():
    assert resolve_path("./weights/model/none.safetensors", load_config(SFT)) == Path("weights/model/none.safetensors")


def test_message_says_what_to_do(tmp_path):
    config = load_config(SFT)
    message = missing_weights_message("weights/model/x.safetensors", config)
    assert "weights/model/x.safetensors" in message
    assert "python download_models.py --models 5s_sft" in message
    assert "python test.py --config configs/config_tiny_t2v.yaml" in message
    assert "\n" not in message
    other = dataclasses.replace(config, source=tmp_path / "k5_lite.yaml")
    assert "download_models.py --models list" in missing_weights_message("x", other)
    tiny = missing_weights_message("assets/tiny/t2v/vae", load_config(TINY))
    assert "git checkout" in tiny and "download" not in tiny
