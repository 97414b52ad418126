"""Both text encoders out of their files: Qwen2.5-VL, CLIP, their tokenizers and Qwen's image processor.

Only the parts in use are built, and only the tensors of those are read: no lm_head (1.1 GB), and the vision tower (1.4
GB) only where pictures are to be seen.

Files: a folder with config.json and safetensors (one file, or shards with an index), or a file, also ComfyUI's and of
Qwen a GGUF one, with config.json beside it or with sizes that say the same; never pickle. Keys may be `model.layers.*`
as published, `model.language_model.*` or `language_model.*` as newer transformers write them, or the text model's own;
for CLIP `text_model.*` (a full CLIPModel or a text model alone) or its own. The tokenizer lies in the same folder, or
beside it as in a diffusers repository (`tokenizer`, `tokenizer_2`), and likewise Qwen's preprocessor_config.json, which
says how a picture is cut into patches.

This module does not know which device there is, where files come from, or what embeddings are used for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from kandinsky.checkpoints.dit_layout import check_floats, packed_layers, packed_weight, unpacked_shapes
from kandinsky.checkpoints.files import find_weights, folder_of
from kandinsky.checkpoints.formats import open_weights, read_weights_header
from kandinsky.checkpoints.gguf_file import BLOCKS
from kandinsky.common.given import shortened
from kandinsky.common.untrusted import reason
from kandinsky.loading.text_files import load_image_processor, load_tokenizer, read_config
from kandinsky.loading.weights import unpacked
from kandinsky.models.clip_text import ClipText, ClipTextConfig
from kandinsky.models.numerics import aligned
from kandinsky.models.qwen import Qwen, QwenConfig, QwenText
from kandinsky.runtime.layer_stream import HostEmbedding, StreamedLayers
from kandinsky.runtime.offload import slots_of
from kandinsky.runtime.quantization import replace_linears
from kandinsky.runtime.staging import on_device
from kandinsky.text.embedder import TextEmbedder
from kandinsky.text.prompts import check_prefix, get_template

# What may stand before a tensor's own name in a file; the longest match wins. Names of the vision tower keep `visual.`.
_QWEN_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
_CLIP_PREFIXES = ("text_model.",)
AnyModel = TypeVar("AnyModel", bound=nn.Module)
# A model -> (name, tensor as read) -> tensors in its place by name, none where it is to stay as it is.
Quantize = Callable[[nn.Module], Callable[[str, Tensor], dict[str, Tensor]]]


def load_text_embedder(
    qwen_path: str | Path,
    clip_path: str | Path,
    *,
    qwen_max_length: int | None,
    clip_max_length: int,
    crop: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    content: str = "video",
    vision: bool = False,
    quantize: Quantize | None = None,
    stream: bool = False,
) -> TextEmbedder:
    """Build both encoders from their folders or files (see the module), frozen and in evaluation mode.

    The models are built without memory and every tensor is read, cast and assigned by itself: there is never a float32
    copy of Qwen. `dtype` is Qwen's; CLIP is always float32, the precision it is published in, because it is small.
    `vision` adds Qwen's vision tower, which content "image_edit" needs. `quantize` is given Qwen without memory, and
    returns what makes each tensor that is read into those that the model then takes. `stream` leaves Qwen's layers in
    the file, from where each comes to the device when it runs (runtime/layer_stream.py): the same bits. On the device
    "meta" everything is checked, from the tokenizers to the name and shape of every tensor, but no weights are read.

    Raises:
        ValueError: a folder, weights, tensors or a tokenizer are missing or do not belong together; only pickle files.
    """
    qwen_path, clip_path = Path(qwen_path), Path(clip_path)
    qwen_folder, clip_folder = folder_of(qwen_path), folder_of(clip_path)
    for path, folder in ((qwen_path, qwen_folder), (clip_path, clip_folder)):
        if not (folder / "config.json").is_file() and not path.is_file():
            raise ValueError(
                f"{folder} is not a text encoder's folder: it has no config.json; download it and the tokenizer"
            )
    device = torch.device(device)

    # Tokenizers first: they are quick to read and quick to be found wrong.
    qwen_tokenizer = load_tokenizer(qwen_folder, "tokenizer", "qwen")
    clip_tokenizer = load_tokenizer(clip_folder, "tokenizer_2", "clip")
    check_prefix(qwen_tokenizer, get_template(content), crop)
    image_processor = load_image_processor(qwen_folder) if vision else None

    qwen = _load_qwen(qwen_path, vision, device, dtype, quantize, stream)

    clip_config = read_config(ClipTextConfig, clip_path)
    clip = _build(clip_path, lambda: ClipText(clip_config))
    assign_weights(clip, clip_path, _CLIP_PREFIXES, device, torch.float32)

    embedder = TextEmbedder(
        qwen,
        clip,
        qwen_tokenizer,
        clip_tokenizer,
        qwen_max_length=qwen_max_length,
        clip_max_length=clip_max_length,
        crop=crop,
        content=content,
        image_processor=image_processor,
    )
    return embedder.eval().requires_grad_(False)


def text_encoder_files(qwen_path: str | Path, clip_path: str | Path) -> list[Path]:
    """Every file that decides what the two encoders make of a prompt: weights, configs and tokenizers.

    Raises ValueError where there are no weights.
    """
    files: list[Path] = []
    for path, sibling in ((Path(qwen_path), "tokenizer"), (Path(clip_path), "tokenizer_2")):
        files += find_weights(path)
        folder = folder_of(path)
        for place in (folder, folder.parent / sibling):
            if place.is_dir():
                files += sorted(file for file in place.iterdir() if file.suffix in (".json", ".txt", ".jinja"))
    return files


def _load_qwen(
    path: Path, vision: bool, device: torch.device, dtype: torch.dtype, quantize: Quantize | None, stream: bool
) -> QwenText | Qwen:
    config = read_config(QwenConfig, path)
    qwen: QwenText | Qwen = _build(path, lambda: Qwen(config) if vision else QwenText(config.text_config))
    stream = stream and device.type != "meta"
    if stream and any(packed_layers(read_weights_header(file)) for file in find_weights(path)):
        raise ValueError(f"{path}: quantised layers don't stream: set runtime.stream_encoders=off, or take bfloat16")
    assign_weights(qwen, path, _QWEN_PREFIXES, torch.device("meta") if stream else device, dtype, quantize)
    if stream:
        _stream_layers(qwen, path, device, dtype)
    return qwen


def _stream_layers(qwen: QwenText | Qwen, path: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Have a Qwen on the meta device run with its layers left in their file, and everything else on the device."""
    headers = {file: read_weights_header(file) for file in find_weights(path)}
    places = {_own_name(key, _QWEN_PREFIXES): (file, key) for file, header in headers.items() for key in header}

    def read(name: str) -> Tensor:
        file, key = places[name]
        with open_weights(file) as tensors:
            tensor: Tensor = tensors.get_tensor(key)
            return tensor

    for name, slot in slots_of(qwen):
        own_name = _own_name(name, _QWEN_PREFIXES)
        if own_name in places and not own_name.startswith(("layers.", "visual.blocks.", "embed_tokens.")):
            slot.fill(aligned(read(own_name).to(device).to(dtype)))
    language_model = qwen.language_model if isinstance(qwen, Qwen) else qwen
    embeddings = HostEmbedding(read("embed_tokens.weight"), device, dtype)
    language_model.embed_tokens = embeddings  # type: ignore[assignment]
    language_model.layers = StreamedLayers(language_model.layers, read, "layers.", device)
    if isinstance(qwen, Qwen):
        qwen.visual.blocks = StreamedLayers(qwen.visual.blocks, read, "visual.blocks.", device)


