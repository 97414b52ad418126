"""Who gets in, and with how much: the key, the host that is asked for, and the size and pace of bodies.

An ASGI middleware in front of everything. Without a key only this machine gets in, and not by way of a web page of
somebody else that its browser shows: such a page can send requests here, but neither the right Host (after a DNS trick)
nor without its own Origin. A link that was signed with the key opens what it names, because <video> sends no headers.
The page (`page/`) has a pass, signed with the key too, in a cookie.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Sequence
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kandinsky.serving.errors import Refused
from kandinsky.serving.limits import Limits

OPEN = ("/health", "/docs", "/openapi.json", "/docs/oauth2-redirect", "/", "/sign_in")
PAGE = ("/config", "/theme.css", "/favicon.ico", "/manifest.json")
PAGE_FOLDERS = ("/gradio_api/", "/assets/", "/static/")
COOKIE = "kandinsky_page"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PATIENCE = 10  # times the seconds without a byte that a whole body may take


class Keys:
    """The server's key, or none: who knows it, and links that stand for it."""

    def __init__(self, api_key: str | None) -> None:
        self._key = None if api_key is None else api_key.encode()

    @property
    def is_set(self) -> bool:
        return self._key is not None

    def fits(self, authorization: str | None) -> bool:
        """Whether a header is "Bearer" and the key; compared in a time that does not tell how much of it is right."""
        scheme, _, given = (authorization or "").partition(" ")
        return self._key is None or (
            hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._key) and scheme.lower() == "bearer"
        )

    def sign(self, path: str) -> str:
        """The path as a link that opens without the key."""
        return path if self._key is None else f"{path}?signature={self._signature(path)}"

    def is_signed(self, path: str, query: str) -> bool:
        given = parse_qs(query).get("signature", [""])[0]
        return hmac.compare_digest(given.encode("utf-8", "replace"), self._signature(path).encode())

    def pass_until(self, until: int) -> str:
        """What opens the page until then, in seconds since 1970."""
        return f"{until}.{self._signature(f'page {until}')}"

    def opens_page(self, given: str | None) -> bool:
        """Whether it is a pass of `pass_until` whose time has not come."""
        until, _, signature = (given or "").partition(".")
        if self._key is None:
            return True
        is_right = hmac.compare_digest(signature.encode("utf-8", "replace"), self._signature(f"page {until}").encode())
        return is_right and int(until) > time.time()

    def _signature(self, path: str) -> str:
        return hmac.new(self._key or b"", path.encode("utf-8", "replace"), hashlib.sha256).hexdigest()


class Gate:
    def __init__(self, app: ASGIApp, keys: Keys, limits: Limits, hosts: Sequence[str] = LOOPBACK) -> None:
        """hosts: names under which a server without a key may be asked."""
        self.app, self.keys, self.limits, self.hosts = app, keys, limits, tuple(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check(scope, headers)
        except Refused as refused:
            await refused.response(scope, receive, send)
            return
        await self.app(scope, self._bounded(receive), send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raises Refused."""
        path, query = scope["path"], scope["query_string"].decode("latin-1")
        if not self.keys.is_set:
            self._check_origin(headers)
        elif path in PAGE or path.startswith(PAGE_FOLDERS):
            if not self.keys.opens_page(Request(scope).cookies.get(COOKIE)):
                raise Refused(401, "the page is not signed in to: open / and give the server's key")
            self._check_own_origin(headers)
        elif path not in OPEN and not self.keys.fits(headers.get("authorization")):
            is_link = scope["method"] in ("GET", "HEAD") and self.keys.is_signed(path, query)
            if not is_link:
                raise Refused(401, "the key is missing or wrong: send it as Authorization: Bearer KEY")
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or int(length[:20]) > self._most:
            raise Refused(413, self._too_large)

    def _check_origin(self, headers: Headers) -> None:
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if name not in self.hosts:
            raise Refused(
                403, f"this server has no key and is for this machine: ask for {self.hosts[0]}, not another name"
            )
        self._check_own_origin(headers)

    def _check_own_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is not None and urlsplit_host(origin) != headers.get("host", ""):
            if self.keys.is_set:
                raise Refused(403, "another site's page asks in the name of this one")
            raise Refused(403, "this server has no key, and another site's page asks: start it with --api_key")

    @property
    def _most(self) -> int:
        return self.limits.body_mb * 1_000_000

    @property
    def _too_large(self) -> str:
        return f"the request is too large: at most {self.limits.body_mb} MB are read, the picture included"

    def _bounded(self, receive: Receive) -> Receive:
        """`receive` that raises Refused for a body that is too large or too slow."""
        seen, is_whole, end = 0, False, time.monotonic() + PATIENCE * self.limits.body_seconds

        async def bounded() -> Message:
            nonlocal seen, is_whole
            if is_whole:  # from now on it waits for the client to go
                return await receive()
            try:
                seconds = min(self.limits.body_seconds, end - time.monotonic())
                message = await asyncio.wait_for(receive(), max(seconds, 0.001))
            except TimeoutError:
                raise Refused(408, "the rest of the request did not come", {"Connection": "close"}) from None
            seen += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if seen > self._most:
                raise Refused(413, self._too_large, {"Connection": "close"})
            return message

        return bounded


def urlsplit_host(origin: str) -> str | None:
    """Host and port of an Origin; None for what has none, like "null"."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None
