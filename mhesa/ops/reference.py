"""The definition of the operator: a plain loop over time, for any float type and any order of derivative."""

from __future__ import annotations

import torch
from torch import Tensor

from mhesa.ops.packing import per_sequence


@per_sequence
def scan(
    x: Tensor,
    alpha: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """See `mhesa.ops.exponential_smoothing`."""
    batch, length, heads, head_dim = x.shape
    wide = x.to(alpha.dtype)
    state = alpha.new_zeros(batch, heads, head_dim) if initial_state is None else initial_state
    alphas, decays = (
        [rate[:, None]] * length if rate.ndim == 1 else rate[..., None].unbind(1) for rate in (alpha, decay)
    )
    steps = list(zip(wide.unbind(1), alphas, decays, strict=True))
    outputs = []
    for value, a, d in reversed(steps) if reverse else steps:
        state = d * state + a * value
        outputs.append(state if skip is None else state + skip * value)
    if not outputs:
        return x.clone(), state.clone()
    return torch.stack(outputs[::-1] if reverse else outputs, dim=1).to(x.dtype), state
