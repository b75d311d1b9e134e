"""`python -m benchmarks`: speed, as ratios inside one run."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from mhesa.cli.common import AsJson, Device, Folder, errors, new_table, progress, show
from mhesa.errors import InputError


def ops(
    rounds: Annotated[int, typer.Option(help="Turns that are timed.")] = 15,
    shape: Annotated[
        str | None, typer.Option(metavar="BxLxHxD", help="Batch, length, heads, head_dim of one case.")
    ] = None,
    as_json: AsJson = False,
    device: Device = "cpu",
) -> None:
    """Time the operator on every backend and in other packages that are installed.

    Every figure is a median of turns taken in rotation, beside a copy of the input in the same turns, and
    is printed only if the result is right against fp64. Without --shape a range of shapes is timed, then
    the time against the length, up to a million steps (8 GB of memory).

    Example:

        python -m benchmarks ops --shape 16x2048x8x64
    """
    from benchmarks.lengths import bench_lengths
    from benchmarks.ops import DTYPES, SHAPES, Case, bench_ops

    _check_bench(rounds, device)
    shapes = SHAPES if shape is None else [_shape(shape)]
    cases = [Case(shape, dtype) for dtype in DTYPES for shape in shapes]
    found: list[Any] = []
    with progress("timing", 2 * (rounds + 1) * (len(cases) + (shape is None))) as advance:
        for rows in bench_ops(cases, rounds=rounds, device=device, on_round=lambda: advance(1)):
            found += rows
            if not as_json:
                _print_case(rows)
        by_length = (
            list(bench_lengths(rounds=rounds, device=device, on_round=lambda: advance(1)))
            if shape is None
            else []
        )
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in [*found, *by_length]]))
    elif by_length:
        _print_lengths(by_length)


def _shape(text: str) -> tuple[int, int, int, int]:
    sizes = text.split("x")
    if len(sizes) != 4 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise InputError(f"shape must be four sizes such as 4x1024x8x64, not {text!r}")
    batch, length, heads, head_dim = map(int, sizes)
    return batch, length, heads, head_dim


def _print_case(rows: list[Any]) -> None:
    case = f"{' x '.join(map(str, rows[0].shape))} {rows[0].dtype}"
    table = new_table(case, "timed", "ms", "GB/s", "x clone", "error")
    for row in rows:
        table.add_row(
            row.operator,
            row.timed,
            f"{row.milliseconds:.2f}",
            f"{row.gigabytes_per_second:.1f}",
            f"{row.over_clone:.2f}",
            f"{row.error:.0e}",
        )
    show(table)
    typer.echo()


def _print_lengths(rows: list[Any]) -> None:
    table = new_table("length, 512 channels", "timed", "ms", "ns/step", "x one eighth")
    for row in rows:
        table.add_row(
            f"{row.length:,}",
            row.timed,
            f"{row.milliseconds:.2f}",
            f"{row.nanoseconds_per_step:.0f}",
            "" if row.over_shorter is None else f"{row.over_shorter:.2f}",
        )
    show(table)


def train(
    rounds: Annotated[int, typer.Option(help="Turns that are timed.")] = 10,
    as_json: AsJson = False,
    device: Device = "cpu",
) -> None:
    """Time a training step against the original package's, and against its matrix products alone.

    13 million parameters (dim 384, depth 6), 4 windows of 512 bytes; forward, loss, backward, AdamW.

    Example:

        python -m benchmarks train --json
    """
    from benchmarks.train import bench_train

    _check_bench(rounds, device)
    with progress("timing", rounds + 1) as advance:
        rows = bench_train(rounds=rounds, device=device, on_round=lambda: advance(1))
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows]))
        return
    table = new_table("step", "precision", "ms", "tokens/s", "x the original", "over the products")
    for row in rows:
        table.add_row(
            row.name,
            row.precision,
            f"{row.milliseconds:.1f}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.times_the_original:.2f}",
            f"{row.over_the_products:.2f}",
        )
    show(table)


def decode(
    rounds: Annotated[int, typer.Option(help="Turns that are timed.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Time decoding on CPU: a step at several sizes of batch, prompts, and other models of the size.

    A step of one sequence is beside a read of the weights, which it cannot be faster than; batches are
    beside the matrix products alone, by torch; prompts are beside training's forward pass. Ratios above 1
    are faster than the mark. Models of 1.2 and 13 million parameters.

    Example:

        python -m benchmarks decode --rounds 5
    """
    from benchmarks.decode import CONTEXTS, GROUPS, bench_decode, memory

    _check_bench(rounds, "cpu")
    found = []
    with progress("timing", GROUPS * (rounds + 1)) as advance:
        for rows in bench_decode(rounds=rounds, on_round=lambda: advance(1)):
            found += rows
            if not as_json:
                _print_rates(rows)
    sessions = memory()
    if as_json:
        typer.echo(json.dumps({"rates": list(map(asdict, found)), "memory": list(map(asdict, sessions))}))
        return
    table = new_table("session memory", *(f"{context:,} tokens" for context in CONTEXTS))
    for name in dict.fromkeys(session.name for session in sessions):
        table.add_row(name, *(f"{session.bytes:,}" for session in sessions if session.name == name))
    show(table)


