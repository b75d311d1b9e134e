"""Finds stop strings in a text that grows piece by piece."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence

from mhesa.errors import InputError


class StopMatcher:
    r"""Passes a text on as it grows, up to the first of its stop strings, none of which may be empty.

    Bytes at the end that may begin a stop string are held back until that is clear. Where stop strings
    overlap, the one that is complete first ends the text; of two that end at the same byte, the longer one.

    >>> matcher = StopMatcher([b"\n\n", b"four"])
    >>> [matcher.feed(piece) for piece in (b"one\n", b"two\n", b"\nthree")], matcher.stopped
    ([b'one', b'\ntwo', b''], True)
    """

    def __init__(self, stops: Sequence[bytes] = ()) -> None:
        if b"" in stops:
            raise InputError("a stop string must not be empty")
        self.stops, self.held, self.stopped = sorted(stops), b"", False
        self._first_byte = re.compile(b"|".join(re.escape(stop[:1]) for stop in stops))

    def feed(self, piece: bytes) -> bytes:
        """Add to the text; returns the bytes that can no longer be part of a stop string."""
        if not self.stops or not (self.held or self._first_byte.search(piece)):
            return piece
        text = self.held + piece
        # Where each stop string ends and begins.
        found = [(place + len(stop), place) for stop in self.stops if (place := text.find(stop)) >= 0]
        self.stopped = bool(found)
        # Where the text may begin one. A place that does not lets its byte go, and is never tried again.
        starts = (match.start() for match in self._first_byte.finditer(text))
        begun = (start for start in starts if self._may_go_on(text[start:]))
        end = min(found)[1] if found else next(begun, len(text))
        self.held = b"" if found else text[end:]
        return text[:end]

    def flush(self) -> bytes:
        """End the text without a stop string; returns the bytes that were held back."""
        rest, self.held = self.held, b""
        return rest

    def _may_go_on(self, tail: bytes) -> bool:
        """Whether some stop string begins with `tail`: then the first that does not sort before it does."""
        place = bisect_left(self.stops, tail)
        return place < len(self.stops) and self.stops[place].startswith(tail)
