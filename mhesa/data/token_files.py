"""The files that a tokenised corpus is kept in: written on all cores, read through memory maps."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import IO

import numpy as np

from mhesa.data.holdout import Piece
from mhesa.data.parallel import batch_by_size, map_ordered
from mhesa.tokenizers.base import Tokenizer

TOKENS = "tokens.bin"
STARTS = "document_starts.bin"
HELD_OUT = "held_out.bin"
FACTS = "facts.json"
# Bytes of held-out text that are kept to measure on; the rest is only kept from training.
MEASURED_BYTES = 1 << 21
BATCH_BYTES = 1 << 22
READS_BETWEEN_RELEASES = 256


@dataclass(kw_only=True)
class Facts:
    """Counts of a corpus, saved with its tokens.

    Args:
        documents: number of all documents.
        training_bytes, training_tokens: size of the text that is trained on; every document counts one
            end-of-text token.
        held_out_bytes: size of the text that is held out.
        sha256: digest of the source, see `Source`.
    """

    documents: int = 0
    training_bytes: int = 0
    training_tokens: int = 0
    held_out_bytes: int = 0
    sha256: str


class Tokens:
    """Token ids in a file: `tokens[start:stop]` is an int64 copy of those, `(stop - start,)`.

    The file is mapped, so only the pages that are read take memory; they are released every few reads, or a
    long run would hold the whole file.

    A second file says where documents start, which is where the end-of-text tokens are. Their id need not fit
    the type of the others, so bytes take one byte each.

    Args:
        folder: folder of both files.
        dtype: type of the ids.
        eos_token_id: the token that every document starts with.
    """

    def __init__(self, folder: Path, dtype: str, eos_token_id: int) -> None:
        self._maps: list[mmap.mmap] = []
        self._ids = self._map(folder / TOKENS, dtype)
        self._document_starts = self._map(folder / STARTS, "int64")
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
        first, last = np.searchsorted(self._document_starts, (start, stop))
        ids[self._document_starts[first:last] - start] = self._eos_token_id
        return ids

    def _map(self, path: Path, dtype: str) -> np.ndarray:
        with path.open("rb") as file:
            self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return np.frombuffer(self._maps[-1], dtype=dtype)

    def _release(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            for memory in self._maps:
                memory.madvise(mmap.MADV_DONTNEED)


class TokenWriter:
    """Tokenises the pieces of a corpus on all cores, and writes its files.

    Args:
        folder: folder to write the files to.
        tokenizer: makes ids of text.
        is_measured: decides by a held-out piece's rank whether it is kept to measure on.
        sha256: digest of the source.
    """

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, is_measured: Callable[[float], bool], sha256: str
    ) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.is_measured = is_measured
        self.dtype = _smallest_type(tokenizer)
        self.facts = Facts(sha256=sha256)
        self._last_document = -1
        self._lowest_rank = 1.0
        self._measured: list[bytearray] = []
        self._measured_bytes = 0

    def write(self, pieces: Iterable[Piece]) -> None:
        """Write the tokens of the training pieces, and keep some of the others to measure on."""
        training = (piece for piece in pieces if self._count(piece))
        batches = batch_by_size(training, lambda piece: len(piece.data), BATCH_BYTES)
        encoded = map_ordered(self._encode, batches)
        with (
            (self.folder / TOKENS).open("wb", buffering=0) as tokens,
            (self.folder / STARTS).open("wb") as starts,
        ):
            for _ in map_ordered(_write_at, self._places(tokens, starts, encoded)):
                pass

    def finish(self) -> None:
        """Write the text to measure on, and the counts."""
        (self.folder / HELD_OUT).write_bytes(b"".join(self._measured))
        lengths = [len(document) for document in self._measured]
        saved = {"facts": asdict(self.facts), "dtype": self.dtype, "held_out_lengths": lengths}
        (self.folder / FACTS).write_text(json.dumps(saved))

    def _places(
        self, tokens: FileIO, starts: IO[bytes], encoded: Iterable[tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """Each batch's ids and where in the file they go, so that several threads can write."""
        for ids, first in encoded:
            place = self.facts.training_tokens
            starts.write((place + first).tobytes())
            yield tokens.fileno(), place * ids.itemsize, ids
            self.facts.training_tokens += len(ids)

    def _count(self, piece: Piece) -> bool:
        """Count a piece; whether it is trained on."""
        self.facts.documents += piece.document != self._last_document
        self._last_document = piece.document
        self._lowest_rank = min(self._lowest_rank, piece.rank)
        if not piece.held_out:
            self.facts.training_bytes += len(piece.data)
            return True
        self.facts.held_out_bytes += len(piece.data)
        if self._is_measured(piece.rank):
            if piece.starts or not self._measured:
                self._measured.append(bytearray())
            self._measured[-1] += piece.data
            self._measured_bytes += len(piece.data)
        return False

    def _is_measured(self, rank: float) -> bool:
        if self._measured_bytes >= 2 * MEASURED_BYTES:
            return False
        return not self._measured or rank <= self._lowest_rank or self.is_measured(rank)

    def _encode(self, batch: list[Piece]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a batch, and the places among them where documents start."""
        end = np.array([self.tokenizer.eos_token_id])
        parts, starts, length = [], [], 0
        encoded = self.tokenizer.encode_batch([piece.data for piece in batch])
        for piece, ids in zip(batch, encoded, strict=True):
            if piece.starts:
                starts.append(length)
                parts.append(end)
            parts.append(ids)
            length += len(ids) + piece.starts
        # An end of text that does not fit the type is written as some other id; `Tokens` replaces it.
        return np.concatenate(parts, dtype=self.dtype, casting="unsafe"), np.array(starts, dtype=np.int64)


def _smallest_type(tokenizer: Tokenizer) -> str:
    """The smallest type for every id except that of end of text."""
    largest = len(tokenizer) - 1
    if largest == tokenizer.eos_token_id:
        largest -= 1
    return np.min_scalar_type(largest).name


def _write_at(place: tuple[int, int, np.ndarray]) -> None:
    descriptor, offset, ids = place
    data = ids.view(np.uint8).data
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
