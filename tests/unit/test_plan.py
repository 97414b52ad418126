"""The planner: what it counts, what it chooses and what it never chooses, and that its advice is good.

All of it is arithmetic on configs; what the arithmetic is worth, test_memory_model.py measures.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kandinsky.checkpoints.dit_layout import is_quantizable
from kandinsky.config.reading import load_config, preset_file, with_settings
from kandinsky.config.schema import Config
from kandinsky.models.vae_memory import GB
from kandinsky.planning import plan as planning
from kandinsky.planning import weights as planned_weights
from kandinsky.planning.choices import Choice, cost, families
from kandinsky.planning.costs import forward_flops, num_evaluations, rates_of
from kandinsky.planning.machine import CUDA_CONTEXT, HOST_OF_GPU_RUN, Machine
from kandinsky.planning.plan import Plan, default_request, make_plan, resolve_runtime, weight_files
from kandinsky.planning.report import report
from kandinsky.planning.stages import Stage, estimate, num_tokens
from kandinsky.planning.weights import Models
from kandinsky.request import Request, resolve_request
from tests.lora_files import linear_layers, write_lora

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PUBLISHED = sorted(p.stem.removeprefix("config_") for p in CONFIGS.glob("*.yaml") if "tiny" not in p.stem)
SMALL_CARDS = {8: "8gb", 12: "12gb", 16: "16gb", 24: "24gb"}


@functools.cache
def config_of(name: str, preset: str | None = None, *overrides: str) -> Config:
    presets = [] if preset is None else [preset_file(preset)]
    return load_config(CONFIGS / f"config_{name}.yaml", overrides, presets)


def plan_for(config: Config, gpu_gb: float | None, host_gb: float = 64, request: Request | None = None) -> Plan:
    machine = Machine(host_gb * GB, None if gpu_gb is None else gpu_gb * GB)
    return make_plan(config, request or default_request(config), machine, {}, "bfloat16" if gpu_gb else "float32")


# --- what the project promises ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "preset", "gpu_gb"),
    [("5s_sft", "8gb", 8), ("10s_sft", "8gb", 10), ("t2i", "8gb", 8), ("5s_t2v_pro", "16gb", 16),
     ("5s_t2v_pro_hd", "24gb", 20)],
)  # fmt: skip
def test_goals_are_met_by_the_presets(name: str, preset: str, gpu_gb: float) -> None:
    """With GB of 10^9 bytes, the smaller ones."""
    plan = plan_for(config_of(name, preset), gpu_gb * 1e9 / GB)
    assert plan.refusal is None and not plan.overrides
    assert max(stage.gpu for stage in plan.stages) <= gpu_gb * 1e9


@pytest.mark.parametrize("card", SMALL_CARDS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_of_small_cards(name: str, card: int) -> None:
    """Everything fits, GB of 10^9 bytes, and asks for nothing more that changes pixels."""
    plan = plan_for(config_of(name, SMALL_CARDS[card]), card * 1e9 / GB)
    assert plan.refusal is None and not plan.overrides


@pytest.mark.parametrize("host_gb", [8, 16, 32, 64])
@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_is_refused_on_a_small_card(name: str, host_gb: int) -> None:
    """Without a preset and with each, in the size that takes most; nothing but the decoder's tiles changes a result."""
    for preset in (None, *SMALL_CARDS.values()):
        config = config_of(name, preset)
        width, height = max(config.generation.resolutions, key=prod)
        request = dataclasses.replace(default_request(config), width=width, height=height)
        plan = plan_for(config, 8e9 / GB, host_gb, request)
        assert plan.refusal is None, plan.refusal
        chosen = plan.config.runtime
        assert chosen.dit_quantization is None and not chosen.qwen_quantization
        if (
            chosen.blocks_on_gpu is not None and chosen.blocks_from == "file"
        ):  # for want of memory, and the plan says how much time it takes
            assert host_gb < 64 and any("from the mapped file, besides" in cost for cost in plan.costs)


