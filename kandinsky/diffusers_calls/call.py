"""A call in diffusers' terms, made with one of our pipelines: text, noise and pictures as diffusers prepares them.

Randomness is diffusers': the noise of all outputs in one draw, the picture's latents after it. So are pictures, which
are stretched to the size; prompts, which are cleaned; and the rotary scale, which the size decides. Embeddings and
condition then go to our pipeline's `generate`.
"""

from __future__ import annotations

import functools
import html
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from kandinsky.attention.nabla import fast_sta_nabla
from kandinsky.common.given import as_number, as_whole, shown
from kandinsky.common.limits import BLOCK_SIDE, MAX_TEXT_TOKENS, PATCH_PIXELS
from kandinsky.config.reading import with_settings
from kandinsky.diffusers_calls.base import DiffusersBase
from kandinsky.pictures import load_image
from kandinsky.pipelines.base import Pipeline
from kandinsky.pipelines.calls import check_callback, check_latents
from kandinsky.pipelines.inputs import Inputs, as_images
from kandinsky.request import FRAMES_PER_LATENT, PIXELS_PER_LATENT, resolve_request
from kandinsky.sampling.conditioning import (
    FIRST_FRAME,
    Conditioning,
    Item,
    from_first_frame,
    from_source,
    from_text,
)
from kandinsky.text.embeddings import TextEmbeddings

logger = logging.getLogger(__name__)

QWEN, CLIP, LENGTHS = "prompt_embeds_qwen", "prompt_embeds_clip", "prompt_cu_seqlens"
CALLBACK_TENSORS = ("latents", QWEN, CLIP, f"negative_{QWEN}", f"negative_{CLIP}")
SD_PIXELS = (480, 854)  # both sides within: the rotary scale of SD, as diffusers decides it
Generators = torch.Generator | Sequence[torch.Generator] | None
Triple = tuple[Tensor, Tensor, Tensor]  # text, pooled, ends of the prompts


class KandinskyPipelineOutput(NamedTuple):
    frames: Any


class KandinskyImagePipelineOutput(NamedTuple):
    image: Any


def _shared(
    generator: Generators = None,
    latents: Tensor | None = None,
    prompt_embeds_qwen: Tensor | None = None,
    prompt_embeds_clip: Tensor | None = None,
    negative_prompt_embeds_qwen: Tensor | None = None,
    negative_prompt_embeds_clip: Tensor | None = None,
    prompt_cu_seqlens: Tensor | None = None,
    negative_prompt_cu_seqlens: Tensor | None = None,
    output_type: str = "pil",
    return_dict: bool = True,
    callback_on_step_end: Any = None,
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    max_sequence_length: int | None = None,
    *,
    scheduler_scale: float | None = None,
    schedule: str | None = None,
) -> None:
    """The arguments that all four calls end with.

    generator: one that is drawn from in turn, or one an output; None draws from torch's own. latents: as
    `prepare_latents` returns them, condition channels and mask included. ..._embeds_..., ..._cu_seqlens: as
    `encode_prompt` returns them, all three or none. output_type: "pil", "np", "pt" or "latent". return_dict: False
    returns a plain tuple. callback_on_step_end: f(pipe, step, timestep, tensors) -> tensors that replace them.
    max_sequence_length: tokens of a prompt. scheduler_scale, schedule: ours: the shift, and "original" for the noise
    levels of the original in place of diffusers'.

    Raises ValueError for anything that can't be done, before any model runs.
    """


def diffusers_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """A `__call__` with the shared arguments in its signature and its help, in place of `**shared`."""
    own = [one for one in inspect.signature(function).parameters.values() if one.name != "shared"]
    signature = inspect.Signature([*own, *inspect.signature(_shared).parameters.values()])

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(**signature.bind(*args, **kwargs).arguments)

    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__doc__ = f"{inspect.getdoc(function)}\n\n{inspect.getdoc(_shared)}"
    return call


