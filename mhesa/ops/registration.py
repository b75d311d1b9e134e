"""Turns a pair of fused kernels into an operator that works in every part of PyTorch.

- `make_scan` registers the kernels as custom operators, so that compiled and exported graphs hold them as
  single nodes.
- `Smoothing` wraps them in an `autograd.Function`, which `torch.func` needs: with an autograd formula on the
  custom operator alone, `torch.func.grad` raises and `torch.func.jvp` returns zeros.
- `SmoothingGradient` is the gradient as a second `Function`. Its own backward is written with the scan, so
  that derivatives of any order exist. It has no forward mode, for which `resolve` takes `chunked`.
- `EagerSmoothing` calls the kernels directly, in plain eager mode (no compiler, transform or dispatch mode):
  the dispatcher costs as much as copying a megabyte.

`alpha` and `decay` are `(heads,)` or `(batch, length, heads)`, each by itself. A backend brings one pair of
kernels for fixed rates, both `(heads,)`, and one for rates of every step; for the latter a fixed rate is
broadcast, and its gradient summed. Those kernels also return states from which the backward pass can start
again; only `EagerSmoothing` keeps them, elsewhere the backward pass computes them anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.library import custom_op

from mhesa.errors import InputError
from mhesa.ops.backends import Inputs, Scan
from mhesa.ops.checks import (
    are_plain,
    check_devices,
    check_gradients,
    check_plain,
    check_scan,
    count_sequences,
)

# `(dx, dalpha, ddecay, dskip, dinitial)`.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class FixedKernels(NamedTuple):
    """The kernels of a backend for rates `(heads,)`."""

    # `inputs -> (y, final_state)`.
    forward: Callable[[Inputs], tuple[Tensor, Tensor]]
    # `(dy, dfinal, inputs) -> gradients`; `dskip` is ignored where `skip` is `None`.
    backward: Callable[[Tensor, Tensor, Inputs], Gradients]


class StepKernels(NamedTuple):
    """The kernels of a backend for rates `(batch, length, heads)`."""

    # As for fixed rates; also returns states for `backward`, in a shape of the backend's own.
    forward: Callable[[Inputs], tuple[Tensor, Tensor, Tensor]]
    # As for fixed rates; also takes the states that `forward` returned, or `None`.
    backward: Callable[[Tensor, Tensor, Inputs, Tensor | None], Gradients]


# What kernels take.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The kernels of each backend, by its name.
_KERNELS: dict[str, tuple[FixedKernels, StepKernels]] = {}
# The types of `Inputs`, and of two results, as custom operators declare them.
_INPUTS = (
    "Tensor x, Tensor alpha, Tensor decay, Tensor? skip, Tensor? initial_state, Tensor? cu_seqlens, "
    "bool reverse"
)
_TWO = "Tensor, Tensor"


def make_scan(name: str, fixed: FixedKernels, steps: StepKernels) -> Scan:
    """Register a backend's kernels as `mhesa::<name>_forward` and `mhesa::<name>_backward`.

    All kernels take and return plain tensors. `x`, `dy`, `y`, `dx` are `(batch, length, heads, head_dim)` in
    the type of `x`, inputs in any layout; all others have the accumulation type. No output may share memory
    with an input.

    Returns:
        The differentiable operator, `(x, alpha, decay, skip, initial_state, cu_seqlens, reverse) ->
        (y, final_state)`.
    """

    # Exported graphs, and anybody, can call custom operators with arguments that nobody has checked.
    def run_forward(*args: Any) -> tuple[Tensor, Tensor]:
        check_scan(*args[:6])
        check_plain(args[:6])
        return _forward(name, Inputs(*args))[:2]

    def run_backward(dy: Tensor, dfinal: Tensor, *args: Any) -> Gradients:
        inputs = Inputs(*args)
        check_scan(*args[:6])
        check_gradients(dy, dfinal, inputs.x, inputs.cu_seqlens)
        check_plain((dy, dfinal, *args[:6]))
        dx, dalpha, ddecay, dskip, dinitial = _backward(name, dy, dfinal, inputs)
        return dx, dalpha, ddecay, _no_skip(inputs.alpha) if inputs.skip is None else dskip, dinitial

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        Smoothing.setup_context(ctx, (name, *inputs), output)

    _KERNELS[name] = fixed, steps
    forward_op = custom_op(
        f"mhesa::{name}_forward", run_forward, mutates_args=(), schema=f"({_INPUTS}) -> ({_TWO})"
    )
    backward_op = custom_op(
        f"mhesa::{name}_backward",
        run_backward,
        mutates_args=(),
        schema=f"(Tensor dy, Tensor dfinal, {_INPUTS}) -> ({_TWO}, {_TWO}, Tensor)",
    )
    forward_op.register_fake(_fake_forward)
    backward_op.register_fake(_fake_backward)
    forward_op.register_autograd(
        lambda ctx, *grads: Smoothing.backward(ctx, *grads)[1:], setup_context=setup_context
    )
    backward_op.register_autograd(
        lambda ctx, *grads: SmoothingGradient.backward(ctx, *grads)[1:], setup_context=setup_context
    )
    return partial(_smoothing, name)


def _kernels(name: str, dtype: torch.dtype) -> tuple[FixedKernels, StepKernels]:
    if dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise InputError(f"backend {name!r} takes {names}, not {str(dtype).removeprefix('torch.')}")
    return _KERNELS[name]


def _forward(name: str, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(y, final_state, states)` by a backend's kernels; `states` is `None` at fixed rates."""
    fixed, steps = _kernels(name, inputs.x.dtype)
    if inputs.alpha.ndim == inputs.decay.ndim == 1:
        return *fixed.forward(inputs), None
    return steps.forward(_at_every_step(inputs))