def check_advice(config: Config, plan: Plan) -> None:
    """Every way out that a refusal names is one."""
    assert plan.refusal is not None
    ways = plan.refusal.split("What fits: ")[1].split(", or ")
    assert ways
    for way in ways:
        flags = dict(re.findall(r"--(\w+)(?: (\w+))?", way))
        assert flags
        runtime: dict[str, Any] = {name: flags.pop(name) for name in list(flags) if name == "dit_quantization"}
        generation = {"expand_prompts": False} if flags.pop("expand_prompt", None) == "off" else {}
        runtime |= {"qwen_quantization": True} if flags.pop("qwen_quantization", None) is not None else {}
        size = {name: int(flags.pop(name)) for name in ("width", "height") if name in flags}
        if "video_duration" in flags:
            size["time_length"] = int(flags.pop("video_duration"))
        dtype = flags.pop("dtype", "bfloat16" if plan.machine.gpu_memory else "float32")
        assert not flags
        sizes = [(config.generation.width, config.generation.height)] if config.task in ("i2v", "i2i") else []
        if config.task == "i2v" and "width" not in size:
            size |= {"width": plan.request.width, "height": plan.request.height}
        request = resolve_request(config, "a cat", image_sizes=sizes, **size)
        other = with_settings(config, runtime=runtime, generation=generation)
        assert make_plan(other, request, plan.machine, {}, dtype).refusal is None, way


# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tflop"), [("5s_sft", 660), ("10s_sft", 678), ("5s_t2v_pro", 3584), ("5s_t2v_pro_hd", 6173), ("t2i", 48.1)]
)
def test_floating_point_operations_of_published_models(name: str, tflop: float) -> None:
    config = config_of(name)
    assert forward_flops(config, default_request(config)) / 1e12 == pytest.approx(tflop, rel=0.01)


def test_stages_add_up() -> None:
    """Weights are those of the stage's own models with offload, and of all of them without."""
    config, machine = config_of("5s_i2v"), Machine(64 * GB, 48 * GB)
    models = planned_weights.models(config, {}, 2)
    on, off = (
        estimate(with_settings(config, runtime={"offload": value}), default_request(config), machine, models)
        for value in ("on", "off")
    )
    assert [s.name for s in on] == ["expand prompt", "encode text", "encode image", "denoise", "decode", "write"]
    text, vae, dit = models.text.size, models.vae.size, models.dit.size
    assert models.writer is not None
    writer = models.writer.size
    assert writer == 2 * (544_997_376 + 676_550_144)  # the head, and the tower that sees the picture
    assert [stage.weights for stage in on] == [text + writer, text, vae, dit, vae, 0]
    assert [stage.weights for stage in off] == [text + vae + dit + writer] + 5 * [text + vae + dit]
    assert [stage.activations for stage in on] == [stage.activations for stage in off]
    for stage in (*on, *off):
        assert stage.gpu == CUDA_CONTEXT + stage.weights + int(1.1 * stage.activations)


def test_streamed_blocks_are_on_the_host_and_in_two_buffers() -> None:
    config, machine = config_of("5s_t2v_pro"), Machine(64 * GB, 16 * GB)
    models = planned_weights.models(config, {}, 2)
    runtime = {"offload": "on", "blocks_on_gpu": 10}
    stages = estimate(with_settings(config, runtime=runtime), default_request(config), machine, models)
    denoise = next(stage for stage in stages if stage.name == "denoise")
    assert denoise.weights == models.dit_rest + 12 * models.dit_block
    assert denoise.host == HOST_OF_GPU_RUN + 50 * models.dit_block


def test_magcache_and_quantisation_are_counted() -> None:
    config = config_of("5s_sft")
    request = default_request(config)

    def denoise(config: Config) -> Stage:
        return next(stage for stage in plan_for(config, 24).stages if stage.name == "denoise")

    plain = denoise(config)
    cached = denoise(dataclasses.replace(config, magcache=dataclasses.replace(config.magcache, enabled=True)))
    residual = num_tokens(config, request) * 1792 * 2
    assert cached.activations - plain.activations == 2 * residual
    tracked = denoise(with_settings(config, cache={"kind": "tracked", "order": 2}))  # and a new one beside each old one
    velocity = num_tokens(config, request) * 2 * 2 * 16 * 2
    assert tracked.activations - plain.activations == 2 * (3 + 1) * velocity
    firstblock = denoise(
        with_settings(config, cache={"kind": "firstblock", "order": 1})
    )  # and what the first block adds
    assert firstblock.activations - plain.activations == 2 * (3 + 2) * residual
    int8 = denoise(with_settings(config, runtime={"dit_quantization": "int8"}))
    assert int8.weights < 0.62 * plain.weights
    assert int8.activations == plain.activations  # a weight that is made into numbers again is not at the peak
    picture = resolve_request(config, "a cat", time_length=0, width=512, height=512)
    few = [
        plan_for(with_settings(config, runtime={"dit_quantization": scheme}), 24, request=picture).stages[2].activations
        for scheme in (None, "int8", "fp8", "nf4")
    ]
    assert few[0] < few[3] < few[1] < few[2]  # where tokens are few, it is


