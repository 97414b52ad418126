"""What LoRA files may look like, and what is said of those that do not fit."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_pipelines import TASKS, build, call
from torch import Tensor

from kandinsky.checkpoints.lora_file import AdapterConfig, configured_loras, find_lora, read_lora
from kandinsky.checkpoints.lora_tensors import lora_layers
from kandinsky.config.reading import load_config
from kandinsky.config.rules import split_lora
from kandinsky.config.schema import DiTConfig
from kandinsky.runtime.lora import Adapters
from tests.lora_files import linear_layers, write_lora

TINY = Path(__file__).resolve().parents[2] / "configs" / "config_tiny_t2v.yaml"
DIT = DiTConfig(
    in_text_dim=24, in_text_dim2=12, time_dim=16, model_dim=32, ff_dim=48, num_text_blocks=1, num_visual_blocks=2,
    axes_dims=(4, 6, 6),
)  # fmt: skip
QUERY = "visual_transformer_blocks.1.self_attention.to_query"
LAYERS = (QUERY, "visual_transformer_blocks.0.feed_forward.in_layer", "time_embeddings.in_layer")
CONFIG = {"r": 4, "lora_alpha": 8}


def renamed(**replacements: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            name = key
            for old, new in replacements.items():
                name = name.replace(old, new)
            tensors[name] = tensors.pop(key)

    return change


# --- names and where alpha is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    [
        "base_model.model.",
        "transformer.",
        "diffusion_model.",
        "model.diffusion_model.",
        "",
        "base_model.model.transformer.",
    ],
)
@pytest.mark.parametrize("names", [{}, {"lora_A": "lora_down", "lora_B": "lora_up"}, {".weight": ".default.weight"}])
def test_names(prefix: str, names: dict[str, str], tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors", DIT, LAYERS, prefix=prefix, change=renamed(**names))
    file = read_lora(path, DIT)
    assert set(file.layers) == set(LAYERS)
    tensors = load_file(path)
    for layer, (outputs, inputs) in linear_layers(DIT).items():
        if layer in LAYERS:
            assert tensors[file.layers[layer].down].shape == (4, inputs)
            assert tensors[file.layers[layer].up].shape == (outputs, 4)


def test_alpha_is_taken_from_the_first_that_there_is(tmp_path: Path) -> None:
    """A given config, the one beside, the metadata, the file's own, the rank: taken away one after the other."""
    path = tmp_path / "lora.safetensors"
    write_lora(path, DIT, LAYERS)
    tensors = load_file(path) | {f"{layer}.alpha": torch.tensor(3.0) for layer in LAYERS}
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 20})}
    save_file(tensors, path, metadata=metadata)
    (tmp_path / "config_lora.json").write_text(json.dumps(CONFIG))

    def scale(config: AdapterConfig = None) -> float:
        file = read_lora(path, DIT, config)
        adapters = Adapters(build("t2v").dit, DIT, dict, torch.device("cpu"))
        adapters.add("a", file)
        (found,) = {matrices.scale for matrices in adapters._adapters["a"].layers.values()}
        return found

    assert scale({"r": 4, "lora_alpha": 2}) == 0.5
    assert scale() == 2
    (tmp_path / "config_lora.json").unlink()
    assert scale() == 5
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 7})})
    assert scale() == 0.75
    save_file({key: tensor for key, tensor in tensors.items() if "alpha" not in key}, path)
    assert scale() == 1


def test_patterns(tmp_path: Path) -> None:
    """As in peft they match ends of names, and the first one counts."""
    path = write_lora(tmp_path / "a.safetensors", DIT, LAYERS)
    patterns = {
        "alpha_pattern": {
            r"visual_transformer_blocks\.\d\.self_attention\.to_query": 1,
            "to_query": 99,
            "layer": 98,
            "in_layer": 2,
        }
    }
    layers = read_lora(path, DIT, {**CONFIG, **patterns}).layers
    assert [layers[layer].scale for layer in LAYERS] == [0.25, 0.5, 0.5]
    layers = read_lora(path, DIT, {"r": 7, "lora_alpha": 8, "rank_pattern": {".*": 4}}).layers
    assert {layer.scale for layer in layers.values()} == {2.0}


