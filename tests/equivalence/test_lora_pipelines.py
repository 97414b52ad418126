"""Adapters in whole runs of the tiny models: the same bits wherever the weights are, and none left when they go."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from kandinsky.config.reading import load_config
from kandinsky.loading.assemble import load_pipeline
from kandinsky.pipelines.base import Pipeline
from kandinsky.runtime import lora
from kandinsky.runtime.block_swap import BlockSwap
from kandinsky.runtime.quantization import BlockLinear, QuantizedLinear
from tests.gguf_files import write_gguf
from tests.lora_files import linear_layers, write_lora

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG_T2V = REPOSITORY / "configs" / "config_tiny_t2v.yaml"
PARAMS = load_config(CONFIG_T2V).model.dit_params
PLACES = {
    "plain": (),
    "offload": ("runtime.offload=on",),
    "swap": ("runtime.blocks_on_gpu=2",),
    "offload, swap": ("runtime.offload=on", "runtime.blocks_on_gpu=1"),
}


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One for all layers, and one for some of them in bfloat16."""
    folder = tmp_path_factory.mktemp("loras")
    feed_forward = [layer for layer in linear_layers(PARAMS) if "visual" in layer and "feed_forward" in layer]

    def to_bfloat16(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    return {
        "all": write_lora(folder / "all", PARAMS, config={"r": 4, "lora_alpha": 6}, seed=1),
        "some": write_lora(folder / "some.safetensors", PARAMS, feed_forward, rank=3, seed=2, change=to_bfloat16),
    }


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in float32, with digits that bfloat16 does not have."""
    path = tmp_path_factory.mktemp("wide") / "float32.safetensors"
    generator = torch.Generator().manual_seed(0)
    published = load_file(REPOSITORY / load_config(CONFIG_T2V).model.checkpoint_path)
    save_file(
        {n: w.float() * (1 + 1e-3 * torch.randn(w.shape, generator=generator)) for n, w in published.items()}, path
    )
    return path


def load(*overrides: str, device: str = "cpu", loras: tuple[str, ...] = (), **options: Any) -> Any:
    texts = [f"model.loras={list(loras)}"] if loras else []
    return load_pipeline(load_config(CONFIG_T2V, ["model.num_steps=1", *texts, *overrides]), device, **options)


def latents_of(pipe: Any, **options: Any) -> Tensor:
    given = {"time_length": 0, "seed": 1, "progress": False, "output_type": "latent"}
    return pipe("a red circle", **{**given, **options})


def differ(one: Tensor, other: Tensor) -> bool:
    return float((one - other).norm() / one.norm()) > 0.01


def went_through(pipe: Pipeline, loras: dict[str, Path]) -> list[Tensor]:
    """Latents without, with one, with two, with one of another strength, with what is left after all, and with one."""
    seen = [latents_of(pipe)]
    pipe.load_adapter(None, loras["all"], "all")
    seen.append(latents_of(pipe))
    pipe.load_adapter(None, loras["some"], "some")
    pipe.set_adapter(["some", "all"], [0.5, -0.25])
    seen.append(latents_of(pipe))
    pipe.set_adapter("some", 2.0)
    seen.append(latents_of(pipe))
    pipe.disable_adapters()
    seen.append(latents_of(pipe))
    pipe.set_adapter("all")
    seen.append(latents_of(pipe))
    return seen


@pytest.mark.processor
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_the_same_wherever_weights_are(quantization: str | None, loras: dict[str, Path], wide: Path) -> None:
    """Also where they are cast: in bfloat16 from a float32 file, of which modulations stay as they are."""
    more = () if quantization is None else (f"runtime.dit_quantization={quantization}",)
    expected: list[Tensor] = []
    for name, overrides in PLACES.items():
        pipe = load(*overrides, *more, dtype="bfloat16", dit_path=wide)
        assert isinstance(pipe.execution.hand_out, BlockSwap) == ("swap" in name)
        assert any(isinstance(module, QuantizedLinear) for module in pipe.dit.modules()) == bool(quantization)
        seen = went_through(pipe, loras)
        expected = expected or seen
        for one, other in zip(seen, expected, strict=True):
            assert torch.equal(one, other), name
    without, one, two, strong, after, again = expected
    assert torch.equal(without, after) and torch.equal(one, again)
    assert all(differ(a, b) for a, b in ((without, one), (one, two), (two, strong), (strong, without)))


def test_undone_to_the_last_bit(loras: dict[str, Path], wide: Path) -> None:
    pipe = load(dtype="bfloat16", dit_path=wide)
    before = {name: tensor.clone() for name, tensor in pipe.dit.state_dict().items()}
    addresses = {name: tensor.data_ptr() for name, tensor in pipe.dit.state_dict().items()}
    pipe.load_adapter(None, loras["all"])
    changed = {name for name, tensor in pipe.dit.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{layer}.weight" for layer in linear_layers(PARAMS)}
    pipe.load_adapter(None, loras["some"])  # of the same name: in its place
    pipe.set_adapter("default", 0.3)
    pipe.disable_adapters()
    after = pipe.dit.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == addresses  # nothing for a compiler to see
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}


def test_the_checkpoint_is_not_written_to(loras: dict[str, Path], wide: Path) -> None:
    """Where nothing is cast, weights on a CPU are the file's own pages."""
    bytes_before = wide.read_bytes()
    pipe = load(dtype="float32", dit_path=wide)
    pipe.load_adapter(None, loras["all"])
    merged = {name: tensor.clone() for name, tensor in pipe.dit.state_dict().items()}
    assert wide.read_bytes() == bytes_before
    published = load_file(wide)
    pipe.set_adapter("default", 0.5)
    pipe.set_adapter("default")
    assert all(torch.equal(tensor, merged[name]) for name, tensor in pipe.dit.state_dict().items())
    assert not torch.equal(merged["visual_embeddings.in_layer.weight"], published["visual_embeddings.in_layer.weight"])
    pipe.disable_adapters()
    assert all(torch.equal(tensor, published[name]) for name, tensor in pipe.dit.state_dict().items())


def test_what_failed_on_the_way_is_undone(loras: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load()
    before = {name: tensor.clone() for name, tensor in pipe.dit.state_dict().items()}
    calls = iter(range(10**6))

    def out_of_memory(weight: Tensor, update: Any) -> Tensor:
        if next(calls) == 20:
            raise torch.OutOfMemoryError("of a stand-in")
        return weight + 1

    with monkeypatch.context() as patch:
        patch.setattr(lora, "change_weight", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            pipe.load_adapter(None, loras["all"])
    assert not all(torch.equal(tensor, before[name]) for name, tensor in pipe.dit.state_dict().items())
    pipe.disable_adapters()
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.dit.state_dict().items())


def test_from_the_config_as_from_a_call(loras: dict[str, Path]) -> None:
    called = load()
    called.load_adapter(None, loras["all"], "all")
    called.load_adapter(loras["all"] / "config_lora.json", loras["all"] / "lora.safetensors", "again")
    called.set_adapter(["all", "again"], [0.5, 0.25])
    expected = latents_of(called)
    texts = f"{loras['all']}:0.5", f"{loras['all'] / 'lora.safetensors'}:0.25"
    for overrides in PLACES.values():
        pipe = load(*overrides, loras=texts)
        assert [(one["name"], one["scale"]) for one in pipe.adapters.active] == [("all", 0.5), ("all_2", 0.25)]
        assert torch.equal(latents_of(pipe), expected)


@pytest.mark.parametrize("quantization", ["null", "int8"])
def test_with_compiled_blocks(quantization: str, loras: dict[str, Path]) -> None:
    """Merged weights are no news to a compiler. Beside quantised ones a graph with the matrices is made, no more."""
    plain, pipe = (load(f"runtime.dit_quantization={quantization}") for _ in range(2))
    torch._dynamo.reset()
    counter = CompileCounter()
    for block in pipe.dit.visual_transformer_blocks:
        block.compile(backend=counter, fullgraph=True)
    counts = []
    for scales in ({}, {"all": 1.0}, {"all": 0.5}, {"all": -2.0}, {}):
        for one in (plain, pipe):
            if scales:
                one.load_adapter(None, loras["all"], "all")
            one.set_adapter(list(scales), list(scales.values()))
        assert torch.equal(latents_of(pipe), latents_of(plain))
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    without, *merged, after = counts
    assert set(merged) == {without if quantization == "null" else 2 * without} and after == merged[-1]


def test_changed_between_steps(loras: dict[str, Path]) -> None:
    """From a callback, while the DiT is on its device."""

    def switch(pipe: Pipeline, step: int, timestep: Tensor, tensors: dict[str, Any]) -> None:
        pipe.set_adapter("some") if step == 1 else pipe.disable_adapters()

    seen = []
    for overrides in PLACES.values():
        pipe = load(*overrides, loras=(f"{loras['all']}", f"{loras['some']}"))
        seen.append(latents_of(pipe, num_steps=3, callback_on_step_end=switch))
        assert pipe.adapters.active == []
    assert all(torch.equal(one, seen[0]) for one in seen)
    assert differ(seen[0], latents_of(load(), num_steps=3))


@pytest.mark.parametrize("name", ["i2v", "t2i", "i2i"])
def test_the_other_tasks(name: str, tmp_path: Path) -> None:
    config = load_config(REPOSITORY / "configs" / f"config_tiny_{name}.yaml", ["model.num_steps=1"])
    path = write_lora(tmp_path / "a.safetensors", config.model.dit_params)
    pipe: Any = load_pipeline(config, "cpu")
    options = {"seed": 1, "progress": False, "output_type": "latent"}
    options |= {"image": Image.radial_gradient("L").convert("RGB")} if name != "t2i" else {}
    options |= {"num_frames": 5} if name == "i2v" else {}
    before = pipe("a red circle", **options)
    pipe.load_adapter(None, path)
    assert differ(before, pipe("a red circle", **options))
    pipe.disable_adapters()
    assert torch.equal(before, pipe("a red circle", **options))


def test_a_quantised_file(loras: dict[str, Path], tmp_path: Path) -> None:
    """Of which the layers that are not quantised are merged like any others."""
    from tools.quantize import main as quantize

    path = tmp_path / "fp8.safetensors"
    assert quantize(["--config", str(CONFIG_T2V), "--dit_quantization", "fp8", "--output", str(path)]) == 0
    seen = []
    for overrides in (PLACES["plain"], PLACES["offload, swap"]):
        pipe = load(*overrides, dit_path=path)
        before = latents_of(pipe)
        pipe.load_adapter(None, loras["all"])
        seen.append(latents_of(pipe))
        pipe.disable_adapters()
        assert torch.equal(latents_of(pipe), before)
    assert torch.equal(*seen) and differ(seen[0], before)


def test_a_checkpoint_that_is_another_one_now(loras: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "dit.safetensors"
    shutil.copy(REPOSITORY / load_config(CONFIG_T2V).model.checkpoint_path, path)
    pipe = load(dit_path=path)
    before = {name: tensor.clone() for name, tensor in pipe.dit.state_dict().items()}
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"dit\.safetensors has changed since it was loaded.*load the pipeline anew"):
        pipe.load_adapter(None, loras["all"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.dit.state_dict().items())
    path.unlink()
    with pytest.raises(ValueError, match="has changed since"):
        pipe.set_adapter("default")


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", [None, "int8", "fp8"])
def test_the_same_on_a_gpu(quantization: str | None, loras: dict[str, Path], wide: Path) -> None:
    more = () if quantization is None else (f"runtime.dit_quantization={quantization}",)
    expected: list[Tensor] = []
    for name, overrides in PLACES.items():
        pipe = load(*overrides, *more, device="cuda:0", dit_path=wide)
        seen = went_through(pipe, loras)
        expected = expected or seen
        assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True)), name
    assert torch.equal(expected[0], expected[4]) and differ(expected[0], expected[1])


def test_on_a_gguf(loras: dict[str, Path], tmp_path: Path) -> None:
    """Adapters out of files on layers that stay in GGUF's blocks: the same wherever the weights are."""
    path = tmp_path / "dit.gguf"
    write_gguf(path, load_file(REPOSITORY / load_config(CONFIG_T2V).model.checkpoint_path), "q8_0")
    seen = {}
    for place, overrides in PLACES.items():
        pipe = load(f"model.checkpoint_path={path}", *overrides)
        assert any(isinstance(module, BlockLinear) for module in pipe.dit.modules())
        without = latents_of(pipe)
        pipe.load_adapter(None, loras["all"], "all")
        seen[place] = without, latents_of(pipe)
        assert differ(*seen[place])
    for place, latents in seen.items():
        for found, expected in zip(latents, seen["plain"], strict=True):
            assert torch.equal(found, expected), place
