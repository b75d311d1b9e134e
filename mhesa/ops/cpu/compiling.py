"""Compiling kernels with numba: their arguments' types, pointers, and native functions kept on disk.

A kernel is a plain function of one pointer, to a struct of `mhesa.ops.cpu.arguments`. `compiled` makes a
native function of it, `mhesa.ops.cpu.threads.parallel` runs that on all threads. Tensors are pointers, not
numba's arrays: nothing is compiled again for a new layout or an absent tensor, and the compiler need not
prove that outputs and inputs do not overlap.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numba.core.caching
import numba.core.cgutils
import numba.core.typing.templates
import numba.extending
import torch
from llvmlite import ir

from mhesa.locks import made_once
from mhesa.ops.cpu.arguments import Pointer, Struct

# Numba is annotated in part only. Only kernels call these functions: the wrappers by which Python and C would
# call them are left out, a third of the time to compile.
jit: Any = partial(numba.njit, no_cpython_wrapper=True, no_cfunc_wrapper=True)
# For a function that is called in one place: numba writes it there. To compile it by itself takes 0.1 s.
inlined: Any = partial(jit, inline="always")
cfunc: Any = numba.cfunc
types: Any = numba.types
caching: Any = numba.core.caching
cgutils: Any = numba.core.cgutils
extending: Any = numba.extending
typing: Any = numba.core.typing.templates

# Numba has no arithmetic for 16-bit floats on CPU: they travel as integers.
STORED_TYPES: dict[torch.dtype, Any] = {
    torch.float32: types.float32,
    torch.float64: types.float64,
    torch.bfloat16: types.uint16,
    torch.float16: types.int16,
    torch.int8: types.int8,
}


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that writes LLVM instructions for a call; types of constant arguments hold their values."""
    return extending.intrinsic(prefer_literal=True)(function)


def literals(*constants: Any) -> bool:
    """Whether the values of these arguments of an intrinsic are known; if not, numba asks again."""
    return all(isinstance(constant, types.Literal) for constant in constants)


def accumulation(stored: Any) -> Any:
    """The type that values stored as `stored` are summed in."""
    return {types.float64: types.float64, types.int8: types.int32}.get(stored, types.float32)


def operand(weights: Any) -> Any:
    """The type of values that are multiplied by weights of type `weights`."""
    return types.uint8 if weights == types.int8 else weights


class StructPointer(types.Type):  # type: ignore[misc]
    """A pointer to structs: `pointer.name` reads or writes a field of the first, `offset` finds the others.

    `stored` is numba's type of the tensors' values.
    """

    def __init__(self, struct: type[Struct], stored: Any) -> None:
        self.size = ctypes.sizeof(struct)
        self.members = {
            name: (getattr(struct, name).offset, _type(kind, stored)) for name, kind in struct.kinds.items()
        }
        # Numba compares types by their names.
        super().__init__(f"{struct.__name__}*{self.members}")


def _type(kind: str | type[Struct] | Pointer, stored: Any) -> Any:
    if isinstance(kind, Pointer):
        to = _type(kind.to, stored)
        return to if isinstance(kind.to, type) else types.CPointer(to)
    if isinstance(kind, type):
        return StructPointer(kind, stored)
    special = {"stored": stored, "accumulation": accumulation(stored), "operand": operand(stored)}
    return special.get(kind) or getattr(types, kind)


def _register_struct_pointer() -> None:
    """Teach numba to pass a `StructPointer`, and to read and write the fields behind it."""
    extending.register_model(StructPointer)(extending.models.OpaqueModel)

    class Members(typing.AttributeTemplate):  # type: ignore[misc]
        key = StructPointer

        def generic_resolve(self, pointer: StructPointer, name: str) -> Any:
            return pointer.members[name][1] if name in pointer.members else None

    def read(context: Any, builder: Any, pointer: StructPointer, address: Any, name: str) -> Any:
        return builder.load(_member_address(context, builder, pointer, address, name))

    def write(context: Any, builder: Any, signature: Any, args: Any, name: str) -> None:
        pointer, given = signature.args
        value = context.cast(builder, args[1], given, pointer.members[name][1])
        builder.store(value, _member_address(context, builder, pointer, args[0], name))

    typing.infer_getattr(Members)
    extending.lower_getattr_generic(StructPointer)(read)
    extending.lower_setattr_generic(StructPointer)(write)


