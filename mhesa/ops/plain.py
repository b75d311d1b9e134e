"""What the backends in plain torch share: direction, skip, types and packed sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from mhesa.ops.backends import Scan

Smooth = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def as_scan(smooth: Smooth, *, fixed_rates: bool = False) -> Scan:
    """Make a backend's scan of a function that smooths whole sequences forward in time.

    Args:
        smooth: `(x, alpha, decay, initial_state) -> h`, the state after each step, `(batch, length, heads,
            head_dim)`; called with values in the accumulation type.
        fixed_rates: whether it takes rates `(heads,)` only.
    """

    def dense(
        x: Tensor,
        alpha: Tensor,
        decay: Tensor,
        skip: Tensor | None,
        initial_state: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        if x.numel() == 0:
            zeros = alpha.new_zeros(x.shape[0], *x.shape[2:])
            return x.clone(), zeros if initial_state is None else initial_state.clone()
        wide = x.to(alpha.dtype)
        if reverse:
            wide = wide.flip(1)
            alpha, decay = (rate if rate.ndim == 1 else rate.flip(1) for rate in (alpha, decay))
        h = smooth(wide, alpha, decay, initial_state)
        y = h if skip is None else h + skip * wide
        return (y.flip(1) if reverse else y).to(x.dtype), h[:, -1].clone()

    @wraps(smooth)
    def scan(
        x: Tensor,
        alpha: Tensor,
        decay: Tensor,
        skip: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        if cu_seqlens is None:
            return dense(x, alpha, decay, skip, initial_state, reverse)
        if torch.compiler.is_compiling() and not fixed_rates and x.numel():
            return _scan_as_one(smooth, x, alpha, decay, skip, initial_state, cu_seqlens, reverse)
        # One call per packed sequence, so that no value passes from one to the next.
        lengths = cu_seqlens.diff().tolist()
        if not lengths:
            return x.clone(), alpha.new_empty(0, *x.shape[2:])
        states = [None] * len(lengths) if initial_state is None else initial_state.split(1)
        alphas, decays = (
            [rate] * len(lengths) if rate.ndim == 1 else rate.split(lengths, dim=1) for rate in (alpha, decay)
        )
        pieces = zip(x.split(lengths, dim=1), alphas, decays, states, strict=True)
        results = [dense(piece, a, d, skip, state, reverse) for piece, a, d, state in pieces]
        return torch.cat([y for y, _ in results], dim=1), torch.cat([final for _, final in results])

    return scan


def _scan_as_one(
    smooth: Smooth,
    x: Tensor,
    alpha: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Packed sequences as a single one, in which no shape depends on the offsets, as compilers need it.

    The decay into a sequence's first step is 0, and the sequence's initial state is added there.
    """
    length = x.shape[1]
    wide = x.to(alpha.dtype)
    alpha, decay = (rate.expand(1, length, x.shape[2]) for rate in (alpha, decay))
    if initial_state is None:
        initial_state = wide.new_zeros(len(cu_seqlens) - 1, *x.shape[2:])
    if reverse:
        wide, alpha, decay = wide.flip(1), alpha.flip(1), decay.flip(1)
        cu_seqlens, initial_state = length - cu_seqlens.flip(0), initial_state.flip(0)
    rows = torch.arange(length, device=x.device)
    sequence = torch.searchsorted(cu_seqlens, rows, right=True) - 1
    first = (cu_seqlens[sequence] == rows)[:, None]
    entering = (decay * first)[..., None] * initial_state[sequence]
    h = smooth(alpha[..., None] * wide + entering, torch.ones_like(alpha), decay * ~first, None)
    y = h if skip is None else h + skip * wide
    is_empty = (cu_seqlens.diff() == 0)[:, None, None]
    final = torch.where(is_empty, initial_state, h[0, (cu_seqlens[1:] - 1).clamp(min=0)])
    return (y.flip(1) if reverse else y).to(x.dtype), final.flip(0) if reverse else final
