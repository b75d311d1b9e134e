"""`python -m benchmarks`: speed against other implementations and against bounds of the machine."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

from mhesa.cli.common import Device, Folder, new_table, progress, show, stderr
from mhesa.errors import InputError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds that are timed, after one that is not.")]
Save = Annotated[bool, typer.Option("--save", help="Write the result to benchmarks/results/PROCESSOR/.")]

app = typer.Typer(
    name="python -m benchmarks",
    help="Measure speed against other implementations; compare ratios, which hold where times do not.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def ops(
    rounds: Rounds = 15,
    shape: Annotated[
        str | None, typer.Option(metavar="BxLxHxD", help="Batch, length, heads, head_dim of one case.")
    ] = None,
    as_json: AsJson = False,
    save: Save = False,
    device: Device = "cpu",
) -> None:
    """Time the operator on every backend and in other packages that are installed.

    Each time is a median, beside a copy of the input in the same rounds, and is printed only if the result
    is right against fp64. Without --shape, several shapes are timed, then lengths of up to a million steps
    (8 GB of memory).

    Example:

        python -m benchmarks ops --shape 16x2048x8x64
    """
    from benchmarks.lengths import bench_lengths
    from benchmarks.ops import DTYPES, EVERY_STEP_SHAPES, SHAPES, Case, bench_ops
    from mhesa.ops.devices import check_device

    check_device(device)
    shapes = SHAPES if shape is None else [_shape(shape)]
    cases = [Case(shape, dtype) for dtype in DTYPES for shape in shapes]
    every_step = EVERY_STEP_SHAPES if shape is None else shapes
    cases += [Case(shape, dtype, every_step=True) for dtype in DTYPES for shape in every_step]
    tables: dict[str, list[Any]] = {"operators": []}
    with progress("timing", 2 * (rounds + 1) * (len(cases) + (shape is None))) as advance:
        for rows in bench_ops(cases, rounds=rounds, device=device, on_round=lambda: advance(1)):
            tables["operators"] += rows
            if not as_json:
                _show("operators", rows)
        if shape is None:
            lengths = bench_lengths(rounds=rounds, device=device, on_round=lambda: advance(1))
            tables["lengths"] = list(lengths)
    if not as_json and shape is None:
        _show("lengths", tables["lengths"])
    _finish("ops", tables, as_json, save, device)


def _shape(text: str) -> tuple[int, int, int, int]:
    sizes = text.split("x")
    if len(sizes) != 4 or not all(re.fullmatch("[1-9][0-9]{0,9}", size) for size in sizes):
        raise InputError(f"shape must be four sizes such as 4x1024x8x64, not {text!r}")
    batch, length, heads, head_dim = map(int, sizes)
    return batch, length, heads, head_dim


@app.command()
def train(rounds: Rounds = 10, as_json: AsJson = False, save: Save = False, device: Device = "cpu") -> None:
    """Time a training step against the original package's, and against its matrix products alone.

    13 million parameters (dim 384, depth 6), 4 windows of 512 bytes; forward, loss, backward, AdamW.

    Example:

        python -m benchmarks train --json
    """
    from benchmarks.train import bench_train
    from mhesa.ops.devices import check_device

    check_device(device)
    with progress("timing", rounds + 1) as advance:
        rows = bench_train(rounds=rounds, device=device, on_round=lambda: advance(1))
    if not as_json:
        _show("steps", rows)
    _finish("train", {"steps": rows}, as_json, save, device)


@app.command()
def run(
    sources: Annotated[list[str] | None, typer.Argument(metavar="SOURCE", help="As in mhesa train.")] = None,
    minutes: Annotated[float, typer.Option(help="Length of the run in minutes.")] = 1.0,
    holdout: Annotated[
        str, typer.Option(help="As in mhesa train.", metavar="content:F|tail:F")
    ] = "content:0.05",
    as_json: AsJson = False,
    save: Save = False,
) -> None:
    """Time a whole run of `mhesa train` on this CPU, phase by phase; the run is not kept.

    What counts as outside of forward, backward and optimizer: reading windows, metrics, the plot,
    checkpoints, and the loop itself. Clipping counts as the optimizer's, and has a row of its own.

    Example:

        python -m benchmarks run book.txt --holdout tail:0.1 --minutes 3
    """
    from benchmarks.run import bench_run
    from mhesa.training.settings import TrainingSettings

    with TemporaryDirectory() as folder:
        settings = TrainingSettings(
            out=folder, sources=tuple(sources or ()), minutes=minutes, holdout=holdout, device="cpu"
        )
        parts, outcome = bench_run(settings, console=stderr)
    tables: dict[str, list[Any]] = {"parts": parts, "run": [outcome]}
    if not as_json:
        for name, rows in tables.items():
            _show(name, rows)
    _finish("run", tables, as_json, save)


@app.command()
def decode(rounds: Rounds = 10, as_json: AsJson = False, save: Save = False) -> None:
    """Time decoding on CPU: a step at several sizes of batch, prompts, and other models of the size.

    A step of one sequence is compared with a read of the weights, its lower bound: a native loop or torch's
    sum, whichever is faster. Batches are compared with the matrix products alone, by torch; prompts with
    training's forward pass. Ratios above 1 are faster. Models of 1.2 and 13 million parameters.

    Example:

        python -m benchmarks decode --rounds 5
    """
    from benchmarks.decode import GROUPS, bench_decode, memory

    tables: dict[str, list[Any]] = {"rates": []}
    with progress("timing", GROUPS * (rounds + 1)) as advance:
        for rows in bench_decode(rounds=rounds, on_round=lambda: advance(1)):
            tables["rates"] += rows
            if not as_json:
                _show("rates", rows)
    tables["memory"] = memory()
    if not as_json:
        _show("memory", tables["memory"])
    _finish("decode", tables, as_json, save)


@app.command()
def serve(
    folder: Folder,
    streams: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Numbers of concurrent streams; 1, 16, 128 and 1000 if omitted."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Tokens of each text; enough for seconds if omitted.")
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="int8: weights of 8 bits.")] = None,
    as_json: AsJson = False,
    save: Save = False,
) -> None:
    """Time a server of a model under load, against decoding alone; both share this machine.

    Its tokens a second are compared with those of the decoder's steps and of a loop that samples too, timed
    before and after on as many texts.

    Times are in milliseconds, the median and the 99th percentile: to a stream's first token, a stream's mean
    time for a token, between two events of a stream, and of `/health` under the load.

    Example:

        python -m benchmarks serve runs/first --streams 128
    """
    from benchmarks.serve import STREAMS, bench_serve

    counts = streams or list(STREAMS)
    rows = []
    with progress("loading", len(counts)) as advance:
        for row in bench_serve(folder, counts, quantize, tokens):
            rows.append(row)
            advance(1)
    if not as_json:
        _show("load", rows)
    _finish("serve", {"load": rows}, as_json, save)


@app.command(name="context_parallel")
def context_parallel(
    length: Annotated[
        list[int] | None, typer.Option(min=8, help="Tokens of the sequence; 65536 and 262144 if omitted.")
    ] = None,
    processes: Annotated[
        list[int] | None, typer.Option(min=1, help="Processes that share it; 1, 2 and 4 if omitted.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Steps that are timed, after one that is not.")] = 3,
    precision: Annotated[
        str, typer.Option(metavar="fp32|bf16", help="Precision of the matrix products.")
    ] = "fp32",
    recompute: Annotated[bool, typer.Option("--recompute", help="As in mhesa train.")] = False,
    as_json: AsJson = False,
    save: Save = False,
) -> None:
    """Time training steps on one sequence that several processes share, one core each, with gloo.

    The model is that of `mhesa train` (dim 128, depth 4). Memory is the peak of a process, Python and torch
    included. More processes than cores take turns. A second table says what larger groups of GPUs would spend
    on exchanges, by the sizes of messages.

    Example:

        python -m benchmarks context_parallel --length 65536 --processes 1 --processes 2
    """
    from benchmarks.context_parallel import bench_context_parallel, on_paper

    if precision not in ("fp32", "bf16"):
        raise InputError(f"precision must be fp32 or bf16, not {precision}")
    lengths, counts = length or [1 << 16, 1 << 18], processes or [1, 2, 4]
    tables: dict[str, list[Any]] = {"sequences": []}
    with progress("timing", len(lengths) * len(counts)) as advance:
        for row in bench_context_parallel(
            lengths,
            counts,
            recompute=recompute,
            precision=precision,
            rounds=rounds,
            on_case=lambda: advance(1),
        ):
            tables["sequences"].append(row)
            if not as_json:
                _show("sequences", [row])
    tables["paper"] = on_paper()
    if not as_json:
        _show("paper", tables["paper"])
    _finish("context_parallel", tables, as_json, save)


@app.command()
def learning(
    part: Annotated[
        str, typer.Argument(metavar="rates|choices|tokens|minutes|latch|recall", help="What to compare.")
    ],
    sources: Annotated[list[str] | None, typer.Argument(metavar="SOURCE", help="As in mhesa train.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    seconds: Annotated[float, typer.Option(help="CPU time of each run of minutes, on one thread.")] = 120.0,
    as_json: AsJson = False,
    save: Save = False,
) -> None:
    """Compare what models of 1.0 to 1.3 million parameters learn: ours, the original, a transformer, an LSTM.

    rates tunes a learning rate for each; choices changes one thing of ours at a time; tokens gives all the
    same text, and measures the loss by position and by how much context there is; minutes gives all the same
    CPU time on one thread. latch and recall are tasks that need a memory. Each part takes from 20 minutes to
    an hour.

    Example:

        python -m benchmarks learning tokens --seeds 1
    """
    from benchmarks.learning import PARTS, bench_learning

    if part not in PARTS:
        raise InputError(f"part must be one of {', '.join(PARTS)}, not {part}")
    torch.set_num_threads(1)
    tables: dict[str, list[Any]] = {}
    for name, row in bench_learning(part, sources or [], seeds=seeds, seconds=seconds):
        tables.setdefault(name, []).append(row)
        stderr.print(str(row), highlight=False, soft_wrap=True)
    if not as_json:
        for name, rows in tables.items():
            _show(name, rows)
    _finish(f"learning_{part}", tables, as_json, save)


@app.command()
def score(
    megabytes: Annotated[float, typer.Option(min=0.1, help="Size of the text in MB.")] = 2.0,
    keys: Annotated[int, typer.Option(min=1, help="Number of users that the lines are of.")] = 10_000,
    key_memory: Annotated[str, typer.Option(metavar="SIZE", help="As in mhesa score.")] = "256MB",
    precision: Annotated[
        list[str] | None,
        typer.Option(metavar="fp32|bf16|int8", help="Precisions of the model; all if omitted."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each kind; the median counts.")] = 3,
    as_json: AsJson = False,
    save: Save = False,
) -> None:
    """Time mhesa score on lines of a log, with one session and with one for each key, as a whole command.

    The model has the sizes of `mhesa train`, 1.25 million parameters. The speed is the difference between a
    run on the text and one on an eighth of it, so the start of the command does not count. Keys that need
    more than --key-memory are kept in a file, and take longer.

    Example:

        python -m benchmarks score --megabytes 60 --keys 1000000 --precision bf16 --rounds 1
    """
    from benchmarks.score import TOLERANCE, bench_score

    precisions = precision or list(TOLERANCE)
    if not set(precisions) <= set(TOLERANCE):
        raise InputError(f"precision must be one of {', '.join(TOLERANCE)}, not {', '.join(precisions)}")
    tables: dict[str, list[Any]] = {"scores": []}
    with progress("timing", 4 * rounds * len(precisions)) as advance:
        for rows in bench_score(
            megabytes=megabytes,
            keys=keys,
            key_memory=key_memory,
            precisions=precisions,
            rounds=rounds,
            on_run=lambda: advance(1),
        ):
            tables["scores"] += rows
            if not as_json:
                _show("scores", rows)
    _finish("score", tables, as_json, save)


@app.command()
def logs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of HDFS.log, Spark.log and so on.")],
    steps: Annotated[int, typer.Option(help="Largest number of training steps per model.")] = 400,
    models: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Trained models, <log>-adaptive and <log>-fixed.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How often faults are put in, elsewhere each time.")] = 1,
    as_json: AsJson = False,
    save: Save = False,
) -> None:
    """Find faults that are put into logs, at 1 % false alarms, by surprisal and by other methods.

    The logs are those of loghub with 2,000 lines each. Models learn the first half, faults are put into the
    second. Needs `pip install 'mhesa[bench]'`.

    Example:

        python -m benchmarks logs loghub
    """
    from benchmarks.logs import bench_logs

    tables: dict[str, list[Any]] = {}
    for name, row in bench_logs(folder, steps=steps, models=models, seeds=seeds):
        tables.setdefault(name, []).append(row)
    if not as_json:
        for name, rows in tables.items():
            _show(name, rows)
    _finish("logs", tables, as_json, save)


@app.command()
def tables() -> None:
    """Write the saved results into benchmarks/README.md and docs/, and draw the pictures.

    Example:

        python -m benchmarks tables
    """
    from benchmarks.plots import draw_all
    from benchmarks.tables import PAGES, with_tables

    for page in PAGES:
        page.write_text(with_tables(page.read_text()))
    draw_all()


@app.command()
def compare(
    other: Annotated[Path, typer.Argument(help="Root of another checkout of this repository.")],
    benchmark: Annotated[
        str,
        typer.Argument(metavar="ops|train|run|decode|serve|score|context_parallel", help="What to run."),
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="-- ARGUMENT", help="Arguments of the benchmark.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, help="How often both run.")] = 3,
) -> None:
    """Run a benchmark here and in another checkout in turn, and print this checkout's speed over the other's.

    Example:

        python -m benchmarks compare ../before ops --pairs 5 -- --shape 4x1024x8x64 --rounds 5
    """
    from benchmarks.compare import compare

    with progress("running", 2 * pairs) as advance:
        found = compare(other, benchmark, arguments or [], pairs=pairs, on_run=lambda: advance(1))
    table = new_table("speed over the other's", *(f"pair {i + 1}" for i in range(pairs)), "median")
    for row in found:
        table.add_row(row.row, *(f"{ratio:.2f}" for ratio in [*row.speedups, row.median]))
    show(table)


def _show(name: str, rows: list[Any]) -> None:
    from benchmarks.tables import TABLES

    table = new_table(*TABLES[name].columns)
    for cells in TABLES[name].cells([asdict(row) for row in rows]):
        table.add_row(*cells)
    show(table)
    typer.echo()


def _finish(
    benchmark: str, tables: Mapping[str, list[Any]], as_json: bool, save: bool, device: str = "cpu"
) -> None:
    """Print the result as JSON and save it, if asked to."""
    from benchmarks import results

    found = results.result(benchmark, tables, sys.argv[1:], device)
    if as_json:
        typer.echo(json.dumps(found))
    if save:
        stderr.print(f"saved to {results.save(found, results.FOLDER)}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line; wrong input gets one line and exit code 2."""
    try:
        app()
    except InputError as error:
        stderr.print(f"Error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
