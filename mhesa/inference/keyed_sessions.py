"""A session for each key: for each node, user or process that the lines of a log are about."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mhesa.errors import InputError
from mhesa.inference.session import Reader
from mhesa.inference.session_database import open_database, state_from_bytes, state_to_bytes
from mhesa.inference.statistics import BITS, Statistic, read_tokens
from mhesa.locks import only_writer_of_file

# SQLite's application_id and user_version of our files.
APPLICATION_ID, VERSION = 0x6D68656B, 1
SCHEMA = """
CREATE TABLE sessions (key BLOB PRIMARY KEY, token INTEGER NOT NULL, state BLOB NOT NULL);
CREATE TABLE notes (name TEXT PRIMARY KEY, value TEXT NOT NULL)
"""
# Keys are kept as digests of this many bytes: a key may be long, and there may be many.
DIGEST_BYTES = 16
# What Python keeps of a session in memory besides its state: measured, after many keys came and went.
BYTES_PER_KEY = 450
# The share of the memory that is SQLite's page cache.
CACHE_SHARE = 16
MEMORY = 256 << 20
BUSY_SECONDS = 1.0
MODEL = "model"


class KeyedSessions:
    """Reads texts that are interleaved, each in its own session, and many of them at once.

    States are kept in memory up to a limit; beyond it those that were not used for the longest time are in an
    SQLite database. With a path the database is a file that survives a restart: what is read becomes part of
    it at `commit`, all of it or nothing, also if the process is killed. Without, it is a temporary file.

    Args:
        reader: the model and its tokenizer.
        memory: bytes that states, keys and the database's cache may take.
        path: file that keeps the sessions; a temporary one if omitted.

    Raises:
        InputError: the file is of another kind, is damaged, belongs to another model, or is in use by another
            process.

    >>> from mhesa import GatedExponentialSmoothingLM
    >>> from mhesa.tokenizers import Bytes
    >>> model = GatedExponentialSmoothingLM(num_tokens=257, dim=8, depth=1, heads=1, dim_mhesa=4)
    >>> with KeyedSessions(Reader(model, Bytes())) as sessions:
    ...     first, second, third = sessions.score([("a", b"one "), ("b", b"two"), ("a", b"more")])
    >>> len(first), len(second), len(third)
    (4, 3, 4)
    """

    def __init__(self, reader: Reader, *, memory: int = MEMORY, path: str | Path | None = None) -> None:
        self.reader = reader
        self._shape = tuple(reader.decoder.initial_state(1)[:, 0].shape)
        self._state_type = reader.decoder.initial_state(1).dtype
        size = 4 * self._shape[0] * self._shape[1] + BYTES_PER_KEY
        slots = (memory - memory // CACHE_SHARE) // size
        if slots < 1:
            raise InputError(f"{memory:,} bytes are too little memory for a session; {2 * size:,} are enough")
        # A slot is a place in these for a state and the last token.
        self._states = torch.empty(slots, *self._shape)
        self._tokens = np.zeros(slots, dtype=np.int64)
        # The slot of each key in memory, the least recently used key first.
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        # Keys whose state differs from the database.
        self._changed: set[bytes] = set()
        self._is_closed = False
        # Whether the database is a file that outlives the process.
        self.is_kept = path is not None
        self._name = str(path) if path is not None else "a temporary file"
        with ExitStack() as opened, self._named_errors():
            if path is not None:
                opened.enter_context(only_writer_of_file(Path(path)))
            self._database = open_database(
                "" if path is None else os.path.realpath(path),
                application=APPLICATION_ID,
                version=VERSION,
                schema=SCHEMA,
                what="a session for each key",
                cache_bytes=memory // CACHE_SHARE,
                timeout=BUSY_SECONDS,
            )
            opened.callback(self._database.close)
            if not self.is_kept:
                self._database.execute("PRAGMA journal_mode = OFF")
            self._check_model()
            self._database.execute("BEGIN")
            self._opened = opened.pop_all()

    def _check_model(self) -> None:
        model = self.reader.fingerprint
        if self.note(MODEL) not in (None, model):
            raise InputError(
                f"{self._name} holds sessions with another model; take the model it was made with"
            )
        self._database.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (MODEL, model))

    def __enter__(self) -> KeyedSessions:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Commit, unless there was an exception, and close."""
        try:
            if error is None and self.is_kept:
                self.commit()
        finally:
            self.close()

    def close(self) -> None:
        """Close the file without what was read since the last `commit`, and let others use it."""
        self._is_closed = True
        self._opened.close()

    @property
    def at_once(self) -> int:
        """How many keys are read together."""
        return min(self.reader.decoder.max_batch, len(self._states))

    def score(self, lines: Iterable[tuple[str, bytes]]) -> list[np.ndarray]:
        """Read lines, given by key and text, in their keys' sessions; measure the surprisal of every token.

        Returns:
            Bits for each token of each line, fp64 `(tokens,)`.
        """
        lines = list(lines)
        ids = self.reader.tokenizer.encode_batch([text for _, text in lines])
        keys = [key for key, _ in lines]
        return [found["bits"] for found in self.score_ids(keys, ids, BITS)]

    def score_ids(
        self, keys: Sequence[str], ids: Sequence[np.ndarray], statistics: Mapping[str, Statistic]
    ) -> list[dict[str, np.ndarray]]:
        """Read the tokens of some lines, `(tokens,)` each, in the sessions of their keys.

        Returns:
            For each line the statistics of its tokens by name, fp64 `(tokens,)` each.
        """
        if self._is_closed:
            raise InputError("these sessions are closed; open them again")
        lines_of: dict[bytes, list[int]] = {}
        for line, key in enumerate(keys):
            if len(ids[line]):
                lines_of.setdefault(_digest(key), []).append(line)
        none = {name: np.zeros(0) for name in statistics}
        found = [none] * len(keys)
        digests = list(lines_of)
        for start in range(0, len(digests), self.at_once):
            group = digests[start : start + self.at_once]
            order = [line for digest in group for line in lines_of[digest]]
            texts = [np.concatenate([ids[line] for line in lines_of[digest]]) for digest in group]
            columns = self._read(group, texts, statistics)
            ends = np.cumsum([len(ids[line]) for line in order])[:-1]
            split = {name: np.split(values, ends) for name, values in columns.items()}
            for place, line in enumerate(order):
                found[line] = {name: parts[place] for name, parts in split.items()}
        return found

    def _read(
        self, digests: list[bytes], texts: list[np.ndarray], statistics: Mapping[str, Statistic]
    ) -> dict[str, np.ndarray]:
        """Read a text in the session of each key; the statistics of all tokens, one text after the other."""
        decoder = self.reader.decoder
        slots = [self._slot(digest) for digest in digests]
        targets = [torch.from_numpy(text.astype(np.int64)) for text in texts]
        last = torch.from_numpy(self._tokens[slots])
        inputs = [torch.cat([last[i : i + 1], ids[:-1]]) for i, ids in enumerate(targets)]
        state = self._states[slots].transpose(0, 1).to(decoder.device, self._state_type).contiguous()
        columns = read_tokens(decoder, inputs, torch.cat(targets), state, statistics)
        self._states[slots] = state.transpose(0, 1).float().cpu()
        self._tokens[slots] = [text[-1] for text in texts]
        self._changed.update(digests)
        return columns

    def _slot(self, digest: bytes) -> int:
        """The slot of a key, whose session is brought into memory."""
        slot = self._slots.pop(digest, None)
        if slot is None:
            token, state = self._stored(digest)
            slot = self._free_slot()
            self._tokens[slot], self._states[slot] = token, state
        self._slots[digest] = slot
        return slot

    def _stored(self, digest: bytes) -> tuple[int, Tensor]:
        """The last token and the state of a key, as the database has them, or those that texts begin with."""
        with self._named_errors():
            query = "SELECT token, state FROM sessions WHERE key = ?"
            row = self._database.execute(query, (digest,)).fetchone()
        if row is None:
            # Every text follows an end-of-text token.
            return self.reader.tokenizer.eos_token_id, torch.zeros(self._shape)
        state = state_from_bytes(row[1], self._shape)
        if state is None or not 0 <= row[0] < self.reader.decoder.num_tokens:
            raise InputError(f"{self._name} is damaged: a session does not fit the model")
        return row[0], state

    def _free_slot(self) -> int:
        if len(self._slots) < len(self._states):
            return len(self._slots)
        oldest = next(iter(self._slots))
        if oldest in self._changed:
            self._write([oldest])
        return self._slots.pop(oldest)

    def _write(self, digests: Sequence[bytes]) -> None:
        """Write sessions to the database, as a part of the transaction that `commit` ends."""
        slots = ((digest, self._slots[digest]) for digest in digests)
        rows = (
            (digest, int(self._tokens[slot]), state_to_bytes(self._states[slot])) for digest, slot in slots
        )
        with self._named_errors():
            self._database.executemany(
                "INSERT INTO sessions VALUES (?, ?, ?)"
                " ON CONFLICT DO UPDATE SET token = excluded.token, state = excluded.state",
                rows,
            )
        self._changed.difference_update(digests)

    def commit(self, notes: Mapping[str, str] | None = None) -> None:
        """Make what was read since the last commit part of the file, all or nothing.

        `notes` are texts by name to keep with it, such as how far a file has been read.

        Raises:
            InputError: the file cannot be written; it stays as it was after the last commit.
        """
        self._write(list(self._changed))
        with self._named_errors():
            self._database.executemany("INSERT OR REPLACE INTO notes VALUES (?, ?)", (notes or {}).items())
            self._database.execute("COMMIT")
            self._database.execute("BEGIN")

    def rollback(self) -> None:
        """Return to the last commit, as if nothing had been read since; for sessions of a file alone."""
        assert self.is_kept
        with self._named_errors():
            self._database.execute("ROLLBACK")
            self._database.execute("BEGIN")
        self._slots.clear()
        self._changed.clear()

    def note(self, name: str) -> str | None:
        """The note of this name; `None` if there is none."""
        with self._named_errors():
            row = self._database.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeError) as error:
            raise InputError(f"cannot keep sessions in {self._name}: {error}") from error


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()
