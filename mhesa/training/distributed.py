"""A model that several processes train together: how they are arranged, and how tensors are sharded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

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

from mhesa.model.lm import GatedExponentialSmoothingLM
from mhesa.model.loading import plain_name, saved_name
from mhesa.processes import processes, rank
from mhesa.training.checkpoint import Parts

# Parameters, or what an optimizer keeps of them, by the parameters' names.
StateDict = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """The processes as rows and columns: a row shares its windows, and each column holds a stretch of them.

    Args:
        rows, row: number of rows, and the index of this process's.
        columns, column: number of processes that share a window, and the index of this process among them.
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


def gather_state(model: nn.Module, optimizers: Sequence[Optimizer]) -> Parts:
    """Parameters, and what the optimizers keep of each, as files of a checkpoint; see `model_state`."""
    # The parameters first: reading them shards again those that a forward pass has left whole.
    weights = model_state(model)
    kept: Any = get_optimizer_state_dict(model, optimizers, options=_GATHERED)
    return {
        "model": {saved_name(name): weight for name, weight in weights.items()},
        "optimizer": {
            f"{saved_name(name)}:{key}": value
            for name, values in kept.get("state", {}).items()
            for key, value in values.items()
        },
    }


def load_state(
    model: nn.Module, optimizers: Sequence[Optimizer], saved: StateDict, saved_optimizers: StateDict
) -> None:
    """Put the files that `gather_state` gave, the same in every process, into a model that may be sharded.

    The settings of the optimizers stay as they are.
    """
    kept: StateDict = {}
    for place, value in saved_optimizers.items():
        name, _, key = place.rpartition(":")
        kept.setdefault(plain_name(name), {})[key] = value
    groups = get_optimizer_state_dict(model, optimizers)["param_groups"]
    set_optimizer_state_dict(model, optimizers, {"state": kept, "param_groups": groups}, options=_WHOLE)
    weights = {plain_name(name): weight for name, weight in saved.items()}
    set_model_state_dict(model, weights, options=_WHOLE)
