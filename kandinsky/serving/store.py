"""Jobs as rows of an SQLite file beside the outputs: what was asked for, and what became of it.

A row is written when a job is taken, when it begins, every step, and when it ends; the write-ahead log makes each of
these whole, whenever the process is killed. Knows rows and files; knows no pipelines and no clients' manners.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kandinsky.outputs.media import IMAGE_SUFFIX, VIDEO_SUFFIX

State = Literal["queued", "running", "done", "failed", "cancelled"]
STATES = ("queued", "running", "done", "failed", "cancelled")
ENDED = ("done", "failed", "cancelled")
DATABASE = "jobs.sqlite"
VERSION = 2  # of the table; one of version 1 gets the column that it lacks
TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    client TEXT NOT NULL,
    model TEXT NOT NULL,
    request TEXT NOT NULL,
    magcache INTEGER NOT NULL,
    loras TEXT NOT NULL,
    picture TEXT,
    extras TEXT NOT NULL DEFAULT '{}',
    remix_of TEXT,
    state TEXT NOT NULL,
    step INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    created REAL NOT NULL,
    started REAL,
    ended REAL,
    seconds TEXT NOT NULL,
    output TEXT,
    error TEXT,
    code TEXT
);
CREATE INDEX IF NOT EXISTS by_state ON jobs (state, number);
"""
AS_JSON = ("request", "loras", "extras", "seconds")


@dataclass(frozen=True)
class Job:
    """A row. `request` is `dataclasses.asdict` of one with one sample; times are seconds since 1970."""

    id: str
    kind: Literal["video", "image"]  # the API's object that it is
    client: str
    model: str
    request: dict[str, Any]
    created: float
    magcache: bool = False
    loras: list[list[Any]] = field(default_factory=list)  # name, scale
    picture: str | None = None  # what its client calls the picture that it begins with
    extras: dict[str, Any] = field(default_factory=dict)  # `Extras.as_dict` (directed.py)
    remix_of: str | None = None
    state: State = "queued"
    step: int = 0
    attempts: int = 0  # how often it was begun
    started: float | None = None
    ended: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    output: str | None = None  # the file's name in the folder
    error: str | None = None
    code: str | None = None  # of the error, for programs
    number: int = 0

    @property
    def num_steps(self) -> int:
        return sum(int(one["num_steps"]) for one in [self.request, *self.extras.get("further", [])])

    @property
    def file_name(self) -> str:
        return self.id + (IMAGE_SUFFIX if self.request["num_frames"] == 1 else VIDEO_SUFFIX)


COLUMNS = tuple(one.name for one in dataclasses.fields(Job))


class Store:
    """The rows of one folder. Threads may share it."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder and the file where there are none. Raises ValueError for a file of another version."""
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._database = sqlite3.connect(folder / DATABASE, check_same_thread=False, isolation_level=None)
        self._database.row_factory = sqlite3.Row
        try:
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            if version not in (0, 1, VERSION):
                raise ValueError(f"{folder / DATABASE} is of another version of this software: name another folder")
            self._database.executescript(TABLE)
            columns = {row["name"] for row in self._database.execute("PRAGMA table_info(jobs)")}
            if "extras" not in columns:
                self._database.execute("ALTER TABLE jobs ADD COLUMN extras TEXT NOT NULL DEFAULT '{}'")
            self._database.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{folder / DATABASE} can't be used ({error}): name another folder") from None

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def add(self, jobs: Sequence[Job]) -> None:
        """All of them, or none."""
        names = [name for name in COLUMNS if name != "number"]
        command = f"INSERT INTO jobs ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany(command, [[_stored(name, getattr(job, name)) for name in names] for job in jobs])

    def update(self, job_id: str, **values: Any) -> None:
        assert set(values) <= set(COLUMNS), values
        sets = ", ".join(f"{name} = ?" for name in values)
        stored = [_stored(name, value) for name, value in values.items()]
        with self._lock:
            self._database.execute(f"UPDATE jobs SET {sets} WHERE id = ?", [*stored, job_id])

    def remove(self, job_id: str) -> None:
        with self._lock:
            self._database.execute("DELETE FROM jobs WHERE id = ?", [job_id])

    def get(self, job_id: str) -> Job | None:
        return next(iter(self._select("WHERE id = ?", [job_id])), None)

    def in_state(self, state: State) -> list[Job]:
        """In the order in which they came."""
        return self._select("WHERE state = ? ORDER BY number", [state])

    def waiting(self) -> list[tuple[str, str]]:
        """Id and client of the jobs that wait: first those that were begun before, then in the order they came."""
        with self._lock:
            rows = self._database.execute(
                "SELECT id, client FROM jobs WHERE state = 'queued' ORDER BY attempts = 0, number"
            )
            return [(row["id"], row["client"]) for row in rows.fetchall()]

    def counts(self) -> dict[str, int]:
        """How many jobs are in which state."""
        with self._lock:
            rows = self._database.execute("SELECT state, COUNT(*) AS count FROM jobs GROUP BY state").fetchall()
        return {**dict.fromkeys(STATES, 0), **{row["state"]: row["count"] for row in rows}}

    def page(
        self,
        limit: int,
        *,
        after: str | None = None,
        newest_first: bool = True,
        kinds: Iterable[str] = (),
        states: Iterable[str] = (),
    ) -> list[Job]:
        """Up to `limit` jobs behind the job `after`. Raises ValueError where there is no such job."""
        conditions, values = ["1"], list[Any]()
        if after is not None:
            other = self.get(after)
            if other is None:
                raise ValueError("there is no job of the id that is given as after")
            conditions.append(f"number {'<' if newest_first else '>'} ?")
            values.append(other.number)
        for name, among in (("kind", list(kinds)), ("state", list(states))):
            if among:
                conditions.append(f"{name} IN ({', '.join('?' * len(among))})")
                values += among
        order = "DESC" if newest_first else "ASC"
        return self._select(f"WHERE {' AND '.join(conditions)} ORDER BY number {order} LIMIT ?", [*values, limit])

    def last_done(self, model: str) -> Job | None:
        found = self._select("WHERE model = ? AND state = 'done' ORDER BY ended DESC LIMIT 1", [model])
        return found[0] if found else None

    def _select(self, rest: str, values: Sequence[Any]) -> list[Job]:
        with self._lock:
            rows = self._database.execute(f"SELECT * FROM jobs {rest}", values).fetchall()
        return [_job(row) for row in rows]


def _stored(name: str, value: Any) -> Any:
    return json.dumps(value) if name in AS_JSON else value


def _job(row: sqlite3.Row) -> Job:
    values = {name: json.loads(row[name]) if name in AS_JSON else row[name] for name in COLUMNS}
    return Job(**{**values, "magcache": bool(values["magcache"])})
