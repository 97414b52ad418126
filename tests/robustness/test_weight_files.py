"""Headers, indices and configs of weights from strangers: one line or success, in little time and memory."""

from __future__ import annotations

import json
import os
import socket
import struct
from pathlib import Path
from random import Random
from typing import Any

import pytest
from safetensors import safe_open

from kandinsky.checkpoints.dit_layout import expected_dit_shapes
from kandinsky.checkpoints.files import find_weights, resolve_path
from kandinsky.checkpoints.headers import BITS, open_tensors, read_header, read_metadata
from kandinsky.checkpoints.inspect import inspect
from kandinsky.common.untrusted import MAX_DEPTH, home_path, is_plain_name, parse_json, read_json
from kandinsky.config.reading import load_config
from kandinsky.config.schema import DiTConfig
from kandinsky.loading.dit import load_dit
from kandinsky.loading.text_files import read_config
from kandinsky.loading.vae import known_arguments, load_vae
from kandinsky.models.qwen import QwenConfig
from kandinsky.models.vae_flux import AutoencoderKL
from kandinsky.outputs.preview import load_latent_rgb
from kandinsky.planning.weights import models
from tests.robustness.fuzzing import NASTY_VALUES, assert_clear, clearly_refused, fuzz, spoiled_bytes, spoiled_json

TINY = Path(__file__).resolve().parents[2] / "configs" / "config_tiny_t2v.yaml"
DEEP = "[" * 200_000
Entries = dict[str, Any]


def safetensors(entries: Entries, data_bytes: int | None = None, encoding: str = "utf-8") -> bytes:
    """A file with this header, in front of as many bytes as it speaks of."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode(encoding)
    if data_bytes is None:
        data_bytes = max((one["data_offsets"][1] for one in entries.values() if "data_offsets" in one), default=0)
    return struct.pack("<Q", len(text)) + text + bytes(data_bytes)


def entries(shapes: dict[str, tuple[int, ...]], dtype: str = "F32") -> Entries:
    """A header of tensors one after the other."""
    found, end = {}, 0
    for name, shape in shapes.items():
        count = 1
        for side in shape:
            count *= side
        found[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + count * BITS[dtype] // 8]}
        end += count * BITS[dtype] // 8
    return found


TENSORS = entries({"a": (2, 3), "b.weight": (4,), "scalar": (), "empty": (0, 5)})
METADATA = {"__metadata__": {"format": "pt", "other": "text"}}


# --- headers ----------------------------------------------------------------------------------------------------------


def test_fuzz_headers(tmp_path: Path) -> None:
    """What is read here, safetensors' own reader opens; what it refuses, is refused here in one line."""
    path = tmp_path / "x.safetensors"
    nasty = (*NASTY_VALUES, *BITS, "F7", [0, 24], [24, 0], [2**62, 2**62, 0], {"dtype": "F32"})

    def case(rng: Random) -> None:
        dtypes = {**TENSORS, **METADATA}
        if rng.random() < 0.8:
            text = spoiled_json(rng, dtypes, nasty)
            length = len(text) if rng.random() < 0.95 else rng.choice((0, 1, 8, 2**31, 2**63, 2**64 - 1))
            content = struct.pack("<Q", length) + text + bytes(40)
        else:
            content = spoiled_bytes(rng, safetensors(dtypes, 40))
        path.write_bytes(content)
        header, metadata = read_header(path), read_metadata(path)
        with safe_open(path, framework="np") as file:
            assert set(file.keys()) == set(header)
            assert (file.metadata() or {}) == metadata
            for name, (dtype, shape) in header.items():
                assert (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape())) == (dtype, shape)

    fuzz(case)


HEADERS = {
    "metadata of numbers": safetensors({"__metadata__": {"a": 1}, **TENSORS}),
    "metadata that is a list": safetensors({"__metadata__": ["a"], **TENSORS}, 40),
    "unknown dtype": safetensors({"a": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}}),
    "UTF-16": safetensors(TENSORS, encoding="utf-16"),
    "byte order mark": safetensors(b"\xef\xbb\xbf" + json.dumps(TENSORS).encode(), 40),
    "lone surrogate": safetensors({"\ud800": TENSORS["a"]}),
    "overflow": safetensors({"a": {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}),
    "deep": safetensors(DEEP.encode(), 0),
    "deep entry": safetensors(b'{"a":' + DEEP.encode(), 0),
    "huge number": safetensors(b'{"a":{"dtype":"F32","shape":[1' + b"0" * 5000 + b'],"data_offsets":[0,0]}}', 0),
    "NaN": safetensors(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}', 0),
    "a name twice": safetensors(json.dumps({"a": TENSORS["a"], "z": TENSORS["a"]}).replace("z", "a").encode(), 24),
    "a name of 10,000 letters": safetensors({"x" * 10_000: TENSORS["a"]}),
    "a name that clears the screen": safetensors({"\x1b[2J": {"dtype": 5}}),
    "scalars for entries": safetensors({"a": 5}, 0),
}  # fmt: skip


