"""What the commands share: arguments of the same name, tables, progress, text as it comes."""

from __future__ import annotations

import codecs
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mhesa.errors import InputError
from mhesa.model.loading import load, read_config

if TYPE_CHECKING:
    from mhesa.inference.session import Reader

errors = Console(stderr=True)


def _whole(folder: Path) -> Path:
    """Refuse what is no model's folder at once, before torch is imported."""
    read_config(folder)
    return folder


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Run = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a trained model.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a trained model.", callback=_whole)]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, xpu.")]
Backend = Annotated[str | None, typer.Option(help="The operator's backend; the best one if omitted.")]
Precision = Annotated[str | None, typer.Option(help="fp32 or bf16 weights; as they were saved if omitted.")]
Quantize = Annotated[
    str | None, typer.Option(help="int8: weights of 8 bits, faster still, a little less exact.")
]


def read_model(
    folder: Path, *, precision: str | None, quantize: str | None, device: str, backend: str | None
) -> Reader:
    """The model of a folder, ready to read and write text."""
    import torch

    from mhesa.inference.session import Reader

    precisions = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}
    if precision not in precisions:
        raise InputError(f"precision must be fp32 or bf16, not {precision}")
    model, tokenizer = load(folder, device=device, backend=backend)
    return Reader(model.to(dtype=precisions[precision]), tokenizer, quantize=quantize)


@contextmanager
def interruptible() -> Iterator[None]:
    """End quietly on Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(128 + signal.SIGINT) from None


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


def show(table: Table) -> None:
    """Print a table to standard output; whole, whatever its width, where that is no terminal."""
    output = Console()
    output.width = output.width if output.is_terminal else 1000
    output.print(table)


@contextmanager
def progress(description: str, total: int, hidden: bool = False) -> Iterator[Callable[[int], object]]:
    """A bar on standard error, where that is a terminal; what it gives is called with each advance."""
    with Progress(console=errors, transient=True, disable=hidden or not errors.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.advance(task, amount)
