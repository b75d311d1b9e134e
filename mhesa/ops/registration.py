"""Turns a pair of fused kernels into an operator that every part of PyTorch understands.

`make_scan` registers the raw kernels with the dispatcher, so that compiled and exported graphs hold
them as single nodes, and wraps them in an `autograd.Function`, since only that serves `torch.func`
(an autograd formula on the raw operator alone makes `torch.func.grad` raise and `torch.func.jvp`
return zeros). The gradient is a second `Function`, differentiable in turn: its backward is written in
terms of the scan itself, so that derivatives of any order exist. Forward-mode differentiation raises.

Both ways cost as much as copying a megabyte. Where nobody looks on, no compiler, transform or mode, the
kernels are called directly, in a third `Function` that does nothing else where gradients are wanted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.library import custom_op
from torch.nn import Parameter

from mhesa.ops.backends import Scan

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
ScanBackward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, bool], Gradients
]

# Of each backend, forward and backward.
_KERNELS: dict[str, tuple[Scan, ScanBackward]] = {}


def make_scan(name: str, forward: Scan, backward: ScanBackward) -> Scan:
    """Register two kernels as `mhesa::<name>_forward` and `mhesa::<name>_backward`.

    Args:
        name: the backend.
        forward: `(x, alpha, decay, skip, initial_state, cu_seqlens, reverse) -> (y, final_state)`.
        backward: `(dy, dfinal, x, alpha, decay, skip, initial_state, cu_seqlens, reverse) ->
            (dx, dalpha, ddecay, dskip, dinitial)`; `dskip` is ignored where `skip` is `None`.

    Both take and return plain tensors: `x`, `dy`, `y`, `dx` `(batch, length, heads, head_dim)` in the type
    of `x`, the first two in any layout; the rest in the accumulation type. No output may share memory
    with an input.

    Returns:
        The differentiable operator, `(x, alpha, decay, skip, initial_state, cu_seqlens, reverse) ->
        (y, final_state)`.
    """

    def raw_forward(
        x: Tensor,
        alpha: Tensor,
        decay: Tensor,
        skip: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        return forward(x, alpha, decay, skip, initial_state, cu_seqlens, reverse)

    def raw_backward(
        dy: Tensor,
        dfinal: Tensor,
        x: Tensor,
        alpha: Tensor,
        decay: Tensor,
        skip: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        dx, dalpha, ddecay, dskip, dinitial = backward(
            dy, dfinal, x, alpha, decay, skip, initial_state, cu_seqlens, reverse
        )
        return dx, dalpha, ddecay, _no_skip(alpha) if skip is None else dskip, dinitial

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        Smoothing.setup_context(ctx, (name, *inputs), output)

    _KERNELS[name] = forward, backward
    forward_op = custom_op(f"mhesa::{name}_forward", raw_forward, mutates_args=())
    backward_op = custom_op(f"mhesa::{name}_backward", raw_backward, mutates_args=())
    forward_op.register_fake(_fake_forward)
    backward_op.register_fake(_fake_backward)
    forward_op.register_autograd(
        lambda ctx, *grads: Smoothing.backward(ctx, *grads)[1:], setup_context=setup_context
    )
    backward_op.register_autograd(
        lambda ctx, *grads: SmoothingGradient.backward(ctx, *grads)[1:], setup_context=setup_context
    )
    return partial(_smoothing, name)


class EagerSmoothing(Function):
    """The scan on plain tensors, `(name, x, .., reverse) -> (y, final_state)`, by the kernels themselves."""

    @staticmethod
    def forward(ctx: Any, name: str, *args: Any) -> Any:
        """Call the kernel."""
        Smoothing.setup_context(ctx, (name, *args), None)
        return _KERNELS[name][0](*args)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        """Call the kernel, unless the gradient is to be differentiated in turn."""
        if torch.is_grad_enabled() or not is_plain_eager(dy, dfinal):
            return Smoothing.backward(ctx, dy, dfinal)
        saved = ctx.saved_tensors
        gradients = _KERNELS[ctx.name][1](*(dy, dfinal, *saved, ctx.reverse))
        return _for_inputs(gradients, *saved[:-1])


class Smoothing(Function):
    """The scan, `(name, x, alpha, decay, skip, initial_state, cu_seqlens, reverse) -> (y, final_state)`."""

    @staticmethod
    def forward(
        name: str,
        x: Tensor,
        alpha: Tensor,
        decay: Tensor,
        skip: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
    ) -> Any:
        """Call the raw operator."""
        run = getattr(torch.ops.mhesa, f"{name}_forward").default
        return run(x, alpha, decay, skip, initial_state, cu_seqlens, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the inputs: nothing the kernel computes is needed again."""
        ctx.name, *tensors, ctx.reverse = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient, differentiable in turn."""
        x, alpha, decay, skip, initial_state, cu_seqlens = ctx.saved_tensors
        gradients = _apply(
            SmoothingGradient,
            (ctx.name, dy, dfinal, x, alpha, decay, skip, initial_state, cu_seqlens, ctx.reverse),
        )
        return _for_inputs(gradients, x, alpha, decay, skip, initial_state)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        """The mapped dimension becomes further heads."""
        outputs = _apply(Smoothing, _fold(info.batch_size, in_dims, args, (2, 0, 0, 0, 1)))
        return _unfold(info.batch_size, outputs, (2, 1))


class SmoothingGradient(Function):
    """The gradient, `(name, dy, dfinal, x, .., reverse) -> (dx, dalpha, ddecay, dskip, dinitial)`."""

    @staticmethod
    def forward(
        name: str,
        dy: Tensor,
        dfinal: Tensor,
        x: Tensor,
        alpha: Tensor,
        decay: Tensor,
        skip: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
    ) -> Any:
        """Call the raw operator."""
        run = getattr(torch.ops.mhesa, f"{name}_backward").default
        return run(dy, dfinal, x, alpha, decay, skip, initial_state, cu_seqlens, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the inputs."""
        Smoothing.setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate the gradient written with the scan itself."""
        *tensors, cu_seqlens = ctx.saved_tensors
        scan = partial(_smoothing, ctx.name)

        def differentiable(*present: Tensor) -> Gradients:
            values = iter(present)
            args: list[Any] = [None if tensor is None else next(values) for tensor in tensors]
            return _gradients(scan, *[*args, cu_seqlens, ctx.reverse])

        present = [tensor for tensor in tensors if tensor is not None]
        derivatives = iter(torch.func.vjp(differentiable, *present)[1](cotangents))
        return (
            None,
            *(None if tensor is None else next(derivatives) for tensor in tensors),
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        """The mapped dimension becomes further heads."""
        folded = _fold(info.batch_size, in_dims, args, (2, 1, 2, 0, 0, 0, 1))
        return _unfold(info.batch_size, _apply(SmoothingGradient, folded), (2, 0, 0, 0, 1))


class _Positional(inspect.Signature):
    """Of a function that always gets all its arguments, in order.

    `apply` binds arguments to the signature at every call; in full that costs as much as all the rest.
    """

    class Bound(NamedTuple):
        """What `apply` makes use of."""

        args: tuple[Any, ...]
        kwargs: dict[str, Any]

        def apply_defaults(self) -> None:
            """None are missing."""

    def bind(self, *args: Any) -> Any:
        """The arguments as they are."""
        return self.Bound(args, {})


for _function in (Smoothing, SmoothingGradient):
    _parameters = inspect.signature(_function.forward).parameters.values()
    _function.forward.__signature__ = _Positional(list(_parameters))  # type: ignore[union-attr]


def _smoothing(
    name: str,
    x: Tensor,
    alpha: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """See `mhesa.ops.exponential_smoothing`."""
    args = (x, alpha, decay, skip, initial_state, cu_seqlens, reverse)
    tensors = [tensor for tensor in args[:6] if tensor is not None]
    if not is_plain_eager(*tensors):
        return _apply(Smoothing, (name, *args))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _apply(EagerSmoothing, (name, *args))
    return _KERNELS[name][0](*args)


def is_plain_eager(*tensors: Tensor) -> bool:
    """Whether all that is to be done with the tensors is to compute on them."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
        or not all(type(tensor) in (Tensor, Parameter) for tensor in tensors)
    )


