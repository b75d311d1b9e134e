"""The budget of a run, the learning rate and dropout that follow from it, and signals that end the run."""

from __future__ import annotations

import math
import signal
import threading
import time
from types import FrameType
from typing import Any

LOWEST_RATE = 0.1
# `wsd` lowers the rate over this last fraction of the budget.
DECAY = 0.2
# Dropout grows by 0.1 with every so many epochs of the text: the more often it is read, the more of it is
# learnt by heart (docs/learning.md).
EPOCHS_PER_TENTH, HIGHEST_DROPOUT = 5, 0.5


def learning_rate(spent: float, warmup: float, schedule: str = "cosine") -> float:
    """The learning rate as a fraction of its peak, when the fraction `spent` of the budget is used.

    It rises linearly over the fraction `warmup`, then falls to `LOWEST_RATE`: along half a cosine, or with
    `wsd` (warm-up, stable, decay; https://arxiv.org/abs/2404.06395) linearly over the last `DECAY`.

    >>> [round(learning_rate(spent, 0.1), 2) for spent in (0.05, 0.1, 0.55, 1.0)]
    [0.5, 1.0, 0.55, 0.1]
    >>> [round(learning_rate(spent, 0.1, "wsd"), 2) for spent in (0.05, 0.1, 0.55, 0.9, 1.0)]
    [0.5, 1.0, 1.0, 0.55, 0.1]
    """
    if spent < warmup:
        # Not from zero: the first step would change nothing.
        return max(spent / warmup, 0.01)
    if schedule == "wsd":
        begin = max(1 - DECAY, warmup)
        fall = min(max((spent - begin) / (1 - begin), 0.0), 1.0)
        return 1 - (1 - LOWEST_RATE) * fall
    angle = math.pi * min((spent - warmup) / (1 - warmup), 1.0)
    return LOWEST_RATE + (1 - LOWEST_RATE) * (1 + math.cos(angle)) / 2


def choose_dropout(epochs: float) -> float:
    """The probability of dropping an element in a run that reads its text so many times.

    >>> choose_dropout(4), choose_dropout(14), choose_dropout(100)
    (0.0, 0.2, 0.5)
    """
    return min(int(epochs / EPOCHS_PER_TENTH) / 10, HIGHEST_DROPOUT)


class Budget:
    """A number of steps or minutes, counted over all parts of a run that was stopped and resumed.

    `seconds` is set once a step, to the same time in every process: all decisions within a step use it.
    """

    def __init__(self, steps: int | None, minutes: float | None) -> None:
        self.steps = steps
        self.minutes = minutes
        self.seconds = 0.0
        self._started = 0.0

    def start(self, seconds: float) -> None:
        """Start the clock at `seconds`."""
        self.seconds = seconds
        self._started = time.monotonic() - seconds

    def now(self) -> float:
        """Seconds of training until now."""
        return time.monotonic() - self._started

    def expected_steps(self, step: int, seconds_per_step: float) -> float:
        """The steps of the whole budget: those before `step`, and of the time that is left at this speed."""
        if self.steps is not None:
            return self.steps
        assert self.minutes is not None
        return step + (60 * self.minutes - self.seconds) / seconds_per_step

    def spent(self, step: int) -> float:
        """The fraction of the budget that is used before `step`."""
        if self.steps is not None:
            return step / self.steps
        assert self.minutes is not None
        return self.seconds / (60 * self.minutes)


class StopOnSignal:
    """A context that records SIGINT or SIGTERM, so that a step can be finished and saved.

    A second signal has its usual effect.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        # Python allows this in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.__exit__()
