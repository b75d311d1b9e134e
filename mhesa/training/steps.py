"""What happens between two steps: the clock, a row of figures, an evaluation, a checkpoint, the end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhesa.atomic_io import sync
from mhesa.errors import TrainingError
from mhesa.training import checkpoint
from mhesa.training.checkpoint import Progress
from mhesa.training.distributed import maximum, mean, rank
from mhesa.training.folder import CHECKPOINTS, METRICS, append_metrics
from mhesa.training.schedule import Budget, StopOnSignal
from mhesa.training.settings import TrainingSettings
from mhesa.training.trainer import StepTrainer

STEPS_BETWEEN_ROWS = 10

Row = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts text held out, and what it writes."""

    bits_per_byte: float
    sample: str


class AfterStep:
    """Called after every step; says whether to go on.

    Args:
        settings: of the run.
        budget: its clock.
        progress: where it stands; kept up to date.
        bytes_a_token: of the corpus, for bits per byte.
        evaluate: measures the model; called in every process, and the main one has a result.
        on_row: called with each row of figures in the main process.
        signals: what may ask to stop.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        budget: Budget,
        progress: Progress,
        bytes_a_token: float,
        evaluate: Callable[[StepTrainer], Evaluation | None],
        on_row: Callable[[Row], object],
        signals: StopOnSignal,
    ) -> None:
        self.settings = settings
        self.budget = budget
        self.progress = progress
        self.bytes_a_token = bytes_a_token
        self.evaluate = evaluate
        self.on_row = on_row
        self.signals = signals
        self.stopped_by = 0
        self.ran_dry = False
        self.folder = Path(settings.out)
        self._last = (progress.step, progress.seconds)
        self._saved = progress.step

    def __call__(self, trainer: StepTrainer, grad_norm: float | Tensor) -> bool:
        """Finish a step."""
        progress, settings = self.progress, self.settings
        progress.step = step = trainer.state.global_step
        self._agree(trainer.args.device)
        done = self.budget.spent(step) >= 1
        if step % STEPS_BETWEEN_ROWS == 0 or done:
            self._row(trainer, grad_norm)
        better = False
        if settings.eval_every and (step % settings.eval_every == 0 or done):
            better = self._evaluate(trainer)
            done = done or self.ran_dry
        going_on = not done and not self.stopped_by
        if step % settings.save_every == 0 or better or not going_on:
            self.save(trainer, grad_norm)
        return going_on

    def save(self, trainer: StepTrainer, grad_norm: float | Tensor) -> None:
        """Write a checkpoint, unless weights or loss are no numbers any more."""
        self._take_losses(trainer)
        self._check([*self.progress.losses, float(grad_norm)])
        if self._saved == self.progress.step:
            return
        self._saved = self.progress.step
        parts = trainer.parts()
        if rank() == 0:
            # Of rows and checkpoint, the rows must never be the ones to miss.
            if (self.folder / METRICS).exists():
                sync(self.folder / METRICS)
            state = {"global_step": self.progress.step, "train_batch_size": trainer.state.train_batch_size}
            folder = self.folder / CHECKPOINTS
            checkpoint.save(folder, self.progress, parts, json.dumps(state), self.settings.keep)

    def _agree(self, device: torch.device) -> None:
        """Let all processes see the same clock and the same signals."""
        received = 0 if self.signals.received is None else int(self.signals.received)
        seconds, signal = maximum([self.budget.now(), received], device)
        self.budget.set(seconds)
        self.progress.seconds = seconds
        self.stopped_by = int(signal)

    def _take_losses(self, trainer: StepTrainer) -> None:
        taken = [float(loss) for loss in trainer.losses]
        trainer.losses.clear()
        self.progress.losses += mean(taken, trainer.args.device)

    def _row(self, trainer: StepTrainer, grad_norm: float | Tensor) -> None:
        self._take_losses(trainer)
        losses, step, seconds = self.progress.losses, self.progress.step, self.progress.seconds
        self._check([*losses, float(grad_norm)])
        loss = sum(losses) / len(losses)
        tokens = self.settings.windows_a_step * self.settings.context
        last_step, last_seconds = self._last
        self._last = (step, seconds)
        self.progress.losses = []
        self._write(
            trainer,
            {
                "step": step,
                "tokens": step * tokens,
                "seconds": round(seconds, 3),
                "loss": loss,
                "bits_per_byte": loss / math.log(2) / self.bytes_a_token,
                "learning_rate": self.settings.lr * trainer.rate(step - 1),
                "gradient_norm": float(grad_norm),
                "tokens_per_second": (step - last_step) * tokens / max(seconds - last_seconds, 1e-9),
            },
        )

    def _evaluate(self, trainer: StepTrainer) -> bool:
        """Measure; whether this is the best so far."""
        found = self.evaluate(trainer)
        bits = maximum([-math.inf if found is None else found.bits_per_byte], trainer.args.device)[0]
        progress = self.progress
        better = progress.best_bits_per_byte is None or bits < progress.best_bits_per_byte
        progress.evaluations_since_best = 0 if better else progress.evaluations_since_best + 1
        if better:
            progress.best_step, progress.best_bits_per_byte = progress.step, bits
        patience = self.settings.patience
        self.ran_dry = patience is not None and progress.evaluations_since_best >= patience
        if found is not None:
            row = {"step": progress.step, "seconds": round(progress.seconds, 3)}
            self._write(trainer, {**row, "held_out_bits_per_byte": bits, "sample": found.sample})
        return better and patience is not None

    def _write(self, trainer: StepTrainer, row: Row) -> None:
        if rank() == 0:
            append_metrics(self.folder, row)
            self.on_row(row)
        trainer.log({name: value for name, value in row.items() if isinstance(value, float)})
        # The rows are in a file of their own; here they would make every checkpoint longer.
        trainer.state.log_history.clear()

    def _check(self, values: list[float]) -> None:
        if all(map(math.isfinite, values)):
            return
        bad = next(value for value in values if not math.isfinite(value))
        what = "gradient" if all(map(math.isfinite, values[:-1])) else "loss"
        last = next(iter(checkpoint.steps(self.folder / CHECKPOINTS)), None)
        remedy = (
            "start over with a lower learning rate"
            if last is None
            else f"the checkpoint of step {last} is good: go on from it with --resume and a lower --lr"
        )
        raise TrainingError(f"the {what} became {bad} at step {self.progress.step}; {remedy}")
