"""The page onto the server's application."""

from __future__ import annotations

import logging
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.utils import get_upload_folder

from kandinsky.serving.gate import Keys
from kandinsky.serving.page import layout
from kandinsky.serving.page.client import Client
from kandinsky.serving.page.gateway import Gateway


def mount(app: FastAPI, models: list[dict[str, Any]], api_key: str | None) -> AbstractAsyncContextManager[Any]:
    """Put the page at / of the application. What comes back has to be open while that lives."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the page asks several times a second
    uploads = Path(get_upload_folder())
    page = layout.build(models, Client(app, api_key), uploads)
    inner = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        inner,
        page,
        "/",
        allowed_paths=[],
        show_error=False,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        theme=layout.theme(),
        css=layout.style(),
    )
    app.router.routes.extend(Gateway(inner, Keys(api_key), uploads).routes())
    return inner.router.lifespan_context(inner)
