"""Finds stop strings in a text that grows piece by piece."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat

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
    """The length of the longest prefix of a stop string that ends a text, from that `length` before `piece`.

    Knuth-Morris-Pratt: amortised constant time per byte.

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
