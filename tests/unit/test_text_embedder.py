"""The text encoders: what is loaded from which file layout, and that padding and batching change nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
)

from kandinsky.loading.text_encoders import load_text_embedder, text_encoder_files
from kandinsky.text.embedder import TextEmbedder
from kandinsky.text.embeddings import TextEmbeddings
from kandinsky.text.prompts import get_template, prefix_length
from tools.make_tiny_text_encoders import make_text_encoders, save_text_encoders

CAPTIONS = [
    f"a {colour} {shape} moves {motion}"
    for colour in ("red", "green", "blue")
    for shape in ("circle", "square")
    for motion in ("left", "right", "in a circle")
]
PROMPTS = ["a red circle moves left", "", "a green square moves in a circle, then left, then right again"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_text_encoders(CAPTIONS, folder, seed=0)
    return folder


def crop_of(folder: Path, content: str = "video") -> int:
    return prefix_length(Qwen2Tokenizer.from_pretrained(folder / "text_encoder"), get_template(content))


def load(folder: Path, content: str = "video", **options: Any) -> TextEmbedder:
    defaults = {"qwen_max_length": 64, "clip_max_length": 32, "crop": crop_of(folder, content), "dtype": torch.float32}
    return load_text_embedder(
        folder / "text_encoder", folder / "text_encoder2", content=content, **(defaults | options)
    )


@pytest.fixture(scope="module")
def embedder(tiny: Path) -> TextEmbedder:
    return load(tiny)


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "copy")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


EDITS = ["make it red", "", "move the blue square to the left, then to the right, then make it red"]
PICTURES = [picture(64, 64), picture(140, 90), picture(56, 84)]


@pytest.fixture(scope="module")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for text to image and for editing images."""
    folder = tmp_path_factory.mktemp("tiny_images")
    make_text_encoders([*CAPTIONS, *EDITS], folder, seed=0, images=True)
    return folder


@pytest.fixture(scope="module")
def editor(tiny_images: Path) -> TextEmbedder:
    return load(tiny_images, "image_edit", vision=True)


@pytest.fixture
def images_copy(tiny_images: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_images, tmp_path / "images_copy")


def full_models(folder: Path) -> tuple[Qwen2_5_VLForConditionalGeneration, CLIPModel]:
    """Full models (vision tower and head included) around the folder's configs, with random weights."""
    torch.manual_seed(1)
    qwen_config = Qwen2_5_VLConfig.from_pretrained(folder / "text_encoder")
    text_config = json.loads((folder / "text_encoder2" / "config.json").read_text())
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    clip_config = CLIPConfig(text_config=text_config, vision_config=vision, projection_dim=16)
    qwen = Qwen2_5_VLForConditionalGeneration(qwen_config).float().eval()
    for name, parameter in qwen.named_parameters():  # norms and biases too: a weight that stays 0 or 1 proves nothing
        is_norm = "norm" in name or "ln_q" in name
        torch.nn.init.normal_(parameter, mean=1.0 if is_norm else 0.0, std=0.1)
    return qwen, CLIPModel(clip_config).eval()


