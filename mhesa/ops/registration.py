"""Turns a pair of fused kernels into an operator that works in every part of PyTorch.

- `make_scan` registers the kernels as custom operators, so that compiled and exported graphs hold them as
  single nodes.
- `Smoothing` wraps them in an `autograd.Function`, which `torch.func` needs: with an autograd formula on the
  custom operator alone, `torch.func.grad` raises and `torch.func.jvp` returns zeros.
- `SmoothingGradient` is the gradient as a second `Function`. Its own backward is written with the scan, so
  that derivatives of any order exist. Forward-mode differentiation raises.
- `EagerSmoothing` calls the kernels directly, in plain eager mode (no compiler, transform or dispatch mode):
  the dispatcher costs as much as copying a megabyte.

`alpha` and `decay` are `(heads,)` or `(batch, length, heads)`, each by itself. A backend brings one pair of
kernels for fixed rates, both `(heads,)`, and one for rates of every step; for the latter a fixed rate is
broadcast, and its gradient summed. Those kernels also return states from which the backward pass can start
again; only `EagerSmoothing` keeps them, elsewhere the backward pass computes them anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
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


class FixedKernels(NamedTuple):
    """The kernels of a backend for rates `(heads,)`."""

    forward: Scan
    """`(x, alpha, decay, skip, initial_state, cu_seqlens, reverse) -> (y, final_state)`."""

    backward: ScanBackward
    """`(dy, dfinal, x, alpha, decay, skip, initial_state, cu_seqlens, reverse) ->
    (dx, dalpha, ddecay, dskip, dinitial)`; `dskip` is ignored where `skip` is `None`."""


class StepKernels(NamedTuple):
    """The kernels of a backend for rates `(batch, length, heads)`."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """As for fixed rates, and it also returns states for `backward`, in a shape of its own."""

    backward: Callable[..., Gradients]
    """As for fixed rates, with one more argument: the states that `forward` returned, or `None`."""


# The kernels of each backend, by its name.
_KERNELS: dict[str, tuple[FixedKernels, StepKernels]] = {}


def make_scan(name: str, fixed: FixedKernels, steps: StepKernels) -> Scan:
    """Register a backend's kernels as `mhesa::<name>_forward` and `mhesa::<name>_backward`.

    All kernels take and return plain tensors. `x`, `dy`, `y`, `dx` are `(batch, length, heads, head_dim)` in
    the type of `x`, inputs in any layout; all others have the accumulation type. No output may share memory
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
        return _forward(name, x, alpha, decay, skip, initial_state, cu_seqlens, reverse)[:2]

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
        dx, dalpha, ddecay, dskip, dinitial = _backward(
            name, dy, dfinal, x, alpha, decay, skip, initial_state, cu_seqlens, reverse
        )
        return dx, dalpha, ddecay, _no_skip(alpha) if skip is None else dskip, dinitial

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        Smoothing.setup_context(ctx, (name, *inputs), output)

    _KERNELS[name] = fixed, steps
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


