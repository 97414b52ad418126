"""The nodes of comfyui/ in a stand-in for ComfyUI (tests/comfyui_stand_in.py says why): its workflows make what test.py
makes, to the bit."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
import threading
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from kandinsky.config import load_config
from kandinsky.request import resolve_request
from tests.comfyui_stand_in import WIDGETS, ComfyUI, InterruptProcessingException
from tests.limits import PATIENCE
from tests.lora_files import write_lora

REPOSITORY = Path(__file__).resolve().parents[2]
WORKFLOWS = {path.stem: path for path in (REPOSITORY / "comfyui" / "workflows").glob("*.json")}
NODES = ("Load", "Lora", "Encode", "Sample", "Decode", "Save", "Source", "Frames", "Join")
LOAD, ENCODE, SAMPLE, DECODE, SAVE = "12345"  # ids of the workflows' nodes


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    host = ComfyUI(tmp_path_factory.mktemp("comfyui"))
    picture = Image.new("RGB", (128, 128), "white")
    picture.paste((200, 30, 30), (40, 40, 90, 90))
    picture.save(host.base / "input" / "example.png")
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        host.install(patch)
        host.nodes = host.load_custom_node(REPOSITORY)  # type: ignore[attr-defined]
        yield host
    for name in set(sys.modules) - before:
        if name.startswith(str(REPOSITORY).replace(".", "_x_")):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def nobody_interferes(host: ComfyUI) -> Iterator[None]:
    yield
    host.on_progress = ComfyUI.on_progress.__get__(host)  # type: ignore[method-assign]
    host.interrupted = False


def short_graph(host: ComfyUI, task: str, **sample: Any) -> dict[str, dict[str, Any]]:
    """A workflow's graph with two steps and, of a video, five frames."""
    graph = host.graph_of(json.loads(WORKFLOWS[task].read_text()))
    graph[SAMPLE]["inputs"] |= {"steps": 2, "seconds": 0.2 if task.endswith("v") else -1.0, **sample}
    return graph


def saved(host: ComfyUI, shown: dict[str, Any]) -> Path:
    (image,) = shown[SAVE]["images"]
    return host.base / "output" / image["subfolder"] / image["filename"]


def by_command_line(cli: ModuleType, host: ComfyUI, graph: dict[str, Any], folder: Path, *flags: str) -> Path:
    """What test.py makes of the same wishes."""
    config, sample = graph[LOAD]["inputs"]["config"], graph[SAMPLE]["inputs"]
    task = config[-3:]
    output = folder / ("output.mp4" if task.endswith("v") else "output.png")
    command = ["--config", str(REPOSITORY / f"configs/config_{config}.yaml"), "--device", "cpu"]
    command += ["--seed", str(sample["seed"]), "--sample_steps", str(sample["steps"])]
    command += ["--prompt", graph[ENCODE]["inputs"]["text"], "--output_filename", str(output)]
    command += ["--video_duration", "0.2"] if task.endswith("v") else []
    command += ["--image", str(host.base / "input" / "example.png")] if task.startswith("i2") else []
    assert cli.main([*command, *flags]) == 0
    return output


def facts(output: Path) -> dict[str, Any]:
    """What a record says, but for what differs; what decodes is no part of it where somebody else may."""
    record = json.loads(output.with_suffix(".json").read_text())
    return {name: value for name, value in record.items() if name not in ("seconds", "image", "decoder")}


# ------------------------------------------------------------------------------------------------------- what they make


def test_there_is_a_workflow_for_each_task() -> None:
    assert sorted(WORKFLOWS) == ["i2i", "i2v", "t2i", "t2v"]


