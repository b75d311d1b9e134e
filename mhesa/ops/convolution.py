"""Short causal depthwise convolution: each channel mixes its last few values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from mhesa.ops.backends import BACKENDS
from mhesa.ops.checks import check_convolution, check_input, count_sequences
from mhesa.ops.context_parallel import ContextParallel, receive_values, zero_continued
from mhesa.ops.registration import apply, is_plain_eager
from mhesa.ops.smoothing import accumulation_dtype, cast


def causal_convolution(
    x: Tensor,
    weight: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    context_parallel: ContextParallel | None = None,
) -> tuple[Tensor, Tensor]:
    """`y[t] = sum over j of weight[j] * x[t - j]`, each channel by itself.

    Args:
        x: `(batch, length, dim)`, any floating-point type; sums are fp32 (fp64 for fp64 `x`).
        weight: `(taps, dim)`; `weight[0]` multiplies the current value.
        initial_state: the values before the first, oldest first: `(batch, taps - 1, dim)`, or
            `(sequences, taps - 1, dim)` with `cu_seqlens`; zeros if omitted.
        cu_seqlens: `(sequences + 1,)` integers, offsets of sequences packed into a batch of 1; no value
            passes from one sequence to the next.
        backend: the layer's smoothing backend. Only `"numba"` and `None` use the CPU kernel.
        context_parallel: the processes that each sequence lies over, as for
            `mhesa.ops.exponential_smoothing`.

    Returns:
        `y`, of the shape and type of `x`, and the last `taps - 1` values of each sequence in fp32 (fp64 for
        fp64 `x`), shaped as `initial_state`.

    Raises:
        InputError: types, devices or shapes that do not fit, or offsets that do not cover `x`.

    >>> y, state = causal_convolution(torch.tensor([[[1.0], [2.0], [4.0]]]), torch.tensor([[1.0], [0.5]]))
    >>> y.flatten().tolist(), state.flatten().tolist()
    ([1.0, 2.5, 5.0], [4.0])
    """
    check_convolution(x, weight, initial_state, cu_seqlens)
    dtype = accumulation_dtype(x.dtype)
    if initial_state is None:
        sequences = count_sequences(x, cu_seqlens)
        initial_state = x.new_zeros(sequences, len(weight) - 1, x.shape[2], dtype=dtype)
    wide, weight = cast(dtype, "x", x), cast(dtype, "weight", weight)
    initial_state = cast(dtype, "initial_state", initial_state)
    if cu_seqlens is not None:
        # Not as `cast` does it: the kernel reads them, whether they are negated or not.
        cu_seqlens = cu_seqlens.to(x.device, torch.int64).resolve_neg()
    if context_parallel is not None:
        context_parallel.check(packed=cu_seqlens is not None, reverse=False)
        initial_state = zero_continued(context_parallel, initial_state)
        if len(weight) > 1:
            values = _last_values(wide, initial_state, cu_seqlens)
            lengths = torch.full((len(x),), x.shape[1]) if cu_seqlens is None else cu_seqlens.diff()
            initial_state = initial_state + receive_values(context_parallel, values, lengths.to(x.device))
    native = backend in (None, "numba") and is_plain_eager(wide, weight, initial_state)
    if native and BACKENDS["numba"].serves(x.device):
        y: Tensor = apply(_Convolution, wide, weight, initial_state, cu_seqlens)
    else:
        y = _convolve(wide, weight, initial_state, cu_seqlens)
    return y.to(x.dtype), _last_values(wide, initial_state, cu_seqlens)


def causal_convolution_step(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One step of `causal_convolution`.

    Args:
        x: `(batch, dim)`.
        weight: `(taps, dim)`.
        state: `(batch, taps - 1, dim)`; it is not changed.

    Returns:
        `y`, of the shape and type of `x`, and the new state.

    Raises:
        InputError: types, devices or shapes that do not fit.
    """
    check_input(x, "batch", "dim")
    y, state = causal_convolution(x[:, None], weight, initial_state=state)
    return y[:, 0], state


def _convolve(x: Tensor, weight: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The convolution in plain torch: the state in front of each sequence, then shifted sums."""
    tail = len(weight) - 1
    if cu_seqlens is None:
        extended, length = torch.cat([initial_state, x], dim=1), x.shape[1]
        shifted = [extended[:, tail - tap : tail - tap + length] for tap in range(tail + 1)]
    else:
        rows, states = _extended_rows(x, tail, cu_seqlens)
        extended = x.new_zeros(x.shape[1] + states.numel(), x.shape[2])
        extended = extended.index_copy(0, states.flatten(), initial_state.flatten(0, 1))
        extended = extended.index_copy(0, rows, x[0])
        shifted = [extended[rows - tap][None] for tap in range(tail + 1)]
    y = weight[0] * shifted[0]
    for tap in range(1, tail + 1):
        y = y + weight[tap] * shifted[tap]
    return y


def _extended_rows(x: Tensor, tail: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Where rows and states of packed sequences are once each sequence has its state in front.

    Returns `(length,)` for the rows and `(sequences, tail)` for the states.
    """
    rows = torch.arange(x.shape[1], device=x.device)
    sequence = torch.searchsorted(cu_seqlens, rows, right=True) - 1
    starts = cu_seqlens[:-1] + tail * torch.arange(len(cu_seqlens) - 1, device=x.device)
    return rows + tail * (sequence + 1), starts[:, None] + torch.arange(tail, device=x.device)


def _last_values(x: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The last values of each sequence, with those of the initial state where it is shorter."""
    tail = initial_state.shape[1]
    if cu_seqlens is None:
        return torch.cat([initial_state, x[:, -tail:] if tail else x[:, :0]], dim=1)[:, -tail or None :]
    before = torch.arange(-tail, 0, device=x.device)
    rows = cu_seqlens[1:, None] + before
    # Counted from the sequence's first row; below zero it is the state's, from its end.
    within = rows - cu_seqlens[:-1, None]
    sequence = torch.arange(len(initial_state), device=x.device)[:, None]
    state = initial_state[sequence, (within + tail).clamp(0, max(tail - 1, 0))] if tail else initial_state
    found = x[0, rows.clamp(min=0)] if x.shape[1] else torch.zeros_like(state)
    return torch.where(within[..., None] >= 0, found, state)


def _state_gradient(dy: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The gradient of the initial state, `(sequences, taps - 1, dim)`; a sequence's first rows read it."""
    tail = len(weight) - 1
    if cu_seqlens is None:
        first = F.pad(dy[:, :tail], (0, 0, 0, max(tail - dy.shape[1], 0)))
    else:
        rows = cu_seqlens[:-1, None] + torch.arange(tail)
        inside = rows < cu_seqlens[1:, None]
        first = dy.new_zeros(*rows.shape, dy.shape[2])
        first[inside] = dy[0, rows[inside]]
    gradient = torch.zeros_like(first)
    for tap in range(1, tail + 1):
        gradient[:, tail - tap :] += weight[tap] * first[:, :tap]
    return gradient


class _Convolution(Function):
    """The convolution by its kernels on CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Call the kernel."""
        from mhesa.ops.cpu import convolution_kernels

        ctx.save_for_backward(x, weight, state, cu_seqlens)
        return convolution_kernels.forward(x, weight, state, cu_seqlens)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Call the kernel, unless the gradient is to be differentiated in turn."""
        x, weight, state, cu_seqlens = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain_eager(dy):
            with torch.enable_grad():
                y = _convolve(x, weight, state, cu_seqlens)
            inputs = (x, weight, state)
            wanted = [tensor for tensor in inputs if tensor.requires_grad]
            found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            return *(next(found) if tensor.requires_grad else None for tensor in inputs), None
        from mhesa.ops.cpu import convolution_kernels

        dx, dweight = convolution_kernels.backward(dy, x, weight, state, cu_seqlens)
        dstate = _state_gradient(dy, weight, cu_seqlens) if ctx.needs_input_grad[2] else None
        return dx, dweight, dstate, None
