"""The kernels of the scan on CPU: one pass over memory forward, one backward.

A task is a few channels of a run of sequences; nothing in the arithmetic of a channel depends on how
the channels and sequences were dealt out, so that results are the same bit for bit whatever the batch,
the number of threads and their luck. Rows are read and written whole where the sequences alone keep the
threads busy; the state of a row stays in the innermost cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mhesa.ops.simd import (
    I64,
    Emitter,
    doubles,
    fields,
    intrinsic,
    jit,
    offset,
    pointer,
    scratch,
    take,
    types,
)

# Channels whose state a task holds at a time: eight rows of fp32 fill half of a 32 KB cache.
WIDTH = 512
# Rows of scratch memory lie this far apart, not a power of two, or they would share cache sets and stall.
STRIDE = WIDTH + 64
# Channels that one vector instruction takes, or a few where vectors are shorter.
LANES = 16
SCRATCH = 8 * STRIDE
# After so many rows, sums in the accumulation type are handed over to fp64.
ROWS = 256
# What a kernel is told, as one array of 64-bit integers; an address of 0 is an absent tensor.
TASK, X, DY, OUT, ALPHA, DECAY, SKIP, INITIAL, FINAL, DFINAL, DINITIAL, OFFSETS, TOTALS = range(13)
SEQUENCES, LENGTH, HEADS, HEAD_DIM, REVERSE, SPLITS, BLOCKS = range(13, 20)
X_BATCH, X_ROW, X_HEAD, DY_BATCH, DY_ROW, DY_HEAD, DALPHA, DDECAY, DSKIP, COUNT = range(20, 30)

# The rows of a task's scratch memory.
ROW_ALPHA, ROW_DECAY, ROW_SKIP, ROW_P, ROW_R, ROW_DALPHA, ROW_DDECAY, ROW_DSKIP = range(0, 8 * STRIDE, STRIDE)


@intrinsic
def _forward_tile(
    context: Any, x: Any, x_step: Any, out: Any, out_step: Any, row: Any, skips: Any, lanes: Any, steps: Any
) -> Any:
    """Scan `lanes` channels over `steps` rows, the carry held in registers."""
    if not (isinstance(lanes, types.IntegerLiteral) and isinstance(steps, types.IntegerLiteral)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x_0, x_step, out_0, out_step, scratch, skips, *_ = args
        emit = Emitter(builder, x.dtype, lanes.literal_value)
        a, d, s, h = (emit.load(scratch, I64(place)) for place in (ROW_ALPHA, ROW_DECAY, ROW_SKIP, ROW_P))
        for step in range(steps.literal_value):
            ahead = I64(step + steps.literal_value)
            emit.prefetch(x_0, builder.mul(x_step, ahead))
            emit.prefetch(out_0, builder.mul(out_step, ahead), write=True)
            value = emit.widen(emit.load(x_0, builder.mul(x_step, I64(step))))
            h = emit.flush(emit.fma(d, h, builder.fmul(a, value)))
            # Without a skip term nothing is added, not zero times x: that is NaN where x is infinite.
            y = builder.select(skips, emit.fma(s, value, h), h)
            emit.store(emit.narrow(y), out_0, builder.mul(out_step, I64(step)))
        emit.store(h, scratch, I64(ROW_P))
        return context.get_dummy_value()

    return types.void(x, types.int64, out, types.int64, row, types.boolean, lanes, steps), codegen


@intrinsic
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
        emit = Emitter(builder, x.dtype, lanes.literal_value)
        a, d, s = (emit.load(scratch, I64(place)) for place in (ROW_ALPHA, ROW_DECAY, ROW_SKIP))
        carries = (ROW_P, ROW_R, ROW_DALPHA, ROW_DDECAY, ROW_DSKIP)
        p, r, dalpha, ddecay, dskip = (emit.load(scratch, I64(place)) for place in carries)
        for step in range(steps.literal_value):
            ahead = I64(step + steps.literal_value)
            emit.prefetch(x_0, builder.mul(x_step, ahead))
            emit.prefetch(dy_0, builder.mul(dy_step, ahead))
            emit.prefetch(out_0, builder.mul(out_step, ahead), write=True)
            value = emit.widen(emit.load(x_0, builder.mul(x_step, I64(step))))
            dvalue = emit.widen(emit.load(dy_0, builder.mul(dy_step, I64(step))))
            g = builder.fadd(dvalue, p)
            dx = builder.fmul(a, g)
            dx = builder.select(skips, emit.fma(s, dvalue, dx), dx)
            emit.store(emit.narrow(dx), out_0, builder.mul(out_step, I64(step)))
            dalpha, ddecay = emit.fma(g, value, dalpha), emit.fma(r, value, ddecay)
            dskip = emit.fma(dvalue, value, dskip)
            p, r = emit.flush(builder.fmul(d, g)), emit.flush(emit.fma(d, r, g))
        for carry, place in zip((p, r, dalpha, ddecay, dskip), carries, strict=True):
            emit.store(carry, scratch, I64(place))
        return context.get_dummy_value()

    signature = types.void(
        x, types.int64, dy, types.int64, out, types.int64, row, types.boolean, lanes, steps
    )
    return signature, codegen


@jit
def _forward_row(x, x_step, out, out_step, row, skips, n):  # type: ignore[no-untyped-def]
    whole = n - n % LANES
    for i in range(0, whole, LANES):
        _forward_tile(offset(x, i), x_step, offset(out, i), out_step, offset(row, i), skips, LANES, 1)
    for i in range(whole, n):
        _forward_tile(offset(x, i), x_step, offset(out, i), out_step, offset(row, i), skips, 1, 1)


@jit
def _forward_rows(x, x_step, out, out_step, row, skips, n):  # type: ignore[no-untyped-def]
    whole = n - n % LANES
    for i in range(0, whole, LANES):
        _forward_tile(offset(x, i), x_step, offset(out, i), out_step, offset(row, i), skips, LANES, 4)
    for i in range(whole, n):
        _forward_tile(offset(x, i), x_step, offset(out, i), out_step, offset(row, i), skips, 1, 4)


@jit
def _backward_row(x, x_step, dy, dy_step, out, out_step, row, skips, n):  # type: ignore[no-untyped-def]
    whole = n - n % LANES
    for i in range(0, whole, LANES):
        x_i, dy_i, out_i, part = offset(x, i), offset(dy, i), offset(out, i), offset(row, i)
        _backward_tile(x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, LANES, 1)
    for i in range(whole, n):
        x_i, dy_i, out_i, part = offset(x, i), offset(dy, i), offset(out, i), offset(row, i)
        _backward_tile(x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, 1, 1)


@jit
def _backward_rows(x, x_step, dy, dy_step, out, out_step, row, skips, n):  # type: ignore[no-untyped-def]
    whole = n - n % LANES
    for i in range(0, whole, LANES):
        x_i, dy_i, out_i, part = offset(x, i), offset(dy, i), offset(out, i), offset(row, i)
        _backward_tile(x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, LANES, 4)
    for i in range(whole, n):
        x_i, dy_i, out_i, part = offset(x, i), offset(dy, i), offset(out, i), offset(row, i)
        _backward_tile(x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, 1, 4)


def forward(data):  # type: ignore[no-untyped-def]
    """Scan the sequences and channels of one task after another, until none is left."""
    p = fields(data)
    row = scratch(data, SCRATCH)
    x, out = pointer(p[X], data), pointer(p[OUT], data)
    alpha, decay, skip = pointer(p[ALPHA], row), pointer(p[DECAY], row), pointer(p[SKIP], row)
    initial, final, offsets = pointer(p[INITIAL], row), pointer(p[FINAL], row), pointer(p[OFFSETS], p)
    length, head_dim, channels = p[LENGTH], p[HEAD_DIM], p[HEADS] * p[HEAD_DIM]
    whole = p[X_HEAD] == head_dim
    skips = p[SKIP] != 0
    while True:
        task = take(p)
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
                x_t = offset(x, batch * p[X_BATCH] + t * p[X_ROW])
                out_t = offset(out, (batch * length + t) * channels + start)
                left = end - begin
                while left > 0:
                    rows = 4 if left >= 4 else 1
                    done = 0
                    while done < n:
                        head, within = (start + done) // head_dim, (start + done) % head_dim
                        piece = n if whole else min(n - done, head_dim - within)
                        x_i, out_i = offset(x_t, head * p[X_HEAD] + within), offset(out_t, done)
                        part = offset(row, done)
                        if rows == 4:
                            _forward_rows(x_i, x_step, out_i, out_step, part, skips, piece)
                        else:
                            _forward_row(x_i, x_step, out_i, out_step, part, skips, piece)
                        done += piece
                    x_t, out_t = offset(x_t, rows * x_step), offset(out_t, rows * out_step)
                    left -= rows
                for i in range(n):
                    final[state + i] = row[ROW_P + i]


def backward(data):  # type: ignore[no-untyped-def]
    """Carry the gradients back, likewise; sums go to `TOTALS`."""
    p = fields(data)
    row = scratch(data, SCRATCH)
    x, dy, out = pointer(p[X], data), pointer(p[DY], data), pointer(p[OUT], data)
    alpha, decay, skip = pointer(p[ALPHA], row), pointer(p[DECAY], row), pointer(p[SKIP], row)
    initial, dfinal, dinitial = (
        pointer(p[INITIAL], row),
        pointer(p[DFINAL], row),
        pointer(p[DINITIAL], row),
    )
    offsets, totals = pointer(p[OFFSETS], p), doubles(p[TOTALS])
    length, head_dim, channels = p[LENGTH], p[HEAD_DIM], p[HEADS] * p[HEAD_DIM]
    whole = p[X_HEAD] == head_dim and p[DY_HEAD] == head_dim
    skips = p[SKIP] != 0
    while True:
        task = take(p)
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
            total = offset(totals, split * 4 * channels + start)
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
                x_t = offset(x, batch * p[X_BATCH] + t * p[X_ROW])
                dy_t = offset(dy, batch * p[DY_BATCH] + t * p[DY_ROW])
                out_t = offset(out, (batch * length + t) * channels + start)
                left, summed = end - begin, 0
                while left > 0:
                    rows = 4 if left >= 4 else 1
                    done = 0
                    while done < n:
                        head, within = (start + done) // head_dim, (start + done) % head_dim
                        piece = n if whole else min(n - done, head_dim - within)
                        x_i = offset(x_t, head * p[X_HEAD] + within)
                        dy_i = offset(dy_t, head * p[DY_HEAD] + within)
                        out_i, part = offset(out_t, done), offset(row, done)
                        if rows == 4:
                            _backward_rows(x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, piece)
                        else:
                            _backward_row(x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, piece)
                        done += piece
                    x_t, dy_t = offset(x_t, rows * x_step), offset(dy_t, rows * dy_step)
                    out_t = offset(out_t, rows * out_step)
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


def reduce(data):  # type: ignore[no-untyped-def]
    """Add up the sums of all tasks, in order, and in fp64."""
    p = fields(data)
    row = scratch(data, SCRATCH)
    alpha, dalpha, ddecay = pointer(p[ALPHA], row), pointer(p[DALPHA], row), pointer(p[DDECAY], row)
    dskip, totals = pointer(p[DSKIP], row), doubles(p[TOTALS])
    channels = p[HEADS] * p[HEAD_DIM]
    for head in range(p[HEADS]):
        by_alpha, by_decay, by_initial = 0.0, 0.0, 0.0
        for channel in range(head * p[HEAD_DIM], (head + 1) * p[HEAD_DIM]):
            by_skip = 0.0
            for split in range(p[SPLITS]):
                total = offset(totals, split * 4 * channels + channel)
                by_alpha += total[0]
                by_decay += total[channels]
                by_skip += total[2 * channels]
                by_initial += total[3 * channels]
            dskip[channel] = by_skip
        dalpha[head], ddecay[head] = by_alpha, alpha[head] * by_decay + by_initial
