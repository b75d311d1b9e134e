"""The processes that run this program together: how each knows of the others, and how they exchange numbers.

Reductions of a few numbers go over the CPU (gloo), so that no step waits for a GPU. Models are sharded by
`mhesa.training.distributed`, which takes as long to import as torch.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mhesa.errors import InputError, TrainingError

T = TypeVar("T")


def join_processes(device: str) -> None:
    """Initialise torch.distributed, if `torchrun` or `accelerate launch` started this process among others.

    They say so in environment variables. Each process of a machine takes the accelerator of its LOCAL_RANK.

    Raises:
        InputError: the variables are not those of such a start.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized():
        return
    kind = torch.device(device).type
    backend = "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
    try:
        if kind != "cpu":
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend)
    except (KeyError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"WORLD_SIZE is set, and no other process can be joined: {reason}; "
            "start with torchrun, or unset it"
        ) from error
    # The group's threads must have ended when the interpreter does, or the process aborts.
    atexit.register(_leave_processes)


def _leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def expect_processes(remedy: Callable[[], str]) -> Iterator[None]:
    """Raise `TrainingError`, with what to do, where an exchange fails for lack of another process."""
    try:
        yield
    except RuntimeError as error:
        # torch gives the errors of gloo no class of their own.
        if processes() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise TrainingError(f"another process ended or does not answer; {remedy()}") from error


@contextmanager
def all_or_none() -> Iterator[None]:
    """What one process refuses inside, all refuse at its end; nothing inside may exchange anything.

    Raises:
        InputError: in every process, that of the first process that refuses.
    """
    refusal = None
    try:
        yield
    except InputError as error:
        refusal = error
    first = next(filter(None, _gather_objects(None if refusal is None else str(refusal))), None)
    if first is not None:
        raise InputError(first) from refusal


def check_same(facts: Mapping[str, object]) -> None:
    """Raise `InputError`, in every process, unless all have the same facts."""
    everyone = _gather_objects(dict(facts))
    for index, theirs in enumerate(everyone):
        for name, value in theirs.items():
            if value != everyone[0][name]:
                raise InputError(
                    f"process {index} has {name} {value}, and process 0 {everyone[0][name]}; start all alike"
                )


def _gather_objects(value: T) -> list[T]:
    """Every process's value, in the order of the processes."""
    values = [value] * processes()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def processes() -> int:
    """How many processes run this program together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The index of this process among them."""
    return dist.get_rank() if processes() > 1 else 0


def barrier() -> None:
    """Wait for all processes."""
    if processes() > 1:
        dist.barrier()


def maximum(values: Sequence[float]) -> list[float]:
    """The largest of each value over all processes, so that all decide the same."""
    return _reduced(values, dist.ReduceOp.MAX)


def total(values: Sequence[float]) -> list[float]:
    """The sum of each value over all processes."""
    return _reduced(values, dist.ReduceOp.SUM)


def mean(values: Sequence[float]) -> list[float]:
    """The mean of each value over all processes."""
    return [value / processes() for value in total(values)]


def _reduced(values: Sequence[float], operation: Any) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    if processes() > 1:
        dist.all_reduce(tensor, op=operation)
    found: list[float] = tensor.tolist()
    return found


def gather(tensor: Tensor) -> Tensor:
    """Every process's tensor, `(processes, *shape)`, on the CPU."""
    tensor = tensor.cpu().contiguous()
    if processes() == 1:
        return tensor[None]
    gathered = [torch.empty_like(tensor) for _ in range(processes())]
    dist.all_gather(gathered, tensor)
    return torch.stack(gathered)


def broadcast(value: T | None) -> T:
    """The first process's value, in every process."""
    values = [value]
    if processes() > 1:
        dist.broadcast_object_list(values)
    assert values[0] is not None
    return values[0]
