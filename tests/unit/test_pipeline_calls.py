"""What a pipeline call takes and returns, the same in all four tasks, on small random models (`small_pipelines`)."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_pipelines import PICTURE, POOLED_DIM, TASKS, TEXT_DIM, WordsEmbedder, build, call, count_name, latents_of
from torch import Tensor

from kandinsky.config.schema import Config
from kandinsky.loading.assemble import PIPELINES
from kandinsky.outputs.latents_file import load_latents
from kandinsky.pipelines.base import Pipeline
from kandinsky.pipelines.stopwatch import Stopwatch
from kandinsky.text.embeddings import TextEmbeddings


@pytest.fixture(scope="module")
def pipes() -> dict[str, Pipeline]:
    return {task: build(task) for task in TASKS}


@pytest.fixture(params=TASKS)
def pipe(request: pytest.FixtureRequest, pipes: dict[str, Pipeline]) -> Any:
    chosen = pipes[request.param]
    chosen.text_embedder.calls.clear()  # type: ignore[attr-defined]
    return chosen


# --- what comes back --------------------------------------------------------------------------------------------------


def test_output_types_are_one_result(pipe: Any) -> None:
    """The same pixels in every form; the default is the tensor for videos and PIL for pictures."""
    is_video = pipe.config.task.endswith("v")
    forms = {name: call(pipe, output_type=name) for name in ("uint8", "pil", "np", "pt", "latent")}
    video = forms["uint8"] if is_video else forms["uint8"][:, :, None]
    size = (48, 32) if pipe.config.task == "i2i" else (32, 32)  # of the two sizes the one of the picture's shape
    frames = 5 if is_video else 1
    assert tuple(video.shape) == (1, 3, frames, size[1], size[0]) and video.dtype == torch.uint8
    expected = video[0].permute(1, 2, 3, 0).numpy()  # (T, H, W, 3)

    pil = forms["pil"][0] if is_video else forms["pil"]
    assert np.array_equal(np.stack([np.asarray(frame) for frame in pil]), expected)
    as_np = forms["np"][0] if is_video else forms["np"]
    assert as_np.dtype == np.float32 and np.array_equal((as_np * 255).round().astype(np.uint8), expected)
    as_pt = forms["pt"][0] if is_video else forms["pt"]
    assert as_pt.shape == (frames, 3, size[1], size[0]) and as_pt.min() >= 0 and as_pt.max() <= 1
    assert np.array_equal((as_pt * 255).round().permute(0, 2, 3, 1).numpy().astype(np.uint8), expected)
    assert forms["latent"].shape == (1, (frames + 3) // 4, size[1] // 8, size[0] // 8, 16)
    assert forms["latent"].dtype == torch.float32

    default = call(pipe)
    if is_video:
        assert torch.equal(default, video)
    else:
        assert np.array_equal(np.asarray(default[0]), expected[0])


def test_files_of_several_outputs(pipe: Any, tmp_path: Path) -> None:
    suffix = ".mp4" if pipe.config.task.endswith("v") else ".png"
    call(pipe, ["a cat", "a dog"], seed=[5, 3], save_path=tmp_path / f"a{suffix}")
    names = [f"a{suffix}", f"a_2{suffix}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "a.json", "a_2.json"])
    facts = [json.loads((tmp_path / name).with_suffix(".json").read_text()) for name in names]
    assert [(one["prompt"], one["seed"], one["task"]) for one in facts] == [
        ("a cat", 5, pipe.config.task),
        ("a dog", 3, pipe.config.task),
    ]
    assert facts[0]["image"] == (None if pipe.config.task in ("t2v", "t2i") else "given without a file name")


# --- samples ----------------------------------------------------------------------------------------------------------


def test_batch_of_one_is_a_single_call_to_the_bit(pipe: Any) -> None:
    single = latents_of(pipe)
    assert torch.equal(latents_of(pipe, ["a red cat"], seed=[1]), single)
    assert not torch.equal(latents_of(pipe, seed=2), single)
    assert not torch.equal(latents_of(pipe, "a blue cat"), single)


@pytest.mark.processor
def test_prompts_of_different_lengths_get_what_each_gets_alone(pipe: Any) -> None:
    prompts = ["a red cat", "one very long story of a dog that runs through the snow", "rain"]
    together = latents_of(pipe, prompts, seed=[4, 5, 6], negative_caption=["", "ugly and bad", "x"])
    for i, (prompt, negative) in enumerate(zip(prompts, ["", "ugly and bad", "x"], strict=True)):
        alone = latents_of(pipe, prompt, seed=4 + i, negative_caption=negative)
        assert torch.equal(together[i], alone[0])


@pytest.mark.processor
def test_several_outputs_with_generators_are_several_calls_to_the_bit(pipe: Any) -> None:
    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    options = {"seed": None, count_name(pipe): 3, "generator": [generator(seed) for seed in (7, 8, 9)]}
    together = latents_of(pipe, **options)
    alone = [latents_of(pipe, seed=None, generator=generator(seed)) for seed in (7, 8, 9)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together, latents_of(pipe, seed=7, **{count_name(pipe): 3}))  # seeds count up
    # One generator is drawn from sample after sample: the first is as alone, the others go on from there.
    shared = latents_of(pipe, seed=None, generator=generator(7), **{count_name(pipe): 2})
    assert torch.equal(shared[0], together[0]) and not torch.equal(shared[1], together[1])


def test_latents_take_the_place_of_the_noise(pipe: Any) -> None:
    shape = latents_of(pipe).shape
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    first, again = (latents_of(pipe, latents=noise, seed=5) for _ in range(2))
    assert torch.equal(first, again)
    if pipe.config.task in ("t2v", "t2i"):  # nothing else is drawn: this is what the seed draws
        assert torch.equal(latents_of(pipe, seed=1), first)
        assert torch.equal(latents_of(pipe, latents=noise, seed=6), first)


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.processor
def test_embeddings_are_kept_and_reused(pipe: Any, tmp_path: Path) -> None:
    picture = {"image": PICTURE} if pipe.config.task == "i2i" else {}
    pipe.encode_prompt("a red cat", **picture).save(tmp_path / "a.safetensors")
    pipe.encode_prompt("bad", **picture).save(tmp_path / "b.safetensors")
    cond, uncond = (TextEmbeddings.load(tmp_path / f"{name}.safetensors") for name in "ab")
    expected = latents_of(pipe, negative_caption="bad")
    pipe.text_embedder.calls.clear()
    result = latents_of(pipe, None, prompt_embeds=cond, negative_prompt_embeds=uncond)
    assert torch.equal(result, expected)
    assert pipe.text_embedder.calls == []
    # Of the two, what is missing is encoded, and only that.
    result = latents_of(pipe, None, prompt_embeds=cond, negative_caption="bad")
    assert torch.equal(result, expected)
    assert [one["prompts"] for one in pipe.text_embedder.calls] == [["bad"]]


def asked_of(pipe: Any) -> list[str]:
    """The prompts that were encoded, each in a call of its own."""
    assert all(len(one["prompts"]) == 1 for one in pipe.text_embedder.calls)
    return [one["prompts"][0] for one in pipe.text_embedder.calls]


def test_every_prompt_is_encoded_once_and_alone(pipe: Any) -> None:
    latents_of(pipe, ["a cat", "a dog"], negative_caption="bad", **{count_name(pipe): 2})
    # An edited picture is part of its prompt, so there the two negative prompts are two.
    assert asked_of(pipe) == ["a cat", "a dog", *["bad"] * (2 if pipe.config.task == "i2i" else 1)]
    pipe.text_embedder.calls.clear()
    latents_of(pipe, ["a cat", "a dog"], negative_caption="bad", guidance_weight=1.0)
    assert asked_of(pipe) == ["a cat", "a dog"]


def test_encode_prompt_joins_what_was_encoded_alone(pipe: Any) -> None:
    prompts = ["a red cat", "rain", "one two three four five"]
    pictures = [PICTURE, PICTURE.rotate(180), PICTURE] if pipe.config.task == "i2i" else []
    together = pipe.encode_prompt(prompts, **({"image": pictures} if pictures else {}))
    assert asked_of(pipe) == prompts
    for i, row in enumerate(together.unbind()):
        alone = pipe.encode_prompt(prompts[i], **({"image": pictures[i]} if pictures else {}))
        assert torch.equal(row.text_embeds, alone.text_embeds) and torch.equal(row.pooled_embeds, alone.pooled_embeds)
    for wrong in ([], ()):
        with pytest.raises(ValueError, match="non-empty list"):
            pipe.encode_prompt(wrong, **({"image": PICTURE} if pictures else {}))
    if pictures:
        with pytest.raises(ValueError, match="2 pictures for 3 prompts: give one for all, or one for each"):
            pipe.encode_prompt(prompts, image=pictures[:2])


def test_each_task_has_its_template(pipe: Any) -> None:
    latents_of(pipe, max_sequence_length=3)
    content = {"t2v": "video", "i2v": "video", "t2i": "image", "i2i": "image_edit"}[pipe.config.task]
    assert len(pipe.text_embedder.calls) == 2
    for asked in pipe.text_embedder.calls:
        assert (asked["content"], asked["max_length"]) == (content, 3)
        if pipe.config.task != "i2i":
            assert asked["images"] is None
        else:  # Qwen sees the picture as it is edited, at half its size
            assert [image.size for image in asked["images"]] == [(24, 16)]


def test_max_sequence_length_shortens_the_prompt(pipe: Any) -> None:
    long, short = "a red cat on a sofa", "a red"
    assert torch.equal(latents_of(pipe, long, max_sequence_length=3), latents_of(pipe, short, max_sequence_length=3))
    assert not torch.equal(latents_of(pipe, long), latents_of(pipe, short))


def test_a_picture_from_a_video_model_has_the_image_template(pipes: dict[str, Pipeline]) -> None:
    pipe: Any = pipes["t2v"]
    pipe.text_embedder.calls.clear()
    (picture,) = call(pipe, time_length=0)
    assert picture.size == (32, 32) and pipe.text_embedder.calls[0]["content"] == "image"


# --- callbacks --------------------------------------------------------------------------------------------------------


def test_callback_sees_every_step_and_may_replace_tensors(pipe: Any) -> None:
    seen: list[tuple[int, float, Tensor]] = []

    def watch(pipeline: Pipeline, step: int, timestep: Tensor, tensors: dict[str, Any]) -> None:
        assert pipeline is pipe and set(tensors) == {"latents", "prompt_embeds", "negative_prompt_embeds"}
        seen.append((step, float(timestep), tensors["latents"].clone()))

    plain = latents_of(pipe, num_steps=3, seed=[1, 2], **{count_name(pipe): 2})
    watched = latents_of(pipe, num_steps=3, seed=[1, 2], callback_on_step_end=watch, **{count_name(pipe): 2})
    assert torch.equal(watched, plain)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert seen[0][1] == 1000.0 and seen[0][1] > seen[1][1] > seen[2][1] > 0
    assert all(len(latents) == 2 for _, _, latents in seen)
    if pipe.config.task == "i2v":
        assert all(torch.equal(latents[:, 0], seen[0][2][:, 0]) for _, _, latents in seen)

    def blank(pipeline: Pipeline, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    replaced = latents_of(pipe, num_steps=3, callback_on_step_end=blank)
    assert replaced[:, -1:].count_nonzero() == 0
    if pipe.config.task == "i2v":  # the picture stays
        assert torch.equal(replaced[:, :1], seen[0][2][:1, :1])

    def other_words(pipeline: Pipeline, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        # Another length on purpose: positions are the new text's.
        return {"prompt_embeds": [WordsEmbedder().encode(["one two three four five"])]}

    changed = latents_of(pipe, num_steps=3, callback_on_step_end=other_words)
    assert not torch.equal(changed, latents_of(pipe, num_steps=3))


def test_callback_may_not_return_what_is_unknown(pipe: Any) -> None:
    with pytest.raises(ValueError, match=r"returned latent; it may replace latents, prompt_embeds"):
        latents_of(pipe, callback_on_step_end=lambda *_: {"latent": None})


def test_interrupt_ends_the_run_with_what_there_is(pipe: Any) -> None:
    states: list[Tensor] = []

    def stop(pipeline: Pipeline, step: int, timestep: Tensor, tensors: dict[str, Any]) -> None:
        states.append(tensors["latents"])
        pipeline.interrupt = step == 1

    assert torch.equal(latents_of(pipe, num_steps=9, callback_on_step_end=stop), states[-1])
    assert len(states) == 2
    latents_of(pipe, num_steps=3)
    assert not pipe.interrupt  # the next call is not


# --- pictures in ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["i2v", "i2i"])
def test_forms_of_a_picture(pipes: dict[str, Pipeline], task: str, tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    expected = latents_of(pipes[task], image=PICTURE)
    for form in (tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(PICTURE), [PICTURE], PICTURE.convert("RGBA")):
        assert torch.equal(latents_of(pipes[task], image=form), expected)
    assert not torch.equal(latents_of(pipes[task], image=PICTURE.rotate(180)), expected)


@pytest.mark.parametrize("task", ["i2v", "i2i"])
def test_a_picture_for_each_prompt(pipes: dict[str, Pipeline], task: str) -> None:
    pictures = [PICTURE, PICTURE.rotate(180)]
    together = latents_of(pipes[task], ["a cat", "a dog"], image=pictures, seed=[1, 2])
    for i, (picture, text) in enumerate(zip(pictures, ["a cat", "a dog"], strict=True)):
        assert torch.equal(together[i], latents_of(pipes[task], text, image=picture, seed=1 + i)[0])


@torch.no_grad()
def test_first_frame_is_the_picture(pipes: dict[str, Pipeline]) -> None:
    """Before the first frames are normalised: exactly the picture's latents, drawn after the noise."""
    pipe: Any = pipes["i2v"]
    latents = latents_of(pipe, seed=3, width=48, height=32, num_frames=17)
    generator = torch.Generator().manual_seed(3)
    torch.randn(latents.shape[1:], generator=generator)
    x = torch.from_numpy(np.array(PICTURE.resize((48, 32), Image.Resampling.BILINEAR))).float() / 127.5 - 1
    posterior = pipe.vae.encode(x.permute(2, 0, 1)[None, :, None])
    expected = posterior.sample(generator)[0, :, 0].permute(1, 2, 0) * pipe.vae.scaling_factor
    off = dataclasses.replace(pipe.config.generation, first_frame_normalization=False)
    plain = build("i2v")
    plain.config = dataclasses.replace(plain.config, generation=off)
    unchanged = latents_of(plain, seed=3, width=48, height=32, num_frames=17)
    assert torch.equal(unchanged[0, 0], expected)
    assert torch.equal(unchanged[:, 4:], latents[:, 4:]) and not torch.equal(unchanged[:, :4], latents[:, :4])


