"""The arithmetic of the scan at rates of every step on CPU: one row at a time, head by head.

Each function walks over the heads of a row in vectors of `LANES` channels, of half as many, and of one. The
rates of a head are broadcast to its vectors.
"""

# Numba finds the types of kernels when it compiles them.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

from llvmlite import ir

from mhesa.ops.cpu.compiling import accumulation, intrinsic, jit, offset, types
from mhesa.ops.cpu.simd import I32, I64, Emitter, specialized

# Channels of a vector; processors with shorter vectors take several instructions.
LANES, HALF = 16, 8


def _broadcast(emit: Emitter, value: Any) -> Any:
    """A number in every lane."""
    if emit.lanes == 1:
        return value
    undefined = ir.Constant(emit.type, ir.Undefined)
    first = emit.builder.insert_element(undefined, value, I32(0))
    return emit.builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, emit.lanes), None))


def _total(emit: Emitter, vector: Any) -> Any:
    """The sum over the lanes, in halves."""
    lanes = emit.lanes
    while lanes > 1:
        lanes //= 2
        low, high = (
            emit.builder.shuffle_vector(
                vector,
                ir.Constant(vector.type, ir.Undefined),
                ir.Constant(ir.VectorType(I32, lanes), list(range(first, first + lanes))),
            )
            for first in (0, lanes)
        )
        vector = emit.builder.fadd(low, high)
    return vector if emit.lanes == 1 else emit.builder.extract_element(vector, I32(0))


