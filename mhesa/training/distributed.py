"""Training in one process or several: how they exchange numbers, and how tensors are sharded among them.

Reductions of a few numbers go over the CPU (gloo), so that no step waits for a GPU.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from mhesa.errors import TrainingError
from mhesa.model.lm import GatedExponentialSmoothingLM

T = TypeVar("T")
# Parameters, or what an optimizer keeps of them, by the parameters' names.
StateDict = dict[str, Any]


def join_processes(device: str) -> None:
    """Initialise torch.distributed, if `torchrun` or `accelerate launch` started this process among others.

    They say so in environment variables. Each process of a machine takes the accelerator of its LOCAL_RANK.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    kind = torch.device(device).type
    if kind == "cpu":
        dist.init_process_group("gloo")
    else:
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}")
    # The group's threads must have ended when the interpreter does, or the process aborts.
    atexit.register(_leave_processes)


def _leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def expect_processes(remedy: str) -> Iterator[None]:
    """Raise `TrainingError`, with `remedy`, where an exchange fails for lack of another process."""
    try:
        yield
    except RuntimeError as error:
        # torch gives the errors of gloo no class of their own.
        if processes() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise TrainingError(f"another process ended or does not answer; {remedy}") from error


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The index of this process among them."""
    return dist.get_rank() if processes() > 1 else 0


def barrier() -> None:
    """Wait for all processes."""
    if processes() > 1:
        dist.barrier()


@dataclass(frozen=True)
class Grid:
    """The processes as rows and columns: a row shares its windows, and each column holds a stretch of them.

    Args:
        rows, row: how many rows there are, and the index of this process's.
        columns, column: how many processes share a window, and the index of this process among them.
        group: the processes of this row; `None` if there is one column.
    """

    rows: int = 1
    row: int = 0
    columns: int = 1
    column: int = 0
    group: dist.ProcessGroup | None = None


ONE_PROCESS = Grid()


def arrange(device: str, columns: int) -> Grid:
    """The grid of all processes, `columns` wide; neighbours share a window. All processes must call this."""
    if columns == 1:
        return Grid(rows=processes(), row=rank())
    shape = (processes() // columns, columns)
    mesh = init_device_mesh(torch.device(device).type, shape, mesh_dim_names=("data", "context"))
    row, column = divmod(rank(), columns)
    return Grid(shape[0], row, columns, column, mesh.get_group("context"))


def maximum(values: Sequence[float]) -> list[float]:
    """The largest of each value over all processes, so that all decide the same."""
    return _reduced(values, dist.ReduceOp.MAX)


def mean(values: Sequence[float]) -> list[float]:
    """The mean of each value over all processes."""
    return [total / processes() for total in _reduced(values, dist.ReduceOp.SUM)]


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


# The model


def distribute(model: GatedExponentialSmoothingLM, device: str, *, fsdp: bool) -> nn.Module:
    """Move a model to its device, and get it ready to be trained by all processes.

    Args:
        model: the same in every process.
        device: a torch device.
        fsdp: shard the parameters among the processes (`fully_shard`); each holds a copy otherwise.

    Returns:
        What to call for a training step: the model itself, or `DistributedDataParallel` of it.
    """
    model.to(device)
    if processes() == 1:
        return model
    if not fsdp:
        return DistributedDataParallel(model)
    mesh = init_device_mesh(torch.device(device).type, (processes(),))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def sync_gradients(model: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
    """A context in which DDP sums the gradients over processes, or not yet: a step's last backward does."""
    return model.no_sync() if not wanted and isinstance(model, DistributedDataParallel) else nullcontext()


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are sharded among processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor of any shape that may be sharded. All processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# State dicts: all tensors whole and on the CPU, where the first process has them and the others have none.

_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
_WHOLE = StateDictOptions(full_state_dict=True)


def model_state(model: nn.Module) -> StateDict:
    """Every parameter by its name, whole, in the first process. All processes must call this."""
    return get_model_state_dict(model, options=_GATHERED)


def optimizer_state(model: nn.Module, optimizers: Sequence[Optimizer]) -> StateDict:
    """What the optimizers keep of each parameter, by its name; otherwise as `model_state`."""
    state: Any = get_optimizer_state_dict(model, optimizers, options=_GATHERED)
    return dict(state.get("state", {}))


def load_model_state(model: nn.Module, state: StateDict) -> None:
    """Put whole parameters, the same in every process, into a model that may be sharded."""
    set_model_state_dict(model, state, options=_WHOLE)


def load_optimizer_state(model: nn.Module, optimizers: Sequence[Optimizer], state: StateDict) -> None:
    """Put whole tensors, the same in every process, into optimizers; their settings stay as they are."""
    groups = get_optimizer_state_dict(model, optimizers)["param_groups"]
    set_optimizer_state_dict(model, optimizers, {"state": state, "param_groups": groups}, options=_WHOLE)
