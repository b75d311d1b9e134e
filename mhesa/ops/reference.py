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
    batch, _, heads, head_dim = x.shape
    alpha, decay = alpha[:, None], decay[:, None]
    wide = x.to(alpha.dtype)
    state = alpha.new_zeros(batch, heads, head_dim) if initial_state is None else initial_state
    outputs = []
    for value in reversed(wide.unbind(1)) if reverse else wide.unbind(1):
        state = decay * state + alpha * value
        outputs.append(state if skip is None else state + skip * value)
    if not outputs:
        return x.clone(), state.clone()
    return torch.stack(outputs[::-1] if reverse else outputs, dim=1).to(x.dtype), state
