"""What numba's kernels are written in: addresses, vector instructions, and native functions.

Numba's arrays are left aside for addresses: a call then compiles nothing for a new layout or an absent
argument, and the compiler need not prove that outputs and inputs do not overlap. Explicit vectors and
fused multiply-adds leave nothing to the mood of an optimiser.

A kernel is a plain function of one pointer, to 64-bit integers that tell it all it needs; the pointer's
type says what the tensors hold. `compiled` makes a native function of it, `mhesa.ops.cpu.threads.parallel`
runs that on all threads.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba.core.cgutils
import numba.extending
import torch
from llvmlite import binding, ir

# Numba is annotated in part only.
jit: Any = numba.njit
cfunc: Any = numba.cfunc
types: Any = numba.types
cgutils: Any = numba.core.cgutils

FLOAT, DOUBLE, HALF = ir.FloatType(), ir.DoubleType(), ir.HalfType()
I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)

# Bytes of a vector register.
_FEATURES = binding.get_host_cpu_features()
REGISTER = 64 if _FEATURES.get("avx512f") else 32 if _FEATURES.get("avx2") else 16

# Looks at a counter before others may have the core.
PATIENCE = 4096

# 16-bit floats travel as integers: numba has no arithmetic for them on CPU.
STORED: dict[torch.dtype, Any] = {
    torch.float32: types.float32,
    torch.float64: types.float64,
    torch.bfloat16: types.uint16,
    torch.float16: types.int16,
}


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that writes the instructions for a call; the types it gets hold constants' values."""
    typed: Any = numba.extending.intrinsic
    return typed(prefer_literal=True)(function)


def accumulation(stored: Any) -> Any:
    """The type that values stored as `stored` are computed in."""
    return types.float64 if stored == types.float64 else types.float32


@intrinsic
def fields(context: Any, data: Any) -> Any:
    """What a kernel is told, behind a pointer whose type says what the tensors hold."""
    integers = types.CPointer(types.int64)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(integers))

    return integers(data), codegen


@intrinsic
def pointer(context: Any, address: Any, like: Any) -> Any:
    """The address as a pointer of the type of `like`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(like))

    return like(types.int64, like), codegen


def _pointer_to(kind: Any, name: str) -> Any:
    def typed(context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), codegen

    typed.__name__ = typed.__qualname__ = name
    typed.__doc__ = f"The address as a pointer to {name}."
    return intrinsic(typed)


floats = _pointer_to(types.float32, "floats")
doubles = _pointer_to(types.float64, "doubles")
integers = _pointer_to(types.int64, "integers")


@intrinsic
def scratch(context: Any, like: Any, count: Any) -> Any:
    """Memory for `count` values on the stack, in the accumulation type of what `like` points to."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    wide = accumulation(like.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        memory = ir.ArrayType(context.get_value_type(wide), count.literal_value)
        place = cgutils.alloca_once(builder, memory)
        # Vectors that straddle cache lines are twice the work.
        place.align = 64
        return builder.gep(place, [I32(0), I32(0)])

    return types.CPointer(wide)(like, count), codegen


@intrinsic
def offset(context: Any, pointer: Any, index: Any) -> Any:
    """The pointer, `index` elements on."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.int64), codegen


@intrinsic
def take(context: Any, counter: Any) -> Any:
    """Take a task: what the counter held before one was added, by all threads at once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], I64(1), "monotonic")

    return types.int64(counter), codegen


@intrinsic
def fence(context: Any) -> Any:
    """Have everything stored seen by other threads, what went past the caches too."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def count(context: Any, counter: Any) -> Any:
    """Count one more as done: all that was written is to be seen by who waits for the counter."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.atomic_rmw("add", args[0], I64(1), "release")
        return context.get_dummy_value()

    return types.void(counter), codegen