@pytest.mark.parametrize("task", ["t2v", "i2v", "i2i", "t2i"])
def test_a_workflow_makes_what_the_command_line_makes(
    host: ComfyUI, cli: ModuleType, tmp_path: Path, task: str
) -> None:
    graph = short_graph(host, task)
    output = saved(host, host.run(graph))
    expected = by_command_line(cli, host, graph, tmp_path)
    assert output.read_bytes() == expected.read_bytes()
    assert facts(output) == facts(expected)
    assert json.loads(output.with_suffix(".json").read_text())["seconds"].keys() >= {"denoise", "write"}

    assert [(value, total) for value, total, _ in host.events] == [(1, 2), (2, 2)]
    form, picture, longest = host.events[-1][2]
    assert (form, longest) == ("JPEG", 512) and isinstance(picture, Image.Image)

    frames = host.output_of(DECODE, graph)[0]
    assert frames.dtype == torch.float32 and frames.shape == (5 if task.endswith("v") else 1, 128, 128, 3)
    assert frames.min() >= 0 and frames.max() <= 1

    # Latents of nodes that know nothing of ours: a rounding before the decoder, a level after it at most.
    model, latent = host.output_of(LOAD, graph)[0], host.output_of(SAMPLE, graph)[0]
    (foreign,) = host.classes["Kandinsky5Decode"]().decode(model, {"samples": latent["samples"]})
    assert foreign.shape == frames.shape and (foreign - frames).abs().max() <= 1.01 / 255
    if not task.endswith("v"):
        assert torch.equal((frames[0] * 255).round().to(torch.uint8), pixels_of(expected))


def pixels_of(path: Path) -> torch.Tensor:
    return torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8).view(128, 128, 3)


def test_a_preview_is_what_the_latents_are_without_noise(host: ComfyUI) -> None:
    progress_class = sys.modules[f"{host.nodes.__name__}.comfyui.hosting"].Progress
    config = load_config(REPOSITORY / "configs/config_tiny_t2v.yaml")
    progress = progress_class(resolve_request(config, "a", num_steps=4))
    clean, noise = torch.randn(2, 1, 3, 4, 4, 16, generator=torch.Generator().manual_seed(0)).unbind()
    sigmas = progress.sigmas.tolist()
    seen: list[torch.Tensor] = []

    def latent_rgb(latents: torch.Tensor) -> torch.Tensor:
        seen.append(latents)
        return torch.zeros(3, 1, 16, 16, dtype=torch.uint8)

    pipeline = types.SimpleNamespace(latent_rgb=latent_rgb)
    for step in range(4):
        latents = torch.lerp(clean, noise, sigmas[step + 1])
        progress(pipeline, step, torch.zeros(()), {"latents": latents})
    assert len(seen) == 3  # of the first step it isn't known what it began with
    assert all(torch.allclose(frame, clean[0, 1:2], atol=1e-5) for frame in seen)


def test_only_what_has_changed_runs_again(host: ComfyUI) -> None:
    graph = short_graph(host, "t2i")
    first = saved(host, host.run(graph))
    host.run(graph)
    assert host.executed == []
    graph[SAMPLE]["inputs"]["seed"] = 2
    second = saved(host, host.run(graph))
    assert host.executed == [SAMPLE, DECODE, SAVE]
    assert second.read_bytes() != first.read_bytes()


def test_magcache_lora_and_block_swap_are_the_command_lines(host: ComfyUI, cli: ModuleType, tmp_path: Path) -> None:
    dit = load_config(REPOSITORY / "configs/config_tiny_t2i.yaml").model.dit_params
    lora = write_lora(host.base / "models" / "loras" / "style.safetensors", dit, trigger="in strokes, ")
    graph = short_graph(host, "t2i", magcache=True, steps=6)
    graph[LOAD]["inputs"]["blocks_on_gpu"] = 2
    plain = saved(host, host.run(graph)).read_bytes()

    inputs = {"model": [LOAD, 0], "lora": "style.safetensors", "strength": 0.8}
    graph["7"] = {"class_type": "Kandinsky5Lora", "inputs": inputs}
    for key in (ENCODE, SAMPLE, DECODE):
        graph[key]["inputs"]["model"] = ["7", 0]
    output = saved(host, host.run(graph))
    assert LOAD not in host.executed
    flags = ("--magcache", "--lora", f"{lora}:0.8", "runtime.blocks_on_gpu=2")
    expected = by_command_line(cli, host, graph, tmp_path, *flags)
    assert output.read_bytes() == expected.read_bytes() != plain
    record = facts(output)
    assert record["evaluations"] == facts(expected)["evaluations"] and record["evaluations"]["skipped"] > 0
    assert record["config"]["runtime"]["blocks_on_gpu"] == 2
    assert [(one["scale"], one["trigger"]) for one in record["adapters"]] == [(0.8, "in strokes, ")]

    # Without the adapter's node, the same pipeline is again what it was.
    for key in (ENCODE, SAMPLE, DECODE):
        graph[key]["inputs"]["model"] = [LOAD, 0]
    graph[ENCODE]["inputs"]["expand_seed"] = 1  # or its output of before the adapter would be taken
    assert saved(host, host.run(graph)).read_bytes() == plain


