"""The models that a server has, each a config: which requests they take, what these come to, and how long they last.

No torch: a request is checked, and what it will take is worked out, before anything that is loaded hears of it.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kandinsky.checkpoints.lora_file import find_lora, read_lora
from kandinsky.common.given import as_whole, shortened, shown
from kandinsky.common.limits import NABLA_PIXELS, PATCH_PIXELS
from kandinsky.common.untrusted import is_plain_name, reason
from kandinsky.config.reading import with_magcache
from kandinsky.config.rules import split_lora
from kandinsky.config.schema import MAX_SECONDS, Config
from kandinsky.planning.costs import denoising_flops
from kandinsky.planning.machine import Machine
from kandinsky.planning.plan import Plan, default_request, make_plan, weight_files
from kandinsky.request import FPS, Request, recorded_request
from kandinsky.serving.directed import (
    NOTHING_MORE,
    Extras,
    Files,
    resolve,
    settings_of_extras,
    told_by_names,
    with_seed,
)
from kandinsky.serving.fields import FIELDS, split_size
from kandinsky.serving.limits import Limits

NEEDS_PICTURE, VIDEO_TASKS = ("i2v", "i2i"), ("t2v", "i2v")
NO_FILES: Files = {}
REMEMBERED = 100  # plans


@dataclass(frozen=True)
class Order:
    """A wish with nothing left open: one output of a model."""

    model: str
    request: Request
    magcache: bool = False
    loras: tuple[tuple[str, float], ...] = ()  # names in the server's folder, and scales
    extras: Extras = NOTHING_MORE

    @property
    def as_dict(self) -> dict[str, Any]:
        """The request, as JSON keeps it."""
        return dataclasses.asdict(self.request)

    @property
    def requests(self) -> tuple[Request, ...]:
        """Of each segment; of most the request alone."""
        return self.request, *self.extras.further

    @property
    def largest(self) -> Request:
        """What has to fit: segments are made one after the other."""
        return max(self.requests, key=lambda one: one.num_frames)

    @property
    def num_frames(self) -> int:
        """Of the output, before more are made of them."""
        further = sum(one.num_frames - self.extras.overlap for one in self.extras.further)
        return self.request.num_frames + further - self.extras.overlap * (self.extras.is_long and self.extras.has_clip)


@dataclass(frozen=True)
class Variant:
    """A config under the name that clients use."""

    name: str
    config: Config
    cache_dir: str = "./weights/"

    @property
    def makes_images(self) -> bool:
        return self.config.task in ("t2i", "i2i")

    @property
    def needs_picture(self) -> bool:
        return self.config.task in NEEDS_PICTURE

    def with_magcache(self, wanted: bool) -> Config:
        """The config that a job has. Raises ValueError where the model has not been measured for MagCache."""
        return with_magcache(self.config, wanted)

    def plan(self, request: Request, machine: Machine, dtype: str | None, magcache: bool = False) -> Plan:
        """What a request takes there. Raises ValueError as `make_plan` does."""
        name = dtype or ("float32" if machine.gpu_memory is None else "bfloat16")
        return make_plan(
            self.with_magcache(magcache), request, machine, weight_files(self.config, self.cache_dir), name
        )

    @cached_property
    def default(self) -> Request:
        return default_request(self.config)

    def work(self, requests: Iterable[Request]) -> tuple[float, float]:
        """How much there is to denoise and how much else, in units that mean something beside each other only."""
        flops = pixels = 0.0
        for one in requests:
            flops += denoising_flops(self.config, one) * (one.num_steps - one.first_step) / one.num_steps
            pixels += one.width * one.height * one.num_frames
        return flops, pixels

    def describe(self, loras: Sequence[str]) -> dict[str, Any]:
        """What a client needs to know to ask well."""
        generation, model = self.config.generation, self.config.model
        nabla = model.attention.type == "nabla"
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "local",
            "task": self.config.task,
            "needs_picture": self.needs_picture,
            "sizes": [f"{width}x{height}" for width, height in generation.resolutions],
            "other_sizes": None if self.makes_images else {"multiple_of": NABLA_PIXELS if nabla else PATCH_PIXELS},
            "max_seconds": 0 if self.makes_images else MAX_SECONDS,
            "magcache": self.config.magcache.mag_ratios is not None,
            "loras": list(loras),
            "defaults": {
                "size": f"{generation.width}x{generation.height}",
                "seconds": generation.time_length,
                "steps": model.num_steps,
                "guidance": model.guidance_weight,
                "guidance_interval": list(model.guidance_interval),
                "guidance_every": model.guidance_every,
                "negative_prompt": generation.negative_caption,
                "scheduler_scale": self.config.metrics.scheduler_scale,
                "magcache": self.config.uses_magcache,
            },
        }


def settings_of(
    request: Mapping[str, Any], magcache: bool, loras: Iterable[Sequence[Any]], extras: Mapping[str, Any]
) -> dict[str, Any]:
    """What makes an output again, under the names of a request's fields; `request` as `dataclasses.asdict` has it."""
    (sample,) = request["samples"]
    return {
        "prompt": sample["text"],
        "negative_prompt": sample["negative_caption"],
        "size": f"{request['width']}x{request['height']}",
        "seconds": (request["num_frames"] - 1) / FPS,
        "seed": sample["seed"],
        "steps": request["num_steps"],
        "guidance": request["guidance_weight"],
        "guidance_interval": list(request["guidance_interval"]),
        "guidance_every": request["guidance_every"],
        "scheduler_scale": request["scheduler_scale"],
        "expand_prompt": request["expand_prompts"],
        "magcache": magcache,
        "loras": [f"{name}:{scale:g}" for name, scale in loras],
        **settings_of_extras(request, extras),
    }


