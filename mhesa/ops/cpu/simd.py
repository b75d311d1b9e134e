"""Vector arithmetic: explicit instructions do not depend on auto-vectorisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir

from mhesa.ops.cpu.compiling import cgutils, intrinsic, types
from mhesa.ops.cpu.processor import has

FLOAT, DOUBLE, HALF = ir.FloatType(), ir.DoubleType(), ir.HalfType()
VOID = ir.VoidType()
I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)

# Bytes of a vector register.
REGISTER = 64 if has("avx512f") else 32 if has("avx2") else 16
# Taylor series of 2 ** x for -0.5 <= x <= 0.5, with a relative error of at most 1.2e-7.
EXP2 = tuple(math.log(2) ** n / math.factorial(n) for n in range(6, -1, -1))


def call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    """Call a function of LLVM's or of the C library that returns a value of type `result`."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def specialized(builder: Any, write: Callable[..., None], *flags: Any, known: tuple[bool, ...] = ()) -> None:
    """Branch on all flags; `write` is called with their values for each branch, and need not branch again."""
    if not flags:
        write(*known)
        return
    with builder.if_else(flags[0]) as (true, false):
        with true:
            specialized(builder, write, *flags[1:], known=(*known, True))
        with false:
            specialized(builder, write, *flags[1:], known=(*known, False))


class Emitter:
    """Writes arithmetic on `lanes` neighbouring values as vector instructions and fused multiply-adds.

    Args:
        builder: llvmlite's builder of the function that is being written.
        stored: numba's type of the values in memory, one of `STORED_TYPES`.
        lanes: values in a vector; 1 for scalars.
    """

    def __init__(self, builder: Any, stored: Any, lanes: int) -> None:
        self.builder, self.stored, self.lanes = builder, stored, lanes
        self.double = stored == types.float64
        self.element = DOUBLE if self.double else FLOAT
        self.type = self.vector(self.element)

    def vector(self, element: Any) -> Any:
        """The type of a vector of `element`."""
        return element if self.lanes == 1 else ir.VectorType(element, self.lanes)

    def constant(self, element: Any, value: float) -> Any:
        """The same number in every lane."""
        return ir.Constant(self.vector(element), value if self.lanes == 1 else [value] * self.lanes)

    def address(self, pointer: Any, index: Any) -> Any:
        """A pointer to the vector that starts at `index`."""
        element = pointer.type.pointee
        return self.builder.bitcast(self.builder.gep(pointer, [index]), self.vector(element).as_pointer())

    def load(self, pointer: Any, index: Any) -> Any:
        """Load a vector in the stored type, aligned as one element."""
        return self.builder.load(self.address(pointer, index), align=self.align(pointer))

    def store(self, value: Any, pointer: Any, index: Any, nontemporal: bool = False) -> None:
        """Store a vector; past the caches if `nontemporal`, which needs the alignment of a whole vector."""
        align = min(64, self.align(pointer) * self.lanes) if nontemporal else self.align(pointer)
        store = self.builder.store(value, self.address(pointer, index), align=align)
        if nontemporal:
            store.set_metadata("nontemporal", self.builder.module.add_metadata([I32(1)]))

    @staticmethod
    def align(pointer: Any) -> int:
        """The alignment of one element, in bytes."""
        return {I16: 2, FLOAT: 4}.get(pointer.type.pointee, 8)

    def widen(self, value: Any) -> Any:
        """From the stored to the accumulation type."""
        builder = self.builder
        if self.stored == types.uint16:
            bits = builder.shl(builder.zext(value, self.vector(I32)), self.constant(I32, 16))
            return builder.bitcast(bits, self.type)
        if self.stored == types.int16:
            return builder.fpext(builder.bitcast(value, self.vector(HALF)), self.type)
        return value

    def narrow(self, value: Any) -> Any:
        """From the accumulation to the stored type, to the nearest, ties to even."""
        builder = self.builder
        if self.stored == types.uint16:
            bits = builder.bitcast(value, self.vector(I32))
            odd = builder.and_(builder.lshr(bits, self.constant(I32, 16)), self.constant(I32, 1))
            bits = builder.add(builder.add(bits, self.constant(I32, 0x7FFF)), odd)
            bits = builder.lshr(bits, self.constant(I32, 16))
            nan = builder.fcmp_unordered("uno", value, value)
            bits = builder.select(nan, self.constant(I32, 0x7FC0), bits)
            return builder.trunc(bits, self.vector(I16))
        if self.stored == types.int16:
            return builder.bitcast(builder.fptrunc(value, self.vector(HALF)), self.vector(I16))
        return value

    def call(self, name: str, *args: Any) -> Any:
        """Call an LLVM intrinsic such as `fma` on vectors."""
        scalar = "f64" if self.double else "f32"
        name = f"llvm.{name}.{scalar if self.lanes == 1 else f'v{self.lanes}{scalar}'}"
        return call(self.builder, name, self.type, *args)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """`a * b + c`, rounded once."""
        return self.call("fma", a, b, c)

    def flush(self, value: Any) -> Any:
        """Zero for a subnormal: arithmetic on subnormals is slow, and a decaying state would stay one."""
        smallest = self.constant(self.element, 2.0**-1022 if self.double else 2.0**-126)
        # An ordered comparison is false for NaN, which stays.
        small = self.builder.fcmp_ordered("<", self.call("fabs", value), smallest)
        return self.builder.select(small, self.constant(self.element, 0.0), value)


def shuffle(emit: Emitter, vector: Any, lanes: list[int]) -> Any:
    """The vector of the named lanes."""
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
    return emit.builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def splat(emit: Emitter, value: Any) -> Any:
    """A vector with a number in every lane."""
    if emit.lanes == 1:
        return value
    one = ir.Constant(ir.VectorType(value.type, 1), ir.Undefined)
    return shuffle(emit, emit.builder.insert_element(one, value, I32(0)), [0] * emit.lanes)


def polynomial(emit: Emitter, x: Any, coefficients: tuple[float, ...]) -> Any:
    """A polynomial at fp32 values, by Horner's rule; the coefficient of the highest power comes first."""
    value = emit.constant(FLOAT, coefficients[0])
    for coefficient in coefficients[1:]:
        value = emit.fma(value, x, emit.constant(FLOAT, coefficient))
    return value


def exp2(emit: Emitter, power: Any) -> Any:
    """Powers of two at fp32 values up to 127; that of NaN is zero."""
    builder = emit.builder
    # Smaller powers of two are zero in fp32: an exponent of no bits.
    power = emit.call("maxnum", power, emit.constant(FLOAT, -127.0))
    integer = emit.call("rint", power)
    exponent = builder.add(builder.fptosi(integer, emit.vector(I32)), emit.constant(I32, 127))
    scale = builder.bitcast(builder.shl(exponent, emit.constant(I32, 23)), emit.type)
    return builder.fmul(polynomial(emit, builder.fsub(power, integer), EXP2), scale)


@intrinsic
def sigmoid(context: Any, x: Any) -> Any:
    """The logistic function of an fp32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit, [value] = Emitter(builder, types.float32, 1), args
        one = emit.constant(FLOAT, 1.0)
        power = builder.fmul(value, emit.constant(FLOAT, -1 / math.log(2)))
        odds = exp2(emit, emit.call("minnum", power, emit.constant(FLOAT, 127.0)))
        fraction = builder.fdiv(one, builder.fadd(one, odds))
        return builder.select(builder.fcmp_unordered("uno", value, value), value, fraction)

    return types.float32(types.float32), codegen
