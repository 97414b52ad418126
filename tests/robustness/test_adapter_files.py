"""Adapters from strangers: their configs, names and numbers; and who is named when an adapter spoils the weights."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky.checkpoints.layer_names import LayerNames
from kandinsky.checkpoints.lora_file import configured_loras, read_lora
from kandinsky.config.schema import Config
from kandinsky.pipelines.base import Pipeline
from kandinsky.runtime.lora import Adapters
from tests.lora_files import write_lora
from tests.robustness.fuzzing import NASTY_VALUES, bounded_time, clearly_refused, fuzz, spoiled_bytes, spoiled_json
from tests.robustness.fuzzing import spoiled_value as spoiled
from tests.unit.small_pipelines import build, call

QUERY = "visual_transformer_blocks.1.self_attention.to_query"
LAYERS = (QUERY, "visual_transformer_blocks.0.feed_forward.in_layer", "time_embeddings.in_layer")
CONFIG = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": False, "bias": "none", "target_modules": ["to_query"],
    "rank_pattern": {"in_layer": 4}, "alpha_pattern": {QUERY: 2, r"^time_embeddings\.in_layer$": 3},
}  # fmt: skip
HOSTILE = {  # regular expressions -> what compiling or matching them does
    r"(\w+\.?)+!": "hangs",
    r"(a+)+$": "hangs",
    "a{99999999999}": "OverflowError",
    "(" * 5000: "RecursionError",
    "(" * 5000 + ")" * 5000: "RecursionError",
    r"(.*)*" * 30 + "x": "hangs",
    ".*" * 32 + "9": "hangs, where it is compiled",
    "[": "re.error",
    "(?P<a>.)(?P=a)": "a back reference",
    r"\1": "re.error",
    "*": "re.error",
    "\\": "re.error",
}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return build("t2v")


@pytest.fixture(scope="module")
def plain(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dit = pipe.config.model.dit_params
    return write_lora(tmp_path_factory.mktemp("lora") / "a", dit, LAYERS, config=CONFIG) / "lora.safetensors"


# --- configs ----------------------------------------------------------------------------------------------------------


def test_fuzz_adapter_configs(pipe: Pipeline, plain: Path, tmp_path: Path) -> None:
    """Beside the file, in its metadata, and as a dict: finite scales for each layer, or one line."""
    path, tensors = tmp_path / "lora.safetensors", load_file(plain)
    save_file(tensors, path)
    content, dit = path.read_bytes(), pipe.config.model.dit_params
    nasty = (*NASTY_VALUES, *HOSTILE, 1e-300, "^", "$", ".*", r"\d+", {"to_query": 10**400}, {r"\w*": 3}, {"x" * 70: 1})

    def with_metadata(metadata: Any) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        header = {"__metadata__": metadata, **json.loads(content[8 : 8 + length])}
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    def case(rng: Random) -> None:
        given = None
        beside, inside = CONFIG, {f"transformer.{name}": value for name, value in CONFIG.items()}
        match rng.randrange(3):
            case 0:
                path.write_bytes(content)
                (tmp_path / "config_lora.json").write_bytes(spoiled_json(rng, beside, nasty))
            case 1:
                (tmp_path / "config_lora.json").unlink(missing_ok=True)
                text = spoiled_json(rng, inside, nasty).decode("utf-8", "replace")
                path.write_bytes(with_metadata({"lora_adapter_metadata": text, "trigger": rng.choice(["", "x, "])}))
            case _:
                path.write_bytes(content)
                given = spoiled(rng, beside, nasty)
        file = read_lora(path, dit, given)
        assert set(file.layers) == set(LAYERS)
        assert all(layer.scale is not None and math.isfinite(layer.scale) for layer in file.layers.values())

    fuzz(case)


def test_fuzz_adapter_files(pipe: Pipeline, plain: Path, tmp_path: Path) -> None:
    """Their headers: other names, shapes, dtypes, cut and flipped."""
    path, dit = tmp_path / "lora.safetensors", pipe.config.model.dit_params
    content = plain.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    alpha = {f"{QUERY}.alpha": {"dtype": "F32", "shape": [], "data_offsets": [len(data), len(data) + 4]}}
    nasty = (*NASTY_VALUES, "I8", "F64", "BF16", [0, 0], [], [1], f"{QUERY}.alpha", f"x.{QUERY}.lora_A.weight")

    def case(rng: Random) -> None:
        if rng.random() < 0.7:
            text = spoiled_json(rng, {**header, **(alpha if rng.random() < 0.5 else {})}, nasty)
            path.write_bytes(struct.pack("<Q", len(text)) + text + data + bytes(4 if rng.random() < 0.5 else 0))
        else:
            path.write_bytes(spoiled_bytes(rng, content))
        adapters = Adapters(pipe.dit, dit, dict, torch.device("cpu"))
        adapters.add("x", read_lora(path, dit, {"lora_alpha": 4} if rng.random() < 0.5 else None))

    fuzz(case)


@pytest.mark.parametrize("expression", HOSTILE, ids=lambda text: f"{text[:20]} {HOSTILE[text][:10]}")
@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
def test_no_expression_of_a_stranger_is_compiled(
    expression: str, field: str, pipe: Pipeline, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    compiled: list[str] = []
    for name in ("compile", "match", "fullmatch", "search"):
        original = getattr(re, name)
        monkeypatch.setattr(re, name, lambda p, *a, o=original, **k: compiled.append(str(p)) or o(p, *a, **k))
    with bounded_time():
        message = clearly_refused(
            lambda: read_lora(plain, pipe.config.model.dit_params, {"lora_alpha": 8, field: {expression: 4}})
        )
    assert expression not in "".join(compiled)
    if expression.startswith(".*"):
        assert message is None
    else:
        assert message is not None and f"in {field} is not a regular expression that is read here" in message


def test_names_match_as_peft_matches_them() -> None:
    """What is read here, compared with the expression that peft makes of it."""
    import re

    names = [QUERY, *LAYERS, "to_query", "xto_query", "a.to_query.b", "visual_transformer_blocks.12.x", "a_b-c", ""]
    expressions = (
        *("to_query", "self_attention.to_query", QUERY, f"^{QUERY}", "^to_query", "to_query$", "^to_query$", "query"),
        *(
            r"visual_transformer_blocks\.\d\.self_attention\.to_query",
            r"visual_transformer_blocks\.\d+\..*",
            ".*",
            ".+",
        ),
        *(r".*\.in_layer", r"\w+\.in_layer", r"^\w*embeddings\.in_layer", "t.*y", "x*to_query", r"\d*", "a.b"),
    )
    for expression in expressions:
        found = LayerNames("x", {expression: 1})
        for name in names:
            # A dot in a name is that dot here, and any letter for peft, which makes no difference to layers' names.
            expected = bool(re.match(rf"(.*\.)?({expression})$", name))
            assert bool(found.value(name, 0)) == expected, (expression, name)
    first = LayerNames("x", {"query": 0, ".*query": 1, "to_query": 2, "self_attention.to_query": 3})
    assert first.value(QUERY, None) == 1
    assert LayerNames("x", {"to_query": 2, ".*query": 1}).value(QUERY, None) == 2


def test_many_names_and_few_expressions() -> None:
    with bounded_time():
        many = LayerNames("x", {f"layer_{i}": i for i in range(200_000)})
        assert [many.value(f"block.layer_{i}", None) for i in range(0, 200_000, 250)] == list(range(0, 200_000, 250))
    with pytest.raises(ValueError, match="x has 17 regular expressions; read are 16"):
        LayerNames("x", {f".*{i}": i for i in range(17)})
    with pytest.raises(ValueError, match="of at most 64 letters"):
        LayerNames("x", {"a*" * 65: 1})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"r": 4, "lora_alpha": 1' + "0" * 400 + "}", "must be finite"),
        ('{"r": 4, "lora_alpha": 1e999}', "must be finite"),
        ('{"r": 4, "lora_alpha": null}', "it has no lora_alpha"),
        ('{"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_query": 1' + "0" * 400 + "}}", "must be finite"),
        ("[" * 200_000, "nested deeper than 50 levels"),
        ("\ud800", "not JSON"),
    ],
    ids=lambda text: text[:40].encode("ascii", "replace").decode(),
)
def test_configs_beside(text: str, says: str, pipe: Pipeline, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").write_bytes(plain.read_bytes())
    (tmp_path / "config_lora.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    message = clearly_refused(lambda: read_lora(tmp_path, pipe.config.model.dit_params))
    assert message is not None and says in message
    with pytest.raises(ValueError, match=r"lora_alpha is .*; it must be finite"):
        read_lora(plain, pipe.config.model.dit_params, {"r": 4, "lora_alpha": 10**400})


def test_adapters_that_are_no_files(pipe: Pipeline, plain: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lora.safetensors")
    for path in (tmp_path / "lora.safetensors", tmp_path):
        with pytest.raises(ValueError, match="it is a pipe"):
            read_lora(path, pipe.config.model.dit_params)
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "lora.safetensors").write_bytes(plain.read_bytes())
    os.mkfifo(folder / "config_lora.json")
    with pytest.raises(ValueError, match=r"config_lora\.json: it is a pipe"):
        read_lora(plain, pipe.config.model.dit_params, folder / "config_lora.json")


def test_the_plan_of_a_damaged_adapter(
    tmp_path: Path, pipe: Pipeline, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there has to fit; what is not may come later."""
    import test as command_line

    config = str(Path(__file__).resolve().parents[2] / "configs" / "config_tiny_t2v.yaml")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(plain.read_bytes()[:-4])
    for path, code, says in (
        (damaged, 2, "truncated"),
        (plain, 2, "does not fit the model"),
        (tmp_path / "none", 0, ""),
    ):
        assert command_line.main(["--config", config, "--plan", "--device", "cpu", "--lora", str(path)]) == code
        err = capsys.readouterr().err
        assert says in err and len(err.splitlines()) == bool(says)


