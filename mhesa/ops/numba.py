"""The scan on CPU: one pass over memory forward, one backward, at the speed of a copy.

A task is a few channels of a run of sequences; nothing in the arithmetic of a channel depends on how
the channels and sequences were dealt out, so that results are the same bit for bit whatever the batch,
the number of threads and their luck. Rows are read and written whole where the sequences alone keep the
threads busy; the state of a row stays in the innermost cache.

Threads: the kernels are plain native functions, run on the OpenMP threads that torch's own operators use
(`GOMP_parallel`), which sit warm on their cores between two operators. Numba's own layers will not do:
its OpenMP layer dies in a forked process, workqueue dies when two Python threads enter it, tbb is a
further package, and any second pool has to fight with torch's spinning threads for the cores. Where torch
comes with an OpenMP that lacks that entry, Python threads do the same work. A forked process has none of
its parent's threads and runs the kernels alone, so that it can never hang.

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

import numba.core.cgutils
import numba.extending
import numpy as np
import torch
from llvmlite import ir
from torch import Tensor

from mhesa.ops.fused import Gradients, make_scan
from mhesa.ops.memory import fresh

# Numba is annotated in part only.
jit: Any = numba.njit
cfunc: Any = numba.cfunc
types: Any = numba.types
cgutils: Any = numba.core.cgutils

# Channels whose state a task holds at a time: eight rows of fp32 fill half of a 32 KB cache.
WIDTH = 512
# Rows of scratch memory lie this far apart, not a power of two, or they would share cache sets and stall.
STRIDE = WIDTH + 64
# Channels that one vector instruction takes, or a few where vectors are shorter.
LANES = 16
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
X_BATCH, X_ROW, X_HEAD, DY_BATCH, DY_ROW, DY_HEAD, DALPHA, DDECAY, DSKIP, COUNT = range(20, 30)

# The rows of a task's scratch memory.
ROW_ALPHA, ROW_DECAY, ROW_SKIP, ROW_P, ROW_R, ROW_DALPHA, ROW_DDECAY, ROW_DSKIP = range(0, 8 * STRIDE, STRIDE)

_FLOAT, _HALF = ir.FloatType(), ir.HalfType()
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)


def _intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that writes the instructions for a call; the types it gets hold constants' values."""
    typed: Any = numba.extending.intrinsic
    return typed(prefer_literal=True)(function)


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
        rows = ir.ArrayType(context.get_value_type(wide), 8 * STRIDE)
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


