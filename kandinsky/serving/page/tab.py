"""A tab of the page: what one task can be asked for, from a form to the fields of the API and back."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import AsyncIterator, Mapping
from typing import Any

import gradio as gr

from kandinsky.serving.page import markup
from kandinsky.serving.page.client import Client, Mistake
from kandinsky.serving.page.directed import Directed
from kandinsky.serving.page.watch import QUIET, Watch

PROMPTS = {
    "t2v": "What to show and what happens",
    "i2v": "What happens, from the picture on",
    "t2i": "What to show",
    "i2i": "What to change",
}
EXPANSION = {"where the model can": None, "always": True, "never": False}
AGAIN = 3.0  # seconds until it is asked again what the server doesn't know yet
OF_MODEL = (  # what begins with values of the model
    *("size", "seconds", "steps", "guidance", "guidance_interval", "guidance_every", "scheduler_scale"),
    *("negative_prompt", "magcache", "loras"),
)
KEPT_EMPTY = ("prompt", "negative_prompt", "magcache")  # where nothing is another thing than what the model has
OF_VIDEO = ("size", "seconds")
WITHOUT_PLAN = ("prompt", "negative_prompt", "seed")


class WithoutStub(type(gr.Image)):  # type: ignore[misc]
    """Makes a class of a component as Python does: Gradio's own metaclass writes a .pyi file beside the source."""

    def __new__(cls, *arguments: Any) -> WithoutStub:
        return ABCMeta.__new__(cls, *arguments)


class AnyFile(gr.Image, metaclass=WithoutStub):
    """A `gr.Image` that takes what is no picture, too, in place of an error without a word: the API says what is."""

    is_template = True  # in the browser it is its parent

    def preprocess(self, payload: Any) -> Any:
        try:
            return super().preprocess(payload)
        except Exception:  # whatever Pillow stumbles over
            if payload is None or not payload.path:
                raise
            return payload.path


