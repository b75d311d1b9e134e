"""The arithmetic of the scan on CPU: one row, or `ROWS`, of a tile of channels, with its state in registers.

Names: `x_step` is the distance from a row to the next in the direction of the scan, in elements; `row` is a
task's scratch memory, one row of `STRIDE` for each of the values that a channel has; `n` counts channels.
"""

# Numba finds the types of kernels when it compiles them.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from mhesa.ops.cpu.compiling import intrinsic, jit, literals, offset, types
from mhesa.ops.cpu.simd import I64, REGISTER, Emitter, specialized

# Channels whose state a task holds at a time: eight rows of fp32 fill half of a 32 KB cache.
WIDTH = 512
# The distance of rows in scratch memory; not a power of two, or they would share cache sets.
STRIDE = WIDTH + 64
# Channels in a vector; processors with shorter vectors take several instructions.
LANES, HALF = 16, 8
# Rows taken at a time where they are too narrow to be read at the speed of a copy.
ROWS = 4
# The rows of scratch memory; forward, `ROW_P` holds the state.
ROW_ALPHA, ROW_DECAY, ROW_SKIP, ROW_P, ROW_R, ROW_DALPHA, ROW_DDECAY, ROW_DSKIP = range(0, 8 * STRIDE, STRIDE)
SCRATCH = 8 * STRIDE


@intrinsic
def _forward_tile(context, x, x_step, out, out_step, scratch, skips, nontemporal, writes, lanes, rows):
    """Scan `lanes` channels over `rows` rows; store results only if `writes`."""
    if not literals(writes, lanes, rows):
        return None

    def codegen(context, builder, signature, args):
        x_0, x_step, out_0, out_step, row, skips, nontemporal, *_ = args

        def scan(skips: bool, nontemporal: bool) -> None:
            emit = Emitter(builder, x.dtype, lanes.literal_value)
            a, d, s, h = (emit.load(row, I64(place)) for place in (ROW_ALPHA, ROW_DECAY, ROW_SKIP, ROW_P))
            for step in range(rows.literal_value):
                value = emit.widen(emit.load(x_0, builder.mul(x_step, I64(step))))
                h = emit.flush(emit.fma(d, h, builder.fmul(a, value)))
                if writes.literal_value:
                    # Without a skip term nothing is added: zero times an infinite x would be NaN.
                    y = emit.fma(s, value, h) if skips else h
                    emit.store(emit.narrow(y), out_0, builder.mul(out_step, I64(step)), nontemporal)
            emit.store(h, row, I64(ROW_P))

        specialized(builder, scan, skips, nontemporal)
        return context.get_dummy_value()

    flags = (types.boolean, types.boolean)
    return types.void(x, types.int64, out, types.int64, scratch, *flags, writes, lanes, rows), codegen


