"""Both text encoders out of their files: Qwen2.5-VL, CLIP, their tokenizers and Qwen's image processor.

Both models come from transformers; only the parts in use are built, and only the tensors of those are read: no lm_head
(1.1 GB), and the vision tower (1.4 GB) only where pictures are to be seen.

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
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
)
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

from kandinsky.checkpoints.dit_layout import check_floats, packed_layers, packed_weight, unpacked_shapes
from kandinsky.checkpoints.encoder_config import CLIP, QWEN, encoder_config
from kandinsky.checkpoints.files import find_weights, folder_of
from kandinsky.checkpoints.formats import open_weights, read_weights_header
from kandinsky.checkpoints.gguf_file import BLOCKS
from kandinsky.common.given import MISSING, shortened, why_no_file
from kandinsky.common.untrusted import reason
from kandinsky.loading.weights import unpacked
from kandinsky.models.numerics import aligned
from kandinsky.runtime.layer_stream import HostEmbedding, StreamedLayers
from kandinsky.runtime.offload import slots_of
from kandinsky.runtime.quantization import replace_linears
from kandinsky.runtime.staging import on_device
from kandinsky.text.embedder import TextEmbedder
from kandinsky.text.prompts import check_prefix, get_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2VLImageProcessorPil


# What may stand before a tensor's own name in a file; the longest match wins. Names of the vision tower keep `visual.`.
_QWEN_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
_CLIP_PREFIXES = ("text_model.",)
AnyConfig = TypeVar("AnyConfig", bound=PreTrainedConfig)
AnyModel = TypeVar("AnyModel", bound=PreTrainedModel)
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
    qwen_tokenizer = _load_tokenizer(qwen_folder, "tokenizer")
    clip_tokenizer = _load_tokenizer(clip_folder, "tokenizer_2")
    check_prefix(qwen_tokenizer, get_template(content), crop)
    image_processor = load_image_processor(qwen_folder) if vision else None

    qwen = _load_qwen(qwen_path, vision, device, dtype, quantize, stream)

    clip_config = read_config(CLIPTextConfig, clip_path)
    clip_config._attn_implementation = "sdpa"
    clip = _build(clip_path, lambda: CLIPTextModel(clip_config))
    assign_weights(clip, clip_path, _CLIP_PREFIXES, device, torch.float32)
    for module in clip.modules():
        if isinstance(module, CLIPTextEmbeddings):
            positions = torch.arange(clip_config.max_position_embeddings, device=device)[None]
            module.register_buffer("position_ids", positions, persistent=False)

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
) -> Qwen2_5_VLTextModel | Qwen2_5_VLModel:
    config = read_config(Qwen2_5_VLConfig, path)
    text_config, vision_config = config.text_config, config.vision_config
    assert isinstance(text_config, Qwen2_5_VLTextConfig) and isinstance(vision_config, Qwen2_5_VLVisionConfig)
    for section in (config, text_config, vision_config):
        section._attn_implementation = "sdpa"
    qwen = _build(path, lambda: Qwen2_5_VLModel(config) if vision else Qwen2_5_VLTextModel(text_config))
    stream = stream and device.type != "meta"
    if stream and any(packed_layers(read_weights_header(file)) for file in find_weights(path)):
        raise ValueError(f"{path}: quantised layers don't stream: set runtime.stream_encoders=off, or take bfloat16")
    assign_weights(qwen, path, _QWEN_PREFIXES, torch.device("meta") if stream else device, dtype, quantize)
    if stream:
        _stream_layers(qwen, path, device, dtype)

    # Rotary frequencies are no part of a checkpoint and still on meta; whatever the dtype, they are float32.
    language_model = qwen.language_model if isinstance(qwen, Qwen2_5_VLModel) else qwen
    rotary_emb = Qwen2_5_VLRotaryEmbedding(text_config).to(device)  # type: ignore[arg-type]
    for module in list(language_model.modules()):
        if hasattr(module, "rotary_emb"):  # transformers 4 has one in every layer too, which nothing uses
            module.rotary_emb = rotary_emb
    if isinstance(qwen, Qwen2_5_VLModel):
        set_vision_frequencies(qwen.visual, vision_config, device)
    return qwen


def _stream_layers(
    qwen: Qwen2_5_VLTextModel | Qwen2_5_VLModel, path: Path, device: torch.device, dtype: torch.dtype
) -> None:
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
    language_model = qwen.language_model if isinstance(qwen, Qwen2_5_VLModel) else qwen
    embeddings = HostEmbedding(read("embed_tokens.weight"), device, dtype)
    language_model.embed_tokens = embeddings
    language_model.layers = StreamedLayers(language_model.layers, read, "layers.", device)
    if isinstance(qwen, Qwen2_5_VLModel):
        qwen.visual.blocks = StreamedLayers(qwen.visual.blocks, read, "visual.blocks.", device)


def read_config(kind: type[AnyConfig], path: Path) -> AnyConfig:
    """A published config.json as transformers has it; of a single file without one, what its shapes say.

    Raises ValueError for one that it can't be, naming the file.
    """
    file = folder_of(path) / "config.json"
    _require_files(file.parent)
    values = encoder_config(path, QWEN if kind is Qwen2_5_VLConfig else CLIP)
    tensors = sum(len(read_weights_header(weights)) for weights in find_weights(path))
    for section in (values, *(part for part in values.values() if isinstance(part, dict))):
        for name in ("num_hidden_layers", "depth"):
            if isinstance(number := section.get(name), int) and number > tensors:
                raise ValueError(
                    f"{file}: {name} is {shortened(str(number))}, and the weights have {tensors} tensors in all"
                )
    try:
        return kind.from_pretrained(file.parent, local_files_only=True) if file.is_file() else kind(**values)
    except Exception as error:  # wrong values show as any of a dozen types
        raise ValueError(f"{file}: damaged, or another model's ({reason(error)}); download it again") from None


def _require_files(folder: Path) -> None:
    """Raise ValueError for a pipe or its like in a folder: transformers opens whatever has a name that it knows."""
    for path in folder.iterdir():
        if not path.is_dir() and (why := why_no_file(path)) not in (None, MISSING):
            raise ValueError(f"{path}: {why}")


def _build(path: Path, make: Callable[[], AnyModel]) -> AnyModel:
    """A model of transformers without memory. Raises ValueError where its config has sizes that can't be."""
    try:
        with torch.device("meta"):
            return make()
    except Exception as error:
        raise ValueError(
            f"{folder_of(path) / 'config.json'}: no model can be built from it ({reason(error)}); download it again"
        ) from None


