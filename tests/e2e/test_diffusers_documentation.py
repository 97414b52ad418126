"""The Python of diffusers' documentation of its four Kandinsky 5 pipelines, with nothing changed but the import.

It runs in full on a machine without a GPU and without internet: repositories come from a hub on this machine, with
small weights; "cuda" is the CPU; and each request, after its documented numbers were looked at, is made small.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import logging
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

import kandinsky
import kandinsky.attention.block_sparse as block_sparse
from kandinsky.diffusers_calls import base, call
from kandinsky.loading import device_map
from kandinsky.request import Request
from tests.diffusers_repositories import NABLA, build_parts, crop, write_repository
from tests.hub_stand_in import HubStandIn, Repo, point_client_at, running_hub

REPOSITORY = Path(__file__).resolve().parents[2]
NEGATIVE = (
    "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, deformed, "
    "walking backwards"
)

T2V_PRO = f'''
import torch
from kandinsky import Kandinsky5T2VPipeline
from kandinsky import export_to_video

model_id = "kandinskylab/Kandinsky-5.0-T2V-Pro-sft-5s-Diffusers"
pipe = Kandinsky5T2VPipeline.from_pretrained(model_id, torch_dtype=torch.bfloat16)
pipe = pipe.to("cuda")
pipe.transformer.set_attention_backend("flex")
pipe.transformer.compile(mode="max-autotune-no-cudagraphs", dynamic=True)
pipe.enable_model_cpu_offload()

output = pipe(
    prompt="A cat and a dog baking a cake together in a kitchen.",
    negative_prompt="{NEGATIVE}",
    height=768,
    width=1024,
    num_frames=121,
    num_inference_steps=50,
    guidance_scale=5.0,
).frames[0]
export_to_video(output, "output.mp4", fps=24, quality=9)
'''
T2V_LITE = f'''
import torch
from kandinsky import Kandinsky5T2VPipeline
from kandinsky import export_to_video

model_id = "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers"
pipe = Kandinsky5T2VPipeline.from_pretrained(model_id, torch_dtype=torch.bfloat16)
pipe = pipe.to("cuda")

output = pipe(
    prompt="A cat and a dog baking a cake together in a kitchen.",
    negative_prompt="{NEGATIVE}",
    height=512,
    width=768,
    num_frames=121,
    num_inference_steps=50,
    guidance_scale=5.0,
).frames[0]
export_to_video(output, "output.mp4", fps=24, quality=9)
'''
T2V_10S = f'''
import torch
from kandinsky import Kandinsky5T2VPipeline
from kandinsky import export_to_video

pipe = Kandinsky5T2VPipeline.from_pretrained(
    "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-10s-Diffusers",
    torch_dtype=torch.bfloat16,
)
pipe = pipe.to("cuda")
pipe.transformer.set_attention_backend("flex")
pipe.transformer.compile(mode="max-autotune-no-cudagraphs", dynamic=True)

output = pipe(
    prompt="A cat and a dog baking a cake together in a kitchen.",
    negative_prompt="{NEGATIVE}",
    height=512,
    width=768,
    num_frames=241,
    num_inference_steps=50,
    guidance_scale=5.0,
).frames[0]
export_to_video(output, "output.mp4", fps=24, quality=9)
'''
T2V_DISTILLED = """
import torch
from kandinsky import Kandinsky5T2VPipeline
from kandinsky import export_to_video

model_id = "kandinskylab/Kandinsky-5.0-T2V-Lite-distilled16steps-5s-Diffusers"
pipe = Kandinsky5T2VPipeline.from_pretrained(model_id, torch_dtype=torch.bfloat16)
pipe = pipe.to("cuda")

