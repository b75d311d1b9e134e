"""The scan at rates of every step on CPU: cuts the work into chunks, calls `mhesa.ops.cpu.rates_kernels`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mhesa.ops.backends import Inputs
from mhesa.ops.cpu import rates_kernels as kernels
from mhesa.ops.cpu.atomics import LINE
from mhesa.ops.cpu.compiling import compiled
from mhesa.ops.cpu.memory import CPU, empty_hugepages
from mhesa.ops.cpu.rates_tiles import HALF, LANES
from mhesa.ops.cpu.sequences import (
    MIN_BLOCK,
    NONTEMPORAL_BYTES,
    RELAY_THREADS,
    Call,
    Integers,
    Sequences,
    Structs,
    cut_rows,
    readable,
    relay_order,
)
from mhesa.ops.cpu.threads import parallel
from mhesa.ops.registration import Gradients

# The values of a chunk: x, dy and the states of its rows fit into the L2 cache together.
CHUNK_VALUES = 1 << 15
# Its rows, however wide they are.
MIN_ROWS, MAX_ROWS = 8, 256


class _Cut(NamedTuple):
    """How sequences are cut into chunks; arrays whose addresses the kernels get."""

    chunks: Structs
    first_chunk: Integers
    order: Integers


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, states)` as `StepKernels` describes them; states `(chunks, channels)`."""
    y = empty_hugepages(inputs.x.shape, inputs.x.dtype)
    return y, *_scan(_Call(inputs), inputs.initial_state, y)


def _scan(call: _Call, initial_state: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Write the outputs to `y`, if there is one; returns the final state and those at the chunks' starts."""
    states, final = call.new(len(call.cut.chunks), call.channels), call.new(*call.state_shape)
    args = call.args
    args.initial, args.final, args.states = call.parameter(initial_state), final.data_ptr(), states.data_ptr()
    args.out = 0 if y is None else y.data_ptr()
    call.run(kernels.forward, call.channels, tensors=2)
    return final, states


def backward(dy: Tensor, dfinal: Tensor, inputs: Inputs, states: Tensor | None) -> Gradients:
    """Gradients `(dx, dalpha, ddecay, dskip, dinitial)`; `dalpha`, `ddecay` are `(batch, length, heads)`."""
    x, call = inputs.x, _Call(inputs)
    if states is None:
        _, states = _scan(call, inputs.initial_state, None)
    dx = empty_hugepages(x.shape, x.dtype)
    dskip = torch.zeros(x.shape[2:], dtype=call.dtype, device=CPU)
    dalpha, ddecay = call.new(*x.shape[:3]), call.new(*x.shape[:3])
    dinitial, args = call.new(*call.state_shape), call.args
    args.dy, args.dy_batch, args.dy_row, args.dy_head = call.rows(dy, min_head_dim=0)
    args.out, args.dfinal, args.dinitial = dx.data_ptr(), call.parameter(dfinal), dinitial.data_ptr()
    args.dalpha, args.ddecay, args.states = dalpha.data_ptr(), ddecay.data_ptr(), states.data_ptr()
    sums = call.new(len(call.cut.chunks), call.channels)
    args.dskip = sums.data_ptr()
    call.run(kernels.backward, (call.chunk_rows + 1) * call.channels, tensors=3)
    if inputs.skip is not None:
        # numpy adds in one order; torch's depends on the number of threads.
        dskip.copy_(torch.from_numpy(sums.numpy().sum(0, dtype=np.float64)).view_as(dskip))
    return dx, dalpha, ddecay, dskip, dinitial


class _Call(Call):
    """A call at rates of every step."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(kernels.Arguments, inputs, inputs.reverse)
        self.chunk_rows = min(max(CHUNK_VALUES // max(self.channels, 1), MIN_ROWS), MAX_ROWS)
        self.cut: _Cut = self.sequences.cut(_cut, self.chunk_rows, inputs.reverse)
        args = self.args
        args.chunks, args.first_chunk, args.order = (table.ctypes.data for table in self.cut)
        args.x, args.x_batch, args.x_row, args.x_head = self.rows(inputs.x, min_head_dim=0)
        args.alpha, args.alpha_batch, args.alpha_row = self.rates(inputs.alpha)
        args.decay, args.decay_batch, args.decay_row = self.rates(inputs.decay)

    def rates(self, tensor: Tensor) -> tuple[int, int, int]:
        """The address of `(batch, length, heads)` rates, and their first two strides."""
        tensor = readable(tensor.to(self.dtype)[:, :, None], min_head_dim=0)
        by_batch, by_row, _, _ = tensor.stride()
        return self.keep(tensor), by_batch, by_row

    def run(self, kernel: Callable[..., None], buffer: int, *, tensors: int) -> None:
        """Run a kernel over `tensors` tensors as large as x, with memory for `buffer` values a thread."""
        args, threads, sequences = self.args, self.threads, self.state_shape[0]
        relay = not self.shares_sequences()
        args.relay, args.blocks = relay, 1
        if relay:
            pieces = math.ceil(len(self.cut.chunks) / sequences)
            blocks = math.ceil(threads / (min(RELAY_THREADS, pieces) * sequences))
            args.blocks = max(1, min(blocks, self.heads, self.channels // MIN_BLOCK))
        turns = torch.zeros(sequences * args.blocks, LINE, dtype=torch.int64, device=CPU)
        memory = self.new(threads, buffer)
        args.turns, args.buffer, args.buffer_size = turns.data_ptr(), memory.data_ptr(), buffer
        args.next_task, args.next_buffer = 0, 0
        args.tasks = len(self.cut.chunks) if relay else sequences
        # Non-temporal stores need vectors that are whole and aligned.
        aligned = self.head_dim % LANES == 0 or self.head_dim == HALF
        aligned = aligned and self.channels * self.stored.itemsize % 64 == 0
        args.nontemporal = aligned and tensors * self.bytes > NONTEMPORAL_BYTES
        parallel(compiled(kernel, self.stored, kernels.Arguments), args.address, threads)


def _cut(sequences: Sequences, rows: int, reverse: bool) -> _Cut:
    chunks = cut_rows(sequences, rows, reverse)
    first_chunk = np.searchsorted(chunks["sequence"], np.arange(len(sequences.batch) + 1))
    return _Cut(chunks, first_chunk, relay_order(chunks))
