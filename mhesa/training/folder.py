"""A run's folder: its files, and the checks before it is written to."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import mhesa
from mhesa.atomic_io import check_outputs, read_json, remove, write_file
from mhesa.errors import InputError, os_errors
from mhesa.file_names import CHECKPOINTS, METRICS, RUN_FILES, SETTINGS, WEIGHTS
from mhesa.locks import only_writer_of_folder
from mhesa.processes import broadcast, rank
from mhesa.terminal import say
from mhesa.training import checkpoint
from mhesa.training.schedule import Budget
from mhesa.training.settings import TrainingSettings

# A key of the last row of metrics of a complete run.
COMPLETE = "complete"
# Settings that a resumed run may change.
CHANGEABLE = frozenset(
    {
        *("out", "steps", "minutes", "device", "backend", "save_every", "keep", "eval_every", "patience"),
        *("report_to", "lr", "muon_lr", "clip", "accumulate", "compile", "recompute", "fsdp"),
        "context_parallel",
        # Sources may move: their text is compared by its digest.
        "sources",
    }
)


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the first process locks it for all.

    Raises:
        InputError: in every process: another run is writing into the folder, or it cannot be written to.
    """
    with ExitStack() as stack:
        refusal = ""
        if rank() == 0:
            try:
                stack.enter_context(only_writer_of_folder(folder))
            except InputError as error:
                refusal = str(error)
        if refusal := broadcast(refusal):
            raise InputError(refusal)
        yield


def check_inputs(folder: Path, inputs: Iterable[Path | int]) -> None:
    """Raise `InputError` if a run in `folder` would delete or replace one of the files that it reads."""
    written = [path for name in RUN_FILES for path in [folder / name, *(folder / name).rglob("*")]]
    check_outputs([path for path in written if path.is_file()], inputs)


def check_free(folder: Path) -> None:
    """Raise `InputError` if the folder holds a run."""
    if any((folder / name).exists() for name in RUN_FILES):
        raise InputError(
            f"{folder} already holds a run; continue it with --resume or replace it with --overwrite"
        )


def checkpoint_to_resume(settings: TrainingSettings, console: Console) -> Path:
    """The newest whole checkpoint of the run in `settings.out`; the console is told of damaged ones.

    Raises:
        InputError: there is no run, it has other settings, it is complete, or no checkpoint is whole.
    """
    folder = Path(settings.out)
    saved = asdict(TrainingSettings.load(folder / SETTINGS))
    for name, value in asdict(settings).items():
        if name not in CHANGEABLE and value != saved[name]:
            had, given = (str(one) if one is not None else "left out" for one in (saved[name], value))
            raise InputError(f"the run in {folder} has {name} {had}; it cannot be resumed with {given}")
    path, passed_over = checkpoint.newest(folder / CHECKPOINTS)
    if path is None:
        what = f"; {passed_over[0]}" if passed_over else ""
        raise InputError(f"{folder} holds no whole checkpoint to resume; start over with --overwrite{what}")
    for damage in passed_over:
        say(console, f"{damage}; going on from {path.name} instead", style="yellow")
    progress = checkpoint.load_progress(path, settings.patience)
    budget = Budget(settings.steps, settings.minutes)
    budget.seconds = progress.seconds
    if progress.is_finished(budget, settings.patience) and _is_complete(folder):
        more = "--steps or --minutes" if progress.is_finished(budget, None) else "--patience"
        raise InputError(f"the run in {folder} is complete at step {progress.step}; give it more with {more}")
    return path


def _is_complete(folder: Path) -> bool:
    """Whether the model was saved and measured, too, and is still there."""
    return (folder / WEIGHTS).exists() and any(COMPLETE in row for row in read_metrics(folder))


def check_same_corpus(folder: Path, sha256: str) -> None:
    """Raise `InputError` unless the run in `folder` was trained on text of this digest."""
    corpus = read_json(folder / SETTINGS).get("corpus")
    if not isinstance(corpus, dict) or corpus.get("sha256") != sha256:
        raise InputError(
            f"the text is not the one that the run in {folder} was trained on; give it the same sources"
        )


def prepare(folder: Path, settings: TrainingSettings, facts: dict[str, Any], done: int | None) -> None:
    """Clear the folder for a new run, or drop a resumed run's metrics after step `done`."""
    with os_errors(f"cannot write to {folder}"):
        if done is None:
            kept = []
            for name in RUN_FILES:
                remove(folder / name)
        else:
            kept = [row for row in read_metrics(folder) if row["step"] <= done and COMPLETE not in row]
        folder.mkdir(parents=True, exist_ok=True)
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "mhesa": mhesa.__version__,
        }
        settings.save(folder / SETTINGS, corpus=facts, versions=versions)
        with write_file(folder / METRICS) as file:
            file.write("".join(json.dumps(row) + "\n" for row in kept).encode())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl` that are whole: where a process was killed one is cut off."""
    path, rows = folder / METRICS, []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def append_metrics(folder: Path, row: dict[str, Any]) -> None:
    """Add a row to a run's `metrics.jsonl`."""
    with (folder / METRICS).open("a") as file:
        file.write(json.dumps(row) + "\n")
