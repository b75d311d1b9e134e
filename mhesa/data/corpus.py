"""Corpora on the disk: tokenised once, in parallel, and read through memory maps."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from io import FileIO
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from mhesa.atomic_io import write_folder
from mhesa.data.cache import cache_folder, lock
from mhesa.data.holdout import Holdout, Piece
from mhesa.data.parallel import batches, ordered, threads
from mhesa.data.sources import TEXT_FIELD, Document, Report, find_files, nothing_in
from mhesa.errors import InputError

# Counted up when the same text and tokenizer would give other files.
FORMAT = 2
BATCH = 1 << 22
# Held-out text that is kept to measure on; the rest is only kept from training.
MEASURED_BYTES = 1 << 21
# A vocabulary learns no more from more text than this.
VOCABULARY_BYTES = 1 << 28
READS_BETWEEN_RELEASES = 256
TOKENS = "tokens.bin"
BEGINS = "begins.bin"
HELD_OUT = "held_out.bin"
FACTS = "facts.json"


class Tokenizer(Protocol):
    """What is asked of a tokenizer: bytes to ids and back, and the id that parts documents."""

    eos_token_id: Any

    def __len__(self) -> int:
        """How many tokens there are."""

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """The ids of a document, `(tokens,)`."""

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of several texts."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text of ids."""

    def fingerprint(self) -> str:
        """What tells it from every tokenizer that gives other ids."""


@dataclass(frozen=True)
class Facts:
    """What is written down of a corpus."""

    documents: int
    training_bytes: int
    training_tokens: int
    held_out_bytes: int
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """What a run trains on and what it is measured on.

    Args:
        facts: counts.
        tokens: `(tokens,)`, every document behind an end-of-text token.
        held_out: text that is not trained on, up to `MEASURED_BYTES` of it.
    """

    facts: Facts
    tokens: Tokens
    held_out: list[Document]

    @property
    def bytes_a_token(self) -> float:
        """Bytes of training text that a training token stands for."""
        return self.facts.training_bytes / self.facts.training_tokens


