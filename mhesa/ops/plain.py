"""What the backends in plain torch share: direction, skip, types and packed sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from mhesa.ops.backends import Scan


def as_scan(smooth: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]) -> Scan:
    """Make a backend's scan of a function that smooths whole sequences forward in time.

    Args:
        smooth: `(x, alpha, decay, initial_state) -> h`, the state after each step, `(batch, length, heads,
            head_dim)`; called with values in the accumulation type.
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
