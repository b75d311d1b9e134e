"""Holding out: the part of a corpus that is kept from training, to measure a model on."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from mhesa.data.parallel import batch_by_size, map_ordered
from mhesa.errors import InputError
from mhesa.tokenizers.stream import character_start

LARGEST_PIECE = 1 << 16
SMALLEST_PIECE = 1 << 10
HASH_BATCH_BYTES = 1 << 20
# At most this many different texts are followed to find those that repeat.
MOST_COUNTERS = 4096


@dataclass(frozen=True)
class Piece:
    """A part of a document, held out or trained on as a whole.

    Args:
        data: bytes of the piece.
        document: index of its document in the corpus.
        starts: whether it begins a stretch of its document: the start, or where `held_out` changes.
        held_out: whether it is kept from training.
        rank: a number in [0, 1) that depends on its content alone.
    """

    data: bytes
    document: int
    starts: bool
    held_out: bool
    rank: float


@dataclass(frozen=True)
class Selection:
    """Which pieces `content:F` holds out.

    Args:
        threshold: pieces of a rank up to this are held out, except texts that repeat a lot.
        repeated: for each text that repeats a lot, by its rank, the fraction of its copies that is held out.
    """

    threshold: float
    repeated: Mapping[float, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Holdout:
    """The rule by which a part of a corpus is kept from training.

    `tail:F` holds out the last `F` of the corpus, a number between 0 and 1.

    `content:F` cuts documents into pieces at line ends and holds out pieces by a hash of their content, about
    `F` of the corpus and at least one piece. So the same text is held out whatever its file is called, and
    equal pieces are held out together or not at all.

    A text is said to repeat a lot if its copies make up more than half of `F`. All of its copies are trained
    on, and more of the other text is held out instead, at most half of it. Where that gives less than half of
    `F`, texts that repeat a lot are held out as a whole, as long as no more than twice `F` is held out. Where
    that is not enough either, nearly all of the corpus is a few texts over and over: then `F` of the copies
    of each is held out, and the model is measured on text that it was trained on.
    """

    method: str
    fraction: float

    @classmethod
    def parse(cls, text: str) -> Holdout:
        """Read `content:0.05` or `tail:0.1`.

        Raises:
            InputError: it is neither.

        >>> Holdout.parse("tail:0.1")
        Holdout(method='tail', fraction=0.1)
        """
        method, _, fraction = text.partition(":")
        try:
            holdout = cls(method, float(fraction))
        except ValueError:
            holdout = cls(method, 0.0)
        if holdout.method not in ("content", "tail") or not 1e-9 <= holdout.fraction < 1:
            raise InputError(
                f"holdout must be content:F or tail:F with F between 1e-9 and 1, as in tail:0.1, not {text}"
            )
        return holdout

    def split(
        self, documents: Iterable[Iterable[bytes]], total: int, selection: Selection | None = None
    ) -> Iterator[Piece]:
        """Cut documents into pieces and decide for each whether it is held out.

        Args:
            documents: documents, each as its bytes in chunks of any size, which are used up in order.
            total: bytes of all documents; for `content` an estimate will do.
            selection: which pieces are held out by `content`; those of low rank if omitted.
        """
        size = min(max(total // 256, SMALLEST_PIECE), LARGEST_PIECE)
        pieces = ((index, data) for index, document in enumerate(documents) for data in cut(document, size))
        if self.method == "tail":
            sides = _split_tail(_with_ranks(pieces), int(total * (1 - self.fraction)))
        else:
            sides = _split_by_content(_with_ranks(pieces), selection or Selection(self.fraction))
        last = (-1, False)
        for index, data, rank, held_out in sides:
            yield Piece(data, index, (index, held_out) != last, held_out, rank)
            last = (index, held_out)


class PieceCounter:
    """Checks the fraction that a selection holds out, and finds a better selection if it is far off.

    Texts that repeat a lot are found in bounded memory by the counters of Misra and Gries (1982,
    https://doi.org/10.1016/0167-6423(82)90012-0): a text that makes up more than `1 / capacity` of the corpus
    keeps a counter, which is too low by at most that part of the corpus.

    Args:
        holdout: a rule by content.
        selection: the selection that decides the pieces to come.
    """

    def __init__(self, holdout: Holdout, selection: Selection) -> None:
        self.fraction = holdout.fraction
        self.selection = selection
        self.capacity = min(math.ceil(8 / holdout.fraction), MOST_COUNTERS)
        self.total = self.held_out = 0
        self.lowest_rank = 1.0
        self._bytes: Counter[float] = Counter()
        self._copies: Counter[float] = Counter()

    def add(self, piece: Piece) -> None:
        """Count a piece."""
        size = len(piece.data)
        self.total += size
        self.held_out += size * piece.held_out
        if piece.rank not in self.selection.repeated:
            self.lowest_rank = min(self.lowest_rank, piece.rank)
        self._bytes[piece.rank] += size
        self._copies[piece.rank] += 1
        if len(self._bytes) > 2 * self.capacity:
            self._drop_smallest()

    def better(self) -> Selection:
        """The selection itself if it is good enough; otherwise one for another pass over the corpus."""
        target = self.fraction * self.total
        repeated = {
            rank: size for rank, size in self._bytes.items() if size > target / 2 and self._copies[rank] > 1
        }
        if repeated and not self.selection.repeated:
            return self._spare_repeated(repeated, target)
        if self.total and not self.held_out:
            return replace(self.selection, threshold=self.lowest_rank)
        return self.selection

    def _spare_repeated(self, repeated: dict[float, int], target: float) -> Selection:
        """The selection for a corpus in which these texts repeat a lot, see `Holdout`."""
        rest = self.total - sum(repeated.values())
        threshold = min(target / rest, 0.5) if rest else 0.0
        held_out = threshold * rest
        parts: dict[float, float] = {}
        for rank, size in sorted(repeated.items()):
            parts[rank] = float(held_out < target / 2 and held_out + size <= 2 * target)
            held_out += parts[rank] * size
        if held_out < target / 2:
            return Selection(self.fraction, dict.fromkeys(repeated, self.fraction))
        return Selection(threshold, parts)

    def _drop_smallest(self) -> None:
        least = sorted(self._bytes.values())[-self.capacity]
        self._bytes = Counter({rank: size - least for rank, size in self._bytes.items() if size > least})
        self._copies = Counter({rank: self._copies[rank] for rank in self._bytes})


def _split_tail(
    pieces: Iterable[tuple[int, bytes, float]], left: int
) -> Iterator[tuple[int, bytes, float, bool]]:
    """Train on the first `left` bytes and hold out the rest, split between characters."""
    for index, data, rank in pieces:
        end = character_start(data, max(left, 0))
        left -= len(data)
        for part, held_out in ((data[:end], False), (data[end:], True)):
            if part:
                yield index, part, rank, held_out


def _split_by_content(
    pieces: Iterable[tuple[int, bytes, float]], selection: Selection
) -> Iterator[tuple[int, bytes, float, bool]]:
    copies: Counter[float] = Counter()
    for index, data, rank in pieces:
        part = selection.repeated.get(rank)
        if part is None:
            yield index, data, rank, rank <= selection.threshold
            continue
        # Of n copies, n times the part, rounded up, are held out, evenly spread.
        yield index, data, rank, math.ceil((copies[rank] + 1) * part) > math.ceil(copies[rank] * part)
        copies[rank] += 1


def _with_ranks(pieces: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes, float]]:
    """Pieces with their ranks, computed on all cores."""

    def rank(batch: list[tuple[int, bytes]]) -> list[tuple[int, bytes, float]]:
        return [(index, data, content_rank(data)) for index, data in batch]

    batches = batch_by_size(pieces, lambda piece: len(piece[1]), HASH_BATCH_BYTES)
    for batch in map_ordered(rank, batches):
        yield from batch


def cut(chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    r"""Cut into pieces of about `size` bytes that end with a line, if one ends within twice the size.

    >>> list(cut([b"one t", b"wo\nend"], size=4))
    [b'one two\n', b'end']
    """
    held = b""
    for chunk in chunks:
        # A line end is looked for within twice the size.
        held = yield from _cut_down_to(2 * size, held + chunk, size)
    yield from _cut_down_to(0, held, size)


def _cut_down_to(most: int, data: bytes, size: int) -> Generator[bytes, None, bytes]:
    """Pieces from the start of `data`, until at most `most` bytes of it are left; returns those."""
    start = 0
    while len(data) - start > most:
        end = data.find(b"\n", start + size - 1, start + 2 * size) + 1
        if not end:
            place = min(start + size, len(data))
            whole = character_start(data, place)
            end = whole if whole > start else place
        yield data[start:end]
        start = end
    return data[start:]


def content_rank(data: bytes) -> float:
    """A number in [0, 1) that depends on the content alone."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") / 2**64
