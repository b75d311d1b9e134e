"""GELU on CPU, alone or times a gate, and its gradient: one pass over memory each.

With Phi the cumulative distribution of the normal distribution and phi its density,

    y = gate * x * Phi(x);  dgate = dy * x * Phi(x);  dx = dy * gate * (Phi(x) + x * phi(x))
"""

# Numba finds the types of kernels when it compiles them.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from mhesa.ops.cpu.arguments import STORED, struct
from mhesa.ops.cpu.atomics import fence, fetch_add
from mhesa.ops.cpu.compiling import compiled, exists, intrinsic, literals, member, types
from mhesa.ops.cpu.memory import empty_hugepages
from mhesa.ops.cpu.sequences import MIN_PARALLEL, NONTEMPORAL_BYTES
from mhesa.ops.cpu.simd import FLOAT, Emitter, exp2, polynomial, specialized
from mhesa.ops.cpu.threads import available, parallel

# Without `dy` the kernel writes y to `out`; with it dx, and dgate if there is a gate.
Arguments = struct(
    "Arguments",
    next_task="int64",
    count="int64",
    nontemporal="int64",
    x=STORED,
    gate=STORED,
    dy=STORED,
    out=STORED,
    dgate=STORED,
)
# Values of a task, and of a vector; processors with shorter vectors take several instructions.
TASK_SIZE, LANES = 1 << 13, 16

# erf(x / sqrt(2)) / x as a quotient of polynomials of x^2, highest power first, fitted on 0 <= x <= 5.5 by
# least squares with Lawson's weights. Its error is at most 1.4e-9 before it is rounded to fp32.
ERF_TOP = (
    -1.4552496169e-10, 1.0356924445e-07, 1.6759729472e-05, 3.3838693030e-04,
    9.5901819715e-03, 6.5295765551e-02, 7.9788457008e-01,
)  # fmt: skip
ERF_BOTTOM = (1.9728211082e-06, 8.1419014239e-05, 1.9273644506e-03, 2.8436436733e-02, 2.4850286644e-01, 1.0)
ERF_END = 5.5


def forward(x: Tensor, gate: Tensor | None) -> Tensor:
    """`gate * GELU(x)`, for tensors of any shape and type up to fp32, the same for both."""
    y = empty_hugepages(x.shape, x.dtype)
    _run(x=x, gate=gate, out=y)
    return y


def backward(dy: Tensor, x: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`(dx, dgate)`, the gradients of `forward`, in the shape and type of `x`."""
    dx = empty_hugepages(x.shape, x.dtype)
    dgate = None if gate is None else empty_hugepages(x.shape, x.dtype)
    _run(x=x, gate=gate, dy=dy, out=dx, dgate=dgate)
    return dx, dgate


def _run(**given: Tensor | None) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in given.items() if tensor is not None}
    x = tensors["x"]
    args = Arguments(
        count=x.numel(),
        nontemporal=len(tensors) * x.nbytes > NONTEMPORAL_BYTES,
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )
    threads = 1 if x.numel() < MIN_PARALLEL else available()
    parallel(compiled(_kernel, x.dtype, Arguments), args.address, threads)


def _phi(emit: Emitter, x: Any) -> Any:
    """The cumulative distribution of the normal distribution at fp32 values."""
    builder, end, half = emit.builder, emit.constant(FLOAT, ERF_END), emit.constant(FLOAT, 0.5)
    # These return the number if the other is NaN; the product with x then is NaN.
    inside = emit.call("minnum", emit.call("maxnum", x, builder.fneg(end)), end)
    square = builder.fmul(inside, inside)
    erf = builder.fdiv(polynomial(emit, square, ERF_TOP), polynomial(emit, square, ERF_BOTTOM))
    phi = emit.fma(builder.fmul(half, inside), erf, half)
    far = builder.fcmp_ordered("<", x, builder.fneg(end))
    return builder.select(far, emit.constant(FLOAT, 0.0), phi)


def gelu(emit: Emitter, x: Any) -> Any:
    """GELU of fp32 values."""
    return emit.builder.fmul(x, _phi(emit, x))


def _density(emit: Emitter, x: Any) -> Any:
    """The density of the normal distribution at fp32 values."""
    builder = emit.builder
    power = builder.fmul(builder.fmul(x, x), emit.constant(FLOAT, -0.5 / math.log(2)))
    return builder.fmul(exp2(emit, power), emit.constant(FLOAT, 1 / math.sqrt(2 * math.pi)))


@intrinsic
def _write_at(context, x, gate, dy, out, dgate, index, gated, derivative, nontemporal, lanes):
    """Write `lanes` values of y, or of dx and dgate."""
    if not literals(lanes):
        return None

    def codegen(context, builder, signature, args):
        x_0, gate_0, dy_0, out_0, dgate_0, index, gated, derivative, nontemporal, _ = args
        emit = Emitter(builder, x.dtype, lanes.literal_value)

        def write(gated: bool, derivative: bool, nontemporal: bool) -> None:
            value = emit.widen(emit.load(x_0, index))
            weight = emit.widen(emit.load(gate_0, index)) if gated else emit.constant(FLOAT, 1.0)
            phi = _phi(emit, value)
            y = builder.fmul(value, phi)
            if derivative:
                dvalue = emit.widen(emit.load(dy_0, index))
                if gated:
                    emit.store(emit.narrow(builder.fmul(dvalue, y)), dgate_0, index, nontemporal)
                y, weight = emit.fma(value, _density(emit, value), phi), builder.fmul(dvalue, weight)
            emit.store(emit.narrow(builder.fmul(y, weight)), out_0, index, nontemporal)

        specialized(builder, write, gated, derivative, nontemporal)
        return context.get_dummy_value()

    flags = (types.boolean, types.boolean, types.boolean)
    return types.void(x, gate, dy, out, dgate, types.int64, *flags, lanes), codegen


def _kernel(args: Any) -> None:
    x, gate, dy, out, dgate = args.x, args.gate, args.dy, args.out, args.dgate
    gated, derivative, nontemporal = exists(gate), exists(dy), args.nontemporal != 0
    while True:
        i = fetch_add(member(args, "next_task"), 1) * TASK_SIZE
        if i >= args.count:
            break
        end = min(i + TASK_SIZE, args.count)
        while i + LANES <= end:
            _write_at(x, gate, dy, out, dgate, i, gated, derivative, nontemporal, LANES)
            i += LANES
        while i < end:
            _write_at(x, gate, dy, out, dgate, i, gated, derivative, False, 1)
            i += 1
    fence()
