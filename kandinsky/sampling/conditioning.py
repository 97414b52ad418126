"""What the model sees besides text: the noise to start from, and conditions, each a small `Item`.

An item says which latent frames, or regions of them, have which latents, from which step on they are held, and what the
model is told in its condition and mask channels. A request carries any number of them, and the tasks differ in nothing
else:

- text to video, text to image: no item; checkpoints with a visual condition get zeros (`from_text`);
- image to video: the first latent frame is the picture's at every step, and marked in the mask (`from_first_frame`);
  further pictures in later frames likewise, or shown to models that have learnt it (`keyframe_item`);
- image to image: the condition channels hold the source picture's latents, the mask is one (`from_source`);
- going on from a video: its last latent frames are held as the first of what follows (`overlap_items`);
- from a video or a picture, wholly or in part: sampling starts between source and noise (`source_item`; SDEdit, Meng et
  al. 2021, arXiv 2108.01073), and outside of a mask the source comes back at every step, with that step's noise.

Knows tensors and generators; knows no models and no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

Hold = Literal["clean", "noised", "no"]
FIRST_FRAME, SOURCE, START, OVERLAP = "first frame", "picture to edit", "source", "overlap"
FRAMES_PER_LATENT, PIXELS_PER_LATENT = 4, 8

# First-frame normalisation: which latent frames are brought close to which later ones, and how far at most.
NORMALIZED_FRAMES = 4
REFERENCE_FRAMES = 5
MEAN_RANGE = (-0.05, 0.1)
STD_RANGE = (-0.1, 0.25)


def draw_noise(generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian noise of `shape`, float32, on the generator's device.

    A generator on the CPU and float32 mean the same video on every machine; one on a GPU and bfloat16 draw what the
    original implementation draws.
    """
    return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype).float()


@dataclass(frozen=True)
class Item:
    """One condition.

    name: what the record calls it. latents: (B, t, H, W, C), clean and scaled, of the latent frames from `frame` on.
    hold: "clean": from step `from_step` on these latents take the place of what is denoised; "noised": likewise, with
    as much noise as there is at that step; "no": nothing is held. region: (1, t, H, W, 1) from 0 to 1, where they are
    held, feathered between; None: everywhere. starts: sampling starts from them and not from noise alone. marked: the
    mask channel is one in their frames. shown: the condition channels hold them. origin: the file they come from.
    """

    name: str
    latents: Tensor
    frame: int = 0
    hold: Hold = "clean"
    from_step: int = 0
    region: Tensor | None = None
    starts: bool = False
    marked: bool = False
    shown: bool = False
    origin: str = ""

    @property
    def frames(self) -> slice:
        """Which latent frames it is about."""
        return slice(self.frame, self.frame + self.latents.shape[1])

    def apply(self, latents: Tensor, noise: Tensor, sigma: float, step: int) -> Tensor:
        """The latents (B, T, H, W, C) that enter `step`, of that noise level, with what this item holds in them."""
        if self.hold == "no" or step < self.from_step:
            return latents
        frames = self.frames
        held = self.latents if self.hold == "clean" else towards_noise(self.latents, noise[:, frames], sigma)
        if self.region is not None:
            held = torch.lerp(latents[:, frames], held, self.region.expand_as(held))
        return torch.cat((latents[:, : frames.start], held, latents[:, frames.stop :]), dim=1)

    def facts(self) -> dict[str, Any]:
        """All but the tensors, for records."""
        names = ("name", "frame", "hold", "from_step", "starts", "marked", "shown", "origin")
        return {name: getattr(self, name) for name in names} | {
            "frames": self.latents.shape[1],
            "everywhere": self.region is None,
        }


