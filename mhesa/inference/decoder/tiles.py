"""Products of bf16 in tiles: Intel's AMX has registers of 16 rows of 64 bytes, and multiplies two at once.

A step of a product takes 32 columns: a tile of 16 rows of the operand times four tiles of weights, 16 outputs
each, added to four tiles of sums. A panel has its pairs of columns in a tile's order already: tiles are read
from it with a stride. The order of the sums is not that of other processors, but the same for every row,
however many there are.
"""

from __future__ import annotations

from typing import Any

from mhesa.ops.cpu import processor
from mhesa.ops.cpu.compiling import cgutils, intrinsic, types
from mhesa.ops.cpu.simd import I8, I64, VOID, call

# Rows of a tile, and bytes of a row.
ROWS, BYTES = 16, 64
# Columns of a step, in bf16, and outputs of a tile of sums, in fp32.
COLUMNS, OUTPUTS = BYTES // 2, BYTES // 4
# What `ldtilecfg` reads: palette 1; at byte 16 the bytes of a row of each of 8 tiles, at byte 48 their rows.
_CONFIGURATION = bytes([1, *[0] * 15, *[BYTES, 0] * 8, *[0] * 16, *[ROWS] * 8, *[0] * 8])


def _call(builder: Any, name: str, *args: Any) -> None:
    call(builder, f"llvm.x86.{name}", VOID, *args)


def multiply_tiles(builder: Any, args: Any, outputs: int) -> None:
    """Write the products of a panel of `outputs` with 16 rows; arguments as those of `multiply`."""
    panel, x, x_stride, out, columns, _ = args
    pair, sums = 2, range(outputs // OUTPUTS)
    left, right = I8(len(sums)), I8(len(sums) + 1)

    def pointer(value: Any) -> Any:
        return builder.bitcast(value, I8.as_pointer())

    for tile in sums:
        _call(builder, "tilezero", I8(tile))
    row_bytes, step_bytes = builder.mul(x_stride, I64(2)), I64(outputs * pair * 2)
    with cgutils.for_range_slice(builder, I64(0), columns, I64(COLUMNS), I64) as (first, _):
        _call(builder, "tileloadd64", left, pointer(builder.gep(x, [first])), row_bytes)
        weights = builder.gep(panel, [builder.mul(first, I64(outputs))])
        for tile in sums:
            place = builder.gep(weights, [I64(tile * OUTPUTS * pair)])
            _call(builder, "tileloadd64", right, pointer(place), step_bytes)
            _call(builder, "tdpbf16ps", I8(tile), left, right)
    for tile in sums:
        place = builder.gep(out, [I64(tile * OUTPUTS)])
        _call(builder, "tilestored64", I8(tile), pointer(place), I64(outputs * 4))


def used_for(weights: Any) -> bool:
    """Whether weights of this type of numba's are multiplied in tiles."""
    return weights == types.uint16 and processor.request_tiles()


@intrinsic
def begin_tiles(context: Any, weights: Any) -> Any:
    """Prepare the thread's tile registers, if weights of this type are multiplied in them."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if used_for(weights.dtype):
            place = cgutils.global_constant(
                builder, "tile_configuration", cgutils.make_bytearray(_CONFIGURATION)
            )
            _call(builder, "ldtilecfg", builder.bitcast(place, I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(weights), codegen


@intrinsic
def end_tiles(context: Any, weights: Any) -> Any:
    """Leave the thread's tile registers as other code expects them: unused."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if used_for(weights.dtype):
            _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(weights), codegen
