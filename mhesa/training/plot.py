"""The training curve as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_curve(rows: Sequence[Mapping[str, Any]], levels: Mapping[str, float], path: Path) -> None:
    """Draw bits per byte over training, with horizontal lines to compare with.

    Args:
        rows: rows of `metrics.jsonl`, with evaluations; without rows nothing is drawn.
        levels: the heights of the lines in bits per byte, by label.
        path: the PNG to write.
    """
    evaluations = [row for row in rows if "sample" in row]
    rows = [row for row in rows if "loss" in row]
    if not rows:
        return
    figure = Figure(figsize=(8, 4.5), dpi=120)
    # Margins that fit: finding them takes as long as drawing.
    figure.subplots_adjust(left=0.1, right=0.985, bottom=0.115, top=0.975)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    tokens = [row["tokens"] / 1e6 for row in rows]
    axes.plot(tokens, [row["bits_per_byte"] for row in rows], linewidth=1.3, label="training")
    if evaluations:
        tokens_per_step = rows[0]["tokens"] / rows[0]["step"] / 1e6
        axes.plot(
            [row["step"] * tokens_per_step for row in evaluations],
            [row["held_out_bits_per_byte"] for row in evaluations],
            color="C1",
            linewidth=1.3,
            marker=".",
        )
    for index, (label, level) in enumerate(levels.items(), start=1):
        axes.axhline(level, color=f"C{index}", linewidth=1.1, linestyle="--", label=f"{label}: {level:.2f}")
    axes.set_xlabel("million tokens read")
    axes.set_ylabel("bits per byte")
    axes.set_ylim(0, min(9.0, max(row["bits_per_byte"] for row in rows) * 1.05))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
