"""The page's way to the engine: the server's own HTTP API, asked within the process and with the server's key."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

import httpx
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp

Files: TypeAlias = "Mapping[str, Sequence[str]]"  # paths by field
PATIENCE = 60.0  # seconds
CLIENT = "X-Client-Id"


class Mistake(Exception):
    """What the API refused, in its sentence."""


class Client:
    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._http = httpx.AsyncClient(
            transport=transport, base_url="http://127.0.0.1", headers=headers, timeout=PATIENCE, trust_env=False
        )

    async def submit(self, fields: dict[str, Any], files: Files, client: str) -> dict[str, Any]:
        """Queue a job, with files by field. client: whose turn it is. Raises Mistake."""
        answer = await self._post("/v1/jobs", fields, files, {CLIENT: client})
        job: dict[str, Any] = answer["data"][0]
        return job

    async def plan(self, fields: dict[str, Any], files: Files) -> dict[str, Any]:
        return await self._post("/v1/plan", fields, files, {})

    async def job(self, job_id: str) -> dict[str, Any]:
        return await self._json("GET", address(job_id))

    async def jobs(self, count: int) -> dict[str, Any]:
        """The newest ones, at most 100, and whether there are more."""
        return await self._json("GET", "/v1/jobs", params={"limit": min(count, 100)})

    async def cancel(self, job_id: str) -> dict[str, Any]:
        return await self._json("POST", f"{address(job_id)}/cancel")

    async def delete(self, job_id: str) -> None:
        await self._json("DELETE", address(job_id))

    async def picture(self, job_id: str) -> bytes:
        """The PNG that a job begins with."""
        return (await self._ask("GET", f"{address(job_id)}/picture")).content

    async def given(self, job_id: str, field: str, number: int) -> bytes:
        """Another file that a job is given."""
        return (await self._ask("GET", f"{address(job_id)}/given/{field}/{number}")).content

    async def _post(self, path: str, fields: dict[str, Any], files: Files, headers: dict[str, str]) -> dict[str, Any]:
        if not files:
            return await self._json("POST", path, json=fields, headers=headers)
        sent = []
        for field, names in files.items():
            for name in map(Path, names):
                sent.append((field, (name.name, await run_in_threadpool(name.read_bytes))))
        if "segments" in fields:
            fields = {**fields, "segments": json.dumps(fields["segments"])}
        return await self._json("POST", path, data=fields, files=sent, headers=headers)

    async def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = (await self._ask(method, path, **options)).json()
        return found

    async def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        response = await self._http.request(method, path, **options)
        if response.is_error:
            raise Mistake(sentence(response))
        return response


def address(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def sentence(response: httpx.Response) -> str:
    """What an answer says went wrong."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {response.status_code}"
