"""What the published tokenizers make of the published templates.

The tokenizers (12 MB) are not part of this repository. The folder of a diffusers-format repository, weights not needed,
is looked for in the environment variable KANDINSKY_HUB_LAYOUT and beside this checkout.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer, CLIPTextConfig, PreTrainedTokenizerBase, Qwen2_5_VLConfig

from kandinsky.prompts import (
    check_prefix,
    default_negative_caption,
    get_template,
    prefix_length,
    tokenize_prompts,
)


@pytest.fixture(scope="module")
def hub_layout() -> Path:
    beside = Path(__file__).parents[3] / "shared" / "reference" / "hub_layout"
    folder = Path(os.environ.get("KANDINSKY_HUB_LAYOUT", beside))
    if not (folder / "tokenizer" / "vocab.json").is_file():
        pytest.skip(f"the published tokenizers are not in {folder}; set KANDINSKY_HUB_LAYOUT to a folder that has them")
    return folder


@pytest.fixture(scope="module")
def qwen_tokenizer(hub_layout: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(hub_layout / "tokenizer", local_files_only=True)


@pytest.mark.parametrize(("content", "length"), [("video", 129), ("image", 41), ("image_edit", 52)])
def test_prefix_lengths(qwen_tokenizer: PreTrainedTokenizerBase, content: str, length: int) -> None:
    template = get_template(content)
    assert hashlib.sha256(template.text.encode()).hexdigest() == template.sha256
    assert prefix_length(qwen_tokenizer, template) == length
    check_prefix(qwen_tokenizer, template)
    check_prefix(qwen_tokenizer, template, template.crop)  # the same number written into a config is no custom crop


def test_corrected_spelling_would_shift_the_text(qwen_tokenizer: PreTrainedTokenizerBase) -> None:
    template = get_template("video")
    corrected = dataclasses.replace(template, text=template.text.replace("promt", "prompt"))
    with pytest.raises(ValueError, match="has 128 tokens before the prompt, but 129"):
        check_prefix(qwen_tokenizer, corrected)


@pytest.mark.parametrize("content", ["video", "image"])
@pytest.mark.parametrize("prompt", ["a red fox", "A", " leading space", "3 cats", "日本", "!", "'s", "\nnew line"])
def test_no_prompt_merges_into_the_prefix(qwen_tokenizer: PreTrainedTokenizerBase, content: str, prompt: str) -> None:
    template = get_template(content)
    row = tokenize_prompts(qwen_tokenizer, [prompt], template, 256, template.crop).input_ids[0]
    assert qwen_tokenizer.decode(row[template.crop :]) == prompt.removeprefix("\n") + "<|im_end|>"


@pytest.mark.parametrize("content", ["video", "image"])
def test_an_empty_prompt_keeps_one_token(qwen_tokenizer: PreTrainedTokenizerBase, content: str) -> None:
    template = get_template(content)
    row = tokenize_prompts(qwen_tokenizer, [""], template, 256, template.crop).input_ids[0]
    assert qwen_tokenizer.convert_ids_to_tokens(row[template.crop :]) == ["<|im_end|>"]


def test_default_negative_keeps_32_tokens(qwen_tokenizer: PreTrainedTokenizerBase) -> None:
    template = get_template("video")
    tokens = tokenize_prompts(qwen_tokenizer, [default_negative_caption(), ""], template, 256, template.crop)
    assert [sum(mask[template.crop :]) for mask in tokens.attention_mask] == [32, 1]


def test_image_edit_loses_three_tokens_as_published(qwen_tokenizer: PreTrainedTokenizerBase) -> None:
    template = get_template("image_edit")
    row = tokenize_prompts(qwen_tokenizer, ["one two three four five"], template, None, template.crop).input_ids[0]
    assert qwen_tokenizer.decode(row[template.crop :]) == " four five<|im_end|>"


def test_clip_tokenizer_and_configs(hub_layout: Path, qwen_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = AutoTokenizer.from_pretrained(hub_layout / "tokenizer_2", local_files_only=True)
    row = tokenizer([""], padding="max_length", truncation=True, max_length=77)["input_ids"][0]
    assert row == [49406] + [49407] * 76
    assert len(tokenizer) == CLIPTextConfig.from_pretrained(hub_layout / "text_encoder_2").vocab_size
    config = Qwen2_5_VLConfig.from_pretrained(hub_layout / "text_encoder").text_config
    assert (config.hidden_size, config.num_hidden_layers, config.rope_parameters["rope_theta"]) == (3584, 28, 1e6)
    assert len(qwen_tokenizer) <= config.vocab_size
