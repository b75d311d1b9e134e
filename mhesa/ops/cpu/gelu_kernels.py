"""GELU on CPU, alone or times a gate, and its gradient: one pass over memory each.

With Phi the normal distribution and phi its density,

    y = gate * x * Phi(x);  dgate = dy * x * Phi(x);  dx = dy * gate * (Phi(x) + x * phi(x))
"""

# Kernels are numba's language: types are found when they are compiled.
# mypy: allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import math
from array import array
from typing import Any

from torch import Tensor

from mhesa.ops.cpu.memory import empty_hugepages
from mhesa.ops.cpu.scan import PARALLEL, STREAMED
from mhesa.ops.cpu.simd import (
    FLOAT,
    I32,
    Emitter,
    compiled,
    fence,
    fields,
    intrinsic,
    pointer,
    specialized,
    take,
    types,
)
from mhesa.ops.cpu.threads import available, parallel

# What the kernel is told, as one array of 64-bit integers; an address of 0 is an absent tensor. With dy it
# writes gradients: dx where y would be.
TASK, COUNT, STREAMS, X, GATE, DY, OUT, DGATE, FIELDS = range(9)
# Values that a task takes, and that a vector instruction does, or a few where vectors are shorter.
PIECE, LANES = 1 << 13, 16

# erf(x / sqrt(2)) / x as a quotient of polynomials of x^2, highest power first, fitted on 0 <= x <= 5.5 by
# least squares with Lawson's weights; off by 1.4e-9 at most before it is rounded to fp32.
ERF_TOP = (
    -1.4552496169e-10, 1.0356924445e-07, 1.6759729472e-05, 3.3838693030e-04,
    9.5901819715e-03, 6.5295765551e-02, 7.9788457008e-01,
)  # fmt: skip
ERF_BOTTOM = (1.9728211082e-06, 8.1419014239e-05, 1.9273644506e-03, 2.8436436733e-02, 2.4850286644e-01, 1.0)
ERF_END = 5.5
# 2 ** x on -0.5 <= x <= 0.5: its Taylor series, off by 1.2e-7 of its value at most.
EXP2 = tuple(math.log(2) ** n / math.factorial(n) for n in range(6, -1, -1))


def forward(x: Tensor, gate: Tensor | None) -> Tensor:
    """`gate * GELU(x)`, for contiguous tensors of one shape and one type, fp32 or narrower."""
    y = empty_hugepages(x.shape, x.dtype)
    _run({X: x, GATE: gate, OUT: y})
    return y