@intrinsic
def _forward_tile(
    context: Any,
    x: Any,
    a: Any,
    d: Any,
    before: Any,
    after: Any,
    out: Any,
    skip: Any,
    skips: Any,
    nontemporal: Any,
    writes: Any,
    lanes: Any,
) -> Any:
    """Advance the state of `lanes` channels by one step, from `before` to `after`; with `writes` store y."""
    if not (isinstance(writes, types.IntegerLiteral) and isinstance(lanes, types.IntegerLiteral)):
        return None
    wide = accumulation(x.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x_0, a_0, d_0, before_0, after_0, out_0, skip_0, skips, nontemporal, *_ = args
        emit, start = Emitter(builder, x.dtype, lanes.literal_value), I64(0)
        value = emit.widen(emit.load(x_0, start))
        new = builder.fmul(_broadcast(emit, a_0), value)
        h = emit.flush(emit.fma(_broadcast(emit, d_0), emit.load(before_0, start), new))
        emit.store(h, after_0, start)

        def write(skips: bool, nontemporal: bool) -> None:
            # Without a skip term nothing is added: zero times an infinite x would be NaN.
            y = emit.fma(emit.load(skip_0, start), value, h) if skips else h
            emit.store(emit.narrow(y), out_0, start, nontemporal)

        if writes.literal_value:
            specialized(builder, write, skips, nontemporal)
        return context.get_dummy_value()

    flags = (types.boolean, types.boolean)
    return types.void(x, wide, wide, before, after, out, skip, *flags, writes, lanes), codegen


@intrinsic
def _carry_tile(context: Any, dy: Any, d: Any, p: Any, lanes: Any) -> Any:
    """Carry the gradient `p` of `lanes` channels' states back by one step."""
    if not isinstance(lanes, types.IntegerLiteral):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        dy_0, d_0, p_0, _ = args
        emit, start = Emitter(builder, dy.dtype, lanes.literal_value), I64(0)
        g = builder.fadd(emit.widen(emit.load(dy_0, start)), emit.load(p_0, start))
        emit.store(emit.flush(builder.fmul(_broadcast(emit, d_0), g)), p_0, start)
        return context.get_dummy_value()

    return types.void(dy, accumulation(dy.dtype), p, lanes), codegen


@intrinsic
def _backward_tile(
    context: Any,
    x: Any,
    dy: Any,
    a: Any,
    d: Any,
    before: Any,
    p: Any,
    out: Any,
    skip: Any,
    dskip: Any,
    skips: Any,
    nontemporal: Any,
    lanes: Any,
) -> Any:
    """As `_carry_tile`, with dx and dskip; returns the sums over the lanes for dalpha and ddecay."""
    if not isinstance(lanes, types.IntegerLiteral):
        return None
    wide = accumulation(x.dtype)
    sums = types.UniTuple(wide, 2)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x_0, dy_0, a_0, d_0, before_0, p_0, out_0, skip_0, dskip_0, skips, nontemporal, _ = args
        emit, start = Emitter(builder, x.dtype, lanes.literal_value), I64(0)
        value, dvalue = emit.widen(emit.load(x_0, start)), emit.widen(emit.load(dy_0, start))
        g = builder.fadd(dvalue, emit.load(p_0, start))
        emit.store(emit.flush(builder.fmul(_broadcast(emit, d_0), g)), p_0, start)

        def write(skips: bool, nontemporal: bool) -> None:
            dx = builder.fmul(_broadcast(emit, a_0), g)
            if skips:
                dx = emit.fma(emit.load(skip_0, start), dvalue, dx)
                emit.store(emit.fma(dvalue, value, emit.load(dskip_0, start)), dskip_0, start)
            emit.store(emit.narrow(dx), out_0, start, nontemporal)

        by_alpha = _total(emit, builder.fmul(g, value))
        by_decay = _total(emit, builder.fmul(g, emit.load(before_0, start)))
        specialized(builder, write, skips, nontemporal)
        return context.make_tuple(builder, sums, (by_alpha, by_decay))

    flags = (types.boolean, types.boolean)
    return sums(x, dy, wide, wide, before, p, out, skip, dskip, *flags, lanes), codegen


def _forward_walk(writes):
    @jit
    def walk(
        x,
        x_head,
        alpha,
        alpha_head,
        decay,
        decay_head,
        before,
        after,
        out,
        skip,
        skips,
        past,
        heads,
        head_dim,
    ):
        for head in range(heads):
            a, d, x_0, at = alpha[head * alpha_head], decay[head * decay_head], head * x_head, head * head_dim
            for _ in range(head_dim // LANES):
                _forward_tile(
                    offset(x, x_0), a, d, offset(before, at), offset(after, at), offset(out, at),
                    offset(skip, at), skips, past, writes, LANES,
                )  # fmt: skip
                x_0, at = x_0 + LANES, at + LANES
            if head_dim % LANES >= HALF:
                _forward_tile(
                    offset(x, x_0), a, d, offset(before, at), offset(after, at), offset(out, at),
                    offset(skip, at), skips, past, writes, HALF,
                )  # fmt: skip
                x_0, at = x_0 + HALF, at + HALF
            for _ in range(head_dim % HALF):
                _forward_tile(
                    offset(x, x_0), a, d, offset(before, at), offset(after, at), offset(out, at),
                    offset(skip, at), skips, past, writes, 1,
                )  # fmt: skip
                x_0, at = x_0 + 1, at + 1

    return walk


write_row, _advance_row = _forward_walk(1), _forward_walk(0)


@jit
def advance_row(x, x_head, alpha, alpha_head, decay, decay_head, before, after, heads, head_dim):
    """The state after a row, and nothing else."""
    _advance_row(
        x, x_head, alpha, alpha_head, decay, decay_head, before, after, x, before, False, False,
        heads, head_dim,
    )  # fmt: skip


@jit
def carry_row(dy, dy_head, decay, decay_head, p, heads, head_dim):
    """The gradient of the state before a row from that of the state after it, in place."""
    for head in range(heads):
        d, dy_0, at = decay[head * decay_head], head * dy_head, head * head_dim
        for _ in range(head_dim // LANES):
            _carry_tile(offset(dy, dy_0), d, offset(p, at), LANES)
            dy_0, at = dy_0 + LANES, at + LANES
        if head_dim % LANES >= HALF:
            _carry_tile(offset(dy, dy_0), d, offset(p, at), HALF)
            dy_0, at = dy_0 + HALF, at + HALF
        for _ in range(head_dim % HALF):
            _carry_tile(offset(dy, dy_0), d, offset(p, at), 1)
            dy_0, at = dy_0 + 1, at + 1


@jit
def backward_row(
    x, x_head, dy, dy_head, alpha, alpha_head, decay, decay_head, before, p, out, skip, dskip, dalpha, ddecay,
    skips, past, heads, head_dim,
):  # fmt: skip
    """As `carry_row`, with all gradients of the row; `before` is the state before it."""
    for head in range(heads):
        a, d, at = alpha[head * alpha_head], decay[head * decay_head], head * head_dim
        x_0, dy_0, by_alpha, by_decay = head * x_head, head * dy_head, 0.0, 0.0
        for _ in range(head_dim // LANES):
            sums = _backward_tile(
                offset(x, x_0), offset(dy, dy_0), a, d, offset(before, at), offset(p, at), offset(out, at),
                offset(skip, at), offset(dskip, at), skips, past, LANES,
            )  # fmt: skip
            x_0, dy_0, at = x_0 + LANES, dy_0 + LANES, at + LANES
            by_alpha, by_decay = by_alpha + sums[0], by_decay + sums[1]
        if head_dim % LANES >= HALF:
            sums = _backward_tile(
                offset(x, x_0), offset(dy, dy_0), a, d, offset(before, at), offset(p, at), offset(out, at),
                offset(skip, at), offset(dskip, at), skips, past, HALF,
            )  # fmt: skip
            x_0, dy_0, at = x_0 + HALF, dy_0 + HALF, at + HALF
            by_alpha, by_decay = by_alpha + sums[0], by_decay + sums[1]
        for _ in range(head_dim % HALF):
            sums = _backward_tile(
                offset(x, x_0), offset(dy, dy_0), a, d, offset(before, at), offset(p, at), offset(out, at),
                offset(skip, at), offset(dskip, at), skips, past, 1,
            )  # fmt: skip
            x_0, dy_0, at = x_0 + 1, dy_0 + 1, at + 1
            by_alpha, by_decay = by_alpha + sums[0], by_decay + sums[1]
        dalpha[head], ddecay[head] = by_alpha, by_decay
