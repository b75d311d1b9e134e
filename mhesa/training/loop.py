"""The training loop.

A step, in order: 1 learning rate and dropout, 2 windows, 3 forward and backward, 4 clipping, 5 optimizer,
6 clock and signals, 7 metrics, 8 evaluation, 9 checkpoint.

All that a step computes is a function of its number and of the state before it. A run that was stopped and
resumed therefore gives, bit for bit, what it would have given without the stop. There is one exception: torch
adds up the gradients of three processes or more, each with a copy of the model, in another order at first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from mhesa.atomic_io import sync
from mhesa.file_names import CHECKPOINTS, METRICS
from mhesa.model.lm import GatedExponentialSmoothingLM
from mhesa.processes import maximum, rank
from mhesa.training import checkpoint
from mhesa.training.batches import Batches, CarriedStates
from mhesa.training.checkpoint import Progress
from mhesa.training.distributed import distribute, full, gather_state, load_state, sync_gradients
from mhesa.training.metrics import Evaluation, Metrics, Row
from mhesa.training.optimizers import make_optimizers
from mhesa.training.schedule import Budget, StopOnSignal, choose_dropout, learning_rate
from mhesa.training.settings import TrainingSettings

STEPS_BETWEEN_ROWS = 10

# Makes the context that a part of the step runs in, from the part's name.
Phase = Callable[[str], AbstractContextManager[Any]]


def train_model(
    model: GatedExponentialSmoothingLM,
    settings: TrainingSettings,
    batches: Batches,
    *,
    bytes_per_token: float,
    start: Path | None,
    budget: Budget,
    signals: StopOnSignal,
    evaluate: Callable[[GatedExponentialSmoothingLM], Evaluation | None],
    on_row: Callable[[Row], object],
    phase: Phase,
) -> tuple[Progress, int]:
    """Train until the budget is spent, evaluations stop improving, or a signal comes.

    Args:
        model: trained in place, and sharded in place with `fsdp`.
        settings: resolved settings.
        batches: what each step reads.
        bytes_per_token: bytes of the corpus for each token, for bits per byte.
        start: the checkpoint to resume from, if any.
        budget: the clock, or the number of steps, that ends training.
        signals: what may end it before.
        evaluate: measures the model; called in every process, and the first one's result counts.
        on_row: called with each row of metrics in the first process.
        phase: called with `"windows"`, `"forward"`, `"backward"`, `"clipping"`, `"optimizer"` and
            `"bookkeeping"` for the context that this part of a step runs in.

    Returns:
        How far the run came, and the number of the signal that ended it, 0 if none did.

    Raises:
        TrainingError: loss or gradient became NaN or infinite, or a checkpoint cannot be written.
    """
    device = torch.device(settings.device)
    model.recompute = settings.recompute
    forward = distribute(model, settings.device, fsdp=settings.fsdp)
    if settings.compile:
        forward.compile()
    optimizers = make_optimizers(model, settings)
    parameters = list(model.parameters())
    states = None
    if settings.carry_state:
        states = CarriedStates(settings.depth, model.state_size, settings.device, batches.grid)
    progress = Progress()
    if start is not None:
        load = partial(checkpoint.load_part, start)
        load_state(model, optimizers, load("model"), load("optimizer"))
        if states is not None:
            states.load(load("states")["states"], settings.accumulate)
        progress = checkpoint.load_progress(start, settings.patience)
    metrics = Metrics(settings, progress, bytes_per_token, on_row)
    if settings.steps is not None:
        progress.dropout = choose_dropout(batches.windows.epochs(settings.steps))
    # With a budget of minutes, the second row is the first whose speed is not that of a start.
    speed_known_at = (progress.step // STEPS_BETWEEN_ROWS + 2) * STEPS_BETWEEN_ROWS
    budget.start(progress.seconds)
    model.train()

    # A run may have died after its last step, before its model was saved.
    done, signal = progress.is_finished(budget, settings.patience), 0.0
    while not done:
        step = progress.step

        # 1. Learning rate and dropout follow from the budget.
        rate = learning_rate(budget.spent(step), settings.warmup, settings.schedule)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["peak_lr"]
        dropout = progress.dropout if settings.dropout is None else settings.dropout
        _set_dropout(model, dropout)

        # 2. This process's windows, as micro-batches.
        with phase("windows"):
            micro_batches = batches.read(step)

        # 3. Forward and backward. Gradients add up over micro-batches, and over processes with the last.
        loss = torch.zeros((), device=device)
        for index, batch in enumerate(micro_batches):
            if dropout:
                torch.manual_seed(_dropout_seed(settings.seed, step, index, rank()))
            initial = None if states is None else states.initial(index, batch)
            with sync_gradients(forward, index + 1 == settings.accumulate):
                with (
                    phase("forward"),
                    torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"),
                ):
                    micro_loss, final = forward(
                        batch.ids,
                        batch.labels,
                        state=initial,
                        return_state=True,
                        cu_seqlens=batch.cu_seqlens,
                        context_parallel=batch.context_parallel,
                    )
                with phase("backward"):
                    micro_loss = micro_loss * batch.weight / settings.accumulate
                    micro_loss.backward()
            if states is not None:
                states.keep(index, batch, final)
            loss = loss + micro_loss.detach()
        metrics.add(loss)

        # 4. Clipping
        with phase("clipping"):
            norm = full(clip_grad_norm_(parameters, settings.clip))

        # 5. The optimizer
        with phase("optimizer"):
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        with phase("bookkeeping"):
            # 6. Clock and signals: the slowest process counts, and a signal that any of them received.
            progress.step += 1
            progress.seconds, signal = maximum([budget.now(), float(signals.received or 0)])
            budget.seconds = progress.seconds
            done = budget.spent(progress.step) >= 1

            # 7. A row of metrics
            if progress.step % STEPS_BETWEEN_ROWS == 0 or done:
                seconds_per_step = metrics.write_step(rate * settings.lr, norm, dropout)
                if progress.step == speed_known_at:
                    steps = budget.expected_steps(progress.step, seconds_per_step)
                    progress.dropout = choose_dropout(batches.windows.epochs(steps))

            # 8. Evaluation on text held out
            is_best = False
            if settings.eval_every and (progress.step % settings.eval_every == 0 or done):
                metrics.collect(norm)
                is_best = metrics.write_evaluation(evaluate(model))
                model.train()

            # 9. A checkpoint: now and then, of the best model if that is wanted, and at the end
            done = progress.is_finished(budget, settings.patience) or signal > 0
            wanted = is_best and settings.patience is not None
            if progress.step % settings.save_every == 0 or wanted or done:
                metrics.collect(norm)
                _save(settings, progress, model, optimizers, states)

    # Automatic dropout is not saved with the model.
    _set_dropout(model, settings.dropout or 0.0)
    return progress, int(signal)


def _set_dropout(model: nn.Module, probability: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


def _dropout_seed(*key: int) -> int:
    """The seed of a micro-batch's dropout, from the run's seed, the step, the micro-batch and the process."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1


def _save(
    settings: TrainingSettings,
    progress: Progress,
    model: GatedExponentialSmoothingLM,
    optimizers: Sequence[Optimizer],
    states: CarriedStates | None,
) -> None:
    """Write a checkpoint. All processes gather its tensors, and the first one writes them."""
    parts = gather_state(model, optimizers)
    if states is not None:
        parts["states"] = {"states": states.gathered()}
    if rank() == 0:
        folder = Path(settings.out)
        # So that the rows before a checkpoint are on the disk when it is.
        sync(folder / METRICS)
        checkpoint.save(folder / CHECKPOINTS, progress, parts, settings.keep)
