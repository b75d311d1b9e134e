"""What databases of sessions have in common: opening a file of ours, and states as bytes."""

from __future__ import annotations

import math
import sqlite3

import numpy as np
import torch
from torch import Tensor


def connect(path: str, *, timeout: float) -> sqlite3.Connection:
    """A connection that any thread may use, and whose transactions begin where they are told to.

    Args:
        path: the file; `:memory:` keeps it in memory, and an empty one in a temporary file of SQLite's own.
        timeout: seconds to wait for another program that has locked it.
    """
    return sqlite3.connect(path, timeout=timeout, check_same_thread=False, isolation_level=None)


def open_database(
    path: str, *, application: int, version: int, schema: str, what: str, cache_bytes: int, timeout: float
) -> sqlite3.Connection:
    """Open a database that survives a crash, or make a new one.

    Args:
        path, timeout: see `connect`.
        application: SQLite's application_id of files of this kind.
        version: user_version of the files that can be read.
        schema: the statements that make its tables.
        what: the kind of file, for the error message.
        cache_bytes: size of SQLite's page cache.

    Raises:
        sqlite3.Error: the file is another one, damaged, locked, or cannot be written.
    """
    database = connect(path, timeout=timeout)
    run = database.execute
    try:
        run(f"PRAGMA cache_size = -{max(1, cache_bytes // 1024)}")
        run("BEGIN IMMEDIATE")
        (found,) = run("PRAGMA application_id").fetchone()
        (its_version,) = run("PRAGMA user_version").fetchone()
        (tables,) = run("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables:
            for statement in schema.split(";"):
                run(statement)
            run(f"PRAGMA application_id = {application}")
            run(f"PRAGMA user_version = {version}")
        elif (found, its_version) != (application, version):
            raise sqlite3.DatabaseError(f"it is not a database of {what}")
        run("COMMIT")
        # Only now is it certain that the file is ours and may be changed.
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = NORMAL")
        # Makes the files beside it.
        run("SELECT count(*) FROM sqlite_master").fetchone()
    except BaseException:
        database.close()
        raise
    return database


def state_to_bytes(state: Tensor) -> bytes:
    """A state of any shape as little-endian fp32."""
    data: bytes = state.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes()
    return data


def state_from_bytes(data: bytes, shape: tuple[int, ...]) -> Tensor | None:
    """The state of this shape that `state_to_bytes` wrote; `None` if it is damaged.

    >>> state_from_bytes(state_to_bytes(torch.ones(2, 3)), (2, 3)).sum().item()
    6.0
    """
    if len(data) != 4 * math.prod(shape):
        return None
    values = np.frombuffer(data, dtype="<f4")
    return torch.from_numpy(values.copy()).view(shape) if np.isfinite(values).all() else None
