"""`mhesa train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mhesa.cli.common import new_table, resume_garbage_collection, stderr
from mhesa.cli.options import option, with_options
from mhesa.errors import InputError
from mhesa.settings import setting_of
from mhesa.terminal import escape_controls, say
from mhesa.training.settings import BY_PANEL, RUN, TrainingSettings, with_changes

SOURCES = setting_of(TrainingSettings, "sources").doc


@with_options(*(option(TrainingSettings, setting.name) for setting in BY_PANEL if setting.name != "sources"))
def train(
    context_: typer.Context,
    sources: Annotated[list[str] | None, typer.Argument(metavar=SOURCES.metavar, help=SOURCES.text)] = None,
    *,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="YAML file of settings, by the names of these options; an option given here wins.",
            rich_help_panel=RUN,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out.", rich_help_panel=RUN)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --out.", rich_help_panel=RUN)
    ] = False,
    **settings: Any,
) -> None:
    """Train a language model on text.

    Examples:

        mhesa train --out runs/first

        mhesa train book.txt notes/ 'logs/*.log.gz' --out runs/mine --minutes 30

        cat corpus.txt | mhesa train - --out runs/piped --steps 1000 --tokenizer bpe:4096

        mhesa train --resume --out runs/mine --minutes 60

        torchrun --nproc-per-node 2 -m mhesa train book.txt --out runs/two
    """
    from mhesa.ops.cpu.memory import keep_memory, return_large_blocks
    from mhesa.ops.devices import resolve_device
    from mhesa.processes import rank
    from mhesa.training.config import load_config
    from mhesa.training.folder import check_inputs
    from mhesa.training.run import Stopped
    from mhesa.training.run import train as run

    given = {} if config is None else load_config(config)
    options = {name: value for name, value in settings.items() if _was_given(context_, name)}
    given = with_changes(given, options)
    if sources:
        given["sources"] = tuple(sources)
    if "out" not in given:
        raise InputError("give --out, the folder to save the model to")
    if resume and overwrite:
        raise InputError("give --resume or --overwrite, not both")
    chosen = TrainingSettings.resumed(given) if resume else TrainingSettings(**given)
    if config is not None:
        check_inputs(Path(chosen.out), [config])
    if resolve_device(chosen.device) == "cpu":
        # Processes that share a sequence are short of memory.
        (keep_memory if chosen.context_parallel == 1 else return_large_blocks)()
    resume_garbage_collection()
    try:
        summary = run(chosen, resume=resume, overwrite=overwrite, console=stderr)
    except Stopped as stopped:
        if rank() == 0:
            how = f"Continue with: mhesa train --resume --out {chosen.out}"
            say(stderr, f"Stopped after step {stopped.step:,}. {how}")
        raise typer.Exit(128 + stopped.signal) from None
    if rank() == 0:
        _print_summary(Console(), summary)


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _print_summary(console: Console, summary: Any) -> None:
    console.rule("sample")
    sample = escape_controls(summary.sample.decode("utf-8", "replace"))
    say(console, sample)
    console.rule("held-out text")
    table = new_table("", "bits per byte", "nats per token")
    table.add_row("this model", f"{summary.score.bits_per_byte:.3f}", f"{summary.score.loss:.3f}")
    for name, bits in summary.compressors.items():
        table.add_row(name, f"{bits:.3f}", "")
    console.print(table)
    say(
        console,
        f"\n{summary.steps:,} steps in {summary.seconds:,.0f} s\n"
        f"Saved to {summary.folder}: {', '.join(sorted(summary.files))}\n"
        f"Write with it: mhesa generate {summary.folder} --prompt TEXT",
    )
