"""Dropout. On a CPU PyTorch draws its mask value by value; `mhesa.ops.cpu.dropout_kernels` takes one pass.

Under transforms and compilers, which fuse by themselves, and on other devices, PyTorch's operator is used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.library import custom_op

from mhesa.errors import InputError
from mhesa.ops.backends import cpu_kernels_serve
from mhesa.ops.checks import check_plain
from mhesa.ops.registration import apply, is_plain_eager, is_untransformed


def dropout(x: Tensor, probability: float, training: bool = True, *, backend: str | None = None) -> Tensor:
    """Set each value to zero with a probability; the others are divided by one minus it.

    Args:
        x: tensor of any shape and floating-point type.
        probability: probability of a zero, from 0 to 1.
        training: `False` returns `x`.
        backend: the layer's smoothing backend. Only `"numba"` and `None` use the CPU kernel.

    Random numbers follow from `torch.manual_seed`. (https://jmlr.org/papers/v15/srivastava14a.html)

    >>> y = dropout(torch.ones(1000), 0.2)
    >>> sorted(set(y.tolist()))
    [0.0, 1.25]
    """
    has_kernel = training and 0 < probability < 1 and is_untransformed(x) and cpu_kernels_serve([x], backend)
    if not has_kernel:
        return F.dropout(x, probability, training)
    key = torch.empty((), dtype=torch.int64, device="cpu").random_()
    if is_plain_eager(x):
        y: Tensor = apply(_Dropout, x, float(probability), int(key))
        return y
    # A dispatch mode, such as a counter of operations, must not change the mask: a checkpoint may run again
    # without it.
    return _dropout_operator(x, float(probability), key)


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


@custom_op("mhesa::dropout", mutates_args=(), schema="(Tensor x, float probability, Tensor key) -> Tensor")
def _dropout_operator(x: Tensor, probability: float, key: Tensor) -> Tensor:
    """Dropout as an operator, which dispatch modes see."""
    from mhesa.ops.cpu import dropout_kernels

    check_plain((x, key))
    if not (0 < probability < 1 and cpu_kernels_serve([x], None)):
        raise InputError(f"no kernel drops {probability} of {x.dtype} values on {x.device}")
    return dropout_kernels.dropout(x, probability, int(key))


def _save_key(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, ctx.probability, ctx.key = inputs


def _drop_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return _dropout_operator(dy, ctx.probability, ctx.key), None, None


_dropout_operator.register_fake(lambda x, probability, key: x.new_empty(x.shape))
_dropout_operator.register_autograd(_drop_gradient, setup_context=_save_key)