def test_weights_are_found_in_comfyuis_folders(host: ComfyUI) -> None:
    models, tiny = host.base / "models", REPOSITORY / "assets" / "tiny" / "image"
    for folder, name in (("text_encoders", "text_encoder"), ("text_encoders", "text_encoder2"), ("vae", "vae")):
        (models / folder / name).symlink_to(tiny / name, target_is_directory=True)
    (file,) = (tiny / "model").glob("*t2i*.safetensors")
    dit = models / "diffusion_models" / "mine" / "model.safetensors"
    dit.parent.mkdir()
    shutil.copy(file, dit)

    graph = short_graph(host, "t2i")
    expected = saved(host, host.run(graph)).read_bytes()
    graph[LOAD]["inputs"] |= {
        "dit_path": "mine/model.safetensors",
        "text_encoder_path": "text_encoder/model.safetensors",
        "text_encoder2_path": "text_encoder2/model.safetensors",
        "vae_path": "vae/diffusion_pytorch_model.safetensors",
    }
    assert saved(host, host.run(graph)).read_bytes() == expected
    assert LOAD in host.executed

    graph[LOAD]["inputs"]["dit_path"] = "gone.safetensors"
    with pytest.raises(ValueError, match=r"dit_path is 'gone.safetensors', not in \['auto', 'mine/model.safetensors'"):
        host.run(graph)
    graph[LOAD]["inputs"]["dit_path"] = "mine/model.safetensors"
    os.utime(dit, (1, 1))  # another file, as far as anybody can tell
    host.run(graph)
    assert LOAD in host.executed

    # Left to itself: what the config names, wherever it lies among ComfyUI's files.
    find = sys.modules[f"{host.nodes.__name__}.comfyui.weights"].find
    config = load_config(REPOSITORY / "configs/config_5s_sft.yaml", ["model.vae.checkpoint_path=./weights/vae/"])
    assert find("dit_path", "auto", config) is None
    published = models / "diffusion_models" / "video" / Path(config.model.checkpoint_path).name
    published.parent.mkdir()
    published.touch()
    assert find("dit_path", "auto", config) == published
    assert find("vae_path", "auto", config) == models / "vae" / "vae"
    assert find("text_encoder_path", "auto", config) == models / "text_encoders" / "text_encoder"


# ------------------------------------------------------------------------------------------------ what is given besides


def node(graph: dict[str, Any], key: str, name: str, **inputs: Any) -> None:
    graph[key] = {"class_type": name if name == "LoadImage" else f"Kandinsky5{name}", "inputs": inputs}


def made_by_command_line(cli: ModuleType, output: Path, config: str, graph: dict[str, Any], *flags: object) -> bytes:
    """With the words, the seed and the steps of a graph."""
    words = ["--config", REPOSITORY / f"configs/config_{config}.yaml", "--device", "cpu", *flags]
    words += ["--prompt", graph[ENCODE]["inputs"]["text"], "--seed", graph[SAMPLE]["inputs"]["seed"]]
    words += ["--sample_steps", graph[SAMPLE]["inputs"]["steps"], "--output_filename", output]
    assert cli.main([str(word) for word in words]) == 0
    return output.read_bytes()


