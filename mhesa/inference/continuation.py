"""A text while it is generated: tokens become bytes, stop strings end it, a cursor reads whole characters."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from mhesa.errors import NOT_NUMBERS, InputError
from mhesa.inference.logprobs import TokenLogprob
from mhesa.inference.sampling import TokenSampler
from mhesa.inference.stop_strings import StopMatcher

FinishReason = Literal["stop", "length"]


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

    Raises:
        InputError: the limit is no whole number of at least 0.

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
        if not isinstance(limit, (int, np.integer)) or limit < 0:
            raise InputError(f"the limit of new tokens must be a whole number, 0 or more, not {limit}")
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
    """Reads a continuation as it grows, in whole characters; the bytes `before` come first.

    What it has read is not kept: a continuation can have one cursor only.
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
