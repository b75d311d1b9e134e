"""`mhesa train`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from mhesa.cli.common import Backend, new_table
from mhesa.errors import InputError


def train(
    context_: typer.Context,
    out: Annotated[str, typer.Option(help="Folder for the model, its metrics and its checkpoints.")],
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE",
            help="Text files, folders, glob patterns, or - for standard input. "
            "None: the Python standard library's own source text.",
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Train for so long (3 if no budget is given).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Train for so many optimizer steps.")] = None,
    dim: Annotated[int, typer.Option(help="Width of the model.")] = 128,
    depth: Annotated[int, typer.Option(help="Blocks.")] = 4,
    heads: Annotated[int, typer.Option(help="Smoothing rates a block; divides --dim-mhesa.")] = 8,
    dim_mhesa: Annotated[int, typer.Option(help="Width of the smoothed values, and of the state.")] = 256,
    context: Annotated[int, typer.Option(help="Tokens a training window.")] = 256,
    batch_size: Annotated[
        int | None, typer.Option(help="Windows a step; enough to keep the device busy if omitted.")
    ] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of the matrices.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Decides initial values and the order of the text.")] = 0,
    tokenizer: Annotated[str, typer.Option(help="How text becomes tokens: bytes.")] = "bytes",
    holdout: Annotated[
        str,
        typer.Option(
            metavar="content:F|tail:F",
            help="Text never trained on: a fraction F picked by content, or the corpus's last.",
        ),
    ] = "content:0.05",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, xpu; auto takes the best.")] = "auto",
    precision: Annotated[
        str, typer.Option(help="bf16, fp32; auto takes bf16 where the device computes in it.")
    ] = "auto",
    backend: Backend = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that --out holds.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that --out holds.")] = False,
) -> None:
    """Train a language model on text.

    Examples:

        mhesa train --out runs/first

        mhesa train book.txt notes/ 'logs/*.log' --out runs/mine --minutes 30

        cat corpus.txt | mhesa train - --out runs/piped --steps 1000

        mhesa train --resume --out runs/mine --minutes 60
    """
    from mhesa.training import Stopped, TrainingSettings
    from mhesa.training import train as run

    given = {
        name: value
        for name, value in context_.params.items()
        if name not in ("resume", "overwrite", "context_") and _was_given(context_, name)
    }
    given["out"] = out
    if sources:
        given["sources"] = tuple(sources)
    if resume and overwrite:
        raise InputError("give --resume or --overwrite, not both")
    settings = TrainingSettings.resumed(given) if resume else TrainingSettings(**given)
    console = Console(stderr=True)
    try:
        summary = run(settings, resume=resume, overwrite=overwrite, console=console)
    except Stopped as stopped:
        console.print(
            f"Stopped after step {stopped.step:,}. Continue with: mhesa train --resume --out {out}",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(128 + stopped.signal) from None
    _print_summary(Console(), summary)


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _print_summary(console: Console, summary: Any) -> None:
    console.rule("sample")
    console.print(summary.sample.decode("utf-8", "replace"), markup=False, highlight=False, soft_wrap=True)
    console.rule("held-out text")
    table = new_table("", "bits per byte", "nats per token")
    table.add_row("this model", f"{summary.score.bits_per_byte:.3f}", f"{summary.score.loss:.3f}")
    for name, bits in summary.compressors.items():
        table.add_row(name, f"{bits:.3f}", "")
    console.print(table)
    console.print(f"\n{summary.steps:,} steps in {summary.seconds:,.0f} s", highlight=False)
    console.print(
        f"Saved to {summary.folder}: {', '.join(sorted(summary.files))}\n"
        f"Write with it: mhesa generate {summary.folder} --prompt TEXT",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
