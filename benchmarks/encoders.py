"""What encoding a prompt takes of memory, Qwen's layers streaming from their file, beside all of them resident.

    python benchmarks/encoders.py [--layers 6] [--hidden 3584] [--intermediate 18944] [--folder DIR]

Writes a Qwen of random weights in bfloat16, with the width of the published one and few of its layers, which is deleted
afterwards. A process of its own loads it and encodes a prompt, first streamed, then resident, and compares the results,
which must be the same to the bit. Before that it has encoded with a tiny one, so that what PyTorch takes for itself at
first use is not counted.

Figures are what loading and encoding take at their peak beyond that, in layers of the encoder: `rss`, the resident set
with the pages of the mapped file, and `anon`, the part of it that the system can't take back.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

from benchmarks.memory import RANDOM_BYTES, peaks
from kandinsky.loading.text_encoders import load_text_embedder
from kandinsky.loading.text_files import load_tokenizer, read_config
from kandinsky.models.qwen import QwenConfig, QwenText
from kandinsky.text.prompts import get_template, prefix_length

REPOSITORY = Path(__file__).resolve().parents[1]
HEAD_DIM, MROPE = 128, [16, 24, 24]
WORDS = "a red circle moves left on a white background"


def write_wide_qwen(path: Path, config: dict[str, Any], layers: int, hidden: int, intermediate: int) -> dict[str, int]:
    """A Qwen of random weights and that size into a folder that has a tokenizer; `config` is a tiny one's config.json.

    Written as it is made: no more of it is in memory than the random bytes that repeat. Returns bytes of a layer, of
    its largest tensor, and how many layers.
    """
    heads = hidden // HEAD_DIM
    sizes = {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": math.gcd(heads, 4),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": MROPE},
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config | {"text_config": config["text_config"] | sizes}))
    with torch.device("meta"):
        state = QwenText(read_config(QwenConfig, path).text_config).state_dict()
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in state.items():
        begin, end = end, end + 2 * tensor.numel()
        header[f"model.{name}"] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    values = 0.02 * torch.randn(RANDOM_BYTES // 2, generator=torch.Generator().manual_seed(0))
    chunk = values.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in range(0, end, len(chunk)):
            file.write(chunk[: end - begin])
    layer = [2 * tensor.numel() for name, tensor in state.items() if name.startswith("layers.0.")]
    return {"layer": sum(layer), "largest": max(layer), "layers": layers}


@torch.no_grad()
def encode(folder: Path, stream: bool) -> Tensor:
    crop = prefix_length(load_tokenizer(folder / "text_encoder", "tokenizer", "qwen"), get_template("video"))
    options: dict[str, Any] = {"qwen_max_length": None, "clip_max_length": 32, "crop": crop, "dtype": torch.bfloat16}
    embedder = load_text_embedder(folder / "text_encoder", folder / "text_encoder2", stream=stream, **options)
    return embedder.encode([WORDS], "video").text_embeds


def measure(tiny: Path, wide: Path) -> dict[str, Any]:
    """In this process: bytes at the peak, streamed and resident, and whether both came to the same."""
    for stream in (True, False):
        encode(tiny, stream)
    results: dict[str, Any] = {}
    outputs = []
    for name, stream in (("streamed", True), ("resident", False)):
        results[name] = {}
        with peaks(results[name]):
            outputs.append(encode(wide, stream))
        gc.collect()
    return results | {"same": torch.equal(*outputs), "finite": bool(outputs[0].isfinite().all())}


def measure_in_a_process(folder: Path, layers: int, hidden: int, intermediate: int) -> dict[str, Any]:
    """`measure` of such an encoder, and the bytes of its layer and of the largest tensor in it."""
    from tools.make_tiny_text_encoders import make_text_encoders

    tiny, wide = folder / "tiny", folder / "wide"
    for one in (tiny, wide):
        make_text_encoders([WORDS], one, seed=0)
    path = wide / "text_encoder"
    sizes = write_wide_qwen(path, json.loads((path / "config.json").read_text()), layers, hidden, intermediate)
    command = [sys.executable, "-m", "benchmarks.encoders", "--measure", str(tiny), str(wide)]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True)
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results | sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=3584, help="a multiple of 128")
    parser.add_argument("--intermediate", type=int, default=18944)
    parser.add_argument("--folder", type=Path, help="where the files are written; about 0.5 GB a layer")
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(*args.measure)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = measure_in_a_process(Path(folder), args.layers, args.hidden, args.intermediate)
    layer = result["layer"]
    print(
        f"{args.layers} layers of {layer / 1e6:.0f} MB, the largest tensor {result['largest'] / layer:.2f} of a layer"
    )
    print("\n| | rss, layers | anon, layers | rss, MB | anon, MB |\n|---|---|---|---|---|")
    for name in ("resident", "streamed"):
        one = result[name]
        print(f"| {name} | {one['rss'] / layer:.2f} | {one['anon'] / layer:.2f} "
              f"| {one['rss'] / 1e6:.0f} | {one['anon'] / 1e6:.0f} |")  # fmt: skip
    print(f"\nthe same bits: {'yes' if result['same'] else 'NO'}")
    sys.exit(not (result["same"] and result["finite"]))


if __name__ == "__main__":
    main()
