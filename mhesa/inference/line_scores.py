"""Scores of lines, and the threshold for a rate of false alarms.

See docs/logs.md for what was measured.
"""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mhesa.errors import InputError
from mhesa.inference.lines import SHOWN_KEY, Masks, Piece
from mhesa.inference.scoring import SHOWN_BYTES, ScoredPiece, SpanSurprisal
from mhesa.tokenizers.stream import character_length, character_start

# Bytes that lines of one kind begin with, digits left out, and how many kinds are remembered.
BEGINNING, KINDS = 24, 1024
DIGITS = b"0123456789"
# For `bytes.translate`: 1 for each byte that is no digit.
NO_DIGIT = bytes(byte not in DIGITS for byte in range(256))
# The smallest share of false alarms: nobody reads as many lines as a smaller one needs.
SMALLEST_RATE = 1e-12
# The relative error of a threshold, and the smallest and the largest score that is told from others.
PRECISION, SMALLEST, LARGEST = 0.01, 1e-3, 1e9


class Peak:
    """The most surprising part of a line, found only when it is asked for: few lines' parts are shown.

    Args:
        text: the piece of the line with the highest score.
        bits: surprisal of each of its bytes, zero for those that do not count, `(bytes,)`.
        offset: where the piece begins in the line, in bytes.
    """

    def __init__(self, text: bytes, bits: np.ndarray, offset: int) -> None:
        self._text, self._bits, self._offset = text, bits, offset
        if len(text) > SHOWN_BYTES:
            # Too large to keep.
            _ = self.found

    @cached_property
    def found(self) -> tuple[tuple[int, int], bytes]:
        """Where the part begins and ends, in bytes from the line's beginning, and its first bytes."""
        # Widened to the characters of UTF-8 that it cuts.
        first, last = most_surprising_span(self._bits)
        start, end = _character_around(self._text, first)[0], _character_around(self._text, last)[1]
        shown = self._text[start : min(end, start + SHOWN_BYTES)]
        self._text, self._bits = b"", np.zeros(0)
        return (self._offset + start, self._offset + end), shown


@dataclass(frozen=True)
class LineSurprisal(SpanSurprisal):
    """A line, its surprisal, and how much it stands out.

    Args:
        score: bits of its most surprising byte, digits left out, above what lines that begin alike have.
        peak: its most surprising part.
        key: key of the line's session; `None` if it has none.
        alarm: whether the score is above the threshold; `None` if there is none.
    """

    score: float
    peak: Peak = field(repr=False, compare=False)
    key: str | None
    alarm: bool | None = None

    @property
    def span(self) -> tuple[int, int]:
        """Where the most surprising part begins and ends, in bytes from the line's beginning."""
        return self.peak.found[0]

    @property
    def span_text(self) -> bytes:
        """The beginning of that part."""
        return self.peak.found[1]

    def as_dict(self) -> dict[str, object]:
        """The values under the names that they have in JSON."""
        found = super().as_dict() | {
            "score": round(self.score, 4) + 0.0,  # no negative zero
            "span": [*self.span],
            "span_text": self.span_text.decode("utf-8", "replace"),
        }
        if self.key is not None:
            found["key"] = self.key[:SHOWN_KEY]
        if self.alarm is not None:
            found["alarm"] = self.alarm
        return found


class LineScores:
    """Scores lines in the order in which they come, in constant memory.

    The score is the surprisal of a line's most surprising byte, less what it was on average in earlier lines
    that begin alike. That average begins with a zero. Digits do not count: they tell lines apart without
    being news, and a model is sure of some that it has seen too often. How well that does is in docs/logs.md.
    A line in several pieces has the score of the highest.

    Args:
        masks: patterns of what in a line is read but not counted.

    >>> scores = LineScores()
    >>> [scores.score(b"a1", np.array(bits)) for bits in ([1.0, 9.0], [1.0, 9.0], [9.0, 9.0])]
    [1.0, 0.5, 8.333333333333334]
    """

    def __init__(self, masks: Masks | None = None) -> None:
        self._masks = masks or Masks()
        # For each beginning, the number of lines, the zero included, and the sum of their highest bits.
        self._kinds: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def score(self, text: bytes, bits: np.ndarray) -> float:
        """The score of a line, which then becomes one of the earlier ones.

        `text` is the bytes of the line that count, `bits` the surprisal of each, `(bytes,)`.
        """
        kind = text.translate(None, DIGITS)[:BEGINNING].decode("latin-1")
        highest = float(np.where(_no_digits(text), bits, 0.0).max(initial=0.0))
        count, total = self._kinds.pop(kind, (1, 0.0))
        self._kinds[kind] = count + 1, total + highest
        if len(self._kinds) > KINDS:
            self._kinds.popitem(last=False)
        return highest - total / count

    def read(self, source: str, pieces: Iterable[ScoredPiece]) -> Iterator[LineSurprisal]:
        """The lines of some pieces, which come in order, scored; `source` is the name of their file.

        Raises:
            InputError: a mask takes too long.
        """
        line: _Line | None = None
        for scored in pieces:
            line = line or _Line(scored.piece)
            self._add_piece(line, source, scored)
            if scored.piece.is_last:
                yield line.whole(source)
                line = None
        if line is not None:
            yield line.whole(source)

    def _add_piece(self, line: _Line, source: str, scored: ScoredPiece) -> None:
        text, bits, counts = scored.piece.text, scored.bits, _no_digits(scored.piece.text)
        if self._masks:
            content = text.removesuffix(b"\n")
            masked = np.ones(len(text), dtype=bool)
            masked[: len(content)] = self._masks.counted(content, f"{source}, line {scored.piece.number}")
            score = self.score(np.frombuffer(text, np.uint8)[masked].tobytes(), bits[masked])
            counts = masked & counts
        else:
            score = self.score(text, bits)
        counted_bits = np.where(counts, bits, 0.0)
        if line.highest is None or score > line.highest[0]:
            line.highest = score, Peak(text, counted_bits, line.size)
        line.bits += float(bits.sum())
        line.size += len(text)
        line.text += text[: SHOWN_BYTES - len(line.text)]

    def to_json(self) -> str:
        """The averages of earlier lines, as text."""
        return json.dumps(list(self._kinds.items()))

    def load_json(self, text: str) -> None:
        """Go on with what `to_json` gave."""
        self._kinds = OrderedDict((kind, (count, total)) for kind, (count, total) in json.loads(text))


