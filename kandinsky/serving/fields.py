"""What a request may say, field by field: one table, from which bodies are read and the OpenAPI document is made.

Names are OpenAI's where it has one, else ours. Values come as JSON or as text in a form; here they become Python's,
and whether they can be is for request.py to say, with the command line's words. What OpenAI has and means nothing
here is accepted without effect; any other field is a mistake, because a typo that is ignored costs hours.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kandinsky.common.given import shortened, shown
from kandinsky.common.untrusted import parse_json

SCHEMAS: dict[str, dict[str, Any]] = {
    "text": {"type": "string"},
    "whole": {"type": "integer"},
    "number": {"type": "number"},
    "flag": {"type": "boolean"},
    "texts": {"type": "array", "items": {"type": "string"}},
    "pair": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
    "numbers": {"type": "array", "items": {"type": "number"}},
    "rows": {"type": "array", "items": {"type": "object"}},
    "picture": {"type": "string", "format": "binary"},
    "pictures": {"type": "array", "items": {"type": "string", "format": "binary"}},
}


@dataclass(frozen=True)
class Field:
    kind: str
    words: str
    wish: str | None = None  # the argument of `resolve_request` that it is


FIELDS: dict[str, Field] = {
    "model": Field("text", "one of GET /v1/models; not given: the first that does what is asked for"),
    "prompt": Field("text", "what to show, what happens, or what to change"),
    "negative_prompt": Field("text", "what not to show; used where guidance is on", "negative_caption"),
    "size": Field("text", "WIDTHxHEIGHT in pixels, or auto"),
    "width": Field("whole", "pixels, in place of size", "width"),
    "height": Field("whole", "pixels, in place of size", "height"),
    "seconds": Field("number", "of video, at 24 frames a second; 0 makes a picture", "time_length"),
    "seed": Field("whole", "the same seed gives the same output; not given: a new one", "seed"),
    "steps": Field("whole", "Euler steps", "num_steps"),
    "guidance": Field("number", "classifier-free guidance; 1 switches it off", "guidance_weight"),
    "guidance_interval": Field("pair", "shares of the steps between which there is guidance", "guidance_interval"),
    "guidance_every": Field("whole", "each n-th guided step evaluates the negative prompt", "guidance_every"),
    "scheduler_scale": Field("number", "shift of the schedule towards noise", "scheduler_scale"),
    "expand_prompt": Field("flag", "have Qwen write a short prompt out first", "expand_prompts"),
    "magcache": Field("flag", "skip model evaluations that change little"),
    "loras": Field("texts", "adapters that the server has, each NAME or NAME:scale"),
    "n": Field("whole", "outputs, with seeds that count up"),
    "user": Field("text", "who asks: clients take turns"),
    "response_format": Field("text", "of pictures: b64_json or url"),
    "output_format": Field("text", "of pictures: png"),
    "input_reference": Field("picture", "the picture that a video begins with: a file, or a data: URL in JSON"),
    "image": Field("picture", "the picture that is edited: a file, or a data: URL in JSON"),
    "video": Field("picture", "t2v: a video to start from; t2v and i2v with extend or segments: to go on from"),
    "strength": Field("number", "how far from that, or from t2i's image: 0 (the same) to 1 (noise alone)", "strength"),
    "mask": Field("picture", "white where that may change: a picture, or a video with one a frame"),
    "last_image": Field("picture", "i2v: the picture that the video ends with; experimental with published weights"),
    "loop": Field("flag", "i2v: the video ends as it begins; likewise", "loop"),
    "keyframe": Field("pictures", "i2v: pictures that it passes through; likewise"),
    "keyframe_seconds": Field("numbers", "the time of each, in the same order"),
    "extend": Field("number", "so many seconds longer, segment by segment: the video, or what is made first"),
    "segments": Field("rows", "in place of that: prompt, seconds, seed, negative_prompt of each, all as needed"),
    "overlap": Field("whole", "frames that a segment goes on from, 4n + 1"),
    "colour_match": Field("flag", "bring later segments' colours back to the first one's; not given: true"),
    "fps": Field("whole", "frames a second of the file, computed between the 24 that are made"),
    "upscale": Field("whole", "2 or 4: the file is so many times as large"),
}
FILES = ("video", "mask", "last_image", "keyframe")
PICTURES = ("input_reference", "image", "image[]", "images")
# OpenAI's, without effect here.
IGNORED = (
    *("quality", "style", "background", "moderation", "output_compression", "input_fidelity", "safety_identifier"),
    *("partial_images", "metadata"),
)
ASKING = (
    *("model", "prompt", "negative_prompt", "size", "width", "height", "seed", "steps", "guidance"),
    *("guidance_interval", "guidance_every", "scheduler_scale", "expand_prompt", "magcache", "loras", "user"),
)
DIRECTED = (
    *("video", "strength", "mask", "last_image", "loop", "keyframe", "keyframe_seconds"),
    *("extend", "segments", "overlap", "colour_match", "fps", "upscale"),
)
OF_VIDEOS = (*ASKING, "seconds", "input_reference", *DIRECTED)
OF_IMAGES = (*ASKING, "n", "response_format", "output_format", "upscale")
OF_EDITS = (*OF_IMAGES, "image")
OF_JOBS = (*ASKING, "seconds", "n", "image", "input_reference", *DIRECTED)


def checked(given: Mapping[str, Any], allowed: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a request as Python values; those that are null, or without effect, are left out.

    Raises ValueError for names that are not allowed and values of another kind.
    """
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name == "stream" and value in (False, "false", None):
            continue
        if name in IGNORED:
            continue
        if name not in allowed:
            near = difflib.get_close_matches(name[:100], allowed, n=1)
            advice = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(allowed)}"
            raise ValueError(f"unknown field {shortened(name)}{advice}")
        if value is not None:
            values[name] = _value(name, FIELDS[name].kind, value)
    return values


