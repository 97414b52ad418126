"""The HTTP server's application: routes over an engine, which lives as long as the application does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse

from kandinsky import __version__
from kandinsky.serving import images, jobs, metrics, videos
from kandinsky.serving.door import Door
from kandinsky.serving.engine import Engine
from kandinsky.serving.errors import Refused, add_handlers
from kandinsky.serving.gate import LOOPBACK, Gate, Keys

DESCRIPTION = """Kandinsky 5: videos and pictures. `/v1/videos`, `/v1/images` and `/v1/models` are OpenAI's, so that its
clients work unchanged; `/v1/jobs` and `/v1/plan` are for more. Mistakes are 400 and one sentence."""


def create_app(
    engine: Engine, api_key: str | None = None, hosts: Sequence[str] = LOOPBACK, has_page: bool = False
) -> FastAPI:
    """api_key: what clients have to know; None: only this machine gets in, asking for one of `hosts`.

    Raises ImportError where a page is wanted and Gradio isn't there.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(engine.start)
        async with AsyncExitStack() as stack:
            if page is not None:
                await stack.enter_async_context(page)
            yield
        await run_in_threadpool(engine.stop)

    keys = Keys(api_key)
    door = Door(engine, keys)
    app = FastAPI(title="Kandinsky 5", version=__version__, description=DESCRIPTION, redoc_url=None, lifespan=lifespan)
    app.state.engine, app.state.door = engine, door
    add_handlers(app)
    app.add_middleware(Gate, keys=keys, limits=engine.catalogue.limits, hosts=hosts)
    for router in (videos.routes(door), images.routes(door), jobs.routes(door), jobs.plan_routes(door)):
        app.include_router(router)

    def described() -> list[dict[str, Any]]:
        loras = list(engine.catalogue.loras())
        return [one.describe(loras) for one in engine.catalogue.variants.values()]

    @app.get("/v1/models", tags=["models"])
    def models() -> dict[str, Any]:
        """Which there are, and what each can be asked for."""
        return {"object": "list", "data": described()}

    @app.get("/v1/models/{model}", tags=["models"])
    def model(model: str) -> dict[str, Any]:
        if model not in engine.catalogue.variants:
            raise Refused(404, f"there is no model of that name: choose one of {', '.join(engine.catalogue.variants)}")
        return engine.catalogue[model].describe(list(engine.catalogue.loras()))

    @app.get("/health", tags=["server"])
    def health() -> dict[str, Any]:
        counts = engine.store.counts()
        return {"status": "ok", "queued": counts["queued"], "running": counts["running"]}

    @app.get("/metrics", tags=["server"], response_class=Response)
    def prometheus() -> Response:
        return Response(metrics.exposition(engine), media_type="text/plain; version=0.0.4; charset=utf-8")

    page = None
    if has_page:
        from kandinsky.serving.page.mount import mount

        page = mount(app, described(), api_key)
    else:
        app.add_route("/", lambda _: RedirectResponse("/docs"), include_in_schema=False)
    return app
