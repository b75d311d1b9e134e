"""Surprisal of text of any length as it arrives: by token, line or document."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from mhesa.inference.evaluation import surprisals
from mhesa.inference.parallel import ParallelDecoder
from mhesa.inference.session import Reader
from mhesa.tokenizers.stream import NEWLINE, Block, character_start, encode_stream

# How much of the beginning of a line or document is kept to be shown.
SHOWN_BYTES = 1 << 10


@dataclass(frozen=True)
class Scored:
    """The surprisal of a token, a line or a document.

    Args:
        source: the name of its file.
        number: which line, token or document of the file it is, from 1.
        offset: where in the file it begins, in bytes.
        bits: `-log2` of its probability given all that comes before it.
        size: in bytes.
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

    def as_dict(self) -> dict[str, str | int | float]:
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
    """Blocks of a text in a row, with the surprisal and the size of every token.

    Args:
        blocks: see `Block`.
        bits: of each token of all blocks, fp64 `(tokens,)`.
        sizes: of each token, in bytes, `(tokens,)`.
    """

    blocks: list[Block]
    bits: np.ndarray
    sizes: np.ndarray

    def by_block(self) -> Iterator[tuple[bytes, np.ndarray, np.ndarray]]:
        """The text of each block, with the bits and the sizes of its tokens."""
        ends = np.cumsum([len(block.ids) for block in self.blocks])[:-1]
        texts = (block.text for block in self.blocks)
        return zip(texts, np.split(self.bits, ends), np.split(self.sizes, ends), strict=True)


def score(reader: Reader, chunks: Iterable[bytes], decoder: ParallelDecoder | None = None) -> Iterator[Batch]:
    """Score a text from its start as it arrives, in memory that does not grow with its length.

    Args:
        reader: the model and the tokenizer.
        chunks: the text, cut anywhere.
        decoder: the model in several processes, all of which call this; that of the reader if omitted.
    """
    predictor = decoder or reader.decoder
    state = predictor.initial_state(1)
    # Every text follows an end-of-text token.
    last = torch.tensor([reader.tokenizer.eos_token_id])
    sizes = np.array([len(token) for token in reader.token_bytes])
    for blocks in encode_stream(reader.tokenizer, reader.token_bytes, chunks):
        ids = np.concatenate([block.ids for block in blocks]).astype(np.int64)
        read = torch.cat([last, torch.from_numpy(ids)])
        yield Batch(blocks, surprisals(predictor, read[:-1], read[1:], state), sizes[ids])
        last = read[-1:]


def share_by_line(text: bytes, bits: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Where a text's lines end, and the surprisal of each. A token that spans lines is shared out by bytes.

    Args:
        text: the bytes of some tokens.
        bits: the surprisal of each token, `(tokens,)`.
        sizes: the size of each token in bytes, `(tokens,)`. If they do not add up to the size of the text,
            because the vocabulary does not give it back, they are scaled to.

    Returns:
        The offset after the end of each line, int64 `(lines,)`, and its bits, fp64 `(lines,)`.

    >>> ends, costs = share_by_line(b"a\n\nb", bits=np.array([1.0, 4.0, 2.0]), sizes=np.array([1, 2, 1]))
    >>> ends.tolist(), costs.tolist()
    ([2, 3, 4], [3.0, 2.0, 2.0])
    """
    ends = np.flatnonzero(np.frombuffer(text, dtype=np.uint8) == NEWLINE) + 1
    if text and not text.endswith(b"\n"):
        ends = np.append(ends, len(text))
    if len(ends) == 1:
        return ends, bits.sum(keepdims=True)
    token_ends = np.concatenate([[0.0], np.cumsum(sizes, dtype=np.float64)])
    token_ends *= len(text) / max(token_ends[-1], 1.0)
    bits_before = np.concatenate([[0.0], np.cumsum(bits, dtype=np.float64)])
    return ends, np.diff(np.interp(ends, token_ends, bits_before), prepend=0.0)


def by_token(name: str, batches: Iterable[Batch]) -> Iterator[Scored]:
    """Every token of a text."""
    number, offset = 0, 0
    for batch in batches:
        for text, bits, sizes in batch.by_block():
            start = 0
            for cost, size in zip(bits.tolist(), sizes.tolist(), strict=True):
                number += 1
                yield Scored(name, number, offset + start, cost, size, text[start : start + size])
                start += size
            offset += len(text)


def by_line(name: str, batches: Iterable[Batch]) -> Iterator[Scored]:
    """Every line of a text, with its line end."""
    number, offset, size, bits, shown = 1, 0, 0, 0.0, b""
    for batch in batches:
        for block in batch.by_block():
            ends, costs = share_by_line(*block)
            starts = [0, *ends.tolist()]
            for start, end, cost in zip(starts, starts[1:], costs.tolist(), strict=False):
                part = block[0][start:end]
                size, bits = size + len(part), bits + cost
                shown += part[: SHOWN_BYTES - len(shown)]
                if part.endswith(b"\n"):
                    yield Scored(name, number, offset, bits, size, shown)
                    number, offset, size, bits, shown = number + 1, offset + size, 0, 0.0, b""
    if size:
        yield Scored(name, number, offset, bits, size, shown)


def by_document(name: str, batches: Iterable[Batch]) -> Iterator[Scored]:
    """A text as a whole."""
    size, bits, shown = 0, 0.0, b""
    for batch in batches:
        for block in batch.blocks:
            size += len(block.text)
            shown += block.text[: SHOWN_BYTES - len(shown)]
        bits += batch.bits.sum().item()
    yield Scored(name, 1, 0, bits, size, shown)


BY = {"line": by_line, "token": by_token, "document": by_document}


def most_surprising(scored: Iterable[Scored], count: int) -> list[Scored]:
    """The `count` items of the most bits, in falling order."""
    return heapq.nlargest(count, scored, key=lambda item: item.bits)