def _for_inputs(gradients: Gradients, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of what a `Function` here takes, and `None` for what is not there or no tensor."""
    present = (None if t is None else gradient for gradient, t in zip(gradients, tensors, strict=True))
    return None, *present, None, None


def _apply(function: type[Function], args: tuple[Any, ...]) -> Any:
    return function.apply(*args)


def _fake_forward(
    x: Tensor,
    alpha: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    batch, _, heads, head_dim = x.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), alpha.new_empty(sequences, heads, head_dim)


def _fake_backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    alpha: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> Gradients:
    dskip = _no_skip(alpha) if skip is None else alpha.new_empty(skip.shape)
    return (
        x.new_empty(x.shape),
        alpha.new_empty(alpha.shape),
        alpha.new_empty(alpha.shape),
        dskip,
        alpha.new_empty(dfinal.shape),
    )


def _no_skip(alpha: Tensor) -> Tensor:
    """What stands for the gradient of an absent `skip`: an operator cannot return `None`."""
    return alpha.new_empty(0)


def _gradients(
    scan: Scan,
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    alpha: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> Gradients:
    """The gradient written with the scan itself, for derivatives of higher order."""
    wide, dwide = x.to(alpha.dtype), dy.to(alpha.dtype)
    h, _ = scan(wide, alpha, decay, None, initial_state, cu_seqlens, reverse)
    # What reaches h[t] from later steps, decay * g[t+1], is a scan of its own, the other way in time.
    later, dinitial = scan(dwide, decay, decay, None, dfinal, cu_seqlens, not reverse)
    g = dwide + _before(later, dfinal, cu_seqlens, not reverse)
    start = torch.zeros_like(dfinal) if initial_state is None else initial_state
    dx = alpha[:, None] * g
    dskip = _no_skip(alpha)
    if skip is not None:
        dx = dx + skip * dwide
        dskip = (dwide * wide).sum((0, 1))
    dalpha = (g * wide).sum((0, 1, 3))
    ddecay = (g * _before(h, start, cu_seqlens, reverse)).sum((0, 1, 3))
    return dx.to(x.dtype), dalpha, ddecay, dskip, dinitial


def _before(h: Tensor, start: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> Tensor:
    """The state that each step finds: `h` one step later in scan order, `start` at the first step.

    `h` is `(batch, length, heads, head_dim)`, `start` `(sequences, heads, head_dim)`.
    """
    if cu_seqlens is None:
        start = start[:, None]
        return torch.cat([h[:, 1:], start] if reverse else [start, h[:, :-1]], dim=1)[:, : h.shape[1]]
    rows = torch.arange(h.shape[1], device=h.device)
    sequence = torch.searchsorted(cu_seqlens, rows, right=True) - 1
    first = cu_seqlens[sequence + 1] - 1 if reverse else cu_seqlens[sequence]
    shifted = h.roll(-1 if reverse else 1, dims=1)
    return torch.where((rows == first)[:, None, None], start[sequence], shifted)


def _fold(
    size: int, in_dims: Sequence[int | None], args: Sequence[Any], heads_at: Sequence[int]
) -> tuple[Any, ...]:
    """Turn a mapped dimension of `size` into further heads, at `heads_at` of each tensor in `args`.

    The first of `args` is the backend's name; the last two, `cu_seqlens` and `reverse`, are not per head.
    """
    _, *in_dims, offsets_dim, _ = in_dims
    name, *tensors, cu_seqlens, reverse = args
    if offsets_dim is not None:
        raise ValueError("cu_seqlens cannot be mapped over: give each packing a call of its own")
    folded = [
        None if tensor is None else _with_heads(tensor, dim, size, at)
        for tensor, dim, at in zip(tensors, in_dims, heads_at, strict=True)
    ]
    return (name, *folded, cu_seqlens, reverse)


def _with_heads(tensor: Tensor, dim: int | None, size: int, at: int) -> Tensor:
    if dim is None:
        tensor = tensor.unsqueeze(at).expand(*tensor.shape[:at], size, *tensor.shape[at:])
    else:
        tensor = tensor.movedim(dim, at)
    return tensor.flatten(at, at + 1)


def _unfold(size: int, outputs: Sequence[Tensor], heads_at: Sequence[int]) -> tuple[Any, Any]:
    """The outputs with the mapped dimension split off the heads again, and where it is in each."""
    split = tuple(
        output.unflatten(at, (size, output.shape[at] // size))
        for output, at in zip(outputs, heads_at, strict=True)
    )
    return split, tuple(heads_at)
