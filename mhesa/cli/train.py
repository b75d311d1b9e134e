"""`mhesa train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mhesa.cli.common import new_table
from mhesa.errors import InputError

TEXT, MODEL, STEP, RUN, MACHINE = "Text", "Model", "Training", "Run", "Machine"


def option(panel: str, text: str, *names: str, **kwargs: Any) -> Any:
    """An option of `--help`'s panel of that name."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **kwargs)


def train(
    context_: typer.Context,
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE",
            help="Text files, folders, glob patterns, hf://owner/dataset, or - for standard input; "
            "gz, xz, zst and bz2 are unpacked, a line of jsonl and a row of parquet are a document each. "
            "None: the Python standard library's own source text.",
        ),
    ] = None,
    out: Annotated[
        str | None, option(RUN, "Folder for the model, its metrics and its checkpoints. [required]")
    ] = None,
    config: Annotated[
        Path | None, option(RUN, "YAML file with options by these names; those given here go first.")
    ] = None,
    minutes: Annotated[float | None, option(RUN, "Train for so long (3 if no budget is given).")] = None,
    steps: Annotated[int | None, option(RUN, "Train for so many optimizer steps.")] = None,
    resume: Annotated[bool, option(RUN, "Continue the run that --out holds.", "--resume")] = False,
    overwrite: Annotated[bool, option(RUN, "Replace the run that --out holds.", "--overwrite")] = False,
    save_every: Annotated[int, option(RUN, "Steps between checkpoints.")] = 200,
    keep: Annotated[int, option(RUN, "How many checkpoints to keep.")] = 2,
    eval_every: Annotated[
        int, option(RUN, "Steps between evaluations on text held out, with a sample; 0: at the end alone.")
    ] = 0,
    patience: Annotated[
        int | None, option(RUN, "Stop after so many evaluations without a better one; take the best.")
    ] = None,
    report_to: Annotated[
        str, option(RUN, "Also send figures to it.", metavar="none|tensorboard|wandb|trackio")
    ] = "none",
    text_field: Annotated[str, option(TEXT, "Field of jsonl and parquet that holds the text.")] = "text",
    tokenizer: Annotated[
        str,
        option(
            TEXT,
            "bytes; N tokens made of the text; or where a tokenizer.json is.",
            metavar="bytes|bpe:N|PATH",
        ),
    ] = "bytes",
    holdout: Annotated[
        str,
        option(
            TEXT,
            "Text never trained on: a fraction F picked by content, or the corpus's last.",
            metavar="content:F|tail:F",
        ),
    ] = "content:0.05",
    join: Annotated[
        bool, option(TEXT, "Let the state run on from one document into the next.", "--join")
    ] = False,
    carry_state: Annotated[
        bool,
        option(TEXT, "Begin each window with the state of the one before it in the text.", "--carry-state"),
    ] = False,
    dim: Annotated[int, option(MODEL, "Width of the model.")] = 128,
    depth: Annotated[int, option(MODEL, "Blocks.")] = 4,
    heads: Annotated[int, option(MODEL, "Smoothing rates a block; divides --dim-mhesa.")] = 8,
    dim_mhesa: Annotated[int, option(MODEL, "Width of the smoothed values, and of the state.")] = 256,
    dim_expansion_factor: Annotated[float, option(MODEL, "Width of a block's gate over --dim.")] = 4.0,
    dropout: Annotated[float, option(MODEL, "Part of a block's product and output dropped in training.")] = 0,
    context: Annotated[int, option(STEP, "Tokens a training window.")] = 256,
    batch_size: Annotated[
        int | None, option(STEP, "Windows a step, of all processes; enough to keep each busy if omitted.")
    ] = None,
    accumulate: Annotated[int, option(STEP, "Micro-batches a step, for less memory.")] = 1,
    lr: Annotated[float, option(STEP, "Peak learning rate.")] = 3e-3,
    schedule: Annotated[str, option(STEP, "How the rate falls.", metavar="cosine|wsd")] = "cosine",
    warmup: Annotated[float, option(STEP, "Part of the budget in which the rate rises.")] = 0.02,
    clip: Annotated[float, option(STEP, "Largest norm of the gradient.")] = 1.0,
    weight_decay: Annotated[float, option(STEP, "Weight decay of the matrices.")] = 0.1,
    seed: Annotated[int, option(STEP, "Decides initial values, the order of the text and dropout.")] = 0,
    device: Annotated[str, option(MACHINE, "cpu, cuda, cuda:1, mps, xpu; auto takes the best.")] = "auto",
    precision: Annotated[
        str, option(MACHINE, "auto takes bf16 where the device computes in it.", metavar="auto|bf16|fp32")
    ] = "auto",
    backend: Annotated[
        str | None, option(MACHINE, "The operator's backend; the best one if omitted.")
    ] = None,
    compile_: Annotated[bool, option(MACHINE, "Run the model through torch.compile.", "--compile")] = False,
    recompute: Annotated[
        bool, option(MACHINE, "Activation checkpointing: less memory, more time.", "--recompute")
    ] = False,
    fsdp: Annotated[
        bool, option(MACHINE, "Part weights among processes instead of copying them.", "--fsdp")
    ] = False,
) -> None:
    """Train a language model on text.

    Examples:

        mhesa train --out runs/first

        mhesa train book.txt notes/ 'logs/*.log.gz' --out runs/mine --minutes 30

        cat corpus.txt | mhesa train - --out runs/piped --steps 1000 --tokenizer bpe:4096

        mhesa train --resume --out runs/mine --minutes 60

        torchrun --nproc-per-node 2 -m mhesa train book.txt --out runs/two
    """
    from mhesa.ops.cpu.memory import keep_memory
    from mhesa.training import Stopped, TrainingSettings
    from mhesa.training import train as run
    from mhesa.training.config import load_config

    given = {} if config is None else load_config(config)
    given |= {
        name.rstrip("_"): value
        for name, value in context_.params.items()
        if name not in ("resume", "overwrite", "context_", "config") and _was_given(context_, name)
    }
    if sources:
        given["sources"] = tuple(sources)
    if "out" not in given:
        raise InputError("say with --out which folder the model is to go to")
    if resume and overwrite:
        raise InputError("give --resume or --overwrite, not both")
    settings = TrainingSettings.resumed(given) if resume else TrainingSettings(**given)
    console = Console(stderr=True)
    keep_memory()
    try:
        summary = run(settings, resume=resume, overwrite=overwrite, console=console)
    except Stopped as stopped:
        if _is_first_process():
            console.print(
                f"Stopped after step {stopped.step:,}. "
                f"Continue with: mhesa train --resume --out {settings.out}",
                highlight=False,
                soft_wrap=True,
            )
        raise typer.Exit(128 + stopped.signal) from None
    if _is_first_process():
        _print_summary(Console(), summary)


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


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
