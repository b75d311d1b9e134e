"""Lines as they arrive: where they are, the key of each, and what in them is meant to vary."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import regex

from mhesa.errors import InputError
from mhesa.tokenizers.stream import BLOCK_BYTES, character_start

# Lines that are read together: each takes a kilobyte of objects.
LINES_AT_ONCE = 4096
# Seconds that a regular expression may take for a line.
PATTERN_SECONDS = 1.0
# How much of a key is shown.
SHOWN_KEY = 256

# Patterns of what is meant to vary.
PRESETS = {
    "times": r"\d{4}[-./]\d\d[-./]\d\d(?:[T ._-]\d\d[:.]\d\d[:.]\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?)?"
    r"|\d\d[/.]\d\d[/.]\d\d(?:\d\d)?|\d\d:\d\d:\d\d(?:[.,]\d+)?|\b1\d{9}(?:\.\d+|\d{3})?\b|^\d{6} \d{6}\b"
    r"|(?:(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun),? )?(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) +\d+",
    "numbers": r"(?<![A-Za-z])[-+]?(?:0x[0-9A-Fa-f]+|\d+(?:\.\d+)?)",
    "addresses": r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b"
    r"|(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){3,7}[0-9A-Fa-f]{1,4}\b|\b(?:[0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}\b",
    "uuids": r"\b[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}\b",
    "paths": r"(?<![\w/])(?:/[\w.+@%~-]+)+/?|\b[A-Za-z]:(?:\\[\w.+@%~ -]+)+",
}


@dataclass(frozen=True)
class Piece:
    """A line with its line end, or a part of a line that is too long to hold.

    Args:
        number: number of the line, from 1.
        offset: where the piece begins, in bytes.
        text: bytes of the piece.
        is_first: whether the line begins with it.
        key: key of the line; `None` if it has none, or nobody asked.
    """

    number: int
    offset: int
    text: bytes
    is_first: bool = True
    key: str | None = None

    @property
    def is_last(self) -> bool:
        """Whether the line ends with it."""
        return self.text.endswith(b"\n")


def split_lines(chunks: Iterable[bytes], *, offset: int = 0, number: int = 1) -> Iterator[list[Piece]]:
    r"""Cut a text into lines as it arrives; a line longer than `BLOCK_BYTES` into several pieces.

    Args:
        chunks: the text, cut anywhere.
        offset: offset of the first byte.
        number: number of the first line.

    Yields:
        The lines that each chunk completes, `LINES_AT_ONCE` of them at most.

    >>> [[piece.text for piece in pieces] for pieces in split_lines([b"one\ntw", b"o\nthree"])]
    [[b'one\n'], [b'two\n'], [b'three']]
    """
    held, is_first = b"", True
    for chunk in chunks:
        held += chunk
        pieces, start = [], 0
        while start < len(held):
            end = held.find(b"\n", start, start + BLOCK_BYTES) + 1
            if not end:
                if len(held) - start < BLOCK_BYTES:
                    break
                end = character_start(held, start + BLOCK_BYTES - 1)
            pieces.append(Piece(number, offset + start, held[start:end], is_first))
            is_first = pieces[-1].is_last
            number, start = number + is_first, end
            if len(pieces) == LINES_AT_ONCE:
                yield pieces
                pieces = []
        held, offset = held[start:], offset + start
        if pieces:
            yield pieces
    if held:
        yield [Piece(number, offset, held, is_first)]


class Pattern:
    """A regular expression to be looked for in lines, each for a limited time; errors call it `name`.

    Raises:
        InputError: the package `regex` does not compile it.
    """

    def __init__(self, text: str, name: str) -> None:
        self._text, self._name = text, name
        try:
            self._compiled = regex.compile(text)
        except regex.error as error:
            raise InputError(f"{name} {text!r} is no regular expression: {error}") from error

    def matches(self, line: str, where: str) -> Iterator[regex.Match[str]]:
        """The matches in a line, from left to right; `where` names its place in an error.

        Raises:
            InputError: it takes too long.
        """
        try:
            yield from self._compiled.finditer(line, timeout=PATTERN_SECONDS)
        except TimeoutError as error:
            raise InputError(
                f"{self._name} {self._text!r} takes more than {PATTERN_SECONDS:g} s in {where};"
                " take one that backtracks less"
            ) from error


class KeyPattern(Pattern):
    """Finds the key of a line: the first group of the first match of a regular expression.

    Raises:
        InputError: the expression does not compile, or has no group.

    >>> KeyPattern(r"user=(\\w+)").find(b"user=ann logged in", "line 1")
    'ann'
    """

    def __init__(self, text: str) -> None:
        super().__init__(text, "--key")
        if not self._compiled.groups:
            raise InputError(f"--key '{text}' has no group; put what names the entity in parentheses")

    def find(self, line: bytes, where: str) -> str | None:
        """The key of a line, `None` if it has none.

        Raises:
            InputError: the expression takes too long.
        """
        found = next(self.matches(as_text(line), where), None)
        return found[1] if found else None


class KeyField:
    """Finds the key of a line of JSON: the value of the field `name`.

    >>> KeyField("user").find(b'{"user": 7, "text": "logged in"}', "line 1")
    '7'
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def find(self, line: bytes, where: str) -> str | None:
        """The key of a line, `None` if it is no object of JSON or lacks the field."""
        try:
            # Numbers as they are written: Python takes long, and refuses to read, huge ones.
            row = json.loads(line, parse_int=str, parse_float=str)
        except (ValueError, RecursionError):
            return None
        value = row.get(self._name) if isinstance(row, dict) else None
        return value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True)


class Masks:
    """What in a line is meant to vary, by regular expressions and names of `PRESETS`: read but not counted.

    Raises:
        InputError: an expression does not compile, or there is no such preset.

    >>> Masks([r"id=\\w+"], ["times"]).counted(b"12:30:00 id=ab ok", "line 1").nonzero()[0].tolist()
    [8, 14, 15, 16]
    """

    def __init__(self, patterns: Iterable[str] = (), presets: Iterable[str] = ()) -> None:
        self._patterns = [Pattern(text, "--mask") for text in patterns]
        for name in presets:
            if name not in PRESETS:
                raise InputError(f"--preset must be one of {', '.join(PRESETS)}, not {name}")
            self._patterns.append(Pattern(PRESETS[name], f"--preset {name}"))

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def counted(self, line: bytes, where: str) -> np.ndarray:
        """Which bytes of a line count, bool `(bytes,)`.

        Raises:
            InputError: an expression takes too long.
        """
        counted = np.ones(len(line), dtype=bool)
        text = as_text(line)
        starts = character_starts(text)
        for pattern in self._patterns:
            for found in pattern.matches(text, where):
                counted[starts[found.start()] : starts[found.end()]] = False
        return counted


def as_text(line: bytes) -> str:
    """A line as text, each byte that is not UTF-8 as a character of its own."""
    return line.decode("utf-8", "surrogateescape")


def character_starts(text: str) -> Sequence[int]:
    """Where each character of `as_text` begins in UTF-8, and the last ends."""
    if text.isascii():
        return range(len(text) + 1)
    return [0, *accumulate(len(character.encode("utf-8", "surrogateescape")) for character in text)]
