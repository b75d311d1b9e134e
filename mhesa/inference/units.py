"""Surprisal of words, characters, sentences and tokens, with the columns that studies of reading use."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import regex
import torch

from mhesa.errors import InputError
from mhesa.inference.lines import as_text, character_starts
from mhesa.inference.scoring import Batch, bits_by_byte, score
from mhesa.inference.session import Reader
from mhesa.inference.statistics import STATISTICS, Statistic, boundary_bits

if TYPE_CHECKING:
    import pandas

# The longest unit that is held, in bytes; a longer one is cut.
LONGEST = 1 << 16
WHITESPACE = (b" ", b"\t", b"\n", b"\r", b"\v", b"\f")

# Unicode knows which characters end a sentence, and which close a quotation or a bracket. Those of ASCII end
# it before whitespace, others anywhere, and so does an empty line. No part of a text is searched twice.
TERMINATOR = regex.compile(r"[\p{STerm}…]")
SENTENCE_END = (
    r"(?V1)(?<![\p{STerm}…])[\p{STerm}…]++[\p{Pe}\p{Pf}\"']*+(?=\s)"
    r"|[\p{STerm}--[!-~]]++[\p{Pe}\p{Pf}]*+|(?=\n[^\S\n]*+\n)"
)

# Finds the complete units in a text, as where each begins and ends; with its flag no more text will follow.
Segmenter = Callable[[str, bool], list[tuple[int, int]]]


@dataclass(frozen=True)
class UnitSurprisal:
    """The surprisal of a unit of a text.

    The whitespace before a unit counts as part of it, because the tokens of most vocabularies begin with it.

    Args:
        source: the name of the text.
        number: which unit of the text it is, from 1.
        offset: where it begins, in bytes.
        size: size in bytes.
        text: text of the unit, without the whitespace around it.
        surprisal: surprisal of all its tokens, in bits or nats.
        entropy: the surprisal that the model expected of the token that the unit begins in.
        rank: rank of that token: 1 if none was likelier.
        before: the surprisal of the units before it, the nearest first; `None` where there is none.
    """

    source: str
    number: int
    offset: int
    size: int
    text: str
    surprisal: float
    entropy: float
    rank: int
    before: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Columns:
    """The columns of a table of units.

    Args:
        unit: `bits` or `nats`.
        spill: number of preceding units that each have a column.
        correct: count the end of a word with the word, and not with the next one (Pimentel and Meister, "How
            to Compute the Probability of a Word", 2024; Oh and Schuler, "Leading Whitespaces of Language
            Models' Subword Vocabulary Pose a Confound for Calculating Word Probabilities", 2024).
        skip_first: leave out the first unit of each text, which has no context.

    Raises:
        InputError: another unit, or a negative number.
    """

    unit: str = "bits"
    spill: int = 0
    correct: bool = False
    skip_first: bool = False

    def __post_init__(self) -> None:
        if self.unit not in ("bits", "nats"):
            raise InputError(f"unit must be bits or nats, not {self.unit}")
        if self.spill < 0:
            raise InputError(f"spill must be at least 0, not {self.spill}")

    @property
    def factor(self) -> float:
        """What bits are multiplied by."""
        return math.log(2) if self.unit == "nats" else 1.0

    @property
    def names(self) -> list[str]:
        """The columns' names."""
        before = [f"{self.unit}_{place}" for place in range(1, self.spill + 1)]
        return ["source", "number", "offset", "bytes", "text", self.unit, "entropy", "rank", *before]

    def as_dict(self, row: UnitSurprisal) -> dict[str, object]:
        """A row by the columns' names."""
        values = [value for name, value in asdict(row).items() if name != "before"]
        return dict(zip(self.names, [*values, *row.before], strict=True))

    def statistics(self, reader: Reader) -> Mapping[str, Statistic]:
        """What has to be computed of each token."""
        return STATISTICS | ({"boundary": boundary_bits(word_starts(reader))} if self.correct else {})


def word_starts(reader: Reader) -> torch.Tensor:
    """The ids of what can follow a word: tokens that begin with whitespace, and the end of text, `(ids,)`."""
    starts = [index for index, token in enumerate(reader.token_bytes) if token[:1] in WHITESPACE]
    return torch.tensor([*starts, reader.tokenizer.eos_token_id], device=reader.decoder.device)


def find_words(text: str, is_last: bool) -> list[tuple[int, int]]:
    """Words: runs of characters that are not whitespace.

    >>> find_words("one two ", False)
    [(0, 3), (4, 7)]
    """
    return [span for span in _spans(r"\S+", text) if is_last or span[1] < len(text)]


def find_characters(text: str, is_last: bool) -> list[tuple[int, int]]:
    """Characters with their accents: Unicode's grapheme clusters."""
    found = _spans(r"\X", text)
    return found if is_last else found[:-1]


def find_sentences(text: str, is_last: bool) -> list[tuple[int, int]]:
    """Sentences: text up to a full stop, a question mark or the like, or up to an empty line.

    >>> find_sentences("One. Two?  Thr", False)
    [(0, 4), (5, 9)]
    """
    found: list[tuple[int, int]] = []
    start = _next_word(text, 0)
    for place, end in _spans(SENTENCE_END, text):
        # The first character does not end a sentence by itself.
        if start is not None and (place > start or (end > start + 1 and TERMINATOR.match(text, start + 1))):
            found.append((start, end))
            start = _next_word(text, end)
    if is_last and start is not None:
        found.append((start, len(text.rstrip())))
    return found


def _next_word(text: str, place: int) -> int | None:
    """Where the next character is that is no whitespace; `None` if there is none."""
    found = regex.compile(r"\S").search(text, place)
    return None if found is None else found.start()


def _spans(pattern: str, text: str) -> list[tuple[int, int]]:
    return [match.span() for match in regex.finditer(pattern, text)]


class GivenWords:
    """Finds the words of a given segmentation, which with whitespace between them must make up the text.

    >>> GivenWords(["do", "n't"])("don't", True)
    [(0, 2), (2, 5)]
    """

    def __init__(self, words: Iterable[str]) -> None:
        self._words = iter(words)
        self._next = next(self._words, None)
        self._number = 1

    def __call__(self, text: str, is_last: bool) -> list[tuple[int, int]]:
        """The words that are in the text.

        Raises:
            InputError: the text goes on otherwise.
        """
        found: list[tuple[int, int]] = []
        place = 0
        while True:
            while text[place : place + 1].isspace():
                place += 1
            word = self._next
            rest = text[place : place + len(word or " ")]
            if not rest and not (is_last and word is not None):
                return found
            if word is None or not text.startswith(word, place):
                if word is not None and not is_last and word.startswith(rest):
                    return found
                expected = "the words end" if word is None else f"word {self._number} is {word!r}"
                goes_on = f"goes on with {rest[:40]!r}" if rest else "ends"
                raise InputError(f"{expected}, but the text {goes_on}")
            found.append((place, place + len(word)))
            place += len(word)
            self._next, self._number = next(self._words, None), self._number + 1


UNITS: dict[str, Segmenter] = {
    "word": find_words,
    "character": find_characters,
    "sentence": find_sentences,
}
# Tokens are units too, and need no segmenter.
TOKEN = "token"


def _token_of_byte(sizes: np.ndarray, length: int) -> np.ndarray:
    """Which token holds each byte of a text, `(length,)`; -1 if there are no tokens.

    `sizes` are the bytes of each token, `(tokens,)`, scaled if they do not add up to the text.
    """
    ends = np.cumsum(sizes) * (length / max(sizes.sum(), 1))
    return np.searchsorted(ends, np.arange(length), side="right").clip(max=len(sizes) - 1)


@dataclass
class _Held:
    """Text whose units are not complete yet, and what is known of each of its bytes."""

    text: bytes = b""
    bits: np.ndarray = field(default_factory=lambda: np.zeros(0))
    # For each byte, the statistics of the token that holds it, by name.
    of_token: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, batch: Batch) -> None:
        self.text += b"".join(block.text for block in batch.blocks)
        self.bits = np.append(self.bits, bits_by_byte(batch))
        # Appended once for all blocks: a block may be a line, and what is held long.
        blocks = [(columns, _token_of_byte(sizes, len(text))) for text, sizes, columns in batch.by_block()]
        for name in batch.columns:
            # The zero is for bytes without a token.
            parts = [np.append(columns[name], 0.0)[tokens] for columns, tokens in blocks]
            self.of_token[name] = np.concatenate([self.of_token.get(name, np.zeros(0)), *parts])

    def of(self, name: str, place: int) -> float:
        """A statistic of the token that holds a byte; 0 if it was not measured."""
        return float(self.of_token[name][place]) if name in self.of_token else 0.0

    def drop(self, size: int) -> None:
        if not size:
            return
        self.text, self.bits = self.text[size:], self.bits[size:]
        self.of_token = {name: values[size:] for name, values in self.of_token.items()}


