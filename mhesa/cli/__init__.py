"""The `mhesa` command: parse, call, print. One file a command."""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys
from typing import Annotated, Any

import typer

import mhesa
from mhesa.cli.common import stderr
from mhesa.cli.config import config
from mhesa.cli.evaluate import evaluate
from mhesa.cli.export import export
from mhesa.cli.generate import generate
from mhesa.cli.score import score
from mhesa.cli.serve import serve
from mhesa.cli.train import train
from mhesa.errors import InputError, TrainingError, reason
from mhesa.terminal import say

# Typer's error for a command line that cannot be parsed. It has no public name: old versions take it from
# click, new ones have a copy.
UsageError: type[Any] = typer.BadParameter.__mro__[1]
# Errors for a path that cannot be used, in place of a machine that fails.
WRONG_PATHS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)

app = typer.Typer(
    name="mhesa",
    help="Linear-time language models built on exponential smoothing: train, evaluate, write, score, serve.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train)
app.command()(generate)
app.command(name="eval")(evaluate)
app.command()(score)
app.command()(config)
app.command()(serve)
app.command()(export)


def main() -> None:
    """Run the command line; an error in what the user gave is one line and exit code 2."""
    if sys.stdout is None:
        # Standard output was closed: discard what is printed, and keep file descriptor 1 taken.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open for the whole run
    if isinstance(sys.stdout, io.TextIOWrapper):
        # In an encoding other than UTF-8, escape what it lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    # Searching what imports made for garbage takes a fifth of the time to start and to end. Commands turn it
    # on again before they work.
    gc.disable()
    atexit.register(gc.freeze)
    try:
        sys.exit(app(prog_name="mhesa", standalone_mode=False) or 0)
    except UsageError as error:
        _fail_usage(error)
    except (InputError, FloatingPointError) as error:
        _fail(str(error), 2)
    except TrainingError as error:
        _fail(str(error), 1)
    except OSError as error:
        # Discard what is still buffered: flushing it when Python exits would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"cannot go on: {where}{reason(error)}", 2 if isinstance(error, WRONG_PATHS) else 1)
    finally:
        gc.enable()
        # For a program that goes on: what a command kept out of collection may become garbage.
        gc.unfreeze()


def _fail_usage(error: Any) -> None:
    """End with one line about a command line that cannot be parsed."""
    message = error.format_message()
    if not message or "\n" in message:  # without arguments the help, which rich prints itself
        typer.echo(message, nl=False)
        sys.exit(2)
    end = "" if message[-1] in ".?" else "."
    command = error.ctx.command_path if error.ctx else "mhesa"
    _fail(f"{message[0].lower()}{message[1:]}{end} See {command} --help.", 2)


def _fail(message: str, code: int) -> None:
    say(stderr, f"Error: {message}", style="red")
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mhesa {mhesa.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Linear-time language models built on exponential smoothing."""
    # For the library that downloads hf:// sources.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
