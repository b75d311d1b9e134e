"""The scan on CPU at the speed of a copy: what calls the kernels of `mhesa.ops.numba_kernels`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mhesa.ops import numba_kernels as kernels
from mhesa.ops.fused import Gradients, make_scan
from mhesa.ops.memory import fresh
from mhesa.ops.numba_kernels import (
    ALPHA,
    BLOCKS,
    COUNT,
    DALPHA,
    DDECAY,
    DECAY,
    DFINAL,
    DINITIAL,
    DSKIP,
    DY,
    DY_BATCH,
    FINAL,
    INITIAL,
    OFFSETS,
    OUT,
    REVERSE,
    SEQUENCES,
    SKIP,
    SPLITS,
    TOTALS,
    X_BATCH,
    X,
)
from mhesa.ops.simd import STORED, compiled
from mhesa.ops.threads import available, parallel

# Narrower blocks of channels are read in pieces too short to be fast.
NARROWEST = 64
# Gradients that sum over sequences do so in at most this many fixed groups, added in order.
GROUPS = 16
# A scan of fewer elements is done before a second thread has woken.
PARALLEL = 1 << 14


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
    final = call.tensor(FINAL, torch.empty(call.states, dtype=call.dtype))
    call.rows(X, X_BATCH, x)
    call.tensor(OUT, y)
    call.run(kernels.forward, splits=call.states[0])
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
    call = _Call(x, alpha, decay, skip, initial_state, cu_seqlens, reverse)
    heads, head_dim = x.shape[2:]
    groups = min(call.states[0], GROUPS)
    dx = fresh(x.shape, x.dtype)
    dinitial = torch.empty(call.states, dtype=call.dtype)
    totals = torch.zeros(groups, 4, heads, head_dim, dtype=torch.float64)
    call.rows(X, X_BATCH, x)
    call.rows(DY, DY_BATCH, dy.to(x.dtype))
    call.tensor(OUT, dx)
    call.tensor(DFINAL, dfinal.to(call.dtype).contiguous())
    call.tensor(DINITIAL, dinitial)
    call.tensor(TOTALS, totals)
    dalpha, ddecay, dskip = (
        call.tensor(field, torch.empty(shape, dtype=call.dtype))
        for field, shape in ((DALPHA, heads), (DDECAY, heads), (DSKIP, (heads, head_dim)))
    )
    call.run(kernels.backward, splits=groups)
    parallel(compiled(kernels.reduce, x.dtype), call.data.ctypes.data, 1)
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
        batch, self.length, self.heads, self.head_dim = x.shape
        self.stored = x.dtype
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.states = (sequences, self.heads, self.head_dim)
        self.kept: list[Tensor] = []
        self.fields = [0] * COUNT
        for field, tensor in ((ALPHA, alpha), (DECAY, decay), (SKIP, skip), (INITIAL, initial_state)):
            if tensor is not None:
                self.tensor(field, tensor.to(self.dtype).contiguous())
        if cu_seqlens is not None:
            self.tensor(OFFSETS, _offsets(cu_seqlens, self.length))
        self.fields[SEQUENCES : REVERSE + 1] = sequences, self.length, self.heads, self.head_dim, int(reverse)
        self.elements = x.numel()

    def tensor(self, field: int, tensor: Tensor) -> Tensor:
        """Pass a contiguous tensor."""
        self.kept.append(tensor)
        self.fields[field] = tensor.data_ptr()
        return tensor

    def rows(self, field: int, strides: int, tensor: Tensor) -> None:
        """Pass a `(batch, length, heads, head_dim)` tensor, whose strides go to three fields."""
        tensor = self.tensor(field, _readable(tensor))
        by_batch, by_row, by_head, _ = tensor.stride()
        self.fields[strides : strides + 3] = by_batch, by_row, by_head if self.heads > 1 else self.head_dim

    def run(self, kernel: Callable[..., None], splits: int) -> None:
        """Run a kernel over `splits` runs of the sequences."""
        channels = self.heads * self.head_dim
        threads = 1 if self.elements < PARALLEL else available()
        # Channels are cut only where the sequences do not deal out evenly.
        blocks = threads // math.gcd(splits, threads) if splits < 4 * threads else 1
        blocks = max(1, min(blocks, channels // NARROWEST))
        self.fields[SPLITS], self.fields[BLOCKS] = splits, blocks
        self.data = np.array(self.fields, dtype=np.int64)
        parallel(compiled(kernel, self.stored), self.data.ctypes.data, threads)


def _offsets(cu_seqlens: Tensor, length: int) -> Tensor:
    """The offsets as kernels read them, checked: in compiled graphs nobody has, and they address memory."""
    offsets = cu_seqlens.to(torch.int64).contiguous()
    values = offsets.numpy()
    if values[0] != 0 or values[-1] != length or (values[1:] < values[:-1]).any():
        raise ValueError(f"cu_seqlens must rise from 0 to the length {length}, not {values.tolist()}")
    return offsets


def _readable(tensor: Tensor) -> Tensor:
    """The tensor itself where its heads are contiguous, else a copy, no larger than the memory it has."""
    heads, head_dim = tensor.shape[2:]
    by_batch, by_row, by_head, by_channel = tensor.stride()
    merged = heads == 1 or by_head == head_dim
    if tensor.numel() == 0 or ((head_dim == 1 or by_channel == 1) and (merged or head_dim >= 16)):
        return tensor
    # The gradient of a sum is one number seen from everywhere.
    narrow = tensor[: 1 if by_batch == 0 else None, : 1 if by_row == 0 else None]
    return narrow.contiguous().expand(tensor.shape)


scan = make_scan("numba", forward, backward)
