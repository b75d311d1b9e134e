"""A page that colours text by surprisal, written as the scores come."""

from __future__ import annotations

import codecs
import html
from collections.abc import Iterable, Iterator
from typing import TextIO

from mhesa.inference.scoring import Batch

# A character of so many bits per byte or more has the strongest colour.
STRONGEST = 8

_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Surprisal</title>
<style>
:root { color-scheme: light dark; --hot: 220, 60, 30; }
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
h2 { font-size: 1rem; margin: 2rem 0 .5rem; }
pre { font: 13px/1.6 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; }
pre { overflow-wrap: anywhere; }
.legend i { font-style: normal; padding: 0 .6em; }
@media (prefers-color-scheme: dark) { :root { --hot: 255, 110, 60; } }
"""


class Heatmap:
    """Writes the page.

    Args:
        file: where it goes.
    """

    def __init__(self, file: TextIO) -> None:
        self.file = file
        shades = range(STRONGEST + 1)
        rules = "".join(f".s{n} {{ background: rgba(var(--hot), {n / STRONGEST:.3f}); }}\n" for n in shades)
        legend = "".join(f'<i class="s{n}">{n}{"+" if n == STRONGEST else ""}</i>' for n in shades)
        file.write(f"{_HEAD}{rules}</style>\n<h1>Surprisal</h1>\n")
        file.write(f'<p class="legend">Bits per byte: {legend}</p>\n')

    def follow(self, name: str, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Write a stream's text, and hand its scores on."""
        self.file.write(f"<h2>{html.escape(name)}</h2>\n<pre>")
        characters, held_bits, held_bytes, shade = (
            codecs.getincrementaldecoder("utf-8")("replace"),
            0.0,
            0,
            -1,
        )
        for batch in batches:
            text, start = b"".join(block.text for block in batch.blocks), 0
            for bits, size in zip(batch.bits.tolist(), batch.sizes.tolist(), strict=True):
                shown = characters.decode(text[start : start + size])
                start, held_bits, held_bytes = start + size, held_bits + bits, held_bytes + size
                # A character of several tokens has the surprisal of them all.
                if shown:
                    now = min(int(held_bits / max(held_bytes, 1)), STRONGEST)
                    if now != shade:
                        self.file.write(f'{"</span>" if shade >= 0 else ""}<span class="s{now}">')
                    self.file.write(_visible(shown))
                    held_bits, held_bytes, shade = 0.0, 0, now
            yield batch
        self.file.write(_visible(characters.decode(b"", final=True)))
        self.file.write(f"{'</span>' if shade >= 0 else ''}</pre>\n")


def _visible(text: str) -> str:
    """Text as a page shows it: no markup, and a sign where there is nothing to be seen."""
    marked = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return html.escape(marked, quote=False)
