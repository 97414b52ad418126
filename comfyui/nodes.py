"""The nodes: load -> (LoRA) -> encode -> sample -> decode -> save, each over one public stage of a pipeline.

A number that is left at its lowest value (0, or -1 where 0 means something) is the config's. What one node hands to the
next is either ComfyUI's (IMAGE, LATENT) or one of the three records here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
from PIL import Image
from torch import Tensor

from kandinsky.attention.block_sparse import BLOCK_SPARSE_ENGINES
from kandinsky.attention.engines import ENGINES
from kandinsky.config.reading import load_config, with_settings
from kandinsky.loading.assemble import load_pipeline, with_magcache
from kandinsky.loading.devices import DTYPES
from kandinsky.outputs import media
from kandinsky.outputs.post import Post, check
from kandinsky.outputs.preview import load_latent_rgb
from kandinsky.pipelines.base import Pipeline
from kandinsky.pipelines.decode import frames_before
from kandinsky.pipelines.inputs import Inputs
from kandinsky.pipelines.stopwatch import Stopwatch
from kandinsky.pipelines.write import write_outputs
from kandinsky.planning.plan import weight_files
from kandinsky.request import MAX_SEED, resolve_request
from kandinsky.text.embeddings import TextEmbeddings

from . import weights
from .directed import GIVEN, Frames, Given, Join, Source, frames_of, settled
from .hosting import Progress, stop_where_asked
from .images import to_picture
from .latents import CUT, from_native, to_native

CATEGORY = "Kandinsky 5"
MODEL, PROMPT, RECORD = "KANDINSKY5_MODEL", "KANDINSKY5_PROMPT", "KANDINSKY5_RECORD"
SEED = ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True})
YES_NO = {"auto": None, "on": True, "off": False}


@dataclass(frozen=True)
class Model:
    """A pipeline, and the adapters that this wire of it wants: path and scale. All wires share the pipeline."""

    pipeline: Pipeline
    own: tuple[tuple[str, float], ...]  # the config's adapters: names and scales
    loras: tuple[tuple[Path, float], ...] = ()
    loaded: set[str] = field(default_factory=set)  # names of the other adapters that the pipeline knows

    def ready(self) -> Pipeline:
        """The pipeline with exactly these adapters active."""
        pipeline, scales = self.pipeline, dict(self.own)
        active = {one["name"]: one["scale"] for one in pipeline.active_adapters()}
        for path, scale in self.loras:
            name = f"{path.stem} {weights.fingerprint(path)}"  # a file that has changed is another adapter
            if name not in self.loaded:
                pipeline.load_adapter(None, path, name)
                self.loaded.add(name)
                active = {name: 1.0}
            scales[name] = scales.get(name, 0.0) + scale
        if scales != active:
            if scales:
                pipeline.set_adapter(list(scales), list(scales.values()))
            else:
                pipeline.disable_adapters()
        return pipeline


@dataclass(frozen=True)
class Prompt:
    """Words, what the encoders made of them, and the pictures that belong to them."""

    text: str
    negative: str | None
    expanded: str | None
    expand: bool | None
    embeds: TextEmbeddings
    negative_embeds: TextEmbeddings | None  # None: the config has no guidance
    pictures: tuple[Image.Image, ...]
    is_image: bool


class Load:
    """A variant, ready to be used."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)
    DESCRIPTION = "Loads a variant of Kandinsky 5: its YAML in configs/ says what it is and which weights it needs."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        engines = ["auto", *ENGINES, *(name for name in BLOCK_SPARSE_ENGINES if name not in ENGINES)]
        files = {argument: (weights.choices(argument),) for argument in weights.FOLDERS}
        return {
            "required": {
                "config": (weights.config_names(), {"default": "5s_sft"}),
                "dtype": (["auto", *DTYPES],),
                "attention_engine": (engines,),
                "offload": (["auto", "on", "off"], {"tooltip": "models are on the GPU only while they work"}),
                "blocks_on_gpu": (
                    "INT",
                    {"default": 0, "min": 0, "max": 1000, "tooltip": "block swap: the others stream; 0: all that fit"},
                ),
                "quantization": (["none", "int8", "fp8", "nf4"], {"tooltip": "of the transformer's weights"}),
            },
            "optional": {
                **files,
                "overrides": ("STRING", {"multiline": True, "default": "", "tooltip": "key.key=value, one a line"}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, config: str, **inputs: Any) -> str:
        chosen = [(name, inputs.get(name) or weights.AUTO) for name in weights.FOLDERS]
        found = [weights.find(name, choice, load_config(weights.config_path(config))) for name, choice in chosen]
        return weights.fingerprint(weights.config_path(config), *(path for path in found if path is not None))

    def load(
        self,
        config: str,
        dtype: str,
        attention_engine: str,
        offload: str,
        blocks_on_gpu: int,
        quantization: str,
        overrides: str = "",
        **files: str,
    ) -> tuple[Model]:
        stop_where_asked()
        lines = [line.strip() for line in overrides.splitlines() if line.strip()]
        settings = load_config(weights.config_path(config), lines)
        runtime: dict[str, Any] = {} if offload == "auto" else {"offload": offload}
        runtime |= {"blocks_on_gpu": blocks_on_gpu} if blocks_on_gpu else {}
        runtime |= {} if quantization == "none" else {"dit_quantization": quantization}
        settings = with_settings(settings, runtime=runtime)
        chosen = {name: weights.find(name, files.get(name, weights.AUTO), settings) for name in weights.FOLDERS}
        comfy.model_management.unload_all_models()  # what it doesn't use now; the plan counts on what is free
        comfy.model_management.soft_empty_cache()
        pipeline = load_pipeline(
            settings,
            comfy.model_management.get_torch_device(),
            weights.CACHE_DIR,
            dit_path=chosen["dit_path"],
            text_encoder_path=chosen["text_encoder_path"],
            text_encoder2_path=chosen["text_encoder2_path"],
            vae_path=chosen["vae_path"],
            attention_engine=None if attention_engine == "auto" else attention_engine,
            dtype=None if dtype == "auto" else dtype,
        )
        vae = chosen["vae_path"] or weight_files(settings, weights.CACHE_DIR)["vae"]
        pipeline.latent_rgb = load_latent_rgb(vae, settings.model.vae.name)
        own = tuple((one["name"], one["scale"]) for one in pipeline.active_adapters())
        return (Model(pipeline, own),)


class Lora:
    """An adapter more."""

    CATEGORY, FUNCTION = CATEGORY, "add"
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)
    DESCRIPTION = (
        "Adds a LoRA, LoHa, LoKr or DoRA. Encode after it: its trigger, if it has one, goes before the prompt."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        scale = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}
        names = folder_paths.get_filename_list("loras")
        return {"required": {"model": (MODEL,), "lora": (names,), "strength": ("FLOAT", scale)}}

    @classmethod
    def IS_CHANGED(cls, lora: str, **_: Any) -> str:
        return weights.fingerprint(weights.lora_path(lora))

    def add(self, model: Model, lora: str, strength: float) -> tuple[Model]:
        return (dataclasses.replace(model, loras=(*model.loras, (weights.lora_path(lora), strength))),)


class Encode:
    """Words, and for I2V and I2I a picture."""

    CATEGORY, FUNCTION = CATEGORY, "encode"
    RETURN_TYPES, RETURN_NAMES = (PROMPT,), ("prompt",)
    DESCRIPTION = "Encodes a prompt and its negative. I2V begins with the picture, I2I edits it."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL,),
                "text": ("STRING", {"multiline": True, "default": ""}),
                "negative": ("STRING", {"multiline": True, "default": "", "tooltip": "empty: the config's"}),
                "expand": (list(YES_NO), {"tooltip": "have Qwen write the prompt out; auto: where it can"}),
                "expand_seed": SEED,
                "one_picture": ("BOOLEAN", {"default": False, "tooltip": "T2V models, sampled with 0 seconds"}),
            },
            "optional": {"picture": ("IMAGE",)},
        }

    def encode(
        self,
        model: Model,
        text: str,
        negative: str,
        expand: str,
        expand_seed: int,
        one_picture: bool,
        picture: Tensor | None = None,
    ) -> tuple[Prompt]:
        stop_where_asked()
        pipeline = model.ready()
        pictures = () if picture is None else (to_picture(picture),)
        request = resolve_request(
            pipeline.config,
            text,
            image_sizes=[one.size for one in pictures],
            time_length=0 if one_picture else None,
            seed=expand_seed,
            negative_caption=negative or None,
            expand_prompts=YES_NO[expand],
        )
        fitted = [media.fit_image(one, request.width, request.height) for one in pictures]
        request = pipeline.expand_prompts(request, fitted)
        branches = pipeline.encode_prompts(request, Inputs(pictures), fitted)
        uncond = branches.get("uncond")
        prompt = Prompt(
            text=text,
            negative=negative or None,
            expanded=request.samples[0].expanded,
            expand=YES_NO[expand],
            embeds=branches["cond"][0],
            negative_embeds=None if uncond is None else uncond[0],
            pictures=pictures,
            is_image=request.is_image,
        )
        return (prompt,)


