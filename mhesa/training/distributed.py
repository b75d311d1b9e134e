"""One process or many: what they tell each other, and tensors that are parted among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, the first being 0."""
    return dist.get_rank() if processes() > 1 else 0


def maximum(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each value over all processes, so that all decide the same."""
    if processes() == 1:
        return list(values)
    # MPS aside, which never has company, every device has 64-bit floats.
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    found: list[float] = tensor.tolist()
    return found


def mean(values: list[float], device: torch.device) -> list[float]:
    """The mean of each value over all processes."""
    if processes() == 1 or not values:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    found: list[float] = (tensor / processes()).tolist()
    return found


def gather(tensor: Tensor) -> Tensor:
    """Every process's tensor, `(processes, *shape)`."""
    if processes() == 1:
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(processes())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be parted among processes, on the CPU. All processes must ask."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().contiguous()


def part(model: nn.Module, blocks: Iterable[nn.Module], device: str) -> None:
    """Part a model's parameters among all processes (FSDP 2), gathered block by block when they are used."""
    mesh = init_device_mesh(torch.device(device).type, (processes(),))
    model.to(device)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_parted(model: nn.Module) -> bool:
    """Whether a model's parameters are parted among processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def parted_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as this process holds `like`, on its device."""
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.to(like.device)


def barrier() -> None:
    """Wait for all processes."""
    if processes() > 1:
        dist.barrier()
