"""The rows of `metrics.jsonl`: means over the last steps, or an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhesa.errors import TrainingError
from mhesa.file_names import CHECKPOINTS
from mhesa.processes import maximum, mean, rank
from mhesa.training import checkpoint
from mhesa.training.checkpoint import Progress
from mhesa.training.settings import TrainingSettings

Row = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts text held out, and what it writes."""

    bits_per_byte: float
    sample: str


@dataclass
class Metrics:
    """Collects losses on the device, so that no step waits for them, and writes them as rows.

    Args:
        settings: settings of the run.
        progress: how far the run is; kept up to date with losses and evaluations.
        bytes_per_token: bytes of the corpus for each token, for bits per byte.
        on_row: called with each row in the first process.
    """

    settings: TrainingSettings
    progress: Progress
    bytes_per_token: float
    on_row: Callable[[Row], object]
    _losses: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._row_step, self._row_seconds = self.progress.step, self.progress.seconds

    def add(self, loss: Tensor) -> None:
        """Take the loss of a step, a scalar in nats per token, on any device."""
        self._losses.append(loss)

    def collect(self, norm: Tensor) -> None:
        """Move the losses of the last steps into `progress`, as means over all processes.

        Args:
            norm: norm of the last gradient, a scalar.

        Raises:
            TrainingError: a loss or the gradient is NaN or infinite.
        """
        if self._losses:
            self.progress.losses += mean(torch.stack(self._losses).tolist())
            self._losses.clear()
        self._check(self.progress.losses, "loss")
        self._check([float(norm)], "gradient")

    def write_step(self, learning_rate: float, norm: Tensor, dropout: float) -> float:
        """Write the metrics of the steps since the last such row.

        Args:
            learning_rate: learning rate of the last step.
            norm: norm of the last step's gradient, a scalar.
            dropout: dropout of the last step.

        Returns:
            Seconds that each of the steps took.
        """
        self.collect(norm)
        progress = self.progress
        loss = sum(progress.losses) / len(progress.losses)
        tokens = self.settings.windows_per_step * self.settings.context
        steps, seconds = progress.step - self._row_step, progress.seconds - self._row_seconds
        self._row_step, self._row_seconds = progress.step, progress.seconds
        progress.losses = []
        self._write(
            tokens=progress.step * tokens,
            loss=loss,
            bits_per_byte=loss / math.log(2) / self.bytes_per_token,
            learning_rate=learning_rate,
            gradient_norm=float(norm),
            dropout=dropout,
            tokens_per_second=steps * tokens / max(seconds, 1e-9),
        )
        return max(seconds, 1e-9) / steps

    def write_evaluation(self, found: Evaluation | None) -> bool:
        """Write what the first process found, `None` in all others; whether it is the best so far."""
        bits = maximum([-math.inf if found is None else found.bits_per_byte])[0]
        self._check([bits], "loss of held-out text")
        progress = self.progress
        better = progress.best_bits_per_byte is None or bits < progress.best_bits_per_byte
        progress.evaluations_since_best = 0 if better else progress.evaluations_since_best + 1
        if better:
            progress.best_step, progress.best_bits_per_byte = progress.step, bits
        if found is not None:
            self._write(held_out_bits_per_byte=bits, sample=found.sample)
        return better

    def _write(self, **values: Any) -> None:
        if rank() == 0:
            progress = self.progress
            self.on_row({"step": progress.step, "seconds": round(progress.seconds, 3), **values})

    def _check(self, values: list[float], what: str) -> None:
        bad = next((value for value in values if not math.isfinite(value)), None)
        if bad is None:
            return
        last = next(iter(checkpoint.steps(Path(self.settings.out) / CHECKPOINTS)), None)
        remedy = (
            "start over with a lower learning rate"
            if last is None
            else f"the checkpoint of step {last} is good: go on from it with --resume and a lower --lr"
        )
        raise TrainingError(f"the {what} became {bad} at step {self.progress.step}; {remedy}")
