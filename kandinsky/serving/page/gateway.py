"""Between browsers and Gradio: the few of its addresses that the page needs, and what may come through them.

Gradio has many more, for things that this page has not, and some are open to the world: its files may be named by
address, and it fetches them. Here a file is one that was uploaded through the page; anything else is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kandinsky.common.untrusted import parse_json
from kandinsky.serving.errors import Refused
from kandinsky.serving.gate import COOKIE, Keys
from kandinsky.serving.page import sign_in

GRADIO = "/gradio_api"
FILE = f"{GRADIO}/file="
READ = (
    *("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/assets/{path:path}", "/static/{path:path}"),
    *(f"{GRADIO}/{name}" for name in ("queue/data", "heartbeat/{session}", "startup-events", "theme.css")),
    *(f"{GRADIO}/{name}" for name in ("upload_progress", "file={path:path}")),
)
SENT = tuple(f"{GRADIO}/{name}" for name in ("queue/join", "cancel", "reset", "upload"))
# Nothing comes from elsewhere, whatever the page says: no fonts, no scripts, no counting of visitors.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; form-action 'self'; "
    "base-uri 'self'; frame-ancestors 'self'"
)


class Gateway:
    def __init__(self, gradio: ASGIApp, keys: Keys, uploads: Path) -> None:
        """uploads: the folder that Gradio keeps uploaded files in, and the only one that it is asked for."""
        self.gradio, self.keys, self.uploads = gradio, keys, uploads.resolve()

    def routes(self) -> list[Route]:
        return [
            *(Route(path, self, methods=["GET", "HEAD"], include_in_schema=False) for path in READ),
            *(Route(path, self, methods=["POST"], include_in_schema=False) for path in SENT),
            Route(sign_in.PATH, self.sign_in, methods=["POST"], include_in_schema=False),
        ]

    async def sign_in(self, request: Request) -> Any:
        return await sign_in.sign_in(request, self.keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises Refused."""
        request, path = Request(scope, receive), scope["path"]
        if path == "/" and not self.keys.opens_page(request.cookies.get(COOKIE)):
            await sign_in.form()(scope, receive, send)
            return
        if path.startswith(FILE):
            self._check_file(path.removeprefix(FILE))
        if scope["method"] == "POST":
            body = await request.body()  # all of it, so that what is too large or too slow ends here
            if not path.endswith("/upload"):
                for name in paths_in(parse_json(body, "the request")):
                    self._check_file(name)
            receive = replayed(body, receive)

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        await self.gradio(scope, receive, with_policy)

    def _check_file(self, name: object) -> None:
        """Raises Refused for what was not uploaded here."""
        try:
            is_ours = isinstance(name, str) and Path(name).resolve().is_relative_to(self.uploads)
        except (ValueError, OSError):  # a NUL, or a name that is too long
            is_ours = False
        if not is_ours:
            raise Refused(403, "the page's files are those that were uploaded with it")


def paths_in(value: Any) -> Iterator[object]:
    """All that is called "path", in whatever it stands."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if one.get("path") is not None:
                yield one["path"]
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)


def replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` that has the whole body, and then what comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