def test_from_a_video_in_part_and_after_it(host: ComfyUI, cli: ModuleType, tmp_path: Path) -> None:
    """The command line's bytes, of the frames that another sampling node has made; more frames, and larger ones."""
    graph = short_graph(host, "t2v")
    first = host.output_of(DECODE, graph)[0]
    for i, frame in enumerate((first * 255).round().byte().numpy()):
        (tmp_path / "clip").mkdir(exist_ok=True)
        Image.fromarray(frame).save(tmp_path / "clip" / f"{i}.png")
    mask = torch.zeros(1, 128, 128)
    mask[:, :, 64:] = 1
    Image.fromarray((mask[0] * 255).byte().numpy()).save(tmp_path / "mask.png")
    source = host.classes["Kandinsky5Source"]()
    (given,) = source.give(first, "start from", 0.5, 0, mask)
    with pytest.raises(ValueError, match="already: leave one"):
        source.give(first, "go on from", 0.5, 0, given=given)
    with pytest.raises(ValueError, match="a mask is of frames that sampling starts from"):
        source.give(first, "go on from", 0.5, 0, mask)

    model, prompt = host.output_of(LOAD, graph)[0], host.output_of(ENCODE, graph)[0]
    sampler, sizes = host.classes["Kandinsky5Sample"](), {"width": 0, "height": 0, "seconds": -1.0}
    latent, record = sampler.sample(model, prompt, 1, steps=2, guidance=-1.0, magcache=False, given=given, **sizes)
    (frames,) = host.classes["Kandinsky5Decode"]().decode(model, latent)
    shown = host.classes["Kandinsky5Save"]().save(frames, record, "part", fps=48, upscale=2)["ui"]["images"][0]
    flags = ("--video", tmp_path / "clip", "--strength", 0.5, "--mask", tmp_path / "mask.png", "--fps", 48)
    graph[SAMPLE]["inputs"]["seed"] = 1
    expected = made_by_command_line(cli, tmp_path / "part.mp4", "tiny_t2v", graph, *flags, "--upscale", 2)
    assert (host.base / "output" / shown["filename"]).read_bytes() == expected
    with pytest.raises(ValueError, match="--upscale is 3; it must be 2 or 4"):
        host.classes["Kandinsky5Save"]().save(frames, record, "part", upscale=3)


def test_from_a_picture_without_an_editing_model(host: ComfyUI, cli: ModuleType, tmp_path: Path) -> None:
    graph = short_graph(host, "t2i")
    node(graph, "7", "LoadImage", image="example.png")
    node(graph, "8", "Source", frames=["7", 0], how="start from", strength=0.5, overlap=0)
    graph[SAMPLE]["inputs"]["given"] = ["8", 0]
    picture = host.base / "input" / "example.png"
    flags = ("--image", picture, "--strength", 0.5)
    assert saved(host, host.run(graph)).read_bytes() == made_by_command_line(
        cli, tmp_path / "a.png", "tiny_t2i", graph, *flags
    )
    graph["8"]["inputs"]["how"] = "go on from"
    with pytest.raises(ValueError, match="what goes on is a video"):
        host.run(graph)


def test_further_pictures_and_loops(host: ComfyUI, cli: ModuleType, tmp_path: Path) -> None:
    Image.new("RGB", (128, 128), "blue").save(host.base / "input" / "blue.png")
    graph = short_graph(host, "i2v", seconds=0.4)
    graph[LOAD]["inputs"]["config"] = "tiny_flf"
    node(graph, "7", "LoadImage", image="blue.png")
    node(graph, "8", "Frames", where="at seconds", seconds=0.17, picture=["7", 0])
    node(graph, "9", "Frames", where="last", seconds=0.0, picture=["7", 0], given=["8", 0])
    graph[SAMPLE]["inputs"]["given"] = ["9", 0]
    blue, flags = host.base / "input" / "blue.png", ("--image", host.base / "input" / "example.png")
    flags = (*flags, "--video_duration", 0.4)
    between = (*flags, "--keyframe", f"0.17:{blue}", "--last_image", blue)
    output = saved(host, host.run(graph))
    assert output.read_bytes() == made_by_command_line(cli, tmp_path / "a.mp4", "tiny_flf", graph, *between)
    del graph["9"]["inputs"]["picture"], graph["9"]["inputs"]["given"], graph["8"]
    graph["9"]["inputs"]["where"] = "loop"
    loop = saved(host, host.run(graph))
    assert loop.read_bytes() == made_by_command_line(cli, tmp_path / "b.mp4", "tiny_flf", graph, *flags, "--loop")
    graph["9"]["inputs"]["where"] = "last"
    with pytest.raises(ValueError, match="leave the picture out, and else give one"):
        host.run(graph)


