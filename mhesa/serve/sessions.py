"""Stored sessions: a client continues a text without sending it again."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mhesa.errors import InputError, reason
from mhesa.inference.session import SessionState
from mhesa.inference.session_database import connect, open_database, state_from_bytes, state_to_bytes
from mhesa.locks import only_writer_of_file
from mhesa.serve.logs import log
from mhesa.serve.settings import Limits

# SQLite's application_id and user_version of our files.
APPLICATION_ID, VERSION = 0x6D686573, 1
# SQLite's page cache.
CACHE_BYTES = 16 << 20
# Seconds to wait for another program that has locked the database.
BUSY_SECONDS = 1.0
# What SQLite keeps beside a database in WAL mode.
WAL, SHARED_MEMORY = "-wal", "-shm"
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
class SessionInfo:
    """A stored session; times are seconds since 1970."""

    object: Literal["session"]
    name: str
    position: int
    bytes: int
    created: float
    used: float
    expires: float


class Sessions:
    """Sessions in an SQLite database.

    A saved session survives a crash of the process. Each client sees only its own. Methods may be called
    from any thread. They raise a `SessionError` of status 503 while the database cannot be used, because it
    is locked, full, damaged or not there, and work again when that is over. If its file is deleted, it is
    written again, with all sessions.

    Args:
        path: the database's file; `None` keeps it in memory.
        model: the fingerprint of the model that is served.
        shape: the shape of a state, `(depth, 1, state_size)`.
        limits: the number of a client's sessions, and the time after which an unused one is deleted.
        clock: gives the time in seconds since 1970.

    Raises:
        InputError: the file is not one of ours, cannot be written, or another server uses it.
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
        self._path = None if path is None else os.path.realpath(path)
        # `None` if it has to be opened again.
        self._database: sqlite3.Connection | None = None
        self._is_trouble = False
        self._lock_of_file = ExitStack()
        if path is not None:
            self._lock_of_file.enter_context(only_writer_of_file(path))
        try:
            self._database = self._open()
        except sqlite3.Error as error:
            self.close()
            raise InputError(f"cannot keep sessions in {path}: {error}") from error

    def _open(self) -> sqlite3.Connection:
        database = open_database(
            self._path or ":memory:",
            application=APPLICATION_ID,
            version=VERSION,
            schema=SCHEMA,
            what="mhesa sessions",
            cache_bytes=CACHE_BYTES,
            timeout=BUSY_SECONDS,
        )
        self._files = self._identify_files()
        return database

    def close(self) -> None:
        """Close the file, and let others use it."""
        with self._lock:
            if self._database is not None:
                self._database.close()
            self._lock_of_file.close()

    @contextmanager
    def _use(self) -> Iterator[sqlite3.Connection]:
        """The database, for one thread at a time; what goes wrong with it becomes a `SessionError`."""
        with self._lock:
            try:
                if self._database is None:
                    self._database = self._open()
                elif self._identify_files() != self._files:
                    self._follow_file(self._database)
                yield self._database
                if self._is_trouble:
                    self._is_trouble = False
                    self._database.execute(f"PRAGMA busy_timeout = {round(1000 * BUSY_SECONDS)}")
            except (sqlite3.Error, OSError) as error:
                raise self._trouble(error) from error

    def _trouble(self, error: Exception) -> SessionError:
        log("sessions_unavailable", error=reason(error))
        self._is_trouble = True
        if self._database is not None and self._path is not None:
            if type(error) is sqlite3.DatabaseError:
                # The file is damaged. Read nothing of it from the cache, and look at it anew next time.
                self._database.close()
                self._database = None
            else:
                # Do not let queued calls wait for the same lock again.
                self._database.execute("PRAGMA busy_timeout = 0")
        return SessionError(503, f"sessions cannot be used now: {reason(error)}; try again later")

    def _identify_files(self) -> list[tuple[int, int] | None]:
        """Which files are in the database's places now."""
        return [] if self._path is None else [_identify(self._path), _identify(self._path + WAL)]

    def _follow_file(self, database: sqlite3.Connection) -> None:
        """Go on after someone has deleted, moved or replaced the file of the open database.

        The database can still be read. Another one of ours in its place is taken; otherwise it is written
        there again.
        """
        assert self._path is not None
        before, (file, wal) = self._files, self._identify_files()
        copy = None
        if file is None or file == before[0]:
            copy = f"{self._path}.copy"
            Path(copy).unlink(missing_ok=True)
            with closing(connect(copy, timeout=BUSY_SECONDS)) as target:
                database.backup(target)
        elif not _is_ours(self._path):
            raise SessionError(503, "sessions cannot be used now: another file is in the place of theirs")
        if wal is not None and wal == before[1]:
            # It belongs to the file that was here before: SQLite would write it into the new one.
            for suffix in (WAL, SHARED_MEMORY):
                Path(self._path + suffix).unlink(missing_ok=True)
        if copy is not None:
            os.replace(copy, self._path)
        database.close()
        self._database = None
        log("sessions_reopened", written=copy is not None)
        raise SessionError(503, "the file of sessions was deleted or replaced; it is open again, try again")

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
        state = state_from_bytes(data, self.shape)
        if state is None:
            raise SessionError(409, f"session {name} is damaged; delete it")
        return SessionState(state, token, position)

    def save(self, client: str, name: str, stored: SessionState) -> None:
        """Store a session; it replaces one of the same name.

        Raises:
            SessionError: the client has too many sessions.
        """
        now = self.clock()
        data = state_to_bytes(stored.state)
        with self._use() as database:
            self._make_room(database, client, name)
            database.execute(
                "INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET model ="
                " excluded.model, position = excluded.position, token = excluded.token,"
                " state = excluded.state, used = excluded.used",
                (client, name, self.model, stored.position, stored.token, data, now, now),
            )

    def fork(self, client: str, name: str, new: str) -> SessionInfo:
        """Copy a session under a new name; returns what is known of it.

        Raises:
            SessionError: there is no such session, or the new one exists, or there are too many.
        """
        now = self.clock()
        with self._use() as database:
            self._make_room(database, client, new)
            try:
                done = database.execute(
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
        with self._use() as database:
            return database.execute(query, (client, name)).rowcount > 0

    def page(self, client: str, after: str = "", limit: int = 100) -> list[SessionInfo]:
        """A client's sessions whose names come after `after`, in the order of their names."""
        return self._listed("client = ? AND name > ? AND used > ?", (client, after, self._oldest()), limit)

    def get(self, client: str, name: str) -> SessionInfo | None:
        """What is known of one session; `None` if there is none of that name."""
        rows = self._listed("client = ? AND name = ? AND used > ?", (client, name, self._oldest()), 1)
        return rows[0] if rows else None

    def expire(self) -> int:
        """Delete sessions that were not used for `idle_seconds`; returns how many."""
        with self._use() as database:
            return database.execute("DELETE FROM sessions WHERE used <= ?", (self._oldest(),)).rowcount

    def size(self) -> tuple[int, int]:
        """The number of sessions and the bytes of their states, of all clients."""
        return self._one("SELECT count(*), ifnull(sum(length(state)), 0) FROM sessions", ()) or (0, 0)

    def _oldest(self) -> float:
        return self.clock() - self.limits.idle_seconds

    def _one(self, query: str, values: tuple[object, ...]) -> tuple | None:  # type: ignore[type-arg]
        with self._use() as database:
            return database.execute(query, values).fetchone()

    def _listed(self, where: str, values: tuple[object, ...], limit: int) -> list[SessionInfo]:
        columns = "name, position, length(state), created, used"
        query = f"SELECT {columns} FROM sessions WHERE {where} ORDER BY name LIMIT ?"
        with self._use() as database:
            rows = database.execute(query, (*values, limit)).fetchall()
        return [
            SessionInfo("session", name, position, size, created, used, used + self.limits.idle_seconds)
            for name, position, size, created, used in rows
        ]

    def _make_room(self, database: sqlite3.Connection, client: str, name: str) -> None:
        """Delete a session of this name that has expired; raise `SessionError` if a new one is too many."""
        run, where = database.execute, "FROM sessions WHERE client = ? AND name = ?"
        run(f"DELETE {where} AND used <= ?", (client, name, self._oldest()))
        if run(f"SELECT 1 {where}", (client, name)).fetchone():
            return
        (count,) = run("SELECT count(*) FROM sessions WHERE client = ?", (client,)).fetchone()
        if count >= self.limits.sessions:
            raise SessionError(429, f"there are {count} sessions already; delete some")


def _is_ours(path: str) -> bool:
    """Whether a file begins as a database of sessions; only reads it (https://sqlite.org/fileformat.html)."""
    with open(path, "rb") as file:
        head = file.read(100)
    values = {60: VERSION, 68: APPLICATION_ID}
    return head.startswith(b"SQLite format 3\0") and all(
        head[place : place + 4] == value.to_bytes(4, "big") for place, value in values.items()
    )


def _identify(path: str) -> tuple[int, int] | None:
    """The file at `path`, by its device and number; `None` if there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
