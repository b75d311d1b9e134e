"""An HTML page that colours text by surprisal, written while the text is scored."""

from __future__ import annotations

import codecs
import html
from collections.abc import Iterable, Iterator
from typing import TextIO

from mhesa.inference.scoring import Batch

# Bits per byte from which a character has the strongest colour.
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
    """Writes the page to a file.

    Args:
        file: an open text file.
    """

    def __init__(self, file: TextIO) -> None:
        self.file = file
        shades = range(STRONGEST + 1)
        rules = "".join(f".s{n} {{ background: rgba(var(--hot), {n / STRONGEST:.3f}); }}\n" for n in shades)
        legend = "".join(f'<i class="s{n}">{n}{"+" if n == STRONGEST else ""}</i>' for n in shades)
        file.write(f"{_HEAD}{rules}</style>\n<h1>Surprisal</h1>\n")
        file.write(f'<p class="legend">Bits per byte: {legend}</p>\n')

    def follow(self, name: str, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Write a text's batches, and yield them unchanged."""
        self.file.write(f"<h2>{html.escape(name)}</h2>\n<pre>")
        characters = codecs.getincrementaldecoder("utf-8")("replace")
        # Surprisal and length of the bytes since the last whole character; the shade, -1 before the first.
        pending_bits, pending_bytes, shade = 0.0, 0, -1
        for batch in batches:
            text, start = b"".join(block.text for block in batch.blocks), 0
            for bits, size in zip(batch.bits.tolist(), batch.sizes.tolist(), strict=True):
                shown = characters.decode(text[start : start + size])
                start, pending_bits, pending_bytes = start + size, pending_bits + bits, pending_bytes + size
                # A character of several tokens has the surprisal of all of them.
                if shown:
                    before, shade = shade, min(int(pending_bits / max(pending_bytes, 1)), STRONGEST)
                    if shade != before:
                        self.file.write(f'{"</span>" if before >= 0 else ""}<span class="s{shade}">')
                    self.file.write(_visible(shown))
                    pending_bits, pending_bytes = 0.0, 0
            yield batch
        self.file.write(_visible(characters.decode(b"", final=True)))
        self.file.write(f"{'</span>' if shade >= 0 else ''}</pre>\n")


def _visible(text: str) -> str:
    """Escaped text, with a replacement character for each unprintable one."""
    marked = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return html.escape(marked, quote=False)
