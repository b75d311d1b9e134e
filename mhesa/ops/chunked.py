"""The scan in plain torch, for any device: in parallel over chunks, with a carry between chunks.

The carry from chunk to chunk is the same recurrence over the chunks' end states, with the product of a
chunk's decays as its decay. The same function computes it, recursively, on ever shorter sequences. Decays are
multiplied and never divided by, so those near 0 and near 1 stay finite at any length.

Within a chunk a fixed decay takes one triangular matrix product of its powers; decays of every step take a
loop over the chunk's rows, each step for all chunks at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from mhesa.ops.plain import as_scan, powers_of

# Rows of a chunk at a fixed decay.
CHUNK = 64
# Rows of a chunk with decays of every step.
STEPS = 16


@as_scan
def scan(x: Tensor, alpha: Tensor, decay: Tensor, initial_state: Tensor | None) -> Tensor:
    """See `mhesa.ops.exponential_smoothing`."""
    batch, _, heads, head_dim = x.shape
    state = x.new_zeros(batch, heads, head_dim) if initial_state is None else initial_state
    # Powers in fp32 would lose three digits by the end of a chunk. Apple's GPUs have no fp64.
    precise = decay if x.device.type == "mps" else decay.double()
    if decay.ndim == 3:
        return _smooth_steps(alpha[..., None] * x, precise[..., None], state)
    weights = (
        alpha[:, None, None] if alpha.ndim == 1 else alpha.permute(2, 1, 0).repeat_interleave(head_dim, dim=2)
    )
    columns = weights * x.permute(2, 1, 0, 3).flatten(2)
    h = _smooth(columns, precise, state.permute(1, 0, 2).reshape(heads, 1, -1))
    return h.unflatten(2, (batch, head_dim)).permute(2, 1, 0, 3)


def _smooth(x: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    """`h[t] = decay * h[t-1] + x[t]` over `x` of `(heads, length, columns)`, from `(heads, 1, columns)`."""
    length = x.shape[1]
    chunk = min(CHUNK, length)
    powers = powers_of(decay, chunk)
    lag = torch.arange(chunk, device=x.device)
    lag = lag[:, None] - lag
    kernel = powers[:, lag.clamp(min=0)].tril().to(x.dtype)
    chunks = F.pad(x, (0, 0, 0, -length % chunk)).unflatten(1, (-1, chunk))
    local = kernel[:, None] @ chunks
    if length > chunk:
        ends = local[:, :-1, -1]
        entering = torch.cat([state, _smooth(ends, powers[:, -1], state)], dim=1)
    else:
        entering = state
    h = local + powers[:, None, 1:, None].to(x.dtype) * entering[:, :, None]
    return h.flatten(1, 2)[:, :length]


def _smooth_steps(x: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    """`h[t] = decay[t] * h[t-1] + x[t]` over `x` of `(batch, length, heads, head_dim)`.

    `decay` is `(batch, length, heads, 1)`, `state` `(batch, heads, head_dim)`.
    """
    length = x.shape[1]
    if length <= STEPS:
        return torch.stack(_states(x.unbind(1), decay.unbind(1), state), dim=1)
    padding = 0, 0, 0, 0, 0, -length % STEPS
    rows, decays = (F.pad(value, padding).unflatten(1, (-1, STEPS)).unbind(2) for value in (x, decay))
    ends = _states(rows, decays, torch.zeros_like(rows[0]))[-1]
    whole = reduce(torch.mul, decays)
    entering = torch.cat([state[:, None], _smooth_steps(ends[:, :-1], whole[:, :-1], state)], dim=1)
    return torch.stack(_states(rows, decays, entering), dim=2).flatten(1, 2)[:, :length]


def _states(rows: Sequence[Tensor], decays: Sequence[Tensor], state: Tensor) -> list[Tensor]:
    """The state after each row."""
    states = []
    for row, decay in zip(rows, decays, strict=True):
        state = decay.to(row.dtype) * state + row
        states.append(state)
    return states