@pytest.mark.parametrize(("task", "overlap"), [("t2v", 5), ("i2v", 1)])
def test_what_goes_on_is_joined(host: ComfyUI, task: str, overlap: int) -> None:
    """The pixels of a segment of `--extend`; the record is true of the whole."""
    from kandinsky.outputs.colour import colours_of, corrected
    from kandinsky.pipelines.inputs import Inputs
    from kandinsky.serving.segments import Part, request_of

    graph = short_graph(host, task)
    first = (host.output_of(DECODE, graph)[0] * 255).round().byte().numpy()
    graph["7"] = {"class_type": "Kandinsky5Sample", "inputs": {**graph[SAMPLE]["inputs"], "seed": 3}}
    node(graph, "8", "Source", frames=[DECODE, 0], how="go on from", strength=0.6, overlap=0)
    graph["7"]["inputs"]["given"] = ["8", 0]
    node(graph, "9", "Decode", model=[LOAD, 0], latent=["7", 0])
    node(graph, "10", "Join", before=[DECODE, 0], after=["9", 0], record=["7", 1], colour_match=True)
    node(graph, "11", "Save", frames=["10", 0], record=["10", 1], filename_prefix="long")
    shown = host.run(graph)
    pipeline = host.output_of(LOAD, graph)[0].pipeline
    request = request_of(pipeline.config, Part(graph[ENCODE]["inputs"]["text"], 4, 3), (128, 128), overlap, num_steps=2)
    pictures = [Image.fromarray(first[-1])] if task == "i2v" else []
    pixels = pipeline.generate(request, Inputs(pictures, overlap=first[-overlap:]), progress=False)
    added = pixels[0].permute(1, 2, 3, 0).numpy()
    joined = (host.output_of("10", graph)[0] * 255).round().byte().numpy()
    assert (joined[:5] == first).all() and len(joined) == 9
    assert (joined[5:] == corrected(added, colours_of(added), colours_of(first))).all()
    name = shown["11"]["images"][0]["filename"]
    record = json.loads((host.base / "output" / name).with_suffix(".json").read_text())
    assert record["num_frames"] == 9 and record["extended"]["added_frames"] == 4
    with pytest.raises(ValueError, match="goes on from nothing"):
        host.classes["Kandinsky5Join"]().join(
            *(2 * [host.output_of(DECODE, graph)[0]]), record | {"conditions": []}, True
        )


# ----------------------------------------------------------------------------------------------------------- interrupts


