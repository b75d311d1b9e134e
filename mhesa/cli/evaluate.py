"""`mhesa eval`."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Annotated

import typer

from mhesa.cli.common import (
    Backend,
    Device,
    Folder,
    Precision,
    Quantize,
    TextField,
    new_table,
    progress,
    read_model,
    share,
    show,
)


def evaluate(
    folder: Folder,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help="Text files, folders, glob patterns, or - for standard input."
        ),
    ],
    text_field: TextField = "text",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures of all files together as JSON.")
    ] = False,
    precision: Precision = None,
    quantize: Quantize = None,
    device: Device = "cpu",
    backend: Backend = None,
) -> None:
    """Measure how well a model predicts text.

    Each file is read from start to end with one state; processes that torchrun starts share it. Figures: the
    loss in nats per token, bits per byte, the perplexity per token, and the numbers of tokens and bytes.

    Examples:

        mhesa eval runs/first unseen.txt

        mhesa eval runs/first texts/ --json

        mhesa eval runs/first unseen.txt --quantize int8

        torchrun --nproc-per-node 4 -m mhesa eval runs/first long.txt
    """
    from mhesa.data.sources import read_sources
    from mhesa.inference.evaluation import PredictionCost
    from mhesa.inference.evaluation import evaluate as score
    from mhesa.processes import check_same, processes, rank

    documents = read_sources(sources, text_field)
    reader = read_model(folder, precision=precision, quantize=quantize, device=device, backend=backend)
    if processes() > 1:
        check_same({"text": [sha256(document.data).hexdigest() for document in documents]})
    decoder = share(reader, quantize=quantize) or reader.decoder
    with progress("measuring", sum(len(document.data) for document in documents)) as advance:
        scores = [score(decoder, reader.tokenizer, [document], advance) for document in documents]
    if rank() > 0:
        return
    total = sum(scores, PredictionCost(0.0, 0, 0))
    if as_json:
        typer.echo(json.dumps(total.as_dict()))
        return
    table = new_table("file", "nats per token", "bits per byte", "perplexity", "tokens", "bytes")
    rows = [(document.name, part) for document, part in zip(documents, scores, strict=True)]
    for name, part in [*rows, ("all", total)] if len(rows) > 1 else rows:
        table.add_row(
            name,
            f"{part.loss:.4f}",
            f"{part.bits_per_byte:.4f}",
            f"{part.perplexity:.3f}",
            f"{part.tokens:,}",
            f"{part.bytes:,}",
        )
    show(table)
