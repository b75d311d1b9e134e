"""The arithmetic of the scan on CPU: one row, or `ROWS`, of a tile of channels, with its state in registers.

Names: `x_step` is the distance from a row to the next in the direction of the scan, in elements; `row` is a
task's scratch memory, one row of `STRIDE` for each of the values that a channel has; `n` counts channels.
"""

# Numba finds the types of kernels when it compiles them.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from functools import partial

from mhesa.ops.cpu.compiling import cgutils, intrinsic, jit, offset, types
from mhesa.ops.cpu.simd import I8, I32, I64, REGISTER, VOID, Emitter, call, specialized

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


@jit
def _tile_start(i, n, step):
    """The first channel of the `i`-th tile; tiles run backward if rows do: prefetching needs it."""
    return (n // LANES - 1 - i if step < 0 else i) * LANES


def _walk(write, rows):
    """A function `walk(step, n, args)` over `n` channels in tiles of `LANES`, of `HALF`, then of one.

    `write(emit, rows, *args)` writes a tile's instructions, with pointers at its first channel.
    """
    wide, half, single = (_tile(write, lanes, rows) for lanes in (LANES, HALF, 1))

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


def _tile(write, lanes, rows):
    @intrinsic
    def tile(context, i, args):
        def codegen(context, builder, signature, values):
            at, given = values[0], cgutils.unpack_tuple(builder, values[1])
            moved = [
                builder.gep(value, [at]) if isinstance(kind, types.CPointer) else value
                for kind, value in zip(args.types, given, strict=True)
            ]
            write(Emitter(builder, args.types[0].dtype, lanes), rows, *moved)
            return context.get_dummy_value()

        return types.void(types.int64, args), codegen

    return jit(lambda i, args: tile(i, args))


def _forward(emit, rows, x, x_step, out, out_step, row, skips, nontemporal):
    """Scan the tile's channels over `rows` rows."""
    specialized(emit.builder, partial(_scan, emit, rows, x, x_step, row, out, out_step), skips, nontemporal)


def _scan(emit, rows, x, x_step, row, out=None, out_step=None, skips=False, nontemporal=False):
    """Move the state over `rows` rows; store results if there is an `out`."""
    builder = emit.builder
    a, d, s, h = (emit.load(row, I64(place)) for place in (ROW_ALPHA, ROW_DECAY, ROW_SKIP, ROW_P))
    for step in range(rows):
        value = emit.widen(emit.load(x, builder.mul(x_step, I64(step))))
        h = emit.flush(emit.fma(d, h, builder.fmul(a, value)))
        if out is not None:
            # Without a skip term nothing is added: zero times an infinite x would be NaN.
            y = emit.fma(s, value, h) if skips else h
            emit.store(emit.narrow(y), out, builder.mul(out_step, I64(step)), nontemporal)
    emit.store(h, row, I64(ROW_P))


def _backward(emit, rows, x, x_step, dy, dy_step, out, out_step, row, skips, nontemporal):
    """Carry the gradients of the tile's channels back over `rows` rows."""
    builder, carries = emit.builder, (ROW_P, ROW_R, ROW_DALPHA, ROW_DDECAY, ROW_DSKIP)
    # The carries of this many channels fit into registers.
    at_once = min(REGISTER // (8 if emit.double else 4), emit.lanes)
    part = Emitter(builder, emit.stored, at_once)

    def carry_back(first: int, skips: bool, nontemporal: bool) -> None:
        a, d, s = (part.load(row, I64(place + first)) for place in (ROW_ALPHA, ROW_DECAY, ROW_SKIP))
        p, r, dalpha, ddecay, dskip = (part.load(row, I64(place + first)) for place in carries)
        for step in range(rows):
            x_t, dy_t, out_t = (
                builder.add(builder.mul(by_row, I64(step)), I64(first))
                for by_row in (x_step, dy_step, out_step)
            )
            value, dvalue = part.widen(part.load(x, x_t)), part.widen(part.load(dy, dy_t))
            g = builder.fadd(dvalue, p)
            dx = builder.fmul(a, g)
            dx = part.fma(s, dvalue, dx) if skips else dx
            part.store(part.narrow(dx), out, out_t, nontemporal)
            dalpha, ddecay = part.fma(g, value, dalpha), part.fma(r, value, ddecay)
            dskip = part.fma(dvalue, value, dskip)
            p, r = builder.fmul(d, g), part.fma(d, r, g)
        sums = (part.flush(p), part.flush(r), dalpha, ddecay, dskip)
        for carry, place in zip(sums, carries, strict=True):
            part.store(carry, row, I64(place + first))

    def tile(skips: bool, nontemporal: bool) -> None:
        for first in range(0, emit.lanes, at_once):
            carry_back(first, skips, nontemporal)

    specialized(builder, tile, skips, nontemporal)


def _backward_ends(emit, rows, dy, dy_step, row):
    """Carry `p` and `r` of the tile's channels back over `rows` rows, without results."""
    builder = emit.builder
    d, p, r = (emit.load(row, I64(place)) for place in (ROW_DECAY, ROW_P, ROW_R))
    for step in range(rows):
        g = builder.fadd(emit.widen(emit.load(dy, builder.mul(dy_step, I64(step)))), p)
        p, r = builder.fmul(d, g), emit.fma(d, r, g)
    emit.store(emit.flush(p), row, I64(ROW_P))
    emit.store(emit.flush(r), row, I64(ROW_R))


forward_row, forward_rows = _walk(_forward, 1), _walk(_forward, ROWS)
ends_row, ends_rows = _walk(_scan, 1), _walk(_scan, ROWS)
backward_row, backward_rows = _walk(_backward, 1), _walk(_backward, ROWS)
backward_ends_row, backward_ends_rows = _walk(_backward_ends, 1), _walk(_backward_ends, ROWS)


@intrinsic
def _prefetch_line(context, x, index):
    def codegen(context, builder, signature, args):
        # An address outside the process does no harm.
        address = builder.bitcast(builder.gep(args[0], [args[1]]), I8.as_pointer())
        # LLVM's arguments: read (0), locality (2: L2), data cache (1).
        call(builder, "llvm.prefetch.p0", VOID, address, I32(0), I32(2), I32(1))
        return context.get_dummy_value()

    return types.void(x, types.int64), codegen


@intrinsic
def _values_per_line(context, x):
    def codegen(context, builder, signature, args):
        return I64(64 // Emitter.align(args[0]))

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
