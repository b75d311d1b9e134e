"""Products of a weight matrix with a few rows, for each type of weights, as vector instructions.

A matrix is packed into panels of 64 outputs (docs/kernels.md). Within a panel one column follows the other,
in groups of as many columns as 32 bits hold. One row reads a panel from start to end at the speed of memory;
six rows use every weight six times and keep the arithmetic busy. Either way an output is summed by the same
instructions in the same order, so a row's result is the same bit for bit, alone or in a batch.

- fp32: fused multiply-adds.
- bf16: products of pairs, summed in fp32; rows are rounded to bf16 as under autocast.
- int8: products of four columns, summed exactly in 32-bit integers. Weights are int8 with a scale for each
  output, rows are 8 bits with a scale for each row.

The instruction for 8 bits multiplies signed values by unsigned ones. So rows are stored with 128 added, and
sums start from minus 128 times the sum of their output's weights, which stands at the start of the panel.

Processors that lack an instruction for groups compute the same sums with several instructions. Those with AMX
multiply bf16 in tiles instead, see `mhesa.inference.decoder.tiles`.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import torch
from llvmlite import ir
from numba.extending import overload
from torch import Tensor

from mhesa.errors import InputError
from mhesa.inference.decoder import tiles
from mhesa.ops.cpu import processor
from mhesa.ops.cpu.compiling import STORED_TYPES, cgutils, intrinsic, literals, types
from mhesa.ops.cpu.gelu_kernels import gelu
from mhesa.ops.cpu.simd import FLOAT, I8, I32, I64, Emitter, call, splat

# Outputs of a panel: four vectors, so that a single row has enough sums to hide the latency of an addition.
PANEL = 64
LANES = 16
# Rows that share one pass over a panel: 24 sums, 4 weights and 1 value fill 29 of 32 registers.
TILE = 6
# The most rows that share a pass, on any processor.
LARGEST_TILE = tiles.ROWS
# Columns are padded with zeros to a multiple of so many groups, the most that `multiply` takes at a time, or
# of the columns of a tile: loops have no remainder.
PADDED_GROUPS = 8
# The largest multiple, in columns.
LARGEST_PADDING = max(4 * PADDED_GROUPS, tiles.COLUMNS)
# The largest value of a row for int8 weights, and what is added to make it unsigned.
LARGEST_OPERAND, OPERAND_OFFSET = 127, 128
# The most columns whose int8 products cannot overflow int32, the start of the sum included.
MAX_INT8_COLUMNS = (2**31 - 1) // (127 * OPERAND_OFFSET)

# What a product does with its sums: write them, write their GELU, multiply its output by them, or add them.
WRITE, GELU, GATE, ADD = range(4)

_FLOATS, _INTEGERS = ir.VectorType(FLOAT, LANES), ir.VectorType(I32, LANES)


def padded(size: int, multiple: int) -> int:
    """`size`, rounded up to a multiple."""
    return -(-size // multiple) * multiple


def padded_columns(columns: int, weights: torch.dtype) -> int:
    """Columns of a packed matrix.

    >>> padded_columns(40, torch.int8)
    64
    """
    if tiles.used_for(STORED_TYPES[weights]):
        return padded(columns, tiles.COLUMNS)
    return padded(columns, PADDED_GROUPS * group_of(weights))


def group_of(weights: torch.dtype) -> int:
    """How many columns lie side by side in a packed matrix: as many as 32 bits hold.

    >>> group_of(torch.bfloat16)
    2
    """
    return 4 // weights.itemsize


def packed_shape(outputs: int, columns: int, weights: torch.dtype) -> torch.Size:
    """The shape of a packed matrix, `(panels, columns / group, 64, group)`.

    Panels of int8 are a group longer: they begin with 64 int32, from which sums start.

    >>> packed_shape(3, 5, torch.float32), packed_shape(3, 5, torch.int8)
    (torch.Size([1, 8, 64, 1]), torch.Size([1, 9, 64, 4]))
    """
    group, head = group_of(weights), int(weights == torch.int8)
    groups = head + padded_columns(columns, weights) // group
    return torch.Size((padded(outputs, PANEL) // PANEL, groups, PANEL, group))


def pack(weight: Tensor, panels: Tensor | None = None) -> Tensor:
    """Write a matrix of `(outputs, columns)` as panels, padded with zeros.

    Args:
        weight: the matrix.
        panels: memory of `packed_shape` and the matrix's type to write to; new memory if omitted.
    """
    outputs, columns = weight.shape
    if panels is None:
        panels = torch.empty(packed_shape(outputs, columns, weight.dtype), dtype=weight.dtype, device="cpu")
    count, length, _, group = panels.shape
    head = int(weight.dtype == torch.int8)
    padded_weight = torch.zeros(count * PANEL, (length - head) * group, dtype=weight.dtype, device="cpu")
    padded_weight[:outputs, :columns] = weight
    panels[:, head:] = padded_weight.view(count, PANEL, -1, group).transpose(1, 2)
    if head:
        starts = padded_weight.sum(1, dtype=torch.int32) * -OPERAND_OFFSET
        panels[:, 0] = starts.view(torch.int8).view(count, PANEL, group)
    return panels


def check_int8_columns(columns: int) -> None:
    """Refuse a matrix whose int8 products could overflow int32.

    Raises:
        InputError: it has too many columns.
    """
    if columns > MAX_INT8_COLUMNS:
        limit = f"matrices in int8 have at most {MAX_INT8_COLUMNS} columns"
        raise InputError(f"{limit}, not {columns}; keep them in fp32 or bf16")


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """An int8 matrix `(outputs, columns)` and scales `(outputs,)`: `weight ≈ matrix * scales[:, None]`.

    >>> matrix, scales = quantize(torch.tensor([[-1.0, 0.5], [0.0, 0.0]]))
    >>> matrix.tolist(), scales.tolist()
    ([[-127, 64], [0, 0]], [0.007874015718698502, 0.0])
    """
    weight = weight.float()
    scales = weight.abs().amax(1) / 127
    return (weight / scales.where(scales > 0, 1.0)[:, None]).round().to(torch.int8), scales


class _BFloat(ir.types.Type):  # type: ignore[misc]
    """LLVM's bf16, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_PAIRS_OF_BF16 = ir.VectorType(_BFloat(), 2 * LANES)
