"""Progress of a run: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mhesa.terminal import escape_controls, say
from mhesa.training.metrics import Row
from mhesa.training.schedule import Budget

SECONDS_BETWEEN_LINES = 10.0


class ProgressDisplay:
    """A context that shows how far a run is, its loss and its speed; each part of the run has its own bar."""

    def __init__(self, console: Console, budget: Budget) -> None:
        self.console = console
        self.budget = budget
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = TaskID(-1)
        self._last_line = time.monotonic()

    def __enter__(self) -> ProgressDisplay:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def open(self, description: str, total: float) -> None:
        """Start the bar of the next part of the run."""
        self._task = self._progress.add_task(description, total=total, figures="")

    def close(self) -> None:
        """Remove the current bar."""
        self._progress.remove_task(self._task)

    def advance(self, amount: float) -> None:
        """Advance the current bar."""
        self._progress.advance(self._task, amount)

    def show(self, row: Row) -> None:
        """Show a row of metrics, in the bar or as a line, or an evaluation with its sample."""
        if "sample" in row:
            self._show_evaluation(row)
            return
        dropout = f"  dropout {row['dropout']:g}" if row["dropout"] else ""
        figures = (
            f"step {row['step']:,}  loss {row['loss']:.3f}  {row['bits_per_byte']:.3f} bits/byte  "
            f"{row['tokens_per_second']:,.0f} tokens/s{dropout}"
        )
        done = min(self.budget.spent(row["step"]), 1.0)
        if self.console.is_terminal:
            self._progress.update(self._task, figures=figures, completed=done)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            left = self.budget.seconds * (1 - done) / max(done, 1e-9)
            say(self.console, f"{done:4.0%}  {figures}  {left:,.0f} s left")

    def _show_evaluation(self, row: Row) -> None:
        self.console.rule(f"step {row['step']:,}: {row['held_out_bits_per_byte']:.3f} bits/byte held out")
        say(self.console, escape_controls(row["sample"]))
        self.console.rule()
