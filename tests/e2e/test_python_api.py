"""The Python call: what comes back, what is written, and that nothing stays behind from one call to the next."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

from kandinsky import get_T2V_pipeline
from kandinsky.pipelines.text_to_video import TextToVideoPipeline

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "config_tiny_t2v.yaml"
PROMPT = "a red circle moves left on a white background"


def load() -> TextToVideoPipeline:
    return get_T2V_pipeline("cpu", conf_path=CONFIG)


@pytest.fixture(scope="module")
def pipe(tiny: Path) -> TextToVideoPipeline:
    return load()


@contextmanager
def counted_forwards(module: torch.nn.Module) -> Iterator[list[int]]:
    """Batch size of every forward of `module` in the block."""
    sizes: list[int] = []
    handle = module.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    yield sizes
    handle.remove()


def test_video(pipe: TextToVideoPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    video = pipe(PROMPT, seed=1, num_steps=2, progress=False)
    assert isinstance(video, torch.Tensor)
    assert (video.dtype, tuple(video.shape), video.device.type) == (torch.uint8, (1, 3, 25, 128, 128), "cpu")
    assert video.float().std() > 1  # a picture, not one colour
    assert list(tmp_path.iterdir()) == []  # nothing is written without a save_path


def test_the_documented_stages_make_what_a_call_makes(
    pipe: TextToVideoPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (CONFIG.parents[1] / "docs" / "python.md").read_text(encoding="utf-8").split("## Stage by stage")[1]
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    made = {"pipe": pipe}
    exec(block, made)
    expected = pipe(PROMPT, time_length=0.2, seed=1, save_path="call.mp4", progress=False)
    assert torch.equal(made["pixels"], expected)
    assert Path("outputs/circle.mp4").read_bytes() == Path("call.mp4").read_bytes()
    records = [json.loads(Path(name).read_text()) for name in ("outputs/circle.json", "call.json")]
    assert records[0] | {"seconds": 0} == records[1] | {"seconds": 0}


def test_the_call_of_the_original_repository(pipe: TextToVideoPipeline) -> None:
    short = pipe(PROMPT, time_length=0.2, width=144, height=96, seed=3, num_steps=1, guidance_weight=1.0,
                 scheduler_scale=5.0, negative_caption="blurry", expand_prompts=False, progress=False)  # fmt: skip
    assert isinstance(short, torch.Tensor) and tuple(short.shape) == (1, 3, 5, 96, 144)


def test_picture(pipe: TextToVideoPipeline, tmp_path: Path) -> None:
    images = pipe(PROMPT, time_length=0, seed=1, num_steps=1, save_path=tmp_path / "a.png", progress=False)
    assert isinstance(images, list) and len(images) == 1
    assert isinstance(images[0], Image.Image) and images[0].size == (128, 128)
    with Image.open(tmp_path / "a.png") as written:
        assert np.array_equal(np.asarray(written), np.asarray(images[0]))


def test_save_path(pipe: TextToVideoPipeline, tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.mp4"
    video = pipe(PROMPT, time_length=0.2, seed=4, num_steps=1, save_path=path, progress=False)
    with imageio.get_reader(path, format="FFMPEG") as reader:
        frames = np.stack(list(reader.iter_data()))
    assert isinstance(video, torch.Tensor)
    luma = np.array([0.2126, 0.7152, 0.0722])  # 4:2:0 keeps it whole and halves the colour
    error = np.abs(frames @ luma - video[0].permute(1, 2, 3, 0).numpy() @ luma)
    assert frames.shape == (5, 128, 128, 3) and error.mean() < 6
    facts = json.loads(path.with_suffix(".json").read_text())
    assert (facts["prompt"], facts["seed"], facts["num_frames"]) == (PROMPT, 4, 5)


def test_wrong_save_path_is_found_before_the_work(pipe: TextToVideoPipeline, tmp_path: Path) -> None:
    with counted_forwards(pipe.dit) as forwards:
        with pytest.raises(ValueError, match=r"ends in '.gif'.*a\.mp4"):
            pipe(PROMPT, save_path=tmp_path / "a.gif")
        with pytest.raises(ValueError, match=r"an image is written as .png"):
            pipe(PROMPT, time_length=0, save_path=tmp_path / "a.mp4")
    assert forwards == []
    assert list(tmp_path.iterdir()) == []


def test_calls_leave_nothing_behind(pipe: TextToVideoPipeline) -> None:
    def first(pipeline: TextToVideoPipeline) -> torch.Tensor:
        video = pipeline(PROMPT, time_length=0.2, seed=1, num_steps=2, progress=False)
        assert isinstance(video, torch.Tensor)
        return video

    fresh = first(load())
    pipe("a blue cross grows on a navy background", time_length=0, width=96, height=160, seed=9, num_steps=3,
         guidance_weight=1.0, scheduler_scale=7.0, progress=False)  # fmt: skip
    assert torch.equal(first(pipe), fresh)
    assert torch.equal(first(pipe), fresh)


def test_device_map(tiny: Path, pipe: TextToVideoPipeline) -> None:
    options = {"time_length": 0, "seed": 1, "num_steps": 1, "progress": False}
    mapped = get_T2V_pipeline({"dit": "cpu", "vae": torch.device("cpu"), "text_embedder": "cpu"}, conf_path=CONFIG)
    assert np.array_equal(np.asarray(mapped(PROMPT, **options)[0]), np.asarray(pipe(PROMPT, **options)[0]))
    with pytest.raises(ValueError, match="it needs exactly dit, vae, text_embedder"):
        get_T2V_pipeline({"dit": "cpu"}, conf_path=CONFIG)


def test_paths_instead_of_the_configs(tiny: Path, tmp_path: Path) -> None:
    paths = {
        "dit_path": tiny / "model" / "tiny_t2v.safetensors",
        "vae_path": tiny / "vae",
        "text_encoder_path": tiny / "text_encoder",
        "text_encoder2_path": str(tiny / "text_encoder2"),
    }
    get_T2V_pipeline("cpu", conf_path=CONFIG, **paths)
    for name in paths:
        with pytest.raises(ValueError, match=f"weights not found: {tmp_path}/nothing"):
            get_T2V_pipeline("cpu", conf_path=CONFIG, **{**paths, name: tmp_path / "nothing"})


def test_command_line_and_call_make_the_same_picture(
    pipe: TextToVideoPipeline, cli: ModuleType, tmp_path: Path
) -> None:
    (picture,) = pipe(PROMPT, time_length=0, seed=6, num_steps=2, progress=False)
    words = ["--config", CONFIG, "--prompt", PROMPT, "--seed", 6, "--sample_steps", 2, "--video_duration", 0]
    words += ["--device", "cpu", "--output_filename", tmp_path / "a.png"]
    assert cli.main([str(word) for word in words]) == 0
    with Image.open(tmp_path / "a.png") as written:
        assert np.array_equal(np.asarray(written), np.asarray(picture))


@pytest.mark.parametrize(("guidance_weight", "evaluations"), [(3.0, 6), (1.0, 3), (0.0, 6)])
def test_without_guidance_half_of_the_evaluations(
    pipe: TextToVideoPipeline, guidance_weight: float, evaluations: int
) -> None:
    with counted_forwards(pipe.dit) as sizes:
        pipe(PROMPT, time_length=0, seed=1, num_steps=3, guidance_weight=guidance_weight, progress=False)
    assert sum(sizes) == evaluations


def test_wrong_requests_are_refused(pipe: TextToVideoPipeline) -> None:
    for options, message in (
        ({"expand_prompts": True}, "can read and not write"),
        ({"text": ["a", 5]}, "must be a string"),
        ({"text": ""}, "the prompt is empty"),
        ({"width": 100}, "multiple of 16"),
        ({"num_steps": 2.5}, "whole number"),
        ({"seed": True}, "whole number"),
        ({"negative_caption": 5}, "must be a string"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**{"text": PROMPT, **options})
