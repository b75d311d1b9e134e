"""The arithmetic of the scan at rates of every step on CPU: one row at a time.

A tile is some neighbouring channels of a row. Narrow heads, of 8, 16 or 32 channels, are taken several at a
time, in tiles of `GROUP` channels. Others are taken one at a time, in tiles of 16 channels, of 8 and of 1.
"""

# Numba finds the types of kernels when it compiles them.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

from llvmlite import ir

from mhesa.ops.cpu.compiling import intrinsic, jit, offset, types
from mhesa.ops.cpu.simd import I32, I64, REGISTER, Emitter, specialized

# Channels of a tile; processors with shorter vectors take several instructions.
LANES, HALF = 16, 8
# Channels of a tile of several heads: four vector registers of fp32.
GROUP = max(REGISTER, LANES)


def _literals(*constants: Any) -> bool:
    return all(isinstance(constant, types.IntegerLiteral) for constant in constants)


def _shuffle(emit: Emitter, vector: Any, lanes: list[int]) -> Any:
    """The vector of the named lanes."""
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
    return emit.builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def _load_rates(emit: Emitter, pointer: Any, dims: int) -> Any:
    """The rates of neighbouring heads, each in the lanes of its `dims` channels."""
    heads = emit.lanes // dims
    rates = Emitter(emit.builder, emit.stored, heads).load(pointer, I64(0))
    if emit.lanes == 1:
        return rates
    if heads == 1:
        one = ir.Constant(ir.VectorType(emit.element, 1), ir.Undefined)
        rates = emit.builder.insert_element(one, rates, I32(0))
    return _shuffle(emit, rates, [lane // dims for lane in range(emit.lanes)])


def _add_head_sums(emit: Emitter, vector: Any, pointer: Any, dims: int, adds: bool) -> None:
    """Store the sums over each head's `dims` lanes; with `adds`, add them to what is there."""
    heads, lanes = Emitter(emit.builder, emit.stored, emit.lanes // dims), emit.lanes
    while lanes > heads.lanes:
        even, odd = (_shuffle(emit, vector, list(range(first, lanes, 2))) for first in (0, 1))
        vector, lanes = emit.builder.fadd(even, odd), lanes // 2
    if heads.lanes == 1 and emit.lanes > 1:
        vector = emit.builder.extract_element(vector, I32(0))
    if adds:
        vector = emit.builder.fadd(vector, heads.load(pointer, I64(0)))
    heads.store(vector, pointer, I64(0))


@intrinsic
def _forward_tile(
    context: Any,
    x: Any,
    alpha: Any,
    decay: Any,
    before: Any,
    after: Any,
    out: Any,
    skip: Any,
    skips: Any,
    nontemporal: Any,
    writes: Any,
    lanes: Any,
    dims: Any,
) -> Any:
    """Advance the state of `lanes` channels by one step, from `before` to `after`; with `writes` store y."""
    if not _literals(writes, lanes, dims):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
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
def _carry_tile(context: Any, dy: Any, decay: Any, p: Any, lanes: Any, dims: Any) -> Any:
    """Carry the gradient `p` of `lanes` channels' states back by one step."""
    if not _literals(lanes, dims):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        dy_0, decay_0, p_0, *_ = args
        emit, start = Emitter(builder, dy.dtype, lanes.literal_value), I64(0)
        d = _load_rates(emit, decay_0, dims.literal_value)
        g = builder.fadd(emit.widen(emit.load(dy_0, start)), emit.load(p_0, start))
        emit.store(emit.flush(builder.fmul(d, g)), p_0, start)
        return context.get_dummy_value()

    return types.void(dy, decay, p, lanes, dims), codegen


@intrinsic
def _backward_tile(
    context: Any,
    x: Any,
    dy: Any,
    alpha: Any,
    decay: Any,
    before: Any,
    p: Any,
    out: Any,
    skip: Any,
    dskip: Any,
    dalpha: Any,
    ddecay: Any,
    skips: Any,
    nontemporal: Any,
    adds: Any,
    lanes: Any,
    dims: Any,
) -> Any:
    """As `_carry_tile`, with all gradients; with `adds`, dalpha and ddecay are added to."""
    if not _literals(adds, lanes, dims):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x_0, dy_0, alpha_0, decay_0, before_0, p_0, out_0, skip_0, dskip_0, dalpha_0, ddecay_0, *flags = args
        emit, start = Emitter(builder, x.dtype, lanes.literal_value), I64(0)
        a, d = (_load_rates(emit, rates, dims.literal_value) for rates in (alpha_0, decay_0))
        value, dvalue = emit.widen(emit.load(x_0, start)), emit.widen(emit.load(dy_0, start))
        g = builder.fadd(dvalue, emit.load(p_0, start))
        emit.store(emit.flush(builder.fmul(d, g)), p_0, start)
        sums = (builder.fmul(g, value), dalpha_0), (builder.fmul(g, emit.load(before_0, start)), ddecay_0)
        for products, place in sums:
            _add_head_sums(emit, products, place, dims.literal_value, bool(adds.literal_value))

        def write(skips: bool, nontemporal: bool) -> None:
            dx = builder.fmul(a, g)
            if skips:
                dx = emit.fma(emit.load(skip_0, start), dvalue, dx)
                emit.store(emit.fma(dvalue, value, emit.load(dskip_0, start)), dskip_0, start)
            emit.store(emit.narrow(dx), out_0, start, nontemporal)

        specialized(builder, write, *flags[:2])
        return context.get_dummy_value()

    tensors = (x, dy, alpha, decay, before, p, out, skip, dskip, dalpha, ddecay)
    return types.void(*tensors, types.boolean, types.boolean, adds, lanes, dims), codegen


# Each of these makes a function that walks over the tiles of a row: `_groups` over those of several heads of
# `dims` channels, `_pieces` over those of a single head. The number of channels must be a constant where the
# instructions are written.


def _forward_groups(writes, dims):
    heads_per_tile = GROUP // dims

    @jit
    def walk(x, alpha, decay, before, after, out, skip, skips, nontemporal, heads):
        for tile in range(heads // heads_per_tile):
            at, head = tile * GROUP, tile * heads_per_tile
            _forward_tile(
                offset(x, at), offset(alpha, head), offset(decay, head), offset(before, at),
                offset(after, at), offset(out, at), offset(skip, at), skips, nontemporal, writes, GROUP, dims,
            )  # fmt: skip
        return heads // heads_per_tile * heads_per_tile

    return walk


def _forward_pieces(writes, lanes):
    @jit
    def walk(x, alpha, decay, before, after, out, skip, skips, nontemporal, first, last):
        for at in range(first, last, lanes):
            _forward_tile(
                offset(x, at), alpha, decay, offset(before, at), offset(after, at), offset(out, at),
                offset(skip, at), skips, nontemporal, writes, lanes, lanes,
            )  # fmt: skip

    return walk


def _forward_row(writes):
    by_8, by_16, by_32 = (_forward_groups(writes, min(dims, GROUP)) for dims in (8, 16, 32))
    wholes, halves, singles = (_forward_pieces(writes, lanes) for lanes in (LANES, HALF, 1))

    @jit
    def row(x, x_head, alpha, decay, before, after, out, skip, skips, nontemporal, heads, head_dim):
        done = 0
        if x_head == head_dim and head_dim <= GROUP:
            if head_dim == 8:
                done = by_8(x, alpha, decay, before, after, out, skip, skips, nontemporal, heads)
            elif head_dim == 16:
                done = by_16(x, alpha, decay, before, after, out, skip, skips, nontemporal, heads)
            elif head_dim == 32:
                done = by_32(x, alpha, decay, before, after, out, skip, skips, nontemporal, heads)
        whole, half = head_dim // LANES * LANES, head_dim // HALF * HALF
        for head in range(done, heads):
            at = head * head_dim
            x_h, a, d = offset(x, head * x_head), offset(alpha, head), offset(decay, head)
            b, c, o, s = offset(before, at), offset(after, at), offset(out, at), offset(skip, at)
            wholes(x_h, a, d, b, c, o, s, skips, nontemporal, 0, whole)
            halves(x_h, a, d, b, c, o, s, skips, nontemporal, whole, half)
            singles(x_h, a, d, b, c, o, s, skips, nontemporal, half, head_dim)

    return row


write_row, _advance_row = _forward_row(1), _forward_row(0)


@jit
def advance_row(x, x_head, alpha, decay, before, after, heads, head_dim):
    """The state after a row, and nothing else."""
    _advance_row(x, x_head, alpha, decay, before, after, x, before, False, False, heads, head_dim)


def _carry_groups(dims):
    heads_per_tile = GROUP // dims

    @jit
    def walk(dy, decay, p, heads):
        for tile in range(heads // heads_per_tile):
            at = tile * GROUP
            _carry_tile(offset(dy, at), offset(decay, tile * heads_per_tile), offset(p, at), GROUP, dims)
        return heads // heads_per_tile * heads_per_tile

    return walk


def _carry_pieces(lanes):
    @jit
    def walk(dy, decay, p, first, last):
        for at in range(first, last, lanes):
            _carry_tile(offset(dy, at), decay, offset(p, at), lanes, lanes)

    return walk


_carry_by_8, _carry_by_16, _carry_by_32 = (_carry_groups(min(dims, GROUP)) for dims in (8, 16, 32))
_carry_wholes, _carry_halves, _carry_singles = (_carry_pieces(lanes) for lanes in (LANES, HALF, 1))


@jit
def carry_row(dy, dy_head, decay, p, heads, head_dim):
    """The gradient of the state before a row from that of the state after it, in place."""
    done = 0
    if dy_head == head_dim and head_dim <= GROUP:
        if head_dim == 8:
            done = _carry_by_8(dy, decay, p, heads)
        elif head_dim == 16:
            done = _carry_by_16(dy, decay, p, heads)
        elif head_dim == 32:
            done = _carry_by_32(dy, decay, p, heads)
    whole, half = head_dim // LANES * LANES, head_dim // HALF * HALF
    for head in range(done, heads):
        dy_h, d, p_h = offset(dy, head * dy_head), offset(decay, head), offset(p, head * head_dim)
        _carry_wholes(dy_h, d, p_h, 0, whole)
        _carry_halves(dy_h, d, p_h, whole, half)
        _carry_singles(dy_h, d, p_h, half, head_dim)


def _backward_groups(dims):
    heads_per_tile = GROUP // dims

    @jit
    def walk(x, dy, alpha, decay, before, p, out, skip, dskip, dalpha, ddecay, skips, nontemporal, heads):
        for tile in range(heads // heads_per_tile):
            at, head = tile * GROUP, tile * heads_per_tile
            _backward_tile(
                offset(x, at), offset(dy, at), offset(alpha, head), offset(decay, head), offset(before, at),
                offset(p, at), offset(out, at), offset(skip, at), offset(dskip, at), offset(dalpha, head),
                offset(ddecay, head), skips, nontemporal, 0, GROUP, dims,
            )  # fmt: skip
        return heads // heads_per_tile * heads_per_tile

    return walk


def _backward_pieces(lanes):
    @jit
    def walk(
        x, dy, alpha, decay, before, p, out, skip, dskip, dalpha, ddecay, skips, nontemporal, first, last
    ):  # fmt: skip
        for at in range(first, last, lanes):
            _backward_tile(
                offset(x, at), offset(dy, at), alpha, decay, offset(before, at), offset(p, at),
                offset(out, at), offset(skip, at), offset(dskip, at), dalpha, ddecay, skips, nontemporal,
                1, lanes, lanes,
            )  # fmt: skip

    return walk


_backward_by_8, _backward_by_16, _backward_by_32 = (_backward_groups(min(n, GROUP)) for n in (8, 16, 32))
_backward_wholes, _backward_halves, _backward_singles = (_backward_pieces(n) for n in (LANES, HALF, 1))


@jit
def backward_row(
    x, x_head, dy, dy_head, alpha, decay, before, p, out, skip, dskip, dalpha, ddecay, skips, nontemporal,
    heads, head_dim,
):  # fmt: skip
    """As `carry_row`, with all gradients of the row; `before` is the state before it."""
    done = 0
    if x_head == head_dim and dy_head == head_dim and head_dim <= GROUP:
        if head_dim == 8:
            done = _backward_by_8(
                x, dy, alpha, decay, before, p, out, skip, dskip, dalpha, ddecay, skips, nontemporal, heads
            )
        elif head_dim == 16:
            done = _backward_by_16(
                x, dy, alpha, decay, before, p, out, skip, dskip, dalpha, ddecay, skips, nontemporal, heads
            )
        elif head_dim == 32:
            done = _backward_by_32(
                x, dy, alpha, decay, before, p, out, skip, dskip, dalpha, ddecay, skips, nontemporal, heads
            )
    whole, half = head_dim // LANES * LANES, head_dim // HALF * HALF
    for head in range(done, heads):
        at = head * head_dim
        x_h, dy_h, a, d = (
            offset(x, head * x_head),
            offset(dy, head * dy_head),
            offset(alpha, head),
            offset(decay, head),
        )
        b, p_h, o, s = offset(before, at), offset(p, at), offset(out, at), offset(skip, at)
        ds, da, dd = offset(dskip, at), offset(dalpha, head), offset(ddecay, head)
        da[0], dd[0] = 0.0, 0.0
        _backward_wholes(x_h, dy_h, a, d, b, p_h, o, s, ds, da, dd, skips, nontemporal, 0, whole)
        _backward_halves(x_h, dy_h, a, d, b, p_h, o, s, ds, da, dd, skips, nontemporal, whole, half)
        _backward_singles(x_h, dy_h, a, d, b, p_h, o, s, ds, da, dd, skips, nontemporal, half, head_dim)