class Catalogue:
    """All models of a server, and the adapters beside them."""

    def __init__(self, variants: Sequence[Variant], lora_dir: Path | None = None, limits: Limits | None = None) -> None:
        """Raises ValueError for two models of one name, and for none."""
        self.variants = {variant.name: variant for variant in variants}
        self.lora_dir, self.limits = lora_dir, limits or Limits()
        self._plans: OrderedDict[object, Plan] = OrderedDict()
        if len(self.variants) != len(variants) or not variants:
            raise ValueError(f"{len(variants)} configs with {len(self.variants)} names: give one or more, each once")

    def __getitem__(self, name: str) -> Variant:
        """Raises ValueError where there is none of that name."""
        if name not in self.variants:
            raise ValueError(f"there is no model {shown(name)}: choose one of {', '.join(self.variants)}")
        return self.variants[name]

    def plan(self, order: Order, machine: Machine, dtype: str | None) -> Plan:
        """`Variant.plan`, remembered: it reads headers of weights, and words and seeds make no difference to it."""
        same = tuple(dataclasses.replace(one, text="", negative_caption="", seed=0) for one in order.request.samples)
        request = dataclasses.replace(order.largest, samples=same)
        key = order.model, request, order.magcache, machine, dtype
        if (plan := self._plans.get(key)) is None:
            plan = self._plans[key] = self[order.model].plan(request, machine, dtype, order.magcache)
            if len(self._plans) > REMEMBERED:
                self._plans.popitem(last=False)
        return plan

    def loras(self) -> dict[str, Path]:
        """The adapters that there are now, by name."""
        if self.lora_dir is None or not self.lora_dir.is_dir():
            return {}
        found = sorted(path for path in self.lora_dir.iterdir() if path.is_dir() or path.suffix == ".safetensors")
        return {path.stem if path.is_file() else path.name: path for path in found}

    def orders(
        self,
        fields: Mapping[str, Any],
        picture: tuple[int, int] | None,
        tasks: Sequence[str] = (),
        files: Files = NO_FILES,
    ) -> list[Order]:
        """What the fields of a request come to, an order for each output. `picture`: the size of the one that came;
        `files`: the others, which have their clients' names.

        tasks: what may be made; none: anything. Raises ValueError in the words of the command line.
        """
        variant = self._choose(fields, picture, tasks, files)
        self._check_lengths(fields)
        wishes = {wish: value for name, value in fields.items() if (wish := FIELDS[name].wish) is not None}
        if (size := fields.get("size")) is not None and (sides := split_size(size)) is not None:
            if wishes.keys() & {"width", "height"}:
                raise ValueError("both size and width or height are given: leave one of them out")
            wishes["width"], wishes["height"] = sides
        count = as_whole(fields.get("n", 1))
        if count is None or not 1 <= count <= self.limits.images:
            raise ValueError(f"n is {shown(fields['n'])}; it must be a whole number from 1 to {self.limits.images}")
        names = [(name, path.name) for name, paths in files.items() for path in paths]
        text = fields.get("prompt")
        with told_by_names(files):
            request, extras = resolve(variant.config, text, picture, fields, files, names, wishes, self.limits)
        loras = self._loras(fields.get("loras", []), variant)
        magcache = fields.get("magcache", variant.config.uses_magcache)
        variant.with_magcache(magcache)  # or refused
        order = Order(variant.name, request, magcache, loras, extras)
        self._check_pixels(order)
        return [_with_seed(order, i) for i in range(count)]

    def _check_pixels(self, order: Order) -> None:
        largest, extras, most = order.largest, order.extras, self.limits
        pixels = largest.width * largest.height * largest.num_frames
        if pixels > most.pixels:
            raise ValueError(
                f"{largest.num_frames} frames of {largest.width}x{largest.height} are {pixels / 1e6:.0f} million "
                f"pixels, and this server makes at most {most.pixels / 1e6:.0f} in a job: ask for something smaller or "
                "shorter"
            )
        frames = order.num_frames * max(1.0, (extras.fps or FPS) / FPS)
        written = largest.width * largest.height * frames * extras.upscale**2
        if written > most.written:
            raise ValueError(
                f"with fps and upscale its frames would be {written / 1e6:.0f} million pixels, and this server writes "
                f"at most {most.written / 1e6:.0f}: ask for less of them"
            )

    def _choose(
        self, fields: Mapping[str, Any], picture: tuple[int, int] | None, tasks: Sequence[str], files: Files
    ) -> Variant:
        name = fields.get("model")
        if name is not None:
            variant = self[name]
            if tasks and variant.config.task not in tasks:
                able = [one.name for one in self.variants.values() if one.config.task in tasks]
                raise ValueError(
                    f"{variant.name} is a model for {variant.config.task}, and this makes {' or '.join(tasks)}: "
                    + (f"choose one of {', '.join(able)}" if able else "this server has no model for it")
                )
            return variant
        able_variants = [one for one in self.variants.values() if not tasks or one.config.task in tasks]
        if not able_variants:
            raise ValueError(f"this server has no model for {' or '.join(tasks)}; it has {', '.join(self.variants)}")
        wanted = _tasks_of(fields, picture is not None, files)
        fitting = [one for one in able_variants if one.config.task in wanted]
        return (fitting or able_variants)[0]  # of the latter the request says why not

    def _check_lengths(self, fields: Mapping[str, Any]) -> None:
        for name in ("prompt", "negative_prompt"):
            text = fields.get(name)
            if isinstance(text, str) and len(text) > self.limits.prompt:
                raise ValueError(
                    f"the {name.replace('_', ' ')} has {len(text):,} characters, and at most {self.limits.prompt:,} "
                    "are read: shorten it"
                )

    def _loras(self, given: Sequence[str], variant: Variant) -> tuple[tuple[str, float], ...]:
        there = self.loras() if given else {}
        found: dict[str, float] = {}
        for text in given:
            name, scale = split_lora(text)
            if not is_plain_name(name) or name not in there:
                known = ", ".join(there) or "none"
                raise ValueError(f"there is no adapter {shown(name)}; this server has {known}")
            if name in found:
                raise ValueError(f"the adapter {shown(name)} is named twice: name each once")
            read_lora(find_lora(there[name]), variant.config.model.dit_params)
            found[name] = scale
        return tuple(found.items())