def checked_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A segment's values that are there; which there may be is for longer.py to say."""
    found = {name: value for name, value in row.items() if value is not None}
    for name in {"prompt", "negative_prompt"} & set(found):
        if not isinstance(found[name], str):
            raise ValueError(f"a segment's {name} is {shown(found[name])}; it must be text")
    return found


def schema(allowed: tuple[str, ...], required: tuple[str, ...] = ("prompt",)) -> dict[str, Any]:
    """What OpenAPI is told of a body with these fields."""
    properties = {name: {**SCHEMAS[FIELDS[name].kind], "description": FIELDS[name].words} for name in allowed}
    body = {"schema": {"type": "object", "properties": properties, "required": list(required)}}
    return {"requestBody": {"content": {"application/json": body, "multipart/form-data": body}, "required": True}}


def split_size(size: str) -> tuple[int, int] | None:
    """ "768x512" as (width, height); None for auto. Raises ValueError for anything else."""
    if size == "auto":
        return None
    width, x, height = size.partition("x")
    if not (x and _is_count(width) and _is_count(height)):
        raise ValueError(f"the size is {shown(size)}; it must be WIDTHxHEIGHT in pixels, like 768x512, or auto")
    return int(width), int(height)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9


def _value(name: str, kind: str, value: Any) -> Any:
    """The value as its kind; numbers that are none are left for `resolve_request`."""
    if kind == "text" and not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)}; it must be text")
    if kind in ("whole", "number") and isinstance(value, str):
        return _number(value, kind)
    if kind == "flag":
        words = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}
        flag = words.get(value.lower()) if isinstance(value, str) else value
        if not isinstance(flag, bool):
            raise ValueError(f"{name} is {shown(value)}; it must be true or false")
        return flag
    if kind == "texts":
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{name} is {shown(value)}; it must be a list of texts")
        return texts
    if kind == "numbers":
        numbers = value if isinstance(value, list) else [value]
        return [_number(one, "number") if isinstance(one, str) else one for one in numbers]
    if kind == "rows":
        rows = parse_json(value.encode(), name) if isinstance(value, str) else value
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{name} is {shown(value)}; it must be a list of objects")
        return [checked_row(row) for row in rows]
    if kind == "pair":
        parts = value.split(",") if isinstance(value, str) else value
        if isinstance(parts, list):
            parts = [_number(part, "number") if isinstance(part, str) else part for part in parts]
        return parts
    return value


def _number(text: str, kind: str) -> Any:
    """The number that text says; the text where it says none."""
    try:
        return (int if kind == "whole" else float)(text) if len(text) <= 30 else text
    except ValueError:
        return text