@pytest.mark.parametrize("offload", ["on", "off"])
def test_what_lies_on_the_host_of_a_gpu(offload: str) -> None:
    """Mapped files are none of it; a DiT that is quantised on the way is, where it is copied from there."""
    config = with_settings(config_of("5s_sft"), runtime={"offload": offload})

    def host(**runtime: Any) -> int:
        other = with_settings(config, runtime=runtime)
        models = planned_weights.models(other, {}, 2)
        stages = estimate(other, default_request(config), Machine(64 * GB, 48 * GB), models)
        return next(stage.host for stage in stages if stage.name == "denoise") - HOST_OF_GPU_RUN

    int8 = planned_weights.models(with_settings(config, runtime={"dit_quantization": "int8"}), {}, 2)
    assert host() == 0
    assert host(dit_quantization="int8") == (int8.dit.size - int8.dit.mapped if offload == "on" else 0)
    streamed = 20 * int8.dit_block
    kept = (int8.dit.size - int8.dit.mapped) * 12 / 32 if offload == "on" else 0
    assert host(dit_quantization="int8", blocks_on_gpu=12) == pytest.approx(streamed + kept, abs=1)


@settings(max_examples=50, deadline=None)
@given(
    steps=st.integers(1, 50),
    weight=st.sampled_from((1.0, 5.0)),
    interval=st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda pair: pair[0] < pair[1]),
    every=st.integers(1, 5),
)
def test_evaluations_are_those_of_the_sampler(
    steps: int, weight: float, interval: tuple[float, float], every: int
) -> None:
    from kandinsky.sampling.sampler import guided_steps

    request = dataclasses.replace(
        default_request(config_of("5s_sft")), num_steps=steps, guidance_weight=weight, guidance_interval=interval,
        guidance_every=every,
    )  # fmt: skip
    unconditional = sum(step == "new" for step in guided_steps(steps, weight, interval, every))
    assert num_evaluations(request) == steps + unconditional


# --- choices ----------------------------------------------------------------------------------------------------------