# --- what is refused, before anything is encoded ----------------------------------------------------------------------

Wrong = tuple[dict[str, Any], str]
EMBEDS = TextEmbeddings(torch.zeros(1, 3, TEXT_DIM), torch.zeros(1, POOLED_DIM), None)
WRONG: list[Wrong] = [
    ({"text": None}, "no prompt"),
    ({"prompt_embeds": EMBEDS}, "both a prompt and prompt_embeds"),
    ({"text": None, "prompt_embeds": torch.zeros(1, 3, TEXT_DIM)}, "prompt_embeds is a Tensor; give what"),
    (
        {"text": None, "prompt_embeds": TextEmbeddings(torch.zeros(1, 3, 10), torch.zeros(1, POOLED_DIM), None)},
        f"prompt_embeds are 10 and {POOLED_DIM} wide; this model takes {TEXT_DIM} and {POOLED_DIM}",
    ),
    (
        {"negative_prompt_embeds": TextEmbeddings(torch.zeros(3, 3, TEXT_DIM), torch.zeros(3, POOLED_DIM), None)},
        "of 3 prompts, not of 1 or 1",
    ),
    ({"generator": torch.Generator()}, "both seed and generator"),
    ({"seed": None, "generator": [torch.Generator()] * 2}, "2 generators for 1 outputs"),
    ({"seed": None, "generator": 5}, "must be a torch.Generator"),
    ({"latents": torch.zeros(1, 2, 3)}, r"latents are \(1, 2, 3\); they must be"),
    ({"output_type": "gif"}, "choose one of uint8, pil, np, pt, latent"),
    ({"output_type": "latent", "save_path": "a.mp4"}, "makes no picture"),
    ({"save_path": "a.gif"}, "ends in '.gif'"),
    ({"expand_prompts": True}, "can read and not write"),
    ({"num_steps": 0}, "from 1 to 1000"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_calls_are_refused_before_the_work(
    pipe: Any, given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    refuse: Callable[..., Any] = lambda *_, **__: pytest.fail("a model ran")  # noqa: E731
    monkeypatch.setattr(pipe.dit, "forward", refuse)
    monkeypatch.setattr(pipe.vae, "encode", refuse)
    with pytest.raises(ValueError, match=message) as error:
        call(pipe, **given)
    assert "\n" not in str(error.value)
    assert pipe.text_embedder.calls == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "needs a picture"),
        ("nothing.png", "there is no image nothing.png"),
        (Image.new("RGB", (1, 1)), "1x1"),
        (Image.new("RGB", (400, 40)), "400x40"),
        (np.zeros((4, 4), np.float32), "must be uint8"),
        (5, "it must be a path"),
    ],
)
@pytest.mark.parametrize("task", ["i2v", "i2i"])
def test_pictures_that_cannot_be_taken(pipes: dict[str, Pipeline], task: str, image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(pipes[task], image=image)


def test_config_of_the_fixture_is_small(pipe: Any) -> None:
    config: Config = pipe.config
    assert sum(parameter.numel() for parameter in pipe.dit.parameters()) < 200_000
    assert config.generation.width * config.generation.height <= 48 * 32


def test_a_decode_that_dies_keeps_the_latents_and_is_finished_later(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix = ".png" if pipe.config.task in ("t2i", "i2i") else ".mp4"
    options = {"seed": [3, 4], count_name(pipe): 2}
    call(pipe, save_path=tmp_path / f"whole{suffix}", **options)
    assert not list(tmp_path.glob("*.latents.safetensors"))

    def die(*args: Any) -> Tensor:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no memory"):
        patch.setattr(pipe, "decode", die)
        call(pipe, save_path=tmp_path / f"died{suffix}", **options)
    assert not (tmp_path / f"died{suffix}").exists()

    saved = load_latents(tmp_path / "died.latents.safetensors")
    pipe.finish(saved, tmp_path / f"died{suffix}")
    for number in ("", "_2"):
        whole, died = (tmp_path / f"{name}{number}{suffix}" for name in ("whole", "died"))
        assert whole.read_bytes() == died.read_bytes()
        records = [json.loads(path.with_suffix(".json").read_text()) for path in (whole, died)]
        for record in records:
            assert set(record.pop("seconds")) >= {"encode", "denoise", "decode", "write"}
        assert records[0] == records[1]


def test_all_calls_show_all_options_and_take_them_by_position() -> None:
    """In help() and for inspect; an unknown one is refused."""
    from kandinsky.pipelines.options import CallOptions

    own = {
        "t2v": ["text", "time_length", "width", "height"],
        "i2v": ["text", "image", "time_length", "width", "height"],
        "t2i": ["text", "width", "height"],
        "i2i": ["text", "image", "width", "height"],
    }
    for task, positional in own.items():
        call = PIPELINES[task].__call__
        names = list(inspect.signature(call).parameters)
        assert names[1 : len(positional) + 3] == [*positional, "seed", "num_steps"]
        assert set(CallOptions.__annotations__) < set(names) and "options" not in names
        assert call.__doc__ is not None and all(f"{name}:" in call.__doc__ for name in (*positional[1:-2], "latents"))
    pipe = build("t2i")
    by_name = pipe("a red cat", width=32, height=32, seed=3, num_steps=1, progress=False, output_type="latent")
    by_position = pipe("a red cat", 32, 32, 3, 1, progress=False, output_type="latent")
    assert torch.equal(by_name, by_position)
    with pytest.raises(TypeError, match="'widht'"):
        pipe("a red cat", widht=32)


def test_seconds_wait_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage's end is when its GPUs have done what was asked of them; CPUs have by then."""
    clock, waited = [0.0], []

    def synchronize(device: torch.device) -> None:
        waited.append(device)
        clock[0] += 5

    monkeypatch.setattr("torch.cuda.synchronize", synchronize)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    gpu = torch.device("cuda", 1)
    watch = Stopwatch(devices=[torch.device("cpu"), gpu])
    with watch.stage("denoise"):
        clock[0] += 1
    assert watch.seconds == {"denoise": 6} and waited == [gpu]
    with watch.stage("denoise"):
        assert watch.so_far() == {"denoise": 11}