@intrinsic
def _backward_tile(context, x, x_step, dy, dy_step, out, out_step, scratch, skips, nontemporal, lanes, rows):
    """Carry the gradients of `lanes` channels back over `rows` rows."""
    if not literals(lanes, rows):
        return None

    def codegen(context, builder, signature, args):
        x_0, x_step, dy_0, dy_step, out_0, out_step, row, skips, nontemporal, *_ = args
        carries = (ROW_P, ROW_R, ROW_DALPHA, ROW_DDECAY, ROW_DSKIP)
        # The carries of this many channels fit into registers.
        at_once = min(REGISTER // (8 if x.dtype == types.float64 else 4), lanes.literal_value)
        emit = Emitter(builder, x.dtype, at_once)

        def carry_back(first: int, skips: bool, nontemporal: bool) -> None:
            a, d, s = (emit.load(row, I64(place + first)) for place in (ROW_ALPHA, ROW_DECAY, ROW_SKIP))
            p, r, dalpha, ddecay, dskip = (emit.load(row, I64(place + first)) for place in carries)
            for step in range(rows.literal_value):
                x_t, dy_t, out_t = (
                    builder.add(builder.mul(by_row, I64(step)), I64(first))
                    for by_row in (x_step, dy_step, out_step)
                )
                value, dvalue = emit.widen(emit.load(x_0, x_t)), emit.widen(emit.load(dy_0, dy_t))
                g = builder.fadd(dvalue, p)
                dx = builder.fmul(a, g)
                dx = emit.fma(s, dvalue, dx) if skips else dx
                emit.store(emit.narrow(dx), out_0, out_t, nontemporal)
                dalpha, ddecay = emit.fma(g, value, dalpha), emit.fma(r, value, ddecay)
                dskip = emit.fma(dvalue, value, dskip)
                p, r = builder.fmul(d, g), emit.fma(d, r, g)
            sums = (emit.flush(p), emit.flush(r), dalpha, ddecay, dskip)
            for carry, place in zip(sums, carries, strict=True):
                emit.store(carry, row, I64(place + first))

        def tile(skips: bool, nontemporal: bool) -> None:
            for first in range(0, lanes.literal_value, at_once):
                carry_back(first, skips, nontemporal)

        specialized(builder, tile, skips, nontemporal)
        return context.get_dummy_value()

    flags = (types.boolean, types.boolean)
    steps = (x, types.int64, dy, types.int64, out, types.int64)
    return types.void(*steps, scratch, *flags, lanes, rows), codegen


@intrinsic
def _backward_ends_tile(context, dy, dy_step, scratch, lanes, rows):
    """Carry `p` and `r` of `lanes` channels back over `rows` rows, without results."""
    if not literals(lanes, rows):
        return None

    def codegen(context, builder, signature, args):
        dy_0, dy_step, row, *_ = args
        emit = Emitter(builder, dy.dtype, lanes.literal_value)
        d, p, r = (emit.load(row, I64(place)) for place in (ROW_DECAY, ROW_P, ROW_R))
        for step in range(rows.literal_value):
            g = builder.fadd(emit.widen(emit.load(dy_0, builder.mul(dy_step, I64(step)))), p)
            p, r = builder.fmul(d, g), emit.fma(d, r, g)
        emit.store(emit.flush(p), row, I64(ROW_P))
        emit.store(emit.flush(r), row, I64(ROW_R))
        return context.get_dummy_value()

    return types.void(dy, types.int64, scratch, lanes, rows), codegen


@jit
def _tile_start(i, n, step):
    """The first channel of the `i`-th tile; tiles run backward if rows do: prefetching needs it."""
    return (n // LANES - 1 - i if step < 0 else i) * LANES


def _walk(make_tile, rows):
    """A function `walk(step, n, args)` over `n` channels in tiles of `LANES`, of `HALF`, then of one.

    `make_tile(lanes, rows)` returns what it calls, `tile(i, args)` for the channels from `i` on: both numbers
    must be constants when the instructions are written.
    """
    wide, half, single = (make_tile(lanes, rows) for lanes in (LANES, HALF, 1))

    @jit
    def walk(step, n, args):
        for tile in range(n // LANES):
            wide(_tile_start(tile, n, step), args)
        i = n // LANES * LANES
        if n - i >= HALF:
            half(i, args)
            i += HALF
        while i < n:
            single(i, args)
            i += 1

    return walk


def _forward(lanes, rows):
    @jit
    def tile(i, args):
        x, x_step, out, out_step, row, skips, nontemporal = args
        x_i, out_i, row_i = offset(x, i), offset(out, i), offset(row, i)
        _forward_tile(x_i, x_step, out_i, out_step, row_i, skips, nontemporal, 1, lanes, rows)

    return tile


def _ends(lanes, rows):
    @jit
    def tile(i, args):
        x, x_step, row = args
        _forward_tile(offset(x, i), x_step, x, 0, offset(row, i), False, False, 0, lanes, rows)

    return tile


def _backward(lanes, rows):
    @jit
    def tile(i, args):
        x, x_step, dy, dy_step, out, out_step, row, skips, nontemporal = args
        x_i, dy_i, out_i, row_i = offset(x, i), offset(dy, i), offset(out, i), offset(row, i)
        _backward_tile(x_i, x_step, dy_i, dy_step, out_i, out_step, row_i, skips, nontemporal, lanes, rows)

    return tile


def _backward_ends(lanes, rows):
    @jit
    def tile(i, args):
        dy, dy_step, row = args
        _backward_ends_tile(offset(dy, i), dy_step, offset(row, i), lanes, rows)

    return tile


forward_row, forward_rows = _walk(_forward, 1), _walk(_forward, ROWS)
ends_row, ends_rows = _walk(_ends, 1), _walk(_ends, ROWS)
backward_row, backward_rows = _walk(_backward, 1), _walk(_backward, ROWS)
backward_ends_row, backward_ends_rows = _walk(_backward_ends, 1), _walk(_backward_ends, ROWS)


@intrinsic
def _prefetch_line(context, x, index):
    def codegen(context, builder, signature, args):
        Emitter(builder, x.dtype, 1).prefetch(args[0], args[1])
        return context.get_dummy_value()

    return types.void(x, types.int64), codegen


@intrinsic
def _values_per_line(context, x):
    def codegen(context, builder, signature, args):
        return I64(64 // Emitter(builder, x.dtype, 1).bytes)

    return types.int64(x), codegen


@jit
def prefetch(x, x_step, rows, n):
    """Bring `rows` rows of `n` channels into the L2 cache, from first to last."""
    for _ in range(rows):
        for i in range(0, n, _values_per_line(x)):
            _prefetch_line(x, i)
        x = offset(x, x_step)


@jit
def fill(to, value, n):
    """Set `n` values."""
    for i in range(n):
        to[i] = value


@jit
def copy(to, source, n):
    """Copy `n` values."""
    for i in range(n):
        to[i] = source[i]