class Sample:
    """From noise to latents."""

    CATEGORY, FUNCTION = CATEGORY, "sample"
    RETURN_TYPES, RETURN_NAMES = ("LATENT", RECORD), ("latent", "record")
    DESCRIPTION = "Samples what the config is for: T2V, I2V, T2I or I2I. 0 and -1 are the config's values."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = {"default": 0, "min": 0, "max": 8192, "step": 16, "tooltip": "0: the config's, or the picture's"}
        return {
            "required": {
                "model": (MODEL,),
                "prompt": (PROMPT,),
                "seed": SEED,
                "width": ("INT", side),
                "height": ("INT", side),
                "seconds": ("FLOAT", {"default": -1.0, "min": -1.0, "max": 21.0, "step": 0.1}),
                "steps": ("INT", {"default": 0, "min": 0, "max": 1000}),
                "guidance": ("FLOAT", {"default": -1.0, "min": -1.0, "max": 100.0, "step": 0.1}),
                "magcache": ("BOOLEAN", {"default": False, "tooltip": "skip evaluations that change little"}),
            },
            "optional": {
                "given": (GIVEN,),
                "scheduler_scale": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.1}),
                "guidance_every": ("INT", {"default": 0, "min": 0, "max": 1000}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, seed: int, **_: Any) -> int:
        """The same seed and inputs make the same latents, to the last bit: there is nothing to run again."""
        return seed

    def sample(
        self,
        model: Model,
        prompt: Prompt,
        seed: int,
        width: int,
        height: int,
        seconds: float,
        steps: int,
        guidance: float,
        magcache: bool,
        given: Given | None = None,
        scheduler_scale: float = 0.0,
        guidance_every: int = 0,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        stop_where_asked()
        pipeline = model.ready()
        pipeline = with_magcache(pipeline, magcache or pipeline.config.uses_magcache)
        request, found, keyframes = settled(
            pipeline.config,
            prompt.text,
            prompt.pictures,
            given or Given(),
            time_length=None if seconds < 0 else seconds,
            width=width or None,
            height=height or None,
            seed=seed,
            num_steps=steps or None,
            guidance_weight=None if guidance < 0 else guidance,
            scheduler_scale=scheduler_scale or None,
            guidance_every=guidance_every or None,
            negative_caption=prompt.negative,
            expand_prompts=prompt.expand,
        )
        if request.is_image != prompt.is_image:
            made = "a picture" if prompt.is_image else "a video"
            raise ValueError(f"the prompt was encoded for {made}: switch one_picture, or change seconds")
        samples = tuple(dataclasses.replace(one, expanded=prompt.expanded) for one in request.samples)
        request = dataclasses.replace(request, samples=samples)
        inputs = Inputs(
            **vars(found),
            keyframes=keyframes,
            prompt_embeds=prompt.embeds,
            negative_prompt_embeds=prompt.negative_embeds,
        )
        made_latents = pipeline.sample(request, inputs, callback=Progress(request))
        latent, record = to_native(made_latents.latents, pipeline.vae.scaling_factor), made_latents.records[0]
        return {**latent, CUT: (frames_before(record), request.loop)}, record


class Decode:
    """From latents to frames."""

    CATEGORY, FUNCTION = CATEGORY, "decode"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("frames",)
    DESCRIPTION = "Decodes latents, also of ComfyUI's own Kandinsky 5 nodes, in tiles that fit into memory."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": (MODEL,), "latent": ("LATENT",)}}

    def decode(self, model: Model, latent: dict[str, Any]) -> tuple[Tensor]:
        stop_where_asked()
        pipeline = model.pipeline
        before, is_loop = latent.get(CUT, (0, False))
        decode = pipeline.decode_loop if is_loop else pipeline.decode
        pixels = decode(from_native(latent, pipeline.vae.scaling_factor))[:, :, before:]  # (B, 3, T, H, W), uint8
        stop_where_asked()
        return (pixels.permute(0, 2, 3, 4, 1).flatten(0, 1).float() / 255,)


class Save:
    """An MP4 or a PNG, with the record of how it was made beside it."""

    CATEGORY, FUNCTION, OUTPUT_NODE = CATEGORY, "save", True
    RETURN_TYPES: tuple[str, ...] = ()
    DESCRIPTION = "Writes frames as MP4, a single one as PNG, and beside it a JSON file of all settings."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        prefix = ("STRING", {"default": "kandinsky5/video"})
        rate = {"default": 0, "min": 0, "max": 240, "tooltip": "computed between the 24 that are made; 0: those"}
        return {
            "required": {"frames": ("IMAGE",), "record": (RECORD,), "filename_prefix": prefix},
            "optional": {"fps": ("INT", rate), "upscale": ("INT", {"default": 1, "min": 1, "max": 4})},
        }

    def save(
        self, frames: Tensor, record: dict[str, Any], filename_prefix: str, fps: int = 0, upscale: int = 1
    ) -> dict[str, Any]:
        stop_where_asked()
        count, height, width, _ = frames.shape
        expected = frames_of(record), record["height"], record["width"]
        if (count, height, width) != expected:
            raise ValueError(
                f"there are {count} frames of {width}x{height}, and the record is of {expected[0]} of "
                f"{expected[2]}x{expected[1]}: save what other nodes have changed with one of ComfyUI's own"
            )
        runtime = dict(record["config"]["runtime"])
        runtime |= ({"fps": fps} if fps else {}) | ({"upscale": upscale} if upscale > 1 else {})
        post = Post.of(runtime)
        if not post.does_nothing:
            check(post, count == 1)
        record = {**record, "config": {**record["config"], "runtime": runtime}}
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory(), width, height
        )
        suffix = media.IMAGE_SUFFIX if count == 1 else media.VIDEO_SUFFIX
        path = Path(folder) / f"{name}_{counter:05}_{suffix}"
        media.check_writable(path, suffix)
        pixels = frames.permute(3, 0, 1, 2)[None]  # (1, 3, T, H, W)
        write_outputs(pixels, [record], path, Stopwatch(dict(record["seconds"])))
        shown = {"filename": path.name, "subfolder": subfolder, "type": "output"}
        return {"ui": {"images": [shown], "animated": (count > 1,)}}


NODE_CLASS_MAPPINGS = {
    "Kandinsky5Load": Load,
    "Kandinsky5Lora": Lora,
    "Kandinsky5Encode": Encode,
    "Kandinsky5Sample": Sample,
    "Kandinsky5Decode": Decode,
    "Kandinsky5Save": Save,
    "Kandinsky5Source": Source,
    "Kandinsky5Frames": Frames,
    "Kandinsky5Join": Join,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "Kandinsky5Load": "Kandinsky 5: load",
    "Kandinsky5Lora": "Kandinsky 5: LoRA",
    "Kandinsky5Encode": "Kandinsky 5: encode prompt",
    "Kandinsky5Sample": "Kandinsky 5: sample",
    "Kandinsky5Decode": "Kandinsky 5: decode",
    "Kandinsky5Save": "Kandinsky 5: save",
    "Kandinsky5Source": "Kandinsky 5: start from, go on from",
    "Kandinsky5Frames": "Kandinsky 5: further pictures",
    "Kandinsky5Join": "Kandinsky 5: join",
}
