"""`mhesa generate`."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from mhesa.atomic_io import check_outputs
from mhesa.cli.common import Backend, Device, Folder, Precision, Quantize, read_model
from mhesa.cli.options import option, with_options
from mhesa.errors import InputError
from mhesa.inference.sampling_settings import Sampling
from mhesa.terminal import escape_controls


@with_options(
    option(Sampling, "temperature", default=0.8),
    *(option(Sampling, field.name) for field in fields(Sampling)[1:] if field.name != "logit_bias"),
)
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from standard input.")] = "",
    length: Annotated[int, typer.Option(help="Maximum number of tokens to write.")] = 500,
    *,
    seed: Annotated[int | None, typer.Option(help="Makes the text repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop before this text; may be given several times.")
    ] = None,
    session: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Continue the text of this file, and save its new end there."),
    ] = None,
    echo: Annotated[bool, typer.Option(help="Print the prompt too.")] = True,
    precision: Precision = None,
    quantize: Quantize = None,
    device: Device = "cpu",
    backend: Backend = None,
    **sampling: Any,
) -> None:
    """Continue a prompt, and print the text while it is written.

    With --session, several calls write one text: the file holds the model's state, a few kilobytes, so that
    earlier text is not read again.

    Examples:

        mhesa generate runs/first --prompt 'def main('

        mhesa generate runs/first --prompt 'class ' --temperature 0.5 --stop 'class '

        head -50 story.txt | mhesa generate runs/mine --prompt - --length 2000 --seed 1

        mhesa generate runs/mine --session talk.session --prompt 'And then '
    """
    from mhesa.data.standard_input import standard_input
    from mhesa.inference.sampling import TokenSampler
    from mhesa.inference.session import Session

    if length < 0:
        raise InputError(f"length must be 0 or more, not {length}")
    if "" in (stop or []):
        raise InputError("a stop text must not be empty")
    if session is not None and not os.access(session.parent, os.W_OK):
        raise InputError(f"cannot write {session}: its folder is missing or read-only")
    read: list[Path | int] = [0] if prompt == "-" else []
    check_outputs([1], read)
    if session is not None:
        check_outputs([session], [*read, *folder.iterdir()])
    drawing = Sampling(**sampling)
    TokenSampler(drawing, seed)  # refuses a bad seed before anything is written
    reader = read_model(folder, precision=precision, quantize=quantize, device=device, backend=backend)
    given = standard_input() if prompt == "-" else [prompt.encode("utf-8", "surrogateescape")]
    safe = escape_controls if sys.stdout.isatty() else str
    opened = Session.open(session, reader) if session else nullcontext(Session(reader))
    with opened as text:
        text.feed(_echoed(given, safe) if echo else given)
        for part in text.stream(max_new_tokens=length, sampling=drawing, seed=seed, stop=stop or ()):
            print(safe(part), end="", flush=True)
    sys.stdout.write("\n")


def _echoed(parts: Iterable[bytes], safe: Callable[[str], str]) -> Iterator[bytes]:
    """The parts of a text, each printed as it comes."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for part in parts:
        print(safe(decoder.decode(part)), end="", flush=True)
        yield part
    print(safe(decoder.decode(b"", final=True)), end="", flush=True)
