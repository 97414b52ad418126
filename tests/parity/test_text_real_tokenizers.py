"""What the published tokenizers and image processor make of the published templates and of pictures.

Their files (12 MB) are not part of this repository. The folder of a diffusers-format repository, weights not needed, is
looked for in the environment variable KANDINSKY_HUB_LAYOUT and beside this checkout. Where Qwen itself has to run, it
is a small one with random weights behind the published vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
)

from kandinsky.loading.text_encoders import _QWEN_PREFIXES, _own_name, load_text_embedder
from kandinsky.loading.text_files import load_tokenizer
from kandinsky.text.embedder import TextEmbedder
from kandinsky.text.prompts import check_prefix, default_negative_caption, get_template, prefix_length, tokenize_prompts


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


@pytest.fixture(scope="module")
def small_qwen(hub_layout: Path) -> Qwen2_5_VLForConditionalGeneration:
    """As published but for its sizes: windows in the vision tower, multimodal rotary positions, the vocabulary."""
    config = Qwen2_5_VLConfig.from_pretrained(hub_layout / "text_encoder").to_dict()
    config["text_config"] |= {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_window_layers": 2,
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": config["text_config"]["rope_parameters"] | {"mrope_section": [4, 6, 6]},
    }
    config["vision_config"] |= {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    }
    torch.manual_seed(0)
    qwen = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).float().eval()
    for name, parameter in qwen.named_parameters():  # large enough for attention to look at one place and not another
        is_norm = "norm" in name or "ln_q" in name
        torch.nn.init.normal_(parameter, mean=1.0 if is_norm else 0.0, std=0.2)
    return qwen


@pytest.fixture(scope="module")
def editor(
    hub_layout: Path, small_qwen: Qwen2_5_VLForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory
) -> TextEmbedder:
    """The small Qwen through our loader, beside the published tokenizers and preprocessor_config.json."""
    folder = tmp_path_factory.mktemp("small")
    small_qwen.save_pretrained(folder / "text_encoder")
    clip_config = CLIPTextConfig(
        vocab_size=49408, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    CLIPTextModel(clip_config).save_pretrained(folder / "text_encoder_2")
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).symlink_to(hub_layout / name)
    return load_text_embedder(
        folder / "text_encoder",
        folder / "text_encoder_2",
        qwen_max_length=512,
        clip_max_length=77,
        dtype=torch.float32,
        content="image_edit",
        vision=True,
    )


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("width", "height", "count"),
    [
        (1024, 1024, 324),
        (640, 1408, 275),
        (1408, 640, 275),
        (768, 1280, 322),
        (1280, 768, 322),
        (896, 1152, 336),
        (1152, 896, 336),
    ],
)
def test_tokens_of_pictures(editor: TextEmbedder, width: int, height: int, count: int) -> None:
    image = Image.new("RGB", (width // 2, height // 2))  # Qwen sees half of each side
    # "make it red" is three tokens and the crop takes three, so that the picture, its two brackets and the end remain.
    assert editor.encode(["make it red"], "image_edit", [image]).text_embeds.shape[1] == count + 3
    # Without words the crop takes <|vision_start|> and two of the picture's tokens.
    assert editor.encode([""], "image_edit", [image]).text_embeds.shape[1] == count - 2 + 2


def test_a_picture_of_full_hd_is_refused_only_where_it_is_too_large(editor: TextEmbedder) -> None:
    assert editor.encode(["make it red"], "image_edit", [Image.new("RGB", (960, 540))]).text_embeds.shape[1] == 646 + 3
    with pytest.raises(ValueError, match=r"make 1947 tokens, 1944 of them the picture's"):
        editor.encode(["make it red"], "image_edit", [Image.new("RGB", (1500, 1000))])


@torch.no_grad()
def test_hidden_states_with_a_picture_equal_transformers(
    editor: TextEmbedder, small_qwen: Qwen2_5_VLForConditionalGeneration, qwen_tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = ["make it red", "", "turn the little fox by the river into a blue bird, and leave the river as it is"]
    pictures = [noise(320, 512), noise(512, 512), noise(84, 140)]
    template = get_template("image_edit")
    rows = editor.encode(prompts, "image_edit", pictures).unbind()
    for prompt, image, row in zip(prompts, pictures, rows, strict=True):
        pixels = editor.image_processor(images=[image], return_tensors="pt")
        pads = "<|image_pad|>" * (int(pixels["image_grid_thw"].prod()) // 4)
        text = f"{template.text.format(prompt)}<|vision_start|>{pads}<|vision_end|><|im_end|>"
        ids = torch.tensor(qwen_tokenizer([text])["input_ids"])
        theirs = small_qwen(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == 151655).int(),
            output_hidden_states=True,
            **pixels,
        ).hidden_states[-1][:, 55:]
        assert theirs.shape == row.text_embeds.shape and theirs.std() > 0.01
        assert (theirs - row.text_embeds).abs().max() <= 1e-5
        # The positions of the picture are its own, and not those of a text as long.
        as_text = small_qwen.model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None], **pixels)
        assert (as_text.last_hidden_state[:, 55:] - row.text_embeds).abs().max() > 0.1


def test_the_published_index_has_every_tensor_and_none_besides_the_head(hub_layout: Path) -> None:
    index = json.loads((hub_layout / "text_encoder" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        qwen = Qwen2_5_VLModel(Qwen2_5_VLConfig.from_pretrained(hub_layout / "text_encoder"))
    wanted = {_own_name(name, _QWEN_PREFIXES) for name, _ in qwen.named_parameters()}
    assert {_own_name(key, _QWEN_PREFIXES) for key in index["weight_map"]} - wanted == {"lm_head.weight"}
    assert wanted <= {_own_name(key, _QWEN_PREFIXES) for key in index["weight_map"]}


def test_ours_equal_the_published(hub_layout: Path, qwen_tokenizer: PreTrainedTokenizerBase) -> None:
    """Qwen's from vocab.json and merges.txt, CLIP's from tokenizer.json, as those repositories have them."""
    clip = AutoTokenizer.from_pretrained(hub_layout / "tokenizer_2", local_files_only=True)
    texts = [
        get_template("video").text,
        "don't 1234 Ünïcode — 日本 🦊 e\u0301",
        " \n\n two  spaces\t",
        "",
        "<|im_end|>x",
    ]
    for kind, folder, theirs in (("qwen", "tokenizer", qwen_tokenizer), ("clip", "tokenizer_2", clip)):
        ours = load_tokenizer(hub_layout / folder, "-", kind)
        assert len(ours) == len(theirs) and ours.pad_token_id == theirs.pad_token_id
        assert ours(texts)["input_ids"] == theirs(texts)["input_ids"]


def test_clip_tokenizer_and_configs(hub_layout: Path, qwen_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = AutoTokenizer.from_pretrained(hub_layout / "tokenizer_2", local_files_only=True)
    row = tokenizer([""], padding="max_length", truncation=True, max_length=77)["input_ids"][0]
    assert row == [49406] + [49407] * 76
    assert len(tokenizer) == CLIPTextConfig.from_pretrained(hub_layout / "text_encoder_2").vocab_size
    config = Qwen2_5_VLConfig.from_pretrained(hub_layout / "text_encoder").text_config
    assert (config.hidden_size, config.num_hidden_layers, config.rope_parameters["rope_theta"]) == (3584, 28, 1e6)
    assert len(qwen_tokenizer) <= config.vocab_size
