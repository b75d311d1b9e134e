"""An HTML page that colours text by surprisal, written while the text is scored."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TextIO

from mhesa.inference.scoring import END, Batch
from mhesa.inference.units import Segmenter, UnitReader, UnitSurprisal, find_words
from mhesa.terminal import CONTROLS

# Bits per byte from which a word has the strongest colour.
STRONGEST = 8
# What a page cannot show, and carriage returns, which it would make line ends.
UNPRINTABLE = dict.fromkeys([*CONTROLS, ord("\r")], "\N{REPLACEMENT CHARACTER}")

_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="generator" content="mhesa">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Surprisal</title>
<style>
:root { color-scheme: light dark; --hot: 220, 60, 30; }
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
h2 { font-size: 1rem; margin: 2rem 0 .5rem; }
pre { font: 13px/1.6 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; }
pre { overflow-wrap: anywhere; }
span, i { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.legend i { font-style: normal; padding: 0 .6em; }
@media (prefers-color-scheme: dark) { :root { --hot: 170, 60, 0; } }
"""


class Heatmap:
    """Writes the page to an open text file; `segmenter` finds the units to colour, words if omitted.

    It shows what is measured of `mhesa.inference.statistics.STATISTICS`.
    """

    def __init__(self, file: TextIO, segmenter: Segmenter = find_words) -> None:
        self.file, self._segmenter = file, segmenter
        self._held: bytes | None = None
        # A carriage return that may be half of a line end.
        self._return = ""
        shades = range(STRONGEST + 1)
        rules = "".join(f".s{n} {{ background: rgba(var(--hot), {n / STRONGEST:.3f}); }}\n" for n in shades)
        legend = "".join(f'<i class="s{n}">{n}{"+" if n == STRONGEST else ""}</i>' for n in shades)
        file.write(f"{_HEAD}{rules}</style>\n<h1>Surprisal</h1>\n")
        file.write(f'<p class="legend">Bits per byte: {legend}</p>\n')

    def follow(self, name: str, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Write a text's batches, and yield them unchanged."""
        self.file.write(f"<h2>{html.escape(name)}</h2>\n<pre>\n")
        units, self._held, self._return, place = UnitReader(name, self._segmenter), b"", "", 0
        for batch in chain(batches, [END]):
            self._held += b"".join(block.text for block in batch.blocks)
            written = 0
            try:
                for unit in units.add(batch):
                    start, end = unit.offset - place, unit.offset - place + unit.size
                    self._write(self._held[written:start])
                    written = start
                    self._write_unit(unit, self._held[start:end])
                    written = end
            finally:
                self._held, place = self._held[written:], place + written
            if batch is not END:
                yield batch
        self.close()

    def close(self) -> None:
        """End the text that is followed, if it was not read to its end. The file stays open."""
        if self._held is not None:
            self._write(self._held)
            self.file.write(f"{self._return}</pre>\n".translate(UNPRINTABLE))
            self._held = None

    def _write_unit(self, unit: UnitSurprisal, data: bytes) -> None:
        shade = min(int(unit.surprisal / max(unit.size, 1)), STRONGEST)
        rest = f", rank {unit.rank}, entropy {unit.entropy:.2f} bits" if unit.rank else ""
        self.file.write(f'<span class="s{shade}" title="{unit.surprisal:.2f} bits{rest}">')
        self._write(data)
        self.file.write("</span>")

    def _write(self, data: bytes) -> None:
        """Write escaped text, with a replacement character for each one that is `UNPRINTABLE`."""
        text = self._return + data.decode("utf-8", "replace")
        # The next part may begin with the other half of a line end.
        self._return = "\r" if text.endswith("\r") else ""
        text = text.removesuffix("\r").replace("\r\n", "\n").translate(UNPRINTABLE)
        self.file.write(html.escape(text, quote=False))