def run(
    sources: Annotated[list[str] | None, typer.Argument(metavar="SOURCE", help="As in mhesa train.")] = None,
    minutes: Annotated[float, typer.Option(help="How long the run is.")] = 1.0,
    holdout: Annotated[
        str, typer.Option(help="As in mhesa train.", metavar="content:F|tail:F")
    ] = "content:0.05",
    as_json: AsJson = False,
) -> None:
    """Time a whole run of `mhesa train` on this CPU, part by part; nothing of it is kept.

    What counts as outside of forward, backward and optimizer: reading windows, the Trainer's loop, rows of
    metrics, the plot and checkpoints. Clipping is the optimizer's, and has a row of its own.

    Example:

        python -m benchmarks run book.txt --holdout tail:0.1 --minutes 3
    """
    from tempfile import TemporaryDirectory

    from benchmarks.run import bench_run, outside
    from mhesa.training import TrainingSettings

    with TemporaryDirectory() as folder:
        settings = TrainingSettings(
            out=folder, sources=tuple(sources or ()), minutes=minutes, holdout=holdout, device="cpu"
        )
        parts, summary = bench_run(settings, console=errors)
    if as_json:
        figures = {"parts": list(map(asdict, parts)), "outside": outside(parts), "loss": summary.score.loss}
        typer.echo(json.dumps(figures))
        return
    table = new_table("part of a run", "ms a step", "share")
    for part in parts:
        table.add_row(part.name, f"{part.milliseconds_a_step:.2f}", f"{part.share:.1%}")
    table.add_row("outside of forward, backward and optimizer", "", f"{outside(parts):.1%}")
    show(table)
    typer.echo(f"\n{summary.steps:,} steps, {summary.score.loss:.3f} nats per token held out")


def serve(
    folder: Folder,
    streams: Annotated[
        list[int] | None, typer.Option(help="How many streams at once; 1, 16, 128 and 1000 if omitted.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of each text; some seconds' worth if omitted.")
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="int8: a quarter of the memory to read.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time a server of a model under load, beside decoding alone; both share this machine.

    Its tokens a second are beside those of the decoder's steps (`python -m benchmarks decode`) and of a
    loop that draws too, timed before and after on the same number of texts.

    Times are in milliseconds, the median and what one in a hundred exceeds: until a stream's first token,
    a stream's mean time for a token, between two events of a stream, and of `/health` meanwhile.

    Example:

        python -m benchmarks serve runs/first --streams 128
    """
    from benchmarks.serve import STREAMS, bench_serve

    counts = streams or list(STREAMS)
    if min(counts) < 1:
        raise InputError(f"streams must be at least 1, not {min(counts)}")
    if tokens is not None and not 1 <= tokens <= 4096:
        raise InputError(f"tokens must be 1 to 4096, not {tokens}")
    found = []
    table = new_table(
        *("streams", "texts", "tokens", "finished", "requests/s", "tokens/s", "of steps", "of loop"),
        *("first", "token", "pause", "health"),
    )
    with progress("loading", len(counts)) as advance:
        for row in bench_serve(folder, counts, quantize, tokens):
            advance(1)
            found.append(row)
            times = (row.first_token, row.per_token, row.pause, row.health)
            table.add_row(
                f"{row.streams:,}",
                f"{row.texts:,}",
                f"{row.tokens:,}",
                f"{row.finished:,}",
                f"{row.requests_per_second:.1f}",
                f"{row.tokens_per_second:,.0f}",
                f"{row.of_steps:.2f}",
                f"{row.of_loop:.2f}",
                *(f"{part.p50:.3g}, {part.p99:.3g}" for part in times),
            )
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in found]))
    else:
        show(table)


def _print_rates(rows: list[Any]) -> None:
    table = new_table(
        f"{rows[0].parameters / 1e6:.1f} M parameters", "precision", "batch", "tokens/s", "over", "ratio"
    )
    for row in rows:
        table.add_row(
            row.name,
            row.precision,
            str(row.batch),
            f"{row.tokens_per_second:,.0f}",
            row.mark,
            f"{row.ratio:.2f}",
        )
    show(table)
    typer.echo()


def _check_bench(rounds: int, device: str) -> None:
    from mhesa.ops.devices import check_device

    if rounds < 1:
        raise InputError(f"rounds must be at least 1, not {rounds}")
    check_device(device)


app = typer.Typer(help="Measure speed, as ratios inside one run.", no_args_is_help=True)
for command in (ops, train, run, decode, serve):
    app.command()(command)

if __name__ == "__main__":
    app()