def set_vision_frequencies(visual: nn.Module, config: Qwen2_5_VLVisionConfig, device: torch.device) -> None:
    """Give a vision tower its rotary frequencies, which are no part of a checkpoint.

    Half of a head's channels turn with the row of a patch, half with its column. No published config names the base,
    and what the module wants to be built from depends on the transformers version: so the numbers are set.
    """
    channels = config.hidden_size // config.num_heads // 2
    frequencies = 1 / 10000 ** (torch.arange(0, channels, 2, dtype=torch.float32) / channels)
    rotary: Any = visual.rotary_pos_emb
    for name, _ in list(rotary.named_buffers()):
        rotary.register_buffer(name, frequencies.to(device, copy=True), persistent=False)


def load_image_processor(folder: Path) -> Qwen2VLImageProcessorPil:
    """How Qwen cuts pictures into patches. Not its whole processor: that needs torchvision, for videos."""
    for candidate in (folder, folder.parent / "tokenizer"):
        if (candidate / "preprocessor_config.json").is_file():
            _require_files(candidate)
            # The one that works with PIL and numpy has another name in transformers 5.
            name = "Qwen2VLImageProcessorPil"
            processor: Any = getattr(transformers, name if hasattr(transformers, name) else "Qwen2VLImageProcessor")
            try:
                return processor.from_pretrained(candidate, local_files_only=True)
            except Exception as error:  # as with the tokenizer
                raise ValueError(
                    f"preprocessor_config.json in {candidate} is damaged ({reason(error)}); download it again"
                ) from None
    raise ValueError(
        f"no preprocessor_config.json for {folder}, neither in it nor in {folder.parent / 'tokenizer'}: without it "
        "pictures cannot be shown to Qwen. Download that file of Qwen2.5-VL into one of them"
    )


def _load_tokenizer(folder: Path, sibling: str) -> PreTrainedTokenizerBase:
    """The tokenizer in the encoder's folder or, as diffusers repositories have it, in a folder beside it."""
    for candidate in (folder, folder.parent / sibling):
        if (candidate / "tokenizer.json").is_file() or (candidate / "vocab.json").is_file():
            _require_files(candidate)
            try:
                # Never code from the folder: without the word False, transformers would ask at the terminal whether to.
                return AutoTokenizer.from_pretrained(candidate, local_files_only=True, trust_remote_code=False)
            except Exception as error:  # a damaged file shows as any of a dozen types, none of which names the file
                raise ValueError(
                    f"the tokenizer in {candidate} is damaged ({reason(error)}); download its files again"
                ) from None
    raise ValueError(
        f"no tokenizer for {folder}: neither it nor {folder.parent / sibling} has a tokenizer.json or a vocab.json; "
        "download the model's tokenizer files into one of them"
    )


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
    # Whether the model's own names carry a prefix depends on the transformers version, so both sides lose it.
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
