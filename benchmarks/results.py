"""Results as JSON: what was measured, where, and with what."""

from __future__ import annotations

import datetime
import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import Machine, this_machine, versions

FOLDER = Path(__file__).parent / "results"


def result(
    benchmark: str, tables: Mapping[str, Iterable[Any]], arguments: Sequence[str], device: str = "cpu"
) -> dict[str, Any]:
    """What a benchmark found, as it is printed by `--json` and saved by `--save`.

    Args:
        benchmark: name of the benchmark, such as `ops`.
        tables: rows (dataclasses) by the table's name in `benchmarks.tables.TABLES`.
        arguments: arguments of its command line; of paths only the last part is kept.
        device: the torch device it ran on.
    """
    shown = [Path(argument).name if os.sep in argument else argument for argument in arguments]
    return {
        "benchmark": benchmark,
        "command": shlex.join(["python", "-m", "benchmarks", *shown]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": asdict(this_machine(device)),
        "versions": versions(),
        "tables": {name: [asdict(row) for row in rows] for name, rows in tables.items()},
    }


def save(found: Mapping[str, Any], folder: Path) -> Path:
    """Write a result to `<folder>/<machine>/<benchmark>.json`, in place of an earlier one."""
    path = folder / Machine(**found["machine"]).folder / f"{found['benchmark']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def saved(benchmark: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The saved results of a benchmark, sorted by machine."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"*/{benchmark}.json"))]
