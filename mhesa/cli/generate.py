"""`mhesa generate`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mhesa.cli.common import Backend, Device, Folder, Precision, Quantize, interruptible, read_model, write
from mhesa.errors import InputError


def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from standard input.")] = "",
    length: Annotated[int, typer.Option(help="Tokens to write at most.")] = 500,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token always.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the K likeliest tokens; 0 from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up P.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Draw from tokens at least P times as likely as the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens that were there already become less likely.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes the text repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be given several times.")
    ] = None,
    session: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Continue the text of this file, and save where it ends."),
    ] = None,
    echo: Annotated[bool, typer.Option(help="Print the prompt too.")] = True,
    precision: Precision = None,
    quantize: Quantize = None,
    device: Device = "cpu",
    backend: Backend = None,
) -> None:
    """Write text that continues a prompt, as it is made.

    With --session, a text goes on over several calls: what was read and written before is not read again,
    the file holds what the model remembers of it, a few kilobytes.

    Examples:

        mhesa generate runs/first --prompt 'def main('

        mhesa generate runs/first --prompt 'class ' --temperature 0.5 --stop 'class '

        head -50 story.txt | mhesa generate runs/mine --prompt - --length 2000 --seed 1

        mhesa generate runs/mine --session talk.session --prompt 'And then '
    """
    from mhesa.data import standard_input
    from mhesa.inference.sampling import Sampling, TokenSampler
    from mhesa.inference.scoring import pieces_of
    from mhesa.inference.session import Session

    if length < 0:
        raise InputError(f"length must be 0 or more, not {length}")
    if "" in (stop or []):
        raise InputError("a stop text must not be empty")
    if session is not None and not os.access(session.parent, os.W_OK):
        raise InputError(f"cannot write {session}: its folder is missing or read-only")
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    TokenSampler(sampling, seed)  # What it refuses is refused before anything is written.
    reader = read_model(folder, precision=precision, quantize=quantize, device=device, backend=backend)
    known = session is not None and session.exists()
    text = Session.load(session, reader) if session and known else Session(reader)
    given = standard_input() if prompt == "-" else [prompt.encode("utf-8", "surrogateescape")]
    with interruptible():
        try:
            for pieces in pieces_of(given):
                text.feed(b"".join(pieces))
                if echo:
                    write(pieces)
            write(
                part.encode()
                for part in text.stream(max_new_tokens=length, sampling=sampling, seed=seed, stop=stop or ())
            )
        finally:
            if session:
                text.save(session)
        sys.stdout.write("\n")
