"""The scan on CPU at the speed of a copy: what calls the kernels of `mhesa.ops.numba_kernels`."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mhesa.ops import numba_kernels as kernels
from mhesa.ops.fused import Gradients, make_scan
from mhesa.ops.memory import fresh
from mhesa.ops.simd import STORED, compiled
from mhesa.ops.threads import available, parallel

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

Integers = npt.NDArray[np.int64]


class _Chunks(NamedTuple):
    """The table of chunks, `(count, kernels.COLUMNS)`, and the spans that they are cut into in all."""

    table: Integers
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
    """`(y, final_state)`, for plain tensors as `mhesa.ops.fused.make_scan` describes them."""
    call = _Call(x, alpha, decay, skip, initial_state, cu_seqlens, reverse)
    y = fresh(x.shape, x.dtype)
    final = call.tensor(kernels.FINAL, torch.empty(call.states, dtype=call.dtype))
    call.rows(kernels.X, kernels.X_BATCH, x)
    call.tensor(kernels.OUT, y)
    if call.spans:
        call.tensor(kernels.CARRIES, torch.empty(call.spans, call.channels, dtype=call.dtype))
        call.run(kernels.ends, call.chunks)
        call.run(kernels.chain, 1, threads=1)
    call.run(kernels.forward, call.chunks, traffic=2)
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
    groups = min(call.chunks, GROUPS)
    dx = fresh(x.shape, x.dtype)
    dinitial = call.tensor(kernels.DINITIAL, torch.empty(call.states, dtype=call.dtype))
    call.rows(kernels.X, kernels.X_BATCH, x)
    call.rows(kernels.DY, kernels.DY_BATCH, dy)
    call.tensor(kernels.OUT, dx)
    call.parameter(kernels.DFINAL, dfinal)
    call.tensor(kernels.TOTALS, torch.zeros(groups, 4, call.channels, dtype=torch.float64))
    dalpha = call.tensor(kernels.DALPHA, torch.empty(heads, dtype=call.dtype))
    ddecay = call.tensor(kernels.DDECAY, torch.empty(heads, dtype=call.dtype))
    dskip = call.tensor(kernels.DSKIP, torch.empty(heads, head_dim, dtype=call.dtype))
    if call.spans:
        carries = call.tensor(kernels.CARRIES, torch.empty(2, call.spans, call.channels, dtype=call.dtype))
        call.fields[kernels.PLANE] = carries.stride(0)
        call.run(kernels.backward_ends, call.chunks)
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
        self.bytes, self.elements, self.stored = x.nbytes, x.numel(), x.dtype
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if cu_seqlens is None:
            sequences, chunks = batch, _dense(batch, length, self.channels)
        else:
            sequences, chunks = cu_seqlens.shape[0] - 1, _packed(cu_seqlens, length, self.channels)
        self.states = (sequences, self.heads, self.head_dim)
        self.chunks, self.spans = len(chunks.table), chunks.spans
        self.kept: list[object] = [chunks]
        self.fields = array("q", bytes(8 * kernels.FIELDS))
        self.fields[kernels.CHUNKS] = chunks.address
        self.fields[kernels.COUNT] = self.chunks
        self.fields[kernels.LENGTH] = length
        self.fields[kernels.HEADS] = self.heads
        self.fields[kernels.HEAD_DIM] = self.head_dim
        self.fields[kernels.REVERSE] = reverse
        self.parameter(kernels.ALPHA, alpha)
        self.parameter(kernels.DECAY, decay)
        self.parameter(kernels.SKIP, skip)
        self.parameter(kernels.INITIAL, initial_state)

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
        tensor = self.tensor(field, _readable(tensor, merged=self.spans > 0))
        by_batch, by_row, by_head, _ = tensor.stride()
        self.fields[strides] = by_batch
        self.fields[strides + 1] = by_row
        self.fields[strides + 2] = by_head if self.heads > 1 else self.head_dim

    def run(
        self, kernel: Callable[..., None], splits: int, *, threads: int | None = None, traffic: int = 0
    ) -> None:
        """Run a kernel over `splits` runs of the chunks; it reads and writes `traffic` tensors like x."""
        if threads is None:
            threads = 1 if self.elements < PARALLEL else available()
        # Channels are cut only where the sequences do not deal out evenly.
        blocks = threads // math.gcd(splits, threads) if splits < 4 * threads else 1
        blocks = max(1, min(blocks, self.channels // NARROWEST))
        # Vectors are whole and aligned.
        aligned = self.channels % (kernels.LANES * blocks) == 0 and self.head_dim % kernels.LANES == 0
        self.fields[kernels.TASK] = 0
        self.fields[kernels.SPLITS] = splits
        self.fields[kernels.BLOCKS] = blocks
        self.fields[kernels.STREAMS] = aligned and traffic * self.bytes > STREAMED
        parallel(compiled(kernel, self.stored), self.fields.buffer_info()[0], threads)


@lru_cache(maxsize=64)
def _dense(batch: int, length: int, channels: int) -> _Chunks:
    sequences = np.arange(batch)
    return _cut(sequences, np.zeros_like(sequences), np.full_like(sequences, length), channels)


def _packed(cu_seqlens: Tensor, length: int, channels: int) -> _Chunks:
    """Checks the offsets too: in compiled graphs nobody has, and they address memory."""
    offsets = cu_seqlens.to(torch.int64).numpy()
    if offsets[0] != 0 or offsets[-1] != length or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"cu_seqlens must rise from 0 to the length {length}, not {offsets.tolist()}")
    return _cut(np.zeros(len(offsets) - 1, dtype=np.int64), offsets[:-1], offsets[1:], channels)


def _cut(batch: Integers, begin: Integers, end: Integers, channels: int) -> _Chunks:
    """The table of chunks of sequences, given where each is."""
    length = end - begin
    # By its own length and width alone: the result of a sequence must not depend on others.
    cut = length >= (kernels.SPANS * kernels.SUMMED if channels < kernels.NARROW else math.inf)
    pieces = np.where(cut, np.clip(length // CHUNK_ROWS, 1, MOST_CHUNKS), 1)
    sequence = np.repeat(np.arange(len(length)), pieces)
    piece = np.arange(len(sequence)) - np.repeat(pieces.cumsum() - pieces, pieces)
    before = cut[sequence].cumsum() - 1
    table = np.empty((len(sequence), kernels.COLUMNS), dtype=np.int64)
    table[:, kernels.SEQUENCE] = sequence
    table[:, kernels.BATCH] = batch[sequence]
    table[:, kernels.BEGIN] = begin[sequence] + piece * length[sequence] // pieces[sequence]
    table[:, kernels.END] = begin[sequence] + (piece + 1) * length[sequence] // pieces[sequence]
    table[:, kernels.SLOT] = np.where(cut[sequence], before * kernels.SPANS, -1)
    table[:, kernels.FIRST] = piece == 0
    table[:, kernels.LAST] = piece == pieces[sequence] - 1
    return _Chunks(table, int(cut[sequence].sum()) * kernels.SPANS, table.ctypes.data)


def _readable(tensor: Tensor, *, merged: bool) -> Tensor:
    """The tensor itself where its heads are contiguous, else a copy, no larger than the memory it has.

    With `merged` all heads of a row must lie together.
    """
    heads, head_dim = tensor.shape[2:]
    by_batch, by_row, by_head, by_channel = tensor.stride()
    whole = heads == 1 or by_head == head_dim
    if tensor.numel() == 0:
        return tensor
    if (head_dim == 1 or by_channel == 1) and (whole or (head_dim >= kernels.LANES and not merged)):
        return tensor
    # The gradient of a sum is one number seen from everywhere.
    narrow = tensor[: 1 if by_batch == 0 else None, : 1 if by_row == 0 else None]
    return narrow.contiguous().expand(tensor.shape)


scan = make_scan("numba", forward, backward)
