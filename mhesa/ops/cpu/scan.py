"""The scan on CPU, at the speed of a copy: cuts the work into chunks, calls `mhesa.ops.cpu.scan_kernels`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mhesa.ops.cpu import scan_kernels as kernels
from mhesa.ops.cpu.atomics import LINE
from mhesa.ops.cpu.compiling import compiled
from mhesa.ops.cpu.memory import empty_hugepages
from mhesa.ops.cpu.scan_tiles import LANES, WIDTH
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
Structs = npt.NDArray[np.void]


class _Chunks(NamedTuple):
    """`kernels.Chunk` structs, and how many spans they are cut into in all."""

    table: Structs
    spans: int
    address: int


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
    call = _Call(x, alpha, decay, skip, initial_state, cu_seqlens, reverse)
    args = call.args
    y = empty_hugepages(x.shape, x.dtype)
    final = torch.empty(call.states, dtype=call.dtype)
    args.x, args.x_batch, args.x_row, args.x_head = call.rows(x)
    args.out, args.final = y.data_ptr(), final.data_ptr()
    if call.chunks.spans:
        args.entering = args.initial
        args.carries = call.keep(torch.empty(call.chunks.spans, call.channels, dtype=call.dtype))
        call.run(kernels.ends, call.chunk_count)
        call.run(kernels.chain, 1, threads=1)
    call.run(kernels.relay if call.relays() else kernels.forward, call.chunk_count, traffic=2)
    return y, final


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
) -> Gradients:
    """`(dx, dalpha, ddecay, dskip, dinitial)`, likewise."""
    call = _Call(x, alpha, decay, skip, initial_state, cu_seqlens, not reverse)
    args, groups = call.args, min(call.chunk_count, GROUPS)
    dx = empty_hugepages(x.shape, x.dtype)
    dinitial = torch.empty(call.states, dtype=call.dtype)
    dalpha, ddecay = torch.empty(call.heads, dtype=call.dtype), torch.empty(call.heads, dtype=call.dtype)
    dskip = torch.empty(x.shape[2:], dtype=call.dtype)
    args.x, args.x_batch, args.x_row, args.x_head = call.rows(x)
    args.dy, args.dy_batch, args.dy_row, args.dy_head = call.rows(dy)
    args.out, args.dinitial, args.dfinal = dx.data_ptr(), dinitial.data_ptr(), call.parameter(dfinal)
    args.dalpha, args.ddecay, args.dskip = dalpha.data_ptr(), ddecay.data_ptr(), dskip.data_ptr()
    args.totals = call.keep(torch.zeros(groups, 4, call.channels, dtype=torch.float64))
    if call.chunks.spans:
        args.entering = args.dfinal
        args.carries, args.slopes = (
            call.keep(torch.empty(call.chunks.spans, call.channels, dtype=call.dtype)) for _ in range(2)
        )
        call.run(kernels.ends, call.chunk_count)
        call.run(kernels.chain, 1, threads=1)
    call.run(kernels.backward, groups, traffic=3)
    call.run(kernels.reduce, groups, threads=1)
    return dx, dalpha, ddecay, dskip, dinitial


class _Call:
    """The arguments of the kernels for one scan, and the tensors that have to live until it is done."""

    def __init__(
        self,
        x: Tensor,
        alpha: Tensor,
        decay: Tensor,
        skip: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
    ) -> None:
        check_dtype(x.dtype)
        batch, length, self.heads, self.head_dim = x.shape
        self.channels, self.reverse = self.heads * self.head_dim, reverse
        self.bytes, self.stored = x.nbytes, x.dtype
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.threads = 1 if x.numel() < MIN_PARALLEL else available()
        self.sequences = find_sequences(batch, length, cu_seqlens)
        self.states = (len(self.sequences.batch), self.heads, self.head_dim)
        # Blocks of channels; 0: as the number of threads wants it.
        self.blocks, self.contiguous_heads = 0, True
        self.kept: list[Tensor] = []
        self.args = kernels.Arguments(
            length=length,
            heads=self.heads,
            head_dim=self.head_dim,
            reverse=reverse,
            alpha=self.parameter(alpha),
            decay=self.parameter(decay),
            skip=self.parameter(skip),
            initial=self.parameter(initial_state),
        )
        self.set_chunks(self.sequences.cut(_spans, self.channels, reverse))

    def set_chunks(self, chunks: _Chunks) -> None:
        """Choose the chunks that the kernels work through."""
        self.chunks, self.chunk_count = chunks, len(chunks.table)
        self.args.chunk_count, self.args.chunks = self.chunk_count, chunks.address

    def relays(self) -> bool:
        """Whether threads take turns at each sequence; if so, cut the sequences for them."""
        sequences = self.states[0]
        even = sequences % self.threads == 0 or sequences >= 4 * self.threads
        if even or not self.contiguous_heads or self.channels < kernels.NARROW or self.bytes < RELAY_BYTES:
            return False
        rows = max(RELAY_ROWS, RELAY_VALUES // self.channels)
        self.set_chunks(self.sequences.cut(_relay, rows, self.reverse))
        relays = math.ceil(self.threads / (RELAY_THREADS * sequences))
        self.blocks = min(max(math.ceil(self.channels / WIDTH), relays), self.channels // MIN_BLOCK)
        self.args.turns = self.keep(torch.zeros(sequences * self.blocks, LINE, dtype=torch.int64))
        return True

    def keep(self, tensor: Tensor) -> int:
        """The address of a contiguous tensor, which is kept."""
        self.kept.append(tensor)
        return tensor.data_ptr()

    def parameter(self, tensor: Tensor | None) -> int:
        """The address of a tensor in the accumulation type, 0 for none."""
        if tensor is None:
            return 0
        if tensor.dtype != self.dtype or not tensor.is_contiguous():
            tensor = tensor.to(self.dtype).contiguous()
        return self.keep(tensor)

    def rows(self, tensor: Tensor) -> tuple[int, int, int, int]:
        """The address of a `(batch, length, heads, head_dim)` tensor, and its first three strides."""
        if tensor.dtype != self.stored:
            tensor = tensor.to(self.stored)
        tensor = readable(tensor, min_head_dim=math.inf if self.chunks.spans else LANES)
        by_batch, by_row, by_head, _ = tensor.stride()
        by_head = by_head if self.heads > 1 else self.head_dim
        self.contiguous_heads = self.contiguous_heads and by_head == self.head_dim
        return self.keep(tensor), by_batch, by_row, by_head

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
    sequence, piece = count_pieces(pieces)
    cut, of, begin, length = cut[sequence], pieces[sequence], sequences.begin[sequence], length[sequence]
    return _chunks(
        int(cut.sum()) * kernels.SPANS,
        sequence=sequence,
        batch=sequences.batch[sequence],
        begin=begin + piece * length // of,
        end=begin + (piece + 1) * length // of,
        slot=np.where(cut, (cut.cumsum() - 1) * kernels.SPANS, -1),
        first=piece == (of - 1 if reverse else 0),
        last=piece == (0 if reverse else of - 1),
    )


def _relay(sequences: Sequences, rows: int, reverse: bool) -> _Chunks:
    """Chunks of `rows` rows: the first of every sequence in the direction of the scan, then the second ..."""
    pieces = np.maximum(-(-(sequences.end - sequences.begin) // rows), 1)
    sequence, piece = count_pieces(pieces)
    order = np.lexsort((sequence, piece))
    sequence, piece = sequence[order], piece[order]
    begin, end = sequences.begin[sequence], sequences.end[sequence]
    return _chunks(
        0,
        sequence=sequence,
        batch=sequences.batch[sequence],
        begin=np.maximum(end - (piece + 1) * rows, begin) if reverse else begin + piece * rows,
        end=end - piece * rows if reverse else np.minimum(begin + (piece + 1) * rows, end),
        turn=piece,
        first=piece == 0,
        last=piece == pieces[sequence] - 1,
    )


def _chunks(spans: int, **fields: npt.NDArray[Any]) -> _Chunks:
    table = np.zeros(len(fields["sequence"]), dtype=kernels.Chunk)
    for name, values in fields.items():
        table[name] = values
    return _Chunks(table, spans, table.ctypes.data)
