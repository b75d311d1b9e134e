"""Tokenising a text that arrives in chunks, with the tokens that it would have as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mhesa.tokenizers.base import Tokenizer

# The longest block, in bytes.
BLOCK_BYTES = 1 << 16
NEWLINE = 0x0A


@dataclass(frozen=True)
class Block:
    """A part of a text at whose ends tokens end, too: a line, several, or a part of a long one.

    Args:
        text: bytes of the block.
        ids: tokens of the block, `(tokens,)`.
        sizes: bytes of the block that each token stands for, `(tokens,)`.
    """

    text: bytes
    ids: np.ndarray
    sizes: np.ndarray


def encode_stream(
    tokenizer: Tokenizer, token_bytes: Sequence[bytes], chunks: Iterable[bytes]
) -> Iterator[list[Block]]:
    r"""Tokenise a text as it arrives, in memory that does not grow with its length.

    A line is a block if no token can span its end, that is, if no token of the vocabulary holds its last
    byte followed by the next line's first. Where some token holds more than a line end, a line is therefore
    given out when the next one begins. A line longer than `BLOCK_BYTES` is cut between words.

    Args:
        tokenizer: makes ids of text.
        token_bytes: bytes of every token.
        chunks: the text, cut anywhere.

    Returns:
        Lists of blocks, in order, each as soon as its blocks are complete.

    >>> from mhesa.tokenizers import Bytes
    >>> blocks = encode_stream(Bytes(), [bytes([byte]) for byte in range(256)], [b"one\ntwo\nth", b"ree"])
    >>> [[block.text for block in together] for together in blocks]
    [[b'one\n', b'two\n'], [b'three']]
    """
    encoder = _Encoder(tokenizer, token_bytes)
    held = b""
    for chunk in chunks:
        held += chunk
        ends = encoder.block_ends(held)
        if ends:
            yield encoder.encode(held, ends)
            held = held[ends[-1] :]
    if held:
        ends = encoder.block_ends(held, is_last=True)
        yield encoder.encode(held, [*ends, len(held)] if ends[-1:] != [len(held)] else ends)


class _Encoder:
    """Cuts a text where no token can span the cut, and tokenises the blocks.

    A tokenizer splits text into words before it looks for tokens, by rules that may look at the character
    before or after. So a block is tokenised with both of these, whose tokens are then dropped. Where the
    bytes of the tokens are not those of the text, their tokens cannot be told apart, and a block is
    tokenised alone.
    """

    def __init__(self, tokenizer: Tokenizer, token_bytes: Sequence[bytes]) -> None:
        self.tokenizer, self.token_bytes = tokenizer, token_bytes
        # Whether some token holds one byte followed by the other, (256, 256).
        self.adjacent = np.zeros((256, 256), dtype=bool)
        for token in token_bytes:
            values = np.frombuffer(token, dtype=np.uint8)
            self.adjacent[values[:-1], values[1:]] = True
        self.only_bytes = not self.adjacent.any()
        # Whether no token holds a line end and something else.
        self.newline_is_alone = not (self.adjacent[NEWLINE].any() or self.adjacent[:, NEWLINE].any())
        self.before = b""

    def block_ends(self, text: bytes, is_last: bool = False) -> list[int]:
        """Where the complete blocks at the beginning of `text` end; more text may follow unless `is_last`."""
        ends, start, place = [], 0, 0
        while True:
            place = text.find(b"\n", place) + 1 or len(text) + 1
            while min(place, len(text) - 4 * (not is_last)) - start > BLOCK_BYTES:
                start = self._end_between_words(text, start)
                ends.append(start)
            if place > len(text):
                return ends
            if self._is_end(text, place, is_last):
                start = place
                ends.append(start)

    def _is_end(self, text: bytes, place: int, is_last: bool) -> bool:
        """Whether a block ends at `place`, after a line end."""
        if place == len(text):
            return self.newline_is_alone
        if self.adjacent[NEWLINE, text[place]]:
            return False
        # The next character must be complete: it is tokenised with the block.
        return is_last or self.newline_is_alone or place + character_length(text[place]) <= len(text)

    def _end_between_words(self, text: bytes, start: int) -> int:
        values = np.frombuffer(text[start : start + BLOCK_BYTES + 1], dtype=np.uint8)
        is_start = values[1:] & 0xC0 != 0x80
        ends = np.flatnonzero(is_start & ~self.adjacent[values[:-1], values[1:]])
        if not len(ends):
            return character_start(text, start + BLOCK_BYTES)
        return start + int(ends[-1]) + 1

    def encode(self, text: bytes, ends: list[int]) -> list[Block]:
        """The blocks of `text` that end at `ends`."""
        blocks = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        if self.only_bytes:
            encoded = self.tokenizer.encode_batch(blocks)
            return [self._block(block, ids) for block, ids in zip(blocks, encoded, strict=True)]
        before = [self.before, *map(_last_character, blocks)]
        after = [_first_character(text, end) for end in ends]
        self.before = before[-1]
        encoded = self.tokenizer.encode_batch(
            [b"".join(parts) for parts in zip(before, blocks, after, strict=False)]
        )
        found = map(self._ids_of, before, blocks, after, encoded)
        return [self._block(block, ids) for block, ids in zip(blocks, found, strict=True)]

    def _block(self, text: bytes, ids: np.ndarray) -> Block:
        return Block(text, ids, self.tokenizer.sizes_in_text(ids, text))

    def _ids_of(self, before: bytes, block: bytes, after: bytes, ids: np.ndarray) -> np.ndarray:
        """The tokens of a block among those of the block and the characters before and after it."""
        pieces = [self.token_bytes[token] for token in ids.tolist()]
        read, ends = b"".join(pieces), np.cumsum([0, *map(len, pieces)])
        # Some tokenizers put a space before every text.
        added = len(read) - len(before + block + after)
        start, end = len(before) + added if before else 0, ends[-1] - len(after)
        first, stop = np.searchsorted(ends, (start, end))
        is_exact = added in (0, 1) and read == b" " * added + before + block + after
        if not is_exact or ends[first] != start or ends[stop] != end:
            return self.tokenizer.encode_bytes(block)
        return ids[first:stop]


def character_start(data: bytes, end: int) -> int:
    """The last place up to `end` where a UTF-8 character begins, in any bytes at most 3 before it.

    >>> character_start("aé".encode(), 2)
    1
    """
    place = min(end, len(data))
    least = max(end - 3, 0)
    while least < place < len(data) and data[place] & 0xC0 == 0x80:
        place -= 1
    return place


def _first_character(data: bytes, start: int) -> bytes:
    """The character of UTF-8 that begins at `start`; none if it is not complete."""
    end = start + character_length(data[start]) if start < len(data) else start
    return data[start:end] if end <= len(data) else b""


def _last_character(data: bytes) -> bytes:
    return data[character_start(data, len(data) - 1) :]


def character_length(first: int) -> int:
    """The length of a UTF-8 character, in bytes, that begins with this byte."""
    return 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)