@pytest.mark.parametrize("name", ["lora", "adapter_model", "pytorch_lora_weights", "dolly"])
def test_the_file_of_a_folder_and_the_config_beside_it(name: str, tmp_path: Path) -> None:
    path = write_lora(tmp_path / f"{name}.safetensors", DIT, LAYERS)
    partner = tmp_path / ("config_lora.json" if name == "lora" else "adapter_config.json")
    partner.write_text(json.dumps(CONFIG))
    assert find_lora(tmp_path) == find_lora(path) == path
    assert read_lora(path, DIT).layers[QUERY].scale == 2
    # With another file in the folder it belongs to that of its name, and to nobody if there is none.
    write_lora(tmp_path / "other.safetensors", DIT, LAYERS, rank=2)
    if name == "dolly":
        assert read_lora(path, DIT).layers[QUERY].scale == 1
        with pytest.raises(ValueError, match=r"2 \.safetensors files .* name the one that you mean"):
            find_lora(tmp_path)
    else:
        assert find_lora(tmp_path) == path
        assert read_lora(path, DIT).layers[QUERY].scale == 2
    assert read_lora(tmp_path / "other.safetensors", DIT).layers[QUERY].scale == 1


def flattened(prefix: str, separator: str = "_") -> Callable[[dict[str, Tensor]], None]:
    """Kohya's names, with .alpha."""

    def change(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            layer, _, part = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
            name = f"{prefix}{layer.replace('.', separator)}"
            tensors[f"{name}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = tensors.pop(key)
            tensors[f"{name}.alpha"] = torch.tensor(2.0)

    return change


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_transformer_", "lycoris_", "lora_unet_diffusion_model_"])
def test_flattened_names(prefix: str, tmp_path: Path) -> None:
    """Of all layers of a published size: no two of them are the same once flattened."""
    dit = load_config(TINY.parent / "config_5s_sft.yaml").model.dit_params
    tensors = {f"{prefix}{name.replace('.', '_')}": name for name in linear_layers(dit)}
    assert len(tensors) == len(linear_layers(dit)) > 300
    path = write_lora(tmp_path / "a.safetensors", DIT, change=flattened(prefix))
    layers = read_lora(path, DIT).layers
    assert set(layers) == set(linear_layers(DIT))
    assert all(layer.alpha == f"{prefix}{name.replace('.', '_')}.alpha" for name, layer in layers.items())


@pytest.mark.parametrize(
    "names",
    [
        {"lora_A": "lora.down", "lora_B": "lora.up", "base_model.model.": "unet."},
        {".lora_A": "_lora.down", ".lora_B": "_lora.up", "base_model.model.": "transformer."},
        {"lora_A": "lora_linear_layer.down", "lora_B": "lora_linear_layer.up", "base_model.model.": ""},
        {"lora_A": "lora_A.style", "lora_B": "lora_B.style", "base_model.model.": "pipe.dit."},
        {"lora_A": "lora_A.default", "lora_B": "lora_B.default", "base_model.model.": "module."},
    ],
)
def test_names_of_other_trainers(names: dict[str, str], tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors", DIT, LAYERS, change=renamed(**names))
    assert set(read_lora(path, DIT).layers) == set(LAYERS)
    for layer in read_lora(path, DIT).layers.values():
        assert "down" in layer.down or "lora_A" in layer.down


# --- what does not fit ------------------------------------------------------------------------------------------------


def pop(*ends: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if key.endswith(ends)]


def replaced(**parts: Tensor) -> Callable[[dict[str, Tensor]], None]:
    """Other tensors of one layer; `A`, `B` and any other name of a part."""
    names = {"A": "lora_A.weight", "B": "lora_B.weight", "B_bias": "lora_B.bias"}
    return lambda tensors: tensors.update(
        {f"base_model.model.{QUERY}.{names.get(part, part)}": value for part, value in parts.items()}
    )


def added(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


def alpha_alone(tensors: dict[str, Tensor]) -> None:
    pop("query.lora_A.weight", "query.lora_B.weight")(tensors)
    replaced(alpha=torch.tensor(1.0))(tensors)


FOREIGN = "of layers that this model does not have"
LONELY = "1 without the other one of their pair"
WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no LoRA at all": (
        renamed(lora_A="weight", lora_B="bias"),
        r"not a LoRA file: none of its 6 tensors .*weight\.weight",
    ),
    "other layers": (renamed(visual_transformer_blocks="blocks"), rf"4 {FOREIGN} \(.*blocks\.0"),
    "one layer too many": (
        renamed(**{"blocks.1.": "blocks.2."}),
        rf"2 {FOREIGN} \(.*blocks\.2\.self_attention\.to_query\.lora_A\.weight, .*lora_B",
    ),
    "a text encoder's": (added("text_encoder.layers.0.lora_A.weight", 4, 4), rf"1 {FOREIGN} \(text_encoder\.layers\.0"),
    "a norm": (renamed(to_query="query_norm"), rf"2 {FOREIGN} .*query_norm\.lora_A"),
    "half a pair": (pop("to_query.lora_B.weight"), rf"{LONELY} \(.*to_query\.lora_A"),
    "alpha alone": (alpha_alone, rf"{LONELY} \(.*to_query\.alpha"),
    "another width": (replaced(A=torch.zeros(4, 40)), r"1 of another shape \(.*to_query\.lora_A\.weight \(4, 40\)"),
    "another rank": (replaced(B=torch.zeros(32, 5)), r"1 of another shape .*\(32, 5\), the layer is \(32, 32\)"),
    "a convolution": (replaced(A=torch.zeros(4, 32, 1, 1)), r"1 of another shape"),
    "rank 0": (replaced(A=torch.zeros(0, 32), B=torch.zeros(32, 0)), r"1 of another shape"),
    "no dimensions": (replaced(A=torch.tensor(1.0)), r"1 of another shape"),
    "alphas": (replaced(alpha=torch.zeros(3)), r"alpha \(3,\), not one number"),
    "integers": (replaced(A=torch.zeros(4, 32, dtype=torch.int8)), r"1 of another dtype than F32, F16, BF16"),
    "DoRA of another width": (
        replaced(lora_magnitude_vector=torch.ones(31)),
        r"1 of another shape \(.*lora_magnitude_vector \(31,\), the layer is \(32, 32\)",
    ),
    "DoRA of a whole matrix": (replaced(dora_scale=torch.ones(32, 32)), r"1 of another shape \(.*dora_scale"),
    "DoRA of integers": (replaced(dora_scale=torch.ones(32, dtype=torch.int8)), r"1 of another dtype .*dora_scale"),
    "two kinds": (
        replaced(hada_w1_a=torch.ones(4, 4)),
        r"3 that are not the matrices of one kind of adapter \(.*hada_w1_a|3 that are not .*lora_A",
    ),
    "a Tucker decomposition": (replaced(lokr_t2=torch.ones(4, 4, 1, 1)), r"1 tensors of no known kind \(.*lokr_t2\)"),
    "bias": (replaced(B_bias=torch.ones(32)), r"1 tensors of no known kind \(.*lora_B\.bias\)"),
    "the same twice": (
        added(f"transformer.{QUERY}.lora_A.weight", 4, 32),
        r"1 of the same part of a layer as another \((transformer|base_model)",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_named(what: str, tmp_path: Path) -> None:
    change, message = WRONG[what]
    path = write_lora(tmp_path / "a.safetensors", DIT, LAYERS, change=change)
    with pytest.raises(ValueError, match=message) as caught:
        read_lora(path, DIT)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_for_another_model_says_which(tmp_path: Path) -> None:
    """Only where names fit, and sizes or the number of blocks don't, is it asked whether it is of another variant."""
    foreign = {
        "dotted": renamed(visual_transformer_blocks="double_blocks", time_embeddings="time_in"),
        "flattened": flattened("lora_unet_blocks_"),
    }
    for what, change in foreign.items():
        path = write_lora(tmp_path / f"{what}.safetensors", DIT, LAYERS, change=change)
        with pytest.raises(
            ValueError, match="this LoRA is for another model, nothing of it is used: it is of"
        ) as caught:
            read_lora(path, DIT)
        assert ("double_blocks.1.self" if what == "dotted" else "blocks_visual_transf") in str(caught.value)
        assert "variant" not in str(caught.value)

    wider = dataclasses.replace(DIT, model_dim=64)
    longer = dataclasses.replace(DIT, num_visual_blocks=4)
    for number, (other, change) in enumerate(((wider, None), (longer, None), (wider, flattened("lora_unet_")))):
        path = write_lora(tmp_path / f"{number}.safetensors", other, change=change)
        with pytest.raises(ValueError, match=r"Is it made for another variant\?$"):
            read_lora(path, DIT)
    mixed = write_lora(tmp_path / "mixed.safetensors", wider, LAYERS, change=renamed(to_query="to_q"))
    with pytest.raises(ValueError, match=r"4 of layers|2 of layers that this model does not have .*to_q\.") as caught:
        read_lora(mixed, DIT)
    assert "variant" not in str(caught.value)


def test_many_foreign_names_take_no_time(tmp_path: Path) -> None:
    """As many as a header has room for."""
    header = {f"blocks.{i}.x.lora_A.weight": ("F32", (1, 1)) for i in range(100_000)}
    looked_up = 0

    class Counted(dict[str, Any]):
        def __iter__(self) -> Any:
            nonlocal looked_up
            looked_up += 1
            return super().__iter__()

    with pytest.raises(ValueError, match=r"for another model, .* none of its 100000"):
        lora_layers(Counted(header), DIT)
    assert looked_up < 10


def test_nonsense_in_a_config_is_one_line(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "lora.safetensors", DIT, LAYERS)
    endless: Any = []
    for _ in range(100_000):
        endless = [endless]
    cyclic: Any = {}
    cyclic["r"] = cyclic
    for values in (
        {**CONFIG, "peft_type": 10**5000},
        {**CONFIG, "bias": 10**5000},
        {**CONFIG, "bias": endless},
        {**CONFIG, "peft_type": endless},
        {**CONFIG, "modules_to_save": endless},
        {**CONFIG, "r": 10**5000},
        {**CONFIG, "r": -(10**5000)},
        {**CONFIG, "rank_pattern": {"to_query": 10**5000}},
        {"r": 4, "lora_alpha": cyclic},
        {**CONFIG, "r": cyclic},
        {**CONFIG, "alpha_pattern": {"to_query": cyclic}},
    ):
        with pytest.raises(ValueError) as caught:
            read_lora(path, DIT, values)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000 and "Exceeds" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors", DIT, LAYERS)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="truncated"):
        read_lora(path, DIT)
    (tmp_path / "empty").mkdir()
    for wrong, message in (
        ("missing", "no such file or folder"),
        ("empty", r"no \.safetensors file in this folder"),
        ("lora.pt", "safetensors only"),
    ):
        with pytest.raises(ValueError, match=message):
            read_lora(tmp_path / wrong, DIT)
    shards = tmp_path / "shards"
    for name in ("1", "2"):
        write_lora(shards / f"{name}.safetensors", DIT, LAYERS)
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    with pytest.raises(ValueError, match="2 files; an adapter is a single one"):
        read_lora(shards, DIT)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 8, "lora_alpha": 8}, r"has rank 4, and 8 by its config: that belongs to another file"),
        ({"r": 4}, "it has no lora_alpha"),
        ({}, "it has no lora_alpha"),
        ({"r": 4, "lora_alpha": "8"}, "lora_alpha is '8', which it cannot be"),
        ({"r": True, "lora_alpha": 8}, "r is True"),
        ({"r": 4, "lora_alpha": float("nan")}, "must be finite"),
        ({**CONFIG, "alpha_pattern": [1]}, "alpha_pattern is"),
        ({**CONFIG, "alpha_pattern": {"a": "b"}}, "alpha_pattern has 'b' in it"),
        ({**CONFIG, "alpha_pattern": {"(": 1}}, "is not a regular expression"),
        ({**CONFIG, "use_dora": True}, r"use_dora = True, and .* has no magnitude: the file is incomplete"),
        ({**CONFIG, "bias": "all"}, "bias = all"),
        ({**CONFIG, "modules_to_save": ["out_layer"]}, "modules_to_save"),
        ({**CONFIG, "init_lora_weights": "pissa_niter_4"}, "init_lora_weights = pissa"),
        ({**CONFIG, "peft_type": "OFT"}, "kind OFT; only LoRA"),
        ({**CONFIG, "peft_type": "LOHA"}, "of the kind LORA, and LOHA by its config: that belongs to another file"),
    ],
)
def test_configs_that_do_not_fit(values: Any, message: str, tmp_path: Path) -> None:
    """As an argument, and as the file beside."""
    path = write_lora(tmp_path / "lora.safetensors", DIT, LAYERS)
    with pytest.raises(ValueError, match=message):
        read_lora(path, DIT, values)
    (tmp_path / "config_lora.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        read_lora(path, DIT)


def test_configs_that_are_no_json(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "lora.safetensors", DIT, LAYERS)
    for given in (tmp_path / "missing.json", path):
        with pytest.raises(ValueError, match="not readable as the JSON config of an adapter"):
            read_lora(path, DIT, given)
    save_file(load_file(path), path, metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(ValueError, match="its lora_adapter_metadata is not JSON"):
        read_lora(path, DIT)


def test_plain_ways_to_begin_training_are_no_obstacle(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "lora.safetensors", DIT, LAYERS)
    for begin in (True, False, "gaussian", "eva"):
        assert read_lora(path, DIT, {**CONFIG, "init_lora_weights": begin, "bias": "none"}).layers[QUERY].scale == 2


# --- model.loras ------------------------------------------------------------------------------------------------------


def test_path_and_scale() -> None:
    assert split_lora("loras/a:0.8") == ("loras/a", 0.8)
    assert split_lora("a b.safetensors:-1") == ("a b.safetensors", -1.0)
    for text in ("loras/a", "C:\\loras\\a", "a:v2", "a:"):
        assert split_lora(text) == (text, 1.0)
    for text in ("", " ", ":0.5", "a:nan", "a:inf"):
        with pytest.raises(ValueError, match="is not an adapter: give PATH or PATH:scale"):
            split_lora(text)
        with pytest.raises(ValueError, match=r"model\.loras: "):
            load_config(TINY, [f"model.loras=[{json.dumps(text)}]"])


def test_names_of_configured_ones(tmp_path: Path) -> None:
    """Those of their folders or files, told apart where they are the same; ./weights/ is the cache's folder."""
    dit = load_config(TINY).model.dit_params
    write_lora(tmp_path / "one" / "dolly", dit, config=CONFIG, trigger="dolly. ")
    write_lora(tmp_path / "two" / "dolly.safetensors", dit)
    texts = ["./weights/one/dolly:0.5", str(tmp_path / "two" / "dolly.safetensors"), "./weights/one/dolly/"]
    config = load_config(TINY, [f"model.loras={json.dumps(texts)}"])
    found = configured_loras(config, tmp_path)
    assert {name: scale for name, (_, scale) in found.items()} == {"dolly": 0.5, "dolly_2": 1.0, "dolly_3": 1.0}
    assert [file.trigger for file, _ in found.values()] == ["dolly. ", "", "dolly. "]
    assert configured_loras(load_config(TINY)) == {}


# --- the pipelines' methods -------------------------------------------------------------------------------------------


def with_adapters(task: str) -> Any:
    pipe = build(task)
    own = {name: tensor.clone() for name, tensor in pipe.dit.state_dict().items()}
    pipe.adapters = Adapters(pipe.dit, pipe.config.model.dit_params, lambda: own, torch.device("cpu"))
    pipe.adapters.begin()
    return pipe


@pytest.mark.parametrize("task", TASKS)
def test_triggers_stand_before_prompts(task: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Before the positive ones alone, and as long as their adapters are active; the record keeps the user's words."""
    caplog.set_level(logging.INFO)
    pipe = with_adapters(task)
    dit = pipe.config.model.dit_params
    folder = write_lora(tmp_path / "a", dit, config=CONFIG, trigger="dolly in, ")
    other = write_lora(tmp_path / "b.safetensors", dit)

    def encoded() -> list[str]:
        pipe.text_embedder.calls.clear()
        call(pipe, "a red cat", negative_caption="blurry", guidance_weight=2.0, save_path=tmp_path / "out.mp4"
             if task.endswith("v") else tmp_path / "out.png")  # fmt: skip
        return [prompt for one in pipe.text_embedder.calls for prompt in one["prompts"]]

    def record() -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
        assert facts["prompt"] == "a red cat" and facts["negative_prompt"] == "blurry"
        return facts

    assert encoded() == ["a red cat", "blurry"]
    assert record()["adapters"] == []
    pipe.load_adapter(folder / "config_lora.json", folder / "lora.safetensors", "a")
    assert encoded() == ["dolly in, a red cat", "blurry"]
    path = str(folder / "lora.safetensors")
    assert record()["adapters"] == [{"name": "a", "path": path, "scale": 1.0, "trigger": "dolly in, "}]
    assert "prompts begin with 'dolly in, '" in caplog.text
    pipe.load_adapter(None, other, "b", trigger="Slowly ")
    assert encoded() == ["Slowly a red cat", "blurry"]
    pipe.set_adapter(["b", "a"], [0.5, 2])
    assert encoded() == ["Slowly dolly in, a red cat", "blurry"]
    assert [(one["name"], one["scale"]) for one in record()["adapters"]] == [("b", 0.5), ("a", 2.0)]
    pipe.disable_adapters()
    assert encoded() == ["a red cat", "blurry"]
    pipe.load_adapter(None, folder, "a", trigger="")  # in the place of that name, and without what its file says
    assert encoded() == ["a red cat", "blurry"]


def test_mistakes_change_nothing(tmp_path: Path) -> None:
    pipe = with_adapters("t2v")
    dit = pipe.config.model.dit_params
    pipe.load_adapter(None, write_lora(tmp_path / "a.safetensors", dit), "a")
    before = {name: tensor.clone() for name, tensor in pipe.dit.state_dict().items()}

    def damage(tensors: dict[str, Tensor]) -> None:
        next(iter(tensors.values()))[0, 0] = torch.nan

    nan = write_lora(tmp_path / "nan.safetensors", dit, change=damage)
    partly = write_lora(tmp_path / "b.safetensors", dit, change=pop(f"{QUERY}.lora_B.weight"))
    for attempt, message in (
        (lambda: pipe.set_adapter("b"), r"no adapter 'b'; loaded are a"),
        (lambda: pipe.set_adapter(["a", "b"]), r"no adapter 'b'"),
        (lambda: pipe.set_adapter("a", float("nan")), "must be a finite number"),
        (lambda: pipe.set_adapter("a", "1"), "1 scales|must be a finite number"),
        (lambda: pipe.set_adapter("a", [1.0, 2.0]), "2 scales for the adapters"),
        (lambda: pipe.set_adapter(["a", "a"]), "name each once"),
        (lambda: pipe.load_adapter(None, nan, "a"), r"lora_A\.weight has NaN or infinite values"),
        (lambda: pipe.load_adapter(None, partly, "b"), "nothing of it is used"),
        (lambda: pipe.load_adapter(None, tmp_path / "a.safetensors", ""), "adapter_name is ''"),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
        assert [one["name"] for one in pipe.adapters.active] == ["a"]
        assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.dit.state_dict().items())
    with pytest.raises(ValueError, match="none: load_adapter comes first"):
        with_adapters("t2v").set_adapter("a")
    with pytest.raises(ValueError, match="takes no adapters: make one with kandinsky"):
        build("t2v").load_adapter(None, tmp_path / "a.safetensors")