def _build(path: Path, make: Callable[[], AnyModel]) -> AnyModel:
    """A model without memory. Raises ValueError where its config has sizes that can't be."""
    try:
        with torch.device("meta"):
            return make()
    except Exception as error:
        raise ValueError(
            f"{folder_of(path) / 'config.json'}: no model can be built from it ({reason(error)}); download it again"
        ) from None


def _own_name(key: str, prefixes: Sequence[str]) -> str:
    for prefix in prefixes:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def _plain_name(key: str) -> str:
    """The name of the weight that a tensor is a part of: "a.weight_q8_0", "a.weight_scale" -> "a.weight"."""
    layer, _, part = key.rpartition(".")
    return f"{layer}.weight" if packed_weight(key) or part in ("weight_scale", "weight_scales") else key


def assign_weights(
    model: nn.Module,
    path: Path,
    prefixes: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    quantize: Quantize | None = None,
) -> None:
    """Give a model on the meta device its tensors from a folder or file, reading none that it does not have."""
    # The model's own names carry a prefix where it has two parts, so both sides lose it.
    wanted = {_own_name(name, prefixes): (name, tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    headers = {file: read_weights_header(file, keep_fp8=quantize is None) for file in find_weights(path)}
    packed = {}  # layers of the model that the files have quantised -> their schemes
    for layer, scheme in (one for header in headers.values() for one in packed_layers(header).items()):
        name, _ = wanted.get(_own_name(f"{layer}.weight", prefixes), ("", ()))
        if name and isinstance(model.get_submodule(name.removesuffix(".weight")), nn.Linear):
            packed[name.removesuffix(".weight")] = scheme
    # After this the model's names are other ones.
    convert = quantize(model) if quantize else replace_linears(model, packed) if packed else None
    read: set[str] = set()
    tensors: dict[str, Tensor] = {}
    for file, whole in headers.items():
        # The others are vision tower, lm_head, projections.
        shapes = unpacked_shapes(whole)
        header = {key: entry for key, entry in whole.items() if _own_name(_plain_name(key), prefixes) in wanted}
        check_floats(file, {key: entry for key, entry in header.items() if _plain_name(key) == key})
        with open_weights(file, keep_fp8=quantize is None) as tensors_in_file:
            for key in header:
                plain = _plain_name(key)
                _, shape = wanted[_own_name(plain, prefixes)]
                if (found := shapes[plain]) != shape:
                    raise ValueError(
                        f"{shortened(key)} in {file} has shape {found}, but config.json beside it makes it {shape}; "
                        "the two do not belong together"
                    )
            for key, tensor in on_device(((key, tensors_in_file.get_tensor(key)) for key in header), device):
                plain = _plain_name(key)
                name, _ = wanted[_own_name(plain, prefixes)]
                parts = convert(name + key.removeprefix(plain), tensor) if convert else {}
                if not parts:
                    _, scheme = packed_weight(key) or ("", "")
                    parts = {name: aligned(unpacked(tensor, scheme, dtype) if scheme in BLOCKS else tensor.to(dtype))}
                tensors |= parts
                read.add(name)
    missing = [name for name, _ in wanted.values() if name not in read]
    if missing:
        some = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{path} lacks {len(missing)} of the {len(wanted)} tensors of {type(model).__name__}: {some}. "
            "Download it again; it may be another model's"
        )
    model.load_state_dict(tensors, strict=True, assign=True)
