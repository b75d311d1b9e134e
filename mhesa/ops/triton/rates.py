"""The scan at rates of every step on a GPU: plans and launches `mhesa.ops.triton.rates_kernels`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mhesa.ops.backends import Inputs
from mhesa.ops.registration import Gradients
from mhesa.ops.triton import launching
from mhesa.ops.triton import rates_kernels as kernels

# Channels per program, a power of two.
BLOCK = 32
# Spans per tile, as a logarithm to base 2.
SPANS_LOG = 5
# Rows per span, as a logarithm to base 2, by the bytes of a value: as many as fit into registers. A thread
# loads 16 bytes at a time, so it holds more of two-byte values. With packing there are half as many.
ROWS_LOG = {2: 1, 4: 2, 8: 1}
# Channels per program of the chain kernel.
CHAIN_BLOCK = 32


def _plan(x: Tensor, packed: bool, reverse: bool) -> launching.Plan:
    _, _, heads, head_dim = x.shape
    dims = min(triton.next_power_of_2(head_dim), BLOCK)
    return launching.plan(
        x,
        blocks=triton.cdiv(heads, BLOCK // dims) * triton.cdiv(head_dim, dims),
        rows_log=max(ROWS_LOG[x.element_size()] - packed, 0),
        spans_log=SPANS_LOG,
        reverse=reverse,
        HEADS=BLOCK // dims,
        DIMS=dims,
        num_warps=8,
    )


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, states)` as `StepKernels` describes them; states `(batch, tiles, channels)`."""
    y = torch.empty(inputs.x.shape, dtype=inputs.x.dtype, device=inputs.x.device)
    return y, *_scan(launching.kernel_inputs(inputs), y)


def _scan(inputs: Inputs, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Write the outputs to `y`, if there is one; returns the final state and those at the tiles' starts."""
    x, alpha, decay, skip, initial_state, cu_seqlens, reverse = inputs
    batch, length, heads, head_dim = x.shape
    final_state = launching.new_final_state(inputs)
    if x.numel() == 0:
        return final_state, alpha.new_empty(0)

    plan = _plan(x, cu_seqlens is not None, reverse)
    channels = heads * head_dim
    sequence_of = launching.sequence_of(cu_seqlens, x)
    states = alpha.new_empty(batch, plan.tiles, channels)
    parameters = alpha, decay, skip, initial_state, sequence_of
    strides = *x.stride()[:2], *alpha.stride(), *decay.stride()
    sizes = length, heads, head_dim, plan.tiles, plan.tiles_per_program
    constants = plan.constants | {"WHOLE": plan.whole}

    def launch(y: Tensor | None, ends: Tensor | None) -> None:
        kernels.forward[plan.grid](
            x, y, final_state, states, ends, *parameters, *strides, *sizes, **constants
        )

    with launching.on_device(x.device):
        if not plan.whole:
            ends = alpha.new_empty(2, batch, plan.tiles, channels)
            launch(None, ends)
            _launch_chain(plan, ends, states, initial_state, sequence_of, length, backward=False)
        launch(y, None)
    return final_state, states


def backward(dy: Tensor, dfinal: Tensor, inputs: Inputs, states: Tensor | None) -> Gradients:
    """`(dx, dalpha, ddecay, dskip, dinitial)`; `dskip` is zero if there is no `skip`."""
    if inputs.x.numel() == 0:
        return launching.gradients_of_nothing(dfinal, inputs)
    inputs = launching.kernel_inputs(inputs)
    x, alpha, decay, skip, initial_state, cu_seqlens, reverse = inputs
    dy, dfinal = launching.contiguous_steps(dy), dfinal.contiguous()
    batch, length, heads, head_dim = x.shape
    if states is None:
        _, states = _scan(inputs, None)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    plan = _plan(x, cu_seqlens is not None, reverse)
    channels = heads * head_dim
    sequence_of = launching.sequence_of(cu_seqlens, x)
    dinitial = torch.empty_like(dfinal) if cu_seqlens is None else dfinal.clone()
    parts = triton.cdiv(head_dim, plan.constants["DIMS"])
    dalpha, ddecay = (alpha.new_empty(parts, batch, length, heads) for _ in range(2))
    partials = None if skip is None else alpha.new_empty(plan.programs, channels)
    gradients = dx, dalpha, ddecay, partials, dinitial
    parameters = alpha, decay, skip, initial_state, sequence_of
    strides = *dy.stride()[:2], *x.stride()[:2], *alpha.stride(), *decay.stride()
    sizes = length, heads, head_dim, plan.tiles, plan.tiles_per_program

    def launch(ends: Tensor | None, carries: Tensor | None) -> None:
        entering = states, ends, carries, dfinal
        kernels.backward[plan.grid](
            dy, x, *gradients, *entering, *parameters, *strides, *sizes, **plan.constants
        )

    carries = None
    with launching.on_device(x.device):
        if not plan.whole:
            ends = alpha.new_empty(2, batch, plan.tiles, channels)
            carries = torch.empty_like(states)
            launch(ends, None)
            _launch_chain(plan, ends, carries, dfinal, sequence_of, length, backward=True)
        launch(None, carries)
    dskip = alpha.new_zeros(heads, head_dim)
    if partials is not None:
        dskip.copy_(partials.sum(0, dtype=torch.float64).view_as(dskip))
    return dx, _sum_parts(dalpha), _sum_parts(ddecay), dskip, dinitial


def _sum_parts(gradient: Tensor) -> Tensor:
    """The sum over the parts of a head."""
    if gradient.shape[0] == 1:
        return gradient[0]
    return gradient.sum(0, dtype=torch.float64).to(gradient.dtype)


def _launch_chain(
    plan: launching.Plan,
    ends: Tensor,
    entering: Tensor,
    initial: Tensor | None,
    sequence_of: Tensor | None,
    length: int,
    *,
    backward: bool,
) -> None:
    batch, tiles, channels = entering.shape
    arguments = ends, entering, initial, sequence_of, length, channels, tiles
    kernels.chain[(batch * triton.cdiv(channels, CHAIN_BLOCK),)](
        *arguments,
        BLOCK=CHAIN_BLOCK,
        TILE=1 << (plan.constants["ROWS_LOG"] + plan.constants["SPANS_LOG"]),
        AHEAD=launching.AHEAD,
        BACKWARD=backward,
        REVERSE=plan.constants["REVERSE"],
        enable_fp_fusion=plan.constants["enable_fp_fusion"],
        num_warps=1,
    )