@pytest.mark.parametrize("what", HEADERS)
def test_headers_that_the_library_refuses(what: str, tmp_path: Path) -> None:
    """By --plan as by whoever reads tensors; open_tensors has no error of its own."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(HEADERS[what])
    for read in (
        read_header,
        read_metadata,
        lambda p: open_tensors(p).__enter__(),
        lambda p: load_dit(p, DIT, "cpu", None),
    ):
        message = clearly_refused(lambda read=read: read(path))  # type: ignore[misc]
        assert message is not None and str(path) in message
        assert ("its dtype is F7" in message) == (what == "unknown dtype")
    plan = clearly_refused(lambda: models(load_config(TINY), {"dit": path}, 2))
    assert plan is not None and str(path) in plan
    assert_clear(str(inspect(path).problems[0]))


DIT = DiTConfig(
    in_text_dim=24, in_text_dim2=12, time_dim=16, model_dim=32, ff_dim=48, num_text_blocks=1, num_visual_blocks=2,
    axes_dims=(4, 6, 6), visual_cond=True,
)  # fmt: skip


# --- what is no file --------------------------------------------------------------------------------------------------


def no_files(folder: Path) -> list[Path]:
    os.mkfifo(folder / "fifo.safetensors")
    with socket.socket(socket.AF_UNIX) as one:
        # Relative, because such addresses are short.
        here = os.getcwd()
        os.chdir(folder)
        try:
            one.bind("socket.safetensors")
        finally:
            os.chdir(here)
    (folder / "device.safetensors").symlink_to("/dev/zero")
    return [folder / f"{name}.safetensors" for name in ("fifo", "socket", "device")]


def test_neither_waited_for_nor_read_for_ever(tmp_path: Path) -> None:
    """A FIFO, a socket and a device in the place of any file."""
    config = load_config(TINY)
    vae = resolve_path(config.model.vae.checkpoint_path, config).resolve()
    for path in no_files(tmp_path):
        for read in (read_header, find_weights, read_json):
            message = clearly_refused(lambda read=read, path=path: read(path))  # type: ignore[misc]
            assert message is not None and "pipe, a socket or a device" in message, (path, message)
        assert "pipe, a socket or a device" in str(inspect(path))
        folder = tmp_path / f"folder_of_{path.stem}"
        folder.mkdir()
        for name in ("config.json", "latent_rgb.json", "model.safetensors.index.json"):
            os.rename(path, folder / name)
            if name == "config.json":
                os.symlink(vae / "diffusion_pytorch_model.safetensors", folder / "diffusion_pytorch_model.safetensors")
                with pytest.raises(ValueError, match=r"config\.json: it is a pipe, a socket or a device"):
                    load_vae(folder, "cpu", None)  # type: ignore[arg-type]
                os.unlink(folder / "diffusion_pytorch_model.safetensors")
            elif name == "latent_rgb.json":
                load_latent_rgb(folder, "hunyuan")  # it is no file, so the published one is taken
            else:
                assert clearly_refused(lambda folder=folder: find_weights(folder))  # type: ignore[misc]
            os.rename(folder / name, path)


# --- indices ----------------------------------------------------------------------------------------------------------

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = {"metadata": {"total_size": 80}, "weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in SHARDS:
        (folder / name).write_bytes(safetensors(TENSORS))
    (tmp_path / "secret.safetensors").write_bytes(safetensors(TENSORS))
    (tmp_path / "link").symlink_to(folder)
    return folder


def test_fuzz_indices(shards: Path) -> None:
    """What is found lies in the folder, whatever an index says."""
    nasty = (*NASTY_VALUES, "../secret.safetensors", str(shards.parent / "secret.safetensors"), "./" + SHARDS[0])

    def case(rng: Random) -> None:
        (shards / "model.safetensors.index.json").write_bytes(spoiled_json(rng, INDEX, nasty))
        for file in find_weights(shards):
            assert file.parent == shards and file.name in SHARDS
            read_header(file)

    fuzz(case)


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        '{"weight_map": {"a": 1}}',
        '{"weight_map": null}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": ["x"]}}',
        '{"weight_map": {"a": 1' + "0" * 400 + "}}",
        '{"weight_map": {"a": "../secret.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "..\\\\secret.safetensors"}}',
        '{"weight_map": {"a": "C:secret.safetensors"}}',
        '{"weight_map": {"a": "../link/model-00001-of-00002.safetensors"}}',
        '{"weight_map": {"a": ".."}}',
        '{"weight_map": {"a": "\\u0000"}}',
        '{"weight_map": {"a": "\\ud800"}}',
        '{"weight_map": {"a": "' + "x" * 300 + '"}}',
    ],
    ids=lambda text: text[:60],
)
def test_indices_that_lead_elsewhere_or_nowhere(text: str, shards: Path) -> None:
    (shards / "model.safetensors.index.json").write_text(text)
    message = clearly_refused(lambda: find_weights(shards))
    assert message is not None and "index.json: damaged" in message


def test_what_lies_where_nothing_does(shards: Path) -> None:
    (shards / "model.safetensors.index.json").write_text(json.dumps(INDEX))
    (shards / SHARDS[1]).unlink()
    with pytest.raises(ValueError, match=f"1 of 2 shards are missing, like {SHARDS[1]}$"):
        find_weights(shards)
    os.mkfifo(shards / SHARDS[1])
    with pytest.raises(ValueError, match=f"like {SHARDS[1]} .it is a pipe"):
        find_weights(shards)


# --- python -m kandinsky.checkpoints ----------------------------------------------------------------------------------

QWEN = {f"model.layers.{i}.mlp.up_proj.weight": (4, 2) for i in range(2)} | {"model.embed_tokens.weight": (8, 2)}
CLIP = {"text_model.embeddings.token_embedding.weight": (4, 2), "text_model.encoder.layers.0.fc.weight": (2, 2)}
VIDEO_VAE = {f"{part}.conv_in.conv.weight": (4, 16, 3, 3, 3) for part in ("encoder", "decoder")}
IMAGE_VAE = {f"{part}.conv_in.weight": (4, 16, 3, 3) for part in ("encoder", "decoder")}
LORA = {"x.lora_A.weight": (2, 3), "x.lora_B.weight": (3, 2)}
CONFIG = {"hidden_size": 2, "num_hidden_layers": 2, "text_config": {"hidden_size": 2}, "block_out_channels": [4, 8]}


def test_fuzz_inspection(tmp_path: Path) -> None:
    """It never raises, and says what is wrong in a line each."""
    path = tmp_path / "model.safetensors"
    kinds = [QWEN, CLIP, VIDEO_VAE, IMAGE_VAE, LORA] * 4 + [expected_dit_shapes(DIT)]
    names = ("model.layers.30000000.x", "blocks.99.a", "x" * 400, "visual_transformer_blocks.7.a", "", "a\nb")

    def case(rng: Random) -> None:
        shapes: dict[str, Any] = dict(rng.choice(kinds))
        for _ in range(rng.randint(1, 3)):
            name = rng.choice(list(shapes))
            match rng.randrange(4):
                case 0:
                    shapes[name] = rng.choice([(), (0,), (1,), (0, 0), (2, 2, 2), (7, 3)])
                case 1:
                    shapes[rng.choice(names)] = shapes.pop(name)
                case 2:
                    shapes[rng.choice(names)] = ()
                case _:
                    shapes.pop(name)
                    shapes["z"] = (1,)
        path.write_bytes(safetensors(entries(shapes, rng.choice(("F32", "BF16", "I8", "F64")))))
        (tmp_path / "config.json").write_bytes(spoiled_json(rng, CONFIG))
        report = inspect(tmp_path)
        for problem in report.problems:
            assert_clear(problem)
        assert "Traceback" not in str(report)

    fuzz(case)


def test_a_block_of_a_large_number(tmp_path: Path) -> None:
    """A name of a few bytes is not made into a list of 30 million."""
    path = tmp_path / "model.safetensors"
    for extra in ("model.layers.30000000.x", f"model.layers.{'9' * 300}.x"):
        path.write_bytes(safetensors(entries({**QWEN, extra: (1,)})))
        fuzz_once(lambda: inspect(path))
        assert any("names a block" in problem for problem in inspect(path).problems)
    shapes = expected_dit_shapes(DIT)
    path.write_bytes(safetensors(entries({**shapes, "visual_transformer_blocks.30000000.x": (1,)})))
    fuzz_once(lambda: inspect(path))
    assert any("names a block 30000000" in problem for problem in inspect(path).problems)
    with pytest.raises(ValueError, match="names a block 30000000"):
        load_dit(path, DIT, "cpu", None)  # type: ignore[arg-type]


def fuzz_once(call: Any) -> None:
    """Within the fuzzers' bounds of time and memory."""
    from tests.robustness.fuzzing import bounded_memory, bounded_time

    with bounded_memory(), bounded_time():
        call()


