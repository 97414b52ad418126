"""When blocks are compiled, and where what was compiled is kept."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kandinsky.commands import many
from kandinsky.commands.flags import build_parser
from kandinsky.config.reading import load_config
from kandinsky.loading import assemble as loading
from kandinsky.request import resolve_request
from kandinsky.runtime.compile import (
    BREAK_EVEN_EVALUATIONS,
    CACHE_VARIABLE,
    is_wanted,
    keep_compiled_code,
    model_evaluations,
)
from kandinsky.serving import batch

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ENOUGH = BREAK_EVEN_EVALUATIONS


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize(
    ("setting", "device", "evaluations", "expected"),
    [
        ("auto", GPU, ENOUGH, True),
        ("auto", GPU, ENOUGH - 1, False),
        ("auto", CPU, 1000, False),
        ("on", CPU, 1, True),
        ("on", GPU, 1, True),
        ("elementwise", GPU, 1, True),
        ("elementwise", CPU, 1, True),
        ("off", GPU, 1000, False),
        ("off", CPU, 1000, False),
    ],
)
@pytest.mark.usefixtures("triton")
def test_is_wanted(setting: str, device: torch.device, evaluations: int, expected: bool) -> None:
    assert is_wanted(setting, device, evaluations) == expected


def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """By itself it runs without and says so; asked for it is an error."""
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    with caplog.at_level("INFO"):
        assert not is_wanted("auto", GPU, ENOUGH)
    assert "not compiled: no Triton" in caplog.text
    for setting in ("on", "elementwise"):
        with pytest.raises(ValueError, match=rf"compile is {setting}, .* no Triton .* run with --compile off"):
            is_wanted(setting, GPU, ENOUGH)
    assert is_wanted("on", CPU, ENOUGH)  # which has a compiler of its own


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(("capability", "works"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((12, 0), True)])
def test_fp8_weights_on_gpus_without_fp8(
    capability: tuple[int, int], works: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Known before anything loads: by itself it runs without, asked for it is an error; other weights compile."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    with caplog.at_level("INFO"):
        assert is_wanted("auto", GPU, ENOUGH, "fp8") == works
    assert ("not compiled: no fp8 in Triton" in caplog.text) != works
    if not works:
        with pytest.raises(ValueError, match=r"no fp8 in Triton .* 8.9.* run with --compile off"):
            is_wanted("on", GPU, ENOUGH, "fp8")
    assert is_wanted("on", GPU, ENOUGH, "int8") and is_wanted("on", CPU, ENOUGH, "fp8")
    assert is_wanted("elementwise", GPU, ENOUGH, "fp8")  # there are no weights in it


def test_the_requests_evaluations_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a request; and the scheme of the weights is that of their file."""
    counted: list[tuple[int, str | None]] = []

    class Enough(Exception):
        pass

    def count(setting: str, device: torch.device, evaluations: int, quantization: str | None) -> bool:
        counted.append((evaluations, quantization))
        raise Enough

    monkeypatch.setattr(loading, "is_wanted", count)
    config = load_config(CONFIGS / "config_tiny_t2v.yaml", ["model.num_steps=50", "model.guidance_weight=5"])
    request = resolve_request(config, "a circle", num_steps=7, guidance_interval=(0, 0.5), seed=0)
    for scheme in (None, "fp8"):
        monkeypatch.setattr(loading, "scheme_of", lambda path, scheme=scheme: scheme)
        for wanted in (None, request):
            with pytest.raises(Enough):
                loading.load_pipeline(config, "cpu", request=wanted)
    assert counted == [(100, None), (7 + 4, None), (100, "fp8"), (7 + 4, "fp8")]
    counted.clear()
    samples = dataclasses.replace(request, samples=request.samples * 3)
    for options in ({"request": samples}, {"request": request, "evaluations": 400}):
        with pytest.raises(Enough):
            loading.load_pipeline(config, "cpu", **options)
    assert [evaluations for evaluations, _ in counted] == [3 * (7 + 4), 400]