class _Emitter:
    """Writes the arithmetic on `lanes` neighbouring channels as vector instructions.

    Explicit vectors and fused multiply-adds leave nothing to the mood of an optimiser: every channel is
    computed by the same instructions, alone or in a tile, whatever the layout.
    """

    def __init__(self, builder: Any, accumulation: Any, stored: Any, lanes: int) -> None:
        self.builder, self.stored, self.lanes = builder, stored, lanes
        self.double = accumulation == types.float64
        self.type = self.vector(ir.DoubleType() if self.double else _FLOAT)

    def vector(self, element: Any) -> Any:
        """The type of a tile of elements."""
        return element if self.lanes == 1 else ir.VectorType(element, self.lanes)

    def constant(self, element: Any, value: float) -> Any:
        """The same number in every lane."""
        return ir.Constant(self.vector(element), value if self.lanes == 1 else [value] * self.lanes)

    def address(self, pointer: Any, index: Any) -> Any:
        """Where a tile starts, `index` elements on."""
        element = pointer.type.pointee
        return self.builder.bitcast(self.builder.gep(pointer, [index]), self.vector(element).as_pointer())

    def load(self, pointer: Any, index: Any) -> Any:
        """A tile as it is stored; it need not be aligned as a vector is."""
        return self.builder.load(self.address(pointer, index), align=self.align(pointer))

    def prefetch(self, pointer: Any, index: Any, write: bool = False) -> None:
        """Ask for the memory of a tile; an address that does not exist does no harm."""
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        address = self.builder.bitcast(self.address(pointer, index), byte)
        # The last two: to keep it close, and that it is data.
        self.builder.call(function, [address, _I32(int(write)), _I32(3), _I32(1)])

    def store(self, value: Any, pointer: Any, index: Any) -> None:
        """Store a tile as it is."""
        self.builder.store(value, self.address(pointer, index), align=self.align(pointer))

    @staticmethod
    def align(pointer: Any) -> int:
        """The alignment of one element, in bytes."""
        return {_I16: 2, _FLOAT: 4}.get(pointer.type.pointee, 8)

    def widen(self, value: Any) -> Any:
        """From the stored to the accumulation type."""
        builder = self.builder
        if self.stored == types.uint16:
            bits = builder.shl(builder.zext(value, self.vector(_I32)), self.constant(_I32, 16))
            return builder.bitcast(bits, self.type)
        if self.stored == types.int16:
            return builder.fpext(builder.bitcast(value, self.vector(_HALF)), self.type)
        return value

    def narrow(self, value: Any) -> Any:
        """From the accumulation to the stored type, to the nearest, ties to even."""
        builder = self.builder
        if self.stored == types.uint16:
            bits = builder.bitcast(value, self.vector(_I32))
            odd = builder.and_(builder.lshr(bits, self.constant(_I32, 16)), self.constant(_I32, 1))
            bits = builder.add(builder.add(bits, self.constant(_I32, 0x7FFF)), odd)
            bits = builder.lshr(bits, self.constant(_I32, 16))
            nan = builder.fcmp_unordered("uno", value, value)
            bits = builder.select(nan, self.constant(_I32, 0x7FC0), bits)
            return builder.trunc(bits, self.vector(_I16))
        if self.stored == types.int16:
            return builder.bitcast(builder.fptrunc(value, self.vector(_HALF)), self.vector(_I16))
        return value

    def call(self, name: str, *args: Any) -> Any:
        """Call a function of LLVM's, such as `fma`, on tiles."""
        scalar = "f64" if self.double else "f32"
        name = f"llvm.{name}.{scalar if self.lanes == 1 else f'v{self.lanes}{scalar}'}"
        kind = ir.FunctionType(self.type, [self.type] * len(args))
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), args)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """`a * b + c`, rounded once."""
        return self.call("fma", a, b, c)

    def flush(self, value: Any) -> Any:
        """Zero for a subnormal: a carry that has decayed to nothing would slow down every later step."""
        element = ir.DoubleType() if self.double else _FLOAT
        least = self.constant(element, 2.0**-1022 if self.double else 2.0**-126)
        # An ordered comparison is false for NaN, which stays.
        small = self.builder.fcmp_ordered("<", self.call("fabs", value), least)
        return self.builder.select(small, self.constant(element, 0.0), value)


