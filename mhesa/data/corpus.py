"""Corpora: text from sources, a part of it held out, tokenised once and kept."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from mhesa.data.cache import cached_folder, digest
from mhesa.data.files import TEXT_FIELD, Document, File, OnRead
from mhesa.data.holdout import Holdout, Piece, PieceCounter, Selection
from mhesa.data.parallel import map_ordered
from mhesa.data.sources import find_files, no_text_in
from mhesa.data.token_files import FACTS, HELD_OUT, MEASURED_BYTES, Facts, Tokens, TokenWriter
from mhesa.errors import InputError
from mhesa.tokenizers.base import Tokenizer

# Counted up when the same text and tokenizer would give other files.
FORMAT = 4
# More text than this makes a vocabulary no better.
VOCABULARY_BYTES = 1 << 28
# File times have the resolution of the system's clock, 4 ms on Linux, or of the disk's format, 2 s on FAT: a
# change so soon after another one leaves the same times.
CLOCK_TICK_NS = 2 * 10**9


@dataclass(frozen=True)
class Corpus:
    """What a run trains on and what it is measured on.

    Args:
        facts: counts.
        tokens: `(tokens,)`, every document after an end-of-text token.
        held_out: text that is not trained on, about `MEASURED_BYTES` of it or all there is.
    """

    facts: Facts
    tokens: Tokens
    held_out: list[Document]

    @property
    def bytes_per_token(self) -> float:
        """The mean length of a training token, in bytes."""
        return self.facts.training_bytes / self.facts.training_tokens


class Source:
    """The files of a corpus, with all that decides its tokens except the tokenizer.

    Args:
        sources: files, folders and other sources, see `find_files`.
        text_field: the field of JSON lines or the column of parquet that holds the text.
        holdout: what is kept from training, see `Holdout`.

    Attributes:
        sha256: digest of the files and of these settings.
        size: bytes of the files.
        is_settled: whether it is known which pieces are held out, see `pieces`.

    Raises:
        InputError: a source is not there or cannot be read.
    """

    def __init__(
        self, sources: Sequence[str], *, text_field: str = TEXT_FIELD, holdout: str = "content:0.05"
    ) -> None:
        self.names = list(sources)
        self.files = find_files(sources)
        self.text_field = text_field
        self.holdout = Holdout.parse(holdout)
        self._selection = Selection(self.holdout.fraction)
        self.is_settled = self.holdout.method == "tail"
        self._versions = [file.version() for file in self.files]
        self._hashed_at = time.time_ns()
        self._digests = _digests(self.files)
        self.sha256 = digest([one for digests in self._digests for one in digests], text_field, holdout)
        self.size = sum(file.size for file in self.files)

    def pieces(self, on_read: OnRead = lambda size: None) -> Iterator[Piece]:
        """All text, piece by piece.

        After the last one, `is_settled` says whether the right ones were held out. If not, take them again:
        the first pass over a corpus that is small or repeats itself finds out which to hold out.
        """
        documents = self._documents(on_read)
        if self.holdout.method == "tail":
            yield from self.holdout.split(documents, self._text_size())
            return
        counter = PieceCounter(self.holdout, self._selection)
        for piece in self.holdout.split(documents, self.size, self._selection):
            counter.add(piece)
            yield piece
        better = counter.better()
        self.is_settled = better == self._selection
        self._selection = better

    def is_measured(self, rank: float) -> bool:
        """Whether a held-out piece of this rank is one of those, evenly picked, to measure on."""
        if self.holdout.method == "tail" or rank in self._selection.repeated:
            return True
        held_out = max(self.holdout.fraction * self.size, 1.0)
        return rank <= self._selection.threshold * min(1.0, MEASURED_BYTES / held_out)

    def training_text(self) -> Iterator[bytes]:
        """Training text to learn a vocabulary from: about `VOCABULARY_BYTES`, picked evenly from the corpus.

        Raises:
            InputError: a file changed while it was read.
        """
        while not self.is_settled:
            for _ in self.pieces():
                pass
        share = VOCABULARY_BYTES / max(self.size, 1)
        for piece in self.pieces():
            # The lowest ranks are held out, so take the highest.
            if not piece.held_out and piece.rank >= 1 - share:
                yield piece.data
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Raise `InputError` if a file was changed after `sha256` was computed."""
        for file, version, digests in zip(self.files, self._versions, self._digests, strict=True):
            *_, changed_at = version
            is_recent = changed_at > self._hashed_at - CLOCK_TICK_NS
            if file.version() != version or (is_recent and _digests([file]) != [digests]):
                raise _changed(file)

    def _documents(self, on_read: OnRead) -> Iterator[Iterator[bytes]]:
        """The chunks of each document. A file that grows is not followed, possibly without end."""
        for file, (_, _, size, *_) in zip(self.files, self._versions, strict=True):
            left = size

            def count(amount: int, file: File = file) -> None:
                nonlocal left
                left -= amount
                if left < 0:
                    raise _changed(file)
                on_read(amount)

            for _, chunks in file.documents(self.text_field, count):
                yield chunks

    def _text_size(self) -> int:
        return sum(len(chunk) for chunks in self._documents(lambda size: None) for chunk in chunks)


def _changed(file: File) -> InputError:
    return InputError(f"{file.name} changed while it was read; try again when it is complete, or give a copy")


def _digests(files: Sequence[File]) -> list[list[str]]:
    """The digests of each file's blocks, computed on all cores."""
    blocks = [[(file, start) for start in file.hash_blocks()] for file in files]
    digests = map_ordered(lambda block: block[0].sha256(block[1]), chain.from_iterable(blocks))
    return [list(islice(digests, len(one))) for one in blocks]


def open_corpus(source: Source, tokenizer: Tokenizer, on_read: OnRead = lambda size: None) -> Corpus:
    """The tokens of a corpus, from the cache or made now.

    Args:
        source: the text.
        tokenizer: makes ids of it.
        on_read: called with the bytes of files that were read, until they are tokenised.

    Raises:
        InputError: there is no text or too little to hold some out, a file changed while it was read, or
            the tokens cannot be written.
    """
    name = digest(FORMAT, source.sha256, tokenizer.fingerprint())[:32]
    folder = cached_folder(f"tokens/{name}", lambda folder: _tokenize(source, tokenizer, folder, on_read))
    saved = json.loads((folder / FACTS).read_text())
    with (folder / HELD_OUT).open("rb") as file:
        held_out = [Document("held out", file.read(length)) for length in saved["held_out_lengths"]]
    return Corpus(Facts(**saved["facts"]), Tokens(folder, saved["dtype"], tokenizer.eos_token_id), held_out)


def _tokenize(source: Source, tokenizer: Tokenizer, folder: Path, on_read: OnRead) -> None:
    writer = TokenWriter(folder, tokenizer, source.is_measured, source.sha256)
    writer.write(source.pieces(on_read))
    while not source.is_settled:
        writer = TokenWriter(folder, tokenizer, source.is_measured, source.sha256)
        writer.write(source.pieces())
    source.check_unchanged()
    facts = writer.facts
    if not facts.documents:
        raise InputError(no_text_in(source.names or ["the standard library"]))
    if not facts.training_bytes or not facts.held_out_bytes:
        what = "held out" if facts.training_bytes else "left to train on"
        size = f"{facts.training_bytes + facts.held_out_bytes:,}"
        raise InputError(f"of the {size} bytes nothing is {what}; give more text or another holdout")
    writer.finish()