def choices(config: Config, request: Request, models: Models, machine: Machine) -> list[Choice]:
    """All there are, the one to take first before the others."""
    rates = rates_of(config, request, machine, models)
    found = []
    for family, counts in families(config, models, machine):
        found += [dataclasses.replace(family, blocks_on_gpu=count) for count in counts] if counts else [family]
    return sorted(found, key=lambda choice: cost(choice, rates))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(PUBLISHED),
    gpu_gb=st.one_of(st.none(), st.floats(2, 100)),
    host_gb=st.floats(4, 128),
    runtime=st.fixed_dictionaries(
        {
            "offload": st.sampled_from(("auto", "on", "off")),
            "blocks_on_gpu": st.sampled_from((None, 1, 8)),
            "chunk_tokens": st.sampled_from((None, 4096)),
            "dit_quantization": st.sampled_from((None, "int8")),
            "qwen_quantization": st.booleans(),
            "stream_encoders": st.sampled_from(("auto", "off")),
            "heads_at_once": st.sampled_from((None, None, 3)),
        }
    ),
    draw=st.randoms(use_true_random=False),
)
def test_choices(name: str, gpu_gb: float | None, host_gb: float, runtime: dict[str, Any], draw: Random) -> None:
    """Whatever the machine: what is set stays, nothing that changes results is chosen, and what is said to fit does."""
    config = with_settings(config_of(name), runtime=runtime)
    machine = Machine(host_gb * GB, None if gpu_gb is None else gpu_gb * GB)
    models = planned_weights.models(config, {}, 2)
    plan = planning._first_that_fits(config, default_request(config), machine, models)
    chosen = plan.config.runtime
    assert chosen.offload == config.runtime.offload if config.runtime.offload != "auto" else chosen.offload != "auto"
    for setting in ("blocks_on_gpu", "chunk_tokens", "heads_at_once"):
        assert getattr(config.runtime, setting) in (None, getattr(chosen, setting))
    assert config.runtime.stream_encoders in ("auto", chosen.stream_encoders)
    free = {
        "offload": "auto", "stream_encoders": "auto", "blocks_from": "auto", "attention_on_host": False,
        "blocks_on_gpu": None, "chunk_tokens": None, "heads_at_once": None,
    }  # fmt: skip
    assert with_settings(plan.config, runtime=free) == with_settings(config, runtime=free)
    if plan.refusal is None:
        assert all(planning.excess(stage, machine) <= 1 for stage in plan.stages)
    if gpu_gb is None:
        assert chosen.blocks_on_gpu == config.runtime.blocks_on_gpu  # on a CPU there is nowhere to stream from
    # The first choice that fits is the one; there are thousands.
    found = choices(config, default_request(config), models, machine)
    earlier = found if plan.refusal else found[: [c.applied_to(config).runtime for c in found].index(chosen)]
    for choice in [*earlier[:1], *earlier[-20:], *draw.sample(earlier, min(40, len(earlier)))]:
        stages = estimate(choice.applied_to(config), default_request(config), machine, models)
        assert any(planning.excess(stage, machine) > 1 for stage in stages), choice
    assert report(plan)


def test_more_memory_never_takes_more_streaming() -> None:
    config = config_of("5s_t2v_pro", None, "runtime.qwen_quantization=true")
    plans = [plan_for(config, gb) for gb in (8, 10, 12, 16, 20, 24, 32, 40, 60, 80)]
    blocks = [p.config.runtime.blocks_on_gpu or 60 for p in plans]
    assert all(plan.refusal is None for plan in plans)
    chunked = [p.config.runtime.chunk_tokens is not None for p in plans]
    assert chunked == sorted(chunked, reverse=True) and chunked[0] and not chunked[3]
    whole = [b for b, c in zip(blocks, chunked, strict=True) if not c]
    assert whole == sorted(whole) and 0 < whole[0] < 60 and whole[-1] == 60
    offload = [p.config.runtime.offload for p in plans]
    assert offload == sorted(offload, reverse=True) and offload[-1] == "off"  # on, on, ... off


def test_a_budget_for_the_vae_is_named_and_not_taken() -> None:
    """It changes pixels. With it the plan fits, and asks for nothing more."""
    config = config_of("5s_sft", None, "runtime.qwen_quantization=true")
    plan = plan_for(config, 8)
    (override,) = plan.overrides
    assert plan.refusal is None and override.startswith("model.vae.memory_budget_gb=")
    assert plan.config.model == config.model
    assert f"changes some pixels: {override}" in report(plan)
    again = plan_for(config_of("5s_sft", None, "runtime.qwen_quantization=true", override), 8)
    assert again.refusal is None and not again.overrides and again.stages == plan.stages


def test_a_budget_that_no_tile_fits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"memory_budget_gb is 0\.5, but to decode 121 frames.*\(256 pixels\)"):
        plan_for(config_of("5s_sft", None, "model.vae.memory_budget_gb=0.5"), 24)


@pytest.mark.parametrize(
    ("name", "settings", "gpu_gb", "host_gb", "expected"),
    [
        (
            "5s_sft",
            ("runtime.stream_encoders=off",),
            12,
            32,
            r"encode text takes 14\.\d GB on the GPU.*there are 12\.0 and 32\.0\. What fits: --qwen_quantization$",
        ),
        ("10s_t2v_pro_hd", (), 6, 32, r"denoise takes.*fits: --dit_quantization int8, or --video_duration \d$"),
        (
            "5s_t2v_pro_hd",
            ("runtime.blocks_from=memory",),
            16,
            16,
            r"denoise takes .* on the host, and there are 16\.0 and 16\.0\. What fits: ",
        ),
        ("5s_sft", (), None, 6, r"denoise takes 8\.\d GB of host memory.*What fits: --dtype bfloat16"),
        ("5s_sft", (), 1, 64, r"Nothing that this model makes fits$"),
    ],
)
def test_refusals(name: str, settings: tuple[str, ...], gpu_gb: float | None, host_gb: float, expected: str) -> None:
    config = config_of(name, None, *settings)
    plan = plan_for(config, gpu_gb, host_gb)
    assert plan.refusal is not None and re.search(expected, plan.refusal), plan.refusal
    if "What fits" in plan.refusal:
        check_advice(config, plan)


