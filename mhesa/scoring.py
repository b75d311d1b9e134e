"""Surprisal of text of any length, as it comes, by token, line or document."""

from __future__ import annotations

import heapq
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import IO

import numpy as np
import torch

from mhesa.session import Reader, Session

# Text is read in pieces of no more than this, in bytes; a longer line is read in several.
PIECE = 1 << 16
# Of a scored stretch, so much is kept to be shown, in bytes.
SHOWN = 1 << 10


@dataclass(frozen=True)
class Scored:
    """A stretch of text, and how much of a surprise it was.

    Args:
        source: name of the file it is in.
        number: of the line, the token or the document, from 1.
        offset: where in the source it begins, in bytes.
        bits: surprisal, `-log2` of the probability of all of it after what came before.
        bytes: how long it is.
        text: its beginning, 1,024 bytes at most.
    """

    source: str
    number: int
    offset: int
    bits: float
    bytes: int
    text: bytes = field(repr=False)

    def as_dict(self) -> dict[str, str | int | float]:
        """What is known of it, under the names it has in JSON."""
        return {
            "source": self.source,
            "number": self.number,
            "offset": self.offset,
            "bits": round(self.bits, 4),
            "bytes": self.bytes,
            "bits_per_byte": round(self.bits / self.bytes, 4) if self.bytes else 0.0,
            "text": self.text.decode("utf-8", "replace"),
        }


@dataclass(frozen=True)
class Batch:
    """Some pieces of text in a row, with the surprisal and the length of every token.

    Args:
        pieces: lines, or parts of lines that are too long to hold.
        tokens: how many tokens each piece has.
        bits: of each token, fp32.
        sizes: of each token, in bytes.
    """

    pieces: list[bytes]
    tokens: list[int]
    bits: np.ndarray
    sizes: np.ndarray


def pieces_of(stream: IO[bytes]) -> Iterator[list[bytes]]:
    """The lines of a stream as they come, those at hand together; very long ones in parts.

    >>> list(pieces_of(io.BytesIO(b"one\\ntwo\\nthr")))
    [[b'one\\n', b'two\\n'], [b'thr']]
    """
    read = getattr(stream, "read1", stream.read)
    held = b""
    while data := read(PIECE):
        held += data
        whole = len(held) if len(held) >= PIECE and b"\n" not in held else held.rfind(b"\n") + 1
        if whole:
            yield _lines(held[:whole])
            held = held[whole:]
    if held:
        yield [held]


def _lines(data: bytes) -> list[bytes]:
    """Lines with their ends; unlike for `splitlines`, a carriage return ends none."""
    return list(io.BytesIO(data))


class Scorer:
    """Scores texts with a model.

    Args:
        reader: the model and the tokenizer.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def batches(self, stream: IO[bytes]) -> Iterator[Batch]:
        """Score a stream from its start, in memory that does not grow with its length."""
        session, tokenizer = Session(self.reader), self.reader.tokenizer
        for pieces in pieces_of(stream):
            ids = [tokenizer.encode_bytes(piece) for piece in pieces]
            joined = np.concatenate(ids).astype(np.int64)
            bits = session.score_ids(torch.from_numpy(joined))
            yield Batch(pieces, [len(part) for part in ids], bits, self._sizes[joined])

    def by_token(self, name: str, stream: IO[bytes]) -> Iterator[Scored]:
        """Every token of a stream."""
        number, offset = 0, 0
        for batch in self.batches(stream):
            text = b"".join(batch.pieces)
            start = 0
            for bits, size in zip(batch.bits.tolist(), batch.sizes.tolist(), strict=True):
                number += 1
                yield Scored(name, number, offset + start, bits, size, text[start : start + size])
                start += size
            offset += len(text)

    def by_line(self, name: str, stream: IO[bytes]) -> Iterator[Scored]:
        """Every line of a stream, with its end."""
        number, offset, size, bits, text = 1, 0, 0, 0.0, b""
        for batch in self.batches(stream):
            ends = np.cumsum(batch.tokens)
            sums = np.diff(np.concatenate([[0.0], np.cumsum(batch.bits, dtype=np.float64)])[[0, *ends]])
            for piece, cost in zip(batch.pieces, sums.tolist(), strict=True):
                size, bits = size + len(piece), bits + cost
                text = (text + piece[: SHOWN - len(text)]) if len(text) < SHOWN else text
                if piece.endswith(b"\n"):
                    yield Scored(name, number, offset, bits, size, text)
                    number, offset, size, bits, text = number + 1, offset + size, 0, 0.0, b""
        if size:
            yield Scored(name, number, offset, bits, size, text)

    def by_document(self, name: str, stream: IO[bytes], number: int = 1) -> Iterator[Scored]:
        """A stream as a whole."""
        bits, size, text = 0.0, 0, b""
        for batch in self.batches(stream):
            bits += batch.bits.sum(dtype=np.float64)
            size += int(sum(map(len, batch.pieces)))
            text = text or b"".join(batch.pieces)[:SHOWN]
        yield Scored(name, number, 0, float(bits), size, text)

    @cached_property
    def _sizes(self) -> np.ndarray:
        """The length of every token, in bytes."""
        decoder, tokenizer = self.reader.decoder, self.reader.tokenizer
        return np.array([len(tokenizer.decode_bytes([index])) for index in range(decoder.num_tokens)])


def most_surprising(scored: Iterable[Scored], count: int) -> list[Scored]:
    """The `count` stretches of the most bits, in falling order."""
    return heapq.nlargest(count, scored, key=lambda stretch: stretch.bits)