def test_an_adapter_in_the_home_of_nobody(pipe: Pipeline) -> None:
    config = with_loras(pipe, "~nosuchuser/loras/a:0.5")
    with pytest.raises(ValueError, match="~nosuchuser/loras/a: there is no user 'nosuchuser' on this machine"):
        configured_loras(config)
    with pytest.raises(ValueError, match="there is no user 'nosuchuser'"):
        configured_loras(with_loras(pipe, "./weights/a"), "~nosuchuser/weights")


def with_loras(pipe: Pipeline, *texts: str) -> Config:
    return dataclasses.replace(pipe.config, model=dataclasses.replace(pipe.config.model, loras=texts))


# --- numbers ----------------------------------------------------------------------------------------------------------


def with_adapters() -> Pipeline:
    pipe = build("t2v")
    own = {name: tensor.clone() for name, tensor in pipe.dit.state_dict().items()}
    pipe.adapters = Adapters(pipe.dit, pipe.config.model.dit_params, lambda: own, torch.device("cpu"))
    pipe.adapters.begin()  # type: ignore[attr-defined]
    return pipe


def huge(factor: float) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] *= factor

    return change


def test_an_adapter_of_huge_numbers_is_named(tmp_path: Path) -> None:
    """Where the weights would be none, at once and with nothing changed; where they are, but not what comes of them,
    after the first evaluation."""
    pipe = with_adapters()
    dit = pipe.config.model.dit_params
    good = write_lora(tmp_path / "good.safetensors", dit, LAYERS)
    overflowing = write_lora(tmp_path / "overflowing.safetensors", dit, LAYERS, change=huge(1e30))
    large = write_lora(tmp_path / "large.safetensors", dit, LAYERS, change=huge(1e17))
    pipe.load_adapter(None, good, "style")
    before = {name: tensor.clone() for name, tensor in pipe.dit.state_dict().items()}
    for name in ("other", "style"):  # also in the place of the one that is active
        with pytest.raises(
            ValueError, match=r"overflowing\.safetensors: with it, .*weight has values that are not finite"
        ):
            pipe.load_adapter(None, overflowing, name)
        assert [one["path"] for one in pipe.active_adapters()] == [str(good)]
        assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.dit.state_dict().items())
    with pytest.raises(ValueError, match="there is no adapter 'other'"):
        pipe.set_adapter("other")

    pipe.load_adapter(None, large, "loud")
    with pytest.raises(ValueError, match=r"the DiT computes NaN .* the adapters loud .scale 1. are in its weights"):
        call(pipe)
    pipe.set_adapter("style")
    call(pipe)


def test_a_scale_that_is_too_large(tmp_path: Path) -> None:
    pipe = with_adapters()
    path = write_lora(tmp_path / "a.safetensors", pipe.config.model.dit_params, LAYERS)
    pipe.load_adapter(None, path, "a")
    before = {name: tensor.clone() for name, tensor in pipe.dit.state_dict().items()}
    with pytest.raises(ValueError, match="values that are not finite"):
        pipe.set_adapter("a", 1e300)
    assert [one["scale"] for one in pipe.active_adapters()] == [1.0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.dit.state_dict().items())