# --- configs ----------------------------------------------------------------------------------------------------------


def test_fuzz_configs_of_models(tmp_path: Path) -> None:
    """config.json of a VAE and of the encoders, as loading and the plan read them."""
    config = load_config(TINY)
    qwen = resolve_path(config.model.text_embedder.qwen.checkpoint_path, config)
    file, real = tmp_path / "config.json", json.loads((qwen / "config.json").read_text())
    for name in ("model.safetensors",):
        (tmp_path / name).symlink_to((qwen / name).resolve())

    def case(rng: Random) -> None:
        file.write_bytes(spoiled_json(rng, real if rng.random() < 0.3 else CONFIG))
        clearly_refused(lambda: known_arguments(AutoencoderKL, file))
        clearly_refused(lambda: models(config, {"qwen": tmp_path, "vae": tmp_path}, 2))
        read_config(QwenConfig, tmp_path)

    fuzz(case)


@pytest.mark.parametrize(
    "text", [DEEP, '{"text_config": "x"}', '{"num_hidden_layers": 1e999}', "[]", "null", "\ufeff", ""]
)
def test_configs_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes(safetensors(entries(QWEN)))
    report = inspect(tmp_path)
    assert report.kind == "Qwen2.5-VL" and report.problems
    for problem in report.problems:
        assert_clear(problem)
    if text != '{"text_config": "x"}':
        assert clearly_refused(lambda: read_json(tmp_path / "config.json"))


