"""The body of a request, JSON or a form, as fields, a picture and files. Nothing in it names a file or an address."""

from __future__ import annotations

import asyncio
import base64
import binascii
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request

from kandinsky.common.given import shown
from kandinsky.common.untrusted import is_plain_name, parse_json
from kandinsky.pictures import load_image
from kandinsky.serving.errors import Refused
from kandinsky.serving.fields import FIELDS, FILES, PICTURES, checked

MOST_FIELDS = 100
FIELD_BYTES = 1 << 20  # of one that is no file


@dataclass(frozen=True)
class Body:
    fields: dict[str, Any]
    picture: Image.Image | None = None
    picture_name: str | None = None
    files: dict[str, list[Path]] = field(default_factory=dict)  # by field, under names like those that they came with


@dataclass(frozen=True)
class Sent:
    """A file as it came: what is in it, what its client calls it, and else what its kind is called."""

    content: bytes
    name: str | None = None
    suffix: str = ""


class Bodies:
    """Reads them; one picture is decoded at a time, because each may take hundreds of megabytes."""

    def __init__(self, most_files: int) -> None:
        self.most_files = most_files
        self._decoding = asyncio.Lock()

    @asynccontextmanager
    async def read(self, request: Request, allowed: tuple[str, ...]) -> AsyncIterator[Body]:
        """The body, whose files are there within the block. Raises ValueError for what can't be read and for fields
        that are not allowed, Refused for other formats."""
        fields, pictures, files = await self._parts(request, allowed)
        picture, name = None, None
        if pictures:
            async with self._decoding:
                picture = await run_in_threadpool(load_image, pictures[0].content)
            name = pictures[0].name if is_plain_name(pictures[0].name) else "picture"
        if not files:
            yield Body(fields, picture, name)
            return
        with tempfile.TemporaryDirectory(prefix="kandinsky-") as folder:
            paths = await run_in_threadpool(_written, files, Path(folder))
            yield Body(fields, picture, name, paths)

    async def _parts(
        self, request: Request, allowed: tuple[str, ...]
    ) -> tuple[dict[str, Any], list[Sent], dict[str, list[Sent]]]:
        """Fields, pictures to begin with, and other files by field."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        pictures: list[Sent] = []
        files: dict[str, list[Sent]] = {}
        if kind == "application/json":
            given = parse_json(await request.body(), "the request")
            if not isinstance(given, dict):
                raise ValueError(f"the request is {shown(given)}; it must be an object with fields")
            sent = {name: given[name] for name in given if name in PICTURES and given[name] is not None}
            fields = {name: value for name, value in given.items() if name not in (*PICTURES, *FILES)}
            pictures = [_from_url(value) for name in sent for value in _each(sent[name])]
            there = [name for name in given if name in FILES and given[name] is not None]
            files = {name: [_from_url(value) for value in _each(given[name])] for name in there}
        elif kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
            fields, sent = {}, {}
            async with request.form(
                max_files=self.most_files + 1, max_fields=MOST_FIELDS, max_part_size=FIELD_BYTES
            ) as form:
                for key, value in form.multi_items():
                    name = key.removesuffix("[]") if key.removesuffix("[]") in FIELDS else key
                    if name.removesuffix("[image_url]") in PICTURES:
                        name = name.removesuffix("[image_url]")
                        sent[name] = True
                        pictures.append(await _sent(value))
                    elif name in FILES:
                        files.setdefault(name, []).append(await _sent(value))
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
        if not_taken := sorted(set(files) - set(allowed)):
            raise ValueError(f"{not_taken[0]} is a file, and this takes none of that name: leave it out")
        if (count := sum(map(len, files.values()))) > self.most_files:
            raise ValueError(f"{count} files are sent; at most {self.most_files} are read")
        return checked(fields, allowed), pictures, files


def _written(files: Mapping[str, list[Sent]], folder: Path) -> dict[str, list[Path]]:
    """The files, each in a folder of its own under the name it came with, if that is one."""
    paths: dict[str, list[Path]] = {}
    for name, sent in files.items():
        for number, one in enumerate(sent):
            (folder / f"{name}{number}").mkdir()
            called = one.name if one.name and is_plain_name(one.name) else name + one.suffix
            path = folder / f"{name}{number}" / called
            path.write_bytes(one.content)
            paths.setdefault(name, []).append(path)
    return paths


async def _sent(value: UploadFile | str) -> Sent:
    return Sent(await value.read(), value.filename) if isinstance(value, UploadFile) else _from_url(value)


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _from_url(value: Any) -> Sent:
    """What is in a data: URL, as text or as OpenAI's {"image_url": text}; its type makes a suffix."""
    if isinstance(value, Mapping):
        value = value.get("image_url")
    if isinstance(value, Mapping):
        value = value.get("url")
    if not isinstance(value, str) or not value.startswith("data:"):
        raise ValueError(
            f"a file is {shown(value)}; send it as a file in a form, or as text that begins with "
            "data:image/png;base64, (nothing is fetched here)"
        )
    head, _, content = value.partition(",")
    if not head.endswith(";base64"):
        raise ValueError("the picture's data: URL is not in base64: begin it with data:image/png;base64,")
    try:
        subtype = head.removesuffix(";base64").rpartition("/")[2].partition(";")[0].lower()
        suffix = f".{subtype}" if subtype.isalnum() and subtype.isascii() and len(subtype) <= 9 else ""
        return Sent(base64.b64decode(content, validate=True), suffix=suffix)
    except (binascii.Error, ValueError):
        raise ValueError("the picture's data: URL is not in base64: it is damaged") from None
