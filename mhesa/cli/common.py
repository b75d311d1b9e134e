"""What the commands share: arguments of the same name, tables, progress, text as it comes."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

errors = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a trained model.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, xpu.")]
Backend = Annotated[str | None, typer.Option(help="The operator's backend; the best one if omitted.")]


def write(pieces: Iterable[bytes]) -> None:
    """Write text as it comes, whole characters at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        sys.stdout.write(decoder.decode(piece))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True))
    sys.stdout.flush()


def new_table(first: str, *others: str) -> Table:
    """A table whose first column folds and whose others are aligned right."""
    table = Table(box=None, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], object]]:
    """A bar on standard error, where that is a terminal; what it gives is called with each advance."""
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.advance(task, amount)
