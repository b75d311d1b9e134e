"""Stored sessions: a client continues a text without sending it again."""

from __future__ import annotations

import math
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mhesa.errors import InputError
from mhesa.inference.session import SessionState
from mhesa.serve.settings import Limits

# SQLite's application_id and user_version of our files.
APPLICATION_ID, VERSION = 0x6D686573, 1
# SQLite's page cache.
CACHE_KIB = 16 * 1024
SCHEMA = """
CREATE TABLE sessions (
    client TEXT NOT NULL, name TEXT NOT NULL, model TEXT NOT NULL, position INTEGER NOT NULL,
    token INTEGER NOT NULL, state BLOB NOT NULL, created REAL NOT NULL, used REAL NOT NULL,
    PRIMARY KEY (client, name)
);
CREATE INDEX used ON sessions (used);
"""


class SessionError(Exception):
    """A session cannot be used; `status` is the HTTP status of the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class SessionRecord:
    """What a list shows of a session; times are seconds since 1970."""

    name: str
    position: int
    bytes: int
    created: float
    used: float
    expires: float


class Sessions:
    """Sessions in an SQLite database.

    A saved session survives a crash of the process. Each client sees only its own. Methods may be called
    from any thread.

    Args:
        path: the database's file; `None` keeps it in memory.
        model: the fingerprint of the model that is served.
        shape: the shape of a state, `(depth, 1, state_size)`.
        limits: the number of a client's sessions, and the time after which an unused one is deleted.
        clock: gives the time in seconds since 1970.

    Raises:
        InputError: the file is not one of ours, or cannot be written.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        model: str,
        shape: tuple[int, ...],
        limits: Limits,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.model, self.shape, self.limits, self.clock = model, shape, limits, clock
        self._lock = threading.Lock()
        try:
            self._database = sqlite3.connect(
                ":memory:" if path is None else path, check_same_thread=False, isolation_level=None
            )
            self._open()
        except sqlite3.Error as error:
            raise InputError(f"cannot keep sessions in {path}: {error}") from error

    def _open(self) -> None:
        run = self._database.execute
        run(f"PRAGMA cache_size = -{CACHE_KIB}")
        run("BEGIN IMMEDIATE")
        (application,) = run("PRAGMA application_id").fetchone()
        (version,) = run("PRAGMA user_version").fetchone()
        (tables,) = run("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables:
            for statement in SCHEMA.split(";"):
                run(statement)
            run(f"PRAGMA application_id = {APPLICATION_ID}")
            run(f"PRAGMA user_version = {VERSION}")
        elif (application, version) != (APPLICATION_ID, VERSION):
            raise sqlite3.DatabaseError("it is not a database of mhesa sessions")
        run("COMMIT")
        # Only now is it certain that the file is ours and may be changed.
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = NORMAL")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    def load(self, client: str, name: str) -> SessionState | None:
        """A client's session; `None` if there is none of that name.

        Raises:
            SessionError: the session belongs to another model, or is damaged.
        """
        row = self._one(
            "SELECT model, state, token, position FROM sessions WHERE client = ? AND name = ? AND used > ?",
            (client, name, self._oldest()),
        )
        if row is None:
            return None
        model, data, token, position = row
        if model != self.model:
            raise SessionError(
                409, f"session {name} belongs to another model; delete it or take another name"
            )
        whole = len(data) == 4 * math.prod(self.shape)
        values = np.frombuffer(data, dtype="<f4") if whole else np.array([math.nan])
        if not np.isfinite(values).all():
            raise SessionError(409, f"session {name} is damaged; delete it")
        return SessionState(torch.from_numpy(values.copy()).view(self.shape), token, position)

    def save(self, client: str, name: str, stored: SessionState) -> None:
        """Store a session; it replaces one of the same name.

        Raises:
            SessionError: the client has too many sessions.
        """
        now = self.clock()
        data = stored.state.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes()
        with self._lock:
            self._make_room(client, name)
            self._database.execute(
                "INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET model ="
                " excluded.model, position = excluded.position, token = excluded.token,"
                " state = excluded.state, used = excluded.used",
                (client, name, self.model, stored.position, stored.token, data, now, now),
            )

    def fork(self, client: str, name: str, new: str) -> SessionRecord:
        """Copy a session under a new name; returns the copy's record.

        Raises:
            SessionError: there is no such session, or the new one exists, or there are too many.
        """
        now = self.clock()
        with self._lock:
            self._make_room(client, new)
            try:
                done = self._database.execute(
                    "INSERT INTO sessions SELECT client, ?, model, position, token, state, ?, ?"
                    " FROM sessions WHERE client = ? AND name = ? AND used > ?",
                    (new, now, now, client, name, self._oldest()),
                )
            except sqlite3.IntegrityError as error:
                raise SessionError(409, f"session {new} exists already") from error
        if not done.rowcount:
            raise SessionError(404, f"there is no session {name}")
        copy = self.get(client, new)
        assert copy is not None
        return copy

    def delete(self, client: str, name: str) -> bool:
        """Delete a session; returns whether there was one."""
        query = "DELETE FROM sessions WHERE client = ? AND name = ?"
        with self._lock:
            return self._database.execute(query, (client, name)).rowcount > 0

    def page(self, client: str, after: str = "", limit: int = 100) -> list[SessionRecord]:
        """A client's sessions whose names come after `after`, in the order of their names."""
        return self._listed("client = ? AND name > ? AND used > ?", (client, after, self._oldest()), limit)

    def get(self, client: str, name: str) -> SessionRecord | None:
        """The record of one session."""
        rows = self._listed("client = ? AND name = ? AND used > ?", (client, name, self._oldest()), 1)
        return rows[0] if rows else None

    def expire(self) -> int:
        """Delete sessions that were not used for `idle_seconds`; returns how many."""
        with self._lock:
            return self._database.execute("DELETE FROM sessions WHERE used <= ?", (self._oldest(),)).rowcount

    def size(self) -> tuple[int, int]:
        """The number of sessions and the bytes of their states, of all clients."""
        return self._one("SELECT count(*), ifnull(sum(length(state)), 0) FROM sessions", ()) or (0, 0)

    def _oldest(self) -> float:
        return self.clock() - self.limits.idle_seconds

    def _one(self, query: str, values: tuple[object, ...]) -> tuple | None:  # type: ignore[type-arg]
        with self._lock:
            return self._database.execute(query, values).fetchone()

    def _listed(self, where: str, values: tuple[object, ...], limit: int) -> list[SessionRecord]:
        columns = "name, position, length(state), created, used"
        query = f"SELECT {columns} FROM sessions WHERE {where} ORDER BY name LIMIT ?"
        with self._lock:
            rows = self._database.execute(query, (*values, limit)).fetchall()
        return [
            SessionRecord(name, position, size, created, used, used + self.limits.idle_seconds)
            for name, position, size, created, used in rows
        ]

    def _make_room(self, client: str, name: str) -> None:
        """Delete a session of this name that has expired; raise `SessionError` if a new one is too many."""
        run, where = self._database.execute, "FROM sessions WHERE client = ? AND name = ?"
        run(f"DELETE {where} AND used <= ?", (client, name, self._oldest()))
        if run(f"SELECT 1 {where}", (client, name)).fetchone():
            return
        (count,) = run("SELECT count(*) FROM sessions WHERE client = ?", (client,)).fetchone()
        if count >= self.limits.sessions:
            raise SessionError(429, f"there are {count} sessions already; delete some")