class DiffusersPipeline(DiffusersBase):
    """What the four have in common; each adds the signatures of its task."""

    max_tokens = 512  # of a prompt, by default
    makes_video = True
    guidance_scale = 1.0  # of the last call
    num_timesteps = 0
    show_progress = True

    @property
    def interrupt(self) -> bool:
        """True ends the call that runs after its step, with what there is then."""
        return self.pipeline.interrupt

    @interrupt.setter
    def interrupt(self, wanted: bool) -> None:
        self.pipeline.interrupt = wanted

    _interrupt = interrupt  # by which diffusers' documentation sets it

    @property
    def resolutions(self) -> list[tuple[int, int]]:
        """(width, height) that images are drawn at."""
        return list(self._config.generation.resolutions)

    @resolutions.setter
    def resolutions(self, sizes: Sequence[tuple[int, int]]) -> None:
        (width, height), *_ = sizes
        changes = {"resolutions": sizes, "width": width, "height": height}
        self._change(config=with_settings(self._config, generation=changes))

    def _snapped(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the resolution that is nearest in shape; what is no number is refused later."""
        if (width, height) in self.resolutions or not (as_number(height) > 0 and as_number(width) > 0):
            return height, width
        nearest = min(self.resolutions, key=lambda size: abs(size[0] / size[1] - width / height))
        logger.warning("%sx%s is not a size that this model draws: %dx%d is, and is taken", width, height, *nearest)
        return nearest[1], nearest[0]

    def set_progress_bar_config(self, disable: bool = False) -> None:
        self.show_progress = not disable

    # --- text ---------------------------------------------------------------------------------------------------------

    def _embed(self, prompt: str | Sequence[str], image: Any, max_length: int | None) -> TextEmbeddings:
        """Of prompts without HTML's escapes and repeated spaces; pictures at half their size, as they were given."""
        texts = [" ".join(html.unescape(html.unescape(text)).split()) for text in _texts(prompt)]
        encode, placement = self.pipeline.text_embedder.encode, self.pipeline.placement
        content = {"t2i": "image", "i2i": "image_edit"}.get(self.task, "video")
        pictures = [load_image(one) for one in as_images(image)] if self.task == "i2i" else []
        if pictures and len(pictures) not in (1, len(texts)):
            raise ValueError(f"{len(pictures)} pictures for {len(texts)} prompts: give one for all, or one for each")
        seen = [[one.resize((one.width // 2, one.height // 2), Image.Resampling.BICUBIC)] for one in pictures]
        parts = []
        with torch.no_grad(), placement.use("text_embedder"):
            for i, text in enumerate(texts):
                shown_picture = seen[i % len(seen)] if seen else None
                parts.append(encode([text], content=content, images=shown_picture, max_length=max_length))
        longest = max(part.text_embeds.shape[1] for part in parts)
        if pictures and max_length is not None and longest > max_length:  # neither words nor picture are cut there
            raise ValueError(f"a prompt and its picture make {longest} tokens, and max_sequence_length is {max_length}")
        return TextEmbeddings.join(parts)

    def _encode_prompt(
        self, prompt: Any, image: Any, copies: int, max_length: int, device: Any, dtype: torch.dtype | None
    ) -> Triple:
        with self.pipeline.lock:
            embeds = self._embed(prompt, image, max_length)
        rows = [row for row in embeds.unbind() for _ in range(copies)]
        lengths = torch.tensor([0, *(row.text_embeds.shape[1] for row in rows)]).cumsum(0).to(torch.int32)
        place = self.device if device is None else device
        joined = TextEmbeddings.join(rows).to(place, self.dtype if dtype is None else dtype)
        return joined.text_embeds, joined.pooled_embeds, lengths.to(place)

    # --- checks -------------------------------------------------------------------------------------------------------

    def _check_inputs(
        self,
        prompt: Any,
        negative_prompt: Any,
        height: Any,
        width: Any,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        max_sequence_length: int | None = None,
        **embeds: Any,
    ) -> None:
        known = {begin + name for begin in ("", "negative_") for name in (QWEN, CLIP, LENGTHS)}
        if unknown := sorted(set(embeds) - known):
            raise ValueError(f"there are no arguments {shown(unknown)}: leave them out")
        if max_sequence_length is not None and not 1 <= (as_whole(max_sequence_length) or 0) <= MAX_TEXT_TOKENS:
            given = shown(max_sequence_length)
            raise ValueError(f"max_sequence_length is {given}; it must be from 1 to {MAX_TEXT_TOKENS} tokens")
        for name, side in {"height": height, "width": width}.items():
            if (pixels := as_whole(side)) is None or pixels < 1 or (self.makes_video and pixels % PATCH_PIXELS):
                raise ValueError(f"{name} is {shown(side)}; it must be a multiple of {PATCH_PIXELS} pixels")
        if unknown := [name for name in callback_on_step_end_tensor_inputs or () if name not in CALLBACK_TENSORS]:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {shown(unknown)}; it may have {', '.join(CALLBACK_TENSORS)}"
            )
        for begin in ("", "negative_"):
            triple = [embeds.get(f"{begin}{name}") for name in (QWEN, CLIP, LENGTHS)]
            if any(one is None for one in triple) and any(one is not None for one in triple):
                raise ValueError(f"{begin}{QWEN}, {begin}{CLIP} and {begin}{LENGTHS} belong together: give all or none")
        if prompt is None and embeds.get(QWEN) is None:
            raise ValueError(f"there is no prompt: say what to show, or give {QWEN}, {CLIP} and {LENGTHS}")
        if prompt is not None and embeds.get(QWEN) is not None:
            raise ValueError(f"both a prompt and {QWEN} are given: leave one of them out")
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            words = [text] if isinstance(text, str) else text
            if words is not None and not (isinstance(words, list) and words and all(isinstance(w, str) for w in words)):
                raise ValueError(f"{name} is {shown(text)}; it must be a string or a list of strings")

    # --- latents ------------------------------------------------------------------------------------------------------

    def _prepare_latents(
        self, image: Any, batch_size: int, channels: int, frames: int, height: int, width: int,
        dtype: torch.dtype | None, device: Any, generator: Generators, latents: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """(B, T, H / 8, W / 8, C), with condition channels and mask where the model has them: noise first, then the
        picture's latents, from the same generator."""
        dtype, device = dtype or self.dtype, torch.device(self.device if device is None else device)
        if latents is not None:
            if not isinstance(latents, Tensor):
                raise ValueError(f"latents are {shown(latents)}; they must be a tensor, as prepare_latents returns it")
            return latents.to(device=device, dtype=dtype)
        generators: list[Any] = list(generator) if isinstance(generator, list | tuple) else [generator]
        if len(generators) not in (1, batch_size):
            raise ValueError(f"{len(generators)} generators for {batch_size} outputs: give one, or one for each")
        size = (as_whole(height) or 0) // PIXELS_PER_LATENT, (as_whole(width) or 0) // PIXELS_PER_LATENT
        shape = ((frames - 1) // FRAMES_PER_LATENT + 1, *size, channels)
        rows = [batch_size] if len(generators) == 1 else [1] * batch_size
        noise = torch.cat([_noise((n, *shape), one, device, dtype) for n, one in zip(rows, generators, strict=True)])
        pipeline = self.pipeline
        if self.task in ("t2v", "t2i"):
            conditioning = from_text(noise, pipeline.dit.in_channels)
        else:
            pictures = [load_image(one).resize((width, height), Image.Resampling.LANCZOS) for one in as_images(image)]
            if len(pictures) == 0 or batch_size % len(pictures):
                raise ValueError(f"{len(pictures)} pictures for {batch_size} outputs: give one, or one for each prompt")
            with torch.no_grad():
                posteriors = pipeline.encode_images(pictures)
            drawn = [one.sample(generators[i % len(generators)]) for i, one in enumerate(posteriors)]
            each = [
                _channels_last(one) * pipeline.vae.scaling_factor
                for one in drawn
                for _ in range(batch_size // len(drawn))
            ]
            pixels = torch.stack(each).to(device=device, dtype=dtype)  # (B, H, W, C)
            if self.task == "i2v":
                conditioning = from_first_frame(noise, pixels, self._config.generation.visual_cond)
            else:
                conditioning = from_source(noise, pixels)
        return conditioning.model_input(conditioning.hold(noise))

    def _conditioning(self, latents: Tensor, size: tuple[int, ...]) -> Conditioning:
        """What `prepare_latents` returns, taken apart again; float32, on the DiT's device."""
        channels = self._config.model.dit_params.in_visual_dim
        check_latents(latents, (*size, self.pipeline.dit.in_channels))
        latents = latents.float().to(self.pipeline.placement.device("dit"))
        own, extra = latents[..., :channels], latents[..., channels:]
        items = (Item(FIRST_FRAME, own[:, :1], marked=True),) if self.task == "i2v" else ()
        return Conditioning(own, extra if extra.shape[-1] else None, items)

    # --- the call -----------------------------------------------------------------------------------------------------

    def _call(
        self,
        prompt: Any,
        negative_prompt: Any,
        height: int,
        width: int,
        num_frames: int,
        num_inference_steps: int,
        guidance_scale: float,
        copies: int | None,
        image: Any = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        scheduler_scale: float | None = None,
        schedule: str | None = None,
        **embeds: Tensor | None,
    ) -> Any:
        callback, names = callback_on_step_end, callback_on_step_end_tensor_inputs
        names = getattr(callback, "tensor_inputs", names)  # diffusers' own kind of callback brings them along
        self._check_inputs(prompt, negative_prompt, height, width, names, max_sequence_length, **embeds)
        check_callback(callback)
        copies, weight = 1 if copies is None else copies, as_number(guidance_scale)
        is_guided = weight > 1
        given = {name: self._given(embeds, name) for name in ("", "negative_")}
        count = len(_texts(prompt)) if given[""] is None else len(given[""].text_embeds)
        request = resolve_request(
            self._config,
            None,
            num_prompts=count,
            samples_per_prompt=copies,
            image_sizes=[(width, height)] if self.task in ("i2v", "i2i") else [],
            width=width,
            height=height,
            num_frames=num_frames if self.makes_video else None,
            num_steps=num_inference_steps,
            guidance_weight=1.0 if weight <= 1 else guidance_scale,  # as there; what is no number is refused
            scheduler_scale=scheduler_scale,
            schedule=schedule,
            seeded=False,
            max_sequence_length=max_sequence_length,
        )
        negatives = self._config.generation.negative_caption if negative_prompt is None else negative_prompt
        if isinstance(negatives, list) and len(negatives) != count:
            raise ValueError(f"{len(negatives)} negative prompts for {count} prompts: give one or one each")

        pipeline, max_length = self.pipeline, max_sequence_length or self.max_tokens
        with pipeline.lock:
            channels, frames = self._config.model.dit_params.in_visual_dim, request.num_frames
            size = len(request.samples), channels, frames, request.height, request.width
            prepared = self._prepare_latents(image, *size, None, None, generator, latents)
            conditioning = self._conditioning(prepared, (len(request.samples), *request.latent_size))
            text, unwanted = given[""] or self._embed(prompt, image, max_length), given["negative_"]
            if is_guided and unwanted is None:
                words = [negatives] * count if isinstance(negatives, str) else negatives
                unwanted = self._embed(words, image, max_length)
            is_sd = all(SD_PIXELS[0] <= side <= SD_PIXELS[1] for side in (request.height, request.width))
            if self.makes_video:
                scale = (1.0, 2.0, 2.0) if is_sd else (1.0, 3.16, 3.16)
                pipeline.config = with_settings(pipeline.config, metrics={"scale_factor": scale})
            self.guidance_scale, self.num_timesteps = guidance_scale, request.num_steps
            result = pipeline.generate(
                request,
                Inputs(prompt_embeds=text, negative_prompt_embeds=unwanted, conditioning=conditioning),
                None,
                self.show_progress,
                output_type,
                callback and functools.partial(self._on_step_end, callback, names, conditioning),
            )
        if self.makes_video and request.is_image and output_type != "latent":
            result = [[one] for one in result] if output_type == "pil" else result[:, None]  # a video of one frame
        if not return_dict:
            return (result,)
        return KandinskyPipelineOutput(result) if self.makes_video else KandinskyImagePipelineOutput(result)

    def _given(self, embeds: Mapping[str, Tensor | None], begin: str) -> TextEmbeddings | None:
        """A triple of embeddings as ours: lengths say which tokens of a row are real."""
        qwen, clip, ends = (embeds.get(f"{begin}{name}") for name in (QWEN, CLIP, LENGTHS))
        if qwen is None or clip is None or ends is None:
            return None
        lengths = ends.diff().to(qwen.device)
        if (
            len(qwen) != len(clip)
            or len(qwen) != len(lengths)
            or not (lengths > 0).all()
            or lengths.max() > qwen.shape[1]
        ):
            raise ValueError(
                f"{begin}{QWEN} {tuple(qwen.shape)}, {begin}{CLIP} {tuple(clip.shape)} and {begin}{LENGTHS} "
                f"{tuple(ends.shape)} don't belong together: give what encode_prompt returned"
            )
        mask = torch.arange(qwen.shape[1], device=qwen.device) < lengths[:, None]
        return TextEmbeddings(qwen, clip, None if mask.all() else mask)

    def _on_step_end(
        self, callback: Any, names: Sequence[str], conditioning: Conditioning,
        pipeline: Pipeline, step: int, timestep: Tensor, tensors: dict[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        """Between a callback in diffusers' form and one in ours: each of them sees its own kind of tensors."""
        joined = {
            begin: TextEmbeddings.join(tensors[f"{begin}prompt_embeds"])
            for begin in ("", "negative_")
            if tensors.get(f"{begin}prompt_embeds") is not None
        }
        seen: dict[str, Any] = dict.fromkeys(CALLBACK_TENSORS)
        seen["latents"] = conditioning.model_input(tensors["latents"])
        for begin, text in joined.items():
            seen |= {f"{begin}{QWEN}": text.text_embeds, f"{begin}{CLIP}": text.pooled_embeds}
        returned = callback(self, step, timestep, {name: seen[name] for name in names}) or {}
        if unknown := sorted(set(returned) - set(CALLBACK_TENSORS)):
            raise ValueError(f"callback_on_step_end returned {shown(unknown)}; it may replace {CALLBACK_TENSORS}")
        replaced: dict[str, Any] = {}
        if (latents := returned.get("latents")) is not None and latents is not seen["latents"]:
            channels = tensors["latents"].shape[-1]
            if latents.shape != seen["latents"].shape or not torch.equal(
                latents[..., channels:].float(), seen["latents"][..., channels:]
            ):
                raise ValueError("callback_on_step_end may change the latents' own channels, not shape or condition")
            replaced["latents"] = latents[..., :channels].float()
        for begin, text in joined.items():
            qwen = returned.get(f"{begin}{QWEN}", text.text_embeds)
            clip = returned.get(f"{begin}{CLIP}", text.pooled_embeds)
            if qwen is not text.text_embeds or clip is not text.pooled_embeds:
                mask = text.text_mask if qwen.shape == text.text_embeds.shape else None
                replaced[f"{begin}prompt_embeds"] = TextEmbeddings(qwen, clip, mask).unbind()
        return replaced

    # --- block-sparse attention ---------------------------------------------------------------------------------------

    @staticmethod
    def fast_sta_nabla(
        T: int, H: int, W: int, wT: int = 3, wH: int = 3, wW: int = 3, device: torch.device | str = "cuda"
    ) -> Tensor:
        """The window that block-sparse attention always keeps, bool (T * H * W, T * H * W)."""
        return fast_sta_nabla(T, H, W, wT, wH, wW, device)

    def get_sparse_params(self, sample: Tensor, device: torch.device | str) -> dict[str, Any] | None:
        """What block-sparse attention is told about latents (B, T, H, W, C); None where attention is dense."""
        attention, patch = self._config.model.attention, self._config.model.dit_params.patch_size
        if attention.type != "nabla":
            return None
        t, h, w = (size // p for size, p in zip(sample.shape[1:4], patch, strict=True))
        window = attention.wT, attention.wH, attention.wW
        sta = fast_sta_nabla(t, h // BLOCK_SIDE, w // BLOCK_SIDE, *window, device)
        return {
            "sta_mask": sta[None, None], "attention_type": "nabla", "to_fractal": True, "P": attention.mass_kept(0, 1),
            "wT": attention.wT, "wW": attention.wW, "wH": attention.wH, "add_sta": attention.add_sta,
            "visual_shape": (t, h, w), "method": attention.method,
        }  # fmt: skip


def _texts(prompt: str | Sequence[str]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt)


def _noise(shape: Sequence[int], generator: torch.Generator | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Gaussian noise from a generator on its own device, or None from torch's own on `device`."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator is {shown(generator)}; it must be a torch.Generator or a list of them")
    place = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=place, dtype=dtype).to(device)


def _channels_last(latents: Tensor) -> Tensor:
    """A picture's (1, C, H, W) or (1, C, 1, H, W) as (H, W, C)."""
    return latents.view(latents.shape[1], *latents.shape[-2:]).permute(1, 2, 0)
