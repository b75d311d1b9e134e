"""How `mhesa score` prints rows: as text, JSON or tab-separated values."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from mhesa.cli.common import stderr
from mhesa.terminal import say

if TYPE_CHECKING:
    from mhesa.inference.line_scores import FalseAlarms, LineSurprisal
    from mhesa.inference.log_reader import LogReader
    from mhesa.inference.scoring import SpanSurprisal
    from mhesa.inference.units import Columns, UnitSurprisal

# Characters of a text to print on one line.
SHOWN = 160
# How a terminal shows the most surprising part of a line: reversed, so that blanks stand out, too.
STRONG, PLAIN = "\033[1;7;31m", "\033[0m"

Row = TypeVar("Row")


class Output:
    """Prints rows.

    Args:
        as_json: print rows as lines of JSON.
        as_table: print rows as tab-separated values.
        columns: columns of the table of words and other units.
        with_score: print the score of lines in the place of their bits.
    """

    def __init__(self, as_json: bool, as_table: bool, columns: Columns, with_score: bool) -> None:
        self._as_json, self._as_table, self._columns = as_json, as_table, columns
        self._with_score = with_score
        self._is_terminal = sys.stdout.isatty()

    def header(self) -> None:
        """Print the names of the columns, if there are any."""
        if self._as_table:
            self._write("\t".join(self._columns.names))

    def show(self, row: SpanSurprisal | UnitSurprisal) -> None:
        """Print a row, at once."""
        from mhesa.inference.units import UnitSurprisal

        if isinstance(row, UnitSurprisal):
            self._write(self._unit(row))
        elif self._as_json:
            self._write(json.dumps(row.as_dict(), ensure_ascii=False))
        else:
            self._write(self._span(row))

    def _unit(self, row: UnitSurprisal) -> str:
        values = self._columns.as_dict(row)
        if self._as_json:
            return json.dumps(values, ensure_ascii=False)
        if self._as_table:
            return "\t".join(map(_cell, values.values()))
        figures = f"{row.surprisal:10.2f} {row.entropy:6.2f} {row.rank:5}"
        return f"{figures}  {_where(row)}  {one_line(row.text.encode())}"

    def _span(self, row: SpanSurprisal) -> str:
        from mhesa.inference.line_scores import LineSurprisal

        text, score = one_line(row.text), f"{row.bits:10.1f} {row.bits_per_byte:6.2f}"
        if isinstance(row, LineSurprisal):
            if self._with_score:
                score = f"{'!' if row.alarm else ' '}{row.score:9.1f} {row.bits_per_byte:6.2f}"
            if self._is_terminal and row.alarm is not False:
                text = _with_strong_span(row)
        return f"{score}  {_where(row)}  {text}"

    def _write(self, line: str) -> None:
        sys.stdout.write(line.encode("utf-8", "backslashreplace").decode() + "\n")
        sys.stdout.flush()


def _where(row: SpanSurprisal | UnitSurprisal) -> str:
    return f"{row.number}" if row.source == "-" else f"{row.source}:{row.number}"


def one_line(text: bytes) -> str:
    """The start of a text on one line, unprintable characters escaped."""
    line = text.decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")
    safe = _printable(line[: SHOWN + 1])
    return safe if len(safe) <= SHOWN else safe[: SHOWN - 1] + "…"


def _with_strong_span(row: LineSurprisal) -> str:
    """A line with its most surprising part marked, a line end too; of a long line what is around the part."""
    start, end = row.span
    parts = (row.text[:start], row.span_text, row.text[end:].removesuffix(b"\n").removesuffix(b"\r"))
    before, strong, after = (_printable(part.decode("utf-8", "replace")) for part in parts)
    if len(strong) > SHOWN // 2:
        strong = strong[: SHOWN // 2] + "…"
    room = SHOWN - len(strong)
    if start > len(row.text):
        # The part lies beyond what is kept of the line.
        before = before[: room // 2] + "…"
    elif len(before) > room:
        before = before[: room // 2] + "…" + before[-(room // 2) :]
    room = max(room - len(before), 0)
    if len(after) > room or row.size > len(row.text):
        after = after[:room] + "…"
    return f"{before}{STRONG}{strong}{PLAIN}{after}"


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6f}"
    if isinstance(value, str):
        return _printable(value.replace("\\", "\\\\"))
    return "" if value is None else str(value)


class Counts:
    """Counts rows and alarms, and says at the end what a reader of the rows would not see."""

    def __init__(self) -> None:
        self.rows = self.alarms = 0

    def of(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows, counted as they come."""
        for row in rows:
            self.rows += getattr(row, "size", 0) > 0
            self.alarms += bool(getattr(row, "alarm", False))
            yield row

    def report(self, log: LogReader | None, alarms: FalseAlarms | None) -> None:
        """Print on standard error what there is to say."""
        if not self.rows:
            say(stderr, "There was nothing to score.")
        if log is not None and log.without_key:
            say(stderr, f"{log.without_key:,} of {self.rows:,} lines have no key; they share a session.")
        if alarms is not None and alarms.rate * alarms.count < 1:
            needed = round(1 / alarms.rate)
            read = f"{alarms.count:,} were read"
            say(stderr, f"No line was marked: a threshold takes {needed:,} lines, and {read}.")