output = pipe(
    prompt="A beautiful sunset over mountains",
    num_inference_steps=16,
    guidance_scale=1.0,
).frames[0]
export_to_video(output, "output.mp4", fps=24, quality=9)
"""
I2V = f'''
import torch
from kandinsky import Kandinsky5I2VPipeline
from kandinsky import export_to_video, load_image

model_id = "kandinskylab/Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers"
pipe = Kandinsky5I2VPipeline.from_pretrained(model_id, torch_dtype=torch.bfloat16)
pipe = pipe.to("cuda")

image = load_image(
    "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/diffusers/astronaut.jpg"
)
prompt = "An astronaut floating in space with Earth in the background, cinematic shot"
negative_prompt = "{NEGATIVE}"

output = pipe(
    image=image,
    prompt=prompt,
    negative_prompt=negative_prompt,
    height=512,
    width=768,
    num_frames=121,
    num_inference_steps=50,
    guidance_scale=5.0,
).frames[0]
export_to_video(output, "output.mp4", fps=24, quality=9)
'''
T2I = """
import torch
from kandinsky import Kandinsky5T2IPipeline

model_id = "kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers"
pipe = Kandinsky5T2IPipeline.from_pretrained(model_id)
_ = pipe.to(device='cuda', dtype=torch.bfloat16)

output = pipe(
    prompt="A fluffy, expressive cat wearing a bright red hat with the words “SWEET” on its front.",
    negative_prompt="",
    height=1024,
    width=1024,
    num_inference_steps=50,
    guidance_scale=3.5,
).image[0]
"""
I2I = """
import torch
from kandinsky import Kandinsky5I2IPipeline
from kandinsky import load_image

model_id = "kandinskylab/Kandinsky-5.0-I2I-Lite-sft-Diffusers"
pipe = Kandinsky5I2IPipeline.from_pretrained(model_id)
_ = pipe.to(device='cuda', dtype=torch.bfloat16)
pipe.enable_model_cpu_offload()

