"""What is being made, as the page shows it: one job of each person at a time, from its first step to its output."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from kandinsky.serving.page import markup
from kandinsky.serving.page.client import Client, Mistake

LOOK = 0.25  # seconds between two looks at a job


class Watch:
    """The part of the page beside the tabs, and which job each person sees there."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._seen: dict[str, str] = {}  # by Gradio's name of an open page
        self.shown = gr.HTML(markup.nothing_yet(), elem_id="shown", padding=False)
        with gr.Row():
            self.stop = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel")
        self.stop.click(self.cancel, None, None, **QUIET)

    @property
    def outputs(self) -> list[gr.components.Component]:
        return [self.shown, self.stop]

    async def follow(self, job_id: str, session: str) -> AsyncIterator[tuple[Any, Any]]:
        """Values of `outputs` while a job goes on, until it ends or the person looks at another one."""
        self._seen[session] = job_id
        before: object = None
        while self._seen.get(session) == job_id:
            try:
                job = await self.client.job(job_id)
            except Mistake as error:
                yield self.refused(error)
                return
            is_over = job["state"] in markup.ENDED
            if (now := (job["state"], job["stage"], job["step"], job["urls"]["preview"])) != before:
                before = now
                yield markup.watched(job), gr.Button(interactive=not is_over)
            if is_over:
                return
            await asyncio.sleep(LOOK)

    def refused(self, error: Mistake) -> tuple[Any, Any]:
        return markup.mistake(str(error)), gr.Button(interactive=False)

    async def cancel(self, request: gr.Request) -> None:
        """The job ends after the step that runs; pressed again, at once."""
        job_id = self._seen.get(request.session_hash or "")
        if job_id is not None:
            try:
                await self.client.cancel(job_id)
            except Mistake as error:
                gr.Warning(str(error))

    def forget(self, request: gr.Request) -> None:
        """The person's page is closed."""
        self._seen.pop(request.session_hash or "", None)


# How events run: side by side, because they mostly wait; without a veil over what they change; and not as an API.
QUIET: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
