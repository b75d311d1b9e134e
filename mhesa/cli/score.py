"""`mhesa score`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from heapq import nlargest
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhesa.atomic_io import check_outputs
from mhesa.cli.common import (
    Backend,
    Device,
    Folder,
    Precision,
    Quantize,
    TextField,
    progress,
    read_model,
    share,
    stderr,
)
from mhesa.cli.score_input import documents, find_texts, key_finder, size_in_bytes, word_list
from mhesa.cli.score_output import Counts, Output
from mhesa.errors import InputError
from mhesa.terminal import say
from mhesa.web_pages import check_replaceable

if TYPE_CHECKING:
    from mhesa.inference.heatmap import Heatmap
    from mhesa.inference.line_scores import FalseAlarms, LineScores
    from mhesa.inference.scoring import Batch
    from mhesa.inference.units import Columns

# The exit code where a line was marked.
ALARM = 3
# Memory for sessions, unless --key-memory says another.
KEY_MEMORY = "256MB"
# Options, by the panels of `--help`.
_of_lines = partial(typer.Option, rich_help_panel="Logs: lines")
_of_tables = partial(typer.Option, rich_help_panel="Tables: words, characters, sentences, tokens")


def score(
    folder: Folder,
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE", help="Text files, folders, glob patterns, or - for standard input (default)."
        ),
    ] = None,
    by: Annotated[
        str,
        typer.Option(metavar="line|token|document|word|character|sentence", help="What is scored."),
    ] = "line",
    top: Annotated[
        int | None,
        typer.Option(metavar="N", help="Print only the N with the highest first column, highest first."),
    ] = None,
    heatmap: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write an HTML page of the text, its words (characters, sentences) coloured by surprisal.",
        ),
    ] = None,
    text_field: TextField = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print each score as a line of JSON.")] = False,
    key: Annotated[
        str | None,
        _of_lines(metavar="REGEX", help="Keep one session for each value of the first group of REGEX."),
    ] = None,
    key_field: Annotated[
        str | None,
        _of_lines(
            metavar="NAME",
            help="The same for JSON lines, which are read whole: the field whose value is the key.",
        ),
    ] = None,
    key_memory: Annotated[
        str | None,
        _of_lines(
            metavar="SIZE",
            help=f"Memory for sessions, {KEY_MEMORY} if omitted; the rest, least recently used, is on disk.",
        ),
    ] = None,
    state: Annotated[
        Path | None,
        _of_lines(
            metavar="FILE",
            help="Keep sessions and how far files were read; the next run with FILE goes on from there.",
        ),
    ] = None,
    mask: Annotated[
        list[str] | None,
        _of_lines(
            metavar="REGEX", help="Text that matches is read, but not counted in the score; may be repeated."
        ),
    ] = None,
    preset: Annotated[
        list[str] | None,
        _of_lines(
            metavar="times|numbers|addresses|uuids|paths",
            help="Built-in mask; may be repeated.",
        ),
    ] = None,
    false_alarms: Annotated[
        float | None,
        _of_lines(
            metavar="RATE",
            help="Mark lines whose score is above the quantile 1 - RATE of the scores before (0.01: above "
            "99 % of them); exit code 3 if any.",
        ),
    ] = None,
    only: Annotated[bool, _of_lines("--only", help="Print only marked lines.")] = False,
    context: Annotated[
        int, _of_lines(metavar="N", help="With --only, also print N lines before and after each.")
    ] = 0,
    unit: Annotated[
        str | None,
        _of_tables(
            metavar="bits|nats", help="Unit of surprisal and entropy, bits by default; makes tokens a table."
        ),
    ] = None,
    spill: Annotated[
        int, _of_tables(metavar="N", help="Add columns with the surprisal of the N preceding units.")
    ] = 0,
    correct: Annotated[
        bool,
        _of_tables(
            "--correct", help="Count the probability of a word's end with the word, not with the next one."
        ),
    ] = False,
    words: Annotated[
        Path | None,
        _of_tables(metavar="FILE", help="File with the words of the text, separated by whitespace."),
    ] = None,
    skip_first: Annotated[
        bool, _of_tables("--skip-first", help="Leave out the first unit of each text.")
    ] = False,
    tsv: Annotated[bool, _of_tables("--tsv", help="Print tab-separated values with a header.")] = False,
    precision: Precision = None,
    quantize: Quantize = None,
    device: Device = "cpu",
    backend: Backend = None,
) -> None:
    """Score how surprising text is to a model, while it is read: unexpected lines stand out.

    Surprisal is in bits: -log2 of the probability that the model gave the text. Memory does not grow with the
    text. Columns of lines: bits, bits per byte, file and line, the text. With --false-alarms, --mask or
    --preset the first is the score: the bits of the most surprising byte, less what they are on average in
    lines that begin alike. Columns of words and other units: surprisal, entropy, rank, file and number, the
    text.

    Bits of a token that spans lines are shared out by its bytes. With a vocabulary that has such tokens, a
    line of standard input is scored when the next one begins; with bytes, as soon as it ends.

    Surprisal finds what is new, not what is bad.

    Examples:

        mhesa score runs/logs today.log --top 20

        tail -f server.log | mhesa score runs/logs --false-alarms 0.001 --only

        mhesa score runs/logs server.log --key 'user=(\\w+)' --state server.state --preset times

        mhesa score runs/mine essay.txt --by word --tsv --spill 2

        mhesa score runs/mine essay.txt --heatmap essay.html

        mhesa score runs/mine texts/ --by document --json

        torchrun --nproc-per-node 4 -m mhesa score runs/mine long.txt --top 20
    """
    from mhesa.inference.keyed_sessions import KeyedSessions
    from mhesa.inference.line_scores import FalseAlarms, LineScores
    from mhesa.inference.lines import Masks
    from mhesa.inference.log_reader import LogReader, with_context
    from mhesa.inference.scoring import BY
    from mhesa.inference.scoring import score as score_text
    from mhesa.inference.statistics import BITS, STATISTICS
    from mhesa.inference.units import TOKEN, UNITS, Columns
    from mhesa.processes import check_same, rank

    known = ("line", *BY, *UNITS)
    if by not in known:
        raise InputError(f"--by must be {', '.join(known)}, not {by}")
    if top is not None and top < 1:
        raise InputError(f"--top must be at least 1, not {top}")
    if context < 0:
        raise InputError(f"--context must be at least 0, not {context}")
    keyed = key is not None or key_field is not None or state is not None
    lines = {"--key": key, "--key-field": key_field, "--state": state, "--mask": mask, "--preset": preset}
    _only_with(by == "line", "needs --by line", lines | {"--false-alarms": false_alarms})
    _only_with(by == "word", "needs --by word", {"--correct": correct, "--words": words})
    table = {"--spill": spill, "--skip-first": skip_first, "--tsv": tsv, "--unit": unit}
    _only_with(by in (*UNITS, TOKEN), f"needs --by {', '.join(UNITS)} or {TOKEN}", table)
    in_units = by in UNITS or any(table.values())
    _only_with(false_alarms is not None, "needs --false-alarms", {"--only": only})
    _only_with(only, "needs --only", {"--context": context})
    _only_with(key is None, "cannot be used with --key", {"--key-field": key_field})
    _only_with(not keyed, "cannot be used with --key, --key-field or --state", {"--heatmap": heatmap})
    _only_with(tsv or as_json, "needs --tsv or --json", {"--spill": spill})
    _only_with(keyed, "needs --key, --key-field or --state", {"--key-memory": key_memory})
    _only_with(not tsv, "cannot be used with --tsv", {"--json": as_json, "--top": top})
    columns = Columns(unit=unit or "bits", spill=spill, correct=correct, skip_first=skip_first)
    alarms = None if false_alarms is None else FalseAlarms(false_alarms)
    scores, find_key = LineScores(Masks(mask or (), preset or ())), key_finder(key, key_field)
    memory = size_in_bytes(key_memory or KEY_MEMORY, "--key-memory")
    files = find_texts(sources or ["-"])
    inputs = [file.path if file else 0 for file in files]
    check_outputs([1], inputs)
    check_outputs(filter(None, (heatmap, state)), [*inputs, *folder.iterdir()])
    if words is not None and len(files) > 1:
        raise InputError("--words are those of one text; give one source")
    given = None if words is None else word_list(words)
    reader = read_model(folder, precision=precision, quantize=quantize, device=device, backend=backend)
    check_same({"text": [(file.name, file.size) if file else "-" for file in files]})
    decoder = share(reader, quantize=quantize)
    if decoder is not None and None in files:
        raise InputError("many processes cannot share standard input; give a file")
    if decoder is not None and (keyed or in_units):
        raise InputError("many processes can score lines, tokens and documents alone; start one process")
    with ExitStack() as stack:
        page = stack.enter_context(_page(heatmap, by)) if heatmap and rank() == 0 else None
        total = sum(file.size for file in files if file)
        # Where only a page was asked for, no rows are printed.
        shown = rank() == 0 and (page is None or any((top, as_json, tsv, alarms)))
        hidden = None in files or (sys.stdout.isatty() and shown and top is None)
        advance = stack.enter_context(progress("scoring", total, hidden=hidden))
        texts = documents(files, text_field, advance, whole=key_field is not None)
        log = None
        rows: Iterator[Any]
        if keyed:
            # Closed without a commit: what was read since the last one comes again.
            sessions = stack.enter_context(closing(KeyedSessions(reader, memory=memory, path=state)))
            log = LogReader(sessions, find_key, scores, alarms)
            rows = chain.from_iterable(log.read(text.name, text.chunks, text.identity) for text in texts)
        else:
            # Several processes measure surprisal alone.
            shown_on_page = STATISTICS if page is not None and decoder is None else BITS
            statistics = columns.statistics(reader) if in_units else shown_on_page
            make_rows = _rows_maker(by, scores, alarms, given, columns if in_units else None)
            batches = (
                (text.name, score_text(reader, text.chunks, decoder, statistics, with_end=in_units))
                for text in texts
            )
            if page is not None:
                batches = ((name, page.follow(name, of_text)) for name, of_text in batches)
            rows = chain.from_iterable(make_rows(name, of_text) for name, of_text in batches)
        counts = Counts()
        rows = counts.of(rows)
        rows = with_context(rows, context) if only else rows
        with_score = bool(alarms or mask or preset)
        if top is not None:
            first = attrgetter("score" if with_score else "surprisal" if in_units else "bits")
            rows = iter(nlargest(top, _until_interrupted(rows), key=first))
        output = Output(as_json, tsv, columns, with_score=with_score)
        if rank() == 0:
            output.header()
        for row in rows:
            if shown:
                output.show(row)
    if rank() == 0:
        counts.report(log, alarms)
    if counts.alarms:
        raise typer.Exit(ALARM)


def _rows_maker(
    by: str,
    scores: LineScores,
    alarms: FalseAlarms | None,
    words: Iterable[str] | None,
    columns: Columns | None,
) -> Callable[[str, Iterable[Batch]], Iterator[Any]]:
    """What makes the rows of a text of its name and its batches: units with `columns`, or spans of text."""
    from mhesa.inference.log_reader import mark_alarms
    from mhesa.inference.scoring import BY, line_pieces
    from mhesa.inference.units import UNITS, GivenWords, read_units, token_units

    if columns is not None:
        segmenter = UNITS.get(by) if words is None else GivenWords(words)
        if segmenter is None:
            return partial(token_units, columns=columns)
        return partial(read_units, segmenter=segmenter, columns=columns)
    if by == "line":
        return lambda name, batches: mark_alarms(scores.read(name, line_pieces(batches)), alarms)
    return BY[by]


def _only_with(holds: bool, rule: str, options: Mapping[str, object]) -> None:
    """Refuse options that were given although their rule, such as "needs --only", does not hold."""
    given = [name for name, value in options.items() if value]
    if given and not holds:
        raise InputError(f"{given[0]} {rule}")


@contextmanager
def _page(path: Path, by: str) -> Iterator[Heatmap]:
    from mhesa.inference.heatmap import Heatmap
    from mhesa.inference.units import UNITS, find_words

    check_replaceable(path)
    try:
        with (
            path.open("w", encoding="utf-8", errors="backslashreplace") as file,
            closing(Heatmap(file, UNITS.get(by, find_words))) as page,
        ):
            yield page
    except KeyboardInterrupt:
        say(stderr, f"Wrote {path}, as far as the text was read")
        raise
    except OSError as error:
        if error.filename is None or Path(error.filename) != path:
            raise
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    say(stderr, f"Wrote {path}")


def _until_interrupted(rows: Iterable[Any]) -> Iterator[Any]:
    """The rows until Ctrl-C, so that --top can print what it has of an endless stream."""
    try:
        yield from rows
    except KeyboardInterrupt:
        return