class Tokens:
    """Token ids in a file, mapped and not read: `tokens[start:stop]` is a copy of a few of them.

    Where documents begin is in a file of its own, and the end-of-text token there need not fit the ids'
    type: bytes take a byte each.

    Pages that were touched are given back now and then, so that a long run over a large file does not
    come to hold all of it.

    Args:
        folder: where both files are.
        dtype: of the ids.
        eos_token_id: the token that every document begins with.
    """

    def __init__(self, folder: Path, dtype: str, eos_token_id: int) -> None:
        self._maps: list[mmap.mmap] = []
        self._ids = self._mapped(folder / TOKENS, dtype)
        self._begins = self._mapped(folder / BEGINS, "int64")
        self._eos_token_id = eos_token_id
        self._reads = 0

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, place: slice) -> np.ndarray:
        self._reads += 1
        if self._reads % READS_BETWEEN_RELEASES == 0:
            self._release()
        start, stop, _ = place.indices(len(self))
        ids = self._ids[start:stop].astype(np.int64)
        first, last = np.searchsorted(self._begins, (start, stop))
        ids[self._begins[first:last] - start] = self._eos_token_id
        return ids

    def _mapped(self, path: Path, dtype: str) -> np.ndarray:
        with path.open("rb") as file:
            self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return np.frombuffer(self._maps[-1], dtype=dtype)

    def _release(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            for it in self._maps:
                it.madvise(mmap.MADV_DONTNEED)


class Source:
    """The files of a corpus with all that decides its tokens but the tokenizer.

    Args:
        sources: see `find_files`.
        text_field: of JSON lines and parquet.
        holdout: what is kept from training.

    Raises:
        InputError: a source that is not there or cannot be read.
    """

    def __init__(
        self, sources: Sequence[str], *, text_field: str = TEXT_FIELD, holdout: str = "content:0.05"
    ) -> None:
        self.names = list(sources)
        self.files = find_files(sources)
        self.text_field = text_field
        self.holdout = Holdout.parse(holdout)
        with threads() as pool:
            stretches = [(file, start) for file in self.files for start in file.stretches()]
            digests = list(pool.map(lambda stretch: stretch[0].sha256(stretch[1]), stretches))
        self.sha256 = _digest(digests, text_field, holdout)
        self.size = sum(file.size for file in self.files)

    def pieces(
        self, holdout: Holdout | None = None, on_read: Report = lambda amount: None
    ) -> Iterator[Piece]:
        """All text, piece by piece, each with the side it is on."""
        total = self._text_size() if self.holdout.method == "tail" else self.size
        documents = (chunks for file in self.files for _, chunks in file.documents(self.text_field, on_read))
        return (holdout or self.holdout).split(documents, total)

    def training_text(self, limit: int = VOCABULARY_BYTES) -> Iterator[bytes]:
        """Training text to make a vocabulary of, evenly from all of the corpus and about `limit` bytes."""
        share = limit / max(self.size, 1)
        for piece in self.pieces():
            # The lowest ranks are held out, so count from the top.
            if not piece.held_out and piece.rank >= 1 - share:
                yield piece.data

    def _text_size(self) -> int:
        return sum(
            len(chunk)
            for file in self.files
            for _, chunks in file.documents(self.text_field)
            for chunk in chunks
        )


def open_corpus(source: Source, tokenizer: Tokenizer, on_read: Report = lambda amount: None) -> Corpus:
    """The tokens of a corpus, from the cache or made now.

    Args:
        source: the text.
        tokenizer: what makes ids of it.
        on_read: called with the bytes of files that were read.

    Raises:
        InputError: no text, too little to hold some out, or no room for the files.
    """
    name = _digest(FORMAT, source.sha256, tokenizer.fingerprint())[:32]
    folder = cache_folder() / "tokens" / name
    with lock(name):
        corpus = _load(folder, tokenizer)
        if corpus is None:
            try:
                with write_folder(folder) as partial:
                    _tokenize(source, tokenizer, partial, on_read)
            except OSError as error:
                raise InputError(f"cannot write tokens to {folder}: {error.strerror}") from error
            corpus = _load(folder, tokenizer)
    assert corpus is not None
    return corpus


def _load(folder: Path, tokenizer: Tokenizer) -> Corpus | None:
    try:
        saved = json.loads((folder / FACTS).read_text())
    except (OSError, ValueError):
        return None
    facts = Facts(**saved["facts"])
    tokens = Tokens(folder, saved["dtype"], tokenizer.eos_token_id)
    if len(tokens) != facts.training_tokens:
        return None
    data = (folder / HELD_OUT).read_bytes()
    ends = np.cumsum(saved["held_out_lengths"]).tolist()
    starts = [0, *ends[:-1]]
    held_out = [Document("held out", data[start:end]) for start, end in zip(starts, ends, strict=True)]
    return Corpus(facts, tokens, held_out)


def _tokenize(source: Source, tokenizer: Tokenizer, folder: Path, on_read: Report) -> None:
    writer = _Writer(source, tokenizer, folder)
    writer.write(source.pieces(on_read=on_read))
    if writer.read and not writer.held_out_bytes and source.holdout.method == "content":
        # Something is always held out: of a small corpus the lowest piece, whatever the fraction.
        lowest = replace(source.holdout, fraction=writer.lowest_rank)
        writer = _Writer(source, tokenizer, folder)
        writer.write(source.pieces(lowest))
    writer.finish()


class _Writer:
    """Writes a corpus's files, tokenising on every core."""

    def __init__(self, source: Source, tokenizer: Tokenizer, folder: Path) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.folder = folder
        self.dtype = _smallest_type(tokenizer)
        self.documents = self.training_bytes = self.training_tokens = 0
        self.read = self.held_out_bytes = 0
        self.last_document = -1
        self.lowest_rank = 1.0
        expected = source.holdout.fraction * source.size
        self.measured = source.holdout.fraction * min(1.0, MEASURED_BYTES / max(expected, 1.0))
        self.held_out: list[bytearray] = []
        self.measured_bytes = 0

    def write(self, pieces: Iterator[Piece]) -> None:
        """Tokenise the training pieces and keep some of the others."""
        taken = batches((piece for piece in pieces if not self._took(piece)), _size, BATCH)
        with (
            (self.folder / TOKENS).open("wb", buffering=0) as file,
            (self.folder / BEGINS).open("wb") as begins,
            threads() as pool,
        ):
            for _ in ordered(pool, _write_at, self._placed(file, begins, ordered(pool, self._encode, taken))):
                pass

    def _placed(
        self, file: FileIO, begins: IO[bytes], encoded: Iterable[tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """Where the ids of each batch go, so that several threads can write."""
        for ids, first in encoded:
            begins.write((self.training_tokens + first).tobytes())
            yield file.fileno(), self.training_tokens * ids.itemsize, ids
            self.training_tokens += len(ids)

    def finish(self) -> None:
        """Write down what there is."""
        if not self.read:
            raise InputError(nothing_in(self.source.names or ["the standard library"]))
        if not self.training_bytes or not self.held_out_bytes:
            raise InputError(
                f"the corpus of {self.read:,} bytes is too small to hold text out; give more text"
            )
        (self.folder / HELD_OUT).write_bytes(b"".join(self.held_out))
        facts = Facts(
            documents=self.documents,
            training_bytes=self.training_bytes,
            training_tokens=self.training_tokens,
            held_out_bytes=self.held_out_bytes,
            sha256=self.source.sha256,
        )
        lengths = [len(document) for document in self.held_out]
        saved = {"facts": asdict(facts), "dtype": self.dtype, "held_out_lengths": lengths}
        (self.folder / FACTS).write_text(json.dumps(saved))

    def _took(self, piece: Piece) -> bool:
        """Count a piece, and keep it if it is held out."""
        self.read += len(piece.data)
        self.documents += piece.document != self.last_document
        self.last_document = piece.document
        self.lowest_rank = min(self.lowest_rank, piece.rank)
        if not piece.held_out:
            self.training_bytes += len(piece.data)
            return False
        self.held_out_bytes += len(piece.data)
        if self._is_measured(piece):
            if piece.starts or not self.held_out:
                self.held_out.append(bytearray())
            self.held_out[-1] += piece.data
            self.measured_bytes += len(piece.data)
        return True

    def _is_measured(self, piece: Piece) -> bool:
        if self.measured_bytes >= 2 * MEASURED_BYTES:
            return False
        return (
            self.source.holdout.method == "tail"
            or not self.held_out
            or piece.rank <= max(self.measured, self.lowest_rank)
        )

    def _encode(self, batch: list[Piece]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a batch, and where among them documents begin."""
        end = np.array([self.tokenizer.eos_token_id])
        parts, begins, length = [], [], 0
        encoded = self.tokenizer.encode_batch([piece.data for piece in batch])
        for piece, ids in zip(batch, encoded, strict=True):
            if piece.starts:
                begins.append(length)
                parts.append(end)
            parts.append(ids)
            length += len(ids) + piece.starts
        # In a byte, end of text is a 0 until `Tokens` puts it in its place.
        return np.concatenate(parts, dtype=self.dtype, casting="unsafe"), np.array(begins, dtype=np.int64)


def _smallest_type(tokenizer: Tokenizer) -> str:
    """What holds every id but that of end of text."""
    largest = len(tokenizer) - 1
    if largest == tokenizer.eos_token_id:
        largest -= 1
    return np.min_scalar_type(largest).name


def _size(piece: Piece) -> int:
    return len(piece.data)


def _write_at(place: tuple[int, int, np.ndarray]) -> None:
    descriptor, offset, ids = place
    data = ids.view(np.uint8).data
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _digest(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
