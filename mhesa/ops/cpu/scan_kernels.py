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

import numpy as np

from mhesa.ops.cpu.scan_tiles import (
    ROW_ALPHA,
    ROW_DALPHA,
    ROW_DDECAY,
    ROW_DECAY,
    ROW_DSKIP,
    ROW_P,
    ROW_R,
    ROW_SKIP,
    ROWS,
    SCRATCH,
    WIDTH,
    backward_ends_row,
    backward_ends_rows,
    backward_row,
    backward_rows,
    ends_row,
    ends_rows,
    fetch,
    forward_row,
    forward_rows,
)
from mhesa.ops.cpu.simd import (
    count,
    doubles,
    fence,
    fields,
    integers,
    jit,
    offset,
    pointer,
    scratch,
    take,
    wait,
)

# After so many rows, sums in the accumulation type are handed over to fp64.
SUMMED = 256
# Rows narrower than this are scanned in spans,
NARROW = 64
# so many at a time: enough to hide the latency of one, and few enough for `WIDTH`.
SPANS = 8
# Above zero, for the carry of an infinite state.
LEAST = 2.0**-1022
# A counter has a cache line to itself.
LINE = 8

# What a kernel is told, as one array of 64-bit integers; an address of 0 is an absent tensor.
TASK, X, DY, OUT, ALPHA, DECAY, SKIP, INITIAL, FINAL, DFINAL, DINITIAL, TOTALS, DALPHA, DDECAY, DSKIP = range(
    15
)
CHUNKS, CARRIES, PLANE, COUNT, LENGTH, HEADS, HEAD_DIM, REVERSE, SPLITS, BLOCKS, STREAMS = range(15, 26)
X_BATCH, X_ROW, X_HEAD, DY_BATCH, DY_ROW, DY_HEAD, RELAYS, FIELDS = range(26, 34)

# The columns of the table of chunks. Whole sequences have no slot among the carries, -1; the others have
# `SPANS` from there on. The last two say whether the chunk is the first and the last of its sequence.
# A relay's chunks are in the order of the scan, and their slots say the how manieth of its sequence each is.
SEQUENCE, BATCH, BEGIN, END, SLOT, FIRST, LAST, COLUMNS = range(8)


@jit
def _fill(to, value, n):
    for i in range(n):
        to[i] = value


@jit
def _copy(to, source, n):
    for i in range(n):
        to[i] = source[i]


@jit
def _load_rates(p, row, alpha, decay, skip, start, n):
    """Fill the constant rows for `n` channels from `start` on, once for every span."""
    for span in range(SPANS if p[CARRIES] else 1):
        i = 0
        while i < n:
            head, at = (start + i) // p[HEAD_DIM], span * n + i
            same = min((head + 1) * p[HEAD_DIM] - start, n) - i
            _fill(offset(row, ROW_ALPHA + at), alpha[head], same)
            _fill(offset(row, ROW_DECAY + at), decay[head], same)
            if p[SKIP]:
                _copy(offset(row, ROW_SKIP + at), offset(skip, start + i), same)
            i += same


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
                if chunk[SLOT] >= 0:
                    _copy(offset(row, ROW_P), offset(carries, chunk[SLOT] * channels), spans * n)
                elif p[INITIAL]:
                    _copy(offset(row, ROW_P), offset(initial, state), n)
                else:
                    _fill(offset(row, ROW_P), 0, n)
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
                                forward_rows(x_i, x_step, out_i, out_step, part, skips, streams, piece)
                            else:
                                forward_row(x_i, x_step, out_i, out_step, part, skips, streams, piece)
                            done += piece
                    step += taken
                if chunk[FIRST] if p[REVERSE] else chunk[LAST]:
                    last = 0 if p[REVERSE] else (spans - 1) * n
                    _copy(offset(final, state), offset(row, ROW_P + last), n)
    fence()


