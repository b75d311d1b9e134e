"""Surprisal of text of any length, as it arrives, by token, line or document."""

from __future__ import annotations

import heapq
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from mhesa.inference.session import Reader, Session

# The longest piece of text that is scored at once, in bytes; a longer line is split.
MAX_PIECE = 1 << 16
# Bytes of a scored span's text that are kept.
MAX_TEXT = 1 << 10


@dataclass(frozen=True)
class Scored:
    """A span of text (a token, a line or a document) and its surprisal.

    Args:
        source: the file's name.
        number: of the token, line or document in the source, from 1.
        offset: of its first byte in the source.
        bits: surprisal, `-log2` of its probability given the text before it.
        size: length in bytes.
        text: its beginning, at most 1,024 bytes.
    """

    source: str
    number: int
    offset: int
    bits: float
    size: int
    text: bytes = field(repr=False)

    @property
    def bits_per_byte(self) -> float:
        """Surprisal in bits, divided by the length in bytes."""
        return self.bits / self.size if self.size else 0.0

    def as_dict(self) -> dict[str, str | int | float]:
        """The span by the names it has in JSON."""
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
    """Consecutive pieces of a text, with the surprisal and the length of every token.

    Args:
        pieces: lines, or parts of lines that are longer than `MAX_PIECE`.
        tokens: the number of tokens of each piece.
        bits: surprisal of each token, float32 `(tokens,)`.
        sizes: length of each token in bytes, int64 `(tokens,)`.
    """

    pieces: list[bytes]
    tokens: list[int]
    bits: np.ndarray
    sizes: np.ndarray


def pieces_of(chunks: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Lists of the lines that each chunk completes; a line longer than `MAX_PIECE` is split.

    >>> list(pieces_of([b"one\\ntwo\\nth", b"ree"]))
    [[b'one\\n', b'two\\n'], [b'three']]
    """
    buffered = b""
    for chunk in chunks:
        buffered += chunk
        complete = buffered.rfind(b"\n", len(buffered) - len(chunk)) + 1
        if complete:
            yield list(io.BytesIO(buffered[:complete]))
            buffered = buffered[complete:]
        while len(buffered) >= MAX_PIECE:
            yield [buffered[:MAX_PIECE]]
            buffered = buffered[MAX_PIECE:]
    if buffered:
        yield [buffered]


def score(reader: Reader, chunks: Iterable[bytes]) -> Iterator[Batch]:
    """Score a text from its start, as it arrives, in constant memory.

    Each line is tokenised by itself, so that no token spans two lines.

    Args:
        reader: the model and its tokenizer.
        chunks: the text, split anywhere.
    """
    session, sizes = Session(reader), _sizes(reader)
    for pieces in pieces_of(chunks):
        ids = [reader.tokenizer.encode_bytes(piece) for piece in pieces]
        joined = np.concatenate(ids).astype(np.int64)
        bits = session.score_ids(torch.from_numpy(joined))
        yield Batch(pieces, [len(part) for part in ids], bits, sizes[joined])


def _sizes(reader: Reader) -> np.ndarray:
    """The length of every token of the vocabulary in bytes, int64 `(num_tokens,)`."""
    decode = reader.tokenizer.decode_bytes
    return np.array([len(decode([index])) for index in range(reader.decoder.num_tokens)])


def by_token(name: str, batches: Iterable[Batch]) -> Iterator[Scored]:
    """Every token of a text."""
    number, offset = 0, 0
    for batch in batches:
        text, start = b"".join(batch.pieces), 0
        for bits, size in zip(batch.bits.tolist(), batch.sizes.tolist(), strict=True):
            number += 1
            yield Scored(name, number, offset + start, bits, size, text[start : start + size])
            start += size
        offset += len(text)


def by_line(name: str, batches: Iterable[Batch]) -> Iterator[Scored]:
    """Every line of a text, including its newline."""
    number, offset, size, bits, text = 1, 0, 0, 0.0, b""
    for batch in batches:
        sums = np.concatenate([[0.0], np.cumsum(batch.bits, dtype=np.float64)])
        costs = np.diff(sums[np.concatenate([[0], np.cumsum(batch.tokens)])])
        for piece, cost in zip(batch.pieces, costs.tolist(), strict=True):
            size, bits = size + len(piece), bits + cost
            text = text + piece[: MAX_TEXT - len(text)]
            if piece.endswith(b"\n"):
                yield Scored(name, number, offset, bits, size, text)
                number, offset, size, bits, text = number + 1, offset + size, 0, 0.0, b""
    if size:
        yield Scored(name, number, offset, bits, size, text)


def by_document(name: str, batches: Iterable[Batch]) -> Iterator[Scored]:
    """A text as a whole."""
    size, bits, text = 0, 0.0, b""
    for batch in batches:
        size += sum(map(len, batch.pieces))
        bits += batch.bits.sum(dtype=np.float64).item()
        text = text or b"".join(batch.pieces)[:MAX_TEXT]
    yield Scored(name, 1, 0, bits, size, text)


BY = {"line": by_line, "token": by_token, "document": by_document}


def most_surprising(scored: Iterable[Scored], count: int) -> list[Scored]:
    """The `count` spans of the highest surprisal, the highest first."""
    return heapq.nlargest(count, scored, key=lambda span: span.bits)
