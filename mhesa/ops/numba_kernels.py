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

from mhesa.ops.numba_tiles import (
    ROW_ALPHA,
    ROW_DALPHA,
    ROW_DDECAY,
    ROW_DECAY,
    ROW_DSKIP,
    ROW_P,
    ROW_P_0,
    ROW_R,
    ROW_R_0,
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
from mhesa.ops.simd import count, doubles, fence, fields, integers, jit, offset, pointer, scratch, take, wait

# Rows narrower than this are scanned in spans,
NARROW = 64
# so many at a time: enough to hide the latency of one, and few enough for `WIDTH`.
SPANS = 8
# Above zero, for the carry of an infinite state.
LEAST = 2.0**-1022
# A counter has a cache line to itself; a relay has two.
LINE = 8

# What a kernel is told, as one array of 64-bit integers; an address of 0 is an absent tensor.
TASK, X, DY, OUT, ALPHA, DECAY, SKIP, INITIAL, FINAL, DFINAL, DINITIAL, TOTALS, DALPHA, DDECAY, DSKIP = range(
    15
)
CHUNKS, CARRIES, PLANE, COUNT, LENGTH, HEADS, HEAD_DIM, REVERSE, SPLITS, BLOCKS, STREAMS = range(15, 26)
X_BATCH, X_ROW, X_HEAD, DY_BATCH, DY_ROW, DY_HEAD, SUMMED, RELAYS, FIELDS = range(26, 35)

# The columns of the table of chunks. Whole sequences have no slot among the carries, -1; the others have
# `SPANS` from there on. The last two say whether the chunk is the first and the last of its sequence.
# A relay's chunks are in the order of the scan, and their slots say the how manieth of its sequence each is.
SEQUENCE, BATCH, BEGIN, END, SLOT, FIRST, LAST, COLUMNS = range(8)


@jit
def _load_rates(p, row, alpha, decay, skip, start, n):
    """Fill the constant rows for `n` channels from `start` on, once for every span."""
    for span in range(SPANS if p[CARRIES] and n < NARROW else 1):
        i = 0
        while i < n:
            head, at = (start + i) // p[HEAD_DIM], span * n + i
            same = min((head + 1) * p[HEAD_DIM] - start, n) - i
            for channel in range(same):
                row[ROW_ALPHA + at + channel] = alpha[head]
                row[ROW_DECAY + at + channel] = decay[head]
                row[ROW_SKIP + at + channel] = skip[start + i + channel] if p[SKIP] else 0
            i += same


@jit
def _row_of(p, chunk, rows, longer, span, step):
    """The row that a span takes in a step: the first `longer` spans have `rows + 1` rows, others `rows`."""
    if p[REVERSE]:
        return chunk[BEGIN] + (span + 1) * rows + min(span + 1, longer) - 1 - step
    return chunk[BEGIN] + span * rows + min(span, longer) + step


@jit
def _scan(p, x, out, row, t, steps, start, n):
    """Scan `steps` rows from row `t` on, of `n` channels from `start` on, and write what they become."""
    head_dim, channels = p[HEAD_DIM], p[HEADS] * p[HEAD_DIM]
    whole, skips, streams = p[X_HEAD] == head_dim, p[SKIP] != 0, p[STREAMS] != 0
    sign = -1 if p[REVERSE] else 1
    x_step, out_step = sign * p[X_ROW], sign * channels
    x_t, out_t = offset(x, t * p[X_ROW] + start), offset(out, t * channels + start)
    step = 0
    while step < steps:
        taken = ROWS if steps - step >= ROWS else 1
        done = 0
        while done < n:
            x_i, out_i, part, piece = offset(x_t, done), offset(out_t, done), offset(row, done), n
            if not whole:
                head, within = (start + done) // head_dim, (start + done) % head_dim
                x_i = offset(x_i, head * (p[X_HEAD] - head_dim))
                piece = min(n - done, head_dim - within)
            if taken == ROWS:
                forward_rows(x_i, x_step, out_i, out_step, part, skips, streams, piece)
            else:
                forward_row(x_i, x_step, out_i, out_step, part, skips, streams, piece)
            done += piece
        x_t, out_t = offset(x_t, taken * x_step), offset(out_t, taken * out_step)
        step += taken


@jit
def _scan_state(p, x, row, t, steps, n):
    """The same of whole rows, but for what they become: the state alone."""
    x_step = -p[X_ROW] if p[REVERSE] else p[X_ROW]
    x_t, step = offset(x, t * p[X_ROW]), 0
    while step < steps:
        taken = ROWS if steps - step >= ROWS else 1
        if taken == ROWS:
            ends_rows(x_t, x_step, row, n)
        else:
            ends_row(x_t, x_step, row, n)
        x_t = offset(x_t, taken * x_step)
        step += taken


@jit
def _carry(p, x, dy, out, row, t, steps, start, n):
    """Carry the gradients back over `steps` rows from row `t` on; sums stay in the scratch memory."""
    head_dim, channels = p[HEAD_DIM], p[HEADS] * p[HEAD_DIM]
    whole = p[X_HEAD] == head_dim and p[DY_HEAD] == head_dim
    skips, streams = p[SKIP] != 0, p[STREAMS] != 0
    sign = -1 if p[REVERSE] else 1
    x_step, dy_step, out_step = sign * p[X_ROW], sign * p[DY_ROW], sign * channels
    x_t, dy_t = offset(x, t * p[X_ROW] + start), offset(dy, t * p[DY_ROW] + start)
    out_t = offset(out, t * channels + start)
    step = 0
    while step < steps:
        taken = ROWS if steps - step >= ROWS else 1
        done = 0
        while done < n:
            x_i, dy_i = offset(x_t, done), offset(dy_t, done)
            out_i, part, piece = offset(out_t, done), offset(row, done), n
            if not whole:
                head, within = (start + done) // head_dim, (start + done) % head_dim
                x_i = offset(x_i, head * (p[X_HEAD] - head_dim))
                dy_i = offset(dy_i, head * (p[DY_HEAD] - head_dim))
                piece = min(n - done, head_dim - within)
            if taken == ROWS:
                backward_rows(x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, streams, piece)
            else:
                backward_row(x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, streams, piece)
            done += piece
        x_t, dy_t, out_t = (
            offset(x_t, taken * x_step),
            offset(dy_t, taken * dy_step),
            offset(out_t, taken * out_step),
        )
        step += taken


@jit
def _carry_state(p, dy, row, t, steps, n):
    """The same of whole rows, but for the gradients: `p` and `r` alone."""
    dy_step = -p[DY_ROW] if p[REVERSE] else p[DY_ROW]
    dy_t, step = offset(dy, t * p[DY_ROW]), 0
    while step < steps:
        taken = ROWS if steps - step >= ROWS else 1
        if taken == ROWS:
            backward_ends_rows(dy_t, dy_step, row, n)
        else:
            backward_ends_row(dy_t, dy_step, row, n)
        dy_t = offset(dy_t, taken * dy_step)
        step += taken


@jit
def _hand_over(row, total, channels, spans, n):
    """Add the sums of a task to `total`, in fp64, and start them anew."""
    for span in range(spans):
        for i in range(n):
            total[i] += row[ROW_DALPHA + span * n + i]
            total[channels + i] += row[ROW_DDECAY + span * n + i]
            total[2 * channels + i] += row[ROW_DSKIP + span * n + i]
            row[ROW_DALPHA + span * n + i] = 0
            row[ROW_DDECAY + span * n + i] = 0
            row[ROW_DSKIP + span * n + i] = 0


@jit
def _hand_over_initial(row, total, initial, channels, n):
    """Add what the state that a sequence starts from has to do with the decay."""
    for i in range(n):
        # A double each, or the product would round to fp32 first.
        total[3 * channels + i] += np.float64(initial[i]) * np.float64(row[ROW_R + i])


def forward(data):
    """Scan the chunks and channels of one task after another, until none is left."""
    p = fields(data)
    row = scratch(data, SCRATCH)
    x, out = pointer(p[X], data), pointer(p[OUT], data)
    alpha, decay, skip = pointer(p[ALPHA], row), pointer(p[DECAY], row), pointer(p[SKIP], row)
    initial, final, carries = pointer(p[INITIAL], row), pointer(p[FINAL], row), pointer(p[CARRIES], row)
    chunks, channels = pointer(p[CHUNKS], p), p[HEADS] * p[HEAD_DIM]
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
                x_b = offset(x, chunk[BATCH] * p[X_BATCH])
                out_b = offset(out, chunk[BATCH] * p[LENGTH] * channels)
                spans = 1 if chunk[SLOT] < 0 else SPANS
                for i in range(spans * n):
                    if chunk[SLOT] >= 0:
                        row[ROW_P + i] = carries[chunk[SLOT] * channels + i]
                    else:
                        row[ROW_P + i] = initial[state + i] if p[INITIAL] else 0
                rows, longer = (chunk[END] - chunk[BEGIN]) // spans, (chunk[END] - chunk[BEGIN]) % spans
                steps, step = rows + (1 if longer else 0), 0
                while step < steps:
                    taken = rows if spans == 1 else ROWS if rows - step >= ROWS else 1
                    for span in range(spans if step < rows else longer):
                        t = _row_of(p, chunk, rows, longer, span, step)
                        _scan(p, x_b, out_b, offset(row, span * n), t, taken, start, n)
                    step += taken
                if chunk[FIRST] if p[REVERSE] else chunk[LAST]:
                    last = 0 if p[REVERSE] else (spans - 1) * n
                    for i in range(n):
                        final[state + i] = row[ROW_P + last + i]
    fence()


def relay_forward(data):
    """The same, several threads to a sequence: each hands the state on before it writes what rows become."""
    p = fields(data)
    row = scratch(data, SCRATCH)
    x, out = pointer(p[X], data), pointer(p[OUT], data)
    alpha, decay, skip = pointer(p[ALPHA], row), pointer(p[DECAY], row), pointer(p[SKIP], row)
    initial, final = pointer(p[INITIAL], row), pointer(p[FINAL], row)
    chunks, channels = pointer(p[CHUNKS], p), p[HEADS] * p[HEAD_DIM]
    x_step = -p[X_ROW] if p[REVERSE] else p[X_ROW]
    loaded = -1
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
        steps, state = chunk[END] - chunk[BEGIN], chunk[SEQUENCE] * channels + start
        t = chunk[END] - 1 if p[REVERSE] else chunk[BEGIN]
        x_b = offset(x, chunk[BATCH] * p[X_BATCH])
        passed = offset(integers(p[RELAYS]), (chunk[SEQUENCE] * p[BLOCKS] + block) * 2 * LINE)
        fetch(offset(x_b, t * p[X_ROW] + start), x_step, steps, n)
        wait(passed, chunk[SLOT])
        for i in range(n):
            if chunk[FIRST]:
                row[ROW_P_0 + i] = initial[state + i] if p[INITIAL] else 0
            else:
                row[ROW_P_0 + i] = final[state + i]
            row[ROW_P + i] = row[ROW_P_0 + i]
        _scan_state(p, offset(x_b, start), row, t, steps, n)
        for i in range(n):
            final[state + i] = row[ROW_P + i]
            row[ROW_P + i] = row[ROW_P_0 + i]
        count(passed)
        _scan(p, x_b, offset(out, chunk[BATCH] * p[LENGTH] * channels), row, t, steps, start, n)
    fence()


def ends(data):
    """Scan every span of rows of few channels from zero; its end goes to `CARRIES`."""
    p = fields(data)
    row = scratch(data, SCRATCH)
    x, carries, chunks = pointer(p[X], data), pointer(p[CARRIES], row), pointer(p[CHUNKS], p)
    alpha, decay = pointer(p[ALPHA], row), pointer(p[DECAY], row)
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
            x_b = offset(x, chunk[BATCH] * p[X_BATCH])
            rows, longer = (chunk[END] - chunk[BEGIN]) // SPANS, (chunk[END] - chunk[BEGIN]) % SPANS
            steps, step = rows + (1 if longer else 0), 0
            while step < steps:
                taken = ROWS if rows - step >= ROWS else 1
                for span in range(SPANS if step < rows else longer):
                    t = _row_of(p, chunk, rows, longer, span, step)
                    _scan_state(p, x_b, offset(row, span * n), t, taken, n)
                step += taken
            for i in range(SPANS * n):
                carries[chunk[SLOT] * n + i] = row[ROW_P + i]


def backward_ends(data):
    """The same of the backward pass: `p`, and in a second plane `r`."""
    p = fields(data)
    row = scratch(data, SCRATCH)
    dy, carries, chunks = pointer(p[DY], data), pointer(p[CARRIES], row), pointer(p[CHUNKS], p)
    alpha, decay = pointer(p[ALPHA], row), pointer(p[DECAY], row)
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
            dy_b = offset(dy, chunk[BATCH] * p[DY_BATCH])
            rows, longer = (chunk[END] - chunk[BEGIN]) // SPANS, (chunk[END] - chunk[BEGIN]) % SPANS
            steps, step = rows + (1 if longer else 0), 0
            while step < steps:
                taken = ROWS if rows - step >= ROWS else 1
                for span in range(SPANS if step < rows else longer):
                    t = _row_of(p, chunk, rows, longer, span, step)
                    _carry_state(p, dy_b, offset(row, span * n), t, taken, n)
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
    chunks, totals, channels = pointer(p[CHUNKS], p), doubles(p[TOTALS]), p[HEADS] * p[HEAD_DIM]
    for i in range(WIDTH):
        row[ROW_DALPHA + i] = row[ROW_DDECAY + i] = row[ROW_DSKIP + i] = 0
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
                x_b, dy_b = offset(x, chunk[BATCH] * p[X_BATCH]), offset(dy, chunk[BATCH] * p[DY_BATCH])
                out_b = offset(out, chunk[BATCH] * p[LENGTH] * channels)
                spans = 1 if chunk[SLOT] < 0 else SPANS
                for i in range(spans * n):
                    if chunk[SLOT] >= 0:
                        row[ROW_P + i] = carries[chunk[SLOT] * channels + i]
                        row[ROW_R + i] = carries[p[PLANE] + chunk[SLOT] * channels + i]
                    else:
                        row[ROW_P + i], row[ROW_R + i] = dfinal[state + i], 0
                rows, longer = (chunk[END] - chunk[BEGIN]) // spans, (chunk[END] - chunk[BEGIN]) % spans
                steps, step = rows + (1 if longer else 0), 0
                while step < steps:
                    taken = ROWS if rows - step >= ROWS else 1
                    if spans == 1:
                        taken = min(p[SUMMED], rows - step)
                    for span in range(spans if step < rows else longer):
                        t = _row_of(p, chunk, rows, longer, span, step)
                        _carry(p, x_b, dy_b, out_b, offset(row, span * n), t, taken, start, n)
                    step += taken
                    if step % p[SUMMED] < taken or step == steps:
                        _hand_over(row, total, channels, spans, n)
                if chunk[FIRST] if p[REVERSE] else chunk[LAST]:
                    end = offset(row, 0 if p[REVERSE] else (spans - 1) * n)
                    for i in range(n):
                        dinitial[state + i] = end[ROW_P + i]
                    if p[INITIAL]:
                        _hand_over_initial(end, total, offset(initial, state), channels, n)
    fence()


def relay_backward(data):
    """The same, several threads to a sequence: each hands `p` and `r` on before it writes gradients."""
    p = fields(data)
    row = scratch(data, SCRATCH)
    x, dy, out = pointer(p[X], data), pointer(p[DY], data), pointer(p[OUT], data)
    alpha, decay, skip = pointer(p[ALPHA], row), pointer(p[DECAY], row), pointer(p[SKIP], row)
    initial, carries = pointer(p[INITIAL], row), pointer(p[CARRIES], row)
    dfinal, dinitial = pointer(p[DFINAL], row), pointer(p[DINITIAL], row)
    chunks, totals, channels = pointer(p[CHUNKS], p), doubles(p[TOTALS]), p[HEADS] * p[HEAD_DIM]
    dy_step = -p[DY_ROW] if p[REVERSE] else p[DY_ROW]
    for i in range(WIDTH):
        row[ROW_DALPHA + i] = row[ROW_DDECAY + i] = row[ROW_DSKIP + i] = 0
    loaded = -1
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
        steps, state = chunk[END] - chunk[BEGIN], chunk[SEQUENCE] * channels + start
        t = chunk[END] - 1 if p[REVERSE] else chunk[BEGIN]
        x_b, dy_b = offset(x, chunk[BATCH] * p[X_BATCH]), offset(dy, chunk[BATCH] * p[DY_BATCH])
        passed = offset(integers(p[RELAYS]), (chunk[SEQUENCE] * p[BLOCKS] + block) * 2 * LINE)
        summed = offset(passed, LINE)
        fetch(offset(dy_b, t * p[DY_ROW] + start), dy_step, steps, n)
        wait(passed, chunk[SLOT])
        for i in range(n):
            if chunk[FIRST]:
                row[ROW_P_0 + i], row[ROW_R_0 + i] = dfinal[state + i], 0
            else:
                row[ROW_P_0 + i], row[ROW_R_0 + i] = dinitial[state + i], carries[state + i]
            row[ROW_P + i], row[ROW_R + i] = row[ROW_P_0 + i], row[ROW_R_0 + i]
        _carry_state(p, offset(dy_b, start), row, t, steps, n)
        for i in range(n):
            dinitial[state + i], carries[state + i] = row[ROW_P + i], row[ROW_R + i]
            row[ROW_P + i], row[ROW_R + i] = row[ROW_P_0 + i], row[ROW_R_0 + i]
        count(passed)
        _carry(p, x_b, dy_b, offset(out, chunk[BATCH] * p[LENGTH] * channels), row, t, steps, start, n)
        total = offset(totals, chunk[SEQUENCE] * 4 * channels + start)
        wait(summed, chunk[SLOT])
        _hand_over(row, total, channels, 1, n)
        if chunk[LAST] and p[INITIAL]:
            _hand_over_initial(row, total, offset(initial, state), channels, n)
        count(summed)
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
