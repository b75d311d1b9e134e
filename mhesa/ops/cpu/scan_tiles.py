"""The arithmetic of the scan on CPU: a few rows of a tile of channels, their state in registers."""

# Kernels are numba's language: types are found when they are compiled.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

from mhesa.ops.cpu.simd import I64, REGISTER, Emitter, intrinsic, jit, offset, specialized, types

# Channels whose state a task holds at a time: eight rows of fp32 fill half of a 32 KB cache.
WIDTH = 512
# Rows of scratch memory lie this far apart, not a power of two, or they would share cache sets and stall.
STRIDE = WIDTH + 64
# Channels that one vector instruction takes, or a few where vectors are shorter.
LANES, HALF = 16, 8
# Rows that are taken at a time where they are too short for a copy's speed.
ROWS = 4
# The rows of a task's scratch memory.
ROW_ALPHA, ROW_DECAY, ROW_SKIP, ROW_P, ROW_R, ROW_DALPHA, ROW_DDECAY, ROW_DSKIP = range(0, 8 * STRIDE, STRIDE)
SCRATCH = 8 * STRIDE


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

        def scan(skips: bool, streams: bool) -> None:
            emit = Emitter(builder, x.dtype, lanes.literal_value)
            a, d, s, h = (emit.load(row, I64(place)) for place in (ROW_ALPHA, ROW_DECAY, ROW_SKIP, ROW_P))
            for step in range(rows.literal_value):
                value = emit.widen(emit.load(x_0, builder.mul(x_step, I64(step))))
                h = emit.flush(emit.fma(d, h, builder.fmul(a, value)))
                if writes.literal_value:
                    # Without a skip term nothing is added, not zero times x: that is NaN for infinite x.
                    y = emit.fma(s, value, h) if skips else h
                    emit.store(emit.narrow(y), out_0, builder.mul(out_step, I64(step)), streams)
            emit.store(h, row, I64(ROW_P))

        specialized(builder, scan, skips, streams)
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
        carries = (ROW_P, ROW_R, ROW_DALPHA, ROW_DDECAY, ROW_DSKIP)
        # As many channels at once as the carries of fit into registers.
        at_once = min(REGISTER // (8 if x.dtype == types.float64 else 4), lanes.literal_value)
        emit = Emitter(builder, x.dtype, at_once)

        def carry_back(first: int, skips: bool, streams: bool) -> None:
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
                emit.store(emit.narrow(dx), out_0, out_t, streams)
                dalpha, ddecay = emit.fma(g, value, dalpha), emit.fma(r, value, ddecay)
                dskip = emit.fma(dvalue, value, dskip)
                p, r = builder.fmul(d, g), emit.fma(d, r, g)
            sums = (emit.flush(p), emit.flush(r), dalpha, ddecay, dskip)
            for carry, place in zip(sums, carries, strict=True):
                emit.store(carry, row, I64(place + first))

        def tile(skips: bool, streams: bool) -> None:
            for first in range(0, lanes.literal_value, at_once):
                carry_back(first, skips, streams)

        specialized(builder, tile, skips, streams)
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
            p, r = builder.fmul(d, g), emit.fma(d, r, g)
        emit.store(emit.flush(p), row, I64(ROW_P))
        emit.store(emit.flush(r), row, I64(ROW_R))
        return context.get_dummy_value()

    return types.void(dy, types.int64, scratch, lanes, rows), codegen


# Each walks along rows in tiles of `LANES` channels, of half as many, and single ones. They are made for a
# number of rows at a time, which must be a constant where the instructions are written. Where rows are taken
# from the last to the first, so are their tiles: memory is then read in one direction, as processors expect.


@jit
def _tile(i, n, step):
    """Where the tile `i` of so many begins, along rows that are `step` apart."""
    return (n // LANES - 1 - i if step < 0 else i) * LANES


def _forward_walk(rows):
    @jit
    def walk(x, x_step, out, out_step, row, skips, streams, n):
        for tile in range(n // LANES):
            i = _tile(tile, n, x_step)
            x_i, out_i, part = offset(x, i), offset(out, i), offset(row, i)
            _forward_tile(x_i, x_step, out_i, out_step, part, skips, streams, 1, LANES, rows)
        i = n // LANES * LANES
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
        for tile in range(n // LANES):
            i = _tile(tile, n, x_step)
            _forward_tile(offset(x, i), x_step, x, 0, offset(row, i), False, False, 0, LANES, rows)
        i = n // LANES * LANES
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
        for tile in range(n // LANES):
            i = _tile(tile, n, dy_step)
            _backward_ends_tile(offset(dy, i), dy_step, offset(row, i), LANES, rows)
        i = n // LANES * LANES
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
        for tile in range(n // LANES):
            i = _tile(tile, n, out_step)
            x_i, dy_i, out_i, part = offset(x, i), offset(dy, i), offset(out, i), offset(row, i)
            _backward_tile(x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, streams, LANES, rows)
        i = n // LANES * LANES
        if n - i >= HALF:
            x_i, dy_i, out_i, part = offset(x, i), offset(dy, i), offset(out, i), offset(row, i)
            _backward_tile(x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, streams, HALF, rows)
            i += HALF
        while i < n:
            x_i, dy_i, out_i, part = offset(x, i), offset(dy, i), offset(out, i), offset(row, i)
            _backward_tile(x_i, x_step, dy_i, dy_step, out_i, out_step, part, skips, streams, 1, rows)
            i += 1

    return walk


forward_row, forward_rows = _forward_walk(1), _forward_walk(ROWS)
ends_row, ends_rows = _ends_walk(1), _ends_walk(ROWS)
backward_row, backward_rows = _backward_walk(1), _backward_walk(ROWS)
backward_ends_row, backward_ends_rows = _backward_ends_walk(1), _backward_ends_walk(ROWS)


@intrinsic
def _fetch_line(context: Any, x: Any, index: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        Emitter(builder, x.dtype, 1).prefetch(args[0], args[1], locality=2)
        return context.get_dummy_value()

    return types.void(x, types.int64), codegen


@intrinsic
def _in_line(context: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return I64(64 // Emitter(builder, x.dtype, 1).bytes)

    return types.int64(x), codegen


@jit
def fetch(x, x_step, steps, n):
    """Bring `steps` rows of `n` channels to the second cache, in the order of memory."""
    for _ in range(steps):
        for i in range(0, n, _in_line(x)):
            _fetch_line(x, i)
        x = offset(x, x_step)
