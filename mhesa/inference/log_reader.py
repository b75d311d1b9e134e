"""Reads logs line by line, each line in the session of its key, and remembers how far it has read."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from mhesa.inference.keyed_sessions import KeyedSessions
from mhesa.inference.line_scores import FalseAlarms, LineScores, LineSurprisal
from mhesa.inference.lines import KeyField, KeyPattern, Piece, split_lines
from mhesa.inference.scoring import ScoredPiece, share_by_byte
from mhesa.inference.statistics import BITS

# Leading bytes whose digest identifies a file after rotation.
HEAD_BYTES = 1 << 10
KINDS, ALARMS, POSITION = "kinds", "alarms", "position of "


@dataclass(frozen=True)
class Position:
    """How far a file has been read.

    Args:
        offset: bytes read so far.
        number: number of the next line.
        head: digest of the file's first `head_bytes` bytes.
    """

    offset: int
    number: int
    head: str
    head_bytes: int


class LogReader:
    """Reads logs in sessions, scores their lines, and keeps what a later run needs to go on.

    A file's lines become part of the sessions' file after they have been given out: a run that is killed
    gives its last lines out again, and misses none. A file that has been read before goes on where it ended,
    unless its first bytes have changed. All lines have one session if there is no `find_key`.
    """

    def __init__(
        self,
        sessions: KeyedSessions,
        find_key: KeyPattern | KeyField | None = None,
        scores: LineScores | None = None,
        alarms: FalseAlarms | None = None,
    ) -> None:
        self.sessions, self.find_key = sessions, find_key
        self.scores, self.alarms = scores or LineScores(), alarms
        # Lines whose key was asked for and not found.
        self.without_key = 0
        # Whether the last line that was read has an end.
        self._is_line_whole = True
        # What scores and alarms begin with where the sessions have no note of them.
        self._initial = {name: kept.to_json() for name, kept in self._kept()}
        self._load_scores()

    def read(self, source: str, chunks: Iterable[bytes], name: str | None = None) -> Iterator[LineSurprisal]:
        """Read the lines of the log `source` as they come; its text may be cut anywhere.

        `name` identifies the file in later runs; omitted for a stream, which cannot be read again.

        Raises:
            InputError: the sessions' file cannot be written, or a pattern takes too long.
        """
        yield from mark_alarms(self.scores.read(source, self._pieces(source, chunks, name)), self.alarms)
        if name is not None and self.sessions.is_kept and not self._is_line_whole:
            # The next run reads the line again. Its beginning must not be part of what other files commit.
            self.sessions.rollback()
            self._load_scores()

    def _kept(self) -> Iterator[tuple[str, LineScores | FalseAlarms]]:
        yield KINDS, self.scores
        if self.alarms is not None:
            yield ALARMS, self.alarms

    def _load_scores(self) -> None:
        for name, kept in self._kept():
            kept.load_json(self.sessions.note(name) or self._initial[name])

    def _pieces(self, source: str, chunks: Iterable[bytes], name: str | None) -> Iterator[ScoredPiece]:
        position, chunks = self._resume(chunks, name)
        key: str | None = None
        for pieces in split_lines(chunks, offset=position.offset, number=position.number):
            keyed = []
            for piece in pieces:
                if piece.is_first and self.find_key is not None:
                    key = self.find_key.find(piece.text.rstrip(b"\r\n"), f"{source}, line {piece.number}")
                    self.without_key += key is None
                keyed.append(replace(piece, key=key))
            yield from self._score(keyed)
            # In the middle of a line its key would be lost.
            self._is_line_whole = keyed[-1].is_last
            if self._is_line_whole:
                self._commit(name, position, keyed[-1])

    def _score(self, pieces: list[Piece]) -> Iterator[ScoredPiece]:
        reader = self.sessions.reader
        ids = reader.tokenizer.encode_batch([piece.text for piece in pieces])
        # Lines without a key have a session that no key has.
        keys = ["none" if piece.key is None else f"key {piece.key}" for piece in pieces]
        columns = self.sessions.score_ids(keys, ids, BITS)
        for piece, tokens, found in zip(pieces, ids, columns, strict=True):
            sizes = reader.tokenizer.sizes_in_text(tokens, piece.text)
            shares = share_by_byte(found["bits"], sizes, len(piece.text))
            yield ScoredPiece(piece, shares)

    def _resume(self, chunks: Iterable[bytes], name: str | None) -> tuple[Position, Iterator[bytes]]:
        """Where to go on in a file, and its text from there."""
        stream = iter(chunks)
        if name is None or not self.sessions.is_kept:
            return Position(0, 1, "", 0), stream
        head = b""
        while len(head) < HEAD_BYTES and (chunk := next(stream, b"")):
            head += chunk
        note = self.sessions.note(POSITION + name)
        position = Position(**json.loads(note)) if note else None
        if position is None or position.head != _digest(head[: position.head_bytes]):
            size = min(len(head), HEAD_BYTES)
            position = Position(0, 1, _digest(head[:size]), size)
        return position, _skip(head, stream, position.offset)

    def _commit(self, name: str | None, position: Position, last: Piece) -> None:
        if not self.sessions.is_kept:
            return
        notes = {name: kept.to_json() for name, kept in self._kept()}
        if name is not None:
            now = replace(position, offset=last.offset + len(last.text), number=last.number + 1)
            notes[POSITION + name] = json.dumps(vars(now))
        self.sessions.commit(notes)


def mark_alarms(rows: Iterable[LineSurprisal], alarms: FalseAlarms | None) -> Iterator[LineSurprisal]:
    """Lines, and whether the score of each is above the threshold of those before it."""
    for row in rows:
        yield row if alarms is None else replace(row, alarm=alarms.add(row.score))


def with_context(rows: Iterable[LineSurprisal], lines: int) -> Iterator[LineSurprisal]:
    """Of all lines those with an alarm, and so many `lines` before and after each."""
    before: deque[LineSurprisal] = deque(maxlen=lines)
    after = 0
    for row in rows:
        if row.alarm:
            yield from before
            yield row
            before.clear()
            after = lines
        elif after:
            after -= 1
            yield row
        else:
            before.append(row)


def _digest(head: bytes) -> str:
    return hashlib.sha256(head).hexdigest()


def _skip(head: bytes, stream: Iterator[bytes], size: int) -> Iterator[bytes]:
    """The text without its first bytes."""
    chunk: bytes | None = head
    while chunk is not None:
        if rest := chunk[size:]:
            yield rest
        size -= min(size, len(chunk))
        chunk = next(stream, None)