def towards_noise(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Latents at a noise level: the straight line of flow matching from data at 0 to noise at 1."""
    return (1 - sigma) * clean + sigma * noise


@dataclass(frozen=True)
class Conditioning:
    """Where the sampler starts, and what holds at every step.

    noise (B, T, H, W, C) float32; extra (B, T, H, W, C + 1), condition latents and mask, or None where the model takes
    the latents alone; items in the order in which they are applied: of two about one place, the later one counts.
    """

    noise: Tensor
    extra: Tensor | None = None
    items: tuple[Item, ...] = ()

    @property
    def first_frame(self) -> Tensor | None:
        """(B, 1, H, W, C), the clean latents of a picture that the video begins with, or None."""
        return next((item.latents for item in self.items if item.name == FIRST_FRAME), None)

    @property
    def is_given_the_first_frame_alone(self) -> bool:
        """Of the frames that a model may be given."""
        return [item.name for item in self.items if item.marked] == [FIRST_FRAME]

    def model_input(self, latents: Tensor) -> Tensor:
        """(B, T, H, W, C) -> (B, T, H, W, C_in), what the model takes."""
        return latents if self.extra is None else torch.cat((latents, self.extra.to(latents.dtype)), dim=-1)

    def start(self, sigma: float = 1.0, step: int = 0) -> Tensor:
        """The latents that enter the first step to be taken, of that noise level: noise, or what is between it and a
        source."""
        latents = self.noise
        for item in self.items:
            if item.starts:
                begun = towards_noise(item.latents, latents[:, item.frames], sigma)
                latents = torch.cat((latents[:, : item.frame], begun, latents[:, item.frames.stop :]), dim=1)
        return self.hold(latents, sigma, step)

    def hold(self, latents: Tensor, sigma: float = 0.0, step: int = 0) -> Tensor:
        """The latents that enter `step`, of noise level sigma, with what the items hold in them."""
        for item in self.items:
            latents = item.apply(latents, self.noise, sigma, step)
        return latents

    def to(self, device: torch.device) -> Conditioning:
        """The same on another device."""
        items = tuple(
            replace(
                item, latents=item.latents.to(device), region=None if item.region is None else item.region.to(device)
            )
            for item in self.items
        )
        return Conditioning(self.noise.to(device), None if self.extra is None else self.extra.to(device), items)


def compose(noise: Tensor, in_channels: int, items: Sequence[Item] = ()) -> Conditioning:
    """Several items together, for a model of so many input channels; what is held with noise comes first.

    Raises ValueError where two items want the same latent frame clean.
    """
    taken: dict[int, str] = {}
    for item in items:
        if item.hold == "clean" and item.region is None:
            for frame in range(item.frame, item.frames.stop):
                if frame in taken:
                    raise ValueError(
                        f"{taken[frame]} and {item.name} both fix latent frame {frame} (four frames of video): leave "
                        "one of them out, or move it"
                    )
                taken[frame] = item.name
    extra_channels = in_channels - noise.shape[-1]
    extra = noise.new_zeros((*noise.shape[:-1], extra_channels)) if extra_channels else None
    for item in items:
        assert extra is not None or not (item.marked or item.shown), f"the model has no channels for {item.name}"
        if extra is not None and item.marked:
            extra[:, item.frames, :, :, -1] = 1
        if extra is not None and item.shown:
            extra[:, item.frames, :, :, :-1] = item.latents
    return Conditioning(noise, extra, tuple(sorted(items, key=lambda item: item.hold == "clean")))


def from_text(noise: Tensor, in_channels: int) -> Conditioning:
    """Conditioning on text alone: where the model has channels for a picture, they and the mask are zero."""
    return compose(noise, in_channels)


def frame_item(name: str, image_latents: Tensor, frame: int = 0, visual_cond: str = "zeros", origin: str = "") -> Item:
    """A picture that one latent frame is to be, held and marked; image_latents (B, H, W, C), scaled.

    visual_cond: "zeros", as the original leaves the frame's condition channels, or "image": the picture's latents there
    too, as diffusers had it up to 0.39.
    """
    shown = visual_cond == "image"
    return Item(name, image_latents[:, None], frame, marked=True, shown=shown, origin=origin)


def keyframe_item(
    name: str, image_latents: Tensor, frame: int, learnt: bool, visual_cond: str = "zeros", origin: str = ""
) -> Item:
    """A picture that a later latent frame, four frames of video, ends with; image_latents (B, H, W, C), scaled.

    learnt: a model that was trained for it is shown the picture in the condition channels and makes the four frames
    that end with it. Any other one is given it as it is given a first frame: the picture stands still for all four.
    """
    if not learnt:
        return frame_item(name, image_latents, frame, visual_cond, origin)
    return replace(picture_item(image_latents, origin), name=name, frame=frame)


def picture_item(image_latents: Tensor, origin: str = "") -> Item:
    """A picture that a model is shown, as an editing one is; image_latents (B, H, W, C), scaled."""
    return Item(SOURCE, image_latents[:, None], hold="no", marked=True, shown=True, origin=origin)


def source_item(latents: Tensor, keep: Tensor | None = None, origin: str = "") -> Item:
    """A video or picture that sampling starts from; latents (B, T, H, W, C), scaled. keep: (1, T, H, W, 1), where it is
    kept at every step: 0 nowhere, 1 wholly."""
    return Item(START, latents, hold="no" if keep is None else "noised", region=keep, starts=True, origin=origin)


def overlap_items(latents: Tensor, first_is_shown: bool, visual_cond: str = "zeros", origin: str = "") -> list[Item]:
    """What a video goes on from; latents (B, t, H, W, C), scaled, are to be its first latent frames.

    first_is_shown: of a model that begins with a picture, the first of them is that, held and marked as there. The
    others, and all of them with a model that knows text alone, are held with the noise that there is at each step,
    which is what every model saw in training. None is called a first frame: its normalisation is not for joints.
    """
    shown = 1 if first_is_shown else 0
    items = [frame_item(OVERLAP, latents[:, 0], 0, visual_cond, origin)] if first_is_shown else []
    if latents.shape[1] > shown:
        items.append(Item(OVERLAP, latents[:, shown:], shown, hold="noised", origin=origin))
    return items


def from_first_frame(noise: Tensor, image_latents: Tensor, visual_cond: str = "zeros") -> Conditioning:
    """Conditioning on the picture that a video begins with; image_latents (B, H, W, C), scaled."""
    item = frame_item(FIRST_FRAME, image_latents.to(noise), 0, visual_cond)
    return compose(noise, 2 * noise.shape[-1] + 1, [item])


def from_source(noise: Tensor, image_latents: Tensor) -> Conditioning:
    """Conditioning on a picture to edit; noise (B, 1, H, W, C), image_latents (B, H, W, C), scaled."""
    return compose(noise, 2 * noise.shape[-1] + 1, [picture_item(image_latents.to(noise))])


def latent_mask(pixels: Tensor) -> Tensor:
    """What of a mask latents see: (1 or frames, height, width) in [0, 1], 1 where something may change ->
    (1, 1 or latent frames, height / 8, width / 8, 1).

    A latent is of 8 x 8 pixels and, but for the first, of four frames: it changes as much as the largest part of it in
    any of them. Edges are feathered by half of what stands beside them, outwards: what is masked changes wholly.
    """
    areas = functional.avg_pool2d(pixels[:, None].float(), PIXELS_PER_LATENT)[:, 0]  # (frames, H, W)
    if len(areas) > 1:
        later = areas[1:].unflatten(0, (-1, FRAMES_PER_LATENT)).amax(1)
        areas = torch.cat((areas[:1], later))
    beside = functional.max_pool2d(areas[:, None], 3, stride=1, padding=1)[:, 0]
    return torch.maximum(areas, beside / 2)[None, ..., None]


def normalize_first_frames(latents: Tensor, statistics: str = "each") -> Tensor:
    """Bring mean and spread of the first four latent frames close to those of the next five: against the flash of
    contrast with which a video leaves its first picture.

    latents (B, T, H, W, C). Every frame moves by itself, within fixed limits, as published; with `statistics`
    "together" the four as one, as in diffusers. With fewer than five latent frames there is nothing to compare with
    and the latents come back as they are.
    """
    if latents.shape[1] <= NORMALIZED_FRAMES:
        return latents
    frames, reference = latents[:, :NORMALIZED_FRAMES], latents[:, NORMALIZED_FRAMES:][:, :REFERENCE_FRAMES]
    own = (2, 3, 4) if statistics == "each" else (1, 2, 3, 4)
    mean, std = (m.float() for m in _moments(frames, dims=own))  # (B, 4 or 1, 1, 1, 1)
    wanted_mean, wanted_std = _moments(reference, dims=(1, 2, 3, 4))  # (B, 1, 1, 1, 1)
    wanted_mean = wanted_mean.clamp(mean + MEAN_RANGE[0], mean + MEAN_RANGE[1])
    wanted_std = wanted_std.clamp(std + STD_RANGE[0], std + STD_RANGE[1])
    # A frame of one value has no spread to change; dividing by it would make NaN.
    scale = torch.where(std > 0, wanted_std / std, torch.ones_like(std))
    return torch.cat(((frames - mean) * scale + wanted_mean, latents[:, NORMALIZED_FRAMES:]), dim=1)


def _moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    std, mean = torch.std_mean(x, dim=dims, keepdim=True)
    return mean, std
