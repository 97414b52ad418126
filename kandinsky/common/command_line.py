"""What command lines share: mistakes in one line, streams that show every character, and words that went astray.

Knows arguments and streams; knows no flag's meaning, and nothing that is made.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from kandinsky.common.given import LONGEST_LINE, shortened


def show_every_character() -> None:
    """Have what a terminal or a pipe cannot encode written as an escape like \\u0442, in place of an error.

    A name or a prompt is told only after the output is there: an encoding must not make a run a failed one.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all other mistakes are told. `prog` is what a person types to start it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {shortened(message, LONGEST_LINE)} ({self.prog} --help shows every flag)\n")


class Once(argparse.Action):
    """Keeps a flag's value as usual, and refuses a second one, of which argparse would drop the first in silence."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        given = getattr(namespace, self.dest)
        if given not in (None, self.default):
            parser.error(f"{option} is given twice, {given} and {values}: give one")
        setattr(namespace, self.dest, values)


def without_quotes(words: Sequence[str], strays: Iterable[str], flags: Iterable[str]) -> str | None:
    """What happened where text that a flag takes has spaces and no quotes around it; None where it is something else.

    words: of the command line. strays: those that belong to no flag and are no key=value. flags: that take one word.
    """
    strays, flags = set(strays), set(flags)
    for at, word in enumerate(words):
        flag, joined, value = word.partition("=")
        if flag not in flags:
            continue
        phrase = [value] if joined else []
        for following in words[at + 1 :]:
            if following.startswith("--") or (len(phrase) > 0 and following not in strays):
                break
            phrase.append(following)
        if len(phrase) > 1:
            text = shortened(" ".join(phrase))
            return f'{flag} takes {phrase[0]!r} alone here: text with spaces belongs in quotes, {flag} "{text}"'
    return None
