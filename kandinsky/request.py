"""A person's wishes, checked against a variant and resolved once: `Request`.

Everything that can be wrong with what somebody asks for is found here, from the config alone, before weights are read
or torch is imported. What is not asked for is what the YAML says.
"""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kandinsky.coarse import check_coarse
from kandinsky.common.given import as_number, as_whole, shown
from kandinsky.common.limits import MAX_PATCHES, MAX_TEXT_TOKENS, NABLA_PIXELS, PATCH_PIXELS
from kandinsky.config.schema import Config
from kandinsky.frames import FPS as FPS
from kandinsky.frames import FRAMES_PER_LATENT as FRAMES_PER_LATENT
from kandinsky.frames import checked_frames, checked_loop, frames_of_clip, wanted_frames
from kandinsky.sizes import TAKE_A_PICTURE, check_picture, size_for_image, size_for_video

logger = logging.getLogger(__name__)

PIXELS_PER_LATENT = 8
MAX_SEED = 2**32 - 1
MAX_OUTPUTS = 10_000  # of one prompt in a call
DEFAULT_STRENGTH = 0.6
SCHEDULES = ("original", "diffusers")


@dataclass(frozen=True)
class Sample:
    """One output of a request. Words are None where their embeddings were given, the seed where a generator was."""

    text: str | None
    negative_caption: str | None
    seed: int | None
    prompt: int = 0  # which of the request's prompts it belongs to
    expanded: str | None = None  # what the model is told in place of `text`


@dataclass(frozen=True)
class Request:
    """A call with nothing left open. Lengths in pixels and frames; num_frames is 4n + 1."""

    samples: tuple[Sample, ...]  # prompt after prompt
    width: int
    height: int
    num_frames: int
    num_steps: int
    guidance_weight: float
    scheduler_scale: float
    schedule: str = "original"  # whose noise levels: "original" or "diffusers"
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # shares of the steps between which there is guidance
    guidance_every: int = 1  # of the steps with guidance, each n-th evaluates the negative prompt
    max_sequence_length: int | None = None  # tokens of a prompt; None: as the YAML says
    expand_prompts: bool | None = None  # have Qwen write prompts out; None: where it can
    strength: float = 1.0  # with a source: the share of the steps that are taken, the last ones; 1: all of them
    loop: bool = False  # ends with the frame that it begins with, which is then left out

    @property
    def first_step(self) -> int:
        """The first step that is taken; `num_steps` where none is."""
        return self.num_steps - round(self.num_steps * self.strength)

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """(latent frames, rows, columns)."""
        latent_frames = (self.num_frames - 1) // FRAMES_PER_LATENT + 1
        return latent_frames, self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT

    @property
    def is_image(self) -> bool:
        return self.num_frames == 1

    @property
    def num_prompts(self) -> int:
        return self.samples[-1].prompt + 1


