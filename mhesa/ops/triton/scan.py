"""The scan on a GPU: plans and launches the kernels of `mhesa.ops.triton.kernels`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mhesa.ops.registration import make_scan
from mhesa.ops.triton import kernels

BLOCK = 32
"""Channels per program: 64 bytes of bf16, the smallest access to DRAM."""

SPANS_LOG = 5
"""Spans per tile, as a logarithm to base 2."""

FORWARD_ROWS_LOG = {2: 3, 4: 2, 8: 2}
BACKWARD_ROWS_LOG = {2: 2, 4: 2, 8: 1}
"""Rows per span, as a logarithm to base 2, by the bytes of a value: as many as fit into registers."""

AHEAD = 16
"""Tiles whose end states the chain kernel loads at once."""


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
    if x.element_size() not in rows_logs:
        wanted = "float16, bfloat16, float32, float64"
        raise ValueError(f"backend 'triton' takes {wanted}, not {str(x.dtype).removeprefix('torch.')}")
    rows_log = rows_logs[x.element_size()]
    tiles = triton.cdiv(length, 1 << (rows_log + SPANS_LOG))
    blocks = triton.cdiv(heads * head_dim, BLOCK)
    processors = _processors(x.device)
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


@lru_cache
def _processors(device: torch.device) -> int:
    """The number of multiprocessors, each of which runs several programs at a time."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 1


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` current: Triton launches on the current device, whatever the tensors are on."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return torch.xpu.device(device) if device.type == "xpu" else nullcontext()


def _strided(x: Tensor) -> Tensor:
    """`x`, copied unless the channels of each step are contiguous."""
    _, _, heads, head_dim = x.shape
    dense = (head_dim == 1 or x.stride(3) == 1) and (heads == 1 or x.stride(2) == head_dim)
    return x if dense else x.contiguous()


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _sequence_of(cu_seqlens: Tensor | None, x: Tensor) -> Tensor | None:
    """The packed sequence of each row, `(length,)`, computed on the device without synchronising."""
    if cu_seqlens is None:
        return None
    offsets = cu_seqlens.to(x.device)
    rows = torch.arange(x.shape[1], device=x.device, dtype=offsets.dtype)
    found = torch.searchsorted(offsets[1:].contiguous(), rows, right=True, out_int32=True)
    # Offsets on an accelerator are not checked; clamp, so that no kernel can write out of bounds.
    return found.clamp_(max=offsets.numel() - 2)


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
    x, alpha, decay = _strided(x), alpha.contiguous(), decay.contiguous()
    skip, initial_state = _dense(skip), _dense(initial_state)
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
    sequence_of = _sequence_of(cu_seqlens, x)
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

    with _on(x.device):
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
    x, dy, dfinal = _strided(x), _strided(dy), dfinal.contiguous()
    alpha, decay, skip, initial_state = (
        alpha.contiguous(),
        decay.contiguous(),
        _dense(skip),
        _dense(initial_state),
    )
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        zero = torch.zeros_like(alpha)
        # Without a step the final state is the initial state, and so are their gradients.
        return dx, zero, zero.clone(), alpha.new_zeros(heads, head_dim), dfinal.clone()

    channels = heads * head_dim
    plan = _plan(x, BACKWARD_ROWS_LOG, cu_seqlens is not None, not reverse)
    sequence_of = _sequence_of(cu_seqlens, x)
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

    with _on(x.device):
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
        AHEAD=AHEAD,
        PAIR=carries.ndim == 4,
        **{**plan.constants, "num_warps": 1},
    )


scan = make_scan("triton", forward, backward)
