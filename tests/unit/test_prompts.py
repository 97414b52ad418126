"""Templates, tokenisation and the prefix check, with a tokenizer of words that needs no files."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys

import pytest

from kandinsky.text.prompts import (
    check_prefix,
    default_negative_caption,
    get_template,
    prefix_length,
    render,
    tokenize_prompts,
)


class WordTokenizer:
    """One token a word, ids in order of appearance."""

    pad_token_id = 0

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        rows = [text.replace("\n", " \n ").replace("<|", " <|").replace("|>", "|> ").split(" ") for text in texts]
        return {"input_ids": [[self.ids.setdefault(w, len(self.ids) + 1) for w in row if w] for row in rows]}


VIDEO = get_template("video")


@pytest.mark.parametrize("content", ["video", "image", "image_edit"])
def test_the_words_are_the_published_ones(content: str) -> None:
    template = get_template(content)
    assert hashlib.sha256(template.text.encode()).hexdigest() == template.sha256
    assert template.text.count("{}") == 1
    published = {
        "video": ("09efacd0", "c993c3bc"),
        "image": ("04de998d", "ccdff04f"),
        "image_edit": ("8cd783f4", "757db9"),
    }
    assert template.sha256.startswith(published[content][0]) and template.sha256.endswith(published[content][1])


def test_published_crops() -> None:
    crops = {
        name: (get_template(name).crop, get_template(name).prefix_tokens) for name in ("video", "image", "image_edit")
    }
    assert crops == {"video": (129, 129), "image": (41, 41), "image_edit": (55, 52)}


def test_unknown_content_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'audio'.*video, image, image_edit"):
        get_template("audio")


def test_render_puts_the_prompt_in_its_slot_and_leaves_braces_alone() -> None:
    text = render(VIDEO, "a {red} {} fox {0}")
    assert text.startswith(VIDEO.prefix + "a {red} {} fox {0}<|im_end|>") and text.endswith("<|im_end|>")


def test_render_makes_room_for_every_image_behind_the_words() -> None:
    edit = get_template("image_edit")
    pads = "<|image_pad|>" * 3
    assert render(edit, "make it red", [3, 1]) == (
        f"{edit.prefix}make it red<|vision_start|>{pads}<|vision_end|>"
        "<|vision_start|><|image_pad|><|vision_end|><|im_end|>"
    )
    assert render(edit, "make it red").endswith("user\nmake it red<|im_end|>")


def test_default_negative_caption() -> None:
    assert default_negative_caption().startswith("Static, 2D cartoon") and default_negative_caption("image") == ""


def test_pads_on_the_right_to_the_longest_only() -> None:
    tokenizer = WordTokenizer()
    crop = prefix_length(tokenizer, VIDEO)
    tokens = tokenize_prompts(tokenizer, ["one", "one two three"], VIDEO, 256, crop)
    assert [len(row) for row in tokens.input_ids] == [crop + 4, crop + 4]
    assert [row[crop:] for row in tokens.attention_mask] == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert tokens.input_ids[0][-2:] == [0, 0] and tokens.input_ids[0][crop] == tokens.input_ids[1][crop]


def test_truncates_at_crop_plus_max_length_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = WordTokenizer()
    crop = prefix_length(tokenizer, VIDEO)
    with caplog.at_level(logging.WARNING):
        tokens = tokenize_prompts(tokenizer, ["a b c d e f", "a"], VIDEO, 4, crop)
    assert tokens.input_ids[0][crop:] == [tokenizer.ids[word] for word in "abcd"]
    assert len(caplog.records) == 1 and "3 of its 7 tokens" in caplog.text
    caplog.clear()
    assert len(tokenize_prompts(tokenizer, ["a b c d e f"], VIDEO, None, crop).input_ids[0]) == crop + 7
    assert not caplog.records


def test_with_pictures_nothing_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, edit = WordTokenizer(), get_template("image_edit")
    crop = prefix_length(tokenizer, edit)
    tokens = tokenize_prompts(tokenizer, ["make it red", "a b c d e f"], edit, 4, crop, image_tokens=[5, 1])
    assert [sum(mask[crop:]) for mask in tokens.attention_mask] == [3 + 1 + 5 + 1 + 1, 6 + 1 + 1 + 1 + 1]
    assert [row.count(tokenizer.ids["<|image_pad|>"]) for row in tokens.input_ids] == [5, 1]
    assert not caplog.records


def test_a_prompt_cannot_pass_for_a_picture() -> None:
    tokenizer, edit = WordTokenizer(), get_template("image_edit")
    with pytest.raises(ValueError, match=r"'a <\|image_pad\|>' has .* stands for a picture"):
        tokenize_prompts(tokenizer, ["red", "a <|image_pad|>"], edit, None, 3, image_tokens=[1, 1])


def test_an_empty_prompt_keeps_the_closing_token() -> None:
    tokenizer = WordTokenizer()
    crop = prefix_length(tokenizer, VIDEO)
    assert tokenize_prompts(tokenizer, [""], VIDEO, 256, crop).input_ids[0][crop:] == [tokenizer.ids["<|im_end|>"]]


def test_nothing_left_after_the_crop_is_an_error() -> None:
    tokenizer = WordTokenizer()
    with pytest.raises(ValueError, match="nothing is left"):
        tokenize_prompts(tokenizer, [""], VIDEO, 256, prefix_length(tokenizer, VIDEO) + 1)


@pytest.mark.parametrize("prompts", ["a bare string", []])
def test_prompts_must_be_a_list(prompts: object) -> None:
    with pytest.raises(ValueError, match="non-empty list"):
        tokenize_prompts(WordTokenizer(), prompts, VIDEO, 256, 10)


def test_a_prefix_of_another_length_is_an_error_that_says_what_to_do() -> None:
    tokenizer = WordTokenizer()
    found = prefix_length(tokenizer, VIDEO)
    assert found not in (0, 129)
    with pytest.raises(
        ValueError, match=rf"{found} tokens.*129 are expected.*model.text_embedder.qwen.crop to {found}"
    ):
        check_prefix(tokenizer, VIDEO)
    with pytest.raises(ValueError, match="shifted text"):
        check_prefix(tokenizer, VIDEO, crop=found - 1)
    check_prefix(tokenizer, VIDEO, crop=found)


def test_import_brings_no_torch() -> None:
    use = "import sys, kandinsky.text.prompts as prompts; prompts.get_template('video')"
    code = f"{use}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
