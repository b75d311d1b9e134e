"""The `mhesa` command: parse, call, print."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import mhesa
from mhesa.errors import InputError, TrainingError

app = typer.Typer(
    name="mhesa",
    help="Linear-time language models built on exponential smoothing: train, evaluate, generate.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
errors = Console(stderr=True)

bench = typer.Typer(help="Measure speed, as ratios inside one run.", no_args_is_help=True)
app.add_typer(bench, name="bench")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a trained model.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, xpu.")]
Backend = Annotated[str | None, typer.Option(help="The operator's backend; the best one if omitted.")]


def main() -> None:
    """Run the command line; what the user can mend gets one line and exit code 2."""
    try:
        app()
    except InputError as error:
        _fail(str(error), 2)
    except TrainingError as error:
        _fail(str(error), 1)


def _fail(message: str, code: int) -> None:
    errors.print(f"Error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
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
    # transformers warns of choices that are ours to make, not the user's.
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@app.command()
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
    table = _table("", "bits per byte", "nats per token")
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


@app.command()
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
    _write([data] if echo else [])
    _write(until(pieces, (stop or "").encode("utf-8", "surrogateescape")))
    sys.stdout.write("\n")


def _write(pieces: Iterable[bytes]) -> None:
    """Write text as it comes, whole characters at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        sys.stdout.write(decoder.decode(piece))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True))
    sys.stdout.flush()


@app.command(name="eval")
def evaluate(
    folder: Folder,
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="Text files, folders, glob patterns, or -.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for all the text.")] = False,
    device: Device = "cpu",
    backend: Backend = None,
) -> None:
    """Measure how well a model predicts text.

    Every file is read from its start to its end, with the state carried from window to window.

    Examples:

        mhesa eval runs/first unseen.txt

        mhesa eval runs/first texts/ --json
    """
    from mhesa.data import read_sources
    from mhesa.evaluation import Score
    from mhesa.evaluation import evaluate as score
    from mhesa.hf.folder import load

    documents = read_sources(sources)
    model, tokenizer = load(folder, device=device, backend=backend)
    with _progress("measuring", sum(len(document.data) for document in documents)) as advance:
        scores = [score(model, tokenizer, [document], advance) for document in documents]
    total = sum(scores, Score(0.0, 0, 0))
    if as_json:
        typer.echo(json.dumps(total.as_dict()))
        return
    table = _table("file", "loss", "bits per byte", "perplexity", "tokens", "bytes")
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
    Console().print(table)


@bench.command(name="ops")
def bench_ops(
    rounds: Annotated[int, typer.Option(help="Turns that are timed.")] = 15,
    as_json: AsJson = False,
    device: Device = "cpu",
) -> None:
    """Time the operator on every backend and in other packages that are installed.

    Every figure is a median of turns taken in rotation, beside a copy of the input in the same turns, and
    is printed only if the result is right against fp64.

    Example:

        mhesa bench ops
    """
    from mhesa.bench.ops import CASES
    from mhesa.bench.ops import bench_ops as run

    _check_bench(rounds, device)
    found = []
    with _progress("timing", 2 * (rounds + 1) * len(CASES)) as advance:
        for rows in run(CASES, rounds=rounds, device=device, on_round=lambda: advance(1)):
            found += rows
            if not as_json:
                _print_case(rows)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in found]))


def _print_case(rows: list[Any]) -> None:
    case = f"{' x '.join(map(str, rows[0].shape))} {rows[0].dtype}"
    table = _table(case, "timed", "ms", "GB/s", "x clone", "error")
    for row in rows:
        table.add_row(
            row.operator,
            row.timed,
            f"{row.milliseconds:.2f}",
            f"{row.gigabytes_per_second:.1f}",
            f"{row.over_clone:.2f}",
            f"{row.error:.0e}",
        )
    Console().print(table, "")


@bench.command(name="train")
def bench_train(
    rounds: Annotated[int, typer.Option(help="Turns that are timed.")] = 10,
    as_json: AsJson = False,
    device: Device = "cpu",
) -> None:
    """Time a training step against the original package's, and against its matrix products alone.

    13 million parameters (dim 384, depth 6), 4 windows of 512 bytes; forward, loss, backward, AdamW.

    Example:

        mhesa bench train --json
    """
    from mhesa.bench.train import bench_train as run

    _check_bench(rounds, device)
    with _progress("timing", rounds + 1) as advance:
        rows = run(rounds=rounds, device=device, on_round=lambda: advance(1))
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows]))
        return
    table = _table("step", "precision", "ms", "tokens/s", "x the original", "over the products")
    for row in rows:
        table.add_row(
            row.name,
            row.precision,
            f"{row.milliseconds:.1f}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.times_the_original:.2f}",
            f"{row.over_the_products:.2f}",
        )
    Console().print(table)


def _check_bench(rounds: int, device: str) -> None:
    from mhesa.devices import check_device

    if rounds < 1:
        raise InputError(f"rounds must be at least 1, not {rounds}")
    check_device(device)


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table


@contextmanager
def _progress(description: str, total: int) -> Iterator[Callable[[int], object]]:
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        yield lambda amount: progress.advance(task, amount)
