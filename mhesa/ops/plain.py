"""What the backends in plain torch share: direction, skip, types and packed sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from mhesa.ops.backends import Inputs, Scan

Smooth = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def as_scan(smooth: Smooth, *, fixed_rates: bool = False) -> Scan:
    """Make a backend's scan of a function that smooths whole sequences forward in time.

    Args:
        smooth: `(x, alpha, decay, initial_state) -> h`, the state after each step, `(batch, length, heads,
            head_dim)`; called with values in the accumulation type.
        fixed_rates: whether it takes rates `(heads,)` only.
    """

    def dense(
        x: Tensor, alpha: Tensor, decay: Tensor, skip: Tensor | None, initial_state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if x.numel() == 0:
            zeros = alpha.new_zeros(x.shape[0], *x.shape[2:])
            return x.clone(), zeros if initial_state is None else initial_state.clone()
        wide = x.to(alpha.dtype)
        h = smooth(wide, alpha, decay, initial_state)
        y = h if skip is None else h + skip * wide
        return y.to(x.dtype), h[:, -1].clone()

    @wraps(smooth)
    def scan(*args: Any) -> tuple[Tensor, Tensor]:
        x, alpha, decay, skip, initial_state, cu_seqlens, reverse = inputs = Inputs(*args)
        if reverse:
            y, final = scan(*_reversed(inputs))
            return y.flip(1), final if cu_seqlens is None else final.flip(0)
        if cu_seqlens is None:
            return dense(x, alpha, decay, skip, initial_state)
        if torch.compiler.is_compiling() and not fixed_rates and x.numel():
            return _scan_as_one(smooth, inputs)
        # One call per packed sequence, so that no value passes from one to the next.
        lengths = cu_seqlens.diff().tolist()
        if not lengths:
            return x.clone(), alpha.new_empty(0, *x.shape[2:])
        states = [None] * len(lengths) if initial_state is None else initial_state.split(1)
        alphas, decays = (
            [rate] * len(lengths) if rate.ndim == 1 else rate.split(lengths, dim=1) for rate in (alpha, decay)
        )
        pieces = zip(x.split(lengths, dim=1), alphas, decays, states, strict=True)
        results = [dense(piece, a, d, skip, state) for piece, a, d, state in pieces]
        return torch.cat([y for y, _ in results], dim=1), torch.cat([final for _, final in results])

    return scan


def powers_of(decay: Tensor, n: int) -> Tensor:
    """`decay ** [0, 1, .., n]` of decays `(heads,)`, as `(heads, n + 1)`."""
    # Power 0 is a constant: differentiating decay ** 0 at decay 0 gives 0 * 0 ** -1, which is NaN.
    positive = decay[:, None] ** torch.arange(1, n + 1, device=decay.device)
    return torch.cat([torch.ones_like(decay)[:, None], positive], dim=1)


def _reversed(inputs: Inputs) -> Inputs:
    """The inputs of the same scan from the first row to the last: all rows in the opposite order."""
    x, alpha, decay, skip, initial_state, cu_seqlens, _ = inputs
    alpha, decay = (rate if rate.ndim == 1 else rate.flip(1) for rate in (alpha, decay))
    if cu_seqlens is not None:
        cu_seqlens = x.shape[1] - cu_seqlens.flip(0)
        initial_state = None if initial_state is None else initial_state.flip(0)
    return Inputs(x.flip(1), alpha, decay, skip, initial_state, cu_seqlens, False)


def _scan_as_one(smooth: Smooth, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Packed sequences as a single one, in which no shape depends on the offsets, as compilers need it.

    The decay into a sequence's first step is 0, and the sequence's initial state is added there.
    """
    x, alpha, decay, skip, initial_state, cu_seqlens, _ = inputs
    assert cu_seqlens is not None
    length = x.shape[1]
    wide = x.to(alpha.dtype)
    alpha, decay = (rate.expand(1, length, x.shape[2]) for rate in (alpha, decay))
    if initial_state is None:
        initial_state = wide.new_zeros(len(cu_seqlens) - 1, *x.shape[2:])
    cu_seqlens = cu_seqlens.to(x.device)
    rows = torch.arange(length, device=x.device)
    sequence = torch.searchsorted(cu_seqlens, rows, right=True) - 1
    first = (cu_seqlens[sequence] == rows)[:, None]
    entering = (decay * first)[..., None] * initial_state[sequence]
    h = smooth(alpha[..., None] * wide + entering, torch.ones_like(alpha), decay * ~first, None)
    y = h if skip is None else h + skip * wide
    is_empty = (cu_seqlens.diff() == 0)[:, None, None]
    final = torch.where(is_empty, initial_state, h[0, (cu_seqlens[1:] - 1).clamp(min=0)])
    return y.to(x.dtype), final