def _backward(
    name: str, dy: Tensor, dfinal: Tensor, inputs: Inputs, states: Tensor | None = None
) -> Gradients:
    """The gradients by a backend's kernels."""
    fixed, steps = _kernels(name, inputs.x.dtype)
    if inputs.alpha.ndim == inputs.decay.ndim == 1:
        return fixed.backward(dy, dfinal, inputs)
    dx, dalpha, ddecay, dskip, dinitial = steps.backward(dy, dfinal, _at_every_step(inputs), states)
    return dx, _sum_steps(dalpha, inputs.alpha), _sum_steps(ddecay, inputs.decay), dskip, dinitial


def _at_every_step(inputs: Inputs) -> Inputs:
    """Broadcast fixed rates to `(batch, length, heads)`."""
    steps = inputs.x.shape[:3]
    return inputs._replace(alpha=inputs.alpha.expand(steps), decay=inputs.decay.expand(steps))


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
    """The scan by direct calls of the kernels, `(name, *inputs) -> (y, final_state)`."""

    @staticmethod
    def forward(ctx: Any, name: str, *args: Any) -> Any:
        """Call the kernel."""
        y, final_state, states = _forward(name, Inputs(*args))
        ctx.name, *tensors, ctx.reverse = name, *args
        ctx.save_for_backward(*tensors, states)
        return y, final_state

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        """Call the kernel, or the differentiable gradient if it is to be differentiated."""
        if torch.is_grad_enabled() or not is_plain_eager(dy, dfinal):
            return Smoothing.backward(ctx, dy, dfinal)
        *tensors, states = ctx.saved_tensors
        inputs = Inputs(*[*tensors, ctx.reverse])
        return _for_inputs(_backward(ctx.name, dy, dfinal, inputs, states), inputs)


class Smoothing(Function):
    """The scan, `(name, *inputs) -> (y, final_state)`."""

    @staticmethod
    def forward(  # without `*args`: torch.compile counts the parameters
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
        inputs = Inputs(*[*ctx.saved_tensors[:6], ctx.reverse])
        return _for_inputs(apply(SmoothingGradient, ctx.name, dy, dfinal, *inputs), inputs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        """Turn the mapped dimension into more heads."""
        outputs = apply(Smoothing, *_fold(info.batch_size, in_dims, args, (1, 0, 0, 1, 1)))
        return _unfold(info.batch_size, outputs, (1, 1))


class SmoothingGradient(Function):
    """The gradient, `(name, dy, dfinal, *inputs) -> (dx, dalpha, ddecay, dskip, dinitial)`."""

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

    setup_context = staticmethod(Smoothing.setup_context)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate the gradient written with the scan itself."""
        *tensors, cu_seqlens = ctx.saved_tensors
        scan = partial(_smoothing, ctx.name)

        def differentiable(*present: Tensor) -> Gradients:
            values = iter(present)
            args: list[Any] = [None if tensor is None else next(values) for tensor in tensors]
            dy, dfinal, *args = args
            return _gradients(scan, dy, dfinal, Inputs(*[*args, cu_seqlens, ctx.reverse]))

        present = [tensor for tensor in tensors if tensor is not None]
        derivatives = iter(torch.func.vjp(differentiable, *present)[1](cotangents))
        return None, *(None if tensor is None else next(derivatives) for tensor in tensors), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        """Turn the mapped dimension into more heads."""
        folded = _fold(info.batch_size, in_dims, args, (1, 1, 1, 0, 0, 1, 1))
        return _unfold(info.batch_size, apply(SmoothingGradient, *folded), (1, 0, 0, 1, 1))


def _smoothing(name: str, *args: Any) -> tuple[Tensor, Tensor]:
    """The scan of a backend, `(name, *inputs)`, by the shortest way through PyTorch."""
    tensors = [tensor for tensor in args[:6] if tensor is not None]
    if not is_plain_eager(*tensors):
        return apply(Smoothing, name, *args)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return apply(EagerSmoothing, name, *args)
    return _forward(name, Inputs(*args))[:2]


def apply(function: type[Function], *args: Any) -> Any:
    """The results of a `Function`, whose own `apply` has no types."""
    return function.apply(*args)


def is_plain_eager(*tensors: Tensor) -> bool:
    """Whether tensors of any shape are plain and meet no compiler, transform, tracer, mode or dual level."""
    return is_untransformed(*tensors) and not torch._C._len_torch_dispatch_stack()


def is_untransformed(*tensors: Tensor) -> bool:
    """Whether tensors of any shape are plain and meet no compiler, transform, tracer or dual level.

    A dispatch mode may be active.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
        or not are_plain(tensors)
    )


def _for_inputs(gradients: Gradients, inputs: Inputs) -> tuple[Tensor | None, ...]:
    """Gradients for the arguments of a `Function`: `None` for the name, the offsets and absent tensors."""
    pairs = zip(inputs[:5], gradients, strict=True)
    return None, *(None if tensor is None else gradient for tensor, gradient in pairs), None, None


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor]:
    x, alpha, *_, cu_seqlens, _ = args
    check_devices(args[:5], cu_seqlens, x.device)
    return x.new_empty(x.shape), alpha.new_empty(count_sequences(x, cu_seqlens), *x.shape[2:])


