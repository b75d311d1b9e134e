"""The scan on CPU: one pass over memory forward, one backward, at the speed of a copy.

A task is a few channels of a run of sequences; nothing in the arithmetic of a channel depends on how
the channels and sequences were dealt out, so that results are the same bit for bit whatever the batch,
the number of threads and their luck. Rows are read and written whole where the sequences alone keep the
threads busy; the state of a row stays in the innermost cache.

Threads: the kernels are plain native functions, run on the OpenMP threads that torch's own operators use
(`GOMP_parallel`), which sit warm on their cores between two operators. Numba's layers were measured
against it and lose: its OpenMP layer dies in a forked process, workqueue dies when two Python threads
enter it, tbb is a further package, and any second pool fights with torch's spinning threads for the
cores. Where torch comes with an OpenMP that lacks that entry, Python threads do the same work. A forked
process has none of its parent's threads and runs the kernels alone, so that it can never hang.

Numba's arrays are left aside for addresses: a call then compiles nothing for a new layout or an absent
argument, and the compiler need not prove that outputs and inputs do not overlap.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from mhesa.ops.fused import Gradients, make_scan

# Channels whose state a task holds at a time: eight rows of fp32 fill half of a 32 KB cache.
WIDTH = 512
# Narrower blocks of channels are read in pieces too short to be fast.
NARROWEST = 64
# Gradients that sum over sequences do so in at most this many fixed groups, added in order.
GROUPS = 16
# After so many rows, sums in the accumulation type are handed over to fp64.
ROWS = 256
# A scan of fewer elements is done before a second thread has woken.
PARALLEL = 1 << 14

# 16-bit floats travel as integers: numba has no arithmetic for them on CPU.
STORED: dict[torch.dtype, Any] = {
    torch.float32: types.float32,
    torch.float64: types.float64,
    torch.bfloat16: types.uint16,
    torch.float16: types.int16,
}

# What a kernel is told, as one array of 64-bit integers; an address of 0 is an absent tensor.
TASK, X, DY, OUT, ALPHA, DECAY, SKIP, INITIAL, FINAL, DFINAL, DINITIAL, OFFSETS, TOTALS = range(13)
SEQUENCES, LENGTH, HEADS, HEAD_DIM, REVERSE, SPLITS, BLOCKS = range(13, 20)
X_BATCH, X_ROW, X_HEAD, DY_BATCH, DY_ROW, DY_HEAD, COUNT = range(20, 27)

# The rows of a task's scratch memory.
ROW_ALPHA, ROW_DECAY, ROW_SKIP, ROW_P, ROW_R, ROW_DALPHA, ROW_DDECAY, ROW_DSKIP = range(0, 8 * WIDTH, WIDTH)

_FLOAT, _HALF = ir.FloatType(), ir.HalfType()
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)


def _intrinsic(function: Callable[..., Any]) -> Any:
    return intrinsic(function)


def _accumulation(stored: Any) -> Any:
    return types.float64 if stored == types.float64 else types.float32


@_intrinsic
def _pointer(context: Any, address: Any, like: Any) -> Any:
    """The address as a pointer of the type of `like`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(like))

    return like(types.int64, like), codegen


@_intrinsic
def _fields(context: Any, data: Any) -> Any:
    """What a kernel is told, behind a pointer whose type says what the tensors hold."""
    integers = types.CPointer(types.int64)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(integers))

    return integers(data), codegen


@_intrinsic
def _sums(context: Any, address: Any) -> Any:
    """The address as a pointer to fp64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float64)(types.int64), codegen


@_intrinsic
def _scratch(context: Any, like: Any) -> Any:
    """Eight rows on the stack, in the accumulation type: memory that the compiler knows nobody shares."""
    wide = _accumulation(like.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows = ir.ArrayType(context.get_value_type(wide), 8 * WIDTH)
        return builder.gep(cgutils.alloca_once(builder, rows), [_I32(0), _I32(0)])

    return types.CPointer(wide)(like), codegen


@_intrinsic
def _offset(context: Any, pointer: Any, index: Any) -> Any:
    """The pointer, `index` elements on."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.int64), codegen


