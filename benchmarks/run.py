"""Where the time of a training run goes: forward, backward, optimizer, and all else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console

from mhesa.errors import InputError
from mhesa.training import Summary, TrainingSettings, train

# The gradient is clipped for the optimizer, but has a row of its own.
ARITHMETIC = ("forward", "backward", "clipping", "optimizer")
REST = "the loop itself"


@dataclass(frozen=True)
class Part:
    """One line of the result."""

    name: str
    seconds: float
    milliseconds_a_step: float
    share: float


def bench_run(settings: TrainingSettings, *, console: Console | None = None) -> tuple[list[Part], Summary]:
    """Train as `mhesa train` does, with a stopwatch at every part of a step.

    Args:
        settings: of the run; it must be on a CPU, for an accelerator works while the program goes on.
        console: where its progress is shown.

    Returns:
        The parts, the last of them what none of the others accounts for, and what came of the run.
        Shares are of the seconds that its budget counts.

    Raises:
        InputError: the run is not on a CPU, or cannot be.
    """
    if settings.resolve().device != "cpu":
        raise InputError("only a run on a CPU can be timed part by part; give it --device cpu")
    seconds: dict[str, float] = {}

    @contextmanager
    def stopwatch(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began

    summary = train(settings, console=console, phase=stopwatch)
    seconds[REST] = summary.seconds - sum(seconds.values())
    parts = [
        Part(name, spent, 1e3 * spent / summary.steps, spent / summary.seconds)
        for name, spent in seconds.items()
    ]
    return parts, summary


def outside(parts: list[Part]) -> float:
    """The share of all that is not forward, backward and optimizer."""
    return sum(part.share for part in parts if part.name not in ARITHMETIC)
