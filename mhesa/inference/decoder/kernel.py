"""The whole model over a few rows as one native function, on all threads at once.

A row is one token of one sequence: a decoding step has a row for every sequence, reading a prompt has many
rows of one. The rows pass through the model in stages, each cut into tasks that threads take as they are
free; a stage begins when every task of the one before is done. So it takes no more than a counter for
threads to keep step, and it does not matter how many of them come, or when.

A layer's stages, where `|` parts what each stage does:

    normalise x | u, v = GELU(W_u x), GELU(W_v x) | smooth v | u = u * W_g v | pack u | x = x + W_o u + b

What the stages are and where their weights lie is data, a table that `mhesa.inference.decoder.native` writes.

What a row goes through does not depend on the other rows, so its results are the same bit for bit alone, in
a batch, or as part of a long stretch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba.extending import overload

from mhesa.inference.decoder.matmul import PADDING, PANEL, TILE, multiply
from mhesa.ops.cpu.gelu_kernels import gelu
from mhesa.ops.cpu.simd import (
    I32,
    cgutils,
    count,
    fields,
    floats,
    integers,
    intrinsic,
    jit,
    offset,
    pointer,
    take,
    types,
    wait,
)

# What a kernel is told, as one array of 64-bit integers: sizes and addresses, then the stages.
ROWS, SEQUENCES, EVERY, THREADS, STAGES, NUM_TOKENS, REFUSED = range(7)
X_STEP, UV_STEP, V, OPERAND_STEP, STATE_LAYER, STATE_SEQUENCE = range(7, 13)
IDS, OFFSETS, STATE, X, UV, OPERAND, STEPS, COUNTERS, FIELDS = range(13, 22)

# A stage: what it does, and what with. A row of an int8 product has LIMIT steps to each side at most.
KIND, LAYER, COLUMNS, LIMIT = range(4)
WEIGHT, BIAS, ALPHA, DECAY, SKIP = range(4, 9)
SOURCE, SOURCE_STEP, PANELS, MATRIX, MATRIX_STEPS, OUT, OUT_STEP, STAGE_FIELDS = range(9, 17)

# What a stage does: to rows, to sequences, to the rows that are asked for, to panels of a matrix.
EMBED, NORMALISE, PACK, SMOOTH, PACK_OUTPUTS, GELU, GATE, ADD, KEEP = range(9)

# A counter has a cache line to itself.
LINE = 8
# Rows of a batch that a task multiplies by a panel; whole tiles.
ROWS_A_TASK = 8 * TILE
# How many tasks a thread should find in a stage, that none waits long for the last.
TASKS_A_THREAD = 4
LEAST_NORMAL = np.float32(2.0**-126)
EPSILON = np.float32(1e-5)

# Functions of kernels bear no types: numba finds them, and has none for its own. `_pack` and `_sum` only lend
# their names to what `overload` compiles in their place for each type of weights.

# Sums may be taken in any order, and products join them: vectors need both.
fast: Any = jit(fastmath={"reassoc", "contract"}, error_model="numpy")


@intrinsic
def _operands(context: Any, address: Any, weights: Any) -> Any:
    """The address as a pointer to rows that are multiplied by such weights: int8 ones take 16 bits."""
    stored = types.int16 if weights.dtype == types.int8 else weights.dtype

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(stored)(types.int64, weights), codegen


@intrinsic
def _totals(context: Any, weights: Any) -> Any:
    """Memory on the stack for a tile of sums."""
    total = types.int32 if weights.dtype == types.int8 else types.float32

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        memory = ir.ArrayType(context.get_value_type(total), TILE * PANEL)
        return builder.gep(cgutils.alloca_once(builder, memory), [I32(0), I32(0)])

    return types.CPointer(total)(weights), codegen


@intrinsic
def _bits(context: Any, value: Any) -> Any:
    """The bits of an fp32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], I32)

    return types.uint32(types.float32), codegen


@fast
def _normalise(x, weight, bias, out, n):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(n):
        total += x[i]
    mean = total / np.float32(n)
    spread = np.float32(0)
    for i in range(n):
        spread += (x[i] - mean) * (x[i] - mean)
    scale = np.float32(1) / np.float32(math.sqrt(spread / np.float32(n) + EPSILON))
    for i in range(n):
        out[i] = (x[i] - mean) * scale * weight[i] + bias[i]