_BYTES = ir.VectorType(I8, 4 * LANES)


def _fma(builder: Any, total: Any, a: Any, b: Any) -> Any:
    return call(builder, "llvm.fma.v16f32", _FLOATS, a, b, total)


def _load_integers(builder: Any, pointer: Any) -> Any:
    return builder.load(builder.bitcast(pointer, _INTEGERS.as_pointer()), align=64)


# Each class below writes `total += weight * value` for `group` columns. Where `head` is 1, the first group of
# a panel holds what sums start from.


class _Float32:
    """One column, in fp32."""

    group, head, total = 1, 0, _FLOATS

    @staticmethod
    def weights(builder: Any, pointer: Any) -> Any:
        return builder.load(builder.bitcast(pointer, _FLOATS.as_pointer()), align=64)

    @staticmethod
    def values(builder: Any, pointer: Any) -> Any:
        return splat(Emitter(builder, types.float32, LANES), builder.load(pointer))

    add = staticmethod(_fma)


class _Bfloat16:
    """A pair of bf16, summed in fp32."""

    group, head, total = 2, 0, _FLOATS
    weights = staticmethod(_load_integers)

    @staticmethod
    def values(builder: Any, pointer: Any) -> Any:
        group = builder.load(builder.bitcast(pointer, I32.as_pointer()), align=4)
        return splat(Emitter(builder, types.float32, LANES), group)

    @staticmethod
    def add(builder: Any, total: Any, a: Any, b: Any) -> Any:
        if processor.has("avx512bf16"):
            a, b = builder.bitcast(a, _PAIRS_OF_BF16), builder.bitcast(b, _PAIRS_OF_BF16)
            return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, total, a, b)
        half, high = ir.Constant(_INTEGERS, [16] * LANES), ir.Constant(_INTEGERS, [-65536] * LANES)
        first = (builder.bitcast(builder.shl(side, half), _FLOATS) for side in (a, b))
        second = (builder.bitcast(builder.and_(side, high), _FLOATS) for side in (a, b))
        return _fma(builder, _fma(builder, total, *first), *second)


class _Int8:
    """Four columns of 8 bits, summed exactly; values are unsigned."""

    group, head, total = 4, 1, _INTEGERS
    weights = staticmethod(_load_integers)
    values = _Bfloat16.values

    @staticmethod
    def add(builder: Any, total: Any, weight: Any, value: Any) -> Any:
        if processor.has("avx512vnni"):
            if llvmlite.binding.llvm_version_info >= (22,):
                weight, value = builder.bitcast(weight, _BYTES), builder.bitcast(value, _BYTES)
            # The unsigned ones come first.
            return call(builder, "llvm.x86.avx512.vpdpbusd.512", _INTEGERS, total, value, weight)
        last = ir.Constant(_INTEGERS, [24] * LANES)
        for bits in (24, 16, 8, 0):
            ahead = ir.Constant(_INTEGERS, [bits] * LANES)
            signed = builder.ashr(builder.shl(weight, ahead), last)
            unsigned = builder.lshr(builder.shl(value, ahead), last)
            total = builder.add(total, builder.mul(signed, unsigned))
        return total