def old_style(name: str) -> str:
    """The published checkpoints' name of a tensor that transformers 5 calls `name`."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


KEY_STYLES = {
    "published": old_style,
    "transformers 5": lambda name: name,
    "without model": lambda name: name.removeprefix("model."),
    "bare": lambda name: name.replace("model.language_model.", ""),
}


@torch.no_grad()
@pytest.mark.parametrize("style", KEY_STYLES)
def test_every_key_style_loads_with_the_vision_tower_and_equals_the_full_model(images_copy: Path, style: str) -> None:
    qwen, _ = full_models(images_copy)
    tensors = {KEY_STYLES[style](name): tensor.clone() for name, tensor in qwen.state_dict().items()}
    assert any("visual" in key for key in tensors) and "lm_head.weight" in tensors
    save_file(tensors, images_copy / "text_encoder" / "model.safetensors")
    embedder = load(images_copy, "image_edit", vision=True)
    template = get_template("image_edit")
    for prompt, image in zip(EDITS, PICTURES, strict=True):
        pixels = embedder.image_processor(images=[image], return_tensors="pt")
        count = int(pixels["image_grid_thw"].prod()) // 4
        text = f"{template.prefix}{prompt}<|vision_start|>{'<|image_pad|>' * count}<|vision_end|><|im_end|>"
        ids = torch.tensor(embedder.qwen_tokenizer([text])["input_ids"])
        theirs = qwen(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == qwen.config.image_token_id).int(),
            output_hidden_states=True,
            **pixels,
        ).hidden_states[-1][:, embedder.crop("image_edit") :]
        ours = embedder.encode([prompt], "image_edit", [image]).text_embeds
        assert theirs.std() > 0.01 and ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("style", KEY_STYLES)
@pytest.mark.parametrize("sharded", [False, True])
def test_every_key_style_loads_and_equals_the_full_model(copy: Path, style: str, sharded: bool) -> None:
    qwen, clip = full_models(copy)
    tensors = {KEY_STYLES[style](name): tensor.clone() for name, tensor in qwen.state_dict().items()}
    assert any("visual" in key for key in tensors) and "lm_head.weight" in tensors
    folder = copy / "text_encoder"
    if sharded:
        (folder / "model.safetensors").unlink()
        keys = sorted(tensors)
        parts = [keys[::2], keys[1::2]]
        weight_map = {}
        for number, part in enumerate(parts, start=1):
            file = f"model-{number:05}-of-00002.safetensors"
            save_file({key: tensors[key] for key in part}, folder / file)
            weight_map |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        save_file(tensors, folder / "model.safetensors")
    clip_prefix = "" if style == "bare" else "text_model."  # a CLIPTextModel saved alone, or a full CLIPModel
    clip_tensors = {
        clip_prefix + key.removeprefix("text_model.") if key.startswith("text_model.") else key: tensor.clone()
        for key, tensor in clip.state_dict().items()
    }
    assert any(key.startswith("vision_model.") for key in clip_tensors)
    save_file(clip_tensors, copy / "text_encoder2" / "model.safetensors")

    embedder = load(copy)
    ids = torch.randint(0, 250, (2, 40))
    ours = embedder.qwen(ids)
    theirs = qwen.model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    assert theirs.std() > 0.01 and (ours - theirs).abs().max() <= 1e-6
    clip_ids = torch.tensor(embedder.clip_tokenizer(PROMPTS, padding="max_length", max_length=32)["input_ids"])
    theirs = clip.text_model(input_ids=clip_ids).pooler_output
    assert (embedder.clip(clip_ids)[1] - theirs).abs().max() <= 1e-6


def test_flat_config_of_older_files_reads_the_same(copy: Path, embedder: TextEmbedder) -> None:
    path = copy / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    for key in ("model_type", "dtype", "layer_types"):
        del text[key]
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    path.write_text(json.dumps(config | text | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}))
    found, expected = load(copy).encode(PROMPTS), embedder.encode(PROMPTS)
    assert torch.equal(found.text_embeds, expected.text_embeds)


def test_only_the_text_parts_are_in_memory(embedder: TextEmbedder) -> None:
    names = list(dict(embedder.named_parameters()))
    assert names and not [name for name in names if "lm_head" in name or "vis" in name or "projection" in name]
    tensors = [*embedder.parameters(), *embedder.buffers()]
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in tensors)


def test_dtypes(tiny: Path) -> None:
    embedder = load(tiny, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in embedder.qwen.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in embedder.clip.parameters()} == {torch.float32}
    cos, _ = embedder.language_model.rotary_table(torch.arange(2000).expand(3, 1, -1), torch.float64)
    assert torch.equal(cos, cos.float().double())  # computed in float32 whatever the dtype
    embeddings = embedder.encode(["a red circle"])
    assert embeddings.text_embeds.dtype == torch.bfloat16 and embeddings.pooled_embeds.dtype == torch.float32


def test_shapes_and_mask(embedder: TextEmbedder) -> None:
    embeddings = embedder.encode(PROMPTS)
    batch, length, dim = embeddings.text_embeds.shape
    assert (batch, dim) == (3, 128) and embeddings.pooled_embeds.shape == (3, 128)
    assert embeddings.text_mask is not None and embeddings.text_mask.shape == (3, length)
    assert embeddings.text_mask.sum(dim=1).tolist()[1:] == [1, length]  # an empty prompt keeps one token


def test_a_batch_of_different_lengths_equals_single_prompts(embedder: TextEmbedder) -> None:
    together = embedder.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = embedder.encode([prompt])
        assert alone.text_mask is None
        length = alone.text_embeds.shape[1]
        assert (together.text_embeds[row, :length] - alone.text_embeds[0]).abs().max() <= 1e-5
        assert (together.pooled_embeds[row] - alone.pooled_embeds[0]).abs().max() <= 1e-5


@torch.no_grad()
def test_padding_masked_or_dropped_gives_the_same(tiny: Path, embedder: TextEmbedder) -> None:
    ids = torch.randint(0, 250, (1, 20))
    padded = torch.cat([ids, torch.full((1, 9), embedder.qwen_tokenizer.pad_token_id)], dim=1)
    mask = (torch.arange(29) < 20).long()[None]
    dropped = embedder.qwen(ids)
    theirs = Qwen2_5_VLTextModel.from_pretrained(tiny / "text_encoder", dtype=torch.float32)
    masked = theirs(input_ids=padded, attention_mask=mask).last_hidden_state[:, :20]
    unmasked = embedder.qwen(padded)[:, :20]
    assert (masked - dropped).abs().max() <= 1e-5 and (unmasked - dropped).abs().max() <= 1e-5


def test_the_prompt_matters(embedder: TextEmbedder) -> None:
    embeddings = embedder.encode(["a red circle moves left", "a red circle moves right"])
    assert (embeddings.text_embeds[0] - embeddings.text_embeds[1]).abs().max() > 0.1
    assert (embeddings.pooled_embeds[0] - embeddings.pooled_embeds[1]).abs().max() > 0.1


@torch.no_grad()
def test_clip_pools_at_the_first_end_of_text(embedder: TextEmbedder) -> None:
    row = embedder.clip_tokenizer([PROMPTS[0]], padding="max_length", max_length=32)["input_ids"][0]
    end = embedder.clip_tokenizer.eos_token_id
    assert row[0] == embedder.clip_tokenizer.bos_token_id and row.count(end) > 1
    states = embedder.clip(torch.tensor([row]))[0][0]
    assert torch.equal(embedder.encode(PROMPTS[:1]).pooled_embeds[0], states[row.index(end)])


def test_unbind_gives_every_prompt_without_its_padding(embedder: TextEmbedder) -> None:
    together = embedder.encode(PROMPTS)
    rows = together.unbind()
    assert together.text_mask is not None and len(rows) == 3 and all(row.text_mask is None for row in rows)
    assert [row.text_embeds.shape[1] for row in rows] == together.text_mask.sum(dim=1).tolist()
    for index, row in enumerate(rows):
        length = row.text_embeds.shape[1]
        assert torch.equal(row.text_embeds, together.text_embeds[index : index + 1, :length])
        assert torch.equal(row.pooled_embeds, together.pooled_embeds[index : index + 1])
    alike = TextEmbeddings(torch.rand(2, 3, 4), torch.rand(2, 5), None)
    assert [row.text_embeds.shape for row in alike.unbind()] == [(1, 3, 4)] * 2


def test_join_is_the_way_back_from_unbind(embedder: TextEmbedder) -> None:
    alone = [embedder.encode([prompt]) for prompt in PROMPTS]
    joined = TextEmbeddings.join(alone)
    assert joined.text_mask is not None
    assert joined.text_mask.sum(dim=1).tolist() == [one.text_embeds.shape[1] for one in alone]
    assert joined.text_embeds[~joined.text_mask].count_nonzero() == 0
    for row, one in zip(joined.unbind(), alone, strict=True):
        assert torch.equal(row.text_embeds, one.text_embeds) and torch.equal(row.pooled_embeds, one.pooled_embeds)
    assert TextEmbeddings.join(alone[:1]).text_mask is None
    again = TextEmbeddings.join([TextEmbeddings.join(alone[:2]), alone[2]])  # parts may be batches themselves
    assert torch.equal(again.text_embeds, joined.text_embeds) and torch.equal(again.text_mask, joined.text_mask)


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["masked", "unmasked"])
def test_embeddings_saved_and_loaded_are_the_same(tiny: Path, tmp_path: Path, prompts: list[str]) -> None:
    before = load(tiny, dtype=torch.bfloat16).encode(prompts)
    path = tmp_path / "prompt.safetensors"
    path.write_text("what stood there before")
    before.save(path)
    after = TextEmbeddings.load(path)
    assert torch.equal(after.text_embeds, before.text_embeds) and after.text_embeds.dtype == torch.bfloat16
    assert torch.equal(after.pooled_embeds, before.pooled_embeds) and after.pooled_embeds.dtype == torch.float32
    assert (after.text_mask is None) == (before.text_mask is None) == (len(prompts) == 1)
    assert after.text_mask is None or torch.equal(after.text_mask, before.text_mask)
    assert list(tmp_path.iterdir()) == [path]  # nothing temporary is left


def test_a_failed_save_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "prompt.safetensors"
    TextEmbeddings(torch.rand(1, 3, 4), torch.rand(1, 5), None).save(path)
    before = path.read_bytes()

    def full_disk(path: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("kandinsky.common.writing._sync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        TextEmbeddings(torch.rand(1, 3, 4), torch.rand(1, 5), None).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    TextEmbeddings(torch.rand(1, 3, 4), torch.rand(1, 5), None).save(path)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"prompt.safetensors is damaged.*encode them again"):
        TextEmbeddings.load(path)


def test_a_file_without_a_checksum_is_taken(tmp_path: Path) -> None:
    tensors = {"text_embeds": torch.rand(1, 3, 4), "pooled_embeds": torch.rand(1, 5)}
    save_file(tensors, tmp_path / "file.safetensors")
    assert torch.equal(TextEmbeddings.load(tmp_path / "file.safetensors").text_embeds, tensors["text_embeds"])


TEXT, POOLED = torch.zeros(2, 3, 4), torch.zeros(2, 5)
SOMETHING_ELSE = {
    "a model": ({"visual.weight": TEXT, "norm.bias": POOLED}, "has norm.bias, visual.weight in it"),
    "one part": ({"text_embeds": TEXT}, "has text_embeds in it, not text_embeds and pooled_embeds"),
    "more": ({"text_embeds": TEXT, "pooled_embeds": POOLED, "latents": TEXT + 1}, "has latents, pooled_embeds, text"),
    "a row": ({"text_embeds": TEXT[0], "pooled_embeds": POOLED}, r"text_embeds \(3, 4\).* \(B, L, D\)"),
    "other batch": ({"text_embeds": TEXT, "pooled_embeds": POOLED[:1]}, r"pooled_embeds \(1, 5\)"),
    "float mask": (
        {"text_embeds": TEXT, "pooled_embeds": POOLED, "text_mask": torch.ones(2, 3)},
        r"text_mask \(2, 3\).* bool text_mask",
    ),
    "short mask": (
        {"text_embeds": TEXT, "pooled_embeds": POOLED, "text_mask": torch.ones(2, 2, dtype=torch.bool)},
        r"text_mask \(2, 2\)",
    ),
}


@pytest.mark.parametrize("case", SOMETHING_ELSE)
def test_a_file_of_something_else_is_one_clear_line(tmp_path: Path, case: str) -> None:
    tensors, message = SOMETHING_ELSE[case]
    save_file(tensors, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        TextEmbeddings.load(tmp_path / "file.safetensors")
    assert "file.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_none_or_not_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.safetensors is no file of saved text embeddings"):
        TextEmbeddings.load(tmp_path / "nowhere.safetensors")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n" * 9)
    with pytest.raises(ValueError, match=r"photo.png is no file of saved text embeddings"):
        TextEmbeddings.load(tmp_path / "photo.png")


def test_on_the_meta_device_everything_is_checked_and_nothing_read(copy: Path) -> None:
    embedder = load(copy, device="meta", dtype=torch.bfloat16)
    assert {tensor.device.type for tensor in (*embedder.parameters(), *embedder.buffers())} == {"meta"}
    assert embedder.crop("video") == crop_of(copy)
    with pytest.raises(ValueError, match="tokens before the prompt, but 9 are expected"):
        load(copy, device="meta", crop=9)
    path = copy / "text_encoder2" / "model.safetensors"
    tensors = load_file(path)
    name, tensor = next((name, tensor) for name, tensor in tensors.items() if tensor.dim() == 2)
    save_file(tensors | {name: tensor[:-1].clone()}, path)
    with pytest.raises(ValueError, match="the two do not belong together"):
        load(copy, device="meta")
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(ValueError, match="lacks 1 of the"):
        load(copy, device="meta")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"model.safetensors: truncated.*download it again"):
        load(copy, device="meta")


def test_the_files_that_decide_are_weights_configs_and_tokenizers_of_both(copy: Path) -> None:
    (copy / "text_encoder" / "README.md").write_text("decides nothing")
    found = {str(path.relative_to(copy)) for path in text_encoder_files(copy / "text_encoder", copy / "text_encoder2")}
    assert {f"text_encoder{n}/{file}" for n in ("", "2") for file in ("model.safetensors", "config.json")} <= found
    assert "text_encoder/tokenizer.json" in found and "text_encoder/README.md" not in found
    # As diffusers has it: the tokenizer in a folder beside the encoder.
    (copy / "tokenizer").mkdir()
    (copy / "text_encoder" / "tokenizer.json").rename(copy / "tokenizer" / "tokenizer.json")
    found = {str(path.relative_to(copy)) for path in text_encoder_files(copy / "text_encoder", copy / "text_encoder2")}
    assert "tokenizer/tokenizer.json" in found


def test_max_length_can_be_given_with_the_prompts(embedder: TextEmbedder) -> None:
    whole = embedder.encode(PROMPTS[2:]).text_embeds
    assert torch.equal(embedder.encode(PROMPTS[2:], max_length=3).text_embeds, whole[:, :3]) and whole.shape[1] > 3


def test_one_folder_serves_text_and_pictures(tiny_images: Path, editor: TextEmbedder) -> None:
    reader = load(tiny_images, "image")
    assert not [name for name, _ in reader.named_parameters() if "vis" in name]
    assert [name for name, _ in editor.named_parameters() if "visual" in name]
    assert reader.image_processor is None and crop_of(tiny_images, "image") != crop_of(tiny_images, "image_edit")
    assert reader.crop("image") == editor.crop("image") == crop_of(tiny_images, "image")
    found, expected = editor.encode(PROMPTS, "image"), reader.encode(PROMPTS, "image")
    assert torch.equal(found.text_embeds, expected.text_embeds)
    assert torch.equal(found.pooled_embeds, expected.pooled_embeds)
    with pytest.raises(ValueError, match=r"'image_edit' prompt template has .*model.text_embedder.qwen.crop"):
        load(tiny_images, "image_edit", crop=crop_of(tiny_images, "image"))
    with pytest.raises(ValueError, match="52 are expected"):
        load(tiny_images, "image_edit", crop=None)


def test_what_the_tiny_vision_tower_makes_of_a_picture(tiny_images: Path, editor: TextEmbedder) -> None:
    # <|vision_start|>, the picture, <|vision_end|>, <|im_end|>; also half of a 64 px side is four tokens
    for size, count in (((64, 64), 4), ((32, 32), 4), ((140, 84), 15)):
        assert editor.encode([""], "image_edit", [picture(*size)]).text_embeds.shape == (1, 1 + count + 2, 128)
    assert sum(path.stat().st_size for path in (tiny_images / "text_encoder").iterdir()) < 1.25e6


def test_a_batch_of_pictures_of_different_sizes_equals_each_alone(editor: TextEmbedder) -> None:
    together = editor.encode(EDITS, "image_edit", PICTURES)
    assert together.text_mask is not None and len({row.text_embeds.shape for row in together.unbind()}) == 3
    for row, prompt, image in zip(together.unbind(), EDITS, PICTURES, strict=True):
        alone = editor.encode([prompt], "image_edit", [image])
        assert alone.text_mask is None and alone.text_embeds.shape == row.text_embeds.shape
        assert (alone.text_embeds - row.text_embeds).abs().max() <= 1e-5
        assert (alone.pooled_embeds - row.pooled_embeds).abs().max() <= 1e-5


def test_the_picture_and_where_its_pixels_lie_matter(editor: TextEmbedder) -> None:
    image = PICTURES[1]
    turned = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    embeddings = editor.encode([EDITS[0]] * 3, "image_edit", [image, turned, picture(*image.size, seed=1)])
    end = embeddings.text_embeds[:, -1]  # <|im_end|> stands behind all the others
    assert (end[0] - end[1]).abs().max() > 0.01 and (end[0] - end[2]).abs().max() > 0.01
    assert torch.equal(embeddings.pooled_embeds[0], embeddings.pooled_embeds[2])  # CLIP reads the words alone


def test_words_with_a_picture_are_never_cut(editor: TextEmbedder, caplog: pytest.LogCaptureFixture) -> None:
    whole = editor.encode(EDITS[2:], "image_edit", PICTURES[:1])
    short = editor.encode(EDITS[2:], "image_edit", PICTURES[:1], max_length=2)
    assert torch.equal(short.text_embeds, whole.text_embeds) and whole.text_embeds.shape[1] > 12
    assert not caplog.records


def test_too_many_tokens_are_refused_before_qwen_runs(editor: TextEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editor.qwen, "forward", None)
    pictures = [PICTURES[0], picture(28 * 32, 28 * 32)]
    with pytest.raises(ValueError, match=r"prompt 1 .* make 1027 tokens, 1024 of them the picture's, .* at most 1024"):
        editor.encode(["", ""], "image_edit", pictures)


def test_pictures_missing_or_not_wanted(tiny_images: Path, editor: TextEmbedder) -> None:
    with pytest.raises(ValueError, match="one picture a prompt: 1, not none"):
        editor.encode(EDITS[:1], "image_edit")
    with pytest.raises(ValueError, match="one picture a prompt: 3, not 2"):
        editor.encode(EDITS, "image_edit", PICTURES[:2])
    with pytest.raises(ValueError, match="one picture a prompt: 1, not a bare one"):
        editor.encode(EDITS[:1], "image_edit", PICTURES[0])
    with pytest.raises(ValueError, match=r"PIL images in RGB, not <PIL.Image.Image image mode=RGBA"):
        editor.encode(EDITS[:1], "image_edit", [PICTURES[0].convert("RGBA")])
    with pytest.raises(ValueError, match="non-empty list"):
        editor.encode("a bare string", "image_edit", PICTURES)
    with pytest.raises(ValueError, match="'image' prompt template takes no pictures"):
        editor.encode(EDITS[:1], "image", PICTURES[:1])
    with pytest.raises(ValueError, match="stands for a picture"):
        editor.encode(["a <|image_pad|>"], "image_edit", PICTURES[:1])
    with pytest.raises(ValueError, match="vision=True"):
        load(tiny_images, "image_edit").encode(EDITS[:1], "image_edit", PICTURES[:1])


def test_vision_dtypes_and_nothing_left_without_memory(tiny_images: Path) -> None:
    editor = load(tiny_images, "image_edit", vision=True, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in editor.qwen.parameters()} == {torch.bfloat16}
    assert any("visual" in name for name, _ in editor.named_parameters())
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in [*editor.parameters(), *editor.buffers()])
    assert editor.encode(EDITS, "image_edit", PICTURES).text_embeds.dtype == torch.bfloat16


def test_gradients_reach_the_pixels(tiny_images: Path) -> None:
    editor = load(tiny_images, "image_edit", vision=True).requires_grad_(True)
    editor(EDITS, "image_edit", PICTURES).text_embeds[:, -1].square().mean().backward()
    assert not [name for name, parameter in editor.qwen.named_parameters() if parameter.grad is None]
    assert editor.qwen.visual.patch_embed.proj.weight.grad.abs().max() > 0


def test_the_vision_tower_is_saved_too(images_copy: Path) -> None:
    editor = load(images_copy, "image_edit", vision=True)
    before = editor.encode(EDITS, "image_edit", PICTURES)
    save_text_encoders(editor, images_copy)
    after = load(images_copy, "image_edit", vision=True).encode(EDITS, "image_edit", PICTURES)
    assert torch.equal(before.text_embeds, after.text_embeds)
    assert sorted(path.name for path in (images_copy / "text_encoder").iterdir()) == [
        "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_parts_of_vision_that_are_missing_or_of_another_model(tiny: Path, images_copy: Path) -> None:
    encoder = images_copy / "text_encoder"

    def change(file: str, **values: Any) -> None:
        (encoder / file).write_text(json.dumps(json.loads((encoder / file).read_text()) | values))

    with pytest.raises(ValueError, match=r"no preprocessor_config.json for .*text_encoder"):
        load(tiny, vision=True)
    change("preprocessor_config.json", patch_size=16)
    with pytest.raises(ValueError, match=r"\(16, 2, 2\), but .* \(14, 2, 2\)"):
        load(images_copy, "image_edit", vision=True)
    change("preprocessor_config.json", patch_size=14)
    token = json.loads((encoder / "config.json").read_text())["image_token_id"]
    change("config.json", image_token_id=7)
    with pytest.raises(ValueError, match=rf"<\|image_pad\|> is token {token} .* but 7"):
        load(images_copy, "image_edit", vision=True)
    change("config.json", image_token_id=token)
    change_tensors(encoder / "model.safetensors", **{"visual.merger.ln_q.weight": None})
    with pytest.raises(ValueError, match=r"lacks 1 of the .*visual.merger.ln_q.weight"):
        load(images_copy, "image_edit", vision=True)
    assert load(images_copy, "image").encode(PROMPTS, "image")  # which needs no vision


@pytest.mark.parametrize("text", ['{"patch_size": 14, "me', "[]", ""])
def test_a_damaged_preprocessor_config_is_one_clear_line(images_copy: Path, text: str) -> None:
    (images_copy / "text_encoder" / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"preprocessor_config.json in .*text_encoder is damaged") as caught:
        load(images_copy, "image_edit", vision=True)
    assert "\n" not in str(caught.value)


def test_the_preprocessor_is_found_beside_the_encoder(images_copy: Path, editor: TextEmbedder) -> None:
    file = "preprocessor_config.json"
    (images_copy / "tokenizer").mkdir()
    (images_copy / "text_encoder" / file).rename(images_copy / "tokenizer" / file)
    found = load(images_copy, "image_edit", vision=True).encode(EDITS, "image_edit", PICTURES)
    assert torch.equal(found.text_embeds, editor.encode(EDITS, "image_edit", PICTURES).text_embeds)


def test_another_template_is_cut_at_its_own_prefix(embedder: TextEmbedder) -> None:
    length = prefix_length(embedder.qwen_tokenizer, get_template("image"))
    assert embedder.crop("image") == length != embedder.crop("video")
    assert embedder.encode([""], content="image").text_embeds.shape[1] == 1


def test_encode_has_no_gradient_and_forward_has(tiny: Path) -> None:
    embedder = load(tiny).requires_grad_(True)
    assert not embedder.encode(["a red circle"]).text_embeds.requires_grad
    embedder(["a red circle"]).pooled_embeds.sum().backward()
    assert embedder.clip.embeddings.token_embedding.weight.grad is not None


def test_saved_and_loaded_again_is_the_same_also_in_place(copy: Path) -> None:
    embedder = load(copy)
    before = embedder.encode(PROMPTS)
    save_text_encoders(embedder, copy)  # over the files that its weights are mapped to
    after = load(copy).encode(PROMPTS)
    assert torch.equal(embedder.encode(PROMPTS).text_embeds, before.text_embeds)
    # The weights on disk were bfloat16 already, so that nothing is lost.
    assert torch.equal(before.text_embeds, after.text_embeds)
    assert torch.equal(before.pooled_embeds, after.pooled_embeds)
    assert sorted(path.name for path in (copy / "text_encoder").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_the_seed_decides_the_weights(tiny: Path, tmp_path: Path) -> None:
    make_text_encoders(CAPTIONS, tmp_path / "same", seed=0)
    make_text_encoders(CAPTIONS, tmp_path / "other", seed=1)
    for name in ("text_encoder", "text_encoder2"):
        file = f"{name}/model.safetensors"
        assert (tiny / file).read_bytes() == (tmp_path / "same" / file).read_bytes()
        assert (tiny / file).read_bytes() != (tmp_path / "other" / file).read_bytes()
        assert (tiny / name / "tokenizer.json").read_bytes() == (
            tmp_path / "other" / name / "tokenizer.json"
        ).read_bytes()


def test_tiny_tokenizers_know_every_text(embedder: TextEmbedder) -> None:
    text = "Ünï 日本 ¿100%? 🦊"
    assert embedder.qwen_tokenizer.decode(embedder.qwen_tokenizer([text])["input_ids"][0]) == text
    ids = embedder.clip_tokenizer([text])["input_ids"][0]
    assert ids.count(embedder.clip_tokenizer.eos_token_id) == 1 and max(ids) == ids[-1]


def test_tokenizers_are_found_beside_the_encoders(copy: Path, embedder: TextEmbedder) -> None:
    crop = crop_of(copy)
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder2", "tokenizer_2")):
        (copy / tokenizer).mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (copy / encoder / file).rename(copy / tokenizer / file)
    assert torch.equal(load(copy, crop=crop).encode(PROMPTS).text_embeds, embedder.encode(PROMPTS).text_embeds)
    shutil.rmtree(copy / "tokenizer_2")
    with pytest.raises(ValueError, match=r"no tokenizer for .*text_encoder2"):
        load(copy, crop=crop)


def change_tensors(file: Path, **tensors: torch.Tensor | None) -> None:
    merged = {key: value.clone() for key, value in load_file(file).items()} | tensors
    save_file({key: value for key, value in merged.items() if value is not None}, file)


@pytest.mark.parametrize(
    ("folder", "key"), [("text_encoder", "model.norm.weight"), ("text_encoder2", "text_model.final_layer_norm.bias")]
)
def test_missing_and_misshapen_tensors_are_named(copy: Path, folder: str, key: str) -> None:
    change_tensors(copy / folder / "model.safetensors", **{key: None})
    with pytest.raises(ValueError, match=rf"{folder} lacks 1 of the .*{key.rsplit('.', 2)[1]}"):
        load(copy)
    change_tensors(copy / folder / "model.safetensors", **{key: torch.zeros(7)})
    with pytest.raises(ValueError, match=rf"{key} in .* has shape \(7,\).*\(128,\)"):
        load(copy)


def test_pickle_is_refused(copy: Path) -> None:
    (copy / "text_encoder2" / "model.safetensors").unlink()
    torch.save({}, copy / "text_encoder2" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: safetensors only"):
        load(copy)


def test_a_truncated_file_is_one_clear_error(copy: Path) -> None:
    file = copy / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model.safetensors: truncated.*download it again"):
        load(copy)


def test_missing_shards_are_named(copy: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "text_encoder" / "model.safetensors").rename(copy / "text_encoder" / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"1 of 2 shards are missing, like model-00002-of-00002.safetensors"):
        load(copy)


def test_wrong_settings_are_refused(tiny: Path, copy: Path) -> None:
    with pytest.raises(ValueError, match="not a text encoder's folder"):
        load_text_embedder(tiny / "nowhere", tiny / "text_encoder2", qwen_max_length=64, clip_max_length=32)
    with pytest.raises(ValueError, match=r"model.text_embedder.qwen.crop"):
        load(tiny, crop=crop_of(tiny) - 1)
    with pytest.raises(ValueError, match="129 are expected"):
        load(tiny, crop=None)
    with pytest.raises(ValueError, match=r"clip.max_length is 77.*32 positions"):
        load(tiny, clip_max_length=77)
    with pytest.raises(ValueError, match="non-empty list"):
        load(tiny).encode("a bare string")
    config = json.loads((copy / "text_encoder2" / "config.json").read_text())
    (copy / "text_encoder2" / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    change_tensors(
        copy / "text_encoder2" / "model.safetensors",
        **{"text_model.embeddings.token_embedding.weight": torch.zeros(300, 128)},
    )
    with pytest.raises(ValueError, match=r"CLIP tokenizer knows .* only 300"):
        load(copy)
