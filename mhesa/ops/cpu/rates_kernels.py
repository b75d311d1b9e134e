"""The kernels of the scan at rates of every step, on CPU. See docs/kernels.md.

Shapes: B batch, L rows (steps), S sequences, H heads, D head_dim, C = H * D channels. x, dy, out `(B, L, C)`;
alpha, decay, dalpha, ddecay `(B, L, H)`; initial, final, dfinal, dinitial `(S, C)`; skip `(C,)`; states and
dskip `(chunks, C)`.

Sequences are cut into chunks of rows that fit into the L2 cache, by their own length and width alone.
`forward` stores the state at the start of each chunk. `backward` takes the chunks from last to first: it runs
a chunk forward again from there, keeping the state before each row, and then carries `p`, the gradient that a
state gets from later rows, back through it:

    g = dy + p;  dx = alpha * g + skip * dy;  p' = decay * g
    dalpha = sum over D of g * x;  ddecay = sum over D of g * h[t-1];  dskip = sum dy * x

A task is a block of heads of a whole sequence; or, where the sequences cannot be shared out evenly among the
threads, of a chunk, in a relay. Both do the same arithmetic step by step, so results are the same bit for bit
whatever the batch and the number of threads.
"""

# Numba finds the types of kernels when it compiles them.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from mhesa.ops.cpu import sequences
from mhesa.ops.cpu.arguments import ACCUMULATION, INT64, struct
from mhesa.ops.cpu.atomics import LINE, fence, fetch_add, signal, wait
from mhesa.ops.cpu.compiling import exists, jit, member, offset
from mhesa.ops.cpu.rates_tiles import GROUP, advance_row, backward_row, carry_row, write_row
from mhesa.ops.cpu.scan_tiles import copy, fill, prefetch

Arguments = struct(
    "Arguments",
    **sequences.ARGUMENTS,
    tasks="int64",  # sequences or, in a relay, chunks
    first_chunk=INT64,  # the first chunk of each sequence, and one more
    relay="int64",
    order=INT64,  # in a relay, the chunks: the first of every sequence, then the second ..
    buffer=ACCUMULATION,  # memory of each thread, `buffer_size` values: what enters a chunk, and states
    next_buffer="int64",
    buffer_size="int64",
    alpha_batch="int64",  # strides of rates, of which each step has one for each head, heads innermost
    alpha_row="int64",
    decay_batch="int64",
    decay_row="int64",
    states=ACCUMULATION,  # the state at the start of each chunk
)


@jit
def _first_head(args, block):
    """Where a block of heads begins: between two tiles of several heads, which results must not depend on."""
    head_dim = args.head_dim
    together = GROUP // head_dim if head_dim in (8, 16, 32) and head_dim <= GROUP else 1
    tiles = (args.heads + together - 1) // together
    return min(block * tiles // args.blocks * together, args.heads)


@jit
def _task(args, task):
    """A task's block and its first head, the first head of the next block; its first chunk, and the next."""
    index, block = task // args.blocks, task % args.blocks
    head, next_head = _first_head(args, block), _first_head(args, block + 1)
    if args.relay:
        return block, head, next_head, args.order[index], args.order[index] + 1
    return block, head, next_head, args.first_chunk[index], args.first_chunk[index + 1]


@jit
def _first_row(args, chunk, head):
    """Where the row is with which a chunk begins: in x, alpha, decay, out, and the gradients of rates."""
    t, channels = chunk.end - 1 if args.reverse else chunk.begin, args.heads * args.head_dim
    row = chunk.batch * args.length + t
    x = offset(args.x, chunk.batch * args.x_batch + t * args.x_row + head * args.x_head)
    alpha = offset(args.alpha, chunk.batch * args.alpha_batch + t * args.alpha_row + head)
    decay = offset(args.decay, chunk.batch * args.decay_batch + t * args.decay_row + head)
    return x, alpha, decay, offset(args.out, row * channels + head * args.head_dim), row * args.heads + head


def forward(args):
    """Scan one task after another, until none is left; without `out`, find the states only."""
    heads, head_dim, relay, writes = args.heads, args.head_dim, args.relay, exists(args.out)
    channels, sign = heads * head_dim, -1 if args.reverse else 1
    skips, nontemporal = exists(args.skip), args.nontemporal != 0
    x_gap, x_step, out_step = args.x_head - head_dim, sign * args.x_row, sign * channels
    alpha_step, decay_step = sign * args.alpha_row, sign * args.decay_row
    entering = offset(args.buffer, fetch_add(member(args, "next_buffer"), 1) * args.buffer_size)
    while True:
        task = fetch_add(member(args, "next_task"), 1)
        if task >= args.tasks * args.blocks:
            break
        block, head, next_head, low, high = _task(args, task)
        n, start = next_head - head, head * head_dim
        width, skip = n * head_dim, offset(args.skip, start)
        for i in range(low, high):
            chunk = offset(args.chunks, i)
            rows = chunk.end - chunk.begin
            x, alpha, decay, out, _ = _first_row(args, chunk, head)
            turns = offset(args.turns, (chunk.sequence * args.blocks + block) * LINE)
            state = offset(args.final, chunk.sequence * channels + start)
            if relay:
                prefetch(x, x_step, rows, width)
                wait(turns, chunk.earlier)
            if chunk.earlier == 0:
                if exists(args.initial):
                    copy(state, offset(args.initial, chunk.sequence * channels + start), width)
                else:
                    fill(state, 0, width)
            copy(offset(args.states, i * channels + start), state, width)
            if relay or not writes:
                copy(entering, state, width)
                for row in range(rows):
                    a, d = offset(alpha, row * alpha_step), offset(decay, row * decay_step)
                    advance_row(x_gap == 0, n, head_dim, (offset(x, row * x_step), x_gap, a, d, state, state))
                state = entering
            if relay:
                signal(turns, 1)
            if writes:
                for row in range(rows):
                    x_t, out_t = offset(x, row * x_step), offset(out, row * out_step)
                    a, d = offset(alpha, row * alpha_step), offset(decay, row * decay_step)
                    tile = (x_t, x_gap, a, d, state, out_t, skip, skips, nontemporal)
                    write_row(x_gap == 0, n, head_dim, tile)
    fence()


def backward(args):
    """Carry the gradients back through one task after another, until none is left."""
    heads, head_dim, relay = args.heads, args.head_dim, args.relay
    channels, sign = heads * head_dim, -1 if args.reverse else 1
    skips, nontemporal = exists(args.skip), args.nontemporal != 0
    x_gap, dy_gap = args.x_head - head_dim, args.dy_head - head_dim
    x_step, dy_step, out_step = sign * args.x_row, sign * args.dy_row, sign * channels
    alpha_step, decay_step, rate_step = sign * args.alpha_row, sign * args.decay_row, sign * heads
    entering = offset(args.buffer, fetch_add(member(args, "next_buffer"), 1) * args.buffer_size)
    before = offset(entering, channels)
    while True:
        task = args.tasks * args.blocks - 1 - fetch_add(member(args, "next_task"), 1)
        if task < 0:
            break
        block, head, next_head, low, high = _task(args, task)
        n, start = next_head - head, head * head_dim
        width, skip = n * head_dim, offset(args.skip, start)
        for i in range(high - 1, low - 1, -1):
            chunk = offset(args.chunks, i)
            rows, t = chunk.end - chunk.begin, chunk.end - 1 if args.reverse else chunk.begin
            x, alpha, decay, out, rate = _first_row(args, chunk, head)
            dy = offset(args.dy, chunk.batch * args.dy_batch + t * args.dy_row + head * args.dy_head)
            dalpha, ddecay = offset(args.dalpha, rate), offset(args.ddecay, rate)
            turns = offset(args.turns, (chunk.sequence * args.blocks + block) * LINE)
            p = offset(args.dinitial, chunk.sequence * channels + start)
            copy(before, offset(args.states, i * channels + start), width)
            for row in range(rows):
                prefetch(offset(dy, row * dy_step), 0, 1, width)
                if row + 1 < rows:
                    a, d = offset(alpha, row * alpha_step), offset(decay, row * decay_step)
                    h, after = offset(before, row * width), offset(before, (row + 1) * width)
                    advance_row(x_gap == 0, n, head_dim, (offset(x, row * x_step), x_gap, a, d, h, after))
            if relay:
                wait(turns, chunk.later)
            if chunk.later == 0:
                copy(p, offset(args.dfinal, chunk.sequence * channels + start), width)
            if relay:
                copy(entering, p, width)
                for row in range(rows - 1, -1, -1):
                    dy_t, d = offset(dy, row * dy_step), offset(decay, row * decay_step)
                    carry_row(dy_gap == 0, n, head_dim, (dy_t, dy_gap, d, p))
                p = entering
                signal(turns, 1)
            dskip = offset(args.dskip, i * channels + start)
            if skips:
                fill(dskip, 0, width)
            for row in range(rows - 1, -1, -1):
                x_t, dy_t = offset(x, row * x_step), offset(dy, row * dy_step)
                a, d = offset(alpha, row * alpha_step), offset(decay, row * decay_step)
                out_t, h = offset(out, row * out_step), offset(before, row * width)
                da, dd = offset(dalpha, row * rate_step), offset(ddecay, row * rate_step)
                fill(da, 0, n)
                fill(dd, 0, n)
                tile = (
                    x_t, x_gap, dy_t, dy_gap, a, d, h, p, out_t, skip, dskip, da, dd, skips, nontemporal
                )  # fmt: skip
                backward_row(x_gap == 0 and dy_gap == 0, n, head_dim, tile)
    fence()
