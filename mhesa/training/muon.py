"""Muon, for the matrices of the blocks."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, with all matrices of one shape orthogonalised in one batched product.

    A small model has a few shapes and many matrices; one by one, their products cost a third of a training
    step on a CPU. Parameters that are sharded among processes are orthogonalised whole in every process.

    Args:
        params: matrices, `(rows, columns)` each.
        lr: learning rate.
        weight_decay: coefficient of weight decay: a step multiplies each matrix by `1 - lr * weight_decay`.
        dtype: type of the orthogonalisation: bf16, or fp32 where bf16 products are emulated.

    The optimizer of https://kellerjordan.github.io/posts/muon.

    >>> weight = torch.nn.Parameter(torch.eye(2))
    >>> weight.grad = torch.eye(2)
    >>> Muon([weight], lr=0.1, weight_decay=0.0).step()
    >>> weight.detach().diag().round(decimals=1)
    tensor([0.9000, 0.9000])
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        weight_decay: float,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient; there is no loss to compute again by a `closure`."""
        for group in self.param_groups:
            by_shape: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                self._update(group, shape, parameters)

    def _update(self, group: dict[str, Any], shape: torch.Size, parameters: list[Tensor]) -> None:
        momentum = group["momentum"]
        updates = []
        for parameter in parameters:
            gradient, state = parameter.grad, self.state[parameter]
            assert gradient is not None
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            state["momentum_buffer"].lerp_(gradient, 1 - momentum)
            update = gradient.lerp(state["momentum_buffer"], momentum)
            updates.append(update.full_tensor() if isinstance(update, DTensor) else update)
        directions = orthogonalise(
            torch.stack(updates).to(self.dtype), group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        rows, columns = shape
        rate = group["lr"] * max(1.0, rows / columns) ** 0.5
        for parameter, direction in zip(parameters, directions.to(parameters[0].dtype), strict=True):
            if isinstance(parameter, DTensor):
                direction = distribute_tensor(direction, parameter.device_mesh, parameter.placements)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(direction, alpha=-rate)


def orthogonalise(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, epsilon: float
) -> Tensor:
    """Move the singular values of each matrix towards 1, by Newton and Schulz's iteration.

    Args:
        matrices: `(count, rows, columns)`.
        coefficients: coefficients of the odd polynomial of degree 5 that a step applies to the singular
            values.
        steps: number of times that it is applied.
        epsilon: the least norm that a matrix is divided by.

    Returns:
        `(count, rows, columns)`, in the type of `matrices`.
    """
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=epsilon)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
