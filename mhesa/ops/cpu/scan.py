"""The scan on CPU at the speed of a copy: what calls the kernels of `mhesa.ops.cpu.scan_kernels`."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mhesa.ops.cpu import scan_kernels as kernels
from mhesa.ops.cpu.memory import empty_hugepages
from mhesa.ops.cpu.scan_tiles import LANES, WIDTH
from mhesa.ops.cpu.simd import STORED, compiled
from mhesa.ops.cpu.threads import available, parallel
from mhesa.ops.registration import Gradients, make_scan

# Narrower blocks of channels are read in pieces too short to be fast.
NARROWEST = 32
# Gradients that sum over sequences do so in at most this many fixed groups, added in order.
GROUPS = 16
# A scan of fewer elements is done before a second thread has woken.
PARALLEL = 1 << 14
# Bytes read and written from which results go past the caches: lines about to be overwritten are then not
# read first. Operators that read the result next were never slower for it.
STREAMED = 1 << 23
# A long sequence of few channels is cut into chunks of so many rows, at most so many.
CHUNK_ROWS = 1024 * kernels.SPANS
MOST_CHUNKS = 64
# Threads in a relay take so many rows at a time, or more of few channels: so many values that they are still
# in the second cache when they are read again.
LEAST_ROWS, RELAY_VALUES = 64, 1 << 15
# Bytes of a tensor from which sequences that do not deal out evenly are shared in a relay, not by channels:
# handing on costs more than short pieces of rows in the caches, and much less than those in memory.
RELAYED = 1 << 22
# Threads that a relay keeps busy: only one at a time moves the state on, which is a third of the work.
RUNNERS = 3

Integers = npt.NDArray[np.int64]


class _Chunks(NamedTuple):
    """The table of chunks, `(count, kernels.COLUMNS)`, and the spans that they are cut into in all."""

    table: Integers
    spans: int
    address: int


class _Sequences:
    """Where each sequence is, in which of the batch and from which row to which, and tables of its chunks."""

    def __init__(self, batch: Integers, begin: Integers, end: Integers) -> None:
        self.batch, self.begin, self.end = batch, begin, end
        self.tables: dict[tuple[Any, ...], _Chunks] = {}

    def cut(self, into: Callable[..., _Chunks], *how: Any) -> _Chunks:
        """The table that `into(self, *how)` makes, made once."""
        if (into, how) not in self.tables:
            self.tables[into, how] = into(self, *how)
        return self.tables[into, how]


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
    y = empty_hugepages(x.shape, x.dtype)
    final = call.tensor(kernels.FINAL, torch.empty(call.states, dtype=call.dtype))
    call.rows(kernels.X, kernels.X_BATCH, x)
    call.tensor(kernels.OUT, y)
    if call.chunks.spans:
        call.tensor(kernels.CARRIES, torch.empty(call.chunks.spans, call.channels, dtype=call.dtype))
        call.run(kernels.ends, call.count)
        call.run(kernels.chain, 1, threads=1)
    call.run(kernels.relay if call.relays() else kernels.forward, call.count, traffic=2)
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
    heads, head_dim = x.shape[2:]
    groups = min(call.count, GROUPS)
    dx = empty_hugepages(x.shape, x.dtype)
    dinitial = call.tensor(kernels.DINITIAL, torch.empty(call.states, dtype=call.dtype))
    call.rows(kernels.X, kernels.X_BATCH, x)
    call.rows(kernels.DY, kernels.DY_BATCH, dy)
    call.tensor(kernels.OUT, dx)
    call.parameter(kernels.DFINAL, dfinal)
    call.tensor(kernels.TOTALS, torch.zeros(groups, 4, call.channels, dtype=torch.float64))
    dalpha = call.tensor(kernels.DALPHA, torch.empty(heads, dtype=call.dtype))
    ddecay = call.tensor(kernels.DDECAY, torch.empty(heads, dtype=call.dtype))
    dskip = call.tensor(kernels.DSKIP, torch.empty(heads, head_dim, dtype=call.dtype))
    if call.chunks.spans:
        carries = torch.empty(2, call.chunks.spans, call.channels, dtype=call.dtype)
        call.tensor(kernels.CARRIES, carries)
        call.fields[kernels.PLANE] = carries.stride(0)
        call.run(kernels.backward_ends, call.count)
        call.run(kernels.chain, 1, threads=1)
    call.run(kernels.backward, groups, traffic=3)
    call.run(kernels.reduce, groups, threads=1)
    return dx, dalpha, ddecay, dskip, dinitial


class _Call:
    """What one run of a kernel is told, and the tensors that have to outlive it."""

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
        if x.dtype not in STORED:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in STORED)
            raise ValueError(f"backend 'numba' takes {names}, not {str(x.dtype).removeprefix('torch.')}")
        batch, length, self.heads, self.head_dim = x.shape
        self.channels = self.heads * self.head_dim
        self.bytes, self.stored = x.nbytes, x.dtype
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.threads = 1 if x.numel() < PARALLEL else available()
        self.sequences = _dense(batch, length) if cu_seqlens is None else _packed(cu_seqlens, length)
        self.states = (len(self.sequences.batch), self.heads, self.head_dim)
        # Blocks of channels, where they do not follow from the number of threads.
        self.blocks, self.whole = 0, True
        self.kept: list[object] = []
        self.fields = array("q", bytes(8 * kernels.FIELDS))
        self.fields[kernels.LENGTH] = length
        self.fields[kernels.HEADS] = self.heads
        self.fields[kernels.HEAD_DIM] = self.head_dim
        self.fields[kernels.REVERSE] = reverse
        self.deal(self.sequences.cut(_spans, self.channels))
        self.parameter(kernels.ALPHA, alpha)
        self.parameter(kernels.DECAY, decay)
        self.parameter(kernels.SKIP, skip)
        self.parameter(kernels.INITIAL, initial_state)

    def deal(self, chunks: _Chunks) -> None:
        """Pass the chunks that are to be worked through."""
        self.chunks, self.count = chunks, len(chunks.table)
        self.fields[kernels.COUNT] = self.count
        self.fields[kernels.CHUNKS] = chunks.address

    def relays(self) -> bool:
        """Whether threads take turns at each sequence, which is then cut for them."""
        sequences = self.states[0]
        even = sequences % self.threads == 0 or sequences >= 4 * self.threads
        if even or not self.whole or self.channels < kernels.NARROW or self.bytes < RELAYED:
            return False
        rows = max(LEAST_ROWS, RELAY_VALUES // self.channels)
        self.deal(self.sequences.cut(_relay, rows, bool(self.fields[kernels.REVERSE])))
        runners = math.ceil(self.threads / (RUNNERS * sequences))
        self.blocks = min(max(math.ceil(self.channels / WIDTH), runners), self.channels // NARROWEST)
        counters = torch.zeros(sequences * self.blocks, kernels.LINE, dtype=torch.int64)
        self.tensor(kernels.RELAYS, counters)
        return True

    def tensor(self, field: int, tensor: Tensor) -> Tensor:
        """Pass a contiguous tensor."""
        self.kept.append(tensor)
        self.fields[field] = tensor.data_ptr()
        return tensor

    def parameter(self, field: int, tensor: Tensor | None) -> None:
        """Pass a tensor in the accumulation type, if there is one."""
        if tensor is None:
            return
        if tensor.dtype != self.dtype or not tensor.is_contiguous():
            tensor = tensor.to(self.dtype).contiguous()
        self.tensor(field, tensor)

    def rows(self, field: int, strides: int, tensor: Tensor) -> None:
        """Pass a `(batch, length, heads, head_dim)` tensor, whose strides go to three fields."""
        if tensor.dtype != self.stored:
            tensor = tensor.to(self.stored)
        tensor = self.tensor(field, _readable(tensor, merged=self.chunks.spans > 0))
        by_batch, by_row, by_head, _ = tensor.stride()
        self.fields[strides] = by_batch
        self.fields[strides + 1] = by_row
        self.fields[strides + 2] = by_head if self.heads > 1 else self.head_dim
        self.whole = self.whole and self.fields[strides + 2] == self.head_dim

    def run(
        self, kernel: Callable[..., None], splits: int, *, threads: int | None = None, traffic: int = 0
    ) -> None:
        """Run a kernel over `splits` runs of the chunks; it reads and writes `traffic` tensors like x."""
        threads = threads or self.threads
        # Channels are cut only where the sequences do not deal out evenly.
        blocks = threads // math.gcd(splits, threads) if splits < 4 * threads else 1
        blocks = self.blocks or max(1, min(blocks, self.channels // NARROWEST))
        # Vectors are whole and aligned.
        aligned = self.channels % (LANES * blocks) == 0 and self.head_dim % LANES == 0
        self.fields[kernels.TASK] = 0
        self.fields[kernels.SPLITS] = splits
        self.fields[kernels.BLOCKS] = blocks
        self.fields[kernels.STREAMS] = aligned and traffic * self.bytes > STREAMED
        parallel(compiled(kernel, self.stored), self.fields.buffer_info()[0], threads)


@lru_cache(maxsize=64)
def _dense(batch: int, length: int) -> _Sequences:
    sequences = np.arange(batch)
    return _Sequences(sequences, np.zeros_like(sequences), np.full_like(sequences, length))


def _packed(cu_seqlens: Tensor, length: int) -> _Sequences:
    return _offsets(cu_seqlens.to(torch.int64).numpy().tobytes(), length)


# All layers of a model are given the same offsets, forward and backward.
@lru_cache(maxsize=1)
def _offsets(cu_seqlens: bytes, length: int) -> _Sequences:
    """Checks the offsets too: in compiled graphs nobody has, and they address memory."""
    offsets = np.frombuffer(cu_seqlens, dtype=np.int64)
    if offsets[0] != 0 or offsets[-1] != length or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"cu_seqlens must rise from 0 to the length {length}, not {offsets.tolist()}")
    return _Sequences(np.zeros(len(offsets) - 1, dtype=np.int64), offsets[:-1], offsets[1:])


def _spans(sequences: _Sequences, channels: int) -> _Chunks:
    """Whole sequences, or where rows are narrow and many, chunks of spans."""
    length = sequences.end - sequences.begin
    # By its own length and width alone: the result of a sequence must not depend on others.
    cut = length >= (kernels.SPANS * kernels.SUMMED if channels < kernels.NARROW else math.inf)
    pieces = np.where(cut, np.clip(length // CHUNK_ROWS, 1, MOST_CHUNKS), 1)
    sequence = np.repeat(np.arange(len(length)), pieces)
    piece = np.arange(len(sequence)) - np.repeat(pieces.cumsum() - pieces, pieces)
    before = cut[sequence].cumsum() - 1
    begin = sequences.begin[sequence]
    table = np.empty((len(sequence), kernels.COLUMNS), dtype=np.int64)
    table[:, kernels.SEQUENCE] = sequence
    table[:, kernels.BATCH] = sequences.batch[sequence]
    table[:, kernels.BEGIN] = begin + piece * length[sequence] // pieces[sequence]
    table[:, kernels.END] = begin + (piece + 1) * length[sequence] // pieces[sequence]
    table[:, kernels.SLOT] = np.where(cut[sequence], before * kernels.SPANS, -1)
    table[:, kernels.FIRST] = piece == 0
    table[:, kernels.LAST] = piece == pieces[sequence] - 1
    return _Chunks(table, int(cut[sequence].sum()) * kernels.SPANS, table.ctypes.data)


def _relay(sequences: _Sequences, rows: int, reverse: bool) -> _Chunks:
    """Chunks of so many rows, in the order in which the scan comes to them, of all sequences in turn."""
    length = sequences.end - sequences.begin
    pieces = np.maximum(-(-length // rows), 1)
    sequence = np.repeat(np.arange(len(length)), pieces)
    piece = np.arange(len(sequence)) - np.repeat(pieces.cumsum() - pieces, pieces)
    order = np.lexsort((sequence, piece))
    sequence, piece = sequence[order], piece[order]
    begin, end = sequences.begin[sequence], sequences.end[sequence]
    table = np.empty((len(sequence), kernels.COLUMNS), dtype=np.int64)
    table[:, kernels.SEQUENCE] = sequence
    table[:, kernels.BATCH] = sequences.batch[sequence]
    table[:, kernels.BEGIN] = np.maximum(end - (piece + 1) * rows, begin) if reverse else begin + piece * rows
    table[:, kernels.END] = end - piece * rows if reverse else np.minimum(begin + (piece + 1) * rows, end)
    table[:, kernels.SLOT] = piece
    table[:, kernels.FIRST] = piece == 0
    table[:, kernels.LAST] = piece == pieces[sequence] - 1
    return _Chunks(table, 0, table.ctypes.data)


def _readable(tensor: Tensor, *, merged: bool) -> Tensor:
    """The tensor itself where its heads are contiguous, else a copy, no larger than the memory it has.

    With `merged` all heads of a row must lie together.
    """
    heads, head_dim = tensor.shape[2:]
    by_batch, by_row, by_head, by_channel = tensor.stride()
    whole = heads == 1 or by_head == head_dim
    if tensor.numel() == 0:
        return tensor
    if (head_dim == 1 or by_channel == 1) and (whole or (head_dim >= LANES and not merged)):
        return tensor
    # The gradient of a sum is one number seen from everywhere.
    narrow = tensor[: 1 if by_batch == 0 else None, : 1 if by_row == 0 else None]
    return narrow.contiguous().expand(tensor.shape)


scan = make_scan("numba", forward, backward)
