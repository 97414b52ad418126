"""What long benchmarks share: results in a JSON file that each new one is written to at once, and runs that end early
and are gone on with.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kandinsky.common.writing import atomic_path

Item = TypeVar("Item")


class Kept:
    """Results (`data`: lists, dictionaries, numbers) that `path` has from earlier runs, or else `empty`.

    path: None: they are kept nowhere. minutes: how long items are handed out, from now on.
    """

    def __init__(self, path: Path | None, empty: Any, minutes: float = float("inf")) -> None:
        self.path, self.end = path, time.monotonic() + 60 * minutes
        self.data = json.loads(path.read_text()) if path is not None and path.exists() else empty

    def each(self, items: Sequence[Item]) -> Iterator[Item]:
        """The items, while there is time; when the caller comes for the next one, its results are saved."""
        for done, item in enumerate(items, 1):
            if time.monotonic() > self.end:
                print(f"the time is over: {len(items) - done + 1} are left for another run", flush=True)
                return
            yield item
            self.save()
            print(f"{done}/{len(items)}", flush=True)

    def save(self) -> None:
        if self.path is not None:
            with atomic_path(self.path) as temporary:
                temporary.write_text(json.dumps(self.data, indent=1) + "\n")


def at_least_one(word: str) -> int:
    count = int(word)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{word} is none: give 1 or more")
    return count


def add_arguments(parser: argparse.ArgumentParser, cases: int) -> None:
    """--cases, --minutes and --output."""
    parser.add_argument("--cases", type=at_least_one, default=cases, help="held-out cases (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing later than that")
    parser.add_argument("--output", type=Path, help="a JSON file that keeps the results; what it has is not made again")
