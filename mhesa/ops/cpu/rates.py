"""The scan at rates of every step on CPU: cuts the work into chunks, calls `mhesa.ops.cpu.rates_kernels`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mhesa.ops.cpu import rates_kernels as kernels
from mhesa.ops.cpu.atomics import LINE
from mhesa.ops.cpu.compiling import compiled
from mhesa.ops.cpu.memory import empty_hugepages
from mhesa.ops.cpu.rates_tiles import HALF, LANES
from mhesa.ops.cpu.sequences import (
    MIN_BLOCK,
    MIN_PARALLEL,
    NONTEMPORAL_BYTES,
    RELAY_THREADS,
    Sequences,
    check_dtype,
    count_pieces,
    find_sequences,
    readable,
)
from mhesa.ops.cpu.threads import available, parallel
from mhesa.ops.registration import Gradients

# Rows of a chunk: so many that their values of x, dy and the state fit into the L2 cache together.
CHUNK_VALUES = 1 << 15
MIN_ROWS, MAX_ROWS = 8, 256


class _Cut(NamedTuple):
    """How sequences are cut into chunks; arrays whose addresses the kernels get."""

    chunks: npt.NDArray[np.void]
    first_chunk: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]


def forward(
    x: Tensor,
    alpha: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, states)` as `StepKernels` describes them; states `(chunks, channels)`."""
    y = empty_hugepages(x.shape, x.dtype)
    call = _Call(x, alpha, decay, skip, cu_seqlens, reverse)
    return y, *_scan(call, initial_state, y)


