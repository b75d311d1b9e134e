"""Where the time of a training run goes: forward, backward, optimizer, and the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from rich.console import Console

from mhesa.errors import InputError
from mhesa.hf.modeling import MhesaForCausalLM
from mhesa.training import TrainingSettings, train
from mhesa.training.steps import AfterStep
from mhesa.training.trainer import Batches

# What a step is made of. The gradient is clipped for the optimizer, but has a row of its own.
PARTS: dict[str, tuple[type, str]] = {
    "forward": (MhesaForCausalLM, "forward"),
    "backward": (Accelerator, "backward"),
    "clipping": (Accelerator, "clip_grad_norm_"),
    "optimizer": (AcceleratedOptimizer, "step"),
    "reading windows": (Batches, "_batch"),
    "rows, plot, checkpoints": (AfterStep, "__call__"),
}
ARITHMETIC = ("forward", "backward", "clipping", "optimizer")
REST = "the Trainer's loop"


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
        outside: the share of its seconds that is not forward, backward and optimizer.
        loss: nats per token held out.
    """

    steps: int
    seconds: float
    outside: float
    loss: float


def bench_run(settings: TrainingSettings, *, console: Console | None = None) -> tuple[list[Part], Outcome]:
    """Train as `mhesa train` does, and time every part of a step.

    Args:
        settings: of the run. It must be on a CPU: calls to an accelerator return before its work is done.
        console: where progress is shown.

    Returns:
        The parts, the last of which is the remainder, and the run as a whole. Shares are of the seconds that
        count towards the run's budget.

    Raises:
        InputError: the run is not on a CPU.
    """
    if settings.resolve().device != "cpu":
        raise InputError("only a run on a CPU can be timed part by part; give it --device cpu")
    seconds = dict.fromkeys(PARTS, 0.0)
    with ExitStack() as stack:
        for name, (owner, method) in PARTS.items():
            stack.enter_context(_timed(owner, method, seconds, name))
        summary = train(settings, console=console)
    seconds[REST] = summary.seconds - sum(seconds.values())
    parts = [
        Part(name, spent, 1e3 * spent / summary.steps, spent / summary.seconds)
        for name, spent in seconds.items()
    ]
    outside = sum(part.share for part in parts if part.name not in ARITHMETIC)
    return parts, Outcome(summary.steps, summary.seconds, outside, summary.score.loss)


@contextmanager
def _timed(owner: type, method: str, seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time of every call of a method to `seconds[name]`."""
    plain: Callable[..., Any] = getattr(owner, method)

    @wraps(plain)
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return plain(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - began

    setattr(owner, method, timed)
    try:
        yield
    finally:
        setattr(owner, method, plain)
