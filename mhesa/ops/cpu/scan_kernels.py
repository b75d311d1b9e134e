"""The kernels of the scan on CPU: one pass over memory forward, one backward.

docs/kernels.md explains tasks, chunks, spans and relays.

Shapes: B batch, L rows (steps), S sequences, H heads, D head_dim, C = H * D channels. x, dy, out `(B, L, C)`;
states `(S, C)`; alpha, decay `(H,)`; skip `(C,)`; carries `(slots, C)`; totals `(splits, 4, C)`.

A task reads and writes whole rows one after another, as a copy does, and keeps the state of its channels in
the L1 cache. The arithmetic of a channel does not depend on how tasks are cut, and where a sequence is cut
into chunks and spans depends on its own length and width alone: results are the same bit for bit whatever the
batch and the number of threads.

The backward pass needs no state of the forward pass. Against the direction of the scan it carries `p`, the
gradient that enters a state from its future, and `r`, the derivative of `p` with respect to the decay:

    g = dy + p;  dx = alpha * g + skip * dy;  r' = g + decay * r;  p' = decay * g
    dalpha = sum g * x;  ddecay = alpha * sum r * x + initial_state * r[end];  dskip = sum dy * x
"""

# Numba finds the types of kernels when it compiles them.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import numpy as np

from mhesa.ops.cpu import sequences
from mhesa.ops.cpu.arguments import ACCUMULATION, FLOAT64, struct
from mhesa.ops.cpu.atomics import LINE, fence, fetch_add, signal, wait
from mhesa.ops.cpu.compiling import exists, jit, member, offset, stack_array
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
    copy,
    ends_row,
    ends_rows,
    fill,
    forward_row,
    forward_rows,
    prefetch,
)

# Rows after which sums in the accumulation type are added to those in fp64.
ROWS_PER_SUM = 256
# Long sequences with rows of fewer channels are scanned in spans.
NARROW = 64
# Spans of a chunk: enough to hide the latency of an addition; `SPANS * NARROW` channels fit into `WIDTH`.
SPANS = 8
SMALLEST_NORMAL = 2.0**-1022

Arguments = struct(
    "Arguments",
    **sequences.ARGUMENTS,
    chunk_count="int64",
    splits="int64",  # runs of chunks that tasks are cut into
    totals=FLOAT64,  # sums of dalpha, ddecay / alpha, dskip, and ddecay by the initial state
    entering=ACCUMULATION,  # what enters the first span of a sequence: `initial` or `dfinal`
    carries=ACCUMULATION,  # the end of each span, then what enters it: h or p,
    slopes=ACCUMULATION,  # and backward r
)


@jit
def _load_rates(args, row, start, n):
    """Fill the constant rows of scratch memory for `n` channels from `start` on, once for every span."""
    for span in range(SPANS if exists(args.carries) else 1):
        i = 0
        while i < n:
            head, at = (start + i) // args.head_dim, span * n + i
            same = min((head + 1) * args.head_dim - start, n) - i
            fill(offset(row, ROW_ALPHA + at), args.alpha[head], same)
            fill(offset(row, ROW_DECAY + at), args.decay[head], same)
            if exists(args.skip):
                copy(offset(row, ROW_SKIP + at), offset(args.skip, start + i), same)
            i += same


@jit
def _load_state(row, states, at, n):
    """Begin with the state at `at`, or with zeros where there are no states."""
    if exists(states):
        copy(offset(row, ROW_P), offset(states, at), n)
    else:
        fill(offset(row, ROW_P), 0, n)


@jit
def _row_of(args, chunk, rows, longer, span, step):
    """The row that a span takes in a step: the first `longer` spans have `rows + 1` rows, others `rows`."""
    if args.reverse:
        return chunk.begin + (span + 1) * rows + min(span + 1, longer) - 1 - step
    return chunk.begin + span * rows + min(span, longer) + step


