"""The arithmetic of the scan at rates of every step on CPU: one row at a time.

A tile is some neighbouring channels of a row. Narrow heads, of 8, 16 or 32 channels, are taken several at a
time, in tiles of `GROUP` channels. Others are taken one at a time, in tiles of 16 channels, of 8 and of 1.
"""

# Numba finds the types of kernels when it compiles them.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

from mhesa.ops.cpu.compiling import intrinsic, jit, literals, offset, types
from mhesa.ops.cpu.simd import I32, I64, REGISTER, Emitter, shuffle, specialized, splat

# Channels of a tile; processors with shorter vectors take several instructions.
LANES, HALF = 16, 8
# Channels of a tile of several heads: four vector registers of fp32.
GROUP = max(REGISTER, LANES)


def _load_rates(emit: Emitter, pointer: Any, dims: int) -> Any:
    """The rates of neighbouring heads, each in the lanes of its `dims` channels."""
    heads = emit.lanes // dims
    rates = Emitter(emit.builder, emit.stored, heads).load(pointer, I64(0))
    if heads == 1:
        return splat(emit, rates)
    return shuffle(emit, rates, [lane // dims for lane in range(emit.lanes)])


def _store_head_sums(emit: Emitter, vector: Any, pointer: Any, dims: int) -> None:
    """Store the sums over each head's `dims` lanes; if all lanes are of one head, add to what is there."""
    heads, lanes = Emitter(emit.builder, emit.stored, emit.lanes // dims), emit.lanes
    while lanes > heads.lanes:
        even, odd = (shuffle(emit, vector, list(range(first, lanes, 2))) for first in (0, 1))
        vector, lanes = emit.builder.fadd(even, odd), lanes // 2
    if heads.lanes == 1 and emit.lanes > 1:
        vector = emit.builder.extract_element(vector, I32(0))
    if heads.lanes == 1:
        vector = emit.builder.fadd(vector, heads.load(pointer, I64(0)))
    heads.store(vector, pointer, I64(0))


@intrinsic
def _forward_tile(
    context, x, alpha, decay, before, after, out, skip, skips, nontemporal, writes, lanes, dims
):
    """Advance the state of `lanes` channels by one step, from `before` to `after`; with `writes` store y."""
    if not literals(writes, lanes, dims):
        return None

    def codegen(context, builder, signature, args):
        x_0, alpha_0, decay_0, before_0, after_0, out_0, skip_0, skips, nontemporal, *_ = args
        emit, start = Emitter(builder, x.dtype, lanes.literal_value), I64(0)
        a, d = (_load_rates(emit, rates, dims.literal_value) for rates in (alpha_0, decay_0))
        value = emit.widen(emit.load(x_0, start))
        h = emit.flush(emit.fma(d, emit.load(before_0, start), builder.fmul(a, value)))
        emit.store(h, after_0, start)

        def write(skips: bool, nontemporal: bool) -> None:
            # Without a skip term nothing is added: zero times an infinite x would be NaN.
            y = emit.fma(emit.load(skip_0, start), value, h) if skips else h
            emit.store(emit.narrow(y), out_0, start, nontemporal)

        if writes.literal_value:
            specialized(builder, write, skips, nontemporal)
        return context.get_dummy_value()

    flags, constants = (types.boolean, types.boolean), (writes, lanes, dims)
    return types.void(x, alpha, decay, before, after, out, skip, *flags, *constants), codegen


@intrinsic
def _carry_tile(context, dy, decay, p, lanes, dims):
    """Carry the gradient `p` of `lanes` channels' states back by one step."""
    if not literals(lanes, dims):
        return None

    def codegen(context, builder, signature, args):
        dy_0, decay_0, p_0, *_ = args
        emit, start = Emitter(builder, dy.dtype, lanes.literal_value), I64(0)
        d = _load_rates(emit, decay_0, dims.literal_value)
        g = builder.fadd(emit.widen(emit.load(dy_0, start)), emit.load(p_0, start))
        emit.store(emit.flush(builder.fmul(d, g)), p_0, start)
        return context.get_dummy_value()

    return types.void(dy, decay, p, lanes, dims), codegen


@intrinsic
def _backward_tile(
    context, x, dy, alpha, decay, before, p, out, skip, dskip, dalpha, ddecay, skips, nontemporal, lanes, dims
):
    """As `_carry_tile`, with all gradients; those of the rates are added if the tile is a piece of a head."""
    if not literals(lanes, dims):
        return None

    def codegen(context, builder, signature, args):
        x_0, dy_0, alpha_0, decay_0, before_0, p_0, out_0, skip_0, dskip_0, dalpha_0, ddecay_0, *flags = args
        emit, start = Emitter(builder, x.dtype, lanes.literal_value), I64(0)
        a, d = (_load_rates(emit, rates, dims.literal_value) for rates in (alpha_0, decay_0))
        value, dvalue = emit.widen(emit.load(x_0, start)), emit.widen(emit.load(dy_0, start))
        g = builder.fadd(dvalue, emit.load(p_0, start))
        emit.store(emit.flush(builder.fmul(d, g)), p_0, start)
        sums = (builder.fmul(g, value), dalpha_0), (builder.fmul(g, emit.load(before_0, start)), ddecay_0)
        for products, place in sums:
            _store_head_sums(emit, products, place, dims.literal_value)

        def write(skips: bool, nontemporal: bool) -> None:
            dx = builder.fmul(a, g)
            if skips:
                dx = emit.fma(emit.load(skip_0, start), dvalue, dx)
                emit.store(emit.fma(dvalue, value, emit.load(dskip_0, start)), dskip_0, start)
            emit.store(emit.narrow(dx), out_0, start, nontemporal)

        specialized(builder, write, *flags[:2])
        return context.get_dummy_value()

    tensors = (x, dy, alpha, decay, before, p, out, skip, dskip, dalpha, ddecay)
    return types.void(*tensors, types.boolean, types.boolean, lanes, dims), codegen


def _walk(make_tile):
    """A function `walk(contiguous, heads, head_dim, args)` over the tiles of a row.

    `make_tile(lanes, dims)` returns what it calls, `tile(head, channel, args)`, for the `lanes` channels from
    `channel` on, `dims` of them in each head: both numbers must be constants when the instructions are
    written. Tiles of several heads need heads that are `contiguous`.
    """
    by_8, by_16, by_32 = (_groups(make_tile, min(dims, GROUP)) for dims in (8, 16, 32))
    wide, half, single = (make_tile(lanes, lanes) for lanes in (LANES, HALF, 1))

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


def _groups(make_tile, dims):
    """A function that takes as many heads as fill tiles of `GROUP` channels, and returns their number."""
    tile, heads_per_tile = make_tile(GROUP, dims), GROUP // dims

    @jit
    def walk(heads, args):
        for i in range(heads // heads_per_tile):
            tile(i * heads_per_tile, i * GROUP, args)
        return heads // heads_per_tile * heads_per_tile

    return walk


# In the tiles below a gap is what the distance of heads in memory exceeds `head_dim` by.


def _write(lanes, dims):
    @jit
    def tile(head, at, args):
        x, x_gap, alpha, decay, state, out, skip, skips, nontemporal = args
        h = offset(state, at)
        _forward_tile(
            offset(x, at + head * x_gap), offset(alpha, head), offset(decay, head), h, h,
            offset(out, at), offset(skip, at), skips, nontemporal, 1, lanes, dims,
        )  # fmt: skip

    return tile


def _advance(lanes, dims):
    @jit
    def tile(head, at, args):
        x, x_gap, alpha, decay, before, after = args
        x, before = offset(x, at + head * x_gap), offset(before, at)
        alpha, decay, after = offset(alpha, head), offset(decay, head), offset(after, at)
        _forward_tile(x, alpha, decay, before, after, x, before, False, False, 0, lanes, dims)

    return tile


def _carry(lanes, dims):
    @jit
    def tile(head, at, args):
        dy, dy_gap, decay, p = args
        _carry_tile(offset(dy, at + head * dy_gap), offset(decay, head), offset(p, at), lanes, dims)

    return tile


def _backward(lanes, dims):
    @jit
    def tile(head, at, args):
        inputs, states, outputs, skips, nontemporal = args
        x, x_gap, dy, dy_gap = inputs
        alpha, decay, before, p = states
        out, skip, dskip, dalpha, ddecay = outputs
        _backward_tile(
            offset(x, at + head * x_gap), offset(dy, at + head * dy_gap), offset(alpha, head),
            offset(decay, head), offset(before, at), offset(p, at), offset(out, at), offset(skip, at),
            offset(dskip, at), offset(dalpha, head), offset(ddecay, head), skips, nontemporal, lanes, dims,
        )  # fmt: skip

    return tile


# `write_row` advances the state by a row and writes y, `advance_row` only advances it. `carry_row` carries
# `p` back by a row, `backward_row` also writes the gradients.
write_row, advance_row, carry_row, backward_row = map(_walk, (_write, _advance, _carry, _backward))