class _Rows:
    """Numbers the units of a text, and makes rows of a table of them."""

    def __init__(self, source: str, columns: Columns) -> None:
        self.source, self.columns, self.number = source, columns, 0
        self._before: deque[float | None] = deque([None] * columns.spill, columns.spill)

    def add(
        self, offset: int, size: int, text: bytes, bits: float, entropy: float, rank: float
    ) -> list[UnitSurprisal]:
        """The row of the next unit, or none if it is left out."""
        self.number += 1
        if self.number == 1 and self.columns.skip_first:
            self._before.appendleft(None)
            return []
        surprisal, entropy = bits * self.columns.factor, entropy * self.columns.factor
        shown, before = text.decode("utf-8", "replace"), tuple(self._before)
        self._before.appendleft(surprisal)
        return [
            UnitSurprisal(
                self.source, self.number, offset, size, shown, surprisal, entropy, int(rank), before
            )
        ]


class UnitReader:
    """Finds the units of the text `source` as it arrives, in memory that does not grow with its length."""

    def __init__(self, source: str, segmenter: Segmenter, columns: Columns | None = None) -> None:
        self._segmenter, self._rows = segmenter, _Rows(source, columns or Columns())
        self._held, self._offset = _Held(), 0
        # Surprisal that the next unit has besides that of the bytes that are held: of whitespace that was
        # dropped, less, with `correct`, that of the boundary that the last unit ended with.
        self._pending = 0.0

    def add(self, batch: Batch) -> list[UnitSurprisal]:
        """The units that are complete with a batch of `score`; one without blocks is the end of the text."""
        held, is_end = self._held, not batch.blocks
        held.add(batch)
        # At its end nothing but the end of text can follow.
        after = float(batch.columns["boundary"][0]) if is_end and self._rows.columns.correct else 0.0
        found = self._take(is_end, after)
        if len(held.text) > LONGEST:
            # The whitespace before a unit counts as part of it, but need not be held.
            self._drop_but_charge(len(held.text) - len(held.text.lstrip()))
        return found if len(held.text) <= LONGEST else found + self._take(True, after)

    def _take(self, is_last: bool, after: float) -> list[UnitSurprisal]:
        """The units that are complete, all with `is_last`; `after`: surprisal of the boundary at the end."""
        held, rows, text = self._held, self._rows, as_text(self._held.text)
        starts = character_starts(text)
        found: list[UnitSurprisal] = []
        paid = 0
        for span in self._segmenter(text, is_last):
            start, end = int(starts[span[0]]), int(starts[span[1]])
            cost = self._pending + float(held.bits[paid:end].sum())
            if rows.columns.correct:
                boundary = held.of_token["boundary"]
                # Counted with this unit, and not with the next.
                end_of_word = float(boundary[end]) if end < len(boundary) else after
                cost, self._pending = cost + end_of_word, -end_of_word
            else:
                self._pending = 0.0
            of_token = held.of("entropy", start), held.of("rank", start)
            found += rows.add(self._offset + start, end - start, held.text[start:end], cost, *of_token)
            paid = end
        held.drop(paid)
        self._offset += paid
        return found

    def _drop_but_charge(self, size: int) -> None:
        """Drop held bytes, and charge their surprisal to the next unit."""
        self._pending += float(self._held.bits[:size].sum())
        self._held.drop(size)
        self._offset += size