_register_struct_pointer()


def _member_address(context: Any, builder: Any, pointer: StructPointer, address: Any, name: str) -> Any:
    offset, kind = pointer.members[name]
    place = builder.gep(address, [ir.IntType(64)(offset)])
    return builder.bitcast(place, context.get_value_type(kind).as_pointer())


@intrinsic
def member(context: Any, pointer: Any, name: Any) -> Any:
    """A pointer to the field `name` of a struct."""
    if not literals(name):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _member_address(context, builder, pointer, args[0], name.literal_value)

    return types.CPointer(pointer.members[name.literal_value][1])(pointer, name), codegen


@intrinsic
def exists(context: Any, pointer: Any) -> Any:
    """Whether a pointer is not null."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return cgutils.is_not_null(builder, args[0])

    return types.boolean(pointer), codegen


@intrinsic
def offset(context: Any, pointer: Any, index: Any) -> Any:
    """The pointer moved on by `index` elements."""
    # LLVM knows no struct: their pointers count bytes.
    size = pointer.size if isinstance(pointer, StructPointer) else 1

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [builder.mul(args[1], ir.IntType(64)(size))])

    return pointer(pointer, types.int64), codegen


@intrinsic
def stack_array(context: Any, like: Any, count: Any) -> Any:
    """Memory on the stack for `count` values of the accumulation type of what `like` points to."""
    if not literals(count):
        return None
    wide = accumulation(like.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        memory = ir.ArrayType(context.get_value_type(wide), count.literal_value)
        array = cgutils.alloca_once(builder, memory)
        # Vectors that straddle cache lines are twice the work.
        array.align = 64
        return builder.bitcast(array, context.get_value_type(types.CPointer(wide)))

    return types.CPointer(wide)(like, count), codegen


@intrinsic
def never_inlined(context: Any) -> Any:
    """Keep LLVM from inlining the function that calls this.

    A long one that is called in several places is then compiled once.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen


@cache
def compiled(
    kernel: Callable[..., None], dtype: torch.dtype, arguments: type[Struct], variant: str = ""
) -> int:
    """The address of a kernel's native function, from the cache on disk if it is there.

    Args:
        kernel: a function of one pointer to `arguments`.
        dtype: type of values that are "stored" in them.
        arguments: the declaration of the arguments.
        variant: name of whatever else the code depends on, for the cache.
    """
    signature = types.void(StructPointer(arguments, STORED_TYPES[dtype]))
    try:
        # Numba's cache sees changes of the kernel's own file only, so the name holds a digest of all sources.
        folders = Path(__file__).parent, Path(kernel.__code__.co_filename).parent
        kernel.__qualname__ = f"{kernel.__name__}_{variant}{_digest(*folders)}"
        cache_folder = Path(caching.FunctionCache(kernel).cache_path)
        with made_once(cache_folder / f"{kernel.__qualname__}_{STORED_TYPES[dtype]}.made"):
            function = cfunc(signature, cache=True, error_model="numpy")(kernel)
    except (OSError, RuntimeError):  # numba finds no folder to write to, or cannot write to it
        function = cfunc(signature, error_model="numpy")(kernel)
    _COMPILED.append(function)
    return int(function.address)


@cache
def _digest(*folders: Path) -> str:
    """Changes when a source file does."""
    files = sorted(path for folder in {*folders} for path in folder.glob("*.py"))
    sources = b"".join(path.read_bytes() for path in files)
    return hashlib.sha256(sources).hexdigest()[:16]


# Native code is freed with the object that numba returns.
_COMPILED: list[Any] = []
