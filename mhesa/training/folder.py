"""What a run's folder holds, and what may be done with one that is there already."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import accelerate
import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_utils import get_last_checkpoint

import mhesa
from mhesa.errors import InputError
from mhesa.training.settings import SETTINGS, TrainingSettings
from mhesa.training.trainer import Budget

METRICS = "metrics.jsonl"
CURVE = "loss.png"
CHECKPOINTS = "checkpoints"
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json")
RUN_FILES = (SETTINGS, METRICS, CURVE, CHECKPOINTS, *MODEL_FILES)
# What a resumed run may change; the rest would make it another run.
CHANGEABLE = frozenset({"out", "steps", "minutes", "device", "backend", "save_every"})


def check_free(folder: Path) -> None:
    """Raise `InputError` if the folder is a file, or holds a run."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder to save to")
    if any((folder / name).exists() for name in RUN_FILES):
        raise InputError(
            f"{folder} already holds a run; continue it with --resume or replace it with --overwrite"
        )


def checkpoint_to_resume(settings: TrainingSettings) -> Path:
    """The newest checkpoint of the run in `settings.out`.

    Raises:
        InputError: there is no run, it has other settings, it is complete, or its checkpoint is damaged.
    """
    folder = Path(settings.out)
    saved = asdict(TrainingSettings.load(folder / SETTINGS))
    for name, value in asdict(settings).items():
        if name not in CHANGEABLE and value != saved[name]:
            raise InputError(
                f"the run in {folder} has {name} {saved[name]}; it cannot be resumed with {value}"
            )
    checkpoints = folder / CHECKPOINTS
    newest = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if newest is None:
        raise InputError(f"{folder} holds no checkpoint to resume; start over with --overwrite")
    state = _check_checkpoint(Path(newest))
    budget = Budget(settings.steps, settings.minutes)
    budget.continue_from(state)
    if budget.spent(state.global_step) >= 1:
        raise InputError(
            f"the run in {folder} is complete at step {state.global_step}; "
            "give it more with --steps or --minutes"
        )
    return Path(newest)


def _check_checkpoint(checkpoint: Path) -> TrainerState:
    path = checkpoint / "trainer_state.json"
    try:
        state = TrainerState.load_from_json(str(path))
        path = checkpoint / "model.safetensors"
        with safe_open(path, framework="pt"):
            pass
        for name in ("optimizer.pt", "scheduler.pt"):
            path = checkpoint / name
            torch.load(path, weights_only=True, map_location="cpu")
    except (
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        EOFError,
        UnpicklingError,
        SafetensorError,
    ) as error:
        raise InputError(
            f"{path} is damaged; delete {checkpoint} to resume from the checkpoint before it"
        ) from error
    return state


def check_same_corpus(folder: Path, sha256: str) -> None:
    """Raise `InputError` unless the run in `folder` was trained on text of this digest."""
    recorded = json.loads((folder / SETTINGS).read_text()).get("corpus", {}).get("sha256")
    if recorded != sha256:
        raise InputError(
            f"the text is not the one that the run in {folder} was trained on; give it the same sources"
        )


def prepare(folder: Path, settings: TrainingSettings, facts: dict[str, Any], checkpoint: Path | None) -> None:
    """Make the folder ready: empty of an old run for a new one, as it was then for a resumed one."""
    try:
        if checkpoint is None:
            _clear(folder)
            kept = []
        else:
            done = int(checkpoint.name.rpartition("-")[2])
            kept = [row for row in read_metrics(folder) if row["step"] <= done and "loss" in row]
        folder.mkdir(parents=True, exist_ok=True)
        settings.save(folder / SETTINGS, corpus=facts, versions=_versions())
        (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in kept))
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error


def _clear(folder: Path) -> None:
    for name in RUN_FILES:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def append_metrics(folder: Path, row: dict[str, float]) -> None:
    """Add a row to a run's `metrics.jsonl`."""
    with (folder / METRICS).open("a") as file:
        file.write(json.dumps(row) + "\n")


def _versions() -> dict[str, str]:
    packages = (mhesa, torch, transformers, accelerate)
    return {"python": platform.python_version(), **{it.__name__: it.__version__ for it in packages}}
