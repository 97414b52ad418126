"""The part of a tab that is closed at first: what is started from, further pictures, longer, and after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import gradio as gr

TITLES = {
    "t2v": "From a video, longer, and after it",
    "i2v": "Further pictures, longer, and after it",
    "t2i": "From a picture, and after it",
    "i2i": "After it",
}
OF_TASK = {
    "t2v": ("video", "mask", "strength", "extend", "then", "overlap", "colour_match", "fps", "upscale"),
    "i2v": (
        *("last_image", "loop", "keyframe", "keyframe_seconds", "video"),
        *("extend", "then", "overlap", "colour_match", "fps", "upscale"),
    ),
    "t2i": ("mask", "strength", "upscale"),
    "i2i": ("upscale",),
}
FILES = ("video", "mask", "last_image", "keyframe")
STRENGTH = 0.6
MADE = "24, as it is made"
PLAIN = {"extend": 0, "overlap": 0, "loop": False, "colour_match": True, "upscale": 1, "fps": MADE}  # as if not given


class Directed:
    """Components by name: those of the API's fields, and `then`, whose lines are prompts of further segments."""

    def __init__(self, task: str) -> None:
        self.task = task
        self.components: dict[str, Any] = {}
        with gr.Accordion(TITLES[task], open=False, elem_id=f"{task}-directed"):
            for name in OF_TASK[task]:
                self.components[name] = self._component(name)

    def _component(self, name: str) -> Any:
        place: dict[str, Any] = {"elem_id": f"{self.task}-{name}"}
        if name == "video":
            words = "Video to start from, or to go on from" if self.task == "t2v" else "Video to go on from"
            return gr.File(label=words, type="filepath", height=140, **place)
        if name == "mask":
            return gr.File(label="Mask: white may change; a picture or a video", type="filepath", height=140, **place)
        if name in ("last_image", "keyframe"):
            several = name == "keyframe"
            words = "Pictures between (experimental)" if several else "Last picture (experimental)"
            count: Literal["multiple", "single"] = "multiple" if several else "single"
            return gr.File(label=words, file_count=count, file_types=["image"], type="filepath", height=140, **place)
        if name == "strength":
            info = "of what is started from: 0 the same, 1 noise alone"
            return gr.Slider(0, 1, STRENGTH, step=0.05, label="Strength", info=info, **place)
        if name == "loop":
            return gr.Checkbox(label="Ends as it begins, to go round (experimental)", **place)
        if name == "keyframe_seconds":
            return gr.Textbox(label="Their seconds", placeholder="0.5, 1", **place)
        if name == "extend":
            return gr.Number(label="So many seconds longer", minimum=0, step=0.5, value=0, **place)
        if name == "then":
            return gr.Textbox(label="Or: and then", info="a prompt a line, each a segment more", lines=2, **place)
        if name == "overlap":
            info = "frames that a segment goes on from, 4n + 1; 0: as usual"
            return gr.Number(label="Overlap", info=info, precision=0, minimum=0, value=0, **place)
        if name == "colour_match":
            return gr.Checkbox(value=True, label="Keep the first segment's colours", **place)
        if name == "fps":
            return gr.Dropdown([MADE, "30", "48", "60"], label="Frames a second", allow_custom_value=True, **place)
        return gr.Dropdown([("as it is", 1), ("2 times", 2), ("4 times", 4)], value=1, label="Larger", **place)

    def asked(self, values: Sequence[Any], has_picture: bool) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """Fields and files of a request; what means nothing without something else goes with that."""
        given = {
            name: value for name, value in zip(self.components, values, strict=True) if value not in (None, "", [])
        }
        for name, plain in PLAIN.items():
            if given.get(name) == plain:
                del given[name]
        files = {name: _listed(given.pop(name)) for name in FILES if name in given}
        lines = [line.strip() for line in given.pop("then", "").splitlines() if line.strip()]
        if lines:  # the first one has the prompt above, where no video comes before it
            given["segments"] = [{}, *({"prompt": line} for line in lines)]
        if not {"extend", "segments"} & set(given):
            given.pop("overlap", None)
            given.pop("colour_match", None)
        starts = ("video" in files and not {"extend", "segments"} & set(given)) or (self.task == "t2i" and has_picture)
        if not starts:
            given.pop("strength", None)
        if "keyframe_seconds" in given:
            given["keyframe_seconds"] = [_number(one.strip()) for one in given["keyframe_seconds"].split(",")]
        if "fps" in given:
            given["fps"] = _number(str(given["fps"]))
        return given, files

    def filled(self, settings: Mapping[str, Any], files: Mapping[str, list[str]]) -> dict[Any, Any]:
        """The components with a job's settings and files."""
        segments = settings.get("segments", [])
        seconds = ", ".join(f"{one:g}" for one in settings.get("keyframe_seconds", []))
        shown: dict[str, Any] = {
            "strength": settings.get("strength", STRENGTH),
            "loop": settings.get("loop", False),
            "keyframe_seconds": seconds,
            "extend": 0,
            "then": "\n".join(segment["prompt"] for segment in segments[1:]),
            "overlap": settings.get("overlap", 0),
            "colour_match": settings.get("colour_match", True),
            "fps": str(settings.get("fps", MADE)),
            "upscale": settings.get("upscale", 1),
        }
        for name in FILES:
            found = files.get(name, [])
            shown[name] = found if name == "keyframe" else next(iter(found), None)
        return {component: shown[name] for name, component in self.components.items()}


def _listed(value: Any) -> list[str]:
    return list(value) if isinstance(value, list) else [value]


def _number(text: str) -> Any:
    """The number that text says; the text, for the API to refuse, where it says none."""
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else number
