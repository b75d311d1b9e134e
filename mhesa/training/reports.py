"""Metrics for tensorboard, wandb or trackio; each is imported only when it is used."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from mhesa.file_names import TENSORBOARD
from mhesa.processes import rank
from mhesa.training.settings import TrainingSettings

Report = Callable[[int, Mapping[str, float]], object]
PROJECT = "mhesa"


@contextmanager
def reporter(settings: TrainingSettings) -> Iterator[Report]:
    """A function that sends a step's metrics to what `settings.report_to` names, from the first process.

    A run of wandb that was open before is used, and left open.
    """
    folder = Path(settings.out)
    if settings.report_to == "none" or rank() > 0:
        yield lambda step, metrics: None
    elif settings.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(folder / TENSORBOARD) as writer:

            def write(step: int, metrics: Mapping[str, float]) -> None:
                for name, value in metrics.items():
                    writer.add_scalar(f"train/{name}", value, step)

            yield write
    else:
        # trackio has wandb's functions.
        tracker: Any = import_module(settings.report_to)
        opened = settings.report_to != "wandb" or tracker.run is None
        if opened:
            project = os.environ.get(f"{settings.report_to.upper()}_PROJECT", PROJECT)
            tracker.init(project=project, name=folder.name, config=asdict(settings))

        def log(step: int, metrics: Mapping[str, float]) -> None:
            named = {f"train/{name}": value for name, value in metrics.items()}
            tracker.log({**named, "train/global_step": step})

        try:
            yield log
        finally:
            if opened:
                tracker.finish()
