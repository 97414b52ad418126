"""Files of prompts, as people and their spreadsheets write them, read into rows.

A .txt file has a prompt a line; a .csv or .tsv file names its columns in the first line, and has commas, semicolons or
tabs between them; a .jsonl file has an object a line; a .yaml file is a list of them. What is wrong is told row by row,
and of many rows the first. From a stream come lines of .txt and of .jsonl, each a row as soon as it is there.
Knows columns and their types; what they mean is for batch.py to say.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kandinsky.common.given import LONGEST_LINE, MISSING, as_number, as_whole, shortened, shown, why_no_file

logger = logging.getLogger(__name__)


COLUMNS = (
    *("prompt", "negative_prompt", "seed", "width", "height", "seconds"),
    *("image", "video", "strength", "mask", "last_image", "loop", "keyframe", "output"),
)
WHOLE_NUMBERS = ("seed", "width", "height")
NUMBERS = ("seconds", "strength")
YES_NO = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
MOST_TOLD = 20  # of the rows that something is wrong with


@dataclass(frozen=True)
class Row:
    """A prompt of the file and what stands beside it; `values` has the columns that are filled in."""

    number: int  # from 1
    line: int  # of the file, where it begins, from 1
    values: Mapping[str, Any]

    def __str__(self) -> str:
        return f"row {self.number} (line {self.line})"


class RowMistakes(ValueError):
    """What is wrong with a file's rows, a line each."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        self.mistakes = [shortened(mistake, LONGEST_LINE) for mistake in first_of(mistakes)]
        super().__init__("\n".join(self.mistakes))


def first_of(lines: Sequence[str]) -> list[str]:
    """The first `MOST_TOLD` of many lines, and one that says how many more there are."""
    more = len(lines) - MOST_TOLD
    return [*lines[:MOST_TOLD], f"... and {more:,} more rows"] if more > 0 else list(lines)


def nearest(name: str, names: Sequence[str]) -> str | None:
    """Of some names the one that is most like another; None where none is."""
    return next(iter(difflib.get_close_matches(name[:100], names, n=1, cutoff=0.75)), None)


STREAM = Path("-")  # in place of a file: standard input


def read_stream(lines: Iterable[bytes]) -> Iterator[Row | str]:
    """Rows of a stream, a prompt or an object of .jsonl a line, each when it is there; or what is wrong with it."""
    number = 0
    for line, content in enumerate(lines, 1):
        if not content.strip():
            continue
        number += 1
        try:
            text = content.decode("utf-8-sig")
            reader = _read_jsonl if text.lstrip().startswith("{") else _read_txt
            [(_, given)] = reader(STREAM, text.strip())
            if isinstance(given, str):
                raise ValueError(given)
            _tell_unknown([name for name in given if name not in COLUMNS], [given], f"line {line}")
            filled = {name: given[name] for name in COLUMNS if given.get(name) not in (None, "")}
            yield Row(number, line, _typed(filled))
        except ValueError as error:  # UnicodeDecodeError is one
            yield f"line {line}: {'not UTF-8' if isinstance(error, UnicodeDecodeError) else error}"


