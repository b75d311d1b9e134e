"""Where the time of a training run goes: forward, backward, optimizer, and the rest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console

from mhesa.errors import InputError
from mhesa.ops.cpu.memory import keep_memory
from mhesa.training.run import train
from mhesa.training.settings import TrainingSettings

# Clipping counts as the optimizer's, but has a row of its own.
ARITHMETIC = ("forward", "backward", "clipping", "optimizer")
REST = "the loop itself"


@dataclass(frozen=True)
class Part:
    """One line of the result."""

    name: str
    seconds: float
    milliseconds_a_step: float
    share: float


@dataclass(frozen=True)
class Outcome:
    """The run as a whole.

    Args:
        outside: share of the seconds that is not forward, backward and optimizer.
        loss: nats per token held out.
    """

    steps: int
    seconds: float
    outside: float
    loss: float


def bench_run(settings: TrainingSettings, *, console: Console | None = None) -> tuple[list[Part], Outcome]:
    """Train as `mhesa train` does, and time every part of a step.

    Args:
        settings: settings of the run. It must be on a CPU: calls to an accelerator return before its work is
            done.
        console: where progress is shown.

    Returns:
        The parts, the last of which is the remainder, and the run as a whole. Shares are of the time from the
        first step's windows to the end of the last checkpoint.

    Raises:
        InputError: the run is not on a CPU.
    """
    if settings.resolve().device != "cpu":
        raise InputError("only a run on a CPU can be timed part by part; give it --device cpu")
    seconds: dict[str, float] = {}
    moments: list[float] = []

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        moments.append(time.perf_counter())
        yield
        moments.append(time.perf_counter())
        seconds[name] = seconds.get(name, 0.0) + moments[-1] - moments[-2]

    # As the command does.
    keep_memory()
    summary = train(settings, console=console, phase=timed)
    # The run's own clock ends before its last row, evaluation and checkpoint, so it is not the total.
    total = moments[-1] - moments[0]
    seconds[REST] = total - sum(seconds.values())
    parts = [Part(name, spent, 1e3 * spent / summary.steps, spent / total) for name, spent in seconds.items()]
    outside = sum(part.share for part in parts if part.name not in ARITHMETIC)
    return parts, Outcome(summary.steps, total, outside, summary.score.loss)
