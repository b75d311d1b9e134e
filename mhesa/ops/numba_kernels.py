"""The kernels of the scan on CPU: one pass over memory forward, one backward.

A task is a few channels of a run of sequences; nothing in the arithmetic of a channel depends on how
the channels and sequences were dealt out, so that results are the same bit for bit whatever the batch,
the number of threads and their luck. Rows are read and written whole, one after another, as a copy
does: the state of a row stays in the innermost cache.

Rows of few channels would leave a core waiting for one addition after another. Their sequences are cut
into chunks, the tasks, and each chunk into `SPANS` spans that advance together. Three kernels then run:
`ends` scans every span from zero, `chain` makes of the spans' ends what enters each, by

    h[t + n] = decay ** n * h[t] + end

and `forward` scans every span from there. How a sequence is cut depends on its own length and width.

The backward pass needs no state of the forward pass: against the direction of the scan it carries `p`,
the gradient that enters a state from its future, and `r`, the derivative of that with respect to the decay:

    g = dy + p;  dx = alpha * g + skip * dy;  r' = g + decay * r;  p' = decay * g
    dalpha = sum g * x;  ddecay = alpha * sum r * x + initial_state * r[end];  dskip = sum dy * x
"""

# Kernels are numba's language: types are found when they are compiled.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import numpy as np

