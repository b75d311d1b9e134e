"""Surprisal of text of any length, as it comes, by token, line or document."""

from __future__ import annotations

import heapq
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from mhesa.inference.session import Reader, Session

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
        size: how long it is, in bytes.
        text: its beginning, 1,024 bytes at most.
    """

    source: str
    number: int
    offset: int
    bits: float
    size: int
    text: bytes = field(repr=False)

    @property
    def bits_per_byte(self) -> float:
        """Bits to encode a byte of it."""
        return self.bits / self.size if self.size else 0.0

    def as_dict(self) -> dict[str, str | int | float]:
        """What is known of it, under the names it has in JSON."""
        return {
            "source": self.source,
            "number": self.number,
            "offset": self.offset,
            "bits": round(self.bits, 4),
            "bytes": self.size,
            "bits_per_byte": round(self.bits_per_byte, 4),
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


def pieces_of(chunks: Iterable[bytes]) -> Iterator[list[bytes]]:
    """The lines of a text that comes in chunks, those at hand together; very long ones in parts.

    >>> list(pieces_of([b"one\\ntwo\\nth", b"ree"]))
    [[b'one\\n', b'two\\n'], [b'three']]
    """
    held = b""
    for chunk in chunks:
        held += chunk
        whole = held.rfind(b"\n", len(held) - len(chunk)) + 1
        if whole:
            yield list(io.BytesIO(held[:whole]))
            held = held[whole:]
        while len(held) >= PIECE:
            yield [held[:PIECE]]
            held = held[PIECE:]
    if held:
        yield [held]


def score(reader: Reader, chunks: Iterable[bytes]) -> Iterator[Batch]:
    """Score a text from its start, as it comes, in memory that does not grow with its length.

    Args:
        reader: the model and the tokenizer; no token spans two lines.
        chunks: the text, cut anywhere.
    """
    session, sizes = Session(reader), _sizes(reader)
    for pieces in pieces_of(chunks):
        ids = [reader.tokenizer.encode_bytes(piece) for piece in pieces]
        joined = np.concatenate(ids).astype(np.int64)
        bits = session.score_ids(torch.from_numpy(joined))
        yield Batch(pieces, [len(part) for part in ids], bits, sizes[joined])


def _sizes(reader: Reader) -> np.ndarray:
    """The length of every token, in bytes."""
    decode = reader.tokenizer.decode_bytes
    return np.array([len(decode([index])) for index in range(reader.decoder.num_tokens)])


def by_token(name: str, batches: Iterable[Batch]) -> Iterator[Scored]:
    """Every token of a stream."""
    number, offset = 0, 0
    for batch in batches:
        text, start = b"".join(batch.pieces), 0
        for bits, size in zip(batch.bits.tolist(), batch.sizes.tolist(), strict=True):
            number += 1
            yield Scored(name, number, offset + start, bits, size, text[start : start + size])
            start += size
        offset += len(text)


def by_line(name: str, batches: Iterable[Batch]) -> Iterator[Scored]:
    """Every line of a stream, with its end."""
    number, offset, size, bits, text = 1, 0, 0, 0.0, b""
    for batch in batches:
        sums = np.concatenate([[0.0], np.cumsum(batch.bits, dtype=np.float64)])
        costs = np.diff(sums[np.concatenate([[0], np.cumsum(batch.tokens)])])
        for piece, cost in zip(batch.pieces, costs.tolist(), strict=True):
            size, bits = size + len(piece), bits + cost
            text = text + piece[: SHOWN - len(text)]
            if piece.endswith(b"\n"):
                yield Scored(name, number, offset, bits, size, text)
                number, offset, size, bits, text = number + 1, offset + size, 0, 0.0, b""
    if size:
        yield Scored(name, number, offset, bits, size, text)


def by_document(name: str, batches: Iterable[Batch]) -> Iterator[Scored]:
    """A stream as a whole."""
    size, bits, text = 0, 0.0, b""
    for batch in batches:
        size += sum(map(len, batch.pieces))
        bits += batch.bits.sum(dtype=np.float64).item()
        text = text or b"".join(batch.pieces)[:SHOWN]
    yield Scored(name, 1, 0, bits, size, text)


BY = {"line": by_line, "token": by_token, "document": by_document}


def most_surprising(scored: Iterable[Scored], count: int) -> list[Scored]:
    """The `count` stretches of the most bits, in falling order."""
    return heapq.nlargest(count, scored, key=lambda stretch: stretch.bits)