def backward(dy: Tensor, x: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`(dx, dgate)`, likewise."""
    dx = empty_hugepages(x.shape, x.dtype)
    dgate = None if gate is None else empty_hugepages(x.shape, x.dtype)
    _run({X: x, GATE: gate, DY: dy, OUT: dx, DGATE: dgate})
    return dx, dgate


def _run(tensors: dict[int, Tensor | None]) -> None:
    present = {field: tensor for field, tensor in tensors.items() if tensor is not None}
    count = present[X].numel()
    told = array("q", bytes(8 * FIELDS))
    told[COUNT] = count
    told[STREAMS] = sum(tensor.nbytes for tensor in present.values()) > STREAMED
    for field, tensor in present.items():
        told[field] = tensor.data_ptr()
    parallel(
        compiled(_kernel, present[X].dtype), told.buffer_info()[0], 1 if count < PARALLEL else available()
    )


def _polynomial(emit: Emitter, x: Any, coefficients: tuple[float, ...]) -> Any:
    value = emit.constant(FLOAT, coefficients[0])
    for coefficient in coefficients[1:]:
        value = emit.fma(value, x, emit.constant(FLOAT, coefficient))
    return value


def _phi(emit: Emitter, x: Any) -> Any:
    """The normal distribution at fp32 values."""
    builder, end, half = emit.builder, emit.constant(FLOAT, ERF_END), emit.constant(FLOAT, 0.5)
    # Of a number and NaN these take the number: x itself makes NaN of the result.
    inside = emit.call("minnum", emit.call("maxnum", x, builder.fneg(end)), end)
    square = builder.fmul(inside, inside)
    erf = builder.fdiv(_polynomial(emit, square, ERF_TOP), _polynomial(emit, square, ERF_BOTTOM))
    phi = emit.fma(builder.fmul(half, inside), erf, half)
    far = builder.fcmp_ordered("<", x, builder.fneg(end))
    return builder.select(far, emit.constant(FLOAT, 0.0), phi)


def _density(emit: Emitter, x: Any) -> Any:
    """The density of the normal distribution at fp32 values."""
    builder = emit.builder
    power = builder.fmul(builder.fmul(x, x), emit.constant(FLOAT, -0.5 / math.log(2)))
    # Two to this power has no bits: zero.
    power = emit.call("maxnum", power, emit.constant(FLOAT, -127.0))
    whole = emit.call("rint", power)
    exponent = builder.add(builder.fptosi(whole, emit.vector(I32)), emit.constant(I32, 127))
    scale = builder.bitcast(builder.shl(exponent, emit.constant(I32, 23)), emit.type)
    scale = builder.fmul(scale, emit.constant(FLOAT, 1 / math.sqrt(2 * math.pi)))
    return builder.fmul(_polynomial(emit, builder.fsub(power, whole), EXP2), scale)


@intrinsic
def gelu(context: Any, x: Any) -> Any:
    """GELU of an fp32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(args[0], _phi(Emitter(builder, types.float32, 1), args[0]))

    return types.float32(types.float32), codegen


@intrinsic
def _write_at(
    context: Any,
    x: Any,
    gate: Any,
    dy: Any,
    out: Any,
    dgate: Any,
    at: Any,
    gated: Any,
    derives: Any,
    streams: Any,
    lanes: Any,
) -> Any:
    """Write `lanes` values of y, or of dx and dgate."""
    if not isinstance(lanes, types.IntegerLiteral):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x_0, gate_0, dy_0, out_0, dgate_0, at, gated, derives, streams, _ = args
        emit = Emitter(builder, x.dtype, lanes.literal_value)

        def write(gated: bool, derives: bool, streams: bool) -> None:
            value = emit.widen(emit.load(x_0, at))
            weight = emit.widen(emit.load(gate_0, at)) if gated else emit.constant(FLOAT, 1.0)
            phi = _phi(emit, value)
            y = builder.fmul(value, phi)
            if derives:
                dvalue = emit.widen(emit.load(dy_0, at))
                if gated:
                    emit.store(emit.narrow(builder.fmul(dvalue, y)), dgate_0, at, streams)
                y, weight = emit.fma(value, _density(emit, value), phi), builder.fmul(dvalue, weight)
            emit.store(emit.narrow(builder.fmul(y, weight)), out_0, at, streams)

        specialized(builder, write, gated, derives, streams)
        return context.get_dummy_value()

    flags = (types.boolean, types.boolean, types.boolean)
    return types.void(x, gate, dy, out, dgate, types.int64, *flags, lanes), codegen


def _kernel(data: Any) -> None:
    """Write one piece after another, until none is left."""
    p = fields(data)
    x, gate, dy = pointer(p[X], data), pointer(p[GATE], data), pointer(p[DY], data)
    out, dgate = pointer(p[OUT], data), pointer(p[DGATE], data)
    gated, derives, streams = p[GATE] != 0, p[DY] != 0, p[STREAMS] != 0
    while True:
        i = take(p) * PIECE
        if i >= p[COUNT]:
            break
        end = min(i + PIECE, p[COUNT])
        while i + LANES <= end:
            _write_at(x, gate, dy, out, dgate, i, gated, derives, streams, LANES)
            i += LANES
        while i < end:
            _write_at(x, gate, dy, out, dgate, i, gated, derives, False, 1)
            i += 1
    fence()
