"""A text as it is written: the decode loop appends tokens, the event loop reads whole characters."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from typing import NamedTuple

from mhesa.inference.generation import held
from mhesa.inference.sampling import TokenSampler


class Scored(NamedTuple):
    """A token, where its bytes start in the text, its log-probability in nats, and the likeliest there."""

    start: int
    token: int
    logprob: float
    top: list[tuple[int, float]]


class Vocabulary:
    """The bytes of every token, and the token that begins and ends a text.

    Args:
        pieces: bytes of each token id; a special token's are empty.
        end: the id of the end-of-text token.
    """

    def __init__(self, pieces: Sequence[bytes], end: int) -> None:
        self.pieces, self.end = list(pieces), end


class Choice:
    """One text being written.

    Written by the decode loop's thread alone; the event loop's thread may read `data`, `count`, `scores`
    and `finish` at any time, `finish` first.

    Args:
        vocabulary: what tokens stand for.
        sampler: draws the tokens.
        limit: tokens at most.
        stops: the text ends before the first of these.
        top: how many of the likeliest tokens to note beside each; `None` notes no log-probabilities.

    >>> vocabulary = Vocabulary([b"a", b"b", b""], end=2)
    >>> choice = Choice(vocabulary, TokenSampler(), limit=9, stops=(b"ba",))
    >>> [choice.take(token) for token in (0, 1, 0)], bytes(choice.data), choice.finish
    ([False, False, True], b'a', 'stop')
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        sampler: TokenSampler,
        limit: int,
        stops: Sequence[bytes] = (),
        top: int | None = None,
    ) -> None:
        self.vocabulary, self.sampler, self.limit, self.top = vocabulary, sampler, limit, top
        self.stops = tuple(stops)
        self.data = bytearray()
        self.count = 0
        self.last: int | None = None
        self.scores: list[Scored] = []
        self.finish: str | None = None if limit else "length"
        self._tail = max(map(len, self.stops), default=1) - 1

    @property
    def drawn(self) -> int:
        """Tokens drawn, with the one that ended the text."""
        return self.count + (self.last == self.vocabulary.end)

    @property
    def likelihood(self) -> float:
        """The mean of the tokens' log-probabilities, if they were noted; a text of none comes last."""
        return sum(scored.logprob for scored in self.scores) / len(self.scores) if self.scores else -math.inf

    def take(self, token: int) -> bool:
        """Add a token; whether the text is finished by it."""
        self.last = token
        if token == self.vocabulary.end:
            self.finish = "stop"
            return True
        self.count += 1
        piece = self.vocabulary.pieces[token]
        if self.stops and self._stopped(piece):
            self.finish = "stop"
            return True
        self.data += piece
        if self.count >= self.limit:
            self.finish = "length"
            return True
        return False

    def _stopped(self, piece: bytes) -> bool:
        """Whether `piece` completes a stop; if so, `data` ends before it, and never held it whole."""
        before = max(0, len(self.data) - self._tail)
        window = bytes(self.data[before:]) + piece
        found = [place for stop in self.stops if (place := window.find(stop)) >= 0]
        if not found:
            return False
        end = before + min(found)
        missing = end - len(self.data)
        if missing > 0:
            self.data += piece[:missing]
        else:
            del self.data[end:]
        return True


class Reader:
    """Reads a choice's text as it grows, in whole characters, and never what may become a stop."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self.seen = 0
        self.scored = 0
        self.finish: str | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self) -> tuple[str, list[Scored]]:
        """What is new: text, and the tokens that lie in it. `finish` is set once there is no more."""
        choice = self.choice
        self.finish = choice.finish
        new = bytes(choice.data[self.seen :])
        if self.finish is None:
            new = new[: len(new) - held(new, choice.stops)]
        self.seen += len(new)
        scores = choice.scores
        first = self.scored
        while self.scored < len(scores) and scores[self.scored].start < self.seen:
            self.scored += 1
        return self._decoder.decode(new, self.finish is not None), scores[first : self.scored]