def test_an_interrupt_between_two_steps_leaves_nothing_behind(host: ComfyUI) -> None:
    graph = short_graph(host, "t2i", seed=5)
    expected = saved(host, host.run(graph)).read_bytes()
    graph[LOAD]["inputs"]["offload"] = "on"
    before = sorted((host.base / "output").rglob("*"))

    def cancel_after_the_first_step(value: int) -> None:
        host.interrupted = value == 1

    host.on_progress = cancel_after_the_first_step  # type: ignore[method-assign]
    with pytest.raises(InterruptProcessingException):
        host.run(graph)
    assert [value for value, _, _ in host.events] == [1]
    assert sorted((host.base / "output").rglob("*")) == before
    pipeline = host.output_of(LOAD, graph)[0].pipeline
    assert not pipeline.is_denoising and not pipeline.interrupt
    assert all(parameter.is_meta for parameter in pipeline.dit.parameters())  # it is off the device again
    free: list[bool] = []

    def use_it() -> None:
        with pipeline.lock:
            free.append(True)

    thread = threading.Thread(target=use_it, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert free == [True]

    host.on_progress = lambda value: None  # type: ignore[method-assign]
    assert saved(host, host.run(graph)).read_bytes() == expected
    assert host.executed == [SAMPLE, DECODE, SAVE]


def test_each_node_hears_of_an_interrupt(host: ComfyUI) -> None:
    graph = short_graph(host, "t2i", seed=6)
    host.run(graph)
    for entry in graph.values():
        node = host.classes[entry["class_type"]]
        given = {
            name: host.output_of(value[0], graph)[value[1]] if isinstance(value, list) else value
            for name, value in entry["inputs"].items()
        }
        host.interrupted = True
        with pytest.raises(InterruptProcessingException):
            getattr(node(), node.FUNCTION)(**given)


# --------------------------------------------------------------------------------------------------------------- LATENT


def test_latents_go_to_comfyuis_layout_and_back(host: ComfyUI) -> None:
    latents = sys.modules[f"{host.nodes.__name__}.comfyui.latents"]
    scale = 0.476986  # ComfyUI's, for HunyuanVideo
    scaled = torch.randn(2, 3, 4, 6, 16, generator=torch.Generator().manual_seed(0))
    native = latents.to_native(scaled, scale)
    assert native["samples"].shape == (2, 16, 3, 4, 6) and native["samples"].is_contiguous()
    assert torch.equal(native["samples"][1, 5, 2, 3, 4], scaled[1, 2, 3, 4, 5] / scale)
    assert torch.equal(latents.from_native(native, scale), scaled)
    assert torch.equal(latents.to_native(latents.from_native(native, scale), scale)["samples"], native["samples"])

    # From nodes that know nothing of ours: a rounding at most.
    foreign = {"samples": native["samples"]}
    assert torch.allclose(latents.from_native(foreign, scale), scaled, rtol=2**-22, atol=0)
    # From nodes that have changed the samples and handed the rest on.
    changed = {**native, "samples": native["samples"] * 2}
    assert torch.allclose(latents.from_native(changed, scale), 2 * scaled, rtol=2**-22, atol=0)

    picture = latents.to_native(scaled[:, :1], 0.3611)
    assert picture["samples"].shape == (2, 16, 4, 6)
    assert torch.equal(latents.from_native(picture, 0.3611), scaled[:, :1])
    with pytest.raises(ValueError, match=r"the latents are \(1, 4, 8, 8\); Kandinsky 5 has \(batch, 16, "):
        latents.from_native({"samples": torch.zeros(1, 4, 8, 8)}, scale)


# ----------------------------------------------------------------------------------------------- mistakes and contracts


@pytest.mark.parametrize(
    ("key", "inputs", "message"),
    [
        (ENCODE, {"text": " "}, "the prompt is empty"),
        (SAMPLE, {"width": 48}, "48x128 is not a size that this model draws"),
        (SAMPLE, {"seconds": 1.0}, "makes images: leave the duration out"),
        (LOAD, {"overrides": "model.num_step=3"}, "num_step"),
    ],
)
def test_a_mistake_is_one_sentence(host: ComfyUI, key: str, inputs: dict[str, Any], message: str) -> None:
    graph = short_graph(host, "t2i")
    graph[key]["inputs"] |= inputs
    with pytest.raises(ValueError, match=message):
        host.run(graph)


def test_prompts_of_a_picture_make_no_video_and_changed_frames_no_record(host: ComfyUI) -> None:
    graph = short_graph(host, "t2v")
    graph[ENCODE]["inputs"]["one_picture"] = True
    with pytest.raises(ValueError, match="the prompt was encoded for a picture"):
        host.run(graph)
    graph[SAMPLE]["inputs"]["seconds"] = 0.0
    assert saved(host, host.run(graph)).suffix == ".png"
    record = host.output_of(SAMPLE, graph)[1]
    with pytest.raises(ValueError, match="there are 2 frames of 64x32, and the record is of 1 of 128x128"):
        host.classes["Kandinsky5Save"]().save(torch.zeros(2, 32, 64, 3), record, "x")


@pytest.mark.parametrize("name", NODES)
def test_nodes_keep_comfyuis_contract(host: ComfyUI, name: str) -> None:
    node = host.nodes.NODE_CLASS_MAPPINGS[f"Kandinsky5{name}"]
    inputs = node.INPUT_TYPES()
    assert set(inputs) <= {"required", "optional", "hidden"} and inputs["required"]
    all_inputs = [*inputs["required"], *inputs.get("optional", {})]
    parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    named = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD} - {"self"}
    assert named <= set(all_inputs)
    for group, entries in inputs.items():
        for input_name, (kind, *options) in entries.items():
            assert input_name in parameters or takes_all
            if group == "optional" and input_name in parameters:
                assert parameters[input_name].default is not inspect.Parameter.empty
            assert isinstance(kind, list) or kind in WIDGETS or kind.isupper()
            if kind in ("INT", "FLOAT"):
                assert options[0]["min"] <= options[0]["default"] <= options[0]["max"]
            if isinstance(kind, list) and options:
                assert options[0].get("default", kind[0] if kind else None) in [*kind, None]
    assert isinstance(node.RETURN_TYPES, tuple) and all(kind.isupper() for kind in node.RETURN_TYPES)
    assert len(getattr(node, "RETURN_NAMES", node.RETURN_TYPES)) == len(node.RETURN_TYPES)
    assert node.CATEGORY == "Kandinsky 5" and isinstance(node.DESCRIPTION, str)
    assert getattr(node, "OUTPUT_NODE", False) is (name == "Save")
    assert hasattr(node, "IS_CHANGED") is (name in ("Load", "Lora", "Sample"))
    if hasattr(node, "IS_CHANGED"):
        inspect.signature(node.IS_CHANGED).bind(**dict.fromkeys(all_inputs))
    assert set(host.nodes.NODE_CLASS_MAPPINGS) == set(host.nodes.NODE_DISPLAY_NAME_MAPPINGS)


