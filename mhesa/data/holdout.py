"""Holding out: which part of a corpus is kept from training, decided piece by piece."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mhesa.data.parallel import batches, ordered, threads
from mhesa.errors import InputError

LARGEST_PIECE = 1 << 16
SMALLEST_PIECE = 1 << 10
RANKED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Piece:
    """A stretch of one document.

    Args:
        data: its bytes.
        document: which document of the corpus it is from.
        starts: whether it begins its document, or follows what is on the other side.
        held_out: whether it is kept from training.
        rank: a number in [0, 1) by which pieces are picked.
    """

    data: bytes
    document: int
    starts: bool
    held_out: bool
    rank: float


@dataclass(frozen=True)
class Holdout:
    """Which part of a corpus is kept from training.

    `content:F` cuts every document into pieces at line ends and holds out those whose hash falls in the
    first `F` of its range: the same text is held out whatever its file is called, and equal pieces fall
    on the same side. `tail:F` holds out the last `F` of the corpus.
    """

    method: str
    fraction: float

    @classmethod
    def parse(cls, text: str) -> Holdout:
        """Read `content:0.05` or `tail:0.1`.

        >>> Holdout.parse("tail:0.1")
        Holdout(method='tail', fraction=0.1)
        """
        method, _, fraction = text.partition(":")
        try:
            holdout = cls(method, float(fraction))
        except ValueError:
            holdout = cls(method, 0.0)
        if holdout.method not in ("content", "tail") or not 0 < holdout.fraction < 1:
            raise InputError(
                f"holdout must be content:F or tail:F with F between 0 and 1, as in tail:0.1, not {text}"
            )
        return holdout

    def split(self, documents: Iterable[Iterable[bytes]], total: int) -> Iterator[Piece]:
        """Cut documents into pieces and say of each which side it is on.

        Args:
            documents: each one its bytes in chunks of any size, used up one after the other.
            total: bytes of all documents; for `content` an estimate will do.
        """
        size = min(max(total // 256, SMALLEST_PIECE), LARGEST_PIECE)
        left = int(total * (1 - self.fraction))
        pieces = ((index, data) for index, document in enumerate(documents) for data in cut(document, size))
        last, before = -1, False
        for index, data, rank in _ranked(pieces):
            if self.method == "content":
                sides = [(data, rank <= self.fraction)]
            else:
                sides = [(data[: max(left, 0)], False), (data[max(left, 0) :], True)]
            left -= len(data)
            for part, held_out in sides:
                if part:
                    starts = index != last or held_out is not before
                    yield Piece(part, index, starts, held_out, rank)
                    last, before = index, held_out


def _ranked(pieces: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes, float]]:
    """Pieces with their ranks, which are found on every core."""

    def rank(batch: list[tuple[int, bytes]]) -> list[tuple[int, bytes, float]]:
        return [(index, data, content_rank(data)) for index, data in batch]

    with threads() as pool:
        for batch in ordered(pool, rank, batches(pieces, lambda piece: len(piece[1]), RANKED_AT_ONCE)):
            yield from batch


def cut(chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    r"""Cut into pieces of about `size` bytes that end with a line, if one ends within twice the size.

    >>> list(cut([b"one t", b"wo\nend"], size=4))
    [b'one two\n', b'end']
    """
    held = b""
    for chunk in chunks:
        held += chunk
        start = 0
        # The line's end may lie as far as this.
        while len(held) - start > 2 * size:
            end = _end(held, start, size)
            yield held[start:end]
            start = end
        held = held[start:]
    start = 0
    while start < len(held):
        end = _end(held, start, size)
        yield held[start:end]
        start = end


def _end(data: bytes, start: int, size: int) -> int:
    line_end = data.find(b"\n", start + size - 1, start + 2 * size)
    if line_end >= 0:
        return line_end + 1
    end = min(start + size, len(data))
    if end < len(data):
        # Not within a character, for tokenizers that read text.
        while end > start + size - 3 and data[end] & 0xC0 == 0x80:
            end -= 1
    return end if end > start else min(start + size, len(data))


def content_rank(data: bytes) -> float:
    """A number in [0, 1) that depends on the content alone."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") / 2**64