# --- the readers themselves -------------------------------------------------------------------------------------------


def test_json_within_bounds() -> None:
    assert parse_json('{"a": [1, 2.5, null, true, "\\u00e9"]}', "x") == {"a": [1, 2.5, None, True, "é"]}
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', "x") == {"a": 1}
    assert parse_json('{"a": 1000000000000000019884624838656}', "x") == {"a": 10**30 + 19884624838656}
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x")
    for text, says in (
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "x is nested deeper than 50 levels"),
        (DEEP, "x is nested deeper than 50 levels"),
        ('{"a":' * 200_000, "x is nested deeper than 50 levels"),
        ("1" + "0" * 400, "x has a number in it that is too large; it must be finite"),
        ("1" + "0" * 5000, "x has a number of thousands of digits in it"),
        ("1e999", "must be finite"),
        ("NaN", "x has the number NaN in it; it must be finite"),
        ('{"\\ud800": 1}', "text that no encoding has"),
        (b"\xff\xfe", "x is not JSON .it is not UTF-8"),
        ("{", "x is not JSON"),
    ):
        with pytest.raises(ValueError, match=says) as error:
            parse_json(text, "x")
        assert_clear(str(error.value))


def test_names_that_stay_in_their_folder() -> None:
    for name in ("x", "model-00001-of-00002.safetensors", "a b", "é", "...", "-"):
        assert is_plain_name(name)
    for other in ("", ".", "..", "a/b", "../a", "/a", "a\\b", "C:a", "a\0", "a\n", "\ud800", "x" * 256, None, 1, ["a"]):
        assert not is_plain_name(other), other


def test_homes_of_nobody(tmp_path: Path) -> None:
    config = load_config(TINY)
    for call in (
        lambda: home_path("~nosuchuser/x"),
        lambda: resolve_path("~nosuchuser/x", config),
        lambda: resolve_path("./weights/x", config, "~nosuchuser/x"),
        lambda: inspect("~nosuchuser/x"),
    ):
        with pytest.raises(ValueError, match="there is no user 'nosuchuser' on this machine"):
            call()
    assert home_path("~") == Path.home()