def _no_digits(text: bytes) -> np.ndarray:
    """Which bytes are no digits, bool `(bytes,)`."""
    return np.frombuffer(text.translate(NO_DIGIT), np.bool_)


@dataclass
class _Line:
    """A line whose pieces are coming; of them, the one with the highest score is kept."""

    first: Piece
    highest: tuple[float, Peak] | None = None
    bits: float = 0.0
    size: int = 0
    text: bytes = b""

    def whole(self, source: str) -> LineSurprisal:
        assert self.highest is not None, "a line has a piece"
        first, (score, peak) = self.first, self.highest
        span = source, first.number, first.offset, self.bits, self.size, self.text
        return LineSurprisal(*span, score=score, peak=peak, key=first.key)


def most_surprising_span(bits: np.ndarray) -> tuple[int, int]:
    """Where the bytes begin and end whose `bits`, `(bytes,)`, have the largest sum above twice the mean.

    >>> most_surprising_span(np.array([1.0, 1, 1, 9, 8, 1, 1, 2]))
    (3, 5)
    """
    if not len(bits):
        return 0, 0
    sums = np.concatenate([[0.0], np.cumsum(bits - 2 * bits.mean())])
    end = int(np.argmax(sums[1:] - np.minimum.accumulate(sums[:-1]))) + 1
    return int(np.argmin(sums[:end])), end


def _character_around(text: bytes, place: int) -> tuple[int, int]:
    """Where the character begins and ends that `place` is inside of; `place` twice if it is in none."""
    start = character_start(text, place)
    end = min(start + character_length(text[start]), len(text)) if start < place else place
    return (start, end) if start < place < end else (place, place)


class FalseAlarms:
    """Finds the threshold that a share of all scores so far, `rate`, is above, in constant memory.

    Scores are counted in buckets whose bounds grow by 1 %, so a threshold is right to 1 %.

    Raises:
        InputError: the share is below 1e-12, or not below 1.

    >>> alarms = FalseAlarms(0.1)
    >>> sum(alarms.add(score) for score in [1.0] * 50 + [5.0])
    1
    """

    def __init__(self, rate: float) -> None:
        if not SMALLEST_RATE <= rate < 1:
            raise InputError(
                f"--false-alarms must be between {SMALLEST_RATE:g} and 1, such as 0.001, not {rate:g}"
            )
        self.rate = rate
        self.count = 0
        # Scores per bucket; the bucket whose upper bound is the threshold, and the number of scores above it.
        self._counts: Counter[int] = Counter()
        self._bucket, self._above = 0, 0

    @property
    def threshold(self) -> float:
        """The score that at most the share is above; infinite while the share is less than one score."""
        if self.rate * self.count < 1:
            return math.inf
        return SMALLEST * (1 + PRECISION) ** (self._bucket + 1)

    def add(self, score: float) -> bool:
        """Return whether a score exceeds the threshold so far, then add it to the counts."""
        above = score > self.threshold
        place = math.log(min(max(score, SMALLEST), LARGEST) / SMALLEST) / math.log1p(PRECISION)
        self._count(int(place), 1)
        return above

    def _count(self, bucket: int, scores: int) -> None:
        self._counts[bucket] += scores
        self.count += scores
        self._above += scores * (bucket > self._bucket)
        most = self.rate * self.count
        while self._above > most:
            self._bucket += 1
            self._above -= self._counts[self._bucket]
        while self._bucket and self._above + self._counts[self._bucket] <= most:
            self._above += self._counts[self._bucket]
            self._bucket -= 1

    def to_json(self) -> str:
        """The scores so far, as text."""
        return json.dumps(list(self._counts.items()))

    def load_json(self, text: str) -> None:
        """Go on with what `to_json` gave."""
        self._counts.clear()
        self.count = self._bucket = self._above = 0
        for bucket, scores in json.loads(text):
            self._count(bucket, scores)