@intrinsic
def _counted(context: Any, counter: Any) -> Any:
    """What a counter holds now."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(args[0], "acquire", 8)

    return types.int64(counter), codegen


@intrinsic
def _give_way(context: Any) -> Any:
    """Let another thread run on this core."""
    name = "sched_yield" if os.name == "posix" else "SwitchToThread"

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I32, []), name)
        builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), codegen


@jit
def wait(counter, least):  # type: ignore[no-untyped-def]
    """Wait until a counter is at `least`; who counts may be on the same core."""
    tries = 0
    while _counted(counter) < least:
        tries += 1
        if tries % PATIENCE == 0:
            _give_way()


def specialized(builder: Any, write: Callable[..., None], *flags: Any, known: tuple[bool, ...] = ()) -> None:
    """Branch once on all flags, to what `write` writes where it knows them: no row has branches then."""
    if not flags:
        write(*known)
        return
    with builder.if_else(flags[0]) as (true, false):
        with true:
            specialized(builder, write, *flags[1:], known=(*known, True))
        with false:
            specialized(builder, write, *flags[1:], known=(*known, False))


class Emitter:
    """Writes arithmetic on `lanes` neighbouring values as vector instructions.

    Args:
        builder: of the function that is being written.
        stored: numba's type of the values in memory, one of `STORED`.
        lanes: how many values a vector holds; 1 for plain numbers.
    """

    def __init__(self, builder: Any, stored: Any, lanes: int) -> None:
        self.builder, self.stored, self.lanes = builder, stored, lanes
        self.double = stored == types.float64
        self.element = DOUBLE if self.double else FLOAT
        self.type = self.vector(self.element)

    def vector(self, element: Any) -> Any:
        """The type of a vector of elements."""
        return element if self.lanes == 1 else ir.VectorType(element, self.lanes)

    def constant(self, element: Any, value: float) -> Any:
        """The same number in every lane."""
        return ir.Constant(self.vector(element), value if self.lanes == 1 else [value] * self.lanes)

    def address(self, pointer: Any, index: Any) -> Any:
        """Where a vector starts, `index` elements on."""
        element = pointer.type.pointee
        return self.builder.bitcast(self.builder.gep(pointer, [index]), self.vector(element).as_pointer())

    def load(self, pointer: Any, index: Any) -> Any:
        """A vector as it is stored; it need not be aligned as a vector is."""
        return self.builder.load(self.address(pointer, index), align=self.align(pointer))

    def store(self, value: Any, pointer: Any, index: Any, past: bool = False) -> None:
        """Store a vector; if `past`, past the caches: it must then be aligned as a vector is."""
        align = min(64, self.bytes * self.lanes) if past else self.align(pointer)
        store = self.builder.store(value, self.address(pointer, index), align=align)
        if past:
            store.set_metadata("nontemporal", self.builder.module.add_metadata([I32(1)]))

    @property
    def bytes(self) -> int:
        """The size of a stored value."""
        return {types.float64: 8, types.float32: 4}.get(self.stored, 2)

    def prefetch(self, pointer: Any, index: Any, locality: int = 3) -> None:
        """Ask for the memory of a vector; an address that does not exist does no harm.

        `locality` is LLVM's: 3 brings it to the innermost cache, 2 to the next.
        """
        byte = I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        address = self.builder.bitcast(self.address(pointer, index), byte)
        # To read, how close, and that it is data.
        self.builder.call(function, [address, I32(0), I32(locality), I32(1)])

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
        """Call a function of LLVM's, such as `fma`, on vectors."""
        scalar = "f64" if self.double else "f32"
        name = f"llvm.{name}.{scalar if self.lanes == 1 else f'v{self.lanes}{scalar}'}"
        kind = ir.FunctionType(self.type, [self.type] * len(args))
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), args)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """`a * b + c`, rounded once."""
        return self.call("fma", a, b, c)

    def flush(self, value: Any) -> Any:
        """Zero for a subnormal: a carry that has decayed to nothing would slow down every later step."""
        least = self.constant(self.element, 2.0**-1022 if self.double else 2.0**-126)
        # An ordered comparison is false for NaN, which stays.
        small = self.builder.fcmp_ordered("<", self.call("fabs", value), least)
        return self.builder.select(small, self.constant(self.element, 0.0), value)


@cache
def compiled(kernel: Callable[..., None], dtype: torch.dtype) -> int:
    """The address of a kernel for tensors of `dtype`, from the cache on disk if it is there."""
    signature = types.void(types.CPointer({**STORED, torch.int8: types.int8}[dtype]))
    try:
        # The cache goes by the kernel's own file; much of it is said in neighbours and in this one.
        kernel.__qualname__ = (
            f"{kernel.__name__}_{_state(Path(__file__).parent, Path(kernel.__code__.co_filename).parent)}"
        )
        function = cfunc(signature, cache=True, error_model="numpy")(kernel)
    except (OSError, RuntimeError):  # numba finds no folder to write to, or cannot write to it
        function = cfunc(signature, error_model="numpy")(kernel)
    _KEPT.append(function)
    return int(function.address)


@cache
def _state(*folders: Path) -> str:
    """Changes when a source file does."""
    files = sorted(path for folder in {*folders} for path in folder.glob("*.py"))
    return hashlib.sha256(
        repr([(path.name, path.stat().st_mtime_ns) for path in files]).encode()
    ).hexdigest()[:16]


# Compiled functions, which live as long as somebody holds them.
_KEPT: list[Any] = []
