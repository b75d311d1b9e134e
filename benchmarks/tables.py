"""Rows of results as tables, in the terminal and in the pages that show them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from benchmarks.results import FOLDER, saved

ROOT = Path(__file__).parents[1]
# The pages with tables of results.
PAGES = (
    ROOT / "benchmarks" / "README.md",
    ROOT / "docs" / "learning.md",
    ROOT / "docs" / "logs.md",
)
SECTION = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.S)

# The methods that `benchmarks.logs` compares, in the order of the columns.
METHODS = (
    "adaptive",
    "adaptive, by key",
    "fixed",
    "fixed, by key",
    "n-grams of characters",
    "rare words",
    "rare characters",
    "new templates",
    "PCA of templates",
    "isolation forest",
)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """How rows of one kind are shown and compared.

    Args:
        columns: for each heading a format string over the fields of a row.
        identity: the fields that name a row, and by which two runs are matched.
        figure: the field that two runs are compared by; a rate (`..._per_second`) or a time.
    """

    columns: dict[str, str]
    identity: tuple[str, ...]
    figure: str | None = None

    def cells(self, rows: Iterable[Row]) -> list[list[str]]:
        """The text of every cell.

        Left cells that repeat those of the row above are empty, and so are figures that are missing.

        >>> table = Table({"name": "{name}", "ms": "{ms:.1f}"}, identity=("name",))
        >>> table.cells([{"name": "clone", "ms": 1}, {"name": "clone", "ms": None}])
        [['clone', '1.0'], ['', '']]
        """
        found, above = [], [""] * len(self.columns)
        for row in rows:
            line = [_cell(template, row) for template in self.columns.values()]
            same = [cell == before for cell, before in zip(line, above, strict=True)]
            repeated = [*same, False].index(False)
            found.append([""] * repeated + line[repeated:])
            above = line
        return found


def _cell(template: str, row: Row) -> str:
    names = [re.split(r"\W", name)[0] for _, name, _, _ in Formatter().parse(template) if name]
    return "" if any(row[name] is None for name in names) else template.format_map(row)


TABLES = {
    "operators": Table(
        {
            "shape": "{shape}",
            "type": "{dtype}",
            "timed": "{timed}",
            "operator": "{operator}",
            "ms": "{milliseconds:.2f}",
            "GB/s": "{gigabytes_per_second:.1f}",
            "x clone": "{over_clone:.2f}",
            "error": "{error:.0e}",
        },
        identity=("shape", "dtype", "timed", "operator"),
        figure="milliseconds",
    ),
    "lengths": Table(
        {
            "timed": "{timed}",
            "length, 512 channels": "{length:,}",
            "ms": "{milliseconds:.2f}",
            "ns/step": "{nanoseconds_per_step:.0f}",
            "x one eighth": "{over_shorter:.2f}",
        },
        identity=("timed", "length"),
        figure="milliseconds",
    ),
    "steps": Table(
        {
            "step": "{name}",
            "precision": "{precision}",
            "ms": "{milliseconds:.1f}",
            "tokens/s": "{tokens_per_second:,.0f}",
            "x the original": "{times_the_original:.2f}",
            "over the products": "{over_the_products:.2f}",
        },
        identity=("name", "precision"),
        figure="milliseconds",
    ),
    "parts": Table(
        {"part of a run": "{name}", "ms a step": "{milliseconds_a_step:.2f}", "share": "{share:.1%}"},
        identity=("name",),
        figure="milliseconds_a_step",
    ),
    "run": Table(
        {
            "steps": "{steps:,}",
            "seconds": "{seconds:.0f}",
            "outside of forward, backward, optimizer": "{outside:.1%}",
            "nats per token held out": "{loss:.3f}",
        },
        identity=(),
        figure=None,
    ),
    "rates": Table(
        {
            "parameters": "{parameters:,}",
            "what": "{name}",
            "precision": "{precision}",
            "batch": "{batch}",
            "tokens/s": "{tokens_per_second:,.0f}",
            "over": "{mark}",
            "ratio": "{ratio:.2f}",
        },
        identity=("parameters", "name", "precision", "batch"),
        figure="tokens_per_second",
    ),
    "scores": Table(
        {
            "precision": "{precision}",
            "MB": "{megabytes:.1f}",
            "lines in": "{name}",
            "bytes/s": "{bytes_per_second:,.0f}",
            "over one": "{over_one:.2f}",
            "start, s": "{start:.1f}",
            "peak, MB": "{peak:.0f}",
            "of an eighth, MB": "{peak_of_part:.0f}",
        },
        identity=("name", "precision", "megabytes"),
        figure="bytes_per_second",
    ),
    "sequences": Table(
        {
            "tokens": "{length:,}",
            "processes": "{processes}",
            "tokens/s": "{tokens_per_second:,.0f}",
            "over one": "{over_one:.2f}",
            "GiB a process": "{gibibytes:.2f}",
            "over one's": "{memory_over_one:.2f}",
            "of it private": "{private_over_one:.2f}",
            "bytes sent a layer": "{sent:,.0f}",
            "over the state": "{sent_over_state:.2f}",
            "loss": "{loss:.5f}",
        },
        identity=("length", "processes"),
        figure="tokens_per_second",
    ),
    "paper": Table(
        {
            "GPUs": "{gpus:,}",
            "link": "{link}",
            "ms, rings": "{ring:.1f}",
            "ms, doubling": "{doubling:.1f}",
            "tokens a GPU for 5 %, rings": "{tokens_ring:,}",
            "doubling": "{tokens_doubling:,}",
            "ring attention": "{ring_attention:,}",
        },
        identity=("gpus", "link"),
    ),
    "memory": Table(
        {"session of": "{name}", "tokens": "{context:,}", "bytes": "{bytes:,}"},
        identity=("name", "context"),
    ),
    "runs": Table(
        {
            "budget": "{budget}",
            "model": "{recipe}",
            "parameters": "{parameters:,}",
            "rate": "{rate:g}",
            "seed": "{seed}",
            "steps": "{steps:,}",
            "CPU s": "{seconds:.0f}",
            "nats, from nothing every 256 bytes": "{short:.4f}",
            "every 4,096": "{long:.4f}",
        },
        identity=("budget", "recipe", "rate", "seed"),
    ),
    "positions": Table(
        {
            "model": "{recipe}",
            "from byte": "{first:,}",
            "to": "{last:,}",
            "nats": "{loss:.4f}",
            "over the same bytes from nothing every 256": "{over_short:.3f}",
        },
        identity=("recipe", "first"),
    ),
    "contexts": Table(
        {"model": "{recipe}", "bytes before": "{context:,}", "nats": "{loss:.4f}"},
        identity=("recipe", "context"),
    ),
    "recollection": Table(
        {
            "probe": "{probe}",
            "model": "{recipe}",
            "seed": "{seed}",
            "distance": "{distance:,}",
            "right": "{accuracy:.1%}",
            "chance": "{chance:.1%}",
        },
        identity=("probe", "recipe", "seed", "distance"),
    ),
    "faults": Table(
        {"log": "{log}", "fault": "{kind}", "faulty lines": "{faults:,}"}
        | {name: f"{{recall[{name}]:.2f}}" for name in METHODS},
        identity=("log", "kind"),
    ),
    "alerts": Table(
        {"method": "{method}", "alerts": "{alerts}", "area under the curve": "{area:.3f}"},
        identity=("method",),
    ),
    "load": Table(
        {
            "streams": "{streams:,}",
            "texts": "{texts:,}",
            "tokens": "{tokens:,}",
            "finished": "{finished:,}",
            "requests/s": "{requests_per_second:.1f}",
            "tokens/s": "{tokens_per_second:,.0f}",
            "of steps": "{of_steps:.2f}",
            "of loop": "{of_loop:.2f}",
            "first": "{first_token[p50]:,.1f}, {first_token[p99]:,.1f}",
            "token": "{per_token[p50]:.3g}, {per_token[p99]:.3g}",
            "pause": "{pause[p50]:,.1f}, {pause[p99]:,.1f}",
            "health": "{health[p50]:,.1f}, {health[p99]:,.1f}",
        },
        identity=("streams",),
        figure="tokens_per_second",
    ),
}


def markdown(result: Mapping[str, Any]) -> str:
    """A saved result as Markdown: machine, versions, date and command, then its tables."""
    machine = result["machine"]
    facts = [
        f"{machine['processor']} ({', '.join([machine['family'], *machine['instruction_sets']])})",
        f"{machine['cores']} {'core' if machine['cores'] == 1 else 'cores'}",
        machine["memory_gib"] and f"{machine['memory_gib']} GiB",
        *(f"{name} {version}" for name, version in result["versions"].items()),
    ]
    parts = [f"{', '.join(filter(None, facts))}. {result['date']}, `{result['command']}`:\n"]
    for name, rows in result["tables"].items():
        table = TABLES[name]
        lines = [list(table.columns), ["---"] * len(table.columns), *table.cells(rows)]
        parts.append("".join(f"| {' | '.join(cells)} |\n" for cells in lines))
    return "\n".join(parts)


def with_tables(text: str, folder: Path = FOLDER) -> str:
    """A Markdown text with the saved results between its markers.

    A section is `<!-- results: ops -->` to `<!-- end of results -->`, for the benchmark `ops`.
    """

    def section(found: re.Match[str]) -> str:
        results = "\n".join(markdown(result) for result in saved(found[2], folder))
        return f"{found[1]}\n{results}\n{found[3]}"

    return SECTION.sub(section, text)
