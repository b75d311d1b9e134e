"""A text while it is generated: tokens become bytes, stop strings end it, a cursor reads whole characters."""

from __future__ import annotations

import codecs
import re
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import repeat
from typing import Literal

from mhesa.errors import NOT_NUMBERS, InputError
from mhesa.inference.logprobs import TokenLogprob
from mhesa.inference.sampling import TokenSampler

FinishReason = Literal["stop", "length"]


class StopMatcher:
    r"""Passes a text on as it grows, up to the first of its stop strings.

    Bytes at the end that may begin a stop string are held back until that is clear. Where stop strings
    overlap, the one that is complete first ends the text; of two, the longer one.

    Args:
        stops: the stop strings, none of them empty.

    >>> matcher = StopMatcher([b"\n\n", b"four"])
    >>> [matcher.feed(piece) for piece in (b"one\n", b"two\n", b"\nthree")], matcher.stopped
    ([b'one', b'\ntwo', b''], True)
    """

    def __init__(self, stops: Sequence[bytes] = ()) -> None:
        if b"" in stops:
            raise InputError("a stop string must not be empty")
        self.stops, self.held, self.stopped = tuple(stops), b"", False
        # Per stop string: length of its longest prefix that ends the text.
        self._lengths = [0] * len(self.stops)
        self._first_byte = re.compile(b"|".join(re.escape(stop[:1]) for stop in stops))

    def feed(self, piece: bytes) -> bytes:
        """Add to the text; returns the bytes that can no longer be part of a stop string."""
        if not self.stops or not (self.held or self._first_byte.search(piece)):
            return piece
        text = self.held + piece
        # Where each stop string ends and begins.
        found = [(place + len(stop), place) for stop in self.stops if (place := text.find(stop)) >= 0]
        self.stopped = bool(found)
        self._lengths = list(map(match_length, self.stops, self._lengths, repeat(piece)))
        end = min(found)[1] if found else len(text) - max(self._lengths)
        self.held = b"" if found else text[end:]
        return text[:end]

    def flush(self) -> bytes:
        """End the text without a stop string; returns the bytes that were held back."""
        rest, self.held = self.held, b""
        return rest


def match_length(stop: bytes, length: int, piece: bytes) -> int:
    """Length of the longest prefix of a stop string that ends a text.

    Knuth-Morris-Pratt: amortised constant time per byte.

    Args:
        stop: the stop string.
        length: that length before `piece`.
        piece: bytes that are new at the end of the text.

    >>> match_length(b"two", match_length(b"two", 0, b"one, t"), b"tw")
    2
    """
    shorter = _shorter_matches(stop)
    for byte in piece:
        while length and (length == len(stop) or stop[length] != byte):
            length = shorter[length]
        length += stop[length] == byte
    return length


@lru_cache(maxsize=1024)
def _shorter_matches(stop: bytes) -> list[int]:
    """For each length of a matching prefix, that of the next shorter prefix that matches as well."""
    shorter, length = [0, 0], 0
    for byte in stop[1:]:
        while length and stop[length] != byte:
            length = shorter[length]
        length += stop[length] == byte
        shorter.append(length)
    return shorter


class Continuation:
    """A text that continues a prompt.

    One thread writes it; another may read it through a `TextCursor` at the same time.

    Args:
        sampler: draws the tokens.
        limit: the largest number of tokens.
        end: the token that ends the text; it has no bytes.
        decode: gives the bytes of a token; `None` keeps no text.
        stops: the text ends before the first of these.
        top: how many of the likeliest tokens to record beside each; `None` records no log-probabilities.

    Attributes:
        pieces, scores: bytes and scored tokens that no cursor has read yet.
        size: bytes of the tokens so far, including those held back by a possible stop string.
        count: tokens drawn, including one that ended the text.
        last: the token drawn last.
        finish: why the text has ended; `None` as long as it goes on.
        error: set if the model's logits are not numbers.

    >>> text = Continuation(TokenSampler(), 9, decode=[b"a", b"b", b""].__getitem__, end=2, stops=[b"ba"])
    >>> for token in (0, 1, 0):
    ...     text.take(token)
    >>> TextCursor(text).read()[0], text.finish
    ('a', 'stop')
    """

    def __init__(
        self,
        sampler: TokenSampler,
        limit: int,
        *,
        end: int | None = None,
        decode: Callable[[int], bytes] | None = None,
        stops: Sequence[bytes] = (),
        top: int | None = None,
    ) -> None:
        self.sampler, self.limit, self.end, self.top = sampler, limit, end, top
        self.pieces: deque[bytes] = deque()
        self.scores: deque[TokenLogprob] = deque()
        self.size = self.count = 0
        self.last: int | None = None
        self.finish: FinishReason | None = None if limit > 0 else "length"
        self.error: FloatingPointError | None = None
        self._decode, self._matcher = decode, StopMatcher(stops)

    def take(self, token: int) -> None:
        """Add a token that was drawn; -1 says that none could be drawn."""
        if token < 0:
            self.error = FloatingPointError(NOT_NUMBERS)
            return
        self.last = token
        self.count += 1
        if token == self.end:
            self._finish("stop")
            return
        if self._decode is not None:
            piece = self._decode(token)
            self.size += len(piece)
            self.pieces.append(self._matcher.feed(piece))
        if self._matcher.stopped:
            self._finish("stop")
        elif self.count >= self.limit:
            self._finish("length")

    def _finish(self, why: FinishReason) -> None:
        # Set last: a cursor that sees `finish` reads no further.
        self.pieces.append(self._matcher.flush())
        self.finish = why


class TextCursor:
    """Reads a continuation as it grows, in whole characters.

    What it has read is not kept: a continuation can have one cursor only.

    Args:
        text: text to read.
        before: bytes to read first, together with the text's own first ones.
    """

    def __init__(self, text: Continuation, before: bytes = b"") -> None:
        self.text = text
        self.finish: FinishReason | None = None
        self._before, self._seen = before, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self) -> tuple[str, list[TokenLogprob]]:
        """What is new: text, and the scores of the tokens that begin in it.

        Scores never come without text, except at the end: then all that are left come, also those of tokens
        of a stop string and of the end of text. `finish` is set once there is no more.
        """
        text = self.text
        self.finish = text.finish
        new = b"".join([text.pieces.popleft() for _ in range(len(text.pieces))])
        if not new and self.finish is None:
            return "", []
        self._seen += len(new)
        characters = self._decoder.decode(self._before + new, self.finish is not None)
        self._before = b""
        scores = []
        while text.scores and (self.finish or (characters and text.scores[0].start < self._seen)):
            scores.append(text.scores.popleft())
        return characters, scores