def read_units(
    source: str, batches: Iterable[Batch], segmenter: Segmenter, columns: Columns | None = None
) -> Iterator[UnitSurprisal]:
    """The units of the text `source` as it arrives.

    `batches` are what `score` yields, with the statistics of `Columns.statistics`, and with its end.
    """
    units = UnitReader(source, segmenter, columns)
    for batch in batches:
        yield from units.add(batch)


def token_units(
    source: str, batches: Iterable[Batch], columns: Columns | None = None
) -> Iterator[UnitSurprisal]:
    """The tokens of a text as it arrives, with their whitespace; arguments as `read_units` takes them."""
    rows, offset = _Rows(source, columns or Columns()), 0
    for batch in batches:
        for text, sizes, values in batch.by_block():
            starts = np.cumsum(sizes) - sizes
            measured = (values[name].tolist() for name in ("bits", "entropy", "rank"))
            for start, size, *found in zip(starts.tolist(), sizes.tolist(), *measured, strict=True):
                yield from rows.add(offset + start, size, text[start : start + size], *found)
            offset += len(text)


def surprisal_table(
    reader: Reader,
    text: str,
    *,
    by: str = "word",
    unit: str = "bits",
    spill: int = 0,
    correct: bool = False,
    skip_first: bool = False,
    words: Sequence[str] | None = None,
) -> list[UnitSurprisal]:
    """The surprisal of every word, character, sentence or token of a text, as `mhesa score --by word` has it.

    Args:
        reader: the model and its tokenizer.
        text: the text.
        by: `word`, `character`, `sentence` or `token`.
        unit, spill, correct, skip_first: see `Columns`.
        words: a segmentation in place of whitespace; see `GivenWords`.

    Raises:
        InputError: an argument is none of those above, or the words are not those of the text.

    >>> from mhesa import GatedExponentialSmoothingLM
    >>> from mhesa.tokenizers import Bytes
    >>> model = GatedExponentialSmoothingLM(num_tokens=257, dim=8, depth=1, heads=1, dim_mhesa=4)
    >>> rows = surprisal_table(Reader(model, Bytes()), "Once upon a time", spill=1)
    >>> [(row.text, row.offset) for row in rows], rows[1].before == (rows[0].surprisal,)
    ([('Once', 0), ('upon', 5), ('a', 10), ('time', 12)], True)
    """
    if by not in (*UNITS, TOKEN):
        raise InputError(f"by must be {', '.join([*UNITS, TOKEN])}, not {by}")
    if by != "word" and (correct or words is not None):
        raise InputError(f"{'correct' if correct else 'words'} needs by='word'")
    columns = Columns(unit, spill, correct, skip_first)
    data = [text.encode("utf-8", "surrogateescape")]
    batches = score(reader, data, statistics=columns.statistics(reader), with_end=True)
    if by == TOKEN:
        return list(token_units("text", batches, columns))
    segmenter = UNITS[by] if words is None else GivenWords(words)
    return list(read_units("text", batches, segmenter, columns))


def data_frame(rows: Sequence[UnitSurprisal], unit: str = "bits") -> pandas.DataFrame:
    """The rows of `surprisal_table` as pandas has a table; `unit` is that of their surprisal.

    Raises:
        InputError: pandas is not there.
    """
    try:
        import pandas
    except ImportError as error:
        raise InputError("a data frame needs pandas: pip install pandas") from error
    columns = Columns(unit, spill=len(rows[0].before) if rows else 0)
    table: Any = [columns.as_dict(row) for row in rows]
    return pandas.DataFrame(table, columns=columns.names)