def _fake_backward(dy: Tensor, dfinal: Tensor, *args: Any) -> Gradients:
    x, alpha, decay, skip, *_ = args
    check_devices((dy, dfinal, *args[:5]), args[5], x.device)
    dskip = _no_skip(alpha) if skip is None else alpha.new_empty(skip.shape)
    dalpha, ddecay, dinitial = (alpha.new_empty(like.shape) for like in (alpha, decay, dfinal))
    return x.new_empty(x.shape), dalpha, ddecay, dskip, dinitial


def _no_skip(alpha: Tensor) -> Tensor:
    """The gradient of an absent `skip`, since an operator cannot return `None`: an empty tensor."""
    return alpha.new_empty(0)


def _gradients(scan: Scan, dy: Tensor, dfinal: Tensor, inputs: Inputs) -> Gradients:
    """The gradient written with the scan, for derivatives of higher order."""
    x, alpha, decay, skip, initial_state, cu_seqlens, reverse = inputs
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
    cu_seqlens = cu_seqlens.to(h.device)
    rows = torch.arange(h.shape[1], device=h.device)
    sequence = torch.searchsorted(cu_seqlens, rows, right=True) - 1
    first = cu_seqlens[sequence + 1] - 1 if reverse else cu_seqlens[sequence]
    shifted = h.roll(-1 if reverse else 1, dims=1)
    return torch.where((rows == first)[:, None, None], start[sequence], shifted)


def _fold(
    size: int, in_dims: Sequence[int | None], args: Sequence[Any], trailing: Sequence[int]
) -> tuple[Any, ...]:
    """Turn a mapped dimension of `size` into more heads.

    `args` is the backend's name, the tensors, `cu_seqlens` and `reverse`; `trailing` says how many
    dimensions each tensor has behind its heads.
    """
    _, *in_dims, offsets_dim, _ = in_dims
    name, *tensors, cu_seqlens, reverse = args
    if offsets_dim is not None:
        raise InputError("cu_seqlens cannot be mapped over: make one call per packing")
    folded = [
        None if tensor is None else _with_heads(tensor, dim, size, last)
        for tensor, dim, last in zip(tensors, in_dims, trailing, strict=True)
    ]
    return (name, *folded, cu_seqlens, reverse)


def _with_heads(tensor: Tensor, dim: int | None, size: int, trailing: int) -> Tensor:
    at = tensor.ndim - (dim is not None) - 1 - trailing
    if dim is None:
        tensor = tensor.unsqueeze(at).expand(*tensor.shape[:at], size, *tensor.shape[at:])
    else:
        tensor = tensor.movedim(dim, at)
    return tensor.flatten(at, at + 1)


def _unfold(size: int, outputs: Sequence[Tensor], trailing: Sequence[int]) -> tuple[Any, Any]:
    """The outputs with the mapped dimension split off the heads again, and its position in each."""
    # The gradient of an absent skip has one empty dimension.
    heads_at = [max(output.ndim - 1 - last, 0) for output, last in zip(outputs, trailing, strict=True)]
    split = tuple(
        output.unflatten(at, (size, output.shape[at] // size))
        for output, at in zip(outputs, heads_at, strict=True)
    )
    return split, tuple(heads_at)
