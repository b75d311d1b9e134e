"""The scan on CPU, at the speed of a copy: cuts the work into chunks, calls `mhesa.ops.cpu.scan_kernels`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mhesa.ops.backends import Inputs
from mhesa.ops.cpu import scan_kernels as kernels
from mhesa.ops.cpu.atomics import LINE
from mhesa.ops.cpu.compiling import compiled
from mhesa.ops.cpu.memory import CPU, empty_hugepages
from mhesa.ops.cpu.scan_tiles import LANES, WIDTH
from mhesa.ops.cpu.sequences import (
    MIN_BLOCK,
    NONTEMPORAL_BYTES,
    RELAY_THREADS,
    Call,
    Sequences,
    Structs,
    chunk_structs,
    cut_rows,
    number_pieces,
    relay_order,
)
from mhesa.ops.cpu.threads import parallel
from mhesa.ops.registration import Gradients

# Gradients that sum over sequences do so in at most this many fixed groups, added in order.
GROUPS = 16
# Long sequences of narrow rows are cut into at most `MAX_CHUNKS` chunks of at least `CHUNK_ROWS` rows.
CHUNK_ROWS = 1024 * kernels.SPANS
MAX_CHUNKS = 64
# Above this many bytes of x, pipeline a sequence over time instead of splitting its channels among threads:
# a relay has more overhead than short pieces of rows in a cache, and less than short pieces in memory.
RELAY_BYTES = 1 << 22
# A relay's chunks have at least this many rows, or more if rows are narrow: this many values, which are still
# in the L2 cache when they are read again.
RELAY_ROWS, RELAY_VALUES = 64, 1 << 15


class _Chunks(NamedTuple):
    """The chunks that sequences are cut into, and how many spans those are cut into in all."""

    table: Structs
    spans: int
    address: int


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """`(y, final_state)`, for plain tensors as `mhesa.ops.registration.make_scan` describes them."""
    x = inputs.x
    call = _Call(inputs, inputs.reverse)
    args = call.args
    y = empty_hugepages(x.shape, x.dtype)
    final = call.new(*call.state_shape)
    args.x, args.x_batch, args.x_row, args.x_head = call.rows(x, min_head_dim=call.min_head_dim)
    args.out, args.final = y.data_ptr(), final.data_ptr()
    if call.chunks.spans:
        args.entering, args.carries = args.initial, call.keep(call.new(call.chunks.spans, call.channels))
        call.enter_spans()
    kernel = kernels.relay if call.prepare_relay() else kernels.forward
    call.run(kernel, call.chunk_count, traffic=2)
    return y, final


def backward(dy: Tensor, dfinal: Tensor, inputs: Inputs) -> Gradients:
    """`(dx, dalpha, ddecay, dskip, dinitial)`, the gradients of `forward`, each in the shape of its input."""
    x = inputs.x
    call = _Call(inputs, not inputs.reverse)
    args, groups = call.args, min(call.chunk_count, GROUPS)
    dx = empty_hugepages(x.shape, x.dtype)
    dinitial, dskip = call.new(*call.state_shape), call.new(*x.shape[2:])
    dalpha, ddecay = call.new(call.heads), call.new(call.heads)
    args.x, args.x_batch, args.x_row, args.x_head = call.rows(x, min_head_dim=call.min_head_dim)
    args.dy, args.dy_batch, args.dy_row, args.dy_head = call.rows(dy, min_head_dim=call.min_head_dim)
    args.out, args.dinitial, args.dfinal = dx.data_ptr(), dinitial.data_ptr(), call.parameter(dfinal)
    args.dalpha, args.ddecay, args.dskip = dalpha.data_ptr(), ddecay.data_ptr(), dskip.data_ptr()
    args.totals = call.keep(torch.zeros(groups, 4, call.channels, dtype=torch.float64, device=CPU))
    if call.chunks.spans:
        args.entering = args.dfinal
        args.carries, args.slopes = (call.keep(call.new(call.chunks.spans, call.channels)) for _ in range(2))
        call.enter_spans()
    call.run(kernels.backward, groups, traffic=3)
    call.run(kernels.reduce, groups, threads=1)
    return dx, dalpha, ddecay, dskip, dinitial


class _Call(Call):
    """A call at fixed rates."""

    def __init__(self, inputs: Inputs, reverse: bool) -> None:
        super().__init__(kernels.Arguments, inputs, reverse)
        args = self.args
        args.alpha, args.decay = self.parameter(inputs.alpha), self.parameter(inputs.decay)
        args.initial = self.parameter(inputs.initial_state)
        # Blocks of channels; 0: as the number of threads wants it.
        self.blocks = 0
        self.set_chunks(self.sequences.cut(_spans, self.channels, reverse))
        self.min_head_dim = math.inf if self.chunks.spans else LANES

    def set_chunks(self, chunks: _Chunks) -> None:
        """Choose the chunks that the kernels work through."""
        self.chunks, self.chunk_count = chunks, len(chunks.table)
        self.args.chunk_count, self.args.chunks = self.chunk_count, chunks.address

    def prepare_relay(self) -> bool:
        """Cut the sequences for threads that take turns at each, if that is faster; whether it is."""
        contiguous, is_small = self.args.x_head == self.head_dim, self.bytes < RELAY_BYTES
        if self.shares_sequences() or not contiguous or self.channels < kernels.NARROW or is_small:
            return False
        sequences = self.state_shape[0]
        rows = max(RELAY_ROWS, RELAY_VALUES // self.channels)
        self.set_chunks(self.sequences.cut(_relay, rows, bool(self.args.reverse)))
        relays = math.ceil(self.threads / (RELAY_THREADS * sequences))
        self.blocks = min(max(math.ceil(self.channels / WIDTH), relays), self.channels // MIN_BLOCK)
        self.args.turns = self.keep(torch.zeros(sequences * self.blocks, LINE, dtype=torch.int64, device=CPU))
        return True

    def enter_spans(self) -> None:
        """Turn what enters each sequence into what enters each span."""
        self.run(kernels.ends, self.chunk_count)
        self.run(kernels.chain, 1, threads=1)

    def run(
        self, kernel: Callable[..., None], splits: int, *, threads: int | None = None, traffic: int = 0
    ) -> None:
        """Run a kernel over `splits` runs of chunks; it reads and writes `traffic` tensors as large as x."""
        threads = threads or self.threads
        # Channels are split only where the chunks cannot be shared out evenly.
        blocks = threads // math.gcd(splits, threads) if splits < 4 * threads else 1
        blocks = self.blocks or max(1, min(blocks, self.channels // MIN_BLOCK))
        # Non-temporal stores need vectors that are whole and aligned.
        aligned = self.channels % (LANES * blocks) == 0 and self.head_dim % LANES == 0
        args = self.args
        args.next_task, args.splits, args.blocks = 0, splits, blocks
        args.nontemporal = aligned and traffic * self.bytes > NONTEMPORAL_BYTES
        parallel(compiled(kernel, self.stored, kernels.Arguments), args.address, threads)


def _spans(sequences: Sequences, channels: int, reverse: bool) -> _Chunks:
    """Whole sequences, or if they are long and their rows narrow, chunks of spans."""
    length = sequences.end - sequences.begin
    # By its own length and width alone: the result of a sequence must not depend on others.
    cut = length >= (kernels.SPANS * kernels.ROWS_PER_SUM if channels < kernels.NARROW else math.inf)
    pieces = np.where(cut, np.clip(length // CHUNK_ROWS, 1, MAX_CHUNKS), 1)
    sequence, piece = number_pieces(pieces)
    cut, count, begin, length = cut[sequence], pieces[sequence], sequences.begin[sequence], length[sequence]
    earlier = count - 1 - piece if reverse else piece
    table = chunk_structs(
        sequence=sequence,
        batch=sequences.batch[sequence],
        begin=begin + piece * length // count,
        end=begin + (piece + 1) * length // count,
        earlier=earlier,
        later=count - 1 - earlier,
        slot=np.where(cut, (cut.cumsum() - 1) * kernels.SPANS, -1),
    )
    return _Chunks(table, int(cut.sum()) * kernels.SPANS, table.ctypes.data)


def _relay(sequences: Sequences, rows: int, reverse: bool) -> _Chunks:
    """Chunks of `rows` rows, in the order of a relay."""
    chunks = cut_rows(sequences, rows, reverse)
    table = chunks[relay_order(chunks)]
    return _Chunks(table, 0, table.ctypes.data)