# --------------------------------------------------------------------------------------------------------- installation

CLONED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from comfyui_stand_in import ComfyUI
sys.path.pop(0)
host = ComfyUI(Path("base"))
sys.modules.update(host.modules())
before = list(sys.path)
module = host.load_custom_node(Path("custom_nodes/kandinsky-5.fork").resolve())
import kandinsky, importlib.util
print(Path(kandinsky.__file__).parent.parent.name, len(module.NODE_CLASS_MAPPINGS), sys.path == before,
      importlib.util.find_spec("serve") is None, "5s_sft" in host.inputs_of("Kandinsky5Load")[0][1])
sys.modules["kandinsky"].__path__ = ["/elsewhere"]
try:
    host.load_custom_node(Path("custom_nodes/kandinsky-5.fork").resolve())
    module = sys.modules[module.__name__ + ".comfyui.package"]
    module.make_importable()
except ImportError as error:
    print(error)
"""


def test_a_clone_in_custom_nodes_is_all_that_it_takes(tmp_path: Path) -> None:
    clone = tmp_path / "custom_nodes" / "kandinsky-5.fork"
    for name in ("comfyui", "kandinsky", "configs"):
        shutil.copytree(REPOSITORY / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "__init__.py", clone)
    command = [sys.executable, "-I", "-c", CLONED, str(REPOSITORY / "tests")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.splitlines()
    assert first == "kandinsky-5.fork 9 True True True"
    assert second.startswith("another package called kandinsky is loaded, from [PosixPath('/elsewhere')]: ComfyUI can")


def test_the_repository_is_no_package_to_pytest(request: pytest.FixtureRequest) -> None:
    assert (REPOSITORY / "__init__.py").is_file()
    assert not any(isinstance(node, pytest.Package) for node in request.node.listchain())
    files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    names = [name for name, file in files.items() if file == str(REPOSITORY / "__init__.py")]
    assert set(names) <= {str(REPOSITORY).replace(".", "_x_")}  # ComfyUI's stand-in has it, maybe, and nobody else


def test_requirements_are_the_projects_without_torch() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    lines = (REPOSITORY / "comfyui" / "requirements.txt").read_text().splitlines()
    ours = [line for line in lines if not line.startswith("#")]
    assert ours == [line for line in project if not line.startswith("torch")]
