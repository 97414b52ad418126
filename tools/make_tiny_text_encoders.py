"""Build the tiny text encoders of the tiny checkpoints: two tokenizers trained on captions, two small random models.

The folders look like the real ones (`text_encoder/`, `text_encoder2/`, each with config.json, model.safetensors and
the tokenizer's files), and `load_text_embedder` reads them through the same code. Sizes differ, and the tokenizers:
they know every byte, and as whole words those of the captions and of the video template, so that the template's prefix
is short. Its length goes into the config as `model.text_embedder.qwen.crop`; the command prints it.

    python -m tools.make_tiny_text_encoders --captions captions.txt --out assets/tiny/t2v --seed 0
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
)

from kandinsky.models.text_embedder import TextEmbedder
from kandinsky.prompts import get_template, prefix_length

QWEN_FOLDER, CLIP_FOLDER = "text_encoder", "text_encoder2"
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")  # the last id is end-of-text, as in the real vocabulary
QWEN_VOCAB_SIZE = 768
CLIP_VOCAB_SIZE = 768  # 512 of them bytes, in the middle and at the end of a word: no text is unknown
CLIP_MAX_LENGTH = 32


def _bpe(
    texts: Iterable[str], like: PreTrainedTokenizerBase, vocab_size: int, special: tuple[str, ...], suffix: str = ""
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE; `like` gives normalisation and the cutting into words."""
    # The alphabet is written down and not left to the trainer, which would only know the endings it has seen.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + ([letter + suffix for letter in alphabet] if suffix else [])

    trainer_side = Tokenizer(models.BPE(end_of_word_suffix=suffix))
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


def build_tokenizers(captions: list[str], out_dir: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Train and save a Qwen2-style and a CLIP-style tokenizer; returns both."""
    template_words = re.sub(r"<\|.*?\|>", "", get_template("video").text.replace("{}", ""))
    vocab, merges = _bpe([*captions, template_words], Qwen2Tokenizer(), QWEN_VOCAB_SIZE, QWEN_SPECIAL)
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


def make_text_encoders(captions: list[str], out_dir: Path, seed: int) -> None:
    """Write both encoders with random weights, ready for `load_text_embedder`."""
    qwen_tokenizer, clip_tokenizer = build_tokenizers(captions, out_dir)
    # 0.08 is about 1 / sqrt(hidden_size): with the usual 0.02 so few and narrow layers would hardly do anything.
    qwen_config = Qwen2_5_VLConfig(
        text_config={
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
        }
    ).text_config
    clip_config = CLIPTextConfig(
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
        qwen, clip = Qwen2_5_VLTextModel(qwen_config), CLIPTextModel(clip_config)
    embedder = TextEmbedder(
        qwen,
        clip,
        qwen_tokenizer,
        clip_tokenizer,
        qwen_max_length=256,
        clip_max_length=CLIP_MAX_LENGTH,
        crop=prefix_length(qwen_tokenizer, get_template("video")),
    )
    save_text_encoders(embedder, out_dir)


def save_text_encoders(embedder: TextEmbedder, out_dir: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write both encoders under `out_dir` with the published key names; it may be the folder they came from."""
    qwen_config = embedder.qwen.config
    full_config = Qwen2_5_VLConfig(
        text_config={**qwen_config.to_dict(), "dtype": str(dtype).removeprefix("torch.")},
        # There is no vision tower; its section only makes the file read as what it is, a Qwen2.5-VL.
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": qwen_config.hidden_size,
            "fullatt_block_indexes": [0],
        },
        image_token_id=embedder.qwen_tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=embedder.qwen_tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        vision_start_token_id=embedder.qwen_tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=embedder.qwen_tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )
    clip_config = CLIPTextConfig.from_dict({**embedder.clip.config.to_dict(), "architectures": ["CLIPTextModel"]})

    for folder, prefix, model, config, tokenizer in (
        (out_dir / QWEN_FOLDER, "model.", embedder.qwen, full_config, embedder.qwen_tokenizer),
        (out_dir / CLIP_FOLDER, "text_model.", embedder.clip, clip_config, embedder.clip_tokenizer),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        tensors = {
            prefix + name.removeprefix(prefix): tensor.detach().to("cpu", dtype).contiguous()
            for name, tensor in model.named_parameters()
        }
        _replace_safetensors(tensors, folder / "model.safetensors")


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
    arguments = parser.parse_args()
    captions = arguments.captions.read_text(encoding="utf-8").splitlines()
    make_text_encoders(captions, arguments.out, arguments.seed)
    qwen_tokenizer = Qwen2Tokenizer.from_pretrained(arguments.out / QWEN_FOLDER)
    print(f"model.text_embedder.qwen.crop: {prefix_length(qwen_tokenizer, get_template('video'))}")


if __name__ == "__main__":
    main()
