"""What the commands share: options, tables, progress bars, printing text as it is written."""

from __future__ import annotations

import codecs
import inspect
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer
from rich.console import Console
from rich.table import Table

from mhesa.errors import InputError
from mhesa.model.config import ModelSizes
from mhesa.model.loading import load, read_config
from mhesa.settings import Setting, settings_of

if TYPE_CHECKING:
    from mhesa.inference.session import Reader

Command = TypeVar("Command", bound=Callable[..., Any])
errors = Console(stderr=True)


def _check_folder(folder: Path) -> Path:
    """Refuse a folder without a model before torch is imported, which takes seconds."""
    read_config(folder)
    return folder


def setting(settings: type, name: str) -> Setting:
    """The field of that name of a settings class."""
    return next(found for found in settings_of(settings) if found.name == name)


def option(found: Setting, *, name: str | None = None, default: Any = MISSING) -> inspect.Parameter:
    """The option of a setting; its name and default are the setting's if not given."""
    name, doc = name or found.name, found.doc
    default = found.default if default is MISSING else default
    required = default is MISSING
    choices = "|".join(doc.range.choices) if doc.range else ""
    made = typer.Option(
        *([f"--{name.replace('_', '-')}"] if found.type is bool else []),
        help=f"{doc.text} [required]" if required else doc.text,
        metavar=doc.metavar or choices or None,
        rich_help_panel=doc.panel or None,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None if required else default,
        annotation=Annotated[found.hint, made],
    )


def options_of(settings: type, leave_out: Collection[str] = (), **defaults: Any) -> list[inspect.Parameter]:
    """An option for each setting of a class; `defaults` are those that differ from the class's."""
    return [
        option(found, default=defaults.get(found.name, MISSING))
        for found in settings_of(settings)
        if found.name not in leave_out
    ]


def with_options(*options: inspect.Parameter) -> Callable[[Command], Command]:
    """Give a command further options, which it receives as keyword arguments.

    In `--help` they stand between its own positional and its own keyword-only parameters.
    """

    def decorate(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)
        first: list[inspect.Parameter] = []
        last: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.kind is not parameter.VAR_KEYWORD:
                own = parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[parameter.name])
                (last if parameter.kind is parameter.KEYWORD_ONLY else first).append(own)
        signature = inspect.Signature([*first, *options, *last])
        command.__signature__ = signature  # type: ignore[attr-defined]  # inspect reads it
        return command

    return decorate


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Run = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a trained model.")]
Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder of a trained model.", callback=_check_folder)
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or xpu.")]
Backend = Annotated[str | None, typer.Option(help=setting(ModelSizes, "backend").doc.text)]
Precision = Annotated[
    str | None,
    typer.Option(metavar="fp32|bf16", help="Precision of the weights; as they were saved if omitted."),
]
Quantize = Annotated[
    str | None,
    typer.Option(metavar="int8", help="Hold weights in 8 bits: faster, less memory, slightly less exact."),
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

    precisions = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}
    if precision not in precisions:
        raise InputError(f"precision must be fp32 or bf16, not {precision}")
    model, tokenizer = load(folder, device=device, backend=backend)
    return Reader(model.to(dtype=precisions[precision]), tokenizer, quantize=quantize)


@contextmanager
def interruptible() -> Iterator[None]:
    """Exit on Ctrl-C without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(128 + signal.SIGINT) from None


def write(pieces: Iterable[bytes]) -> None:
    """Print UTF-8 text piece by piece, whole characters at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        sys.stdout.write(decoder.decode(piece))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True))
    sys.stdout.flush()


def new_table(first: str, *others: str) -> Table:
    """A table: the first column wraps, the others are aligned right."""
    table = Table(box=None, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table


def show(table: Table) -> None:
    """Print a table to standard output; if that is not a terminal, without wrapping."""
    output = Console()
    output.width = output.width if output.is_terminal else 1000
    output.print(table)


@contextmanager
def progress(description: str, total: int, hidden: bool = False) -> Iterator[Callable[[int], object]]:
    """A progress bar on standard error, if that is a terminal; call what it yields with each advance."""
    from rich.progress import Progress

    with Progress(console=errors, transient=True, disable=hidden or not errors.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.advance(task, amount)
