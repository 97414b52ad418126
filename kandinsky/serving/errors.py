"""What goes wrong with a request, as OpenAI's clients expect it: a status, and one sentence."""

from __future__ import annotations

import errno
import logging
import sqlite3
from collections.abc import Callable, Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from kandinsky.common.given import shortened
from kandinsky.serving.engine import NoSuchJob, NotNow, QueueFull

logger = logging.getLogger(__name__)

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
NO_RETRY = {"x-should-retry": "false"}  # for OpenAI's clients


class Refused(Exception):
    """A request that is answered with a status and a sentence."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})

    @property
    def response(self) -> JSONResponse:
        return answer(self.status, str(self), headers=self.headers)


def answer(
    status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """A mistake as OpenAI tells it."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status, dict(headers or {}))


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response


def _mistake(request: Request, error: Exception) -> Response:
    return answer(400, " ".join(str(error).split()) or "the request can't be read")


def _validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return answer(400, shortened(f"{'.'.join(str(part) for part in first['loc'][1:])}: {first['msg']}"))


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {
        404: "there is nothing at this address; GET /docs lists what there is",
        405: "this address takes none of that",
    }
    return answer(error.status_code, known.get(error.status_code, shortened(str(error.detail))), headers=error.headers)


def _missing(request: Request, error: Exception) -> Response:
    return answer(404, str(error))


def _conflict(request: Request, error: Exception) -> Response:
    return answer(409, str(error), headers=NO_RETRY)


def _full(request: Request, error: Exception) -> Response:
    assert isinstance(error, QueueFull)
    return answer(429, str(error), headers={"Retry-After": str(round(error.seconds))})


def _disk(request: Request, error: Exception) -> Response:
    logger.error("a request failed", exc_info=error)
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    is_full = isinstance(error, sqlite3.Error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return answer(
        507 if is_full else 503, f"nothing can be written on the server: {shortened(reason)}", headers=NO_RETRY
    )


def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


def _ours(request: Request, error: Exception) -> Response:
    return answer(500, "something went wrong on the server that should not; its log says what", headers=NO_RETRY)


def add_handlers(app: FastAPI) -> None:
    """Have each exception answered."""
    handlers: dict[type[Exception], Callable[[Request, Exception], Response]] = {
        Refused: _refused,
        RequestValidationError: _validation,
        HTTPException: _http,
        NoSuchJob: _missing,
        NotNow: _conflict,
        QueueFull: _full,
        sqlite3.Error: _disk,
        OSError: _disk,
        ClientDisconnect: _gone,
        ValueError: _mistake,
        Exception: _ours,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