@_intrinsic
def _next(context: Any, counter: Any) -> Any:
    """Take a task: what the counter held before one was added, by all threads at once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], _I64(1), "monotonic")

    return types.int64(counter), codegen


@_intrinsic
def _load(context: Any, pointer: Any, index: Any) -> Any:
    """An element in the accumulation type."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(builder.gep(args[0], [args[1]]))
        if pointer.dtype == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(value, _I32), _I32(16)), _FLOAT)
        if pointer.dtype == types.int16:
            return builder.fpext(builder.bitcast(value, _HALF), _FLOAT)
        return value

    return _accumulation(pointer.dtype)(pointer, types.int64), codegen


@_intrinsic
def _store(context: Any, pointer: Any, index: Any, value: Any) -> Any:
    """Round to the element's type, to nearest even, and store."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = args[2]
        if pointer.dtype == types.uint16:
            bits = builder.bitcast(value, _I32)
            odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
            rounded = builder.lshr(builder.add(builder.add(bits, _I32(0x7FFF)), odd), _I32(16))
            nan = builder.fcmp_unordered("uno", value, value)
            value = builder.trunc(builder.select(nan, _I32(0x7FC0), rounded), _I16)
        elif pointer.dtype == types.int16:
            value = builder.bitcast(builder.fptrunc(value, _HALF), _I16)
        builder.store(value, builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(pointer, types.int64, _accumulation(pointer.dtype)), codegen


@_intrinsic
def _flush(context: Any, value: Any) -> Any:
    """Zero for a subnormal: a carry that has decayed to nothing would slow down every later step."""
    least = 2.0**-1022 if value == types.float64 else 2.0**-126

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = context.get_value_type(value)
        size = builder.call(builder.module.declare_intrinsic("llvm.fabs", [kind]), args)
        # An ordered comparison is false for NaN, which stays.
        return builder.select(builder.fcmp_ordered("<", size, kind(least)), kind(0.0), args[0])

    return value(value), codegen


def _forward(data):  # type: ignore[no-untyped-def]
    p = _fields(data)
    row = _scratch(data)
    x, out = _pointer(p[X], data), _pointer(p[OUT], data)
    alpha, decay, skip = _pointer(p[ALPHA], row), _pointer(p[DECAY], row), _pointer(p[SKIP], row)
    initial, final, offsets = _pointer(p[INITIAL], row), _pointer(p[FINAL], row), _pointer(p[OFFSETS], p)
    length, head_dim, channels = p[LENGTH], p[HEAD_DIM], p[HEADS] * p[HEAD_DIM]
    whole = p[X_HEAD] == head_dim
    while True:
        task = _next(p)
        if task >= p[SPLITS] * p[BLOCKS]:
            return
        block, split = task // p[SPLITS], task % p[SPLITS]
        low, high = block * channels // p[BLOCKS], (block + 1) * channels // p[BLOCKS]
        for start in range(low, high, WIDTH):
            n = min(WIDTH, high - start)
            for i in range(n):
                head = (start + i) // head_dim
                row[ROW_ALPHA + i], row[ROW_DECAY + i] = alpha[head], decay[head]
                row[ROW_SKIP + i] = skip[start + i] if p[SKIP] else 0
            first, last = split * p[SEQUENCES] // p[SPLITS], (split + 1) * p[SEQUENCES] // p[SPLITS]
            for sequence in range(first, last):
                state = sequence * channels + start
                for i in range(n):
                    row[ROW_P + i] = initial[state + i] if p[INITIAL] else 0
                batch, begin, end = sequence, 0, length
                if p[OFFSETS]:
                    batch, begin, end = 0, offsets[sequence], offsets[sequence + 1]
                for step in range(begin, end):
                    t = begin + end - 1 - step if p[REVERSE] else step
                    x_t = _offset(x, batch * p[X_BATCH] + t * p[X_ROW])
                    out_t = _offset(out, (batch * length + t) * channels + start)
                    done = 0
                    while done < n:
                        head, within = (start + done) // head_dim, (start + done) % head_dim
                        piece = n if whole else min(n - done, head_dim - within)
                        x_piece = _offset(x_t, head * p[X_HEAD] + within)
                        out_piece = _offset(out_t, done)
                        part = _offset(row, done)
                        for i in range(piece):
                            value = _load(x_piece, i)
                            h = _flush(part[ROW_DECAY + i] * part[ROW_P + i] + part[ROW_ALPHA + i] * value)
                            part[ROW_P + i] = h
                            _store(out_piece, i, h + part[ROW_SKIP + i] * value)
                        done += piece
                for i in range(n):
                    final[state + i] = row[ROW_P + i]


def _backward(data):  # type: ignore[no-untyped-def]
    p = _fields(data)
    row = _scratch(data)
    x, dy, out = _pointer(p[X], data), _pointer(p[DY], data), _pointer(p[OUT], data)
    alpha, decay, skip = _pointer(p[ALPHA], row), _pointer(p[DECAY], row), _pointer(p[SKIP], row)
    initial, dfinal, dinitial = _pointer(p[INITIAL], row), _pointer(p[DFINAL], row), _pointer(p[DINITIAL], row)
    offsets, totals = _pointer(p[OFFSETS], p), _sums(p[TOTALS])
    length, head_dim, channels = p[LENGTH], p[HEAD_DIM], p[HEADS] * p[HEAD_DIM]
    whole = p[X_HEAD] == head_dim and p[DY_HEAD] == head_dim
    while True:
        task = _next(p)
        if task >= p[SPLITS] * p[BLOCKS]:
            return
        block, split = task // p[SPLITS], task % p[SPLITS]
        low, high = block * channels // p[BLOCKS], (block + 1) * channels // p[BLOCKS]
        for start in range(low, high, WIDTH):
            n = min(WIDTH, high - start)
            for i in range(n):
                head = (start + i) // head_dim
                row[ROW_ALPHA + i], row[ROW_DECAY + i] = alpha[head], decay[head]
                row[ROW_SKIP + i] = skip[start + i] if p[SKIP] else 0
                row[ROW_DALPHA + i] = row[ROW_DDECAY + i] = row[ROW_DSKIP + i] = 0
            total = _offset(totals, split * 4 * channels + start)
            first, last = split * p[SEQUENCES] // p[SPLITS], (split + 1) * p[SEQUENCES] // p[SPLITS]
            for sequence in range(first, last):
                state = sequence * channels + start
                for i in range(n):
                    row[ROW_P + i], row[ROW_R + i] = dfinal[state + i], 0
                batch, begin, end = sequence, 0, length
                if p[OFFSETS]:
                    batch, begin, end = 0, offsets[sequence], offsets[sequence + 1]
                for step in range(begin, end):
                    t = step if p[REVERSE] else begin + end - 1 - step
                    x_t = _offset(x, batch * p[X_BATCH] + t * p[X_ROW])
                    dy_t = _offset(dy, batch * p[DY_BATCH] + t * p[DY_ROW])
                    out_t = _offset(out, (batch * length + t) * channels + start)
                    done = 0
                    while done < n:
                        head, within = (start + done) // head_dim, (start + done) % head_dim
                        piece = n if whole else min(n - done, head_dim - within)
                        x_piece = _offset(x_t, head * p[X_HEAD] + within)
                        dy_piece = _offset(dy_t, head * p[DY_HEAD] + within)
                        out_piece = _offset(out_t, done)
                        part = _offset(row, done)
                        for i in range(piece):
                            value, dvalue = _load(x_piece, i), _load(dy_piece, i)
                            d, r = part[ROW_DECAY + i], part[ROW_R + i]
                            g = dvalue + part[ROW_P + i]
                            part[ROW_DALPHA + i] += g * value
                            part[ROW_DDECAY + i] += r * value
                            part[ROW_DSKIP + i] += dvalue * value
                            part[ROW_R + i] = _flush(g + d * r)
                            part[ROW_P + i] = _flush(d * g)
                            _store(out_piece, i, part[ROW_ALPHA + i] * g + part[ROW_SKIP + i] * dvalue)
                        done += piece
                    if (step - begin) % ROWS == ROWS - 1 or step == end - 1:
                        for i in range(n):
                            total[i] += row[ROW_DALPHA + i]
                            total[channels + i] += row[ROW_DDECAY + i]
                            total[2 * channels + i] += row[ROW_DSKIP + i]
                            row[ROW_DALPHA + i] = row[ROW_DDECAY + i] = row[ROW_DSKIP + i] = 0
                for i in range(n):
                    dinitial[state + i] = row[ROW_P + i]
                    if p[INITIAL]:
                        # A double each, or the product would round to fp32 first.
                        total[3 * channels + i] += np.float64(initial[state + i]) * np.float64(row[ROW_R + i])


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
    y = torch.empty(x.shape, dtype=x.dtype)
    final = call.tensor(FINAL, torch.empty(call.states, dtype=call.dtype))
    call.rows(X, X_BATCH, x)
    call.tensor(OUT, y)
    call.run(_forward, splits=call.states[0])
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
    dx = torch.empty(x.shape, dtype=x.dtype)
    dinitial = torch.empty(call.states, dtype=call.dtype)
    totals = torch.zeros(groups, 4, heads, head_dim, dtype=torch.float64)
    call.rows(X, X_BATCH, x)
    call.rows(DY, DY_BATCH, dy.to(x.dtype))
    call.tensor(OUT, dx)
    call.tensor(DFINAL, dfinal.to(call.dtype).contiguous())
    call.tensor(DINITIAL, dinitial)
    call.tensor(TOTALS, totals)
    call.run(_backward, splits=groups)
    # A slow sum, but one of fixed order: torch would choose it by the number of threads.
    dalpha, ddecay, dskip, from_initial = totals.numpy().sum(0)
    ddecay = alpha.double().numpy() * ddecay.sum(1) + from_initial.sum(1)
    dalpha, ddecay, dskip = (
        torch.from_numpy(total).to(call.dtype) for total in (dalpha.sum(1), ddecay, dskip)
    )
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
        if splits == 0 or channels == 0:
            return
        threads = 1 if _Threads.forked or self.elements < PARALLEL else torch.get_num_threads()
        # Channels are cut only where the sequences do not deal out evenly.
        blocks = threads // math.gcd(splits, threads) if splits < 4 * threads else 1
        blocks = max(1, min(blocks, channels // NARROWEST))
        self.fields[SPLITS], self.fields[BLOCKS] = splits, blocks
        data = np.array(self.fields, dtype=np.int64)
        _Threads.run(_compiled(kernel, self.stored), data.ctypes.data, threads)


def _offsets(cu_seqlens: Tensor, length: int) -> Tensor:
    """The offsets as the kernels read them; checked, since in a compiled graph nobody has, and they address memory."""
    offsets = cu_seqlens.to(torch.int64).contiguous()
    values = offsets.numpy()
    if values[0] != 0 or values[-1] != length or (values[1:] < values[:-1]).any():
        raise ValueError(f"cu_seqlens must rise from 0 to the length {length}, not {values.tolist()}")
    return offsets


def _readable(tensor: Tensor) -> Tensor:
    """The tensor itself where heads are contiguous, and otherwise a copy that is no larger than its memory."""
    heads, head_dim = tensor.shape[2:]
    by_batch, by_row, by_head, by_channel = tensor.stride()
    merged = heads == 1 or by_head == head_dim
    if tensor.numel() == 0 or (head_dim == 1 or by_channel == 1) and (merged or head_dim >= 16):
        return tensor
    # The gradient of a sum is one number seen from everywhere.
    narrow = tensor[: 1 if by_batch == 0 else None, : 1 if by_row == 0 else None]
    return narrow.contiguous().expand(tensor.shape)


@cache
def _compiled(kernel: Callable[..., None], dtype: torch.dtype) -> int:
    """The address of a kernel for tensors of `dtype`, from the cache on disk if it is there."""
    build = lambda cached: numba.cfunc(  # noqa: E731
        types.void(types.CPointer(STORED[dtype])), cache=cached, fastmath={"contract"}, error_model="numpy"
    )(kernel)
    try:
        function = build(True)
    except (OSError, RuntimeError):  # numba finds no folder to write to, or cannot write to it
        function = build(False)
    _KEPT.append(function)
    return int(function.address)


# Compiled functions, which live as long as somebody holds them.
_KEPT: list[Any] = []


class _Threads:
    """Runs a native function on all of torch's threads at once."""

    forked = False
    signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    @staticmethod
    def run(function: int, data: int, threads: int) -> None:
        """Call `function(data)` on `threads` threads, this one included, and wait for them all."""
        if threads == 1:
            _Threads.signature(function)(data)
        elif (parallel := _openmp()) is not None:
            parallel(function, data, threads, 0)
        else:
            call = _Threads.signature(function)
            others = [_pool().submit(call, data) for _ in range(threads - 1)]
            call(data)
            for other in others:
                other.result()


@cache
def _openmp() -> Any:
    """`GOMP_parallel` of the OpenMP library that torch has loaded, if that has it."""
    if os.name != "posix":
        return None
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if parallel is not None:
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
    return parallel


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="mhesa")


def _after_fork() -> None:
    _Threads.forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

scan = make_scan("numba", forward, backward)
