"""The scan on a GPU: plans and launches the kernels of `mhesa.ops.triton.kernels`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mhesa.ops.backends import Inputs
from mhesa.ops.registration import Gradients
from mhesa.ops.triton import kernels, launching

# Channels per program: 64 bytes of bf16, the smallest access to DRAM.
BLOCK = 32
# Spans per tile, as a logarithm to base 2.
SPANS_LOG = 5
# Rows per span, as a logarithm to base 2, by the bytes of a value: as many as fit into registers.
FORWARD_ROWS_LOG = {2: 3, 4: 2, 8: 2}
BACKWARD_ROWS_LOG = {2: 2, 4: 2, 8: 1}


def _plan(x: Tensor, rows_logs: dict[int, int], packed: bool, reverse: bool) -> launching.Plan:
    _, _, heads, head_dim = x.shape
    lanes = 1 if head_dim % BLOCK == 0 else BLOCK
    # With four warps a thread holds 8 values of a row: one 16-byte load of two-byte values. Wider values,
    # a decay per channel and packing need the registers of eight warps.
    warps = 4 if x.element_size() == 2 and lanes == 1 and not packed else 8
    return launching.plan(
        x,
        blocks=triton.cdiv(heads * head_dim, BLOCK),
        rows_log=rows_logs[x.element_size()],
        spans_log=SPANS_LOG,
        reverse=reverse,
        LANES=lanes,
        BLOCK=BLOCK,
        num_warps=warps,
    )


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """`(y, final_state)`, for plain tensors as `mhesa.ops.registration.make_scan` describes them."""
    inputs = launching.kernel_inputs(inputs)
    x, alpha, decay, skip, initial_state, cu_seqlens, reverse = inputs
    batch, length, heads, head_dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final_state = launching.new_final_state(inputs)
    if x.numel() == 0:
        return y, final_state

    channels = heads * head_dim
    plan = _plan(x, FORWARD_ROWS_LOG, cu_seqlens is not None, reverse)
    sequence_of = launching.sequence_of(cu_seqlens, x)
    carries = None if plan.whole else alpha.new_empty(batch, plan.tiles, channels)
    parameters = alpha, decay, skip, initial_state, sequence_of
    sizes = *x.stride()[:2], length, channels, head_dim, plan.tiles, plan.tiles_per_program

    def launch(*outputs: Tensor | None) -> None:
        kernels.forward[plan.grid](x, *outputs, carries, *parameters, *sizes, **plan.constants)

    with launching.on_device(x.device):
        if carries is not None:
            launch(None, None)
            _launch_chain(plan, carries, initial_state, decay, sequence_of, x)
        launch(y, final_state)
    return y, final_state


def backward(dy: Tensor, dfinal: Tensor, inputs: Inputs) -> Gradients:
    """`(dx, dalpha, ddecay, dskip, dinitial)`; `dskip` is zero if there is no `skip`."""
    if inputs.x.numel() == 0:
        return launching.gradients_of_nothing(dfinal, inputs)
    x, alpha, decay, skip, initial_state, cu_seqlens, reverse = launching.kernel_inputs(inputs)
    dy, dfinal = launching.contiguous_steps(dy), dfinal.contiguous()
    batch, length, heads, head_dim = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    channels = heads * head_dim
    plan = _plan(x, BACKWARD_ROWS_LOG, cu_seqlens is not None, not reverse)
    sequence_of = launching.sequence_of(cu_seqlens, x)
    dinitial = torch.empty_like(dfinal) if cu_seqlens is None else dfinal.clone()
    carries = None if plan.whole else alpha.new_empty(2, batch, plan.tiles, channels)
    partials = alpha.new_empty(2 if skip is None else 3, plan.programs, channels)
    parameters = alpha, decay, skip, initial_state, sequence_of
    strides = *dy.stride()[:2], *x.stride()[:2]
    sizes = length, channels, head_dim, plan.tiles, plan.tiles_per_program

    def launch(*tensors: Tensor | None) -> None:
        kernels.backward[plan.grid](
            dy, *tensors, carries, dfinal, *parameters, *strides, *sizes, **plan.constants
        )

    with launching.on_device(x.device):
        if carries is not None:
            launch(None, None, None, None)
            _launch_chain(plan, carries, dfinal, decay, sequence_of, x)
        launch(x, dx, dinitial, partials)
    sums = partials.sum(1, dtype=torch.float64).unflatten(1, (heads, head_dim))
    dalpha, ddecay = sums[:2].sum(2).to(alpha.dtype)
    dskip = alpha.new_zeros(heads, head_dim) if skip is None else sums[2].to(alpha.dtype)
    # Outputs of a custom operator must not share memory.
    return dx, dalpha, ddecay.clone(), dskip, dinitial


def _launch_chain(
    plan: launching.Plan,
    carries: Tensor,
    initial: Tensor | None,
    decay: Tensor,
    sequence_of: Tensor | None,
    x: Tensor,
) -> None:
    batch, length, heads, head_dim = x.shape
    sizes = length, heads * head_dim, head_dim, plan.tiles
    constants = plan.constants | {"AHEAD": launching.AHEAD, "PAIR": carries.ndim == 4, "num_warps": 1}
    kernels.chain[(batch * plan.blocks,)](carries, initial, decay, sequence_of, *sizes, **constants)
