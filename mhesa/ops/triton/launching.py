"""What both scans on a GPU need to launch their kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mhesa.ops.backends import Inputs
from mhesa.ops.checks import count_sequences
from mhesa.ops.registration import Gradients

# Tiles whose end states the chain kernel loads at once.
AHEAD = 16


class Plan(NamedTuple):
    """How a pass over `x` is cut into tiles and programs, and the constants of its kernels."""

    tiles: int
    tiles_per_program: int
    # Programs of each block of channels.
    programs: int
    blocks: int
    # Whether one program walks through a whole sequence; otherwise three kernels run.
    whole: bool
    constants: dict[str, int | bool]

    @property
    def grid(self) -> tuple[int]:
        """The programs of all blocks."""
        return (self.programs * self.blocks,)


def plan(
    x: Tensor, *, blocks: int, rows_log: int, spans_log: int, reverse: bool, **constants: int | bool
) -> Plan:
    """Cut `x` of `(batch, length, heads, head_dim)` into tiles of rows and blocks of channels.

    A tile has `2 ** (rows_log + spans_log)` rows.
    """
    tiles = triton.cdiv(x.shape[1], 1 << (rows_log + spans_log))
    width = x.shape[0] * blocks
    # One program per multiprocessor keeps enough loads in flight; three kernels read the input twice.
    whole = tiles == 1 or width >= processors(x.device)
    # Once all multiprocessors are busy, more tiles per program hide latency and leave fewer partial sums.
    run = min(max(width * tiles // (16 * processors(x.device)), 1), 8)
    tiles_per_program = tiles if whole else run
    constants |= {
        "ROWS_LOG": rows_log,
        "SPANS_LOG": spans_log,
        "REVERSE": reverse,
        # Triton's default varies by version.
        "enable_fp_fusion": True,
    }
    programs = x.shape[0] * triton.cdiv(tiles, tiles_per_program)
    return Plan(tiles, tiles_per_program, programs, blocks, whole, constants)


def kernel_inputs(inputs: Inputs) -> Inputs:
    """The inputs in layouts that kernels read: each step's channels contiguous, and so the parameters."""
    x, alpha, decay, skip, initial_state, cu_seqlens, reverse = inputs
    if alpha.ndim == 1:
        alpha, decay = alpha.contiguous(), decay.contiguous()
    skip, initial_state = (one if one is None else one.contiguous() for one in (skip, initial_state))
    return Inputs(contiguous_steps(x), alpha, decay, skip, initial_state, cu_seqlens, reverse)


def new_final_state(inputs: Inputs) -> Tensor:
    """The final state, `(sequences, heads, head_dim)`; set for sequences of no steps, which kernels skip."""
    x, alpha, _, _, initial_state, cu_seqlens, _ = inputs
    shape = count_sequences(x, cu_seqlens), *x.shape[2:]
    if x.numel() > 0 and cu_seqlens is None:
        return alpha.new_empty(shape)
    return alpha.new_zeros(shape) if initial_state is None else initial_state.clone()


def gradients_of_nothing(dfinal: Tensor, inputs: Inputs) -> Gradients:
    """The gradients where `x` has no values: the final state is the initial state.

    `dfinal` is `(sequences, heads, head_dim)`.
    """
    x, alpha, decay = inputs[:3]
    zeros = torch.zeros_like(alpha), torch.zeros_like(decay), alpha.new_zeros(x.shape[2:])
    return torch.empty_like(x), *zeros, dfinal.clone()


@lru_cache
def processors(device: torch.device) -> int:
    """The number of multiprocessors, each of which runs several programs at a time."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 1


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` current: Triton launches on the current device, whatever the tensors are on."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return torch.xpu.device(device) if device.type == "xpu" else nullcontext()


def contiguous_steps(x: Tensor) -> Tensor:
    """`x` of `(batch, length, heads, head_dim)`, copied unless the channels of each step are contiguous."""
    _, _, heads, head_dim = x.shape
    readable = (head_dim == 1 or x.stride(3) == 1) and (heads == 1 or x.stride(2) == head_dim)
    return x if readable else x.contiguous()


def sequence_of(cu_seqlens: Tensor | None, x: Tensor) -> Tensor | None:
    """The packed sequence of each row, `(length,)`, computed on the device without synchronising."""
    if cu_seqlens is None:
        return None
    offsets = cu_seqlens.to(x.device)
    rows = torch.arange(x.shape[1], device=x.device, dtype=offsets.dtype)
    found = torch.searchsorted(offsets[1:].contiguous(), rows, right=True, out_int32=True)
    # Offsets on an accelerator are not checked; clamp, so that no kernel can write out of bounds.
    return found.clamp_(max=offsets.numel() - 2)