_PRODUCTS: dict[Any, Any] = {types.float32: _Float32, types.uint16: _Bfloat16, types.int8: _Int8}


def tile_rows(weights: Any) -> int:
    """Rows that share one pass over a panel of these weights."""
    raise NotImplementedError


@overload(tile_rows)
def _tile_rows_for(weights):  # type: ignore[no-untyped-def]
    rows = tiles.ROWS if tiles.used_for(weights.dtype) else TILE
    return lambda weights: rows


@intrinsic
def multiply(context: Any, weights: Any, x: Any, x_stride: Any, out: Any, columns: Any, rows: Any) -> Any:
    """Write the products of a panel with up to `tile_rows` of `x`, `x_stride` apart, to `out`, `(rows, 64)`.

    Where a tile has 16 rows, that many are read and written, however few there are.
    """
    product, vectors = _PRODUCTS[weights.dtype], PANEL // LANES

    def write(builder: Any, args: Any, count: int) -> None:
        panel, x_0, x_stride, out_0, n, _ = args
        group, vector = product.group, product.total
        # Columns per iteration: with few rows an iteration is short, and its overhead counts.
        unrolled = {1: 8, 2: 4, 3: 4}.get(count, 2)
        totals = [[cgutils.alloca_once(builder, vector) for _ in range(vectors)] for _ in range(count)]
        for v in range(vectors):
            start = ir.Constant(vector, [0] * LANES)
            if product.head:
                start = product.weights(builder, builder.gep(panel, [I64(v * LANES * group)]))
            for sums in totals:
                builder.store(start, sums[v])
        panel = builder.gep(panel, [I64(product.head * PANEL * group)])
        x_rows = [builder.gep(x_0, [builder.mul(x_stride, I64(row))]) for row in range(count)]
        steps = builder.udiv(n, I64(group))
        with cgutils.for_range_slice(builder, I64(0), steps, I64(unrolled), I64) as (first, _):
            for ahead in range(unrolled):
                step = builder.add(first, I64(ahead))
                column = builder.gep(panel, [builder.mul(step, I64(PANEL * group))])
                loaded = [
                    product.weights(builder, builder.gep(column, [I64(v * LANES * group)]))
                    for v in range(vectors)
                ]
                for x_i, sums in zip(x_rows, totals, strict=True):
                    value = product.values(builder, builder.gep(x_i, [builder.mul(step, I64(group))]))
                    for weight, total in zip(loaded, sums, strict=True):
                        builder.store(product.add(builder, builder.load(total), weight, value), total)
        for row, sums in enumerate(totals):
            for v, total in enumerate(sums):
                place = builder.gep(out_0, [I64(row * PANEL + v * LANES)])
                value = builder.bitcast(builder.load(total), vector)
                builder.store(value, builder.bitcast(place, vector.as_pointer()), align=4)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if tiles.used_for(weights.dtype):
            tiles.multiply_tiles(builder, args, PANEL)
            return context.get_dummy_value()
        for count in range(1, TILE + 1):
            with builder.if_then(builder.icmp_signed("==", args[-1], I64(count))):
                write(builder, args, count)
        return context.get_dummy_value()

    return types.void(weights, x, types.int64, out, types.int64, types.int64), codegen


@intrinsic
def write_sums(
    context: Any, epilogue: Any, sums: Any, scale: Any, weight_scales: Any, bias: Any, out: Any
) -> Any:
    """Do what a product's `epilogue` says with a row's sums of a panel; those of int8 are scaled first."""
    if not literals(epilogue):
        return None
    what = epilogue.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, sums_0, scale, scales_0, bias_0, out_0 = args
        # The parts of one wide vector are independent, so the processor overlaps them. It takes the registers
        # of AVX-512, which has more of them and longer ones.
        emit = Emitter(builder, types.float32, PANEL if processor.has("avx512f") else LANES)
        for first in range(0, PANEL, emit.lanes):
            place = I64(first)
            value = builder.load(emit.address(sums_0, place), align=4)
            if sums.dtype != types.float32:
                factor = builder.fmul(splat(emit, scale), emit.load(scales_0, place))
                value = builder.fmul(builder.sitofp(value, emit.type), factor)
            if what == GELU:
                value = gelu(emit, value)
            elif what == GATE:
                value = builder.fmul(emit.load(out_0, place), value)
            elif what == ADD:
                value = builder.fadd(emit.load(out_0, place), builder.fadd(value, emit.load(bias_0, place)))
            emit.store(value, out_0, place)
        return context.get_dummy_value()

    return types.void(epilogue, sums, scale, weight_scales, bias, out), codegen