def test_all_rows_of_a_prompts_file_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those that are there already, too: to go on with a file is to go on as it began."""
    counted: list[int] = []
    monkeypatch.setattr(many, "loader", lambda *arguments: counted.append(arguments[-1]) or (lambda: None))
    monkeypatch.setattr(batch, "run_in_turn", lambda *_: [])
    (tmp_path / "prompts.csv").write_text("prompt,output\na circle,a.mp4\na square,b.mp4\na cross,c.mp4\n")
    (tmp_path / "b.mp4").touch()
    words = f"--config {CONFIGS}/config_tiny_t2v.yaml --prompts_file {tmp_path}/prompts.csv --output_dir {tmp_path}"
    args = build_parser().parse_args([*words.split(), "--sample_steps", "10", "--resume"])
    assert many.run_many(args, SimpleNamespace(stopper=SimpleNamespace())) == 0
    assert counted == [3 * 20]


def test_shards_are_not_compiled(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """By themselves several processes compile as one does, but for blocks whose weights are elsewhere. Of those what
    lies between products is compiled, where it is asked for."""
    monkeypatch.setattr(loading, "is_wanted", lambda *_: True)
    monkeypatch.setattr(loading, "machine_of_all", lambda machine, _: machine)
    monkeypatch.setattr(loading, "resolve_runtime", lambda config, *_: config)
    processes: Any = SimpleNamespace(rank=0, size=2, local_rank=0, connect=lambda device: None)
    given = dict.fromkeys(("dit", "vae", "qwen", "clip"))
    for shards in (False, True):
        overrides = ["runtime.cfg_parallel=2", f"runtime.shard_weights={str(shards).lower()}"]
        config = load_config(CONFIGS / "config_tiny_t2v.yaml", overrides)
        with caplog.at_level("INFO"):
            settled = loading.settle(config, "cpu", "weights", given, None, None, None, processes)
        assert settled.compiled == settled.compiles_blocks != shards
        overrides.append("runtime.compile=elementwise")
        config = load_config(CONFIGS / "config_tiny_t2v.yaml", overrides)
        settled = loading.settle(config, "cpu", "weights", given, None, None, None, processes)
        assert settled.compiled and not settled.compiles_blocks
    assert "not compiled: each process has a part of the weights" in caplog.text


@pytest.mark.parametrize("overrides", [[], ["runtime.heads_at_once=1"]], ids=["whole", "in parts"])
def test_only_what_lies_between_products(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole blocks and of blocks in parts; whole ones are not compiled then."""
    made: list[Any] = []
    monkeypatch.setattr(loading, "with_compiled_blocks", None)
    monkeypatch.setattr(loading, "with_compiled_elementwise", lambda execution: made.append(execution) or execution)
    config = load_config(CONFIGS / "config_tiny_t2v.yaml", ["runtime.compile=elementwise", *overrides])
    pipeline = loading.load_pipeline(config, "cpu", read_text_encoders=False)
    assert pipeline.execution is made[0] and made[0].writes_over == bool(overrides)


@pytest.mark.parametrize(
    ("config", "overrides", "expected"),
    [
        ("config_5s_sft", [], 100),
        ("config_5s_nocfg", [], 50),
        ("config_5s_distil", [], 16),
        ("config_5s_sft", ["model.guidance_interval=[0.25,0.75]"], 75),
        ("config_5s_sft", ["model.guidance_every=2"], 75),
        ("config_5s_nocfg", ["model.guidance_every=2"], 50),
        ("config_t2i", ["model.num_steps=10"], 20),
    ],
)
def test_evaluations(config: str, overrides: list[str], expected: int) -> None:
    assert model_evaluations(load_config(CONFIGS / f"{config}.yaml", overrides).model) == expected


@pytest.mark.usefixtures("triton")
def test_which_variants_are_compiled_by_themselves() -> None:
    compiled = {
        path.stem: is_wanted("auto", GPU, model_evaluations(load_config(path).model)) for path in CONFIGS.glob("*.yaml")
    }
    few_steps = {"config_5s_distil", "config_10s_distil", "config_tiny_flf"}
    few_steps |= {f"config_5s_{task}_pro_distil{hd}" for task in ("t2v", "i2v") for hd in ("", "_hd")}
    assert {name for name, wanted in compiled.items() if not wanted} == few_steps


def test_compiled_code_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    kept = tmp_path / "kandinsky5" / "compiled"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(CACHE_VARIABLE, default_cache_dir())  # what PyTorch sets when it is loaded
    keep_compiled_code()
    assert cache_dir() == str(kept) and kept.is_dir()  # PyTorch's own answer
    monkeypatch.delenv(CACHE_VARIABLE)
    keep_compiled_code()
    assert os.environ[CACHE_VARIABLE] == str(kept)
    monkeypatch.setenv(CACHE_VARIABLE, "/somewhere/else")  # what a user set
    keep_compiled_code()
    assert os.environ[CACHE_VARIABLE] == "/somewhere/else"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "me")
    monkeypatch.delenv(CACHE_VARIABLE)
    keep_compiled_code()
    assert os.environ[CACHE_VARIABLE] == str(tmp_path / "me" / ".cache" / "kandinsky5" / "compiled")
