"""Arguments of native kernels by name: one C struct, filled in by Python and read by the kernel.

docs/kernels.md has an example. This module needs no numba; `mhesa.ops.cpu.compiling` is numba's side of it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, ClassVar

NUMBERS: dict[str, Any] = {
    "int64": ctypes.c_int64,
    "uint64": ctypes.c_uint64,
    "float64": ctypes.c_double,
}


@dataclass(frozen=True)
class Pointer:
    """A pointer, as the type of a struct's field.

    Args:
        to: a struct, another pointer, or a type of numbers by numpy's name. Three names depend on the type
            that a kernel is compiled for: "stored" is that type, "accumulation" the one that its sums have,
            "operand" the one that weights of that type are multiplied with.
    """

    to: str | type[Struct] | Pointer


STORED, ACCUMULATION, OPERAND = Pointer("stored"), Pointer("accumulation"), Pointer("operand")
FLOAT32, FLOAT64, INT64 = Pointer("float32"), Pointer("float64"), Pointer("int64")


class Struct(ctypes.Structure):
    """A C struct with the fields `kinds`; those not given are zero or null."""

    __slots__ = ()
    kinds: ClassVar[dict[str, str | Pointer]] = {}

    @property
    def address(self) -> int:
        """Where the struct lies, valid as long as this object lives."""
        return ctypes.addressof(self)


def struct(name: str, **kinds: str | Pointer) -> type[Struct]:
    """Declare a C struct; each field is a number (`NUMBERS`) or a `Pointer`.

    >>> Point = struct("Point", x="float64", values=FLOAT32)
    >>> Point(x=0.5).x, ctypes.sizeof(Point)
    (0.5, 16)
    """
    fields = [
        (field, ctypes.c_void_p if isinstance(kind, Pointer) else NUMBERS[kind])
        for field, kind in kinds.items()
    ]
    return type(name, (Struct,), {"__slots__": (), "_fields_": fields, "kinds": kinds})
