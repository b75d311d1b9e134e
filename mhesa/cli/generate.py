"""`mhesa generate`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mhesa.cli.common import Backend, Device, Folder, write
from mhesa.errors import InputError


def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from standard input.")] = "",
    length: Annotated[int, typer.Option(help="Tokens to write at most.")] = 500,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token always.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the K likeliest tokens; 0 from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up P.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes the text repeatable.")] = None,
    stop: Annotated[str | None, typer.Option(help="End before this text.")] = None,
    echo: Annotated[bool, typer.Option(help="Print the prompt too.")] = True,
    device: Device = "cpu",
    backend: Backend = None,
) -> None:
    """Write text that continues a prompt, as it is made.

    Examples:

        mhesa generate runs/first --prompt 'def main('

        mhesa generate runs/first --prompt 'class ' --temperature 0.5 --stop 'class '

        head -50 story.txt | mhesa generate runs/mine --prompt - --length 2000 --seed 1
    """
    import torch

    from mhesa.generation import Sampling, stream, until
    from mhesa.hf.folder import load

    if length < 0:
        raise InputError(f"length must be 0 or more, not {length}")
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    model, tokenizer = load(folder, device=device, backend=backend)
    data = sys.stdin.buffer.read() if prompt == "-" else prompt.encode("utf-8", "surrogateescape")
    ids = tokenizer.encode_bytes(data).astype("int64")
    tokens = stream(
        model,
        torch.cat([torch.tensor([tokenizer.eos_token_id]), torch.from_numpy(ids)]),
        max_new_tokens=length,
        sampling=sampling,
        seed=seed,
        eos_token_id=tokenizer.eos_token_id,
    )
    pieces = (tokenizer.decode_bytes([token]) for token in tokens)
    write([data] if echo else [])
    write(until(pieces, (stop or "").encode("utf-8", "surrogateescape")))
    sys.stdout.write("\n")