@fast
def _smooth(v, alpha, decay, skip, state, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        h = decay[i] * state[i] + alpha[i] * v[i]
        h = np.float32(0) if abs(h) < LEAST_NORMAL else h
        state[i] = h
        v[i] = h + skip[i] * v[i]


@jit
def _pad(operand, n):  # type: ignore[no-untyped-def]
    # What another row left there may be a NaN, and zero times NaN is no zero.
    for i in range(n, (n + PADDING - 1) // PADDING * PADDING):
        operand[i] = 0


def _pack(row: Any, operand: Any, steps: Any, index: int, limit: int, n: int) -> None:
    """Write a row as the weights' products take it, and for int8 the size of its steps."""
    raise NotImplementedError


@overload(_pack)
def _pack_for(row, operand, steps, index, limit, n):  # type: ignore[no-untyped-def]
    if operand.dtype == types.float32:
        return _pack_float32
    return _pack_bfloat16 if operand.dtype == types.uint16 else _pack_int16


def _pack_float32(row, operand, steps, index, limit, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        operand[i] = row[i]
    _pad(operand, n)


def _pack_bfloat16(row, operand, steps, index, limit, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        bits = _bits(row[i])
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        # Rounding must not carry a NaN's bits over into an infinity, or a number.
        operand[i] = np.uint32(0x7FC0) if row[i] != row[i] else rounded
    _pad(operand, n)


def _pack_int16(row, operand, steps, index, limit, n):  # type: ignore[no-untyped-def]
    largest, nothing = np.float32(0), np.float32(0)
    for i in range(n):
        largest = max(largest, abs(row[i]))
        # Zero for every number; a comparison would pass over a NaN.
        nothing += row[i] * np.float32(0)
    steps[index] = largest / np.float32(limit) + nothing
    scale = np.float32(limit) / largest if largest > LEAST_NORMAL else np.float32(0)
    for i in range(n):
        operand[i] = np.int16(np.rint(row[i] * scale))
    _pad(operand, n)


def _sum(total: Any, i: int, step: float, weight_steps: Any) -> float:
    """A sum as fp32."""
    raise NotImplementedError


@overload(_sum)
def _sum_for(total, i, step, weight_steps):  # type: ignore[no-untyped-def]
    if total.dtype == types.float32:
        return lambda total, i, step, weight_steps: total[i]
    return lambda total, i, step, weight_steps: np.float32(total[i]) * (step * weight_steps[i])


@jit
def _products(panel, x, x_step, totals, columns, rows):  # type: ignore[no-untyped-def]
    if rows == TILE:
        multiply(panel, x, x_step, totals, columns, 6)
    elif rows == 1:
        multiply(panel, x, x_step, totals, columns, 1)
    elif rows == 2:
        multiply(panel, x, x_step, totals, columns, 2)
    elif rows == 3:
        multiply(panel, x, x_step, totals, columns, 3)
    elif rows == 4:
        multiply(panel, x, x_step, totals, columns, 4)
    else:
        multiply(panel, x, x_step, totals, columns, 5)


@fast
def _keep(kind, totals, step, matrix_steps, out, bias):  # type: ignore[no-untyped-def]
    if kind == GELU:
        for i in range(PANEL):
            out[i] = gelu(_sum(totals, i, step, matrix_steps))
    elif kind == GATE:
        for i in range(PANEL):
            out[i] *= _sum(totals, i, step, matrix_steps)
    elif kind == ADD:
        for i in range(PANEL):
            out[i] += _sum(totals, i, step, matrix_steps) + bias[i]
    else:
        for i in range(PANEL):
            out[i] = _sum(totals, i, step, matrix_steps)


@jit
def _operand(data, p, row):  # type: ignore[no-untyped-def]
    return offset(_operands(p[OPERAND], data), row * p[OPERAND_STEP])


@jit
def _embed(p, stage, low, high):  # type: ignore[no-untyped-def]
    n, ids, embedding = stage[COLUMNS], integers(p[IDS]), floats(stage[WEIGHT])
    for row in range(low, high):
        x, token = offset(floats(p[X]), row * p[X_STEP]), offset(embedding, ids[row] * n)
        for i in range(n):
            x[i] = token[i]


@jit
def _normalise_rows(data, p, stage, low, high):  # type: ignore[no-untyped-def]
    n, weight, bias = stage[COLUMNS], floats(stage[WEIGHT]), floats(stage[BIAS])
    for row in range(low, high):
        x = offset(floats(p[X]), row * p[X_STEP])
        # The row of u and v is not written yet, and has room for this.
        normal = offset(floats(p[UV]), row * p[UV_STEP])
        _normalise(x, weight, bias, normal, n)
        _pack(normal, _operand(data, p, row), floats(p[STEPS]), row, stage[LIMIT], n)


@jit
def _smooth_rows(data, p, stage, low, high):  # type: ignore[no-untyped-def]
    n, weight, bias = stage[COLUMNS], floats(stage[WEIGHT]), floats(stage[BIAS])
    alpha, decay, skip = floats(stage[ALPHA]), floats(stage[DECAY]), floats(stage[SKIP])
    states, offsets = offset(floats(p[STATE]), stage[LAYER] * p[STATE_LAYER]), integers(p[OFFSETS])
    for sequence in range(low, high):
        state = offset(states, sequence * p[STATE_SEQUENCE])
        for row in range(offsets[sequence], offsets[sequence + 1]):
            v = offset(floats(p[V]), row * p[UV_STEP])
            _normalise(v, weight, bias, v, n)
            _smooth(v, alpha, decay, skip, state, n)
            _pack(v, _operand(data, p, row), floats(p[STEPS]), row, stage[LIMIT], n)


@jit
def _pack_rows(data, p, stage, low, high):  # type: ignore[no-untyped-def]
    offsets = integers(p[OFFSETS])
    for row in range(low, high):
        source = row if stage[KIND] == PACK or p[EVERY] else offsets[row + 1] - 1
        values = offset(floats(stage[SOURCE]), source * stage[SOURCE_STEP])
        _pack(values, _operand(data, p, row), floats(p[STEPS]), row, stage[LIMIT], stage[COLUMNS])


@jit
def _multiply(data, p, stage, rows, totals, low, high):  # type: ignore[no-untyped-def]
    matrix, columns, source_step = pointer(stage[MATRIX], data), stage[COLUMNS], stage[SOURCE_STEP]
    source, steps = _operands(stage[SOURCE], data), floats(p[STEPS])
    blocks = (rows + ROWS_A_TASK - 1) // ROWS_A_TASK
    for unit in range(low, high):
        panel, block = unit // blocks, unit % blocks
        weights, outputs = offset(matrix, panel * columns * PANEL), panel * PANEL
        bias, out = offset(floats(stage[BIAS]), outputs), offset(floats(stage[OUT]), outputs)
        matrix_steps = offset(floats(stage[MATRIX_STEPS]), outputs)
        last = min((block + 1) * ROWS_A_TASK, rows)
        for first in range(block * ROWS_A_TASK, last, TILE):
            count = min(TILE, last - first)
            _products(weights, offset(source, first * source_step), source_step, totals, columns, count)
            for i in range(count):
                row = first + i
                row_out = offset(out, row * stage[OUT_STEP])
                _keep(stage[KIND], offset(totals, i * PANEL), steps[row], matrix_steps, row_out, bias)


@jit
def _work(data, p, stage, rows, totals, low, high):  # type: ignore[no-untyped-def]
    kind = stage[KIND]
    if kind == EMBED:
        _embed(p, stage, low, high)
    elif kind == NORMALISE:
        _normalise_rows(data, p, stage, low, high)
    elif kind == SMOOTH:
        _smooth_rows(data, p, stage, low, high)
    elif kind >= GELU:
        _multiply(data, p, stage, rows, totals, low, high)
    else:
        _pack_rows(data, p, stage, low, high)


def run(data):  # type: ignore[no-untyped-def]
    """Take part in reading the rows that `data` tells of: states move on in place, logits are written."""
    p = fields(data)
    p[REFUSED] = 0
    ids, totals = integers(p[IDS]), _totals(data)
    for row in range(p[ROWS]):
        if ids[row] < 0 or ids[row] >= p[NUM_TOKENS]:
            p[REFUSED] = 1
            return
    asked = p[ROWS] if p[EVERY] else p[SEQUENCES]
    for index in range(p[STAGES]):
        stage = offset(p, FIELDS + index * STAGE_FIELDS)
        rows = asked if stage[KIND] == PACK_OUTPUTS or stage[KIND] == KEEP else p[ROWS]
        units = p[SEQUENCES] if stage[KIND] == SMOOTH else rows
        if stage[KIND] >= GELU:
            units = stage[PANELS] * ((rows + ROWS_A_TASK - 1) // ROWS_A_TASK)
        grain = max(1, units // (p[THREADS] * TASKS_A_THREAD))
        tasks = (units + grain - 1) // grain
        taken = offset(integers(p[COUNTERS]), index * 2 * LINE)
        done = offset(taken, LINE)
        task = take(taken)
        while task < tasks:
            _work(data, p, stage, rows, totals, task * grain, min((task + 1) * grain, units))
            count(done)
            task = take(taken)
        wait(done, tasks)
