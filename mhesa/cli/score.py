"""`mhesa score`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from mhesa.cli.common import (
    Backend,
    Device,
    Folder,
    Precision,
    Quantize,
    errors,
    interruptible,
    progress,
    read_model,
)
from mhesa.errors import InputError

if TYPE_CHECKING:
    from mhesa.heatmap import Heatmap
    from mhesa.scoring import Batch, Scored
    from mhesa.session import Reader

# Characters of a stretch that a line of the terminal shows.
SHOWN = 160


def score(
    folder: Folder,
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE", help="Text files, folders, glob patterns, or - for standard input (default)."
        ),
    ] = None,
    by: Annotated[str, typer.Option(metavar="line|token|document", help="What to score.")] = "line",
    top: Annotated[
        int | None, typer.Option(metavar="N", help="Only the N of the most bits, in falling order.")
    ] = None,
    heatmap: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page that colours the text by surprisal.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each.")] = False,
    precision: Precision = None,
    quantize: Quantize = None,
    device: Device = "cpu",
    backend: Backend = None,
) -> None:
    """Tell how surprising text is, as it comes: lines that a model did not expect stand out.

    Surprisal is in bits, -log2 of the probability that the model gave the text. Text of any length is read
    in constant memory. Columns are bits, bits per byte, where, and the text.

    Examples:

        mhesa score runs/logs today.log --top 20

        tail -f server.log | mhesa score runs/logs

        mhesa score runs/mine essay.txt --heatmap essay.html

        mhesa score runs/mine texts/ --by document --json
    """
    from mhesa.scoring import BY, most_surprising

    if by not in BY:
        raise InputError(f"--by must be {', '.join(BY)}, not {by}")
    if top is not None and top < 1:
        raise InputError(f"--top must be at least 1, not {top}")
    files = _find(sources or ["-"])
    reader = read_model(folder, precision=precision, quantize=quantize, device=device, backend=backend)
    with ExitStack() as stack:
        stack.enter_context(interruptible())
        page = stack.enter_context(_page(heatmap)) if heatmap else None
        total = None if None in files else sum(file.stat().st_size for file in files if file)
        quiet = sys.stdout.isatty() and page is None and top is None
        advance = stack.enter_context(progress("scoring", total or 0, hidden=quiet or total is None))
        rows = (row for file in files for row in BY[by](*_scored(reader, file, page, advance)))
        shown = rows if top is None else most_surprising(_until_interrupted(rows), top)
        for row in shown:
            if page is None or top is not None:
                _print(row, as_json)


def _find(sources: list[str]) -> list[Path | None]:
    """The files of the sources, each once; `None` is standard input."""
    from mhesa.data import find_files

    return find_files(sources)


@contextmanager
def _page(path: Path) -> Iterator[Heatmap]:
    from mhesa.heatmap import Heatmap

    try:
        with path.open("w", encoding="utf-8") as file:
            yield Heatmap(file)
    except OSError as error:
        if error.filename is None or Path(error.filename) != path:
            raise
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    errors.print(f"Wrote {path}", highlight=False, markup=False, soft_wrap=True)


def _scored(
    reader: Reader, file: Path | None, page: Heatmap | None, advance: Callable[[int], object]
) -> tuple[str, Iterator[Batch]]:
    """A file's name and the scores of its text, which is read as these are asked for."""
    name = "-" if file is None else str(file)
    batches = _batches(reader, file, advance)
    return name, page.follow(name, batches) if page else batches


def _batches(reader: Reader, file: Path | None, advance: Callable[[int], object]) -> Iterator[Batch]:
    from mhesa.scoring import chunks_of
    from mhesa.scoring import score as score_text

    with sys.stdin.buffer if file is None else _open(file) as stream:
        for batch in score_text(reader, chunks_of(stream)):
            yield batch
            advance(sum(map(len, batch.pieces)))


def _open(file: Path) -> IO[bytes]:
    try:
        return file.open("rb")
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error


def _until_interrupted(rows: Iterable[Scored]) -> Iterator[Scored]:
    """What came before Ctrl-C: of a stream without an end, so far the most surprising is asked for."""
    try:
        yield from rows
    except KeyboardInterrupt:
        return


def _print(row: Scored, as_json: bool) -> None:
    if as_json:
        line = json.dumps(row.as_dict(), ensure_ascii=False)
    else:
        where = f"{row.number}" if row.source == "-" else f"{row.source}:{row.number}"
        line = f"{row.bits:10.1f} {row.bits_per_byte:6.2f}  {where}  {_shown(row.text)}"
    sys.stdout.write(line.encode("utf-8", "backslashreplace").decode() + "\n")
    sys.stdout.flush()


def _shown(text: bytes) -> str:
    """A stretch of text on one line."""
    line = text.decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line[: SHOWN + 1])
    return safe if len(safe) <= SHOWN else safe[: SHOWN - 1] + "…"
