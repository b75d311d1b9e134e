"""Two checkouts on one machine: the same benchmark in both, in turn."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tables import TABLES
from mhesa.errors import InputError

HERE = Path(__file__).parents[1]
BENCHMARKS = ("ops", "train", "run", "decode", "serve", "score", "context_parallel")


@dataclass(frozen=True)
class Comparison:
    """One row of both checkouts' results.

    Args:
        row: what names the row.
        speedups: this checkout's speed over the other's for each pair of runs; above 1 it is faster.
    """

    row: str
    speedups: list[float]

    @property
    def median(self) -> float:
        """The median of the speedups."""
        return statistics.median(self.speedups)


def compare(
    other: Path,
    benchmark: str,
    arguments: Sequence[str] = (),
    *,
    pairs: int = 3,
    on_run: Callable[[], object] = lambda: None,
) -> list[Comparison]:
    """Run a benchmark in this checkout and in another one in turn, and match their rows.

    Args:
        other: the other checkout's root.
        benchmark: one of `BENCHMARKS`.
        arguments: arguments of the benchmark; paths are relative to the current folder.
        pairs: how often both run.
        on_run: called after each of the `2 * pairs` runs, for a progress bar.

    Raises:
        InputError: `other` has no benchmarks, or one of the runs fails.
    """
    if benchmark not in BENCHMARKS:
        raise InputError(f"the benchmark must be one of {', '.join(BENCHMARKS)}, not {benchmark!r}")
    if not (other / "benchmarks" / "__main__.py").exists():
        raise InputError(f"{other} is not a checkout with benchmarks")
    absolute = [str(Path(word).resolve()) if Path(word).exists() else word for word in arguments]
    speedups: dict[str, list[float]] = {}
    for _ in range(pairs):
        speeds = []
        for checkout in (HERE, other.resolve()):
            speeds.append(dict(_speeds(_run(checkout, benchmark, absolute))))
            on_run()
        mine, theirs = speeds
        for row in mine.keys() & theirs.keys():
            speedups.setdefault(row, []).append(mine[row] / theirs[row])
        order = list(mine)
    return [Comparison(row, speedups[row]) for row in order if row in speedups]


def _run(checkout: Path, benchmark: str, arguments: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks", benchmark, *arguments, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{benchmark} in {checkout} failed: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _speeds(result: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The speed of every row that has one, by what names it."""
    for name, rows in result["tables"].items():
        table = TABLES[name]
        if table.figure is not None:
            for row in rows:
                figure = row[table.figure]
                speed = figure if table.figure.endswith("_per_second") else 1 / figure
                yield ", ".join([name, *(str(row[field]) for field in table.identity)]), speed