from mhesa.ops.simd import (
    I64,
    Emitter,
    doubles,
    fence,
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
SCRATCH = 8 * STRIDE
# Channels that one vector instruction takes, or a few where vectors are shorter.
LANES, HALF = 16, 8
# Rows that the backward pass takes at a time: its eight rows of scratch are more traffic than the tensors.
ROWS = 4
# After so many rows, sums in the accumulation type are handed over to fp64.
SUMMED = 256
# Rows narrower than this are scanned in spans,
NARROW = 64
# so many at a time: enough to hide the latency of one, and few enough for `WIDTH`.
SPANS = 8
# Above zero, for the carry of an infinite state.
LEAST = 2.0**-1022

# What a kernel is told, as one array of 64-bit integers; an address of 0 is an absent tensor.
TASK, X, DY, OUT, ALPHA, DECAY, SKIP, INITIAL, FINAL, DFINAL, DINITIAL, TOTALS, DALPHA, DDECAY, DSKIP = range(
    15
)
CHUNKS, CARRIES, PLANE, COUNT, LENGTH, HEADS, HEAD_DIM, REVERSE, SPLITS, BLOCKS, STREAMS = range(15, 26)
X_BATCH, X_ROW, X_HEAD, DY_BATCH, DY_ROW, DY_HEAD, FIELDS = range(26, 33)

# The columns of the table of chunks. Whole sequences have no slot among the carries, -1; the others have
# `SPANS` from there on. The last two say whether the chunk is the first and the last of its sequence.
SEQUENCE, BATCH, BEGIN, END, SLOT, FIRST, LAST, COLUMNS = range(8)

# The rows of a task's scratch memory.
ROW_ALPHA, ROW_DECAY, ROW_SKIP, ROW_P, ROW_R, ROW_DALPHA, ROW_DDECAY, ROW_DSKIP = range(0, 8 * STRIDE, STRIDE)


@intrinsic
def _forward_tile(
    context: Any,
    x: Any,
    x_step: Any,
    out: Any,
    out_step: Any,
    scratch: Any,
    skips: Any,
    streams: Any,
    writes: Any,
    lanes: Any,
    rows: Any,
) -> Any:
    """Scan `lanes` channels over `rows` rows, the state in registers; without `writes` that alone."""
    if not all(isinstance(constant, types.IntegerLiteral) for constant in (writes, lanes, rows)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x_0, x_step, out_0, out_step, row, skips, streams, *_ = args
        emit = Emitter(builder, x.dtype, lanes.literal_value)
        a, d, s, h = (emit.load(row, I64(place)) for place in (ROW_ALPHA, ROW_DECAY, ROW_SKIP, ROW_P))
        for step in range(rows.literal_value):
            value = emit.widen(emit.load(x_0, builder.mul(x_step, I64(step))))
            h = emit.flush(emit.fma(d, h, builder.fmul(a, value)))
            if writes.literal_value:
                # Without a skip term nothing is added, not zero times x: that is NaN where x is infinite.
                y = builder.select(skips, emit.fma(s, value, h), h)
                emit.stream(emit.narrow(y), out_0, builder.mul(out_step, I64(step)), streams)
        emit.store(h, row, I64(ROW_P))
        return context.get_dummy_value()

    flags = (types.boolean, types.boolean)
    return types.void(x, types.int64, out, types.int64, scratch, *flags, writes, lanes, rows), codegen


@intrinsic
def _backward_tile(
    context: Any,
    x: Any,
    x_step: Any,
    dy: Any,
    dy_step: Any,
    out: Any,
    out_step: Any,
    scratch: Any,
    skips: Any,
    streams: Any,
    lanes: Any,
    rows: Any,
) -> Any:
    """Carry the gradient of `lanes` channels back over `rows` rows, in registers."""
    if not (isinstance(lanes, types.IntegerLiteral) and isinstance(rows, types.IntegerLiteral)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x_0, x_step, dy_0, dy_step, out_0, out_step, row, skips, streams, *_ = args
        emit = Emitter(builder, x.dtype, lanes.literal_value)
        a, d, s = (emit.load(row, I64(place)) for place in (ROW_ALPHA, ROW_DECAY, ROW_SKIP))
        carries = (ROW_P, ROW_R, ROW_DALPHA, ROW_DDECAY, ROW_DSKIP)
        p, r, dalpha, ddecay, dskip = (emit.load(row, I64(place)) for place in carries)
        for step in range(rows.literal_value):
            value = emit.widen(emit.load(x_0, builder.mul(x_step, I64(step))))
            dvalue = emit.widen(emit.load(dy_0, builder.mul(dy_step, I64(step))))
            g = builder.fadd(dvalue, p)
            dx = builder.fmul(a, g)
            dx = builder.select(skips, emit.fma(s, dvalue, dx), dx)
            emit.stream(emit.narrow(dx), out_0, builder.mul(out_step, I64(step)), streams)
            dalpha, ddecay = emit.fma(g, value, dalpha), emit.fma(r, value, ddecay)
            dskip = emit.fma(dvalue, value, dskip)
            p, r = emit.flush(builder.fmul(d, g)), emit.flush(emit.fma(d, r, g))
        for carry, place in zip((p, r, dalpha, ddecay, dskip), carries, strict=True):
            emit.store(carry, row, I64(place))
        return context.get_dummy_value()

    flags = (types.boolean, types.boolean)
    steps = (x, types.int64, dy, types.int64, out, types.int64)
    return types.void(*steps, scratch, *flags, lanes, rows), codegen


@intrinsic
def _backward_ends_tile(context: Any, dy: Any, dy_step: Any, scratch: Any, lanes: Any, rows: Any) -> Any:
    """Carry `p` and `r` of `lanes` channels back over `rows` rows, and nothing else."""
    if not (isinstance(lanes, types.IntegerLiteral) and isinstance(rows, types.IntegerLiteral)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        dy_0, dy_step, row, *_ = args
        emit = Emitter(builder, dy.dtype, lanes.literal_value)
        d, p, r = (emit.load(row, I64(place)) for place in (ROW_DECAY, ROW_P, ROW_R))
        for step in range(rows.literal_value):
            g = builder.fadd(emit.widen(emit.load(dy_0, builder.mul(dy_step, I64(step)))), p)
            p, r = emit.flush(builder.fmul(d, g)), emit.flush(emit.fma(d, r, g))
        emit.store(p, row, I64(ROW_P))
        emit.store(r, row, I64(ROW_R))
        return context.get_dummy_value()

    return types.void(dy, types.int64, scratch, lanes, rows), codegen


@intrinsic
def _prefetch(context: Any, x: Any, index: Any) -> Any:
    """Ask for `ROWS` vectors from `index` on."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emitter(builder, x.dtype, LANES)
        for line in range(0, ROWS * LANES, 64 // emit.bytes):
            emit.prefetch(args[0], builder.add(args[1], I64(line)))
        return context.get_dummy_value()

    return types.void(x, types.int64), codegen


# Each walks along rows in tiles of `LANES` channels, of half as many, and single ones. They are made for a
# number of rows at a time, which must be a constant where the instructions are written.


def _forward_walk(rows):
    @jit
    def walk(x, x_step, out, out_step, row, skips, streams, n):
        i = 0
        while n - i >= LANES:
            x_i, out_i, part = offset(x, i), offset(out, i), offset(row, i)
            _forward_tile(x_i, x_step, out_i, out_step, part, skips, streams, 1, LANES, rows)
            i += LANES
        if n - i >= HALF:
            x_i, out_i, part = offset(x, i), offset(out, i), offset(row, i)
            _forward_tile(x_i, x_step, out_i, out_step, part, skips, streams, 1, HALF, rows)
            i += HALF
        while i < n:
            x_i, out_i, part = offset(x, i), offset(out, i), offset(row, i)
            _forward_tile(x_i, x_step, out_i, out_step, part, skips, streams, 1, 1, rows)
            i += 1

    return walk


def _ends_walk(rows):
    @jit
    def walk(x, x_step, row, n):
        i = 0
        while n - i >= LANES:
            _forward_tile(offset(x, i), x_step, x, 0, offset(row, i), False, False, 0, LANES, rows)
            i += LANES
        if n - i >= HALF:
            _forward_tile(offset(x, i), x_step, x, 0, offset(row, i), False, False, 0, HALF, rows)
            i += HALF
        while i < n:
            _forward_tile(offset(x, i), x_step, x, 0, offset(row, i), False, False, 0, 1, rows)
            i += 1

    return walk


def _backward_ends_walk(rows):
    @jit
    def walk(dy, dy_step, row, n):
        i = 0
        while n - i >= LANES:
            _backward_ends_tile(offset(dy, i), dy_step, offset(row, i), LANES, rows)
            i += LANES
        if n - i >= HALF:
            _backward_ends_tile(offset(dy, i), dy_step, offset(row, i), HALF, rows)
            i += HALF
        while i < n:
            _backward_ends_tile(offset(dy, i), dy_step, offset(row, i), 1, rows)
            i += 1

    return walk


def _backward_walk(rows):
    @jit
    def walk(x, x_step, dy, dy_step, out, out_step, row, skips, streams, n):
        # The next rows are asked for in the order of memory, which columns of several rows are not.
        x_ahead, dy_ahead, ahead = offset(x, rows * x_step), offset(dy, rows * dy_step), 0
        i = 0
        while n - i >= LANES:
            if rows == ROWS:
                _prefetch(x_ahead, ahead)
                _prefetch(dy_ahead, ahead)
                ahead += ROWS * LANES
                if ahead >= n:
                    x_ahead, dy_ahead, ahead = offset(x_ahead, x_step), offset(dy_ahead, dy_step), 0
            x_i, dy_i, out_i, part = offset(x, i), offset(dy, i), offset(out, i), offset(row, i)
            _backward_tile(x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, streams, LANES, rows)
            i += LANES
        if n - i >= HALF:
            x_i, dy_i, out_i, part = offset(x, i), offset(dy, i), offset(out, i), offset(row, i)
            _backward_tile(x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, streams, HALF, rows)
            i += HALF
        while i < n:
            x_i, dy_i, out_i, part = offset(x, i), offset(dy, i), offset(out, i), offset(row, i)
            _backward_tile(x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, streams, 1, rows)
            i += 1

    return walk


_forward_row, _forward_rows = _forward_walk(1), _forward_walk(ROWS)
_ends_row, _ends_rows = _ends_walk(1), _ends_walk(ROWS)
_backward_row, _backward_rows = _backward_walk(1), _backward_walk(ROWS)
_backward_ends_row, _backward_ends_rows = _backward_ends_walk(1), _backward_ends_walk(ROWS)


@jit
def _load_rates(p, row, alpha, decay, skip, start, n):
    """Fill the constant rows for `n` channels from `start` on, once for every span."""
    for span in range(SPANS if p[CARRIES] else 1):
        for i in range(n):
            at, channel = span * n + i, start + i
            row[ROW_ALPHA + at] = alpha[channel // p[HEAD_DIM]]
            row[ROW_DECAY + at] = decay[channel // p[HEAD_DIM]]
            row[ROW_SKIP + at] = skip[channel] if p[SKIP] else 0


@jit
def _row_of(p, chunk, rows, longer, span, step):
    """The row that a span takes in a step: the first `longer` spans have `rows + 1` rows, others `rows`."""
    if p[REVERSE]:
        return chunk[BEGIN] + (span + 1) * rows + min(span + 1, longer) - 1 - step
    return chunk[BEGIN] + span * rows + min(span, longer) + step


def forward(data):
    """Scan the chunks and channels of one task after another, until none is left."""
    p = fields(data)
    row = scratch(data, SCRATCH)
    x, out = pointer(p[X], data), pointer(p[OUT], data)
    alpha, decay, skip = pointer(p[ALPHA], row), pointer(p[DECAY], row), pointer(p[SKIP], row)
    initial, final, carries = pointer(p[INITIAL], row), pointer(p[FINAL], row), pointer(p[CARRIES], row)
    chunks = pointer(p[CHUNKS], p)
    head_dim, channels = p[HEAD_DIM], p[HEADS] * p[HEAD_DIM]
    whole = p[X_HEAD] == head_dim
    skips, streams = p[SKIP] != 0, p[STREAMS] != 0
    sign = -1 if p[REVERSE] else 1
    x_step, out_step = sign * p[X_ROW], sign * channels
    while True:
        task = take(p)
        if task >= p[SPLITS] * p[BLOCKS]:
            break
        block, split = task // p[SPLITS], task % p[SPLITS]
        low, high = block * channels // p[BLOCKS], (block + 1) * channels // p[BLOCKS]
        for start in range(low, high, WIDTH):
            n = min(WIDTH, high - start)
            _load_rates(p, row, alpha, decay, skip, start, n)
            for index in range(split * p[COUNT] // p[SPLITS], (split + 1) * p[COUNT] // p[SPLITS]):
                chunk = offset(chunks, index * COLUMNS)
                state = chunk[SEQUENCE] * channels + start
                spans = 1 if chunk[SLOT] < 0 else SPANS
                for i in range(spans * n):
                    if chunk[SLOT] >= 0:
                        row[ROW_P + i] = carries[chunk[SLOT] * channels + i]
                    else:
                        row[ROW_P + i] = initial[state + i] if p[INITIAL] else 0
                rows, longer = (chunk[END] - chunk[BEGIN]) // spans, (chunk[END] - chunk[BEGIN]) % spans
                steps, step = rows + (1 if longer else 0), 0
                while step < steps:
                    # One row at a time is read and written as a copy does; spans are not in order anyway.
                    taken = ROWS if spans > 1 and rows - step >= ROWS else 1
                    for span in range(spans if step < rows else longer):
                        t = _row_of(p, chunk, rows, longer, span, step)
                        x_t = offset(x, chunk[BATCH] * p[X_BATCH] + t * p[X_ROW] + start)
                        out_t = offset(out, (chunk[BATCH] * p[LENGTH] + t) * channels + start)
                        done = 0
                        while done < n:
                            x_i, out_i = offset(x_t, done), offset(out_t, done)
                            part, piece = offset(row, span * n + done), n
                            if not whole:
                                head, within = (start + done) // head_dim, (start + done) % head_dim
                                x_i = offset(x_i, head * (p[X_HEAD] - head_dim))
                                piece = min(n - done, head_dim - within)
                            if taken == ROWS:
                                _forward_rows(x_i, x_step, out_i, out_step, part, skips, streams, piece)
                            else:
                                _forward_row(x_i, x_step, out_i, out_step, part, skips, streams, piece)
                            done += piece
                    step += taken
                if chunk[FIRST] if p[REVERSE] else chunk[LAST]:
                    last = 0 if p[REVERSE] else (spans - 1) * n
                    for i in range(n):
                        final[state + i] = row[ROW_P + last + i]
    fence()


def ends(data):
    """Scan every span of rows of few channels from zero; its end goes to `CARRIES`."""
    p = fields(data)
    row = scratch(data, SCRATCH)
    x, carries, chunks = pointer(p[X], data), pointer(p[CARRIES], row), pointer(p[CHUNKS], p)
    alpha, decay = pointer(p[ALPHA], row), pointer(p[DECAY], row)
    x_step = -p[X_ROW] if p[REVERSE] else p[X_ROW]
    n = p[HEADS] * p[HEAD_DIM]
    _load_rates(p, row, alpha, decay, alpha, 0, n)
    while True:
        index = take(p)
        if index >= p[COUNT]:
            break
        chunk = offset(chunks, index * COLUMNS)
        if chunk[SLOT] >= 0:
            for i in range(SPANS * n):
                row[ROW_P + i] = 0
            rows, longer = (chunk[END] - chunk[BEGIN]) // SPANS, (chunk[END] - chunk[BEGIN]) % SPANS
            steps, step = rows + (1 if longer else 0), 0
            while step < steps:
                taken = ROWS if rows - step >= ROWS else 1
                for span in range(SPANS if step < rows else longer):
                    t = _row_of(p, chunk, rows, longer, span, step)
                    x_t = offset(x, chunk[BATCH] * p[X_BATCH] + t * p[X_ROW])
                    if taken == ROWS:
                        _ends_rows(x_t, x_step, offset(row, span * n), n)
                    else:
                        _ends_row(x_t, x_step, offset(row, span * n), n)
                step += taken
            for i in range(SPANS * n):
                carries[chunk[SLOT] * n + i] = row[ROW_P + i]


def backward_ends(data):
    """The same of the backward pass: `p`, and in a second plane `r`."""
    p = fields(data)
    row = scratch(data, SCRATCH)
    dy, carries, chunks = pointer(p[DY], data), pointer(p[CARRIES], row), pointer(p[CHUNKS], p)
    alpha, decay = pointer(p[ALPHA], row), pointer(p[DECAY], row)
    dy_step = -p[DY_ROW] if p[REVERSE] else p[DY_ROW]
    n = p[HEADS] * p[HEAD_DIM]
    _load_rates(p, row, alpha, decay, alpha, 0, n)
    while True:
        index = take(p)
        if index >= p[COUNT]:
            break
        chunk = offset(chunks, index * COLUMNS)
        if chunk[SLOT] >= 0:
            for i in range(SPANS * n):
                row[ROW_P + i] = row[ROW_R + i] = 0
            rows, longer = (chunk[END] - chunk[BEGIN]) // SPANS, (chunk[END] - chunk[BEGIN]) % SPANS
            steps, step = rows + (1 if longer else 0), 0
            while step < steps:
                taken = ROWS if rows - step >= ROWS else 1
                for span in range(SPANS if step < rows else longer):
                    t = _row_of(p, chunk, rows, longer, span, step)
                    dy_t = offset(dy, chunk[BATCH] * p[DY_BATCH] + t * p[DY_ROW])
                    if taken == ROWS:
                        _backward_ends_rows(dy_t, dy_step, offset(row, span * n), n)
                    else:
                        _backward_ends_row(dy_t, dy_step, offset(row, span * n), n)
                step += taken
            for i in range(SPANS * n):
                carries[chunk[SLOT] * n + i] = row[ROW_P + i]
                carries[p[PLANE] + chunk[SLOT] * n + i] = row[ROW_R + i]


@jit
def _across(carry, power, decay):
    """What `power`, of the decay, leaves of a carry."""
    if carry == 0:
        return carry  # though the power be infinite
    if power == 0 and decay != 0:
        power = LEAST  # an infinite carry stays
    return power * carry


def chain(data):
    """Make of the spans' ends, in place, what enters each; of `p` and `r` where there is a second plane."""
    p = fields(data)
    row = scratch(data, SCRATCH)
    carries, chunks = pointer(p[CARRIES], row), pointer(p[CHUNKS], p)
    decay, initial = pointer(p[DECAY], row), pointer(p[DFINAL] if p[PLANE] else p[INITIAL], row)
    channels = p[HEADS] * p[HEAD_DIM]
    for channel in range(channels):
        d = np.float64(decay[channel // p[HEAD_DIM]])
        state, slope_state = 0.0, 0.0
        for index in range(p[COUNT]):
            chunk = offset(chunks, (p[COUNT] - 1 - index if p[REVERSE] else index) * COLUMNS)
            if chunk[SLOT] < 0:
                continue
            if chunk[LAST] if p[REVERSE] else chunk[FIRST]:
                state, slope_state = 0.0, 0.0
                if p[DFINAL] if p[PLANE] else p[INITIAL]:
                    state = np.float64(initial[chunk[SEQUENCE] * channels + channel])
            rows, longer = (chunk[END] - chunk[BEGIN]) // SPANS, (chunk[END] - chunk[BEGIN]) % SPANS
            before = d ** np.float64(rows - 1)
            for step in range(SPANS):
                span = SPANS - 1 - step if p[REVERSE] else step
                longer_by = 1 if span < longer else 0
                n, previous = rows + longer_by, before * d if longer_by else before
                carry = offset(carries, (chunk[SLOT] + span) * channels + channel)
                end = np.float64(carry[0])
                carry[0] = state
                if p[PLANE]:
                    slope_end = np.float64(carry[p[PLANE]])
                    carry[p[PLANE]] = slope_state
                    slope_state = _across(slope_state, previous * d, d) + slope_end
                    slope_state += _across(state, n * previous, d)
                state = _across(state, previous * d, d) + end


def backward(data):
    """Carry the gradients back; sums go to `TOTALS`, those of a run of chunks together."""
    p = fields(data)
    row = scratch(data, SCRATCH)
    x, dy, out = pointer(p[X], data), pointer(p[DY], data), pointer(p[OUT], data)
    alpha, decay, skip = pointer(p[ALPHA], row), pointer(p[DECAY], row), pointer(p[SKIP], row)
    initial, carries = pointer(p[INITIAL], row), pointer(p[CARRIES], row)
    dfinal, dinitial = pointer(p[DFINAL], row), pointer(p[DINITIAL], row)
    chunks, totals = pointer(p[CHUNKS], p), doubles(p[TOTALS])
    head_dim, channels = p[HEAD_DIM], p[HEADS] * p[HEAD_DIM]
    whole = p[X_HEAD] == head_dim and p[DY_HEAD] == head_dim
    skips, streams = p[SKIP] != 0, p[STREAMS] != 0
    sign = -1 if p[REVERSE] else 1
    x_step, dy_step, out_step = sign * p[X_ROW], sign * p[DY_ROW], sign * channels
    while True:
        task = take(p)
        if task >= p[SPLITS] * p[BLOCKS]:
            break
        block, split = task // p[SPLITS], task % p[SPLITS]
        low, high = block * channels // p[BLOCKS], (block + 1) * channels // p[BLOCKS]
        for start in range(low, high, WIDTH):
            n = min(WIDTH, high - start)
            _load_rates(p, row, alpha, decay, skip, start, n)
            total = offset(totals, split * 4 * channels + start)
            for index in range(split * p[COUNT] // p[SPLITS], (split + 1) * p[COUNT] // p[SPLITS]):
                chunk = offset(chunks, index * COLUMNS)
                state = chunk[SEQUENCE] * channels + start
                spans = 1 if chunk[SLOT] < 0 else SPANS
                for i in range(spans * n):
                    if chunk[SLOT] >= 0:
                        row[ROW_P + i] = carries[chunk[SLOT] * channels + i]
                        row[ROW_R + i] = carries[p[PLANE] + chunk[SLOT] * channels + i]
                    else:
                        row[ROW_P + i], row[ROW_R + i] = dfinal[state + i], 0
                    row[ROW_DALPHA + i] = row[ROW_DDECAY + i] = row[ROW_DSKIP + i] = 0
                rows, longer = (chunk[END] - chunk[BEGIN]) // spans, (chunk[END] - chunk[BEGIN]) % spans
                steps, step = rows + (1 if longer else 0), 0
                while step < steps:
                    taken = ROWS if rows - step >= ROWS else 1
                    for span in range(spans if step < rows else longer):
                        t = _row_of(p, chunk, rows, longer, span, step)
                        x_t = offset(x, chunk[BATCH] * p[X_BATCH] + t * p[X_ROW] + start)
                        dy_t = offset(dy, chunk[BATCH] * p[DY_BATCH] + t * p[DY_ROW] + start)
                        out_t = offset(out, (chunk[BATCH] * p[LENGTH] + t) * channels + start)
                        done = 0
                        while done < n:
                            x_i, dy_i = offset(x_t, done), offset(dy_t, done)
                            out_i, part, piece = offset(out_t, done), offset(row, span * n + done), n
                            if not whole:
                                head, within = (start + done) // head_dim, (start + done) % head_dim
                                x_i = offset(x_i, head * (p[X_HEAD] - head_dim))
                                dy_i = offset(dy_i, head * (p[DY_HEAD] - head_dim))
                                piece = min(n - done, head_dim - within)
                            if taken == ROWS:
                                _backward_rows(
                                    x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, streams, piece
                                )
                            else:
                                _backward_row(
                                    x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, streams, piece
                                )
                            done += piece
                    step += taken
                    if step % SUMMED < taken or step == steps:
                        for i in range(spans * n):
                            total[i % n] += row[ROW_DALPHA + i]
                            total[channels + i % n] += row[ROW_DDECAY + i]
                            total[2 * channels + i % n] += row[ROW_DSKIP + i]
                            row[ROW_DALPHA + i] = row[ROW_DDECAY + i] = row[ROW_DSKIP + i] = 0
                if chunk[FIRST] if p[REVERSE] else chunk[LAST]:
                    last = 0 if p[REVERSE] else (spans - 1) * n
                    for i in range(n):
                        dinitial[state + i] = row[ROW_P + last + i]
                        if p[INITIAL]:
                            # A double each, or the product would round to fp32 first.
                            by_initial = np.float64(initial[state + i]) * np.float64(row[ROW_R + last + i])
                            total[3 * channels + i] += by_initial
    fence()


def reduce(data):
    """Add up the sums of all tasks, in order."""
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
