"""Build the tiny text encoders of the tiny checkpoints: two tokenizers trained on captions, two small random models.

The folders look like the real ones (`text_encoder/`, `text_encoder2/`, each with config.json, model.safetensors and
the tokenizer's files), and `load_text_embedder` reads them through the same code. Sizes differ, and the tokenizers:
they know every byte, and as whole words those of the captions and of the templates in use, so that the templates'
prefixes are short. Their length goes into the configs as `model.text_embedder.qwen.crop`; the command prints it.

Encoders for videos read text. Those for images serve two tasks: they have a vision tower for editing, which is not
loaded for text to image.

    python -m tools.make_tiny_text_encoders --captions captions.txt --out assets/tiny/t2v --seed 0
    python -m tools.make_tiny_text_encoders --captions captions.txt --out assets/tiny/image --seed 0 --images
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs without the project being installed

from kandinsky.models.qwen import Qwen
from kandinsky.text.embedder import TextEmbedder
from kandinsky.text.prompts import get_template, prefix_length
from kandinsky.text.tokenizer import Tokenizer

QWEN_FOLDER, CLIP_FOLDER = "text_encoder", "text_encoder2"
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")  # the last id is end-of-text, as in the real vocabulary
QWEN_VOCAB_SIZE = 768
CLIP_VOCAB_SIZE = 768  # 512 of them bytes, in the middle and at the end of a word: no text is unknown
CLIP_MAX_LENGTH = 32
VIDEO_CONTENTS = ("video",)
IMAGE_CONTENTS = ("image", "image_edit")
# Where there is no vision tower, this section only makes config.json read as what it is, a Qwen2.5-VL's.
NO_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "fullatt_block_indexes": [0]}
# One block that attends within windows and one that sees the whole picture, as the real tower has both.
TINY_VISION = {"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 4, "fullatt_block_indexes": [1]}


def _bpe(
    texts: Iterable[str], like: PreTrainedTokenizerBase, vocab_size: int, special: tuple[str, ...], suffix: str = ""
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE; `like` gives normalisation and the cutting into words."""
    # The alphabet is written down and not left to the trainer, which would only know the endings it has seen.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + ([letter + suffix for letter in alphabet] if suffix else [])

    trainer_side = tokenizers.Tokenizer(models.BPE(end_of_word_suffix=suffix))
    trainer_side.normalizer = like.backend_tokenizer.normalizer
    trainer_side.pre_tokenizer = like.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=10 * vocab_size,  # more merges than needed: which ones fit is counted below
        min_frequency=1,
        show_progress=False,
        initial_alphabet=alphabet,
        end_of_word_suffix=suffix,
    )
    trainer_side.train_from_iterator(texts, trainer)

    merges = [tuple(pair) for pair in json.loads(trainer_side.to_str())["model"]["merges"]]
    merges = merges[: vocab_size - len(tokens) - len(special)]
    tokens += dict.fromkeys(left + right for left, right in merges)
    vocab = {token: index for index, token in enumerate([*tokens, *special])}
    return vocab, merges


def build_tokenizers(
    captions: list[str], out_dir: Path, contents: Sequence[str] = VIDEO_CONTENTS
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Train and save a Qwen2-style and a CLIP-style tokenizer, the first one also on the templates' words."""
    template_words = [re.sub(r"<\|.*?\|>", "", get_template(content).text.replace("{}", "")) for content in contents]
    vocab, merges = _bpe([*captions, *template_words], Qwen2Tokenizer(), QWEN_VOCAB_SIZE, QWEN_SPECIAL)
    qwen_tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in QWEN_SPECIAL if token not in ("<|im_end|>", "<|endoftext|>")],
        padding_side="right",
    )
    vocab, merges = _bpe(captions, CLIPTokenizer(), CLIP_VOCAB_SIZE, CLIP_SPECIAL, suffix="</w>")
    clip_tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_MAX_LENGTH, padding_side="right")

    qwen_tokenizer.save_pretrained(out_dir / QWEN_FOLDER)
    clip_tokenizer.save_pretrained(out_dir / CLIP_FOLDER)
    return qwen_tokenizer, clip_tokenizer


