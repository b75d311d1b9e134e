"""The scan on a GPU: plans and launches the kernels of `mhesa.ops.triton.kernels`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mhesa.ops.triton import kernels, launching

BLOCK = 32
"""Channels per program: 64 bytes of bf16, the smallest access to DRAM."""

SPANS_LOG = 5
"""Spans per tile, as a logarithm to base 2."""

FORWARD_ROWS_LOG = {2: 3, 4: 2, 8: 2}
BACKWARD_ROWS_LOG = {2: 2, 4: 2, 8: 1}
"""Rows per span, as a logarithm to base 2, by the bytes of a value: as many as fit into registers."""


class _Plan(NamedTuple):
    """How a pass over `x` is cut into tiles and programs, and the constants of its kernels."""

    tiles: int
    tiles_a_program: int
    programs: int
    blocks: int
    whole: bool
    constants: dict[str, int | bool]


def _plan(x: Tensor, rows_logs: dict[int, int], packed: bool, reverse: bool) -> _Plan:
    batch, length, heads, head_dim = x.shape
    launching.check_dtype(x.dtype)
    rows_log = rows_logs[x.element_size()]
    tiles = triton.cdiv(length, 1 << (rows_log + SPANS_LOG))
    blocks = triton.cdiv(heads * head_dim, BLOCK)
    processors = launching.processors(x.device)
    # One program per multiprocessor keeps enough loads in flight; three kernels read the input twice.
    whole = tiles == 1 or batch * blocks >= processors
    # Once all multiprocessors are busy, more tiles per program hide latency and leave fewer partial sums.
    run = min(max(batch * blocks * tiles // (16 * processors), 1), 8)
    tiles_a_program = tiles if whole else run
    lanes = 1 if head_dim % BLOCK == 0 else BLOCK
    # With four warps a thread holds 8 values of a row: one 16-byte load of two-byte values. Wider values,
    # a decay per channel and packing need the registers of eight warps.
    warps = 4 if x.element_size() == 2 and lanes == 1 and not packed else 8
    constants = {
        "LANES": lanes,
        "BLOCK": BLOCK,
        "ROWS_LOG": rows_log,
        "SPANS_LOG": SPANS_LOG,
        "REVERSE": reverse,
        "num_warps": warps,
        # Triton's default varies by version.
        "enable_fp_fusion": True,
    }
    programs = batch * triton.cdiv(tiles, tiles_a_program)
    return _Plan(tiles, tiles_a_program, programs, blocks, whole, constants)


def forward(
    x: Tensor,
    alpha: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """`(y, final_state)`, for plain tensors as `mhesa.ops.registration.make_scan` describes them."""
    batch, length, heads, head_dim = x.shape
    x, alpha, decay = launching.strided(x), alpha.contiguous(), decay.contiguous()
    skip, initial_state = launching.dense(skip), launching.dense(initial_state)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    shape = (sequences, heads, head_dim)
    if x.numel() == 0 or cu_seqlens is not None:
        # The kernel does not visit empty sequences.
        final_state = alpha.new_zeros(shape) if initial_state is None else initial_state.clone()
    else:
        final_state = alpha.new_empty(shape)
    if x.numel() == 0:
        return y, final_state

    channels = heads * head_dim
    plan = _plan(x, FORWARD_ROWS_LOG, cu_seqlens is not None, reverse)
    sequence_of = launching.sequence_of(cu_seqlens, x)
    carries = None if plan.whole else alpha.new_empty(batch, plan.tiles, channels)

    def launch(y: Tensor | None) -> None:
        kernels.forward[(plan.programs * plan.blocks,)](
            x,
            y,
            None if y is None else final_state,
            carries,
            alpha,
            decay,
            skip,
            initial_state,
            sequence_of,
            x.stride(0),
            x.stride(1),
            length,
            channels,
            head_dim,
            plan.tiles,
            plan.tiles_a_program,
            **plan.constants,
        )

    with launching.current(x.device):
        if carries is not None:
            launch(None)
            _launch_chain(plan, carries, initial_state, decay, sequence_of, x)
        launch(y)
    return y, final_state


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(dx, dalpha, ddecay, dskip, dinitial)`; `dskip` is zero if there is no `skip`."""
    batch, length, heads, head_dim = x.shape
    x, dy, dfinal = launching.strided(x), launching.strided(dy), dfinal.contiguous()
    alpha, decay, skip, initial_state = (
        alpha.contiguous(),
        decay.contiguous(),
        launching.dense(skip),
        launching.dense(initial_state),
    )
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        zero = torch.zeros_like(alpha)
        # Without a step the final state is the initial state, and so are their gradients.
        return dx, zero, zero.clone(), alpha.new_zeros(heads, head_dim), dfinal.clone()

    channels = heads * head_dim
    plan = _plan(x, BACKWARD_ROWS_LOG, cu_seqlens is not None, not reverse)
    sequence_of = launching.sequence_of(cu_seqlens, x)
    dinitial = torch.empty_like(dfinal) if cu_seqlens is None else dfinal.clone()
    carries = None if plan.whole else alpha.new_empty(2, batch, plan.tiles, channels)
    partials = alpha.new_empty(2 if skip is None else 3, plan.programs, channels)

    def launch(dx: Tensor | None) -> None:
        kernels.backward[(plan.programs * plan.blocks,)](
            dy,
            None if dx is None else x,
            dx,
            None if dx is None else dinitial,
            None if dx is None else partials,
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
            length,
            channels,
            head_dim,
            plan.tiles,
            plan.tiles_a_program,
            **plan.constants,
        )

    with launching.current(x.device):
        if carries is not None:
            launch(None)
            _launch_chain(plan, carries, dfinal, decay, sequence_of, x)
        launch(dx)
    sums = partials.sum(1, dtype=torch.float64).unflatten(1, (heads, head_dim))
    dalpha, ddecay = sums[:2].sum(2).to(alpha.dtype)
    dskip = alpha.new_zeros(heads, head_dim) if skip is None else sums[2].to(alpha.dtype)
    # Outputs of a custom operator must not share memory.
    return dx, dalpha, ddecay.clone(), dskip, dinitial


def _launch_chain(
    plan: _Plan, carries: Tensor, initial: Tensor | None, decay: Tensor, sequence_of: Tensor | None, x: Tensor
) -> None:
    batch, length, heads, head_dim = x.shape
    kernels.chain[(batch * plan.blocks,)](
        carries,
        initial,
        decay,
        sequence_of,
        length,
        heads * head_dim,
        head_dim,
        plan.tiles,
        AHEAD=launching.AHEAD,
        PAIR=carries.ndim == 4,
        **{**plan.constants, "num_warps": 1},
    )