def resolve_request(
    config: Config,
    text: str | Sequence[str] | None,
    *,
    image_sizes: Sequence[tuple[int, int]] = (),
    num_prompts: int | None = None,
    samples_per_prompt: int = 1,
    time_length: float | None = None,
    num_frames: int | None = None,
    width: int | None = None,
    height: int | None = None,
    seed: int | Sequence[int] | None = None,
    seeded: bool = True,
    num_steps: int | None = None,
    guidance_weight: float | None = None,
    scheduler_scale: float | None = None,
    schedule: str | None = None,
    guidance_interval: Sequence[float] | None = None,
    guidance_every: int | None = None,
    negative_caption: str | Sequence[str] | None = None,
    max_sequence_length: int | None = None,
    expand_prompts: bool | None = None,
    strength: float | None = None,
    clip: tuple[int, int, int] | None = None,
    mask: bool = False,
    loop: bool = False,
) -> Request:
    """A `Request` for the variant `config`; None means as the YAML says, and a random seed.

    Args:
        text: one prompt or several; None where embeddings of `num_prompts` prompts take their place.
        image_sizes: (width, height) of the pictures to start from, one for all prompts or one each.
        strength: how far from its source the output goes, 0 to 1: which share of the steps is taken.
        clip: (width, height, frames) of a video to start from; its frames are at `FPS`.
        mask: whether there is one of what may change in the source.
        loop: whether the video is to end as it begins; `read_keyframes` says where that can be.
        seed: of the first sample, the others get the following numbers; or one a sample.
        seeded: False where generators take the place of seeds.

    Raises ValueError that says what was given, what is allowed and what to do.
    """
    generation = config.generation
    texts = _prompts(text, num_prompts)
    negatives = _negatives(generation.negative_caption if negative_caption is None else negative_caption, len(texts))
    samples_per_prompt = _checked_count(samples_per_prompt)
    count = len(texts) * samples_per_prompt
    seeds = _seeds(seed, count) if seeded else [None] * count
    samples = tuple(
        Sample(texts[i // samples_per_prompt], negatives[i // samples_per_prompt], seeds[i], i // samples_per_prompt)
        for i in range(count)
    )
    strength, starts = _source(config.task, len(image_sizes), strength, clip, mask)
    if clip is not None and width is None and height is None:
        check_picture(clip[:2])
        image_task = time_length == 0 or num_frames == 1
        width, height = (size_for_image if image_task else size_for_video)(clip[:2], config)
    width, height = _size(config, width, height, image_sizes, len(texts), starts)
    if clip is not None:
        num_frames, time_length = frames_of_clip(
            clip[2], wanted_frames(config, time_length, num_frames), time_length, num_frames
        )
    request = Request(
        samples=samples,
        width=width,
        height=height,
        num_frames=wanted_frames(config, time_length, num_frames),
        num_steps=_checked_steps(config.model.num_steps if num_steps is None else num_steps),
        guidance_weight=_checked_number(
            "guidance_weight",
            config.model.guidance_weight if guidance_weight is None else guidance_weight,
            lowest=0.0,
        ),
        scheduler_scale=_checked_number(
            "scheduler_scale",
            config.metrics.scheduler_scale if scheduler_scale is None else scheduler_scale,
            lowest=0.01,
        ),
        schedule=_checked_schedule(generation.schedule if schedule is None else schedule),
        guidance_interval=_checked_interval(
            config.model.guidance_interval if guidance_interval is None else guidance_interval
        ),
        guidance_every=_checked_every(config.model.guidance_every if guidance_every is None else guidance_every),
        max_sequence_length=_checked_text_length(max_sequence_length),
        expand_prompts=_checked_expansion(generation.expand_prompts if expand_prompts is None else expand_prompts),
        strength=strength,
        loop=checked_loop(loop),
    )
    check_coarse(config, request.num_steps, width, height, has_source=starts or clip is not None)
    if config.runtime.cfg_parallel > 1 and abs(request.guidance_weight - 1) < 1e-6:
        raise ValueError(
            "runtime.cfg_parallel = 2 gives the negative prompt to half of the processes, and guidance_weight 1 does "
            "not evaluate it: leave one of the two out"
        )
    return request


def recorded_request(values: Mapping[str, Any], config: Config) -> Request:
    """The request that `dataclasses.asdict` made `values` of. Raises ValueError where nothing resolves to it."""
    missing = {field.name for field in dataclasses.fields(Request)} ^ set(values)
    if missing:
        raise ValueError(f"the request has other entries than it should: {shown(min(missing))}")
    samples = values["samples"]
    if not isinstance(samples, list) or not 1 <= len(samples) <= MAX_OUTPUTS:
        raise ValueError(f"the request's samples are {shown(samples)}; they must be a list")
    multiple = NABLA_PIXELS if config.model.attention.type == "nabla" else PATCH_PIXELS
    request = Request(
        samples=tuple(map(_recorded_sample, samples)),
        width=_checked_side("width", values["width"], multiple),
        height=_checked_side("height", values["height"], multiple),
        num_frames=checked_frames(values["num_frames"]),
        num_steps=_checked_steps(values["num_steps"]),
        guidance_weight=_checked_number("guidance_weight", values["guidance_weight"], lowest=0.0),
        scheduler_scale=_checked_number("scheduler_scale", values["scheduler_scale"], lowest=0.01),
        schedule=_checked_schedule(values["schedule"]),
        guidance_interval=_checked_interval(values["guidance_interval"]),
        guidance_every=_checked_every(values["guidance_every"]),
        max_sequence_length=_checked_text_length(values["max_sequence_length"]),
        expand_prompts=_checked_expansion(values["expand_prompts"]),
        strength=checked_strength(values["strength"]),
        loop=checked_loop(values["loop"]),
    )
    if config.task in ("t2i", "i2i") and not request.is_image:
        raise ValueError(f"num_frames is {request.num_frames}, and {config.task} makes images")
    prompts = [sample.prompt for sample in request.samples]
    if any(now - before not in (0, 1) for before, now in zip([0, *prompts], prompts, strict=False)):
        raise ValueError(f"its samples belong to the prompts {shown(prompts)}; they must be in order, from 0")
    return request


def _recorded_sample(values: object) -> Sample:
    names = {field.name for field in dataclasses.fields(Sample)}
    if not isinstance(values, dict) or set(values) != names:
        raise ValueError(f"a sample is {shown(values)}; it must have {', '.join(sorted(names))}")
    for name in ("text", "negative_caption", "expanded"):
        if values[name] is not None:
            _checked_text(name, values[name])
    prompt = as_whole(values["prompt"])
    if prompt is None:
        raise ValueError(f"a sample's prompt is {shown(values['prompt'])}; it must be a number")
    seed = None if values["seed"] is None else checked_seed(values["seed"])
    return Sample(values["text"], values["negative_caption"], seed, prompt, values["expanded"])


def warn_about_size(config: Config, request: Request) -> None:
    """Say so where a size is possible but not one that the checkpoint was trained at."""
    sizes = config.generation.resolutions
    areas = [w * h for w, h in sizes]
    if config.task == "i2v" and 0.9 * min(areas) <= request.width * request.height <= 1.1 * max(areas):
        return  # trained at every aspect: the area is what counts
    if (request.width, request.height) not in sizes:
        trained = ", ".join(f"{w}x{h}" for w, h in sizes)
        logger.warning(
            "%dx%d is not a size this checkpoint was trained at (%s); quality may suffer",
            request.width,
            request.height,
            trained,
        )


def _prompts(text: str | Sequence[str] | None, num_prompts: int | None) -> list[str | None]:
    if text is None:
        if num_prompts is None:
            raise ValueError("there is no prompt: say what to show, or give prompt_embeds")
        return [None] * num_prompts
    if num_prompts is not None:
        raise ValueError("both a prompt and prompt_embeds are given: leave one of them out")
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, Sequence) or not texts:
        raise ValueError(f"the prompt is {shown(text)}; it must be a string or a list of strings")
    for one in texts:
        if not _checked_text("prompt", one).strip():
            raise ValueError("the prompt is empty: say what to show")
    return list(texts)


def _negatives(negative: str | Sequence[str], num_prompts: int) -> list[str]:
    if not isinstance(negative, str | list | tuple):
        raise ValueError(f"the negative prompt is {shown(negative)}; it must be a string, or a list with one a prompt")
    negatives = [negative] * num_prompts if isinstance(negative, str) else list(negative)
    if len(negatives) != num_prompts:
        raise ValueError(f"{len(negatives)} negative prompts for {num_prompts} prompts: give one for all or one each")
    return [_checked_text("negative prompt", one) for one in negatives]


def _checked_text(name: str, text: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"the {name} is {shown(text)}; it must be a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes of another encoding, from a terminal or a file
        raise ValueError(f"the {name} is not UTF-8: {text[:60]!a}; type it in a UTF-8 terminal") from None
    return text


def _checked_count(samples_per_prompt: int) -> int:
    count = as_whole(samples_per_prompt)
    if count is None or not 1 <= count <= MAX_OUTPUTS:
        raise ValueError(
            f"{shown(samples_per_prompt)} outputs per prompt; it must be a whole number from 1 to {MAX_OUTPUTS}"
        )
    return count


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One a sample. Those after a single seed count up, so that each can be made again alone."""
    if seed is None:
        seed = random.SystemRandom().randrange(MAX_SEED)
    if isinstance(seed, list | tuple):
        if len(seed) != count:
            raise ValueError(f"{len(seed)} seeds for {count} outputs: give one seed, or one for each")
        return [checked_seed(one) for one in seed]
    return [(checked_seed(seed) + i) % (MAX_SEED + 1) for i in range(count)]


def checked_seed(seed: object) -> int:
    """Raises ValueError for what is none."""
    number = as_whole(seed)
    if number is None or not 0 <= number <= MAX_SEED:
        raise ValueError(f"the seed is {shown(seed)}; it must be a whole number from 0 to {MAX_SEED}")
    return number


# --- sizes ------------------------------------------------------------------------------------------------------------


def _size(
    config: Config,
    width: int | None,
    height: int | None,
    image_sizes: Sequence[tuple[int, int]],
    num_prompts: int,
    starts: bool = False,
) -> tuple[int, int]:
    """(width, height): what is asked for, else what the pictures' aspect gives, else what the YAML says."""
    wants_image = config.task in ("i2v", "i2i") or starts
    if bool(image_sizes) != wants_image:
        needs = "needs a picture: give --image FILE (image= in Python)"
        advice = needs if wants_image else f"takes none: leave the picture out, or take {TAKE_A_PICTURE[config.task]}"
        raise ValueError(f"{config.source} is a config for {config.task}, which {advice}")
    for image_size in image_sizes:
        check_picture(image_size)
    if wants_image and len(image_sizes) not in (1, num_prompts):
        raise ValueError(f"{len(image_sizes)} pictures for {num_prompts} prompts: give one for all or one each")

    generation = config.generation
    if not wants_image:
        width = generation.width if width is None else width
        height = generation.height if height is None else height
    elif (width is None) != (height is None):
        raise ValueError("width and height belong together here: give both, or neither for the picture's own aspect")
    elif width is None or height is None:
        fitting = size_for_video if config.task == "i2v" else size_for_image
        sizes = {fitting(image_size, config) for image_size in image_sizes}
        if len(sizes) > 1:
            names = ", ".join(f"{w}x{h}" for w, h in sorted(sizes))
            raise ValueError(f"the pictures call for different sizes ({names}): give a width and height for all")
        width, height = sizes.pop()
    multiple = NABLA_PIXELS if config.model.attention.type == "nabla" else PATCH_PIXELS
    width, height = _checked_side("width", width, multiple), _checked_side("height", height, multiple)
    trained = generation.resolutions
    if config.task in ("t2i", "i2i") and (width, height) not in trained:
        nearest = min(trained, key=lambda size: abs(size[1] / size[0] - height / width))
        raise ValueError(
            f"{width}x{height} is not a size that this model draws: {', '.join(f'{w}x{h}' for w, h in trained)}; "
            f"the nearest in shape is {nearest[0]}x{nearest[1]}"
        )
    return width, height


def _checked_side(name: str, pixels: int, multiple: int) -> int:
    limit = MAX_PATCHES * PATCH_PIXELS
    why = " (NABLA attention works on blocks of that size)" if multiple == NABLA_PIXELS else ""
    side = as_whole(pixels)
    if side is None:
        raise ValueError(
            f"{name} is {shown(pixels)}; it must be a whole number of pixels, a multiple of {multiple}{why}"
        )
    if side % multiple or not 0 < side <= limit:
        nearest = round(min(max(side, multiple), limit) / multiple) * multiple
        raise ValueError(
            f"{name} is {shown(side)}; it must be a multiple of {multiple} pixels from {multiple} to {limit}{why}: "
            f"the nearest is {nearest}"
        )
    return side


def _source(
    task: str, pictures: int, strength: float | None, clip: tuple[int, int, int] | None, mask: bool
) -> tuple[float, bool]:
    """The strength, and whether a picture is what sampling starts from. Raises ValueError for what doesn't go with the
    task, or with what is given."""
    if clip is not None and task != "t2v":
        advice = "a video from a picture takes --image" if task == "i2v" else "it makes pictures: give --image"
        raise ValueError(f"a video to start from goes with t2v configs, and this one is for {task}: {advice}")
    starts = task == "t2i" and pictures > 0 and (strength is not None or mask)
    for name, given in (("strength", strength is not None), ("a mask", mask)):
        if given and clip is None and not starts:
            needs = {"t2v": "give --video FILE", "t2i": "give --image FILE"}.get(task, f"{task} configs have none")
            raise ValueError(f"{name} is about what sampling starts from: {needs}")
    if starts and pictures > 1:
        raise ValueError(f"{pictures} pictures to start from: give one for all prompts")
    if clip is None and not starts:
        return 1.0, False
    return checked_strength(DEFAULT_STRENGTH if strength is None else strength), starts


# --- numbers ----------------------------------------------------------------------------------------------------------


def _checked_text_length(tokens: int | None) -> int | None:
    number = as_whole(tokens)
    if tokens is not None and (number is None or not 1 <= number <= MAX_TEXT_TOKENS):
        raise ValueError(f"max_sequence_length is {shown(tokens)}; it must be from 1 to {MAX_TEXT_TOKENS} tokens")
    return number


def _checked_expansion(wanted: bool | None) -> bool | None:
    if wanted is not None and not isinstance(wanted, bool):
        raise ValueError(f"expand_prompts is {shown(wanted)}; it must be True, False, or None: where the model can")
    return wanted


def _checked_steps(num_steps: int) -> int:
    steps = as_whole(num_steps)
    if steps is None or not 1 <= steps <= 1000:
        raise ValueError(f"the number of steps is {shown(num_steps)}; it must be a whole number from 1 to 1000")
    return steps


def checked_strength(strength: float) -> float:
    """A share of the steps. Raises ValueError for what is none."""
    share = as_number(strength)
    if not 0 <= share <= 1:
        raise ValueError(
            f"strength is {shown(strength)}; it must be from 0 (the source as it is) to 1 (noise alone), like 0.6"
        )
    return share


def _checked_schedule(schedule: str) -> str:
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {shown(schedule)}; it must be {' or '.join(SCHEDULES)}")
    return schedule


def _checked_number(name: str, value: float, lowest: float) -> float:
    number = as_number(value)
    if not lowest <= number <= 100:
        raise ValueError(f"{name} is {shown(value)}; it must be a number from {lowest:g} to 100")
    return number


def _checked_interval(interval: Sequence[float]) -> tuple[float, float]:
    numbers = [as_number(n) for n in interval] if isinstance(interval, list | tuple) else []
    if len(numbers) != 2 or not 0 <= numbers[0] <= numbers[1] <= 1:
        raise ValueError(
            f"guidance_interval is {shown(interval)}; it must be two shares of the steps from 0 to 1, like (0.2, 0.8)"
        )
    return numbers[0], numbers[1]


def _checked_every(every: int) -> int:
    steps = as_whole(every)
    if steps is None or steps < 1:
        raise ValueError(f"guidance_every is {shown(every)}; it must be a whole number from 1 (every step)")
    return steps