def test_quantising_is_not_advised_for_a_quantised_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can't be done; of other files it is the first that is."""
    from safetensors.torch import save_file

    from kandinsky.checkpoints.dit_layout import is_quantizable, quantized_parts

    config, torch = config_of("tiny_t2v"), pytest.importorskip("torch")
    dtypes = {"BF16": torch.bfloat16, "I8": torch.int8, "F32": torch.float32}
    shapes = planned_weights.dit_header(config.model.dit_params, None)
    header = dict(shapes)
    for name, (_, shape) in shapes.items():
        layer, _, part = name.rpartition(".")
        if part == "weight" and is_quantizable(layer):
            del header[name]
            header |= {f"{layer}.{part}": entry for part, entry in quantized_parts("int8", *shape).items()}
    file = tmp_path / "int8.safetensors"
    save_file({name: torch.zeros(shape, dtype=dtypes[dtype]) for name, (dtype, shape) in header.items()}, file)
    assert "int8" in schemes_tried(config, {}, monkeypatch)
    assert schemes_tried(config, {"dit": file}, monkeypatch) == {None}


def schemes_tried(config: Config, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> set[str | None]:
    """The quantisations that advice was sought in, on a machine where nothing fits."""
    seen: set[str | None] = set()
    original = planning._first_that_fits

    def watched(config: Config, *rest: Any) -> Plan:
        seen.add(config.runtime.dit_quantization)
        return original(config, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(planning, "_first_that_fits", watched)
        planning.nearest(config, default_request(config), Machine(2 * GB, 0.1 * GB), files, "bfloat16")
    return seen


def test_prompts_are_written_out_where_that_is_wanted_and_can_be_done(tmp_path: Path) -> None:
    """Their stage is there for the published Qwen, and not where it is switched off or Qwen has no head."""

    def stages(config: Config, **wishes: Any) -> list[str]:
        files = planning.weight_files(config) if "tiny" in str(config.source) else {}
        request = resolve_request(config, "a cat", **wishes)
        return [s.name for s in make_plan(config, request, Machine(64 * GB, 48 * GB), files, "bfloat16").stages]

    assert "expand prompt" in stages(config_of("5s_sft"))
    assert "expand prompt" not in stages(config_of("5s_sft", None, "generation.expand_prompts=false"))
    assert "expand prompt" not in stages(config_of("5s_sft"), expand_prompts=False)
    assert "expand prompt" not in stages(config_of("tiny_t2v"))
    resident = config_of("5s_i2v", None, "runtime.stream_encoders=off")
    plan = plan_for(resident, 16)
    assert plan.refusal is not None and "--expand_prompt off" in plan.refusal
    check_advice(resident, plan)


def test_prompts_are_not_written_out_while_qwen_streams_unless_that_is_asked_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = config_of("5s_i2v")
    plan = plan_for(config, 16)
    assert plan.config.runtime.stream_encoders == "on" and "expand prompt" not in [s.name for s in plan.stages]
    line = "prompts are not written out: Qwen would be read again for every word of up to 256, about 1207 s a prompt"
    assert line in report(plan)
    with caplog.at_level(logging.INFO, "kandinsky.planning.plan"):
        resolve_runtime(config, None, plan.machine, {}, "bfloat16")
    assert sum(line in message for message in caplog.messages) == 1
    asked = dataclasses.replace(default_request(config), expand_prompts=True)
    plan = plan_for(config, 16, request=asked)
    assert plan.refusal is None and plan.stages[0].name == "expand prompt" and line not in report(plan)
    # And where the head has room for it, they are written out.
    plan = plan_for(config, 24)
    assert plan.config.runtime.stream_encoders == "off" and plan.stages[0].name == "expand prompt"


def test_convolutions_in_float32_are_counted() -> None:
    """Where a CPU has no arithmetic in bfloat16: more than with it, less than all in float32, and tiles that fit."""

    def activations(dtype: str, stage: str, task: str = "5s_i2v", **machine: Any) -> int:
        config = config_of(task, None, "runtime.offload=off")
        made = make_plan(config, default_request(config), Machine(256 * GB, **machine), {}, dtype)
        return next(one.activations for one in made.stages if one.name == stage)

    without = {"float32_convolutions": ("bfloat16", "float16")}
    for stage in ("encode image", "decode"):
        with_it, between, wide = (
            activations("bfloat16", stage), activations("bfloat16", stage, **without), activations("float32", stage),
        )  # fmt: skip
        assert with_it < between < wide
    assert activations("float32", "decode", **without) == wide
    assert activations("bfloat16", "denoise", **without) == activations("bfloat16", "denoise")
    # A budget is one for what is really taken.
    config = config_of("5s_sft", None, "runtime.offload=on")
    large = resolve_request(config, "a cat", width=1280, height=768)
    small = make_plan(config, large, Machine(15.5 * GB, **without), {}, "bfloat16")
    assert small.refusal is None and small.overrides
    assert max(stage.host for stage in small.stages) <= 15.5 * GB


def test_several_processes_share_what_there_is() -> None:
    """Tokens, with them what a forward takes; weights in shards; and the host's memory, which each takes from."""

    def stages(processes: int, *settings: str, name: str = "5s_t2v_pro") -> tuple[Plan, dict[str, Stage]]:
        config = config_of(name, None, *settings)
        machine = Machine(512 * GB, 80 * GB, processes=processes, on_host=processes)
        plan = make_plan(config, default_request(config), machine, {}, "bfloat16")
        assert plan.refusal is None and plan.config.runtime.heads_at_once is None
        return plan, {stage.name: stage for stage in plan.stages}

    fixed = ("runtime.offload=on", "runtime.chunk_tokens=8192")
    of = {count: stages(count, *fixed)[1] for count in (1, 2, 4)}
    assert of[4]["denoise"].activations < of[2]["denoise"].activations < of[1]["denoise"].activations
    assert of[2]["denoise"].weights == of[1]["denoise"].weights
    assert of[2]["encode text"].gpu == of[1]["encode text"].gpu
    assert of[2]["denoise"].host > of[1]["denoise"].host
    halves = ("runtime.cfg_parallel=2",)  # each has all tokens of its branch
    assert stages(2, *fixed, *halves)[1]["denoise"].activations == of[1]["denoise"].activations
    plan, sharded = stages(4, "runtime.shard_weights=true")
    models = planned_weights.models(plan.config, {}, 2)
    assert plan.config.runtime.offload == "off" and plan.config.runtime.blocks_on_gpu is None
    with_text = models.text.size + models.vae.size
    assert sharded["denoise"].weights == with_text + models.dit.size // 4
    whole = (
        stages(4, "runtime.offload=off", name="5s_sft")[1]["denoise"],
        stages(4, "runtime.offload=off", "runtime.shard_weights=true", name="5s_sft")[1]["denoise"],
    )  # while it runs, each has two blocks in full, and what is in none
    of_lite = planned_weights.models(config_of("5s_sft"), {}, 2)
    assert whole[1].activations - whole[0].activations == of_lite.dit_rest + 2 * of_lite.dit_block
    # On smaller GPUs blocks stream as one process's do, but do not run in parts: their heads are divided already.
    config = config_of("10s_t2v_pro_hd")
    for count in (2, 4):
        small = Machine(256 * GB, 24e9, processes=count, on_host=count)
        plan = make_plan(config, default_request(config), small, {}, "bfloat16")
        assert plan.refusal is None, plan.refusal
        assert plan.config.runtime.heads_at_once is None and plan.config.runtime.blocks_on_gpu is not None


@pytest.mark.parametrize("branches", [1, 2])
def test_shards_that_do_not_fit_are_refused_for_what_they_take(branches: int) -> None:
    """And not for settings that were tried, or would be advised, and that shards do not go with."""
    config = config_of("5s_t2v_pro_hd", None, "runtime.shard_weights=true", f"runtime.cfg_parallel={branches}")
    machine = Machine(64 * GB, 24 * GB, processes=2, on_host=2)
    plan = make_plan(config, default_request(config), machine, {}, "bfloat16")
    assert plan.refusal is not None and "denoise takes" in plan.refusal and "quantization" not in plan.refusal
    assert plan.config.runtime.offload == "off" and plan.config.runtime.shard_weights


def test_adapters_are_counted(tmp_path: Path) -> None:
    """Their matrices on the host; on the device, too, where layers are quantised."""
    config = config_of("5s_sft")
    path = write_lora(tmp_path / "lora.safetensors", config.model.dit_params, rank=16)
    config = config_of("5s_sft", None, f"model.loras=[{path}, {tmp_path / 'not_here'}]")
    size = path.stat().st_size

    def plans(*settings: str) -> tuple[dict[str, Stage], dict[str, Stage], Plan]:
        made = []
        for loras in (config.model.loras, ()):
            changed = dataclasses.replace(config, model=dataclasses.replace(config.model, loras=loras))
            changed = with_settings(changed, runtime={"offload": "on", **dict(s.split("=") for s in settings)})
            made.append(make_plan(changed, default_request(changed), Machine(64 * GB, 24 * GB),
                                  weight_files(changed, tmp_path), "bfloat16"))  # fmt: skip
        return (*({stage.name: stage for stage in plan.stages} for plan in made), made[0])

    merged, without, plan = plans()
    assert merged["denoise"].gpu == without["denoise"].gpu
    assert merged["denoise"].host - without["denoise"].host == pytest.approx(size, rel=0.01)
    assert any(str(tmp_path / "not_here") in line for line in plan.costs) and "not counted" in report(plan)
    added, plain, _ = plans("dit_quantization=int8")
    layers = {name for name in linear_layers(config.model.dit_params) if is_quantizable(name)}
    numbers = sum(16 * sum(linear_layers(config.model.dit_params)[name]) for name in layers)
    assert added["denoise"].weights - plain["denoise"].weights == 4 * numbers
    damaged = tmp_path / "other.safetensors"
    write_lora(damaged, dataclasses.replace(config.model.dit_params, model_dim=128), ["out_layer.out_layer"])
    with pytest.raises(ValueError, match="out_layer"):
        planned_weights.models(config, {"lora 0": damaged}, 2)


def test_plan_for_decoding_alone() -> None:
    """The VAE and nothing else, in tiles that fit."""
    config = config_of("5s_sft")
    request, files = default_request(config), {"vae": Path("none")}
    made = planning.plan_decoding(config, request, Machine(64 * GB, 24 * GB), files, "bfloat16")
    assert [stage.name for stage in made.stages] == ["decode", "write"] and made.refusal is None
    assert {stage.weights for stage in made.stages} == {planned_weights.models(config, {}, 2).vae.size}
    whole = plan_for(config, 24).stages[-2]
    assert made.stages[0].activations == whole.activations
    small = planning.plan_decoding(config, request, Machine(64 * GB, 6 * GB), files, "bfloat16")
    assert small.refusal is None and re.fullmatch(r"model\.vae\.memory_budget_gb=\d[\d.]*", small.overrides[0])
    assert max(stage.gpu for stage in small.stages) <= 6 * GB
    tiny = planning.plan_decoding(config, request, Machine(64 * GB, 1 * GB), files, "bfloat16")
    assert tiny.refusal is not None and "on another machine" in tiny.refusal


def test_unknown_dtype() -> None:
    config = config_of("t2i")
    with pytest.raises(ValueError, match="dtype is 'int4'; choose one of float32"):
        make_plan(config, default_request(config), Machine(GB), {}, "int4")


# --- auto -------------------------------------------------------------------------------------------------------------


def test_auto_is_resolved_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    config = config_of("5s_t2v_pro")
    with caplog.at_level(logging.INFO, "kandinsky.planning.plan"):
        resolved = resolve_runtime(config, None, Machine(64 * GB, 16 * GB), {}, "bfloat16")
    assert resolved.runtime.offload == "on" and 0 < (resolved.runtime.blocks_on_gpu or 0) < 60
    assert re.search(r"offload on, blocks_on_gpu \d+: without offload decode takes", caplog.text)
    assert resolved == with_settings(config, runtime=dataclasses.asdict(resolved.runtime))


def test_auto_on_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    """Offload only where memory does not hold all at once, and nothing to tell where it does."""
    config = config_of("5s_sft")
    with caplog.at_level(logging.INFO, "kandinsky.planning.plan"):
        assert resolve_runtime(config, None, Machine(128 * GB), {}, "float32").runtime.offload == "off"
        assert not caplog.records
        assert resolve_runtime(config, None, Machine(32 * GB), {}, "float32").runtime.offload == "on"
        assert "offload on: without offload decode takes" in caplog.text


def test_auto_refuses_what_cannot_fit_unless_told_to_try(caplog: pytest.LogCaptureFixture) -> None:
    config, machine = config_of("5s_t2v_pro_hd"), Machine(64 * GB, 5 * GB)
    with pytest.raises(ValueError, match=r"What fits: .*To try it all the same: runtime\.offload=on"):
        resolve_runtime(config, None, machine, {}, "bfloat16")
    resolved = resolve_runtime(with_settings(config, runtime={"offload": "on"}), None, machine, {}, "bfloat16")
    assert resolved.runtime.offload == "on" and resolved.runtime.blocks_on_gpu == 0
    assert "denoise takes" in caplog.text


def test_auto_is_for_the_request_that_is_made(caplog: pytest.LogCaptureFixture) -> None:
    config = config_of("5s_t2v_pro_hd")
    short = resolve_request(config, "a cat", time_length=1)
    assert resolve_runtime(config, short, Machine(64 * GB, 5 * GB), {}, "bfloat16").runtime.blocks_on_gpu is not None
    with pytest.raises(ValueError, match="What fits"):
        resolve_runtime(config, None, Machine(64 * GB, 5 * GB), {}, "bfloat16")


def test_auto_warns_of_tiles_that_may_be_too_large(caplog: pytest.LogCaptureFixture) -> None:
    config = config_of("5s_sft", None, "runtime.qwen_quantization=true")
    resolved = resolve_runtime(config, None, Machine(64 * GB, 8 * GB), {}, "bfloat16")
    assert resolved.model.vae.memory_budget_gb is None
    assert (
        "decoding may run out of memory and start again with smaller tiles: model.vae.memory_budget_gb=" in caplog.text
    )


# --- words ------------------------------------------------------------------------------------------------------------


def test_report() -> None:
    text = report(plan_for(config_of("5s_t2v_pro", "16gb"), 16))
    lines = text.splitlines()
    assert lines[0].startswith(
        "config_5s_t2v_pro.yaml: 121 frames of 768x512, 47,616 tokens, 50 steps; 16.0 GB on the GPU"
    )
    assert [line[:14].strip() for line in lines[2:8]] == [
        *("stage", "expand prompt", "encode text", "denoise", "decode", "write"),
    ]
    assert len({len(line) for line in lines[2:8]}) == 1
    assert re.search(r"^settings: runtime\.offload=on runtime\.blocks_on_gpu=\d+$", text, re.MULTILINE)
    assert re.search(r"streaming \d+ of 60 blocks: .* at 22 GB/s \(PCIe 4\), .*no time lost", text)


def test_time_that_streaming_costs_on_a_fast_gpu() -> None:
    """A picture's blocks are computed faster than they can be copied there."""
    config = config_of("t2i", "8gb")
    machine = Machine(64 * GB, 8 * GB, flops=790e12)
    text = report(make_plan(config, default_request(config), machine, {}, "bfloat16"))
    seconds = re.search(r"streaming (\d+) of 50 blocks: .*, ([\d.]+) s at .* behind ([\d.]+) s .*: (\d+) s more", text)
    assert seconds is not None, text
    blocks, copying, computing, more = map(float, seconds.groups())
    assert copying == pytest.approx(blocks * 236e6 / 22e9, rel=0.05)
    assert computing == pytest.approx(48.1e12 / 790e12, abs=0.01)
    assert more == pytest.approx(100 * (copying - computing), abs=2)
