"""`mhesa score`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mhesa.atomic_io import check_output
from mhesa.cli.common import (
    Backend,
    Device,
    Folder,
    Precision,
    Quantize,
    TextField,
    errors,
    interruptible,
    progress,
    read_model,
    share,
)
from mhesa.errors import InputError

if TYPE_CHECKING:
    from mhesa.data import File
    from mhesa.inference.heatmap import Heatmap
    from mhesa.inference.scoring import Scored

# Characters of a text to print on one line.
SHOWN = 160


def score(
    folder: Folder,
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE", help="Text files, folders, glob patterns, or - for standard input (default)."
        ),
    ] = None,
    by: Annotated[str, typer.Option(metavar="line|token|document", help="What each score is of.")] = "line",
    top: Annotated[
        int | None, typer.Option(metavar="N", help="Print only the N with the most bits, highest first.")
    ] = None,
    heatmap: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write an HTML page of the text, coloured by surprisal."),
    ] = None,
    text_field: TextField = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print each score as a line of JSON.")] = False,
    precision: Precision = None,
    quantize: Quantize = None,
    device: Device = "cpu",
    backend: Backend = None,
) -> None:
    """Score how surprising text is to a model, while it is read: unexpected lines stand out.

    Surprisal is in bits: -log2 of the probability that the model gave the text. Memory does not grow with the
    text. Columns: bits, bits per byte, file and line, the text.

    Bits of a token that spans lines are shared out by its bytes. With a vocabulary that has such tokens, a
    line of standard input is scored when the next one begins; with bytes, as soon as it ends.

    Examples:

        mhesa score runs/logs today.log --top 20

        tail -f server.log | mhesa score runs/logs

        mhesa score runs/mine essay.txt --heatmap essay.html

        mhesa score runs/mine texts/ --by document --json

        torchrun --nproc-per-node 4 -m mhesa score runs/mine long.txt --top 20
    """
    from mhesa.inference.scoring import BY, most_surprising
    from mhesa.inference.scoring import score as score_text
    from mhesa.training.distributed import rank

    if by not in BY:
        raise InputError(f"--by must be {', '.join(BY)}, not {by}")
    if top is not None and top < 1:
        raise InputError(f"--top must be at least 1, not {top}")
    files = _find(sources or ["-"])
    inputs = [file.path if file else 0 for file in files]
    check_output(1, inputs)
    if heatmap:
        check_output(heatmap, [*inputs, *folder.iterdir()])
    reader = read_model(folder, precision=precision, quantize=quantize, device=device, backend=backend)
    decoder = share(reader, quantize=quantize)
    if decoder is not None and None in files:
        raise InputError("many processes cannot share standard input; give a file")
    with ExitStack() as stack:
        stack.enter_context(interruptible())
        page = stack.enter_context(_page(heatmap)) if heatmap and rank() == 0 else None
        follow = page.follow if page else lambda name, batches: batches
        total = sum(file.size for file in files if file)
        hidden = None in files or (sys.stdout.isatty() and page is None and top is None)
        advance = stack.enter_context(progress("scoring", total, hidden=hidden))
        rows = (
            row
            for name, chunks in _documents(files, text_field, advance)
            for row in BY[by](name, follow(name, score_text(reader, chunks, decoder)))
        )
        shown = rows if top is None else most_surprising(_until_interrupted(rows), top)
        for row in shown:
            if rank() == 0 and (page is None or top is not None):
                _print(row, as_json)


def _find(sources: list[str]) -> list[File | None]:
    """The files of sources, each once; `None` is standard input, which is scored while it is read."""
    from mhesa.data import find_files

    found: dict[object, File | None] = {}
    for source in sources:
        for file in [None] if source == "-" else find_files([source]):
            found.setdefault(file and file.identity(), file)
    return list(found.values())


def _documents(
    files: list[File | None], text_field: str, advance: Callable[[int], object]
) -> Iterator[tuple[str, Iterator[bytes]]]:
    """The documents of some files: the name and the chunks of bytes of each."""
    from mhesa.data import standard_input

    for file in files:
        if file is None:
            yield "-", standard_input()
        else:
            yield from file.documents(text_field, advance)


@contextmanager
def _page(path: Path) -> Iterator[Heatmap]:
    from mhesa.inference.heatmap import Heatmap

    try:
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield Heatmap(file)
    except OSError as error:
        if error.filename is None or Path(error.filename) != path:
            raise
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    errors.print(f"Wrote {path}", highlight=False, markup=False, soft_wrap=True)


def _until_interrupted(rows: Iterable[Scored]) -> Iterator[Scored]:
    """The rows until Ctrl-C, so that --top can print what it has of an endless stream."""
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
    """The start of a text on one line, unprintable characters escaped."""
    line = text.decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line[: SHOWN + 1])
    return safe if len(safe) <= SHOWN else safe[: SHOWN - 1] + "…"