def forward(args):
    """Scan the chunks and channels of one task after another."""
    row = stack_array(args.x, SCRATCH)
    x, out, final = args.x, args.out, args.final
    head_dim, channels = args.head_dim, args.heads * args.head_dim
    contiguous = args.x_head == head_dim
    skips, nontemporal = exists(args.skip), args.nontemporal != 0
    sign = -1 if args.reverse else 1
    x_step, out_step = sign * args.x_row, sign * channels
    while True:
        task = fetch_add(member(args, "next_task"), 1)
        if task >= args.splits * args.blocks:
            break
        block, split = task // args.splits, task % args.splits
        low, high = block * channels // args.blocks, (block + 1) * channels // args.blocks
        first, end = split * args.chunk_count // args.splits, (split + 1) * args.chunk_count // args.splits
        for start in range(low, high, WIDTH):
            n = min(WIDTH, high - start)
            _load_rates(args, row, start, n)
            for index in range(first, end):
                chunk = offset(args.chunks, index)
                state = chunk.sequence * channels + start
                spans = 1 if chunk.slot < 0 else SPANS
                if chunk.slot >= 0:
                    copy(offset(row, ROW_P), offset(args.carries, chunk.slot * channels), spans * n)
                else:
                    _load_state(row, args.initial, state, n)
                rows, longer = (chunk.end - chunk.begin) // spans, (chunk.end - chunk.begin) % spans
                steps, step = rows + (1 if longer else 0), 0
                while step < steps:
                    # Whole rows are taken one at a time, as a copy does; spans are not in order anyway.
                    stride = ROWS if spans > 1 and rows - step >= ROWS else 1
                    for span in range(spans if step < rows else longer):
                        t = _row_of(args, chunk, rows, longer, span, step)
                        x_t = offset(x, chunk.batch * args.x_batch + t * args.x_row + start)
                        out_t = offset(out, (chunk.batch * args.length + t) * channels + start)
                        i = 0
                        while i < n:
                            x_i, out_i, count = offset(x_t, i), offset(out_t, i), n
                            if not contiguous:
                                head, within = (start + i) // head_dim, (start + i) % head_dim
                                x_i = offset(x_i, head * (args.x_head - head_dim))
                                count = min(n - i, head_dim - within)
                            at = offset(row, span * n + i)
                            tile = (x_i, x_step, out_i, out_step, at, skips, nontemporal)
                            if stride == ROWS:
                                forward_rows(x_step, count, tile)
                            else:
                                forward_row(x_step, count, tile)
                            i += count
                    step += stride
                if chunk.later == 0:
                    last = 0 if args.reverse else (spans - 1) * n
                    copy(offset(final, state), offset(row, ROW_P + last), n)
    fence()


