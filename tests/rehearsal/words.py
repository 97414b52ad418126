"""Both text encoders, of the published sizes, reading a prompt on a GPU that is not there.

Of tokenizers only the number of tokens matters. Qwen's vision tower is not rehearsed: how many patches a picture has is
a number that tensors without numbers do not give.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import CLIPTextConfig, CLIPTextModel, Qwen2_5_VLConfig, Qwen2_5_VLTextModel

from kandinsky.config.reading import with_settings
from kandinsky.config.schema import Config
from kandinsky.loading import text_encoders
from kandinsky.loading.devices import machine_memory
from kandinsky.loading.text_files import read_config
from kandinsky.models.clip_text import ClipText, ClipTextConfig
from kandinsky.planning.machine import CUDA_CONTEXT
from kandinsky.planning.plan import default_request, make_plan
from kandinsky.planning.stages import TEMPLATE_TOKENS, text_tokens
from tests.rehearsal.fake_gpu import FakeGPU
from tests.rehearsal.whole_requests import DEVICE, WITHIN_PLAN, open_hollow, published, write_hollow_file

QWEN: dict[str, Any] = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064,
    "rope_parameters": {"rope_type": "default", "type": "mrope", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
}  # fmt: skip
CLIP: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": 768,
}  # fmt: skip


def write_encoders(folder: Path, layers: int) -> tuple[Path, Path]:
    """Hollow files of both encoders, of Qwen with so many layers: those of the language model and no head."""
    with torch.device("meta"):
        qwen = Qwen2_5_VLTextModel(Qwen2_5_VLConfig(text_config=QWEN | {"num_hidden_layers": layers}).text_config)
        clip = CLIPTextModel(CLIPTextConfig(**CLIP))
    paths = folder / "qwen", folder / "clip"
    for path, model, config in zip(paths, (qwen, clip), (qwen.config, clip.config), strict=True):
        dtype = "BF16" if model is qwen else "F32"
        tensors = {name: (dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
        write_hollow_file(path / "model.safetensors", tensors)
        config.save_pretrained(path)
    # Without a vision tower, whose tensors the file hasn't.
    Qwen2_5_VLConfig(text_config=qwen.config.to_dict(), vision_config={"depth": 1}).save_pretrained(paths[0])
    return paths


def rehearse_encoders(
    config: Config, folder: Path, stream: bool, memory_gb: float = 24, layers: int = 28
) -> tuple[int, int, FakeGPU]:
    """A prompt of the longest length read while nothing else is on the GPU: bytes at the peak counted and planned."""
    wanted = {"offload": "on", "stream_encoders": "on" if stream else "off"}
    config = with_settings(config, runtime=wanted, generation={"expand_prompts": False})
    qwen_path, clip_path = write_encoders(folder, layers)
    gpu = FakeGPU(memory_gb * 2**30 - CUDA_CONTEXT)
    with gpu, mock.patch.object(text_encoders, "open_weights", open_hollow):
        request = default_request(config)
        files = {name: folder / "none" for name in ("dit", "vae")} | {"qwen": qwen_path, "clip": clip_path}
        plan = make_plan(config, request, machine_memory(DEVICE), files, "bfloat16")
        stage = next(stage for stage in plan.stages if stage.name == "encode text")
        gpu.label = "loading encoders"
        qwen = text_encoders._load_qwen(qwen_path, False, DEVICE, torch.bfloat16, None, stream)
        clip = text_encoders._build(clip_path, lambda: ClipText(read_config(ClipTextConfig, clip_path)))
        text_encoders.assign_weights(clip, clip_path, text_encoders._CLIP_PREFIXES, DEVICE, torch.float32)
        gpu.label = "encode text"
        tokens = TEMPLATE_TOKENS + text_tokens(config, request)
        ids = torch.zeros(1, tokens, dtype=torch.int64, device=DEVICE)
        hidden = qwen(ids)
        assert hidden.shape == (1, tokens, QWEN["hidden_size"]) and hidden.device == DEVICE
        peak = gpu.peak
        del qwen, clip, hidden, ids
    planned = stage.weights + stage.activations
    if abs(peak / planned - 1) > WITHIN_PLAN:
        gpu.faults.append(f"encode text takes {peak / 2**30:.2f} GB, and {planned / 2**30:.2f} are planned")
    return peak, planned, gpu


def main() -> None:
    """Print a row for each way to run the encoders; exit with 1 where anything was found."""
    faults = []
    print("| encoders | GPU, GB | counted, GB | planned | ratio | found |\n|---|---|---|---|---|---|", flush=True)
    for words, stream, memory_gb in (("resident", False, 24), ("streamed", True, 8)):
        with tempfile.TemporaryDirectory() as folder:
            peak, planned, gpu = rehearse_encoders(published("5s_sft"), Path(folder), stream, memory_gb)
        faults += gpu.faults
        figures = f"{peak / 2**30:.2f} | {planned / 2**30:.2f} | {peak / planned:.3f}"
        print(f"| {words} | {memory_gb} | {figures} | {'; '.join(gpu.faults) or 'none'} |", flush=True)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