class Tab:
    def __init__(self, task: str, models: list[dict[str, Any]], client: Client) -> None:
        self.task, self.client = task, client
        self.models = {model["id"]: model for model in models}
        first = models[0]
        self.needs_picture = first["needs_picture"]
        with gr.Tab(markup.TASKS[task], id=task):
            # By the names of the API's fields.
            self.fields: dict[str, Any] = {
                "model": gr.Dropdown(list(self.models), value=first["id"], label="Model", visible=len(models) > 1),
                "prompt": gr.Textbox(label="Prompt", placeholder=PROMPTS[task], lines=3, elem_id=f"{task}-prompt"),
            }
            # Neither decoded nor changed here: the API looks at it.
            self.picture = AnyFile(
                label="Picture" if self.needs_picture else "Picture to start from, with a strength",
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                buttons=[],
                height=220,
                visible=self.needs_picture or task == "t2i",
                elem_id=f"{task}-picture",
            )
            start = self._of_model(first)
            with gr.Row():
                self.fields["size"] = gr.Dropdown(
                    label="Size", allow_custom_value=True, min_width=130, elem_id=f"{task}-size", **start["size"]
                )
                self.fields["seconds"] = gr.Number(
                    label="Seconds",
                    minimum=0,
                    step=0.1,
                    min_width=100,
                    visible=first["max_seconds"] > 0,
                    elem_id=f"{task}-seconds",
                    **start["seconds"],
                )
            with gr.Row(elem_classes="k-seed"):
                self.fields["seed"] = gr.Textbox(
                    label="Seed", placeholder="new each time", min_width=130, elem_id=f"{task}-seed"
                )
                self.again = gr.Button("Again", size="sm", min_width=60, scale=0, elem_id=f"{task}-again")
                self.new = gr.Button("New", size="sm", min_width=60, scale=0, elem_id=f"{task}-new")
            with gr.Accordion("Advanced settings", open=False, elem_id=f"{task}-advanced"):
                self._advanced(start)
            self.directed = Directed(task)
            self.plan = gr.HTML(elem_id=f"{task}-plan", padding=False)
            self.make = gr.Button("Make it", variant="primary", elem_id=f"{task}-make")
            # Within the tab: Gradio counts all that stands between tabs as one of them.
            self.clock = gr.Timer(AGAIN)
            self.last_seed = gr.State("")

    def _advanced(self, start: dict[str, dict[str, Any]]) -> None:
        task = self.task
        narrow: dict[str, Any] = {"min_width": 100}
        with gr.Row():
            self.fields["steps"] = gr.Number(
                label="Steps", precision=0, minimum=1, elem_id=f"{task}-steps", **narrow, **start["steps"]
            )
            self.fields["guidance"] = gr.Number(label="Guidance", step=0.5, **narrow, **start["guidance"])
            self.fields["scheduler_scale"] = gr.Number(
                label="Scheduler scale", step=0.5, **narrow, **start["scheduler_scale"]
            )
        self.fields["negative_prompt"] = gr.Textbox(label="Negative prompt", lines=2, **start["negative_prompt"])
        with gr.Row():
            self.fields["guidance_interval"] = gr.Textbox(
                label="Guidance between", info="shares of the steps", **narrow, **start["guidance_interval"]
            )
            self.fields["guidance_every"] = gr.Number(
                label="Negative every", info="guided steps", precision=0, minimum=1, **narrow, **start["guidance_every"]
            )
        self.fields["expand_prompt"] = gr.Dropdown(
            list(EXPANSION), value=next(iter(EXPANSION)), label="Write the prompt out first"
        )
        self.fields["magcache"] = gr.Checkbox(label="MagCache: skip what changes little", **start["magcache"])
        self.fields["loras"] = gr.Dropdown(
            label="Adapters", info="NAME or NAME:scale", multiselect=True, allow_custom_value=True, **start["loras"]
        )

    # --- forms and fields ---------------------------------------------------------------------------------------------

    @property
    def form(self) -> list[gr.components.Component]:
        return [self.picture, *self.directed.components.values(), *self.fields.values()]

    def _of_model(self, model: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Of the components in OF_MODEL, what they have for a model."""
        start = shown_in_form(model["defaults"])
        sizes = ["auto", *model["sizes"]] if self.needs_picture else model["sizes"]
        values: dict[str, dict[str, Any]] = {name: {"value": start[name]} for name in OF_MODEL if name in start}
        values["size"] = {"choices": sizes, "value": "auto" if self.needs_picture else start["size"]}
        values["magcache"]["visible"] = model["magcache"]
        values["loras"] = {"choices": model["loras"], "value": [], "visible": bool(model["loras"])}
        return values

    def asked(self, values: tuple[Any, ...]) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """The fields of a request and its files by field, from the values of `form`."""
        picture, *others = values
        count = len(self.directed.components)
        fields = dict(zip(self.fields, others[count:], strict=True))
        directed, files = self.directed.asked(others[:count], picture is not None)
        if picture is not None and (self.needs_picture or self.task == "t2i"):
            files["image"] = [picture]
        fields["expand_prompt"] = EXPANSION.get(fields["expand_prompt"])
        if not self.models.get(fields["model"], {}).get("max_seconds"):
            del fields["seconds"]
        given = {name: value for name, value in fields.items() if value not in (None, "", []) or name in KEPT_EMPTY}
        if "video" in files:  # whose own length and shape count where nobody has changed the form's
            usual = self.models.get(fields["model"], {}).get("defaults", {})
            given = {name: value for name, value in given.items() if name not in OF_VIDEO or value != usual.get(name)}
        return {name: number(value) for name, value in given.items()} | directed, files

    def filled(
        self, settings: Mapping[str, Any], picture: str | None, files: Mapping[str, list[str]]
    ) -> dict[gr.components.Component, Any]:
        """The form with a job's settings and files."""
        shown = shown_in_form(settings)
        values: dict[gr.components.Component, Any] = {
            component: shown[name] for name, component in self.fields.items() if name in shown
        }
        return values | {self.picture: picture} | self.directed.filled(settings, files)

    # --- events -------------------------------------------------------------------------------------------------------

    def connect(self, watch: Watch, page: gr.Blocks, refreshed: dict[str, Any]) -> None:
        """What the form's buttons do. refreshed: the event that brings the gallery up to date."""

        async def make(request: gr.Request, *values: Any) -> AsyncIterator[tuple[Any, ...]]:
            fields, files = self.asked(values)
            session = request.session_hash or ""
            try:
                job = await self.client.submit(fields, files, f"page {session}")
            except Mistake as error:
                yield gr.skip(), *watch.refused(error)
                return
            seed = str(job["settings"]["seed"])
            async for shown in watch.follow(job["id"], session):
                yield seed, *shown

        async def plan(*values: Any) -> tuple[Any, Any]:
            fields, files = self.asked(values)
            if self.needs_picture and not files.keys() & {"image", "video"}:
                return "<p class=k-plan>Give a picture to see what it will take.</p>", gr.Timer(active=False)
            try:
                found = await self.client.plan({**fields, "prompt": fields["prompt"] or "-"}, files)
            except Mistake as error:
                return markup.mistake(str(error)), gr.Timer(active=False)
            return markup.plan(found), gr.Timer(active=found["memory"] is None)

        def of_model(name: str) -> list[Any]:
            values = self._of_model(self.models[name])
            return [type(self.fields[each])(**values[each]) for each in OF_MODEL]

        planned: dict[str, Any] = {"fn": plan, "inputs": self.form, "outputs": [self.plan, self.clock], **QUIET}
        made = gr.on([self.make.click], make, self.form, [self.last_seed, *watch.outputs], **QUIET)
        made.then(**refreshed).then(**planned)
        self.again.click(lambda seed: seed, self.last_seed, self.fields["seed"], **QUIET)
        self.new.click(lambda: "", None, self.fields["seed"], **QUIET)
        self.fields["model"].input(of_model, self.fields["model"], [self.fields[name] for name in OF_MODEL], **QUIET)
        fields = {**self.fields, **self.directed.components}
        changes = [self.picture.change, *(one.change for name, one in fields.items() if name not in WITHOUT_PLAN)]
        gr.on([page.load, self.clock.tick, *changes], trigger_mode="always_last", **planned)


def shown_in_form(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as the API has them, as the form's components show them."""
    shown = dict(settings)
    if "guidance_interval" in shown:
        shown["guidance_interval"] = ", ".join(f"{share:g}" for share in shown["guidance_interval"])
    if "expand_prompt" in shown:
        shown["expand_prompt"] = next(words for words, value in EXPANSION.items() if value is shown["expand_prompt"])
    if "seed" in shown:
        shown["seed"] = str(shown["seed"])
    return shown


def number(value: Any) -> Any:
    """Whole numbers as such; a browser knows one kind."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
