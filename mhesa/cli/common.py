"""Shared by the commands: types of options, loading, tables, progress bars."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mhesa.errors import InputError
from mhesa.model.config import ModelSizes
from mhesa.model.loading import load, read_config
from mhesa.settings import setting_of
from mhesa.training.settings import TrainingSettings

if TYPE_CHECKING:
    from rich.table import Table

    from mhesa.inference.parallel_decoder import ParallelDecoder
    from mhesa.inference.session import Reader

stderr = Console(stderr=True)


def _check_folder(folder: Path) -> Path:
    """Refuse a folder without a model before torch is imported, which takes seconds."""
    read_config(folder)
    return folder


Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder of a trained model.", callback=_check_folder)
]
TextField = Annotated[
    str, typer.Option(metavar="NAME", help=setting_of(TrainingSettings, "text_field").doc.text)
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or xpu.")]
Backend = Annotated[str | None, typer.Option(help=setting_of(ModelSizes, "backend").doc.text)]
Precision = Annotated[
    str | None,
    typer.Option(metavar="fp32|bf16", help="Precision of the weights; as they were saved if omitted."),
]
Quantize = Annotated[
    str | None,
    typer.Option(metavar="int8", help="Multiply in 8 bits: faster, less memory, slightly less exact."),
]


def read_model(
    folder: Path, *, precision: str | None, quantize: str | None, device: str, backend: str | None
) -> Reader:
    """Load the model and tokenizer of a folder.

    Raises:
        InputError: an option is invalid, or the folder holds no model.
    """
    import torch

    from mhesa.inference.session import Reader
    from mhesa.processes import join_processes

    precisions = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}
    if precision not in precisions:
        raise InputError(f"precision must be fp32 or bf16, not {precision}")
    join_processes(device)
    model, tokenizer = load(folder, device=device, backend=backend)
    reader = Reader(model.to(dtype=precisions[precision]), tokenizer, quantize=quantize)
    resume_garbage_collection()
    return reader


def resume_garbage_collection() -> None:
    """Turn garbage collection on, leaving out the objects made so far: what was imported stays."""
    gc.freeze()
    gc.enable()


def share(reader: Reader, *, quantize: str | None) -> ParallelDecoder | None:
    """The model over all processes that `torchrun` started to read a text together; `None` for one process.

    Raises:
        InputError: the weights are quantised, which several processes cannot read with.
    """
    import torch.distributed as dist

    from mhesa.inference.parallel_decoder import ParallelDecoder
    from mhesa.processes import processes

    if processes() == 1:
        return None
    if quantize:
        raise InputError("quantize is for one process; leave it out, or start one process")
    assert dist.group.WORLD is not None
    return ParallelDecoder(reader.model, dist.group.WORLD)


def new_table(first: str, *others: str) -> Table:
    """A table: the first column wraps, the others are aligned right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table


def show(table: Table) -> None:
    """Print a table to standard output; if that is not a terminal, without wrapping."""
    output = Console(markup=False, emoji=False)
    output.width = output.width if output.is_terminal else 1000
    output.print(table)


@contextmanager
def progress(description: str, total: int, hidden: bool = False) -> Iterator[Callable[[int], object]]:
    """A progress bar on standard error, if that is a terminal; call what it yields with each advance."""
    from rich.progress import Progress

    with Progress(console=stderr, transient=True, disable=hidden or not stderr.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.advance(task, amount)