image = load_image(
    "https://huggingface.co/kandinsky-community/kandinsky-3/resolve/main/assets/title.jpg?download=true"
)
output = pipe(
    image=image,
    prompt="Change the background from a winter night scene to a bright summer day.",
    negative_prompt="",
    guidance_scale=3.5,
).image[0]
"""
# Block, task, attention, what is asked for, and the config that the repository's name says it is.
BLOCKS: dict[str, tuple[str, str, bool, dict[str, Any], str]] = {
    "t2v_pro": (
        T2V_PRO, "t2v", True,
        {"width": 1024, "height": 768, "num_frames": 121, "num_steps": 50, "guidance_weight": 5.0}, "5s_t2v_pro_hd",
    ),
    "t2v_lite": (
        T2V_LITE, "t2v", False,
        {"width": 768, "height": 512, "num_frames": 121, "num_steps": 50, "guidance_weight": 5.0}, "5s_sft",
    ),
    "t2v_10s": (
        T2V_10S, "t2v", True,
        {"width": 768, "height": 512, "num_frames": 241, "num_steps": 50, "guidance_weight": 5.0}, "10s_sft",
    ),
    "t2v_distilled": (
        T2V_DISTILLED, "t2v", False,
        {"width": 768, "height": 512, "num_frames": 121, "num_steps": 16, "guidance_weight": 1.0}, "5s_distil",
    ),
    "i2v": (
        I2V, "i2v", True,
        {"width": 768, "height": 512, "num_frames": 121, "num_steps": 50, "guidance_weight": 5.0}, "5s_i2v_pro_hd",
    ),
    "t2i": (
        T2I, "t2i", False,
        {"width": 1024, "height": 1024, "num_frames": 1, "num_steps": 50, "guidance_weight": 3.5}, "t2i",
    ),
    "i2i": (
        I2I, "i2i", False,
        {"width": 1280, "height": 768, "num_frames": 1, "num_steps": 50, "guidance_weight": 3.5}, "i2i",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[HubStandIn]:
    with running_hub() as server:
        yield server


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """With what torch.compile was called; compiled is nothing."""
    calls: list[dict[str, Any]] = []

    def compile(function: Any, **options: Any) -> Any:
        calls.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    return calls


@pytest.mark.parametrize("name", BLOCKS)
def test_block(
    name: str,
    server: HubStandIn,
    compiled: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    block, task, is_nabla, wishes, config = BLOCKS[name]
    point_client_at(server.url, monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(device_map, "_checked_device", lambda device: torch.device("cpu"))
    kernels: list[str] = []

    def flex(*tensors: Any) -> Any:
        kernels.append("flex")
        return block_sparse.sdpa_block_sparse(*tensors)

    monkeypatch.setitem(block_sparse.BLOCK_SPARSE_ENGINES, "flex", flex)
    picture = (REPOSITORY / "assets" / "test_image.jpg").read_bytes()
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: io.BytesIO(picture))
    config_of = base.config_of
    monkeypatch.setattr(base, "config_of", lambda *given: config_of(*given[:3], [*given[3], *crop(task)]))
    resolve, requests = call.resolve_request, []

    def made_small(*given: Any, **options: Any) -> Request:
        requests.append(resolve(*given, **options))
        frames = 5 if requests[0].num_frames > 1 else 1
        return dataclasses.replace(requests[0], width=128, height=128, num_frames=frames, num_steps=2)

    monkeypatch.setattr(call, "resolve_request", made_small)
    repo = next(line for line in block.splitlines() if "kandinskylab/" in line).split('"')[1]
    folder = write_repository(tmp_path / "hub", task, build_parts(task, attention=NABLA if is_nabla else None))
    files = [path for path in folder.rglob("*") if path.is_file()]
    server.repos = {repo: Repo({path.relative_to(folder).as_posix(): path.read_bytes() for path in files})}

    caplog.set_level(logging.INFO)
    namespace: dict[str, Any] = {}
    exec(block, namespace)  # the documentation, as it stands

    (request,) = requests
    assert {key: getattr(request, key) for key in wishes} == wishes and request.schedule == "diffusers"
    pipe = namespace["pipe"]
    assert pipe.pipeline.config.source.stem == f"config_{config}"
    assert pipe.pipeline.dtype_name == "bfloat16" and pipe.pipeline.uses_nabla == is_nabla
    assert (tmp_path / "weights" / repo.split("/")[1] / "transformer" / "config.json").is_file()
    assert pipe.pipeline.config.metrics.scheduler_scale == 5
    if "set_attention_backend" in block:
        assert kernels
    assert [options["mode"] for options in compiled if "mode" in options] == (
        ["max-autotune-no-cudagraphs"] if ".compile(" in block else []
    )
    assert (pipe.pipeline.config.runtime.offload == "on") == ("enable_model_cpu_offload" in block)
    output = namespace["output"]
    if task.endswith("v"):
        assert len(output) == 5 and all(frame.size == (128, 128) for frame in output)
        with imageio.get_reader(tmp_path / "output.mp4", format="FFMPEG") as reader:  # type: ignore[arg-type]
            frames = list(reader.iter_data())
            assert len(frames) == 5 and reader.get_meta_data()["fps"] == 24
        assert np.abs(frames[0].astype(int) - np.asarray(output[0])).mean() < 20
    else:
        assert output.size == (128, 128) and len(np.unique(np.asarray(output))) > 50


def test_the_documents_own_block() -> None:
    """docs/diffusers.md names what there is."""
    text = (REPOSITORY / "docs" / "diffusers.md").read_text(encoding="utf-8")
    (block,) = (part.split("```")[0] for part in text.split("```python\n")[1:])
    signatures = {
        "Kandinsky5T2VPipeline.from_pretrained": kandinsky.Kandinsky5T2VPipeline.from_pretrained,
        "pipe.to": kandinsky.Kandinsky5T2VPipeline.to,
        "pipe": kandinsky.Kandinsky5T2VPipeline.__call__,
        "export_to_video": kandinsky.export_to_video,
    }
    calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    assert {ast.unparse(one.func) for one in calls} == set(signatures)
    for one in calls:
        known = inspect.signature(signatures[ast.unparse(one.func)]).parameters
        assert {keyword.arg for keyword in one.keywords} <= set(known)
