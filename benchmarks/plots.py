"""Pictures for `docs/learning.md` and `docs/logs.md`, drawn from saved results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from benchmarks.contestants import RECIPES
from benchmarks.results import FOLDER, saved

DOCS = Path(__file__).parents[1] / "docs"
COLOURS = {name: f"C{index}" for index, name in enumerate(RECIPES)}

Row = Mapping[str, Any]
# Draws rows into axes.
Part = Callable[[Axes, Sequence[Row]], None]


def draw_all(docs: Path = DOCS, folder: Path = FOLDER) -> list[Path]:
    """Draw every picture whose results are saved."""
    tokens, minutes = saved("learning_tokens", folder), saved("learning_minutes", folder)
    probes = saved("learning_latch", folder) + saved("learning_recall", folder)
    drawn = []
    if tokens and minutes:
        runs = [result["tables"]["runs"] for result in (tokens[-1], minutes[-1])]
        drawn.append(_picture(docs / "learning-loss.svg", [(_losses, rows) for rows in runs]))
    if tokens:
        tables = tokens[-1]["tables"]
        parts = [(_by_position, tables["positions"]), (_by_context, tables["contexts"])]
        drawn.append(_picture(docs / "learning-context.svg", parts))
    if probes:
        rows = [(_by_distance, result["tables"]["recollection"]) for result in probes]
        drawn.append(_picture(docs / "learning-memory.svg", rows))
    for result in saved("logs", folder)[-1:]:
        found = result["tables"]["faults"]
        by_log = [(_recall, list(rows)) for _, rows in groupby(found, key=itemgetter("log"))]
        drawn.append(_picture(docs / "logs-found.svg", by_log, columns=2))
    return drawn


def _picture(path: Path, parts: Sequence[tuple[Part, Sequence[Row]]], columns: int = 0) -> Path:
    """Parts side by side, or in rows of some columns, in one SVG that is the same each time it is drawn."""
    columns = columns or len(parts)
    rows = -(-len(parts) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasSVG(figure)
    places = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (draw, found) in zip(places, parts, strict=True):
        draw(axes, found)
        axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    return path


def _recall(axes: Axes, rows: Sequence[Row]) -> None:
    """The share of faults found, by kind and method."""
    methods = list(rows[0]["recall"])
    shares = [[row["recall"][method] for method in methods] for row in rows]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            colour = "white" if share > 0.6 else "black"
            axes.text(x, y, f"{share:.2f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(methods)), methods, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["kind"] for row in rows], fontsize=8)
    axes.set_title(rows[0]["log"], fontsize=10)


def _losses(axes: Axes, rows: Sequence[Row]) -> None:
    """A point for each seed, and the mean as a line."""
    names = list(dict.fromkeys(row["recipe"] for row in rows))
    for place, name in enumerate(reversed(names)):
        found = [row["short"] for row in rows if row["recipe"] == name]
        axes.plot(found, [place] * len(found), "o", color=COLOURS[name], alpha=0.6)
        mean = sum(found) / len(found)
        axes.plot([mean] * 2, [place - 0.3, place + 0.3], color=COLOURS[name])
        axes.annotate(f"{mean:.3f}", (mean, place + 0.35), ha="center", fontsize=8)
    axes.grid(alpha=0.25)
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_ylim(-0.6, len(names) - 0.2)
    axes.set_xlabel("nats a byte, held out")
    axes.set_title(f"after {rows[0]['budget']}", fontsize=10)


def _lines(axes: Axes, rows: Sequence[Row], x: str, y: str) -> None:
    for name in dict.fromkeys(row["recipe"] for row in rows):
        points: dict[float, list[float]] = {}
        for row in rows:
            if row["recipe"] == name:
                points.setdefault(row[x], []).append(row[y])
        means = [sum(values) / len(values) for values in points.values()]
        axes.plot(list(points), means, ".-", color=COLOURS[name], label=name)
    axes.set_xscale("log")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def _by_position(axes: Axes, rows: Sequence[Row]) -> None:
    _lines(axes, rows, "last", "over_short")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_ylim(0.9, 1.3)
    axes.set_xlabel("bytes read")
    axes.set_ylabel("loss over that of windows of 256")


def _by_context(axes: Axes, rows: Sequence[Row]) -> None:
    _lines(axes, rows, "context", "loss")
    best = min(row["loss"] for row in rows)
    axes.set_ylim(best * 0.98, best * 1.5)
    axes.set_xlabel("bytes before what is predicted")
    axes.set_ylabel("nats a byte")


def _by_distance(axes: Axes, rows: Sequence[Row]) -> None:
    _lines(axes, rows, "distance", "accuracy")
    axes.axhline(rows[0]["chance"], color="grey", linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("bytes between")
    axes.set_ylabel("right answers")
    axes.set_title(rows[0]["probe"], fontsize=10)
