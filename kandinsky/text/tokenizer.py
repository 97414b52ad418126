"""Words to token ids and back: a thin layer over the `tokenizers` library, and the two published ways of cutting text.

`Tokenizer` is called as transformers' tokenizers are, so that one of those can stand in its place. Knows no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

# How Qwen2 and CLIP cut text into words before bytes are merged, from their tokenizer.json.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

Kind = Literal["qwen", "clip"]
# Special tokens that a folder without a word about them has.
SPECIAL: dict[Kind, dict[str, str]] = {
    "qwen": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "clip": {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
}


class Tokenizer:
    """Token ids of texts.

    Args:
        backend: does the work.
        special: which tokens are the `bos_token`, `eos_token` and `pad_token`, where there are any.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special: Mapping[str, str]) -> None:
        backend.no_padding()  # a file says what its last user had set
        backend.no_truncation()
        self.backend = backend
        self.special = dict(special)
        self.padding_side = "right"
        ids = {name: self.convert_tokens_to_ids(token) for name, token in special.items()}
        self.bos_token_id, self.eos_token_id = ids.get("bos_token"), ids.get("eos_token")
        self.pad_token_id = ids.get("pad_token")

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def __call__(
        self,
        texts: Sequence[str],
        padding: Literal[False, "max_length"] = False,
        truncation: bool = False,
        max_length: int | None = None,
    ) -> dict[str, list[list[int]]]:
        """`input_ids` of each text, cut and filled up on the right to `max_length` where that is asked for.

        What is cut off is words: begin and end stay.
        """
        rows = [encoding.ids for encoding in self.backend.encode_batch(list(texts))]
        if truncation and max_length is not None:
            ends = self.backend.num_special_tokens_to_add(is_pair=False) > 0
            rows = [[*row[: max_length - 1], row[-1]] if ends and len(row) > max_length else row for row in rows]
            rows = [row[:max_length] for row in rows]
        if padding == "max_length" and max_length is not None:
            rows = [row + [self.pad_token_id or 0] * (max_length - len(row)) for row in rows]
        return {"input_ids": rows}

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return self.backend.decode([int(one) for one in ids], skip_special_tokens=skip_special_tokens)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of a token; None where there is no such token."""
        return self.backend.token_to_id(token)


def from_vocabulary(kind: Kind, vocabulary: str, merges: str) -> tokenizers.Tokenizer:
    """The tokenizer that Qwen2's or CLIP's vocab.json and merges.txt (paths) stand for, without added tokens."""
    if kind == "qwen":
        backend = tokenizers.Tokenizer(models.BPE.from_file(vocabulary, merges))
        backend.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    else:
        end = SPECIAL["clip"]["eos_token"]
        backend = tokenizers.Tokenizer(
            models.BPE.from_file(vocabulary, merges, end_of_word_suffix="</w>", unk_token=end)
        )
        backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        words = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        both = [SPECIAL["clip"][name] for name in ("eos_token", "bos_token")]
        eos, bos = ((token, backend.get_vocab()[token]) for token in both)
        backend.post_processor = processors.RobertaProcessing(eos, bos, trim_offsets=False, add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend
