"""Short causal depthwise convolution: each channel mixes its last few values."""

from __future__ import annotations

import torch
from torch import Tensor

from mhesa.ops.smoothing import accumulation_dtype


def causal_convolution(
    x: Tensor,
    weight: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`y[t] = sum over j of weight[j] * x[t - j]`, each channel by itself.

    Args:
        x: `(batch, length, dim)`, any floating-point type; sums are fp32 (fp64 for fp64 `x`).
        weight: `(taps, dim)`; `weight[0]` multiplies the current value.
        initial_state: the values before the first, oldest first: `(batch, taps - 1, dim)`, or
            `(sequences, taps - 1, dim)` with `cu_seqlens`; zeros if omitted.
        cu_seqlens: `(sequences + 1,)` integers, offsets of sequences packed into a batch of 1; no value
            passes from one sequence to the next.

    Returns:
        `y`, of the shape and type of `x`, and the last `taps - 1` values of each sequence in fp32 (fp64 for
        fp64 `x`), shaped as `initial_state`.

    Raises:
        ValueError: shapes that do not fit.

    >>> y, state = causal_convolution(torch.tensor([[[1.0], [2.0], [4.0]]]), torch.tensor([[1.0], [0.5]]))
    >>> y.flatten().tolist(), state.flatten().tolist()
    ([1.0, 2.5, 5.0], [4.0])
    """
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[1] != x.shape[2] or not len(weight):
        raise ValueError(
            "x must be (batch, length, dim) and weight (taps, dim), "
            f"not {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    tail = len(weight) - 1
    sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    shape = (sequences, tail, x.shape[2])
    dtype = accumulation_dtype(x.dtype)
    if initial_state is None:
        initial_state = x.new_zeros(shape, dtype=dtype)
    elif initial_state.shape != shape:
        raise ValueError(f"initial_state must be {shape} for this x, not {tuple(initial_state.shape)}")
    wide, weight, initial_state = x.to(dtype), weight.to(dtype), initial_state.to(dtype)
    if cu_seqlens is None:
        y, state = _convolve(torch.cat([initial_state, wide], dim=1), weight)
    else:
        y, state = _convolve_packed(wide, weight, initial_state, cu_seqlens)
    return y.to(x.dtype), state


def causal_convolution_step(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One step of `causal_convolution`.

    Args:
        x: `(batch, dim)`.
        weight: `(taps, dim)`.
        state: `(batch, taps - 1, dim)`; it is not changed.

    Returns:
        `y`, of the shape and type of `x`, and the new state.
    """
    y, state = causal_convolution(x[:, None], weight, initial_state=state)
    return y[:, 0], state


def _convolve(extended: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The convolution of `(batch, taps - 1 + length, dim)`, whose first `taps - 1` rows are the state."""
    tail = len(weight) - 1
    length = extended.shape[1] - tail
    y = weight[0] * extended[:, tail:]
    for tap in range(1, tail + 1):
        y = y + weight[tap] * extended[:, tail - tap : tail - tap + length]
    return y, extended[:, length:]


def _convolve_packed(
    x: Tensor, weight: Tensor, initial_state: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """Likewise for packed sequences: each gets its state in front, and rows are taken from where they are."""
    tail, length = len(weight) - 1, x.shape[1]
    rows, sequences = torch.arange(length, device=x.device), torch.arange(len(initial_state), device=x.device)
    # In the extended rows, sequence s begins `tail * s` rows later, and its values behind its state.
    sequence = torch.searchsorted(cu_seqlens, rows, right=True) - 1
    rows = rows + tail * (sequence + 1)
    before = torch.arange(tail, device=x.device)
    first = (cu_seqlens[:-1] + tail * sequences)[:, None] + before
    last = (cu_seqlens[1:] + tail * sequences)[:, None] + before
    extended = x.new_zeros(length + tail * len(sequences), x.shape[2])
    extended = extended.index_copy(0, rows, x[0]).index_copy(0, first.flatten(), initial_state.flatten(0, 1))
    y = weight[0] * x[0]
    for tap in range(1, tail + 1):
        y = y + weight[tap] * extended[rows - tap]
    return y[None], extended[last]