def _forward(
    name: str,
    x: Tensor,
    alpha: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(y, final_state, states)` by a backend's kernels; `states` is `None` at fixed rates."""
    fixed, steps = _KERNELS[name]
    if alpha.ndim == decay.ndim == 1:
        return *fixed.forward(x, alpha, decay, skip, initial_state, cu_seqlens, reverse), None
    alpha, decay = alpha.expand(x.shape[:3]), decay.expand(x.shape[:3])
    return steps.forward(x, alpha, decay, skip, initial_state, cu_seqlens, reverse)


def _backward(
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
    states: Tensor | None = None,
) -> Gradients:
    """The gradients by a backend's kernels."""
    fixed, steps = _KERNELS[name]
    if alpha.ndim == decay.ndim == 1:
        return fixed.backward(dy, dfinal, x, alpha, decay, skip, initial_state, cu_seqlens, reverse)
    rates = alpha.expand(x.shape[:3]), decay.expand(x.shape[:3])
    dx, dalpha, ddecay, dskip, dinitial = steps.backward(
        dy, dfinal, x, *rates, skip, initial_state, cu_seqlens, reverse, states
    )
    return dx, _sum_steps(dalpha, alpha), _sum_steps(ddecay, decay), dskip, dinitial


def _sum_steps(gradient: Tensor, rate: Tensor) -> Tensor:
    """The gradient `(batch, length, heads)` summed to the shape of `rate`, in an order that never varies."""
    if rate.ndim == 3:
        return gradient
    if gradient.device.type == "cpu":  # where torch's order depends on the number of threads
        total = torch.from_numpy(gradient.numpy().sum((0, 1), dtype=np.float64))
    else:
        total = gradient.sum((0, 1), dtype=torch.float64)
    return total.to(gradient.dtype)


class EagerSmoothing(Function):
    """The scan by direct calls of the kernels, `(name, x, .., reverse) -> (y, final_state)`."""

    @staticmethod
    def forward(ctx: Any, name: str, *args: Any) -> Any:
        """Call the kernel."""
        y, final_state, states = _forward(name, *args)
        ctx.name, *tensors, ctx.reverse = name, *args
        ctx.save_for_backward(*tensors, states)
        return y, final_state

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        """Call the kernel, or the differentiable gradient if it is to be differentiated."""
        if torch.is_grad_enabled() or not is_plain_eager(dy, dfinal):
            return Smoothing.backward(ctx, dy, dfinal)
        x, alpha, decay, skip, initial_state, cu_seqlens, states = ctx.saved_tensors
        gradients = _backward(
            ctx.name,
            dy,
            dfinal,
            x,
            alpha,
            decay,
            skip,
            initial_state,
            cu_seqlens,
            ctx.reverse,
            states,
        )
        return _for_inputs(gradients, x, alpha, decay, skip, initial_state)


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
        """Call the custom operator."""
        run = getattr(torch.ops.mhesa, f"{name}_forward").default
        return run(x, alpha, decay, skip, initial_state, cu_seqlens, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the inputs; the backward pass needs nothing else."""
        ctx.name, *tensors, ctx.reverse = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient, itself differentiable."""
        x, alpha, decay, skip, initial_state, cu_seqlens = ctx.saved_tensors[:6]
        gradients = _apply(
            SmoothingGradient,
            (ctx.name, dy, dfinal, x, alpha, decay, skip, initial_state, cu_seqlens, ctx.reverse),
        )
        return _for_inputs(gradients, x, alpha, decay, skip, initial_state)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        """Turn the mapped dimension into more heads."""
        outputs = _apply(Smoothing, _fold(info.batch_size, in_dims, args, (1, 0, 0, 1, 1)))
        return _unfold(info.batch_size, outputs, (1, 1))


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
        """Call the custom operator."""
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
        """Turn the mapped dimension into more heads."""
        folded = _fold(info.batch_size, in_dims, args, (1, 1, 1, 0, 0, 1, 1))
        return _unfold(info.batch_size, _apply(SmoothingGradient, folded), (1, 0, 0, 1, 1))


class _Positional(inspect.Signature):
    """The signature of a function that is always called with all its arguments, by position.

    `apply` binds the arguments at every call; the full binding would double the time of a call.
    """

    class Bound(NamedTuple):
        """The attributes that `apply` uses."""

        args: tuple[Any, ...]
        kwargs: dict[str, Any]

        def apply_defaults(self) -> None:
            """Do nothing: no argument is missing."""

    def bind(self, *args: Any) -> Any:
        """Return the arguments unchanged."""
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
    return _forward(name, *args)[:2]


def is_plain_eager(*tensors: Tensor) -> bool:
    """Whether tensors of any shape meet no compiler, transform, tracer, mode, dual level or subclass."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
        or not all(type(tensor) in (Tensor, Parameter) for tensor in tensors)
    )


def _for_inputs(gradients: Gradients, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients for the arguments of a `Function`: `None` for the name, the offsets and absent tensors."""
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
        decay.new_empty(decay.shape),
        dskip,
        alpha.new_empty(dfinal.shape),
    )


def _no_skip(alpha: Tensor) -> Tensor:
    """The gradient of an absent `skip`, since an operator cannot return `None`: an empty tensor."""
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
    """The gradient written with the scan, for derivatives of higher order."""
    wide, dwide = x.to(alpha.dtype), dy.to(alpha.dtype)
    h, _ = scan(wide, alpha, decay, None, initial_state, cu_seqlens, reverse)
    # The gradient that h[t] gets from later steps, decay * g[t+1], is a scan in the other direction.
    later, dinitial = scan(dwide, decay, decay, None, dfinal, cu_seqlens, not reverse)
    g = dwide + _before(later, dfinal, cu_seqlens, not reverse)
    start = torch.zeros_like(dfinal) if initial_state is None else initial_state
    dx = alpha[..., None] * g
    dskip = _no_skip(alpha)
    if skip is not None:
        dx = dx + skip * dwide
        dskip = (dwide * wide).sum((0, 1))
    dalpha = (g * wide).sum((0, 1, 3) if alpha.ndim == 1 else 3)
    ddecay = (g * _before(h, start, cu_seqlens, reverse)).sum((0, 1, 3) if decay.ndim == 1 else 3)
    return dx.to(x.dtype), dalpha, ddecay, dskip, dinitial


def _before(h: Tensor, start: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> Tensor:
    """The state before each step, `h[t-1]`; `start` for the first step of a sequence.

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
    size: int, in_dims: Sequence[int | None], args: Sequence[Any], behind: Sequence[int]
) -> tuple[Any, ...]:
    """Turn a mapped dimension of `size` into more heads.

    `args` is the backend's name, the tensors, `cu_seqlens` and `reverse`; `behind` says how many dimensions
    each tensor has behind its heads.
    """
    _, *in_dims, offsets_dim, _ = in_dims
    name, *tensors, cu_seqlens, reverse = args
    if offsets_dim is not None:
        raise ValueError("cu_seqlens cannot be mapped over: make one call per packing")
    folded = [
        None if tensor is None else _with_heads(tensor, dim, size, last)
        for tensor, dim, last in zip(tensors, in_dims, behind, strict=True)
    ]
    return (name, *folded, cu_seqlens, reverse)


def _with_heads(tensor: Tensor, dim: int | None, size: int, behind: int) -> Tensor:
    at = tensor.ndim - (dim is not None) - 1 - behind
    if dim is None:
        tensor = tensor.unsqueeze(at).expand(*tensor.shape[:at], size, *tensor.shape[at:])
    else:
        tensor = tensor.movedim(dim, at)
    return tensor.flatten(at, at + 1)


def _unfold(size: int, outputs: Sequence[Tensor], behind: Sequence[int]) -> tuple[Any, Any]:
    """The outputs with the mapped dimension split off the heads again, and its position in each."""
    # The gradient of an absent skip has one empty dimension.
    heads_at = [max(output.ndim - 1 - last, 0) for output, last in zip(outputs, behind, strict=True)]
    split = tuple(
        output.unflatten(at, (size, output.shape[at] // size))
        for output, at in zip(outputs, heads_at, strict=True)
    )
    return split, tuple(heads_at)
