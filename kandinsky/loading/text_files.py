"""The small files of text encoders: config.json, tokenizers, and preprocessor_config.json, read and checked.

What is read is what the networks here need; what is left out has the published default. Whatever says that a model is
another one than these networks compute (an activation, positions, windows of attention) is refused and not overlooked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from kandinsky.checkpoints.encoder_config import CLIP, QWEN, encoder_config
from kandinsky.checkpoints.files import find_weights, folder_of
from kandinsky.checkpoints.formats import read_weights_header
from kandinsky.common.given import MISSING, as_number, as_whole, shortened, shown, why_no_file
from kandinsky.common.untrusted import read_json, reason
from kandinsky.models.clip_text import ClipTextConfig
from kandinsky.models.qwen import QwenConfig, QwenTextConfig
from kandinsky.models.qwen_vision import QwenVisionConfig
from kandinsky.text.patches import ImageProcessor
from kandinsky.text.tokenizer import SPECIAL, Kind, Tokenizer, from_vocabulary

AnyConfig = TypeVar("AnyConfig", QwenConfig, ClipTextConfig)
LARGEST_NUMBER = 2**40  # of any size that a config names
DEFAULT_MROPE = (16, 24, 24)


def read_config(kind: type[AnyConfig], path: Path) -> AnyConfig:
    """A published config.json's sizes; of a single file without one, what its shapes say.

    Raises ValueError for one that it can't be, naming the file.
    """
    file = folder_of(path) / "config.json"
    _require_files(file.parent)
    values: Any = encoder_config(path, QWEN if kind is QwenConfig else CLIP)
    tensors = sum(len(read_weights_header(weights)) for weights in find_weights(path))
    try:
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
        for section in (values, *(part for part in values.values() if isinstance(part, dict))):
            for name in ("num_hidden_layers", "depth"):
                if isinstance(number := section.get(name), int) and number > tensors:
                    raise ValueError(f"{name} is {shortened(str(number))}, and the weights have {tensors} tensors")
        return _qwen(values) if kind is QwenConfig else _clip(values)  # type: ignore[return-value]
    except ValueError as error:
        raise ValueError(f"{file}: damaged, or another model's ({reason(error)}); download it again") from None


def _qwen(values: Mapping[str, Any]) -> QwenConfig:
    # Older files have the language model's sizes at the top.
    text = _section(values, "text_config") if "text_config" in values else values
    vision = _section(values, "vision_config") if values.get("vision_config") is not None else {}
    rope = dict(_section(text, "rope_parameters") if text.get("rope_parameters") is not None else {})
    if not rope and text.get("rope_scaling") is not None:
        rope = dict(_section(text, "rope_scaling"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    _only(kind in ("default", "mrope"), "rope_type", kind)
    _only(text.get("hidden_act", "silu") == "silu", "hidden_act", text.get("hidden_act"))
    layers = _whole(text, "num_hidden_layers", 80)
    windows = bool(text.get("use_sliding_window")) and _whole(text, "max_window_layers", 80) < layers
    _only(not windows, "use_sliding_window", text.get("use_sliding_window"))
    heads = _whole(text, "num_attention_heads", 64)
    mrope = rope.get("mrope_section", DEFAULT_MROPE)
    _only(isinstance(mrope, list | tuple) and all(type(n) is int and n >= 0 for n in mrope), "mrope_section", mrope)
    theta = rope.get("rope_theta", text.get("rope_theta", 1e6))
    return QwenConfig(
        text_config=QwenTextConfig(
            **_wholes(text, vocab_size=152064, hidden_size=8192, intermediate_size=29568),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads
            if text.get("num_key_value_heads", 8) is None
            else _whole(text, "num_key_value_heads", 8),
            rms_norm_eps=_positive({"rms_norm_eps": text.get("rms_norm_eps", 1e-5)}, "rms_norm_eps"),
            rope_theta=_positive({"rope_theta": theta}, "rope_theta"),
            mrope_section=tuple(mrope),
        ),
        vision_config=_qwen_vision(vision),
        image_token_id=_whole(values, "image_token_id", 151655, least=0),
        tie_word_embeddings=bool(values.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
    )


def _qwen_vision(values: Mapping[str, Any]) -> QwenVisionConfig:
    _only(values.get("hidden_act", "silu") == "silu", "vision_config.hidden_act", values.get("hidden_act"))
    full = values.get("fullatt_block_indexes", (7, 15, 23, 31))
    _only(isinstance(full, list | tuple) and all(type(n) is int for n in full), "fullatt_block_indexes", full)
    sizes = _wholes(
        values, depth=32, hidden_size=3584, intermediate_size=3420, num_heads=16, in_channels=3, patch_size=14,
        spatial_merge_size=2, temporal_patch_size=2, window_size=112, out_hidden_size=3584,
    )  # fmt: skip
    return QwenVisionConfig(**sizes, fullatt_block_indexes=tuple(full))


def _clip(values: Mapping[str, Any]) -> ClipTextConfig:
    text = _section(values, "text_config") if "text_config" in values else values  # of a whole CLIP
    activation = text.get("hidden_act", "quick_gelu")
    _only(isinstance(activation, str), "hidden_act", activation)
    sizes = _wholes(
        text, vocab_size=49408, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
        max_position_embeddings=77,
    )  # fmt: skip
    return ClipTextConfig(
        **sizes,
        layer_norm_eps=_positive({"layer_norm_eps": text.get("layer_norm_eps", 1e-5)}, "layer_norm_eps"),
        hidden_act=activation,
        eos_token_id=_whole(text, "eos_token_id", 49407, least=0),
    )


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values[name]
    _only(isinstance(section, dict), name, section)
    return section


def _whole(values: Mapping[str, Any], name: str, default: int, least: int = 1) -> int:
    number = as_whole(values.get(name, default))
    _only(number is not None and least <= number <= LARGEST_NUMBER, name, values.get(name))
    assert number is not None
    return number


def _wholes(values: Mapping[str, Any], **defaults: int) -> dict[str, int]:
    """Each of these entries, in the file's words or by default."""
    return {name: _whole(values, name, default) for name, default in defaults.items()}


