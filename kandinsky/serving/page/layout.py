"""The page as a whole: a tab for each task that the server has a model for, what is being made, and the gallery."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.concurrency import run_in_threadpool

from kandinsky.serving.page import markup
from kandinsky.serving.page.client import Client, Mistake
from kandinsky.serving.page.tab import Tab
from kandinsky.serving.page.watch import QUIET, Watch

HERE = Path(__file__).parent
AT_A_TIME = 24  # jobs of the gallery
KEPT = 3600  # seconds that an uploaded picture is kept at least
SYSTEM = ["system-ui", "sans-serif"]
# A click on a button of the gallery is an event of it that says which.
CLICKS = """element.addEventListener('click', (event) => {
    const button = event.target.closest('button[data-action]');
    if (button) trigger('pressed', {action: button.dataset.action, id: button.dataset.id});
});"""


def build(models: list[dict[str, Any]], client: Client, uploads: Path) -> gr.Blocks:
    """models: as GET /v1/models has them. uploads: the folder for what people upload."""
    by_task: dict[str, list[dict[str, Any]]] = {task: [] for task in markup.TASKS}
    for model in models:
        by_task[model["task"]].append(model)
    with gr.Blocks(title="Kandinsky 5", analytics_enabled=False, delete_cache=(KEPT // 6, KEPT)) as page:
        gr.HTML("<h1>Kandinsky 5</h1>", elem_id="title", padding=False)
        with gr.Row():
            with gr.Column(scale=5, min_width=320), gr.Tabs() as tabs:
                each = {task: Tab(task, some, client) for task, some in by_task.items() if some}
            with gr.Column(scale=6, min_width=320):
                watch = Watch(client)
        Gallery(client, uploads, page, tabs, each, watch)
        page.unload(watch.forget)
    page.queue(default_concurrency_limit=None, api_open=False)
    return page


class Gallery:
    """What was made, newest first, each with its settings, and what connects it with the rest of the page."""

    def __init__(
        self, client: Client, uploads: Path, page: gr.Blocks, tabs: gr.Tabs, each: dict[str, Tab], watch: Watch
    ) -> None:
        self.client, self.uploads, self.tabs, self.each, self.watch = client, uploads, tabs, each, watch
        with gr.Row():
            gr.HTML("<h2>Made so far</h2>", padding=False)
            refresh = gr.Button("Refresh", size="sm", scale=0, min_width=80, elem_id="refresh")
        self.cards = gr.HTML(js_on_load=CLICKS, elem_id="gallery", padding=False)
        more = gr.Button("More", size="sm", visible=False, elem_id="more")
        count = gr.State(AT_A_TIME)
        refreshed: dict[str, Any] = {"fn": self.shown, "inputs": count, "outputs": [self.cards, more], **QUIET}
        gr.on([page.load, refresh.click], **refreshed)
        more.click(lambda number: number + AT_A_TIME, count, count, **QUIET).then(**refreshed)
        forms = [component for tab in each.values() for component in tab.form]
        pressed = self.cards.pressed(self.pressed, None, [tabs, *forms, *watch.outputs], **QUIET)
        pressed.then(**refreshed)
        for tab in each.values():
            tab.connect(watch, page, refreshed)

    async def shown(self, count: int) -> tuple[Any, Any]:
        found = await self.client.jobs(count)
        return markup.gallery(found["data"]), gr.Button(visible=found["has_more"] and count < 100)

    async def pressed(self, request: gr.Request, event: gr.EventData) -> AsyncIterator[dict[Any, Any]]:
        """Show a job, use its settings, or delete it."""
        action, job_id = str(event.action), str(event.id)
        unchanged = {self.tabs: gr.skip()}  # nothing at all would not be taken for values by component
        try:
            if action == "show":
                async for values in self.watch.follow(job_id, request.session_hash or ""):
                    yield dict(zip(self.watch.outputs, values, strict=True))
            elif action == "use":
                yield await self.used(job_id)
            elif action == "delete":
                await self.client.delete(job_id)
                yield unchanged
        except Mistake as error:
            gr.Warning(markup.safe(error))
            yield unchanged

    async def used(self, job_id: str) -> dict[Any, Any]:
        """A job's settings, in the tab of its model."""
        job = await self.client.job(job_id)
        for task, tab in self.each.items():
            if job["model"] in tab.models:
                picture = None
                if job["picture"] is not None:
                    content = await self.client.picture(job_id)
                    picture = await run_in_threadpool(self._kept, job_id, "picture.png", content)
                files: dict[str, list[str]] = {}
                for field, name in job["files"]:
                    before = files.setdefault(field, [])
                    content = await self.client.given(job_id, field, len(before))
                    where = f"{job_id}/{field}{len(before)}"
                    before.append(await run_in_threadpool(self._kept, where, name, content))
                return {self.tabs: gr.Tabs(selected=task), **tab.filled(job["settings"], picture, files)}
        raise Mistake(f"this server has no model {job['model']} any more")

    def _kept(self, folder: str, name: str, content: bytes) -> str:
        """The file, as if it had been uploaded again."""
        path = self.uploads / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return str(path)


def theme() -> gr.themes.Base:
    """With fonts that every system has: nothing is fetched."""
    return gr.themes.Default(font=SYSTEM, font_mono=["ui-monospace", "monospace"])


def style() -> str:
    return (HERE / "style.css").read_text(encoding="utf-8")