def make_text_encoders(captions: list[str], out_dir: Path, seed: int, *, images: bool = False) -> None:
    """Write both encoders with random weights, ready for `load_text_embedder`.

    With `images` they are for text to image and, through a vision tower, for editing images.
    """
    contents = IMAGE_CONTENTS if images else VIDEO_CONTENTS
    qwen_tokenizer, clip_tokenizer = build_tokenizers(captions, out_dir, contents)
    # 0.08 is about 1 / sqrt(hidden_size): with the usual 0.02 so few and narrow layers would hardly do anything.
    qwen_config = _full_config(
        {
            "vocab_size": len(qwen_tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "max_window_layers": 2,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.08,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": qwen_tokenizer.eos_token_id,
            "pad_token_id": None,
            "dtype": "bfloat16",
        },
        {**TINY_VISION, "out_hidden_size": 128, "initializer_range": 0.125} if images else None,
        qwen_tokenizer,
    )
    clip_config = CLIPTextConfig(
        architectures=["CLIPTextModel"],
        vocab_size=len(clip_tokenizer),
        hidden_size=128,
        intermediate_size=256,
        projection_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_MAX_LENGTH,
        initializer_factor=4.0,  # times 0.02, for the same reason
        pad_token_id=clip_tokenizer.pad_token_id,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        qwen = Qwen2_5_VLModel(qwen_config) if images else Qwen2_5_VLTextModel(qwen_config.text_config)
        clip = CLIPTextModel(clip_config)
        if images:  # 1176 numbers come into a patch, and 1 / sqrt of that keeps what comes out near 1
            torch.nn.init.normal_(qwen.visual.patch_embed.proj.weight, std=1176**-0.5)
    visual = qwen.visual if images else None
    _write_weights(qwen.language_model if images else qwen, visual, clip, out_dir, torch.bfloat16)
    for config, folder in ((qwen_config, QWEN_FOLDER), (clip_config, CLIP_FOLDER)):
        config.save_pretrained(out_dir / folder)
    if images:
        Qwen2VLImageProcessorPil().save_pretrained(out_dir / QWEN_FOLDER)  # its defaults are those published


def save_text_encoders(embedder: TextEmbedder, out_dir: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write both encoders under `out_dir` with the published key names; it may be the folder they came from.

    What the embedder does not have, it does not write: one that was loaded without the vision tower would leave a
    folder without it.
    """
    visual = embedder.qwen.visual if isinstance(embedder.qwen, Qwen) else None
    _write_weights(embedder.language_model, visual, embedder.clip, out_dir, dtype)
    text = asdict(embedder.language_model.config)
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta"), "mrope_section": text.pop("mrope_section")}
    text |= {"rope_parameters": rope, "dtype": str(dtype).removeprefix("torch."), "bos_token_id": None}
    text |= {"eos_token_id": embedder.qwen_tokenizer.eos_token_id}
    vision = asdict(visual.config) if visual is not None else None
    clip = asdict(embedder.clip.config) | {"projection_dim": embedder.clip.config.hidden_size}
    clip |= {name: getattr(embedder.clip_tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
    _full_config(text, vision, embedder.qwen_tokenizer).save_pretrained(out_dir / QWEN_FOLDER)
    CLIPTextConfig(**clip, architectures=["CLIPTextModel"]).save_pretrained(out_dir / CLIP_FOLDER)
    for folder, tokenizer, name in (
        (QWEN_FOLDER, embedder.qwen_tokenizer, "Qwen2Tokenizer"),
        (CLIP_FOLDER, embedder.clip_tokenizer, "CLIPTokenizer"),
    ):
        tokenizer.backend.save(str(out_dir / folder / "tokenizer.json"))
        told = {"tokenizer_class": name, "padding_side": "right", **tokenizer.special}
        (out_dir / folder / "tokenizer_config.json").write_text(json.dumps(told, indent=2) + "\n")
    if embedder.image_processor is not None:
        told = {"image_processor_type": "Qwen2VLImageProcessor", **asdict(embedder.image_processor)}
        (out_dir / QWEN_FOLDER / "preprocessor_config.json").write_text(json.dumps(told, indent=2) + "\n")


def _write_weights(
    language_model: nn.Module, visual: nn.Module | None, clip: nn.Module, out_dir: Path, dtype: torch.dtype
) -> None:
    # The published names are those of an older transformers: `model.` for the language model, `visual.` for the tower.
    tensors = {f"model.{name}": tensor for name, tensor in language_model.named_parameters()}
    if visual is not None:
        tensors |= {f"visual.{name}": tensor for name, tensor in visual.named_parameters()}
    clip_tensors = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in clip.named_parameters()}
    for folder, named in ((out_dir / QWEN_FOLDER, tensors), (out_dir / CLIP_FOLDER, clip_tensors)):
        folder.mkdir(parents=True, exist_ok=True)
        saved = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in named.items()}
        _replace_safetensors(saved, folder / "model.safetensors")


def _full_config(
    text: Mapping[str, Any], vision: Mapping[str, Any] | None, tokenizer: PreTrainedTokenizerBase | Tokenizer
) -> Qwen2_5_VLConfig:
    """The config of a whole Qwen2.5-VL from its two sections; None where there is no vision tower."""
    return Qwen2_5_VLConfig(
        text_config=dict(text),
        vision_config=dict(vision) if vision else {**NO_VISION, "out_hidden_size": text["hidden_size"]},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )


def _replace_safetensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    # Under another name first: the model in memory may still be mapped to the file that is replaced.
    temporary = path.with_suffix(".tmp")
    save_file(dict(tensors), temporary, metadata={"format": "pt"})
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the tiny text encoders from a file with one caption a line.")
    parser.add_argument("--captions", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", action="store_true", help="for text to image and image editing, not for videos")
    arguments = parser.parse_args()
    captions = arguments.captions.read_text(encoding="utf-8").splitlines()
    make_text_encoders(captions, arguments.out, arguments.seed, images=arguments.images)
    qwen_tokenizer = Qwen2Tokenizer.from_pretrained(arguments.out / QWEN_FOLDER)
    for content in IMAGE_CONTENTS if arguments.images else VIDEO_CONTENTS:
        print(f"model.text_embedder.qwen.crop ({content}): {prefix_length(qwen_tokenizer, get_template(content))}")


if __name__ == "__main__":
    main()