@_intrinsic
def _forward_tile(
    context: Any, x: Any, x_step: Any, out: Any, out_step: Any, row: Any, skips: Any, lanes: Any, steps: Any
) -> Any:
    """Scan `lanes` channels over `steps` rows, the carry held in registers."""
    if not (isinstance(lanes, types.IntegerLiteral) and isinstance(steps, types.IntegerLiteral)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x_0, x_step, out_0, out_step, scratch, skips, *_ = args
        emit = _Emitter(builder, row.dtype, x.dtype, lanes.literal_value)
        a, d, s, h = (emit.load(scratch, _I64(place)) for place in (ROW_ALPHA, ROW_DECAY, ROW_SKIP, ROW_P))
        for step in range(steps.literal_value):
            ahead = _I64(step + steps.literal_value)
            emit.prefetch(x_0, builder.mul(x_step, ahead))
            emit.prefetch(out_0, builder.mul(out_step, ahead), write=True)
            value = emit.widen(emit.load(x_0, builder.mul(x_step, _I64(step))))
            h = emit.flush(emit.fma(d, h, builder.fmul(a, value)))
            # Without a skip term nothing is added, not zero times x: that is NaN where x is infinite.
            y = builder.select(skips, emit.fma(s, value, h), h)
            emit.store(emit.narrow(y), out_0, builder.mul(out_step, _I64(step)))
        emit.store(h, scratch, _I64(ROW_P))
        return context.get_dummy_value()

    return types.void(x, types.int64, out, types.int64, row, types.boolean, lanes, steps), codegen


@_intrinsic
def _backward_tile(
    context: Any,
    x: Any,
    x_step: Any,
    dy: Any,
    dy_step: Any,
    out: Any,
    out_step: Any,
    row: Any,
    skips: Any,
    lanes: Any,
    steps: Any,
) -> Any:
    """Carry the gradient of `lanes` channels back over `steps` rows."""
    if not (isinstance(lanes, types.IntegerLiteral) and isinstance(steps, types.IntegerLiteral)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x_0, x_step, dy_0, dy_step, out_0, out_step, scratch, skips, *_ = args
        emit = _Emitter(builder, row.dtype, x.dtype, lanes.literal_value)
        a, d, s = (emit.load(scratch, _I64(place)) for place in (ROW_ALPHA, ROW_DECAY, ROW_SKIP))
        carries = (ROW_P, ROW_R, ROW_DALPHA, ROW_DDECAY, ROW_DSKIP)
        p, r, dalpha, ddecay, dskip = (emit.load(scratch, _I64(place)) for place in carries)
        for step in range(steps.literal_value):
            ahead = _I64(step + steps.literal_value)
            emit.prefetch(x_0, builder.mul(x_step, ahead))
            emit.prefetch(dy_0, builder.mul(dy_step, ahead))
            emit.prefetch(out_0, builder.mul(out_step, ahead), write=True)
            value = emit.widen(emit.load(x_0, builder.mul(x_step, _I64(step))))
            dvalue = emit.widen(emit.load(dy_0, builder.mul(dy_step, _I64(step))))
            g = builder.fadd(dvalue, p)
            dx = builder.fmul(a, g)
            dx = builder.select(skips, emit.fma(s, dvalue, dx), dx)
            emit.store(emit.narrow(dx), out_0, builder.mul(out_step, _I64(step)))
            dalpha, ddecay = emit.fma(g, value, dalpha), emit.fma(r, value, ddecay)
            dskip = emit.fma(dvalue, value, dskip)
            p, r = emit.flush(builder.fmul(d, g)), emit.flush(emit.fma(d, r, g))
        for carry, place in zip((p, r, dalpha, ddecay, dskip), carries, strict=True):
            emit.store(carry, scratch, _I64(place))
        return context.get_dummy_value()

    signature = types.void(
        x, types.int64, dy, types.int64, out, types.int64, row, types.boolean, lanes, steps
    )
    return signature, codegen


@jit
def _forward_row(x, x_step, out, out_step, row, skips, n):  # type: ignore[no-untyped-def]
    whole = n - n % LANES
    for i in range(0, whole, LANES):
        _forward_tile(_offset(x, i), x_step, _offset(out, i), out_step, _offset(row, i), skips, LANES, 1)
    for i in range(whole, n):
        _forward_tile(_offset(x, i), x_step, _offset(out, i), out_step, _offset(row, i), skips, 1, 1)


@jit
def _forward_rows(x, x_step, out, out_step, row, skips, n):  # type: ignore[no-untyped-def]
    whole = n - n % LANES
    for i in range(0, whole, LANES):
        _forward_tile(_offset(x, i), x_step, _offset(out, i), out_step, _offset(row, i), skips, LANES, 4)
    for i in range(whole, n):
        _forward_tile(_offset(x, i), x_step, _offset(out, i), out_step, _offset(row, i), skips, 1, 4)


@jit
def _backward_row(x, x_step, dy, dy_step, out, out_step, row, skips, n):  # type: ignore[no-untyped-def]
    whole = n - n % LANES
    for i in range(0, whole, LANES):
        x_i, dy_i, out_i, part = _offset(x, i), _offset(dy, i), _offset(out, i), _offset(row, i)
        _backward_tile(x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, LANES, 1)
    for i in range(whole, n):
        x_i, dy_i, out_i, part = _offset(x, i), _offset(dy, i), _offset(out, i), _offset(row, i)
        _backward_tile(x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, 1, 1)


@jit
def _backward_rows(x, x_step, dy, dy_step, out, out_step, row, skips, n):  # type: ignore[no-untyped-def]
    whole = n - n % LANES
    for i in range(0, whole, LANES):
        x_i, dy_i, out_i, part = _offset(x, i), _offset(dy, i), _offset(out, i), _offset(row, i)
        _backward_tile(x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, LANES, 4)
    for i in range(whole, n):
        x_i, dy_i, out_i, part = _offset(x, i), _offset(dy, i), _offset(out, i), _offset(row, i)
        _backward_tile(x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, 1, 4)


def _forward(data):  # type: ignore[no-untyped-def]
    p = _fields(data)
    row = _scratch(data)
    x, out = _pointer(p[X], data), _pointer(p[OUT], data)
    alpha, decay, skip = _pointer(p[ALPHA], row), _pointer(p[DECAY], row), _pointer(p[SKIP], row)
    initial, final, offsets = _pointer(p[INITIAL], row), _pointer(p[FINAL], row), _pointer(p[OFFSETS], p)
    length, head_dim, channels = p[LENGTH], p[HEAD_DIM], p[HEADS] * p[HEAD_DIM]
    whole = p[X_HEAD] == head_dim
    skips = p[SKIP] != 0
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
                x_step, out_step, t = p[X_ROW], channels, begin
                if p[REVERSE]:
                    x_step, out_step, t = -x_step, -out_step, end - 1
                x_t = _offset(x, batch * p[X_BATCH] + t * p[X_ROW])
                out_t = _offset(out, (batch * length + t) * channels + start)
                left = end - begin
                while left > 0:
                    rows = 4 if left >= 4 else 1
                    done = 0
                    while done < n:
                        head, within = (start + done) // head_dim, (start + done) % head_dim
                        piece = n if whole else min(n - done, head_dim - within)
                        x_i, out_i = _offset(x_t, head * p[X_HEAD] + within), _offset(out_t, done)
                        part = _offset(row, done)
                        if rows == 4:
                            _forward_rows(x_i, x_step, out_i, out_step, part, skips, piece)
                        else:
                            _forward_row(x_i, x_step, out_i, out_step, part, skips, piece)
                        done += piece
                    x_t, out_t = _offset(x_t, rows * x_step), _offset(out_t, rows * out_step)
                    left -= rows
                for i in range(n):
                    final[state + i] = row[ROW_P + i]


def _backward(data):  # type: ignore[no-untyped-def]
    p = _fields(data)
    row = _scratch(data)
    x, dy, out = _pointer(p[X], data), _pointer(p[DY], data), _pointer(p[OUT], data)
    alpha, decay, skip = _pointer(p[ALPHA], row), _pointer(p[DECAY], row), _pointer(p[SKIP], row)
    initial, dfinal, dinitial = (
        _pointer(p[INITIAL], row),
        _pointer(p[DFINAL], row),
        _pointer(p[DINITIAL], row),
    )
    offsets, totals = _pointer(p[OFFSETS], p), _sums(p[TOTALS])
    length, head_dim, channels = p[LENGTH], p[HEAD_DIM], p[HEADS] * p[HEAD_DIM]
    whole = p[X_HEAD] == head_dim and p[DY_HEAD] == head_dim
    skips = p[SKIP] != 0
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
                x_step, dy_step, out_step, t = -p[X_ROW], -p[DY_ROW], -channels, end - 1
                if p[REVERSE]:
                    x_step, dy_step, out_step, t = -x_step, -dy_step, -out_step, begin
                x_t = _offset(x, batch * p[X_BATCH] + t * p[X_ROW])
                dy_t = _offset(dy, batch * p[DY_BATCH] + t * p[DY_ROW])
                out_t = _offset(out, (batch * length + t) * channels + start)
                left, summed = end - begin, 0
                while left > 0:
                    rows = 4 if left >= 4 else 1
                    done = 0
                    while done < n:
                        head, within = (start + done) // head_dim, (start + done) % head_dim
                        piece = n if whole else min(n - done, head_dim - within)
                        x_i = _offset(x_t, head * p[X_HEAD] + within)
                        dy_i = _offset(dy_t, head * p[DY_HEAD] + within)
                        out_i, part = _offset(out_t, done), _offset(row, done)
                        if rows == 4:
                            _backward_rows(x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, piece)
                        else:
                            _backward_row(x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, piece)
                        done += piece
                    x_t, dy_t = _offset(x_t, rows * x_step), _offset(dy_t, rows * dy_step)
                    out_t = _offset(out_t, rows * out_step)
                    left -= rows
                    summed += rows
                    if summed >= ROWS or left == 0:
                        for i in range(n):
                            total[i] += row[ROW_DALPHA + i]
                            total[channels + i] += row[ROW_DDECAY + i]
                            total[2 * channels + i] += row[ROW_DSKIP + i]
                            row[ROW_DALPHA + i] = row[ROW_DDECAY + i] = row[ROW_DSKIP + i] = 0
                        summed = 0
                for i in range(n):
                    dinitial[state + i] = row[ROW_P + i]
                    if p[INITIAL]:
                        # A double each, or the product would round to fp32 first.
                        total[3 * channels + i] += np.float64(initial[state + i]) * np.float64(row[ROW_R + i])


def _reduce(data):  # type: ignore[no-untyped-def]
    p = _fields(data)
    row = _scratch(data)
    alpha, dalpha, ddecay = _pointer(p[ALPHA], row), _pointer(p[DALPHA], row), _pointer(p[DDECAY], row)
    dskip, totals = _pointer(p[DSKIP], row), _sums(p[TOTALS])
    channels = p[HEADS] * p[HEAD_DIM]
    for head in range(p[HEADS]):
        by_alpha, by_decay, by_initial = 0.0, 0.0, 0.0
        for channel in range(head * p[HEAD_DIM], (head + 1) * p[HEAD_DIM]):
            by_skip = 0.0
            for split in range(p[SPLITS]):
                total = _offset(totals, split * 4 * channels + channel)
                by_alpha += total[0]
                by_decay += total[channels]
                by_skip += total[2 * channels]
                by_initial += total[3 * channels]
            dskip[channel] = by_skip
        dalpha[head], ddecay[head] = by_alpha, alpha[head] * by_decay + by_initial


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
    call.run(_backward, splits=groups)
    _Threads.run(_compiled(_reduce, x.dtype), call.data.ctypes.data, 1)
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
        threads = 1 if _Threads.forked or self.elements < PARALLEL else torch.get_num_threads()
        # Channels are cut only where the sequences do not deal out evenly.
        blocks = threads // math.gcd(splits, threads) if splits < 4 * threads else 1
        blocks = max(1, min(blocks, channels // NARROWEST))
        self.fields[SPLITS], self.fields[BLOCKS] = splits, blocks
        self.data = np.array(self.fields, dtype=np.int64)
        _Threads.run(_compiled(kernel, self.stored), self.data.ctypes.data, threads)


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


@cache
def _compiled(kernel: Callable[..., None], dtype: torch.dtype) -> int:
    """The address of a kernel for tensors of `dtype`, from the cache on disk if it is there."""
    signature = types.void(types.CPointer(STORED[dtype]))
    try:
        function = cfunc(signature, cache=True, error_model="numpy")(kernel)
    except (OSError, RuntimeError):  # numba finds no folder to write to, or cannot write to it
        function = cfunc(signature, error_model="numpy")(kernel)
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
