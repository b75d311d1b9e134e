"""Surprisal of text of any length as it arrives: by token, line or document.

Surprisal itself is computed in `mhesa.inference.statistics`, on CPU by
`mhesa.inference.decoder.statistics_kernel`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from mhesa.inference.lines import Piece
from mhesa.inference.parallel_decoder import ParallelDecoder
from mhesa.inference.session import Reader
from mhesa.inference.statistics import BITS, Statistic, read_tokens
from mhesa.tokenizers.stream import Block, character_start, encode_stream

# How much of the beginning of a line or document is kept to be shown.
SHOWN_BYTES = 1 << 10


@dataclass(frozen=True)
class SpanSurprisal:
    """The surprisal of a token, a line or a document.

    Args:
        source: the name of its file.
        number: which line, token or document of the file it is, from 1.
        offset: where in the file it begins, in bytes.
        bits: `-log2` of its probability given all that comes before it.
        size: size in bytes.
        text: its first bytes, 1,024 at most.
    """

    source: str
    number: int
    offset: int
    bits: float
    size: int
    text: bytes = field(repr=False)

    @property
    def bits_per_byte(self) -> float:
        """Mean bits of a byte."""
        return self.bits / self.size if self.size else 0.0

    def as_dict(self) -> dict[str, object]:
        """The values under the names that they have in JSON."""
        # Without a part of a character at the end of a text that was cut.
        end = character_start(self.text, len(self.text) - 1) if self.size > len(self.text) else None
        return {
            "source": self.source,
            "number": self.number,
            "offset": self.offset,
            "bits": round(self.bits, 4),
            "bytes": self.size,
            "bits_per_byte": round(self.bits_per_byte, 4),
            "text": self.text[:end].decode("utf-8", "replace"),
        }


@dataclass(frozen=True)
class Batch:
    """Blocks of a text in a row, with statistics and the size of every token.

    Args:
        blocks: blocks of the text, see `Block`.
        columns: statistics of each token of all blocks by name, fp64 `(tokens,)` each; one is `bits`.
        sizes: bytes of the text that each token stands for, `(tokens,)`.
    """

    blocks: list[Block]
    columns: Mapping[str, np.ndarray]
    sizes: np.ndarray

    @property
    def bits(self) -> np.ndarray:
        """The surprisal of each token, fp64 `(tokens,)`."""
        return self.columns["bits"]

    def by_block(self) -> Iterator[tuple[bytes, np.ndarray, dict[str, np.ndarray]]]:
        """The text of each block, with the sizes and the statistics of its tokens."""
        start = 0
        for block in self.blocks:
            tokens = slice(start, start + len(block.ids))
            yield (
                block.text,
                self.sizes[tokens],
                {name: column[tokens] for name, column in self.columns.items()},
            )
            start = tokens.stop


# A batch without blocks is the end of a text.
END = Batch([], {"bits": np.zeros(0)}, np.zeros(0, dtype=np.int64))


class ScoredPiece(NamedTuple):
    """A line, or a part of a long one, and the surprisal of its bytes.

    Args:
        piece: where it is, and its text.
        bits: each token's surprisal, shared out over its bytes, fp64 `(bytes,)`.
    """

    piece: Piece
    bits: np.ndarray


def score(
    reader: Reader,
    chunks: Iterable[bytes],
    decoder: ParallelDecoder | None = None,
    statistics: Mapping[str, Statistic] = BITS,
    with_end: bool = False,
) -> Iterator[Batch]:
    """Score a text from its start as it arrives, in memory that does not grow with its length.

    Args:
        reader: the model and the tokenizer.
        chunks: the text, cut anywhere.
        decoder: the model in several processes, all of which call this; that of the reader if omitted.
        statistics: what to compute of each token's prediction; `bits` among them.
        with_end: give a last batch without blocks, of the end-of-text token that would come next.

    Raises:
        InputError: other statistics than bits are asked of several processes.
    """
    predictor = decoder or reader.decoder
    state = predictor.initial_state(1)
    # Every text follows an end-of-text token.
    last = end = torch.tensor([reader.tokenizer.eos_token_id])
    for blocks in encode_stream(reader.tokenizer, reader.token_bytes, chunks):
        ids = np.concatenate([block.ids for block in blocks]).astype(np.int64)
        read = torch.cat([last, torch.from_numpy(ids)])
        columns = read_tokens(predictor, read[:-1], read[1:], state, statistics)
        yield Batch(blocks, columns, np.concatenate([block.sizes for block in blocks]))
        last = read[-1:]
    if with_end:
        yield Batch([], read_tokens(predictor, last, end, state, statistics), np.zeros(1, dtype=np.int64))


def share_by_byte(values: np.ndarray, sizes: np.ndarray, length: int) -> np.ndarray:
    """Share out the surprisal of each token over its bytes, evenly.

    Args:
        values: value of each token, `(tokens,)`.
        sizes: bytes of the text that each token stands for, `(tokens,)`; scaled if they do not add up to it.
        length: bytes of the text.

    Returns:
        The share of each byte, fp64 `(length,)`.

    >>> share_by_byte(np.array([1.0, 4.0]), np.array([1, 2]), 3).tolist()
    [1.0, 2.0, 2.0]
    """
    if len(values) == length == sizes.sum() and (sizes == 1).all():
        return values
    token_ends = np.concatenate([[0.0], np.cumsum(sizes, dtype=np.float64)])
    token_ends *= length / max(token_ends[-1], 1.0)
    before = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    shares = np.interp(np.arange(length + 1), token_ends, before)
    # The first byte pays for tokens before it, which have no bytes.
    shares[0] = 0.0
    return np.diff(shares)


def line_pieces(batches: Iterable[Batch]) -> Iterator[ScoredPiece]:
    """The lines of a text, each in one or more pieces, with the surprisal of their bytes."""
    number, offset, is_first = 1, 0, True
    for batch in batches:
        bits, place = bits_by_byte(batch), 0
        for block in batch.blocks:
            text, start = block.text, 0
            while start < len(text):
                end = text.find(b"\n", start) + 1 or len(text)
                piece = Piece(number, offset + place + start, text[start:end], is_first)
                yield ScoredPiece(piece, bits[place + start : place + end])
                is_first = piece.is_last
                number, start = number + is_first, end
            place += len(text)
        offset += place


def bits_by_byte(batch: Batch) -> np.ndarray:
    """The surprisal of each byte of all blocks, fp64 `(bytes,)`."""
    # In one step where each token is a byte: a call for each line takes longer than its score.
    if (batch.sizes == 1).all() and all(len(block.ids) == len(block.text) for block in batch.blocks):
        return batch.bits
    shares = [share_by_byte(columns["bits"], sizes, len(text)) for text, sizes, columns in batch.by_block()]
    return np.concatenate([np.zeros(0), *shares])


def by_token(name: str, batches: Iterable[Batch]) -> Iterator[SpanSurprisal]:
    """Every token of a text."""
    number, offset = 0, 0
    for batch in batches:
        for text, sizes, columns in batch.by_block():
            start = 0
            for cost, size in zip(columns["bits"].tolist(), sizes.tolist(), strict=True):
                number += 1
                yield SpanSurprisal(name, number, offset + start, cost, size, text[start : start + size])
                start += size
            offset += len(text)


def by_document(name: str, batches: Iterable[Batch]) -> Iterator[SpanSurprisal]:
    """A text as a whole."""
    size, bits, shown = 0, 0.0, b""
    for batch in batches:
        for block in batch.blocks:
            size += len(block.text)
            shown += block.text[: SHOWN_BYTES - len(shown)]
        bits += batch.bits.sum().item()
    yield SpanSurprisal(name, 1, 0, bits, size, shown)


BY = {"token": by_token, "document": by_document}