def _tasks_of(fields: Mapping[str, Any], has_picture: bool, files: Files) -> tuple[str, ...]:
    """Which tasks may be meant."""
    is_longer = bool({"extend", "segments"} & set(fields))
    if files.get("video"):
        return VIDEO_TASKS if is_longer else ("t2v",)
    if files.get("last_image") or files.get("keyframe") or fields.get("loop"):
        return ("i2v",)
    if not has_picture:
        return ("t2v",) if is_longer else ("t2v", "t2i")
    if is_longer:
        return ("i2v",)
    return ("t2i",) if files.get("mask") or "strength" in fields else NEEDS_PICTURE


def _with_seed(order: Order, further: int) -> Order:
    """The order of a later output of one request: seeds count up."""
    request, extras = with_seed(order.request, further), order.extras.with_seeds(further)
    return dataclasses.replace(order, request=request, extras=extras)


def request_from(values: Mapping[str, Any], config: Config) -> Request:
    """What `dataclasses.asdict` made of a request and JSON kept. Raises ValueError where it is none of this config."""
    try:
        return recorded_request(values, config)
    except ValueError as error:
        raise ValueError(f"the job's settings are none of this model's any more: {reason(error)}") from None


def model_name(path: str | Path) -> str:
    """What a config is called by clients: configs/config_5s_sft.yaml -> 5s_sft."""
    return shortened(Path(path).stem.removeprefix("config_"))