def _scan(call: _Call, initial_state: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Write the outputs to `y`, if there is one; returns the final state and those at the chunks' starts."""
    states = torch.empty(len(call.cut.chunks), call.channels, dtype=call.dtype)
    if call.empty:
        final = torch.zeros(call.shape, dtype=call.dtype) if initial_state is None else initial_state.clone()
        return final, states
    final = torch.empty(call.shape, dtype=call.dtype)
    args = call.args
    args.initial, args.final, args.states = call.parameter(initial_state), final.data_ptr(), states.data_ptr()
    args.out = 0 if y is None else y.data_ptr()
    call.run(kernels.forward, call.channels, tensors=2)
    return final, states


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
    """`(dx, dalpha, ddecay, dskip, dinitial)`, likewise; `dalpha` and `ddecay` `(batch, length, heads)`."""
    call = _Call(x, alpha, decay, skip, cu_seqlens, reverse)
    if states is None:
        _, states = _scan(call, initial_state, None)
    dx = empty_hugepages(x.shape, x.dtype)
    dskip = torch.zeros(x.shape[2:], dtype=call.dtype)
    if call.empty:
        dalpha, ddecay = (torch.zeros(x.shape[:3], dtype=call.dtype) for _ in range(2))
        return dx, dalpha, ddecay, dskip, dfinal.clone()
    dalpha, ddecay = (torch.empty(x.shape[:3], dtype=call.dtype) for _ in range(2))
    dinitial, args = torch.empty(call.shape, dtype=call.dtype), call.args
    args.dy, args.dy_batch, args.dy_row, args.dy_head = call.rows(dy)
    args.out, args.dfinal, args.dinitial = dx.data_ptr(), call.parameter(dfinal), dinitial.data_ptr()
    args.dalpha, args.ddecay, args.states = dalpha.data_ptr(), ddecay.data_ptr(), states.data_ptr()
    sums = torch.empty(len(call.cut.chunks), call.channels, dtype=call.dtype)
    args.dskip = sums.data_ptr()
    call.run(kernels.backward, (call.chunk_rows + 1) * call.channels, tensors=3)
    if skip is not None:
        # numpy adds in one order; torch's depends on the number of threads.
        dskip.copy_(torch.from_numpy(sums.numpy().sum(0, dtype=np.float64)).view_as(dskip))
    return dx, dalpha, ddecay, dskip, dinitial


class _Call:
    """The arguments of the kernels for one scan, and the tensors that have to live until it is done."""

    def __init__(
        self,
        x: Tensor,
        alpha: Tensor,
        decay: Tensor,
        skip: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
    ) -> None:
        check_dtype(x.dtype)
        batch, length, self.heads, self.head_dim = x.shape
        self.channels, self.bytes, self.stored = self.heads * self.head_dim, x.nbytes, x.dtype
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.threads = 1 if x.numel() < MIN_PARALLEL else available()
        self.empty = x.numel() == 0
        self.chunk_rows = min(max(CHUNK_VALUES // max(self.channels, 1), MIN_ROWS), MAX_ROWS)
        self.cut: _Cut = find_sequences(batch, length, cu_seqlens).cut(_cut, self.chunk_rows, reverse)
        self.shape = (len(self.cut.first_chunk) - 1, self.heads, self.head_dim)
        self.kept: list[Tensor] = []
        self.args = kernels.Arguments(
            length=length,
            heads=self.heads,
            head_dim=self.head_dim,
            reverse=reverse,
            chunks=self.cut.chunks.ctypes.data,
            first_chunk=self.cut.first_chunk.ctypes.data,
            order=self.cut.order.ctypes.data,
            skip=self.parameter(skip),
        )
        args = self.args
        args.x, args.x_batch, args.x_row, args.x_head = self.rows(x)
        args.alpha, args.alpha_batch, args.alpha_row = self.rates(alpha)
        args.decay, args.decay_batch, args.decay_row = self.rates(decay)

    def keep(self, tensor: Tensor) -> int:
        """The address of a tensor, which is kept."""
        self.kept.append(tensor)
        return tensor.data_ptr()

    def parameter(self, tensor: Tensor | None) -> int:
        """The address of a tensor in the accumulation type, made contiguous; 0 for none."""
        return 0 if tensor is None else self.keep(tensor.to(self.dtype).contiguous())

    def rows(self, tensor: Tensor) -> tuple[int, int, int, int]:
        """The address of a `(batch, length, heads, head_dim)` tensor, and its first three strides."""
        tensor = readable(tensor.to(self.stored), min_head_dim=0)
        by_batch, by_row, by_head, _ = tensor.stride()
        return self.keep(tensor), by_batch, by_row, by_head

    def rates(self, tensor: Tensor) -> tuple[int, int, int]:
        """The address of `(batch, length, heads)` rates, and their first two strides."""
        tensor = readable(tensor.to(self.dtype)[:, :, None], min_head_dim=0)
        by_batch, by_row, _, _ = tensor.stride()
        return self.keep(tensor), by_batch, by_row

    def run(self, kernel: Callable[..., None], buffer: int, *, tensors: int) -> None:
        """Run a kernel over `tensors` tensors as large as x, with memory for `buffer` values a thread."""
        args, threads, sequences = self.args, self.threads, self.shape[0]
        relay = sequences % threads != 0 and sequences < 4 * threads
        args.relay, args.blocks = relay, 1
        if relay:
            pieces = math.ceil(len(self.cut.chunks) / sequences)
            blocks = math.ceil(threads / (min(RELAY_THREADS, pieces) * sequences))
            args.blocks = max(1, min(blocks, self.heads, self.channels // MIN_BLOCK))
        turns = torch.zeros(sequences * args.blocks, LINE, dtype=torch.int64)
        memory = torch.empty(threads, buffer, dtype=self.dtype)
        args.turns, args.buffer, args.buffer_size = turns.data_ptr(), memory.data_ptr(), buffer
        args.next_task, args.next_buffer = 0, 0
        args.tasks = len(self.cut.chunks) if relay else sequences
        # Non-temporal stores need vectors that are whole and aligned.
        aligned = self.head_dim % LANES == 0 or self.head_dim == HALF
        aligned = aligned and self.channels * self.stored.itemsize % 64 == 0
        args.nontemporal = aligned and tensors * self.bytes > NONTEMPORAL_BYTES
        parallel(compiled(kernel, self.stored, kernels.Arguments), args.address, threads)


def _cut(sequences: Sequences, rows: int, reverse: bool) -> _Cut:
    """Cut sequences into chunks of `rows` rows, the first of each where the scan begins."""
    pieces = np.maximum(-(-(sequences.end - sequences.begin) // rows), 1)
    sequence, piece = count_pieces(pieces)
    begin, end = sequences.begin[sequence], sequences.end[sequence]
    chunks = np.zeros(len(sequence), dtype=kernels.Chunk)
    chunks["sequence"], chunks["batch"] = sequence, sequences.batch[sequence]
    chunks["begin"] = np.maximum(end - (piece + 1) * rows, begin) if reverse else begin + piece * rows
    chunks["end"] = end - piece * rows if reverse else np.minimum(begin + (piece + 1) * rows, end)
    chunks["earlier"], chunks["later"] = piece, pieces[sequence] - 1 - piece
    first_chunk = np.concatenate([[0], pieces.cumsum()])
    return _Cut(chunks, first_chunk, np.lexsort((sequence, piece)))
