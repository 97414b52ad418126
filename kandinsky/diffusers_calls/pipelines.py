"""Our pipelines under the names, arguments and defaults that diffusers' four Kandinsky 5 pipelines have.

    from kandinsky import Kandinsky5T2VPipeline     # in place of: from diffusers import Kandinsky5T2VPipeline

The same generator gives the same latents as there. What an argument asks for is done or refused with a ValueError,
never left out; docs/diffusers.md says what differs.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from kandinsky.common.given import as_whole
from kandinsky.diffusers_calls.call import DiffusersPipeline, Generators, Triple, diffusers_call
from kandinsky.pictures import load_image
from kandinsky.pipelines.inputs import as_images
from kandinsky.request import FRAMES_PER_LATENT

logger = logging.getLogger(__name__)

Device = torch.device | str | None
DType = torch.dtype | None
Prompt = str | list[str] | None


class Kandinsky5T2VPipeline(DiffusersPipeline):
    """Text to video."""

    task = "t2v"

    @diffusers_call
    def __call__(
        self,
        prompt: Prompt = None,
        negative_prompt: Prompt = None,
        height: int = 512,
        width: int = 768,
        num_frames: int = 121,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        num_videos_per_prompt: int | None = 1,
        **shared: Any,
    ) -> Any:
        """Generate videos: `.frames[0]` is the first one."""
        wishes = (height, width, whole_frames(num_frames), num_inference_steps, guidance_scale, num_videos_per_prompt)
        return self._call(prompt, negative_prompt, *wishes, **shared)

    def encode_prompt(
        self, prompt: str | list[str], num_videos_per_prompt: int = 1, max_sequence_length: int = 512,
        device: Device = None, dtype: DType = None,
    ) -> Triple:  # fmt: skip
        """(B, L, in_text_dim), (B, in_text_dim2), and the ends of the prompts one after the other, (B + 1,) int32."""
        return self._encode_prompt(prompt, None, num_videos_per_prompt, max_sequence_length, device, dtype)

    def check_inputs(self, prompt: Any, negative_prompt: Any, height: int, width: int, **more: Any) -> None:
        """Raise ValueError for arguments of a call that don't go together; `more` are embeddings and the last two."""
        self._check_inputs(prompt, negative_prompt, height, width, **more)

    def prepare_latents(
        self, batch_size: int, num_channels_latents: int = 16, height: int = 480, width: int = 832,
        num_frames: int = 81, dtype: DType = None, device: Device = None, generator: Generators = None,
        latents: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """What sampling starts from: noise, and zeros for condition and mask where the model has them."""
        size = num_channels_latents, num_frames, height, width
        return self._prepare_latents(None, batch_size, *size, dtype, device, generator, latents)


class Kandinsky5I2VPipeline(DiffusersPipeline):
    """Image to video."""

    task = "i2v"

    @diffusers_call
    def __call__(
        self,
        image: Any,
        prompt: Prompt = None,
        negative_prompt: Prompt = None,
        height: int = 512,
        width: int = 768,
        num_frames: int = 121,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        num_videos_per_prompt: int | None = 1,
        **shared: Any,
    ) -> Any:
        """Generate videos that begin with a picture, which is stretched to the size: `.frames[0]` is the first one."""
        wishes = (height, width, whole_frames(num_frames), num_inference_steps, guidance_scale, num_videos_per_prompt)
        return self._call(prompt, negative_prompt, *wishes, required(image), **shared)

    encode_prompt = Kandinsky5T2VPipeline.encode_prompt

    def check_inputs(self, prompt: Any, negative_prompt: Any, image: Any, height: int, width: int, **more: Any) -> None:
        """Raise ValueError for arguments of a call that don't go together; `more` are embeddings and the last two."""
        required(image)
        self._check_inputs(prompt, negative_prompt, height, width, **more)

    def prepare_latents(
        self, image: Any, batch_size: int, num_channels_latents: int = 16, height: int = 480, width: int = 832,
        num_frames: int = 81, dtype: DType = None, device: Device = None, generator: Generators = None,
        latents: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """What sampling starts from: noise with the picture in its first frame, condition and mask."""
        size = num_channels_latents, num_frames, height, width
        return self._prepare_latents(image, batch_size, *size, dtype, device, generator, latents)


class Kandinsky5T2IPipeline(DiffusersPipeline):
    """Text to image."""

    task = "t2i"
    makes_video = False

    @diffusers_call
    def __call__(
        self,
        prompt: Prompt = None,
        negative_prompt: Prompt = None,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int | None = 1,
        **shared: Any,
    ) -> Any:
        """Draw pictures at the one of `resolutions` that is nearest in shape: `.image[0]` is the first one."""
        wishes = (*self._snapped(height, width), 1, num_inference_steps, guidance_scale, num_images_per_prompt)
        return self._call(prompt, negative_prompt, *wishes, **shared)

    def encode_prompt(
        self, prompt: str | list[str], num_images_per_prompt: int = 1, max_sequence_length: int = 512,
        device: Device = None, dtype: DType = None,
    ) -> Triple:  # fmt: skip
        """(B, L, in_text_dim), (B, in_text_dim2), and the ends of the prompts one after the other, (B + 1,) int32."""
        return self._encode_prompt(prompt, None, num_images_per_prompt, max_sequence_length, device, dtype)

    check_inputs = Kandinsky5T2VPipeline.check_inputs

    def prepare_latents(
        self, batch_size: int, num_channels_latents: int = 16, height: int = 1024, width: int = 1024,
        dtype: DType = None, device: Device = None, generator: Generators = None, latents: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """What sampling starts from: noise."""
        size = num_channels_latents, 1, height, width
        return self._prepare_latents(None, batch_size, *size, dtype, device, generator, latents)


class Kandinsky5I2IPipeline(DiffusersPipeline):
    """Image to image."""

    task = "i2i"
    makes_video = False
    max_tokens = 1024

    @diffusers_call
    def __call__(
        self,
        image: Any,
        prompt: Prompt = None,
        negative_prompt: Prompt = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int | None = 1,
        **shared: Any,
    ) -> Any:
        """Edit a picture, which is stretched to the one of `resolutions` nearest in shape: `.image[0]` is the first
        result. The text encoder sees it as it was given, at half its size."""
        if (height is None) != (width is None):
            raise ValueError("height and width belong together: give both, or neither for the picture's own shape")
        if height is None or width is None:
            width, height = load_image(as_images(required(image))[0]).size
        wishes = (*self._snapped(height, width), 1, num_inference_steps, guidance_scale, num_images_per_prompt)
        return self._call(prompt, negative_prompt, *wishes, required(image), **shared)

    def encode_prompt(
        self, prompt: str | list[str], image: Any, num_images_per_prompt: int = 1, max_sequence_length: int = 1024,
        device: Device = None, dtype: DType = None,
    ) -> Triple:  # fmt: skip
        """As Kandinsky5T2IPipeline's, with the picture, which the text encoder sees too."""
        return self._encode_prompt(prompt, image, num_images_per_prompt, max_sequence_length, device, dtype)

    check_inputs = Kandinsky5I2VPipeline.check_inputs

    def prepare_latents(
        self, image: Any, batch_size: int, num_channels_latents: int = 16, height: int = 1024, width: int = 1024,
        dtype: DType = None, device: Device = None, generator: Generators = None, latents: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """What sampling starts from: noise, the picture's latents, and a mask of ones."""
        size = num_channels_latents, 1, height, width
        return self._prepare_latents(image, batch_size, *size, dtype, device, generator, latents)


def required(image: Any) -> Any:
    """Raise ValueError where there is no picture."""
    if image is None:
        raise ValueError("image is missing: give the picture to begin with")
    return image


def whole_frames(num_frames: int) -> int:
    """4n + 1 frames, rounded down as diffusers does; what is no number is refused later."""
    frames = as_whole(num_frames)
    if frames is None or frames % FRAMES_PER_LATENT == 1:
        return num_frames
    rounded = max(frames // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1, 1)
    logger.warning("num_frames is %d, and videos have 4n + 1 frames: %d are made", frames, rounded)
    return rounded
