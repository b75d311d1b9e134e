"""Dropout. On a CPU PyTorch draws its mask value by value; `mhesa.ops.cpu.dropout_kernels` takes one pass.

Under a compiler, which fuses by itself, and on other devices, PyTorch's own operator is used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from mhesa.ops.backends import cpu_kernels_serve
from mhesa.ops.registration import apply, is_plain_eager


def dropout(x: Tensor, probability: float, *, backend: str | None = None) -> Tensor:
    """Zeros in place of random values of `x`; the others are divided by what is left of one.

    Args:
        x: tensor of any shape and floating-point type.
        probability: probability of a zero, from 0 to 1.
        backend: the layer's smoothing backend. Only `"numba"` and `None` use the CPU kernel.

    Random numbers follow from `torch.manual_seed`. (https://jmlr.org/papers/v15/srivastava14a.html)

    >>> y = dropout(torch.ones(1000), 0.2)
    >>> sorted(set(y.tolist()))
    [0.0, 1.25]
    """
    if not probability:
        return x
    if not (probability < 1 and is_plain_eager(x) and cpu_kernels_serve([x], backend)):
        return F.dropout(x, probability)
    key = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
    y: Tensor = apply(_Dropout, x, probability, key)
    return y


class _Dropout(Function):
    """Dropout by direct calls of the CPU kernel; the gradient is dropped alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float, key: int) -> Tensor:
        """Call the kernel; the backward pass needs the key alone."""
        from mhesa.ops.cpu import dropout_kernels

        ctx.probability, ctx.key = probability, key
        return dropout_kernels.dropout(x, probability, key)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        """Drop the gradient's values, or multiply it by the mask where it is not a plain tensor."""
        if is_plain_eager(dy):
            return apply(_Dropout, dy, ctx.probability, ctx.key), None, None
        ones = torch.ones(dy.shape, dtype=dy.dtype, device="cpu")
        return dy * _Dropout.forward(ctx, ones, ctx.probability, ctx.key), None, None
