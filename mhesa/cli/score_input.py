"""What `mhesa score` reads: texts as they arrive, keys, sizes and lists of words."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mhesa.errors import InputError, reason

if TYPE_CHECKING:
    from mhesa.data.files import File
    from mhesa.inference.lines import KeyField, KeyPattern

# Bytes of a file that are scored first, so that its first lines are printed soon.
FIRST_BYTES = 1 << 13


class Text(NamedTuple):
    """A text to score: its name, its bytes in chunks, and what identifies it in a later run."""

    name: str
    chunks: Iterator[bytes]
    identity: str | None


def find_texts(sources: list[str]) -> list[File | None]:
    """The files of sources, each once; `None` is standard input, which is scored while it is read."""
    from mhesa.data.sources import find_files

    found: dict[object, File | None] = {}
    for source in sources:
        for file in [None] if source == "-" else find_files([source]):
            found.setdefault(file and file.identity(), file)
    return list(found.values())


def documents(
    files: list[File | None], text_field: str, advance: Callable[[int], object], whole: bool
) -> Iterator[Text]:
    """The documents of some files: the name and the chunks of bytes of each.

    Args:
        files: files to read; `None` is standard input.
        text_field: field that holds the text, see `File.documents`.
        advance: called with the bytes of a file that were read.
        whole: whether files of JSON lines are read as they are.
    """
    from mhesa.data.files import JSON_LINES
    from mhesa.data.standard_input import standard_input

    for file in files:
        if file is None:
            yield Text("-", standard_input(), None)
            continue
        path = os.path.realpath(file.path)
        if whole and file.form in JSON_LINES:
            file = replace(file, form="")
        for name, chunks in file.documents(text_field, advance):
            identity = path if name == file.name else f"{path} {name}"
            yield Text(name, _small_at_first(chunks), identity)


def _small_at_first(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of growing size: those scored together are printed together, the first soon.

    >>> [len(piece) for piece in _small_at_first([bytes(20_000), bytes(100_000), bytes(100_000)])]
    [8192, 11808, 32768, 65536, 1696, 100000]
    """
    size = FIRST_BYTES
    for chunk in chunks:
        start = 0
        while start < len(chunk):
            yield chunk[start : start + size]
            start, size = start + size, 2 * size


def key_finder(key: str | None, key_field: str | None) -> KeyPattern | KeyField | None:
    """What finds the key of a line, by a pattern or by a field of JSON; `None` if lines have none."""
    from mhesa.inference.lines import KeyField, KeyPattern

    if key is not None:
        return KeyPattern(key)
    return None if key_field is None else KeyField(key_field)


def size_in_bytes(text: str, option: str) -> int:
    """The bytes of a size such as 256MB."""
    found = re.fullmatch(r"(\d{1,15}) ?([KMGT]?)I?B?", text.upper())
    if not found:
        raise InputError(f"{option} must be a size such as 256MB or 1GB, not {text}")
    return int(found[1]) << (10 * " KMGT".index(found[2] or " "))


def word_list(path: Path) -> list[str]:
    """The words of a file, with whitespace between them."""
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error