def relay(data):
    """The same, several threads to a sequence of whole rows: each hands the state on before it writes.

    A chunk is read twice, but from memory once: it is brought to the second cache while others are at work,
    the state goes over it, and when that has been handed on, what rows become is written. The state takes
    the same steps as in one thread, and comes to the same bits.
    """
    p = fields(data)
    row = scratch(data, SCRATCH)
    x, out = pointer(p[X], data), pointer(p[OUT], data)
    alpha, decay, skip = pointer(p[ALPHA], row), pointer(p[DECAY], row), pointer(p[SKIP], row)
    initial, final = pointer(p[INITIAL], row), pointer(p[FINAL], row)
    chunks, channels = pointer(p[CHUNKS], p), p[HEADS] * p[HEAD_DIM]
    skips, streams = p[SKIP] != 0, p[STREAMS] != 0
    sign = -1 if p[REVERSE] else 1
    x_step, out_step, loaded = sign * p[X_ROW], sign * channels, -1
    while True:
        task = take(p)
        if task >= p[COUNT] * p[BLOCKS]:
            break
        chunk, block = offset(chunks, task // p[BLOCKS] * COLUMNS), task % p[BLOCKS]
        start = block * channels // p[BLOCKS]
        n = (block + 1) * channels // p[BLOCKS] - start
        if loaded != block:
            _load_rates(p, row, alpha, decay, skip, start, n)
            loaded = block
        rows, state = chunk[END] - chunk[BEGIN], chunk[SEQUENCE] * channels + start
        t = _row_of(p, chunk, rows, 0, 0, 0)
        x_0 = offset(x, chunk[BATCH] * p[X_BATCH] + t * p[X_ROW] + start)
        out_0 = offset(out, (chunk[BATCH] * p[LENGTH] + t) * channels + start)
        passed = offset(integers(p[RELAYS]), (chunk[SEQUENCE] * p[BLOCKS] + block) * LINE)
        fetch(x_0, x_step, rows, n)
        wait(passed, chunk[SLOT])
        if not chunk[FIRST]:
            _copy(offset(row, ROW_P), offset(final, state), n)
        elif p[INITIAL]:
            _copy(offset(row, ROW_P), offset(initial, state), n)
        else:
            _fill(offset(row, ROW_P), 0, n)
        _copy(offset(row, ROW_R), offset(row, ROW_P), n)
        step = 0
        while step < rows:
            taken = ROWS if rows - step >= ROWS else 1
            if taken == ROWS:
                ends_rows(offset(x_0, step * x_step), x_step, row, n)
            else:
                ends_row(offset(x_0, step * x_step), x_step, row, n)
            step += taken
        _copy(offset(final, state), offset(row, ROW_P), n)
        _copy(offset(row, ROW_P), offset(row, ROW_R), n)
        count(passed)
        for step in range(rows):
            x_t, out_t = offset(x_0, step * x_step), offset(out_0, step * out_step)
            forward_row(x_t, x_step, out_t, out_step, row, skips, streams, n)
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
            _fill(offset(row, ROW_P), 0, SPANS * n)
            rows, longer = (chunk[END] - chunk[BEGIN]) // SPANS, (chunk[END] - chunk[BEGIN]) % SPANS
            steps, step = rows + (1 if longer else 0), 0
            while step < steps:
                taken = ROWS if rows - step >= ROWS else 1
                for span in range(SPANS if step < rows else longer):
                    t = _row_of(p, chunk, rows, longer, span, step)
                    x_t = offset(x, chunk[BATCH] * p[X_BATCH] + t * p[X_ROW])
                    if taken == ROWS:
                        ends_rows(x_t, x_step, offset(row, span * n), n)
                    else:
                        ends_row(x_t, x_step, offset(row, span * n), n)
                step += taken
            _copy(offset(carries, chunk[SLOT] * n), offset(row, ROW_P), SPANS * n)


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
            _fill(offset(row, ROW_P), 0, SPANS * n)
            _fill(offset(row, ROW_R), 0, SPANS * n)
            rows, longer = (chunk[END] - chunk[BEGIN]) // SPANS, (chunk[END] - chunk[BEGIN]) % SPANS
            steps, step = rows + (1 if longer else 0), 0
            while step < steps:
                taken = ROWS if rows - step >= ROWS else 1
                for span in range(SPANS if step < rows else longer):
                    t = _row_of(p, chunk, rows, longer, span, step)
                    dy_t = offset(dy, chunk[BATCH] * p[DY_BATCH] + t * p[DY_ROW])
                    if taken == ROWS:
                        backward_ends_rows(dy_t, dy_step, offset(row, span * n), n)
                    else:
                        backward_ends_row(dy_t, dy_step, offset(row, span * n), n)
                step += taken
            _copy(offset(carries, chunk[SLOT] * n), offset(row, ROW_P), SPANS * n)
            _copy(offset(carries, p[PLANE] + chunk[SLOT] * n), offset(row, ROW_R), SPANS * n)


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


@jit
def _hand_over(total, sums, n):
    """Add sums to those in fp64, and begin them anew."""
    for i in range(n):
        total[i] += sums[i]
    _fill(sums, 0, n)


@jit
def _add_products(total, a, b, n):
    """Products of a double each, or they would round to fp32 first."""
    for i in range(n):
        total[i] += np.float64(a[i]) * np.float64(b[i])


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
                if chunk[SLOT] >= 0:
                    entering = offset(carries, chunk[SLOT] * channels)
                    _copy(offset(row, ROW_P), entering, spans * n)
                    _copy(offset(row, ROW_R), offset(entering, p[PLANE]), spans * n)
                else:
                    _copy(offset(row, ROW_P), offset(dfinal, state), n)
                    _fill(offset(row, ROW_R), 0, n)
                for sums in (ROW_DALPHA, ROW_DDECAY, ROW_DSKIP):
                    _fill(offset(row, sums), 0, spans * n)
                rows, longer = (chunk[END] - chunk[BEGIN]) // spans, (chunk[END] - chunk[BEGIN]) % spans
                steps, step = rows + (1 if longer else 0), 0
                while step < steps:
                    taken = ROWS if spans > 1 and rows - step >= ROWS else 1
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
                                backward_rows(
                                    x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, streams, piece
                                )
                            else:
                                backward_row(
                                    x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, streams, piece
                                )
                            done += piece
                    step += taken
                    if step % SUMMED < taken or step == steps:
                        for span in range(spans):
                            _hand_over(total, offset(row, ROW_DALPHA + span * n), n)
                            _hand_over(offset(total, channels), offset(row, ROW_DDECAY + span * n), n)
                            _hand_over(offset(total, 2 * channels), offset(row, ROW_DSKIP + span * n), n)
                if chunk[FIRST] if p[REVERSE] else chunk[LAST]:
                    last = 0 if p[REVERSE] else (spans - 1) * n
                    _copy(offset(dinitial, state), offset(row, ROW_P + last), n)
                    if p[INITIAL]:
                        _add_products(
                            offset(total, 3 * channels),
                            offset(initial, state),
                            offset(row, ROW_R + last),
                            n,
                        )
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
