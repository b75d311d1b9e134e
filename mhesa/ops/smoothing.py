"""Multi-head exponential smoothing: the public operator over every backend."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from mhesa.ops.backends import resolve


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
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Smooth every channel of `x` over time, each head at its own rates, fixed or those of every step.

    .. code-block:: text

        h[t] = decay[t] * h[t-1] + alpha[t] * x[t]        h[-1] = initial_state, or zero
        y[t] = h[t] + skip * x[t]

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

    Returns:
        `y`, of the shape and type of `x`, or `(y, final_state)`.

    Raises:
        ValueError: shapes that do not fit, offsets that do not cover `x`, or a backend that is unknown
            or cannot serve these inputs.

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
    _check_shapes(x, alpha, decay, skip, initial_state, cu_seqlens)
    scan = resolve(backend, x.device, fixed_rates=alpha.ndim == decay.ndim == 1)
    dtype = accumulation_dtype(x.dtype)
    y, final_state = scan(
        x,
        _cast(dtype, alpha),
        _cast(dtype, decay),
        None if skip is None else _cast(dtype, skip),
        None if initial_state is None else _cast(dtype, initial_state),
        cu_seqlens,
        reverse,
    )
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

    >>> state = torch.zeros(1, 1, 1)
    >>> for _ in range(4):
    ...     y, state = exponential_smoothing_step(
    ...         torch.ones(1, 1, 1), torch.tensor([0.5]), torch.tensor([0.5]), state)
    >>> y.item()
    0.9375
    """
    if x.ndim != 3:
        raise ValueError(f"x must be (batch, heads, head_dim), not {tuple(x.shape)}")
    _check_parameters(x, alpha, decay, skip)
    if state.shape != x.shape:
        raise ValueError(f"state must be {tuple(x.shape)} as x is, not {tuple(state.shape)}")
    dtype = accumulation_dtype(x.dtype)
    wide = x.to(dtype)
    state = decay.to(dtype)[..., None] * state.to(dtype) + alpha.to(dtype)[..., None] * wide
    y = state if skip is None else state + skip.to(dtype) * wide
    return y.to(x.dtype), state


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of sums and states: fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cast(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """`tensor` in `dtype`. Comparing first is ten times faster than a conversion to the same type."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _check_shapes(
    x: Tensor,
    alpha: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be (batch, length, heads, head_dim), not {tuple(x.shape)}")
    _check_parameters(x, alpha, decay, skip)
    batch, length, heads, head_dim = x.shape
    if cu_seqlens is not None:
        _check_offsets(cu_seqlens, batch, length)
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is not None and initial_state.shape != (sequences, heads, head_dim):
        wanted = (sequences, heads, head_dim)
        raise ValueError(f"initial_state must be {wanted} for this x, not {tuple(initial_state.shape)}")


def _check_parameters(x: Tensor, alpha: Tensor, decay: Tensor, skip: Tensor | None) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x must be floating-point, not {x.dtype}")
    *steps, heads, head_dim = x.shape
    for name, value in (("alpha", alpha), ("decay", decay)):
        if value.shape not in ((heads,), (*steps, heads)):
            wanted = f"({heads},) or {(*steps, heads)}"
            raise ValueError(f"{name} must be {wanted} for this x, not {tuple(value.shape)}")
    if skip is not None and skip.shape != (heads, head_dim):
        raise ValueError(f"skip must be {(heads, head_dim)} for this x, not {tuple(skip.shape)}")


def _check_offsets(cu_seqlens: Tensor, batch: int, length: int) -> None:
    if batch != 1:
        raise ValueError(f"with cu_seqlens x must have batch 1, its sequences end to end, not batch {batch}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() == 0 or cu_seqlens.is_floating_point():
        raise ValueError("cu_seqlens must be integer offsets, (sequences + 1,)")
    # Offsets on an accelerator are not checked: reading them would synchronise at every call.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != length or offsets != sorted(offsets):
            raise ValueError(f"cu_seqlens must rise from 0 to the length {length}, not {offsets}")
