"""Corpora: reading text, holding some of it out, cutting the rest into windows."""

from __future__ import annotations

import glob
import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mhesa.errors import InputError

LARGEST_PIECE = 1 << 16
SMALLEST_PIECE = 1 << 10


@dataclass(frozen=True)
class Document:
    """A stretch of text that stands alone, as the bytes it was read as."""

    name: str
    data: bytes


# Sources


def read_sources(sources: Sequence[str]) -> list[Document]:
    """Read files, folders (all files below, hidden ones apart), glob patterns, and `-` for standard input.

    Files are taken as they are, byte for byte, each once, in the order of the sources and sorted within
    one; empty files are passed over. No sources at all means the Python standard library's source text.

    Raises:
        InputError: a source that is not there or cannot be read, or nothing to read in all of them.
    """
    if not sources:
        documents = [_read(path) for path in standard_library()]
    else:
        documents = [_standard_input() if path is None else _read(path) for path in find_files(sources)]
    documents = [document for document in documents if document.data]
    if not documents:
        raise InputError(f"no text in {', '.join(sources)}: there is no file with anything in it")
    return documents


def find_files(sources: Sequence[str]) -> list[Path | None]:
    """The files that sources name, each once; `None` stands for standard input."""
    return list(dict.fromkeys(path for source in sources for path in _expand(source)))


def standard_library() -> list[Path]:
    """The Python standard library's own source files, its tests apart: text that is on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    apart = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    return sorted(path for path in root.rglob("*.py") if not apart & set(path.relative_to(root).parts))


def _expand(source: str) -> Iterator[Path | None]:
    """The files that a source names; `None` stands for standard input."""
    if source == "-":
        yield None
        return
    path = Path(source)
    if path.is_dir():
        yield from _files_below(path)
    elif path.exists():
        yield path
    else:
        matches = sorted(glob.glob(source, recursive=True))
        if not matches:
            raise InputError(f"no such file, folder or pattern: {source}")
        for match in map(Path, matches):
            yield from _files_below(match) if match.is_dir() else [match]


def _files_below(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _read(path: Path) -> Document:
    try:
        return Document(str(path), path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _standard_input() -> Document:
    if sys.stdin is None:
        raise InputError("there is no standard input to read: it is closed")
    return Document("-", sys.stdin.buffer.read())


# Holding out


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

    def split(self, documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
        """Part documents into those to train on and those held out, neither empty.

        Raises:
            InputError: the corpus is too small to part.
        """
        split = self._by_content if self.method == "content" else self._tail
        kept, held_out = split(documents)
        if not kept or not held_out:
            total = sum(len(document.data) for document in documents)
            raise InputError(f"the corpus of {total:,} bytes is too small to hold text out; give more text")
        return kept, held_out

    def _tail(self, documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
        left = int(sum(len(document.data) for document in documents) * (1 - self.fraction))
        kept, held_out = [], []
        for document in documents:
            head, tail = document.data[:left], document.data[left:]
            left -= len(head)
            kept.append(Document(document.name, head))
            held_out.append(Document(document.name, tail))
        return _nonempty(kept), _nonempty(held_out)

    def _by_content(self, documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
        total = sum(len(document.data) for document in documents)
        size = min(max(total // 256, SMALLEST_PIECE), LARGEST_PIECE)
        pieces = [list(_pieces(document.data, size)) for document in documents]
        # The lowest piece goes whatever the fraction, so that something is always held out.
        limit = max(self.fraction, min(_rank(piece) for cut in pieces for piece in cut))
        kept: list[Document] = []
        held_out: list[Document] = []
        for document, cut in zip(documents, pieces, strict=True):
            for is_out, run in groupby(cut, lambda piece: _rank(piece) <= limit):
                (held_out if is_out else kept).append(Document(document.name, b"".join(run)))
        return kept, held_out


def _pieces(data: bytes, size: int) -> Iterator[bytes]:
    """Cut into pieces of about `size` bytes that end with a line, if one ends within twice the size."""
    start = 0
    while start < len(data):
        line_end = data.find(b"\n", start + size - 1, start + 2 * size)
        end = start + size if line_end < 0 else line_end + 1
        yield data[start:end]
        start = end


def _rank(piece: bytes) -> float:
    """A number in [0, 1) that depends on the content alone."""
    return int.from_bytes(hashlib.blake2b(piece, digest_size=8).digest(), "big") / 2**64


def _nonempty(documents: Iterable[Document]) -> list[Document]:
    return [document for document in documents if document.data]


# Windows


class Tokenizer(Protocol):
    """What is asked of a tokenizer: whole documents to ids, and the id that parts documents."""

    eos_token_id: int

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """The ids of a document."""

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The text of some ids."""


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer) -> np.ndarray:
    """The ids of all documents in one array, each document behind an end-of-text token."""
    parts = []
    for document in documents:
        ids = tokenizer.encode_bytes(document.data)
        parts += [np.array([tokenizer.eos_token_id], dtype=ids.dtype), ids]
    return np.concatenate(parts)


class Windows(Dataset[dict[str, Tensor]]):
    """Training windows of a token array, in an order that position and seed alone decide.

    Item `i` is the same whenever it is asked for, so a stopped run continues by starting at another
    position. Every pass over the corpus has an offset and an order of its own.

    Args:
        tokens: `(tokens,)` ids.
        context: tokens a window.
        seed: what offsets and orders are drawn from.
        length: how many items there are, over any number of passes.

    Raises:
        InputError: fewer tokens than one window.

    >>> windows = Windows(np.arange(100), context=8, seed=0, length=1000)
    >>> windows[0]["input_ids"].shape
    torch.Size([8])
    """

    def __init__(self, tokens: np.ndarray, *, context: int, seed: int, length: int) -> None:
        if len(tokens) < context:
            raise InputError(
                f"the training text has {len(tokens):,} tokens, fewer than one window of {context:,}; "
                "give more text or a smaller context"
            )
        self.tokens = tokens
        self.context = context
        self.length = length
        self.seed = seed
        # One window less than fits leaves room for the offset.
        self.per_pass = max(len(tokens) // context - 1, 1)
        self._starts = lru_cache(maxsize=1)(self._draw_starts)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = self._starts(index // self.per_pass)[index % self.per_pass]
        ids = torch.from_numpy(self.tokens[start : start + self.context].astype(np.int64))
        return {"input_ids": ids, "labels": ids}

    def _draw_starts(self, nth_pass: int) -> np.ndarray:
        random = np.random.default_rng((self.seed, nth_pass))
        offset = random.integers(len(self.tokens) - self.per_pass * self.context + 1)
        return offset + self.context * random.permutation(self.per_pass)