def relay(args):
    """`forward` with several threads to a sequence: each passes the state on before it writes its chunk."""
    row = stack_array(args.x, SCRATCH)
    x, out, final, channels = args.x, args.out, args.final, args.heads * args.head_dim
    skips, nontemporal = exists(args.skip), args.nontemporal != 0
    sign = -1 if args.reverse else 1
    x_step, out_step, loaded = sign * args.x_row, sign * channels, -1
    while True:
        task = fetch_add(member(args, "next_task"), 1)
        if task >= args.chunk_count * args.blocks:
            break
        chunk, block = offset(args.chunks, task // args.blocks), task % args.blocks
        start = block * channels // args.blocks
        n = (block + 1) * channels // args.blocks - start
        if loaded != block:
            _load_rates(args, row, start, n)
            loaded = block
        rows, state = chunk.end - chunk.begin, chunk.sequence * channels + start
        t = _row_of(args, chunk, rows, 0, 0, 0)
        x_0 = offset(x, chunk.batch * args.x_batch + t * args.x_row + start)
        out_0 = offset(out, (chunk.batch * args.length + t) * channels + start)
        turns = offset(args.turns, (chunk.sequence * args.blocks + block) * LINE)
        prefetch(x_0, x_step, rows, n)
        wait(turns, chunk.earlier)
        if chunk.earlier == 0:
            _load_state(row, args.initial, state, n)
        else:
            copy(offset(row, ROW_P), offset(final, state), n)
        copy(offset(row, ROW_R), offset(row, ROW_P), n)
        step = 0
        while step < rows:
            stride = ROWS if rows - step >= ROWS else 1
            tile = (offset(x_0, step * x_step), x_step, row)
            if stride == ROWS:
                ends_rows(x_step, n, tile)
            else:
                ends_row(x_step, n, tile)
            step += stride
        copy(offset(final, state), offset(row, ROW_P), n)
        copy(offset(row, ROW_P), offset(row, ROW_R), n)
        signal(turns, 1)
        for step in range(rows):
            x_t, out_t = offset(x_0, step * x_step), offset(out_0, step * out_step)
            forward_row(x_step, n, (x_t, x_step, out_t, out_step, row, skips, nontemporal))
    fence()


def ends(args):
    """Scan every span from zero, x forward or dy backward; the ends go to `carries` and backward `slopes`."""
    row, backward = stack_array(args.x, SCRATCH), exists(args.slopes)
    source = args.dy if backward else args.x
    by_batch, by_row = (args.dy_batch, args.dy_row) if backward else (args.x_batch, args.x_row)
    row_step = -by_row if args.reverse else by_row
    n = args.heads * args.head_dim
    _load_rates(args, row, 0, n)
    while True:
        index = fetch_add(member(args, "next_task"), 1)
        if index >= args.chunk_count:
            break
        chunk = offset(args.chunks, index)
        if chunk.slot < 0:
            continue
        fill(offset(row, ROW_P), 0, SPANS * n)
        fill(offset(row, ROW_R), 0, SPANS * n)
        rows, longer = (chunk.end - chunk.begin) // SPANS, (chunk.end - chunk.begin) % SPANS
        steps, step = rows + (1 if longer else 0), 0
        while step < steps:
            stride = ROWS if rows - step >= ROWS else 1
            for span in range(SPANS if step < rows else longer):
                t = _row_of(args, chunk, rows, longer, span, step)
                tile = (offset(source, chunk.batch * by_batch + t * by_row), row_step, offset(row, span * n))
                if backward and stride == ROWS:
                    backward_ends_rows(row_step, n, tile)
                elif backward:
                    backward_ends_row(row_step, n, tile)
                elif stride == ROWS:
                    ends_rows(row_step, n, tile)
                else:
                    ends_row(row_step, n, tile)
            step += stride
        copy(offset(args.carries, chunk.slot * n), offset(row, ROW_P), SPANS * n)
        if backward:
            copy(offset(args.slopes, chunk.slot * n), offset(row, ROW_R), SPANS * n)


@jit
def _across(carry, power, decay):
    """`power * carry`, where `power` is a multiple of a power of `decay`, for infinite values too."""
    if carry == 0:
        return carry  # even if the power is infinite
    if power == 0 and decay != 0:
        power = SMALLEST_NORMAL  # an infinite carry stays infinite
    return power * carry


def chain(args):
    """Turn the ends of the spans, in place, into what enters each span; `slopes` too if there are any."""
    channels = args.heads * args.head_dim
    for channel in range(channels):
        d = np.float64(args.decay[channel // args.head_dim])
        state, slope_state = 0.0, 0.0
        for index in range(args.chunk_count):
            chunk = offset(args.chunks, args.chunk_count - 1 - index if args.reverse else index)
            if chunk.slot < 0:
                continue
            if chunk.earlier == 0:
                state, slope_state = 0.0, 0.0
                if exists(args.entering):
                    state = np.float64(args.entering[chunk.sequence * channels + channel])
            rows, longer = (chunk.end - chunk.begin) // SPANS, (chunk.end - chunk.begin) % SPANS
            before = d ** np.float64(rows - 1)
            for step in range(SPANS):
                span = SPANS - 1 - step if args.reverse else step
                longer_by = 1 if span < longer else 0
                n, previous = rows + longer_by, before * d if longer_by else before
                at = (chunk.slot + span) * channels + channel
                end = np.float64(args.carries[at])
                args.carries[at] = state
                if exists(args.slopes):
                    slope_end = np.float64(args.slopes[at])
                    args.slopes[at] = slope_state
                    slope_state = _across(slope_state, previous * d, d) + slope_end
                    slope_state += _across(state, n * previous, d)
                state = _across(state, previous * d, d) + end


@jit
def _move_sums(total, sums, n):
    """Add sums to those in fp64, and set them to zero."""
    for i in range(n):
        total[i] += sums[i]
    fill(sums, 0, n)


@jit
def _add_products(total, a, b, n):
    """Add `a * b`; in fp64, or the products would be rounded to fp32 first."""
    for i in range(n):
        total[i] += np.float64(a[i]) * np.float64(b[i])


def backward(args):
    """Carry the gradients back; the sums of a run of chunks go to its part of `totals`."""
    row = stack_array(args.x, SCRATCH)
    x, dy, out = args.x, args.dy, args.out
    head_dim, channels = args.head_dim, args.heads * args.head_dim
    contiguous = args.x_head == head_dim and args.dy_head == head_dim
    skips, nontemporal = exists(args.skip), args.nontemporal != 0
    sign = -1 if args.reverse else 1
    x_step, dy_step, out_step = sign * args.x_row, sign * args.dy_row, sign * channels
    while True:
        task = fetch_add(member(args, "next_task"), 1)
        if task >= args.splits * args.blocks:
            break
        block, split = task // args.splits, task % args.splits
        low, high = block * channels // args.blocks, (block + 1) * channels // args.blocks
        first, end = split * args.chunk_count // args.splits, (split + 1) * args.chunk_count // args.splits
        for start in range(low, high, WIDTH):
            n = min(WIDTH, high - start)
            _load_rates(args, row, start, n)
            total = offset(args.totals, split * 4 * channels + start)
            for index in range(first, end):
                chunk = offset(args.chunks, index)
                state = chunk.sequence * channels + start
                spans = 1 if chunk.slot < 0 else SPANS
                if chunk.slot >= 0:
                    copy(offset(row, ROW_P), offset(args.carries, chunk.slot * channels), spans * n)
                    copy(offset(row, ROW_R), offset(args.slopes, chunk.slot * channels), spans * n)
                else:
                    copy(offset(row, ROW_P), offset(args.dfinal, state), n)
                    fill(offset(row, ROW_R), 0, n)
                for sums in (ROW_DALPHA, ROW_DDECAY, ROW_DSKIP):
                    fill(offset(row, sums), 0, spans * n)
                rows, longer = (chunk.end - chunk.begin) // spans, (chunk.end - chunk.begin) % spans
                steps, step = rows + (1 if longer else 0), 0
                while step < steps:
                    stride = ROWS if spans > 1 and rows - step >= ROWS else 1
                    for span in range(spans if step < rows else longer):
                        t = _row_of(args, chunk, rows, longer, span, step)
                        x_t = offset(x, chunk.batch * args.x_batch + t * args.x_row + start)
                        dy_t = offset(dy, chunk.batch * args.dy_batch + t * args.dy_row + start)
                        out_t = offset(out, (chunk.batch * args.length + t) * channels + start)
                        i = 0
                        while i < n:
                            x_i, dy_i, out_i, count = offset(x_t, i), offset(dy_t, i), offset(out_t, i), n
                            if not contiguous:
                                head, within = (start + i) // head_dim, (start + i) % head_dim
                                x_i = offset(x_i, head * (args.x_head - head_dim))
                                dy_i = offset(dy_i, head * (args.dy_head - head_dim))
                                count = min(n - i, head_dim - within)
                            at = offset(row, span * n + i)
                            tile = (x_i, x_step, dy_i, dy_step, out_i, out_step, at, skips, nontemporal)
                            if stride == ROWS:
                                backward_rows(out_step, count, tile)
                            else:
                                backward_row(out_step, count, tile)
                            i += count
                    step += stride
                    if step % ROWS_PER_SUM < stride or step == steps:
                        for span in range(spans):
                            _move_sums(total, offset(row, ROW_DALPHA + span * n), n)
                            _move_sums(offset(total, channels), offset(row, ROW_DDECAY + span * n), n)
                            _move_sums(offset(total, 2 * channels), offset(row, ROW_DSKIP + span * n), n)
                if chunk.later == 0:
                    last = 0 if args.reverse else (spans - 1) * n
                    copy(offset(args.dinitial, state), offset(row, ROW_P + last), n)
                    if exists(args.initial):
                        r = offset(row, ROW_R + last)
                        _add_products(offset(total, 3 * channels), offset(args.initial, state), r, n)
    fence()


def reduce(args):
    """Add up the `totals` of all splits, in order, into the gradients of the parameters."""
    channels = args.heads * args.head_dim
    for head in range(args.heads):
        by_alpha, by_decay, by_initial = 0.0, 0.0, 0.0
        for channel in range(head * args.head_dim, (head + 1) * args.head_dim):
            by_skip = 0.0
            for split in range(args.splits):
                total = offset(args.totals, split * 4 * channels + channel)
                by_alpha += total[0]
                by_decay += total[channels]
                by_skip += total[2 * channels]
                by_initial += total[3 * channels]
            args.dskip[channel] = by_skip
        args.dalpha[head] = by_alpha
        args.ddecay[head] = args.alpha[head] * by_decay + by_initial
