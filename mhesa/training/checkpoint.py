"""Checkpoints: folders, written atomically, with all that a run needs to be resumed."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mhesa.atomic_io import read_json, sha256, write_folder
from mhesa.errors import InputError, TrainingError, os_errors, reason
from mhesa.training.schedule import Budget

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
PREFIX = "step-"

Parts = dict[str, dict[str, Tensor]]


@dataclass
class Progress:
    """How far a run is: all of its state that is not a tensor.

    Args:
        step: number of optimizer steps done.
        seconds: time spent on them.
        losses: losses of the steps since the last row of metrics, in nats per token.
        best_step: the step of the best evaluation.
        best_bits_per_byte: result of that evaluation.
        evaluations_since_best: number of evaluations since then, none of them better.
        dropout: dropout that was chosen because the settings do not give it.
    """

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    best_step: int | None = None
    best_bits_per_byte: float | None = None
    evaluations_since_best: int = 0
    dropout: float = 0.0

    def is_finished(self, budget: Budget, patience: int | None) -> bool:
        """Whether the budget is spent, or the last `patience` evaluations were no better than the best."""
        out_of_patience = patience is not None and self.evaluations_since_best >= patience
        return out_of_patience or budget.spent(self.step) >= 1


def save(folder: Path, progress: Progress, parts: Parts, keep: int) -> Path:
    """Write a checkpoint, and delete the oldest beyond `keep` except the best one.

    Args:
        folder: where the run's checkpoints are.
        progress: how far the run is.
        parts: tensors of each file, with their names, by the file's name without its ending.
        keep: number of checkpoints to keep.

    Raises:
        TrainingError: the checkpoint cannot be written; the others stay as they are.
    """
    path = folder / f"{PREFIX}{progress.step}"
    try:
        with write_folder(path) as partial:
            for name, tensors in parts.items():
                save_file(tensors, partial / f"{name}.safetensors", metadata={"format": "pt"})
            (partial / PROGRESS).write_text(json.dumps(asdict(progress)))
            files = {
                path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
                for path in sorted(partial.iterdir())
            }
            (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=2))
        _rotate(folder, progress, keep)
    except (OSError, SafetensorError) as error:
        message = f"cannot write a checkpoint to {folder}: {reason(error)}; {remedy(folder)}"
        raise TrainingError(message) from error
    return path


def remedy(folder: Path) -> str:
    """How to go on after a failure of a run with these checkpoints."""
    if not steps(folder):
        return "there is no checkpoint yet; start over with --overwrite"
    return "its checkpoints are whole, and --resume goes on from the newest"


def _rotate(folder: Path, progress: Progress, keep: int) -> None:
    """Delete the oldest checkpoints.

    Those of later steps do not count: they are damaged, and the run resumed from an earlier one.
    """
    done = [step for step in steps(folder) if step <= progress.step]
    for step in done[keep:]:
        if step != progress.best_step:
            shutil.rmtree(folder / f"{PREFIX}{step}")


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, the newest first."""
    if not folder.is_dir():
        return []
    names = [path.name.removeprefix(PREFIX) for path in folder.glob(f"{PREFIX}*")]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and what is wrong with each one after it."""
    passed_over: list[str] = []
    for step in steps(folder):
        path = folder / f"{PREFIX}{step}"
        damage = find_damage(path)
        if damage is None:
            return path, passed_over
        passed_over.append(damage)
    return None, passed_over


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, `None` if nothing is. Reads every byte."""
    try:
        files = read_json(path / MANIFEST)["files"]
        for name, expected in files.items():
            file = path / os.path.basename(name)
            if file.stat().st_size != expected["bytes"] or sha256(file) != expected["sha256"]:
                return f"{file} is damaged"
    except (TypeError, KeyError, AttributeError):
        return f"{path / MANIFEST} is damaged: it does not list files"
    except InputError as error:
        return f"{path / MANIFEST} is damaged: {error.__cause__}"
    except (OSError, ValueError) as error:
        return f"{path / MANIFEST} is damaged: {error}"
    return None


def load_progress(path: Path, patience: int | None = None) -> Progress:
    """How far the run of a checkpoint is.

    Args:
        path: the checkpoint.
        patience: patience of the run from now on. A run with patience saves its best model; the best one so
            far does not count if it was not saved.

    Raises:
        InputError: the file holds something else.
    """
    try:
        progress = Progress(**read_json(path / PROGRESS))
    except TypeError as error:
        raise InputError(f"{path / PROGRESS} is damaged: {error}") from error
    if patience is not None and find_damage(path.with_name(f"{PREFIX}{progress.best_step}")):
        progress.best_step = progress.best_bits_per_byte = None
        progress.evaluations_since_best = 0
    return progress


def load_part(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors, of any shape, of one file of a checkpoint by name.

    Raises:
        InputError: the file cannot be read, or is damaged.
    """
    file = path / f"{name}.safetensors"
    try:
        with os_errors(f"cannot read {file}"):
            return load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file} is damaged: {error}") from error
