"""What a text encoder's config.json says, or would: Qwen2.5-VL's and CLIP's as single files come without one.

From shapes come the sizes; what no shape says is as published, or as a GGUF file's metadata has it. Knows no torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kandinsky.checkpoints.dit_layout import block_index, unpacked_shapes
from kandinsky.checkpoints.files import find_weights, folder_of
from kandinsky.checkpoints.formats import read_weights_header
from kandinsky.checkpoints.gguf_file import is_gguf, read_contents
from kandinsky.common.given import shortened
from kandinsky.common.untrusted import read_json

QWEN, CLIP = "qwen2_5_vl", "clip_text_model"  # `model_type` of their configs
QWEN_HEAD, QWEN_VISION_HEAD, CLIP_HEAD = 128, 80, 64  # sizes of a head of attention
Shapes = dict[str, tuple[int, ...]]


def encoder_config(path: Path, model_type: str) -> dict[str, Any]:
    """The config.json of the encoder at `path`, or where a file has none beside it, what it would have in it.

    Raises ValueError where that is not known, or the file damaged.
    """
    file = folder_of(path) / "config.json"
    if file.is_file() or not path.is_file():
        return read_json(file)
    return config_from_weights(path, model_type)


def config_from_weights(path: Path, model_type: str) -> dict[str, Any]:
    """What the weights of an encoder say of its config. Errors are those of `encoder_config`."""
    header = {name: entry for file in find_weights(path) for name, entry in read_weights_header(file).items()}
    shapes = unpacked_shapes(header)
    try:
        if model_type == CLIP:
            return _clip(shapes)
        metadata = read_contents(path).metadata if is_gguf(path) else {}
        return _qwen(shapes, metadata)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        why = f"no {error.args[0]} in it" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path} has no config.json beside it, and is no whole {'CLIP' if model_type == CLIP else 'Qwen2.5-VL'} "
            f"by itself ({shortened(why)}): put the model's config.json beside it, or take another file"
        ) from None


def _blocks(shapes: Shapes, row: str) -> int:
    found = (re.match(rf"{row}\.(\d+)\.", name) for name in shapes)
    return 1 + max((block_index(match[1], len(shapes)) for match in found if match), default=-1)


def _clip(shapes: Shapes) -> dict[str, Any]:
    shapes = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    return {
        "model_type": CLIP,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _blocks(shapes, r"encoder\.layers"),
        "num_attention_heads": max(width // CLIP_HEAD, 1),
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,  # the pooled embedding is the one at its place
    }


def _qwen(shapes: Shapes, metadata: dict[str, Any]) -> dict[str, Any]:
    # Of several names for the same the shortest: layers.0..., visual.blocks.0...
    shapes = {re.sub(r"^(model\.|language_model\.)+", "", name): shape for name, shape in shapes.items()}
    vocabulary, width = shapes["embed_tokens.weight"]
    queries, keys = (shapes[f"layers.0.self_attn.{name}_proj.weight"][0] for name in "qk")
    told = {name.partition(".")[2]: value for name, value in metadata.items() if name.startswith("qwen2")}
    heads = told.get("attention.head_count", queries // QWEN_HEAD)
    if type(heads) is not int or not heads > 0 or queries % heads:
        raise ValueError(f"{queries} channels of queries are no whole number of heads")
    head = queries // heads
    if keys % head or head % 2:
        raise ValueError(f"{keys} channels of keys are no whole number of heads of {head}")
    times = head // 8  # of half a head's channels a quarter turns with time, the rest with height and width
    sections = [times, (head // 2 - times) // 2, head // 2 - times - (head // 2 - times) // 2]
    text = {
        "model_type": "qwen2_5_vl_text",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": _blocks(shapes, "layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys // head,
        "hidden_act": "silu",
        "max_position_embeddings": 128000,
        "rms_norm_eps": float(f"{told.get('attention.layer_norm_rms_epsilon', 1e-6):.6g}"),  # a float32 in the file
        "rope_parameters": {
            "rope_theta": told.get("rope.freq_base", 1000000.0),
            "rope_type": "default",
            "mrope_section": sections,
        },
    }
    config: dict[str, Any] = {
        "model_type": QWEN,
        "text_config": text,
        # llama.cpp's files leave out the head of a model that writes with its embeddings.
        "tie_word_embeddings": bool(metadata) and not any(name.startswith("lm_head.") for name in shapes),
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
    }
    if "visual.blocks.0.mlp.gate_proj.weight" in shapes:
        middle, inner = shapes["visual.blocks.0.mlp.gate_proj.weight"]
        config["vision_config"] = {
            "depth": _blocks(shapes, r"visual\.blocks"),
            "hidden_size": inner,
            "intermediate_size": middle,
            "num_heads": max(inner // QWEN_VISION_HEAD, 1),
            "out_hidden_size": width,
            "hidden_act": "silu",
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        }
    return config
