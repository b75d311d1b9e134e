"""Packed sequences for backends that scan a plain batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from mhesa.ops.backends import Scan

DenseScan = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, bool], tuple[Tensor, Tensor]]


def per_sequence(scan: DenseScan) -> Scan:
    """Add `cu_seqlens` to a scan over a batch: one call per packed sequence, so that nothing leaks."""

    @wraps(scan)
    def packed(
        x: Tensor,
        alpha: Tensor,
        decay: Tensor,
        skip: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        if cu_seqlens is None:
            return scan(x, alpha, decay, skip, initial_state, reverse)
        lengths = cu_seqlens.diff().tolist()
        pieces = x.split(lengths, dim=1)
        if not pieces:
            return x.clone(), alpha.new_empty(0, *x.shape[2:])
        states = [None] * len(pieces) if initial_state is None else initial_state.split(1)
        alphas, decays = (
            [rate] * len(pieces) if rate.ndim == 1 else rate.split(lengths, dim=1) for rate in (alpha, decay)
        )
        outputs, finals = zip(
            *(
                scan(piece, a, d, skip, state, reverse)
                for piece, a, d, state in zip(pieces, alphas, decays, states, strict=True)
            ),
            strict=True,
        )
        return torch.cat(outputs, dim=1), torch.cat(finals)

    return packed
