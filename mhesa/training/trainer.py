"""transformers' `Trainer` with our order of data, schedule and budget."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Sized
from types import FrameType
from typing import Any, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mhesa.errors import TrainingError

LOWEST_RATE = 0.1


def learning_rate(spent: float, warmup: float) -> float:
    """The learning rate over its peak when `spent` of the budget, 0 to 1, is used up.

    A line up over `warmup`, then half a cosine down to `LOWEST_RATE`.

    >>> [round(learning_rate(spent, 0.1), 2) for spent in (0.05, 0.1, 0.55, 1.0)]
    [0.5, 1.0, 0.55, 0.1]
    """
    if spent < warmup:
        # Not from zero, or the first step would be lost.
        return max(spent / warmup, 0.01)
    angle = math.pi * min((spent - warmup) / (1 - warmup), 1.0)
    return LOWEST_RATE + (1 - LOWEST_RATE) * (1 + math.cos(angle)) / 2


class Budget(TrainerCallback):
    """Ends training after so many steps or so much time, counted over every run of a resumed training."""

    def __init__(self, steps: int | None, minutes: float | None) -> None:
        self.steps = steps
        self.minutes = minutes
        self._before = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """How long training has taken so far."""
        return self._before + (0.0 if self._started is None else time.monotonic() - self._started)

    def spent(self, step: int) -> float:
        """The part of the budget that is used up before `step`."""
        if self.steps is not None:
            return step / self.steps
        assert self.minutes is not None
        return self.seconds / (60 * self.minutes)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock where the last run's stopped."""
        self.continue_from(state)
        self._started = time.monotonic()

    def continue_from(self, state: TrainerState) -> None:
        """Count the time that a checkpoint's run has taken."""
        logged = [row["seconds"] for row in state.log_history if "seconds" in row]
        self._before = logged[-1] if logged else 0.0

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock."""
        self._before, self._started = self.seconds, None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop once the budget is spent."""
        if self.spent(state.global_step) >= 1:
            stop(control)


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM, finish the step, save a checkpoint and stop; a second one stops at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the signals over; only a program's main thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop if a signal came during the step."""
        if self.received is not None:
            stop(control)

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.restore()


def stop(control: TrainerControl) -> None:
    """Log, save and end training after the present step."""
    control.should_log = control.should_save = control.should_training_stop = True


class Meter(TrainerCallback):
    """Turns what the `Trainer` logs into one row of figures, and hands it on.

    Args:
        budget: whose clock the rows show.
        tokens_a_step: tokens that an optimizer step reads.
        bytes_a_token: of the corpus, for bits per byte.
        on_row: called with each row.
    """

    def __init__(
        self,
        budget: Budget,
        tokens_a_step: int,
        bytes_a_token: float,
        on_row: Callable[[dict[str, float]], object],
    ) -> None:
        self.budget = budget
        self.tokens_a_step = tokens_a_step
        self.bytes_a_token = bytes_a_token
        self.on_row = on_row
        self._last = (0, 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count speed from here."""
        self._last = (state.global_step, self.budget.seconds)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Make a row of a loss that was logged."""
        if logs is None or "loss" not in logs:
            return
        loss, step, seconds = logs["loss"], state.global_step, self.budget.seconds
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss} at step {step}; lower the learning rate, "
                "or resume from the last checkpoint"
            )
        # The budget's clock goes on from here when a stopped run is resumed.
        state.log_history[-1]["seconds"] = seconds
        last_step, last_seconds = self._last
        self._last = (step, seconds)
        self.on_row(
            {
                "step": step,
                "tokens": step * self.tokens_a_step,
                "seconds": round(seconds, 3),
                "loss": loss,
                "bits_per_byte": loss / math.log(2) / self.bytes_a_token,
                "learning_rate": logs["learning_rate"],
                "gradient_norm": logs["grad_norm"],
                "tokens_per_second": (step - last_step)
                * self.tokens_a_step
                / max(seconds - last_seconds, 1e-9),
            }
        )


class BudgetTrainer(Trainer):
    """A `Trainer` whose schedule follows a budget and whose data come in the order of the data set."""

    def __init__(self, *args: Any, budget: Budget, warmup: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.budget = budget
        self.warmup = warmup

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(cast(Sized, train_dataset or self.train_dataset))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices decay; biases, norms, gates and residual weights do not."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Follow the budget, be it steps or time."""
        optimizer = optimizer or self.optimizer
        assert optimizer is not None, "the Trainer makes the optimizer first"
        self.lr_scheduler = LambdaLR(
            optimizer, lambda step: learning_rate(self.budget.spent(step), self.warmup)
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler
