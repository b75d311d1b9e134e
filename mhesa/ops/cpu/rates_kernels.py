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
threads, of a chunk. Then threads take turns at a sequence, in a relay: each moves the state on through its
chunk, hands it to the next, and only then computes the chunk's results, from the state that it was handed.
Both do the same arithmetic step by step, so results are the same bit for bit whatever the batch and the
number of threads.
"""

# Numba finds the types of kernels when it compiles them.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from mhesa.ops.cpu.arguments import ACCUMULATION, INT64, STORED, Pointer, struct
from mhesa.ops.cpu.atomics import LINE, fence, fetch_add, signal, wait
from mhesa.ops.cpu.compiling import exists, jit, member, offset
from mhesa.ops.cpu.rates_tiles import GROUP, advance_row, backward_row, carry_row, write_row
from mhesa.ops.cpu.scan_tiles import prefetch

Chunk = struct(
    "Chunk",
    sequence="int64",
    batch="int64",  # where its rows are: index in the batch,
    begin="int64",  # first row,
    end="int64",  # and the row after its last
    earlier="int64",  # chunks of its sequence before it in the direction of the scan,
    later="int64",  # and after it
)
Arguments = struct(
    "Arguments",
    next_task="int64",
    tasks="int64",  # sequences or, in a relay, chunks
    blocks="int64",  # of heads, that each task is cut into
    chunks=Pointer(Chunk),
    first_chunk=INT64,  # of each sequence, and one more
    relay="int64",
    order=INT64,  # in a relay, the chunks: the first of every sequence, then the second ..
    turns=INT64,  # in a relay, finished chunks of each sequence and block, `LINE` apart
    buffer=ACCUMULATION,  # memory for each thread
    next_buffer="int64",
    buffer_size="int64",
    x=STORED,
    x_batch="int64",  # strides, in elements
    x_row="int64",
    x_head="int64",
    dy=STORED,
    dy_batch="int64",
    dy_row="int64",
    dy_head="int64",
    out=STORED,  # y, or dx; without it, `forward` computes the states only
    alpha=ACCUMULATION,  # of each step, a step's heads contiguous
    alpha_batch="int64",
    alpha_row="int64",
    decay=ACCUMULATION,
    decay_batch="int64",
    decay_row="int64",
    skip=ACCUMULATION,
    initial=ACCUMULATION,
    final=ACCUMULATION,
    dfinal=ACCUMULATION,
    dinitial=ACCUMULATION,
    dalpha=ACCUMULATION,
    ddecay=ACCUMULATION,
    dskip=ACCUMULATION,
    states=ACCUMULATION,  # at the start of each chunk
    length="int64",
    heads="int64",
    head_dim="int64",
    reverse="int64",
    nontemporal="int64",  # whether results are stored past the caches
)


@jit
def _fill(to, value, n):
    for i in range(n):
        to[i] = value


@jit
def _copy(to, source, n):
    for i in range(n):
        to[i] = source[i]


@jit
def _first_head(block, blocks, heads, head_dim):
    """Where a block of heads begins: between two tiles of several heads, which results must not depend on."""
    together = GROUP // head_dim if head_dim in (8, 16, 32) and head_dim <= GROUP else 1
    tiles = (heads + together - 1) // together
    return min(block * tiles // blocks * together, heads)


def forward(args):
    """Scan one task after another, until none is left."""
    heads, head_dim, blocks, relay = args.heads, args.head_dim, args.blocks, args.relay
    channels, sign = heads * head_dim, -1 if args.reverse else 1
    x, out, alpha, decay = args.x, args.out, args.alpha, args.decay
    skips, nontemporal = exists(args.skip), args.nontemporal != 0
    x_head, x_step, out_step = args.x_head, sign * args.x_row, sign * channels
    alpha_step, decay_step = sign * args.alpha_row, sign * args.decay_row
    handed = offset(args.buffer, fetch_add(member(args, "next_buffer")) * args.buffer_size)
    while True:
        task = fetch_add(member(args, "next_task"))
        if task >= args.tasks * blocks:
            break
        index, block = task // blocks, task % blocks
        head = _first_head(block, blocks, heads, head_dim)
        n, start = _first_head(block + 1, blocks, heads, head_dim) - head, head * head_dim
        width, skip = n * head_dim, offset(args.skip, start)
        low = args.order[index] if relay else args.first_chunk[index]
        high = low + 1 if relay else args.first_chunk[index + 1]
        for i in range(low, high):
            chunk = offset(args.chunks, i)
            rows, t = chunk.end - chunk.begin, chunk.end - 1 if args.reverse else chunk.begin
            x_t = offset(x, chunk.batch * args.x_batch + t * args.x_row + head * x_head)
            out_t = offset(out, (chunk.batch * args.length + t) * channels + start)
            alpha_t = offset(alpha, chunk.batch * args.alpha_batch + t * args.alpha_row + head)
            decay_t = offset(decay, chunk.batch * args.decay_batch + t * args.decay_row + head)
            turns = offset(args.turns, (chunk.sequence * blocks + block) * LINE)
            state = offset(args.final, chunk.sequence * channels + start)
            if relay:
                prefetch(x_t, x_step, rows, width)
                wait(turns, chunk.earlier)
            if chunk.earlier == 0:
                if exists(args.initial):
                    _copy(state, offset(args.initial, chunk.sequence * channels + start), width)
                else:
                    _fill(state, 0, width)
            _copy(offset(args.states, i * channels + start), state, width)
            if relay or not exists(out):
                _copy(handed, state, width)
                for row in range(rows):
                    advance_row(
                        offset(x_t, row * x_step), x_head, offset(alpha_t, row * alpha_step),
                        offset(decay_t, row * decay_step), state, state, n, head_dim,
                    )  # fmt: skip
                state = handed
            if relay:
                signal(turns)
            if exists(out):
                for row in range(rows):
                    write_row(
                        offset(x_t, row * x_step), x_head, offset(alpha_t, row * alpha_step),
                        offset(decay_t, row * decay_step), state, state,
                        offset(out_t, row * out_step), skip, skips, nontemporal, n, head_dim,
                    )  # fmt: skip
    fence()


def backward(args):
    """Carry the gradients back through one task after another, until none is left."""
    heads, head_dim, blocks, relay = args.heads, args.head_dim, args.blocks, args.relay
    channels, sign = heads * head_dim, -1 if args.reverse else 1
    x, dy, out, alpha, decay = args.x, args.dy, args.out, args.alpha, args.decay
    skips, nontemporal = exists(args.skip), args.nontemporal != 0
    x_head, dy_head = args.x_head, args.dy_head
    x_step, dy_step, out_step = sign * args.x_row, sign * args.dy_row, sign * channels
    alpha_step, decay_step, rate_step = sign * args.alpha_row, sign * args.decay_row, sign * heads
    handed = offset(args.buffer, fetch_add(member(args, "next_buffer")) * args.buffer_size)
    before = offset(handed, channels)
    while True:
        task = fetch_add(member(args, "next_task"))
        if task >= args.tasks * blocks:
            break
        index, block = task // blocks, task % blocks
        head = _first_head(block, blocks, heads, head_dim)
        n, start = _first_head(block + 1, blocks, heads, head_dim) - head, head * head_dim
        width, skip = n * head_dim, offset(args.skip, start)
        low = args.order[args.tasks - 1 - index] if relay else args.first_chunk[index]
        high = low + 1 if relay else args.first_chunk[index + 1]
        for i in range(high - 1, low - 1, -1):
            chunk = offset(args.chunks, i)
            rows, t = chunk.end - chunk.begin, chunk.end - 1 if args.reverse else chunk.begin
            x_t = offset(x, chunk.batch * args.x_batch + t * args.x_row + head * x_head)
            dy_t = offset(dy, chunk.batch * args.dy_batch + t * args.dy_row + head * dy_head)
            out_t = offset(out, (chunk.batch * args.length + t) * channels + start)
            alpha_t = offset(alpha, chunk.batch * args.alpha_batch + t * args.alpha_row + head)
            decay_t = offset(decay, chunk.batch * args.decay_batch + t * args.decay_row + head)
            rate_t = (chunk.batch * args.length + t) * heads + head
            dalpha_t, ddecay_t = offset(args.dalpha, rate_t), offset(args.ddecay, rate_t)
            turns = offset(args.turns, (chunk.sequence * blocks + block) * LINE)
            p = offset(args.dinitial, chunk.sequence * channels + start)
            _copy(before, offset(args.states, i * channels + start), width)
            for row in range(rows):
                prefetch(offset(dy_t, row * dy_step), 0, 1, width)
                if row + 1 < rows:
                    advance_row(
                        offset(x_t, row * x_step), x_head, offset(alpha_t, row * alpha_step),
                        offset(decay_t, row * decay_step), offset(before, row * width),
                        offset(before, (row + 1) * width), n, head_dim,
                    )  # fmt: skip
            if relay:
                wait(turns, chunk.later)
            if chunk.later == 0:
                _copy(p, offset(args.dfinal, chunk.sequence * channels + start), width)
            if relay:
                _copy(handed, p, width)
                for row in range(rows - 1, -1, -1):
                    carry_row(
                        offset(dy_t, row * dy_step), dy_head, offset(decay_t, row * decay_step),
                        p, n, head_dim,
                    )  # fmt: skip
                p = handed
                signal(turns)
            dskip = offset(args.dskip, i * channels + start)
            if skips:
                _fill(dskip, 0, width)
            for row in range(rows - 1, -1, -1):
                backward_row(
                    offset(x_t, row * x_step), x_head, offset(dy_t, row * dy_step), dy_head,
                    offset(alpha_t, row * alpha_step),
                    offset(decay_t, row * decay_step),
                    offset(before, row * width), p, offset(out_t, row * out_step), skip, dskip,
                    offset(dalpha_t, row * rate_step), offset(ddecay_t, row * rate_step),
                    skips, nontemporal, n, head_dim,
                )  # fmt: skip
    fence()
