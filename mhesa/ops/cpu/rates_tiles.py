"""The arithmetic of the scan at rates of every step on CPU: one row at a time.

A tile is some neighbouring channels of a row. Narrow heads, of 8, 16 or 32 channels, are taken several at a
time, in tiles of `GROUP` channels. Others are taken one at a time, in tiles of 16 channels, of 8 and of 1.
"""

# Numba finds the types of kernels when it compiles them.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

from mhesa.ops.cpu.compiling import cgutils, intrinsic, jit, types
from mhesa.ops.cpu.simd import I32, REGISTER, Emitter, shuffle, specialized, splat

# Channels of a tile; processors with shorter vectors take several instructions.
LANES, HALF = 16, 8
# Channels of a tile of several heads: four vector registers of fp32.
GROUP = max(REGISTER, LANES)


def _load_rates(emit: Emitter, pointer: Any, head: Any, dims: int) -> Any:
    """The rates of neighbouring heads from `head` on, each in the lanes of its `dims` channels."""
    heads = emit.lanes // dims
    rates = Emitter(emit.builder, emit.stored, heads).load(pointer, head)
    if heads == 1:
        return splat(emit, rates)
    return shuffle(emit, rates, [lane // dims for lane in range(emit.lanes)])


def _store_head_sums(emit: Emitter, vector: Any, pointer: Any, head: Any, dims: int) -> None:
    """Store the sums over each head's `dims` lanes; if all lanes are of one head, add to what is there."""
    heads, lanes = Emitter(emit.builder, emit.stored, emit.lanes // dims), emit.lanes
    while lanes > heads.lanes:
        even, odd = (shuffle(emit, vector, list(range(first, lanes, 2))) for first in (0, 1))
        vector, lanes = emit.builder.fadd(even, odd), lanes // 2
    if heads.lanes == 1 and emit.lanes > 1:
        vector = emit.builder.extract_element(vector, I32(0))
    if heads.lanes == 1:
        vector = emit.builder.fadd(vector, heads.load(pointer, head))
    heads.store(vector, pointer, head)


# Each writes the instructions of a tile: channels from `at` on, which are those of `head`, or of heads from
# `head` on with `dims` channels each. A gap is what the distance of heads in memory exceeds `head_dim` by.


def _load_values(emit, x, gap, head, at):
    builder = emit.builder
    return emit.widen(emit.load(x, builder.add(at, builder.mul(head, gap))))


def _advance(emit, dims, head, at, x, x_gap, alpha, decay, before, after):
    """Advance the state by one step, from `before` to `after`."""
    a, d = (_load_rates(emit, rates, head, dims) for rates in (alpha, decay))
    value = _load_values(emit, x, x_gap, head, at)
    h = emit.flush(emit.fma(d, emit.load(before, at), emit.builder.fmul(a, value)))
    emit.store(h, after, at)
    return value, h


def _write(emit, dims, head, at, x, x_gap, alpha, decay, state, out, skip, skips, nontemporal):
    """Advance the state, and store y."""
    value, h = _advance(emit, dims, head, at, x, x_gap, alpha, decay, state, state)

    def write(skips: bool, nontemporal: bool) -> None:
        # Without a skip term nothing is added: zero times an infinite x would be NaN.
        y = emit.fma(emit.load(skip, at), value, h) if skips else h
        emit.store(emit.narrow(y), out, at, nontemporal)

    specialized(emit.builder, write, skips, nontemporal)


def _carry(emit, dims, head, at, dy, dy_gap, decay, p):
    """Carry the gradient `p` of the states back by one step."""
    builder, d = emit.builder, _load_rates(emit, decay, head, dims)
    dvalue = _load_values(emit, dy, dy_gap, head, at)
    g = builder.fadd(dvalue, emit.load(p, at))
    emit.store(emit.flush(builder.fmul(d, g)), p, at)
    return dvalue, g


def _backward(
    emit, dims, head, at, x, x_gap, dy, dy_gap, alpha, decay, before, p, out, skip, dskip, dalpha, ddecay,
    skips, nontemporal,
):  # fmt: skip
    """As `_carry`, with all gradients; those of the rates are added if the tile is a piece of a head."""
    builder, a = emit.builder, _load_rates(emit, alpha, head, dims)
    value = _load_values(emit, x, x_gap, head, at)
    dvalue, g = _carry(emit, dims, head, at, dy, dy_gap, decay, p)
    sums = (builder.fmul(g, value), dalpha), (builder.fmul(g, emit.load(before, at)), ddecay)
    for products, place in sums:
        _store_head_sums(emit, products, place, head, dims)

    def write(skips: bool, nontemporal: bool) -> None:
        dx = builder.fmul(a, g)
        if skips:
            dx = emit.fma(emit.load(skip, at), dvalue, dx)
            emit.store(emit.fma(dvalue, value, emit.load(dskip, at)), dskip, at)
        emit.store(emit.narrow(dx), out, at, nontemporal)

    specialized(builder, write, skips, nontemporal)


def _tile(write, lanes, dims):
    @intrinsic
    def tile(context, head, at, args):
        def codegen(context, builder, signature, values):
            emit = Emitter(builder, args.types[0].dtype, lanes)
            write(emit, dims, *values[:2], *cgutils.unpack_tuple(builder, values[2]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, args), codegen

    return jit(lambda head, at, args: tile(head, at, args))


def _walk(write):
    """A function `walk(contiguous, heads, head_dim, args)` over the tiles of a row.

    `write` writes the instructions of a tile. Tiles of several heads need heads that are `contiguous`.
    """
    by_8, by_16, by_32 = (_groups(write, min(dims, GROUP)) for dims in (8, 16, 32))
    wide, half, single = (_tile(write, lanes, lanes) for lanes in (LANES, HALF, 1))

    @jit
    def walk(contiguous, heads, head_dim, args):
        done = 0
        if contiguous and head_dim <= GROUP:
            if head_dim == 8:
                done = by_8(heads, args)
            elif head_dim == 16:
                done = by_16(heads, args)
            elif head_dim == 32:
                done = by_32(heads, args)
        for head in range(done, heads):
            start, end = head * head_dim, (head + 1) * head_dim
            wide_end, half_end = end - head_dim % LANES, end - head_dim % HALF
            for channel in range(start, wide_end, LANES):
                wide(head, channel, args)
            for channel in range(wide_end, half_end, HALF):
                half(head, channel, args)
            for channel in range(half_end, end):
                single(head, channel, args)

    return walk


def _groups(write, dims):
    """A function that takes as many heads as fill tiles of `GROUP` channels, and returns their number."""
    tile, heads_per_tile = _tile(write, GROUP, dims), GROUP // dims

    @jit
    def walk(heads, args):
        for i in range(heads // heads_per_tile):
            tile(i * heads_per_tile, i * GROUP, args)
        return heads // heads_per_tile * heads_per_tile

    return walk


# `write_row` advances the state by a row and writes y, `advance_row` only advances it. `carry_row` carries
# `p` back by a row, `backward_row` also writes the gradients.
write_row, advance_row, carry_row, backward_row = map(_walk, (_write, _advance, _carry, _backward))
