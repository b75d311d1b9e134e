"""Multi-head exponential smoothing: the public operator over every backend."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from mhesa.errors import InputError
from mhesa.ops.backends import Inputs, resolve
from mhesa.ops.checks import check_scan, check_step
from mhesa.ops.context_parallel import ContextParallel, scan_stretches


@overload
def exponential_smoothing(
    x: Tensor,
    alpha: Tensor,
    decay: Tensor,
    *,
    skip: Tensor | None = ...,
    initial_state: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    reverse: bool = ...,
    return_final_state: Literal[False] = ...,
    backend: str | None = ...,
    context_parallel: ContextParallel | None = ...,
) -> Tensor: ...


@overload
def exponential_smoothing(
    x: Tensor,
    alpha: Tensor,
    decay: Tensor,
    *,
    skip: Tensor | None = ...,
    initial_state: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    reverse: bool = ...,
    return_final_state: Literal[True],
    backend: str | None = ...,
    context_parallel: ContextParallel | None = ...,
) -> tuple[Tensor, Tensor]: ...


def exponential_smoothing(
    x: Tensor,
    alpha: Tensor,
    decay: Tensor,
    *,
    skip: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
    backend: str | None = None,
    context_parallel: ContextParallel | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Smooth every channel of `x` over time, each head at its own rates, fixed or those of every step.

    ```text
    h[t] = decay[t] * h[t-1] + alpha[t] * x[t]        h[-1] = initial_state, or zero
    y[t] = h[t] + skip * x[t]
    ```

    Differentiable in `x`, `alpha`, `decay`, `skip` and `initial_state`. Sums accumulate in fp32 (fp64
    for fp64 `x`) whatever the type of `x`.

    Args:
        x: `(batch, length, heads, head_dim)`, any floating-point type.
        alpha: the weight of a new value: `(heads,)`, or `(batch, length, heads)` for one of every step.
        decay: the factor on the state: `(heads,)` or `(batch, length, heads)`, whatever the shape of `alpha`;
            in `[0, 1]` for a stable scan.
        skip: `(heads, head_dim)`, a weight on `x` itself, added to the output; no such term if omitted.
        initial_state: `(batch, heads, head_dim)`, or `(sequences, heads, head_dim)` with `cu_seqlens`.
        cu_seqlens: `(sequences + 1,)` integers, the offsets of sequences packed one after another
            along the length of an `x` of batch 1, in ascending order from 0 to `length`. No value passes
            from one sequence to the next.
        reverse: run from the last step to the first; the initial state then enters at the end.
        return_final_state: also return the state after the last step, shaped as `initial_state`, in
            fp32 (fp64 for fp64 `x`).
        backend: `"triton"`, `"numba"`, `"chunked"`, `"fft"` or `"reference"`; `None` takes the fastest
            that can serve `x`. `"fft"` takes fixed rates only.
        context_parallel: the processes that each sequence lies over; `x` is this one's stretch of it. Results
            and gradients are those of one process: `initial_state` counts where a sequence begins, and the
            final state is that after this process's last step. All processes must call this, and go backward
            through it, once. The gradients of `skip` and of rates `(heads,)` are this process's part: sum
            them over the processes.

    Returns:
        `y`, of the shape and type of `x`, or `(y, final_state)`.

    Raises:
        InputError: types, devices or shapes that do not fit, offsets that do not cover `x`, a backend that is
            unknown or cannot serve these inputs, or packed sequences in reverse over several processes.

    The recurrence is the exponential smoothing attention of ETSformer (https://arxiv.org/abs/2202.01381)
    with a damping factor in the decay, computed in time linear in the length.

    >>> x = torch.ones(1, 4, 1, 1)
    >>> exponential_smoothing(x, torch.tensor([0.5]), torch.tensor([0.5])).flatten().tolist()
    [0.5, 0.75, 0.875, 0.9375]

    A decay of zero at one step makes the state forget all that came before:

    >>> decay = torch.tensor([1.0, 1.0, 0.0, 1.0]).reshape(1, 4, 1)
    >>> exponential_smoothing(x, torch.ones(1), decay).flatten().tolist()
    [1.0, 2.0, 1.0, 2.0]
    """
    check_scan(x, alpha, decay, skip, initial_state, cu_seqlens)
    scan = resolve(backend, x.device, fixed_rates=alpha.ndim == decay.ndim == 1)
    dtype = accumulation_dtype(x.dtype)
    alpha, decay = cast(dtype, "alpha", alpha), cast(dtype, "decay", decay)
    skip = None if skip is None else cast(dtype, "skip", skip)
    initial_state = None if initial_state is None else cast(dtype, "initial_state", initial_state)
    cu_seqlens = None if cu_seqlens is None else cast(torch.int64, "cu_seqlens", cu_seqlens)
    if context_parallel is None:
        y, final_state = scan(x, alpha, decay, skip, initial_state, cu_seqlens, reverse)
    else:
        inputs = Inputs(x, alpha, decay, skip, initial_state, cu_seqlens, reverse)
        y, final_state = scan_stretches(context_parallel, scan, inputs)
    return (y, final_state) if return_final_state else y


def exponential_smoothing_step(
    x: Tensor, alpha: Tensor, decay: Tensor, state: Tensor, *, skip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step of `exponential_smoothing`, for streaming and generation.

    Args:
        x: `(batch, heads, head_dim)`.
        alpha, decay: `(heads,)` or `(batch, heads)`, each by itself.
        state: `(batch, heads, head_dim)`, from the step before; not changed in place.
        skip: `(heads, head_dim)`.

    Returns:
        `y`, of the shape and type of `x`, and the new state in fp32 (fp64 for fp64 `x`).

    Raises:
        InputError: types, devices or shapes that do not fit.

    >>> state = torch.zeros(1, 1, 1)
    >>> for _ in range(4):
    ...     y, state = exponential_smoothing_step(
    ...         torch.ones(1, 1, 1), torch.tensor([0.5]), torch.tensor([0.5]), state)
    >>> y.item()
    0.9375
    """
    check_step(x, alpha, decay, state, skip)
    dtype = accumulation_dtype(x.dtype)
    wide, state = x.to(dtype), cast(dtype, "state", state)
    alpha, decay = cast(dtype, "alpha", alpha), cast(dtype, "decay", decay)
    state = decay[..., None] * state + alpha[..., None] * wide
    # A copy: a caller may change `y` in place.
    y = state.clone() if skip is None else state + cast(dtype, "skip", skip) * wide
    return y.to(x.dtype), state


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of sums and states: fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(dtype: torch.dtype, name: str, tensor: Tensor) -> Tensor:
    """`tensor`, of any shape, in `dtype`.

    Comparing first is ten times faster than a conversion to the same type.

    Raises:
        InputError: its values are not real numbers; the message calls it `name`.
    """
    if tensor.dtype == dtype:
        return tensor
    if tensor.is_complex() or tensor.is_quantized:
        raise InputError(f"{name} must be real numbers, not {tensor.dtype}")
    return tensor.to(dtype)