def _positive(values: Mapping[str, Any], name: str) -> float:
    number = as_number(values[name])
    _only(0 < number < float("inf"), name, values[name])
    return number


def _only(ok: bool, name: str, value: object) -> None:
    if not ok:
        raise ValueError(f"{name} is {shown(value)}, which no model of this kind has")


def load_image_processor(folder: Path) -> ImageProcessor:
    """How Qwen cuts pictures into patches. Raises ValueError where there is no such file, or none that can be."""
    for candidate in (folder, folder.parent / "tokenizer"):
        if (candidate / "preprocessor_config.json").is_file():
            _require_files(candidate)
            try:
                return _image_processor(read_json(candidate / "preprocessor_config.json"))
            except Exception as error:
                raise ValueError(
                    f"preprocessor_config.json in {candidate} is damaged ({reason(error)}); download it again"
                ) from None
    raise ValueError(
        f"no preprocessor_config.json for {folder}, neither in it nor in {folder.parent / 'tokenizer'}: without it "
        "pictures cannot be shown to Qwen. Download that file of Qwen2.5-VL into one of them"
    )


def _image_processor(values: Any) -> ImageProcessor:
    _only(isinstance(values, dict), "its content", values)
    size = values.get("size")
    size = size if isinstance(size, dict) else {}
    least, most = ImageProcessor.min_pixels, ImageProcessor.max_pixels
    found: dict[str, Any] = {
        "min_pixels": _whole(values, "min_pixels", _whole(size, "shortest_edge", least)),
        "max_pixels": _whole(values, "max_pixels", _whole(size, "longest_edge", most)),
    }
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        found[name] = _whole(values, name, getattr(ImageProcessor, name))
    for name in ("image_mean", "image_std"):
        numbers = values.get(name, getattr(ImageProcessor, name))
        _only(isinstance(numbers, list | tuple) and len(numbers) == 3, name, numbers)
        found[name] = tuple(_positive({name: number}, name) for number in numbers)
    found["rescale_factor"] = _positive(
        {"rescale_factor": values.get("rescale_factor", ImageProcessor.rescale_factor)}, "rescale_factor"
    )
    found["resample"] = _whole(values, "resample", ImageProcessor.resample, least=0)
    _only(found["resample"] <= 5, "resample", found["resample"])  # of Pillow's filters
    for name in ("do_resize", "do_rescale", "do_normalize"):
        _only(values.get(name, True) is True, name, values.get(name))
    return ImageProcessor(**found)


def load_tokenizer(folder: Path, sibling: str, kind: Kind) -> Tokenizer:
    """The tokenizer in the encoder's folder or, as diffusers repositories have it, in a folder beside it."""
    for candidate in (folder, folder.parent / sibling):
        if (candidate / "tokenizer.json").is_file() or (candidate / "vocab.json").is_file():
            _require_files(candidate)
            try:
                return _tokenizer(candidate, kind)
            except Exception as error:  # a damaged file shows as any of a dozen types, none of which names the file
                raise ValueError(
                    f"the tokenizer in {candidate} is damaged ({reason(error)}); download its files again"
                ) from None
    raise ValueError(
        f"no tokenizer for {folder}: neither it nor {folder.parent / sibling} has a tokenizer.json or a vocab.json; "
        "download the model's tokenizer files into one of them"
    )


def _tokenizer(folder: Path, kind: Kind) -> Tokenizer:
    told = [
        read_json(file)
        for name in ("special_tokens_map", "tokenizer_config")
        if (file := folder / f"{name}.json").is_file()
    ]  # the last one has the last word
    _only(all(isinstance(values, dict) for values in told), "tokenizer_config.json", told)
    special = dict(SPECIAL[kind])
    for name in special:
        for values in told:
            token = values.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            special[name] = token if isinstance(token, str) else special[name]
    if (folder / "tokenizer.json").is_file():
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        backend = from_vocabulary(kind, str(folder / "vocab.json"), str(folder / "merges.txt"))
    added: dict[str, Any] = {}
    for values in told:
        added |= values.get("added_tokens_decoder") or {}
    for _, entry in sorted((int(number), entry) for number, entry in added.items()):
        if backend.token_to_id(entry["content"]) is None or not (folder / "tokenizer.json").is_file():
            flags = {name: bool(entry.get(name)) for name in ("lstrip", "rstrip", "normalized", "single_word")}
            backend.add_tokens([tokenizers.AddedToken(entry["content"], special=bool(entry.get("special")), **flags)])
    for number, entry in added.items():
        if (found := backend.token_to_id(entry["content"])) != int(number):
            raise ValueError(f"tokenizer_config.json has {entry['content']!r} as token {number}, and it is {found}")
    for token in special.values():
        if backend.token_to_id(token) is None:
            raise ValueError(f"it has no {token}")
    return Tokenizer(backend, special)


def _require_files(folder: Path) -> None:
    """Raise ValueError for a pipe or its like in a folder, which whoever opens it would wait for."""
    for path in folder.iterdir():
        if not path.is_dir() and (why := why_no_file(path)) not in (None, MISSING):
            raise ValueError(f"{path}: {why}")