def read_prompts(path: str | Path, others: bool = False) -> list[Row]:
    """The rows of a .txt, .csv, .tsv, .jsonl, .yaml or .yml file.

    Columns are those of `COLUMNS`; others are in the rows as they are where `others` is true, and left out where it is
    not: a line of the log names them then. Raises ValueError for a file
    that cannot be read, and RowMistakes for rows that cannot.
    """
    path = Path(path)
    readers = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl, ".tsv": _read_csv}
    readers |= {".yaml": _read_yaml, ".yml": _read_yaml}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: a file of prompts ends in {', '.join(readers)}")
    if (reason := why_no_file(path)) not in (None, MISSING):  # which the system has its own words for
        raise ValueError(f"can't read {path}: {reason}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a mark in front
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it in that encoding") from None
    except OSError as error:
        raise ValueError(f"can't read {path}: {error.strerror}") from None

    rows: list[Row] = []
    mistakes: list[str] = []
    unknown: dict[str, None] = {}  # a set that keeps the order
    for line, given in readers[path.suffix.lower()](path, text):
        if isinstance(given, str):
            mistakes.append(f"{path}, line {line}: {given}")
            continue
        unknown |= dict.fromkeys(name for name in given if name not in COLUMNS)
        filled = {name: given[name] for name in (given if others else COLUMNS) if given.get(name) not in (None, "")}
        row = Row(len(rows) + 1, line, filled)
        try:
            rows.append(replace(row, values=_typed(filled)))
        except ValueError as error:
            mistakes.append(f"{path}, {row}: {error}")
            rows.append(row)  # the numbers of those that follow stay right
    if mistakes:
        raise RowMistakes(mistakes)
    if not rows:
        raise ValueError(f"{path} has no prompts in it")
    if not others:
        _tell_unknown(list(unknown), [row.values for row in rows], path)
    return rows


def _tell_unknown(unknown: Sequence[str], rows: Sequence[Mapping[str, Any]], what: str | Path) -> None:
    """Columns that nobody asks for, each with the one that may have been meant, of those that are in no row."""
    if unknown:
        missing = [name for name in COLUMNS if not any(name in row for row in rows)]
        names = [f"{name} (did you mean {near}?)" if (near := nearest(name, missing)) else name for name in unknown]
        logger.info("%s: columns that mean nothing here are left out: %s", what, shortened(", ".join(names)))


# Each reader gives the line where a row begins, and its values, or what is wrong with it.


def _read_txt(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    # Not splitlines(): it also splits at characters that people paste into prompts.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _read_csv(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    line = 1
    try:
        delimiter, table, names = _header(path, text)
        while True:
            line = table.line_num + 1
            cells = next(table, None)
            if cells is None:
                return
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) > len(names):
                what = DELIMITERS[delimiter]
                yield line, f"{len(cells)} cells for {len(names)} columns: text with {what} belongs in quotes"
            else:
                yield line, dict(zip(names, map(str.strip, cells), strict=False))
    except csv.Error as error:
        yield line, f"not readable as CSV: {error}"


def _header(path: Path, text: str) -> tuple[str, Any, list[str]]:
    """What stands between the columns of a table, its rows, and its columns' names."""
    tables = {}
    for delimiter in DELIMITERS:
        table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names = [name.strip() for name in next(table, [])]
        tables[delimiter] = names
        if "prompt" not in names:
            continue
        if twice := [name for name in COLUMNS if names.count(name) > 1]:
            raise ValueError(f"{path}: two columns are called {twice[0]}; leave one of them out")
        return delimiter, table, names
    found = shortened(", ".join(tables[","])) or "none"
    raise ValueError(f"{path}: no column is called prompt; the first line names {found}")


def _read_jsonl(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line, object_pairs_hook=_once_each)
        except ValueError as error:  # also for a number of more than 4,300 digits
            yield number, f"not readable as JSON: {error}"
        except RecursionError:
            yield number, "not readable as JSON: it is nested too deeply"
        else:
            yield number, values if isinstance(values, dict) else 'not an object like {"prompt": "..."}'


def _read_yaml(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    import yaml

    try:
        top, values = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError(
            f"{path}: not readable as YAML: {getattr(error, 'problem', error)}, line {mark.line + 1}"
            if mark is not None
            else f"{path}: not readable as YAML: {error}"
        ) from None
    except (RecursionError, ValueError) as error:  # nesting, and dates that are none
        raise ValueError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(values, list):
        raise ValueError(f"{path}: it must be a list, with an entry like - prompt: a cat ... for each")
    for node, entry in zip(top.value, values, strict=True):
        line = node.start_mark.line + 1
        if isinstance(entry, str):
            yield line, {"prompt": entry}
        elif not isinstance(entry, dict):
            yield line, "neither a prompt nor names with values, like prompt: a cat ..."
        else:
            names = [key.value for key, _ in node.value if isinstance(key.value, str)]
            twice = [name for name in COLUMNS if names.count(name) > 1]
            yield line, f"{twice[0]} is there twice" if twice else {str(name): entry[name] for name in entry}


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for name in COLUMNS if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is there twice")
    return dict(pairs)


def _typed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as numbers, whole ones also where a table wrote 7.0 or text; everything else must be text."""
    typed = dict(values)
    for name, value in values.items():
        if name in NUMBERS:
            typed[name] = _number(value)
            if not math.isfinite(typed[name]):
                raise ValueError(f"{name} is {shown(value)}; it must be a number")
        elif name in WHOLE_NUMBERS:
            number = _number(value)
            if not number.is_integer():  # nor are NaN and what is too large for a float
                raise ValueError(f"{name} is {shown(value)}; it must be a whole number")
            whole = as_whole(value)
            typed[name] = int(number) if whole is None else whole
        elif name == "loop":
            word = str(value).lower()
            if word not in YES_NO:
                raise ValueError(f"loop is {shown(value)}; it must be true or false")
            typed[name] = YES_NO[word]
        elif name in COLUMNS and not isinstance(value, str):
            raise ValueError(f"{name} is {shown(value)}; it must be text")
    return typed


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, str) else as_number(value)
    except ValueError:
        return math.nan
