"""The body of a request, JSON or a form, as fields and a picture. Nothing in it names a file or an address."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request

from kandinsky.common.given import shown
from kandinsky.common.untrusted import is_plain_name, parse_json
from kandinsky.pictures import load_image
from kandinsky.serving.errors import Refused
from kandinsky.serving.fields import FIELDS, PICTURES, checked

MOST_FIELDS = 100
FIELD_BYTES = 1 << 20  # of one that is no file


@dataclass(frozen=True)
class Body:
    fields: dict[str, Any]
    picture: Image.Image | None = None
    picture_name: str | None = None


class Bodies:
    """Reads them; one picture is decoded at a time, because each may take hundreds of megabytes."""

    def __init__(self) -> None:
        self._decoding = asyncio.Lock()

    async def read(self, request: Request, allowed: tuple[str, ...]) -> Body:
        """Raises ValueError for what can't be read and for fields that are not allowed, Refused for other formats."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        pictures: list[tuple[bytes, str | None]] = []
        if kind == "application/json":
            given = parse_json(await request.body(), "the request")
            if not isinstance(given, dict):
                raise ValueError(f"the request is {shown(given)}; it must be an object with fields")
            sent = {name: given[name] for name in given if name in PICTURES and given[name] is not None}
            fields = {name: value for name, value in given.items() if name not in PICTURES}
            pictures = [(_from_url(value), None) for name in sent for value in _each(sent[name])]
        elif kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
            fields, sent = {}, {}
            async with request.form(max_files=2, max_fields=MOST_FIELDS, max_part_size=FIELD_BYTES) as form:
                for key, value in form.multi_items():
                    name = key.removesuffix("[]") if key.removesuffix("[]") in FIELDS else key
                    if name.removesuffix("[image_url]") in PICTURES:
                        name = name.removesuffix("[image_url]")
                        sent[name] = True
                        if isinstance(value, UploadFile):
                            pictures.append((await value.read(), value.filename))
                        else:
                            pictures.append((_from_url(value), None))
                    elif isinstance(value, UploadFile):
                        raise ValueError(f"{shown(key)} is a file; there is no field of that name for one")
                    elif name in fields:
                        before = fields[name]
                        fields[name] = [*(before if isinstance(before, list) else [before]), value]
                    else:
                        fields[name] = value
        else:
            raise Refused(415, "send JSON (Content-Type: application/json) or a form (multipart/form-data)")
        if sent and not {"image", "input_reference"} & set(allowed):
            raise ValueError(f"{min(sent)} is a picture, and this takes none: leave it out")
        if len(pictures) > 1:
            raise ValueError(f"{len(pictures)} pictures are sent: give one")
        values = checked(fields, allowed)
        if not pictures:
            return Body(values)
        content, file_name = pictures[0]
        async with self._decoding:
            picture = await run_in_threadpool(load_image, content)
        return Body(values, picture, file_name if is_plain_name(file_name) else "picture")


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _from_url(value: Any) -> bytes:
    """What is in a data: URL, as text or as OpenAI's {"image_url": text}."""
    if isinstance(value, Mapping):
        value = value.get("image_url")
    if isinstance(value, Mapping):
        value = value.get("url")
    if not isinstance(value, str) or not value.startswith("data:"):
        raise ValueError(
            f"the picture is {shown(value)}; send it as a file in a form, or as text that begins with "
            "data:image/png;base64, (nothing is fetched here)"
        )
    head, _, content = value.partition(",")
    if not head.endswith(";base64"):
        raise ValueError("the picture's data: URL is not in base64: begin it with data:image/png;base64,")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the picture's data: URL is not in base64: it is damaged") from None
