"""The definition of the operator: a plain loop over time, for any float type and any order of derivative."""

from __future__ import annotations

import torch
from torch import Tensor

from mhesa.ops.plain import as_scan


@as_scan
def scan(x: Tensor, alpha: Tensor, decay: Tensor, initial_state: Tensor | None) -> Tensor:
    """See `mhesa.ops.exponential_smoothing`."""
    batch, length, heads, head_dim = x.shape
    state = x.new_zeros(batch, heads, head_dim) if initial_state is None else initial_state
    alphas, decays = (
        [rate[:, None]] * length if rate.ndim == 1 else rate[..., None].unbind(1) for rate in (alpha, decay)
    )
    states = []
    for value, a, d in zip(x.unbind(1), alphas, decays, strict=True):
        state = d * state + a * value
        states.append(state)
    return torch.stack(states, dim=1)
