"""The scan at rates of every step on a GPU: plans and launches `mhesa.ops.triton.rates_kernels`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mhesa.ops.registration import Gradients
from mhesa.ops.triton import launching
from mhesa.ops.triton import rates_kernels as kernels

BLOCK = 32
"""Channels per program, a power of two."""

SPANS_LOG = 5
"""Spans per tile, as a logarithm to base 2."""

ROWS_LOG = {2: 1, 4: 2, 8: 1}
"""Rows per span, as a logarithm to base 2, by the bytes of a value: as many as fit into registers. A
thread loads 16 bytes at a time, so it holds more of two-byte values. With packing there are half as many."""

CHAIN_BLOCK = 32
"""Channels per program of the chain kernel."""


class _Plan(NamedTuple):
    """How a scan is cut into tiles and programs, and the constants of its kernels."""

    tiles: int
    tiles_a_program: int
    programs: int
    blocks: int
    parts: int
    whole: bool
    constants: dict[str, int | bool]


def _plan(x: Tensor, packed: bool, reverse: bool) -> _Plan:
    launching.check_dtype(x.dtype)
    batch, length, heads, head_dim = x.shape
    rows_log = max(ROWS_LOG[x.element_size()] - packed, 0)
    tiles = triton.cdiv(length, 1 << (rows_log + SPANS_LOG))
    dims = min(triton.next_power_of_2(head_dim), BLOCK)
    parts = triton.cdiv(head_dim, dims)
    blocks = triton.cdiv(heads, BLOCK // dims) * parts
    processors = launching.processors(x.device)
    # One program per multiprocessor keeps enough loads in flight; three kernels read the input twice.
    whole = tiles == 1 or batch * blocks >= processors
    # Once all multiprocessors are busy, more tiles per program leave fewer partial sums.
    run = min(max(batch * blocks * tiles // (16 * processors), 1), 8)
    tiles_a_program = tiles if whole else run
    constants = {
        "HEADS": BLOCK // dims,
        "DIMS": dims,
        "ROWS_LOG": rows_log,
        "SPANS_LOG": SPANS_LOG,
        "REVERSE": reverse,
        "num_warps": 8,
        # Triton's default varies by version.
        "enable_fp_fusion": True,
    }
    programs = batch * triton.cdiv(tiles, tiles_a_program)
    return _Plan(tiles, tiles_a_program, programs, blocks, parts, whole, constants)


def forward(
    x: Tensor,
    alpha: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, states)` as `StepKernels` describes them; states `(batch, tiles, channels)`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final_state, states = _scan(x, y, alpha, decay, skip, initial_state, cu_seqlens, reverse)
    return y, final_state, states


def _scan(
    x: Tensor,
    y: Tensor | None,
    alpha: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Write the outputs to `y`, if there is one; returns the final state and those at the tiles' starts."""
    batch, length, heads, head_dim = x.shape
    x, skip, initial_state = launching.strided(x), launching.dense(skip), launching.dense(initial_state)
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    shape = (sequences, heads, head_dim)
    if x.numel() == 0 or cu_seqlens is not None:
        # The kernel does not visit empty sequences.
        final_state = alpha.new_zeros(shape) if initial_state is None else initial_state.clone()
    else:
        final_state = alpha.new_empty(shape)
    if x.numel() == 0:
        return final_state, alpha.new_empty(0)

    plan = _plan(x, cu_seqlens is not None, reverse)
    channels = heads * head_dim
    sequence_of = launching.sequence_of(cu_seqlens, x)
    states = alpha.new_empty(batch, plan.tiles, channels)

    def launch(y: Tensor | None, ends: Tensor | None) -> None:
        kernels.forward[(plan.programs * plan.blocks,)](
            x,
            y,
            final_state,
            states,
            ends,
            alpha,
            decay,
            skip,
            initial_state,
            sequence_of,
            x.stride(0),
            x.stride(1),
            *alpha.stride(),
            *decay.stride(),
            length,
            heads,
            head_dim,
            plan.tiles,
            plan.tiles_a_program,
            WHOLE=plan.whole,
            **plan.constants,
        )

    with launching.current(x.device):
        if not plan.whole:
            ends = alpha.new_empty(2, batch, plan.tiles, channels)
            launch(None, ends)
            _launch_chain(plan, ends, states, initial_state, sequence_of, length, backward=False)
        launch(y, None)
    return final_state, states


def backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    alpha: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    states: Tensor | None,
) -> Gradients:
    """`(dx, dalpha, ddecay, dskip, dinitial)`; `dskip` is zero if there is no `skip`."""
    batch, length, heads, head_dim = x.shape
    if states is None:
        _, states = _scan(x, None, alpha, decay, skip, initial_state, cu_seqlens, reverse)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        zero = alpha.new_zeros(batch, length, heads)
        # Without a step the final state is the initial state, and so are their gradients.
        return dx, zero, zero.clone(), alpha.new_zeros(heads, head_dim), dfinal.clone()

    x, dy, dfinal = launching.strided(x), launching.strided(dy), dfinal.contiguous()
    skip, initial_state = launching.dense(skip), launching.dense(initial_state)
    plan = _plan(x, cu_seqlens is not None, reverse)
    channels = heads * head_dim
    sequence_of = launching.sequence_of(cu_seqlens, x)
    dinitial = torch.empty_like(dfinal) if cu_seqlens is None else dfinal.clone()
    dalpha, ddecay = (alpha.new_empty(plan.parts, batch, length, heads) for _ in range(2))
    partials = None if skip is None else alpha.new_empty(plan.programs, channels)

    def launch(ends: Tensor | None, carries: Tensor | None) -> None:
        kernels.backward[(plan.programs * plan.blocks,)](
            dy,
            x,
            dx,
            dalpha,
            ddecay,
            partials,
            dinitial,
            states,
            ends,
            carries,
            dfinal,
            alpha,
            decay,
            skip,
            initial_state,
            sequence_of,
            dy.stride(0),
            dy.stride(1),
            x.stride(0),
            x.stride(1),
            *alpha.stride(),
            *decay.stride(),
            length,
            heads,
            head_dim,
            plan.tiles,
            plan.tiles_a_program,
            **plan.constants,
        )

    carries = None
    with launching.current(x.device):
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
    plan: _Plan,
    ends: Tensor,
    entering: Tensor,
    initial: Tensor | None,
    sequence_of: Tensor | None,
    length: int,
    *,
    backward: bool,
) -> None:
    batch, tiles, channels = entering.shape
    constants: dict[str, Any] = {name: plan.constants[name] for name in ("REVERSE", "enable_fp_fusion")}
    kernels.chain[(batch * triton.cdiv(channels, CHAIN_BLOCK),)](
        ends,
        entering,
        initial,
        sequence_of,
        length,
        channels,
        tiles,
        BLOCK=CHAIN_BLOCK,
        TILE=1 << (plan.constants["ROWS_LOG"] + plan.constants["SPANS_LOG"]),
        AHEAD=launching.AHEAD,
        BACKWARD=backward,
        num_warps=1,
        **constants,
    )
