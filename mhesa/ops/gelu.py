"""GELU, alone or times a gate, as a block computes it between its matrix products.

PyTorch passes over memory two to five times; on a CPU, `mhesa.ops.cpu.gelu_kernels` passes once.
Under a compiler, which fuses by itself, and on other devices, PyTorch's own operators are used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from mhesa.ops.backends import cpu_kernels_serve
from mhesa.ops.registration import apply, is_plain_eager


def gelu(x: Tensor, gate: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """The Gaussian error linear unit, `gate * x * Phi(x)`.

    Args:
        x: tensor of any shape and floating-point type; computed in fp32 (fp64 for fp64).
        gate: tensor of the shape of `x`; ones if omitted.
        backend: the layer's smoothing backend. Only `"numba"` and `None` use the CPU kernel.

    The exact unit of https://arxiv.org/abs/1606.08415, not its approximation by tanh.

    >>> gelu(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 2.0]))
    tensor([0.0000, 1.6827])
    """
    tensors = [x] if gate is None else [x, gate]
    if not (is_plain_eager(*tensors) and cpu_kernels_serve(tensors, backend)):
        return F.gelu(x) if gate is None else gate * F.gelu(x)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        y: Tensor = apply(_Gelu, x, gate)
        return y
    return _forward(x, gate)


class _Gelu(Function):
    """`gate * GELU(x)`, by direct calls of the CPU kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None) -> Tensor:
        """Call the kernel, for any shape; the backward pass needs the inputs alone."""
        ctx.save_for_backward(x, gate)
        return _forward(x, gate)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        """Call the kernel, or PyTorch's differentiable operators if the gradient is to be differentiated."""
        x, gate = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain_eager(dy):
            gated = dy if gate is None else dy * gate
            dx = torch.ops.aten.gelu_backward(gated, x)
            return dx, None if gate is None else dy * F.gelu(x)
        from mhesa.ops.cpu import gelu_kernels

        return gelu_kernels.backward(dy, x, gate)


def _forward(x: Tensor, gate: Tensor | None) -> Tensor:
    from mhesa.ops.cpu import gelu_kernels

    return gelu_kernels.forward(x, gate)
