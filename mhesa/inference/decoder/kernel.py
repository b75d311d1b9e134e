"""The whole model over a few rows as one native function on all threads.

docs/kernels.md explains stages, shares, panels and tiles.

A row is one token of one sequence: a decoding step has a row for every sequence, reading a prompt has many
rows of one. The rows pass through the model in stages, each cut into tasks that threads take when they are
free; a stage begins when all tasks of the one before are done. Counters alone keep threads in step, so fewer
of them than asked for can take part, from any moment on.

Where each thread can have many rows, it takes a share of them through all stages by itself instead, up to
the logits, or where surprisal alone is wanted to the bits of each token. Its memory is its own and used again
for the next share, so a call may have any number of rows, unless all logits are wanted.

The stages of a layer:

    normalise x | u, v = GELU(W_u x), GELU(W_v x) | smooth v | u = u * W_g v | pack u | x = x + W_o u + b

A convolution follows the normalisation in the same stage. The logits of rates that follow the input are
further outputs of the product that makes u and v.

The table of stages is data, written by `mhesa.inference.decoder.native`.

The arithmetic of a row does not depend on other rows: results are the same bit for bit alone, in a batch, or
as part of a long stretch.
"""

# Numba finds the types of kernels when it compiles them.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.extending import overload

from mhesa.inference.decoder.matmul import (
    ADD,
    GATE,
    GELU,
    LANES,
    LARGEST_OPERAND,
    LARGEST_PADDING,
    LARGEST_TILE,
    OPERAND_OFFSET,
    PANEL,
    TILE,
    WRITE,
    multiply,
    tile_rows,
    write_sums,
)
from mhesa.inference.decoder.statistics_kernel import SUMS, row_bits
from mhesa.inference.decoder.tiles import begin_tiles, end_tiles
from mhesa.ops.cpu.arguments import FLOAT32, FLOAT64, INT64, OPERAND, STORED, Pointer, struct
from mhesa.ops.cpu.atomics import LINE, clock, fetch_add, signal, wait
from mhesa.ops.cpu.compiling import (
    exists,
    inlined,
    intrinsic,
    jit,
    literals,
    never_inlined,
    offset,
    stack_array,
    types,
)
from mhesa.ops.cpu.rates_tiles import write_row
from mhesa.ops.cpu.simd import Emitter, sigmoid, splat

# What a stage does. CONVOLVE normalises first. PACK writes rows of fp32 in the type that weights are
# multiplied with.
EMBED, NORMALISE, CONVOLVE, SMOOTH, PACK, MULTIPLY = range(6)

Stage = struct(
    "Stage",
    kind="int64",
    epilogue="int64",
    outputs_only="int64",  # whether it takes only the rows whose logits are asked for
    layer="int64",
    columns="int64",
    rows=FLOAT32,  # fp32 rows to read, and their stride
    row_stride="int64",
    weight=FLOAT32,  # the weight of the embedding or the normalisation
    bias=FLOAT32,
    heads="int64",
    alpha=FLOAT32,  # one per head; in an adaptive layer the logits
    decay=FLOAT32,  # one per head; in an adaptive layer the damping factors
    skip=FLOAT32,
    rate_logits=FLOAT32,  # in an adaptive layer, in the rows of u and v; as many values follow for the decays
    conv=FLOAT32,  # the convolution's weights, if there is one
    taps="int64",
    tail="int64",  # where the convolution's part of a state begins
    operand=OPERAND,  # packed rows to multiply, and their stride
    operand_stride="int64",
    matrix=STORED,
    matrix_scales=FLOAT32,  # one per output, for int8
    panels="int64",
    panel_size="int64",  # stored values of a panel
    gelu_panels="int64",  # with GELU, later panels are written as they are
    out=FLOAT32,
    out_stride="int64",
)
Arguments = struct(
    "Arguments",
    rows="int64",
    sequences="int64",
    all_logits="int64",  # whether every row has logits, not only each sequence's last
    threads="int64",
    num_tokens="int64",
    refused="int64",  # set by the kernel: whether an id is outside the vocabulary
    stages=Pointer(Stage),
    stage_count="int64",
    share_rows="int64",  # rows of a share, where threads are equally fast; 0: stages are shared
    share_stages="int64",  # stages that a thread takes its share through
    own_rows="int64",  # rows of memory that each thread has to itself; 0: memory is each row's own
    row_times=FLOAT64,  # nanoseconds that a row of each thread's last share took; 0: it has had none
    logits_rows="int64",  # rows of memory for logits that each thread has to itself
    last=FLOAT32,  # the last row of each sequence, if threads have rows of their own
    targets=INT64,  # tokens that came, and their surprisal in bits; null: not wanted
    bits=FLOAT64,
    # For each stage, `LINE` apart: tasks taken, tasks done, rows whose state is final. Then for shares: rows
    # taken, rows done, threads.
    counters=INT64,
    ids=INT64,
    offsets=INT64,
    state=FLOAT32,
    layer_stride="int64",
    sequence_stride="int64",
    uv=FLOAT32,  # memory for rows of u and v
    uv_stride="int64",
    operand=OPERAND,  # memory for packed rows
    operand_stride="int64",
    scales=FLOAT32,  # one per packed row, for int8
)

# Rows of a batch that a task multiplies by a panel, in whole tiles on any processor.
ROWS_PER_TASK = math.lcm(TILE, LARGEST_TILE)
# The sums of a tile: each of its rows with all outputs of a panel.
TILE_SUMS = LARGEST_TILE * PANEL
# Tasks of a stage for each thread: with more of them, threads wait less for the last.
TASKS_PER_THREAD = 4
# A counter of claimed tasks: those from the first on in its lower half, those from the last in its upper one.
FROM_END = 1 << 32
# Rows for int8 without a larger value count as zeros: their scale would be infinite.
SMALLEST_PEAK = np.float32(LARGEST_OPERAND * 2.0**-126)
EPSILON = np.float32(1e-5)

# Sums may be taken in any order and fused with products, which vectors need.
fast: Any = jit(fastmath={"reassoc", "contract"}, error_model="numpy")


@intrinsic
def _shift_and_scale(context, x, mean, scale, weight, bias, out, index, lanes):
    """Write `lanes` normalised values. `out` may be `x`, for which LLVM would not use vectors by itself."""
    if not literals(lanes):
        return None

    def codegen(context, builder, signature, args):
        x_0, mean, scale, weight_0, bias_0, out_0, index, _ = args
        emit = Emitter(builder, types.float32, lanes.literal_value)
        centred = builder.fsub(emit.load(x_0, index), splat(emit, mean))
        factor = builder.fmul(splat(emit, scale), emit.load(weight_0, index))
        emit.store(emit.fma(centred, factor, emit.load(bias_0, index)), out_0, index)
        return context.get_dummy_value()

    return types.void(x, mean, scale, weight, bias, out, types.int64, lanes), codegen


@fast
def _normalise(x, weight, bias, out, n):
    total = np.float32(0)
    for i in range(n):
        total += x[i]
    mean = total / np.float32(n)
    spread = np.float32(0)
    for i in range(n):
        spread += (x[i] - mean) * (x[i] - mean)
    scale = np.float32(1) / np.float32(math.sqrt(spread / np.float32(n) + EPSILON))
    vectors = n - n % LANES
    for i in range(0, vectors, LANES):
        _shift_and_scale(x, mean, scale, weight, bias, out, i, LANES)
    for i in range(vectors, n):
        _shift_and_scale(x, mean, scale, weight, bias, out, i, 1)


@fast
def _apply_tap(out, x, weight, n, first):
    """Write the products with the first tap's weights, or add those of another tap."""
    if first:
        for i in range(n):
            out[i] = weight[i] * x[i]
    else:
        for i in range(n):
            out[i] += weight[i] * x[i]


@inlined
def _keep_tail(args, stage, tail, start, end):
    """Make the last of a sequence's normalised rows, at `start` to `end`, its tail, oldest first."""
    n, kept, count = stage.columns, stage.taps - 1, end - start
    for tap in range(kept):
        at = end - kept + tap
        source = offset(args.uv, at * args.uv_stride) if at >= start else offset(tail, (tap + count) * n)
        target = offset(tail, tap * n)
        for i in range(n):
            target[i] = source[i]


@fast
def _write_rates(rates, logits, damping, heads):
    """Turn what a row adds to the logits into the alphas of its heads, and write their decays after them."""
    for head in range(heads):
        rates[head] = sigmoid(logits[head] + rates[head])
    for head in range(heads):
        rates[heads + head] = (np.float32(1) - rates[head]) * damping[head]


@jit
def _pad(operand, n):
    # An earlier row may have left NaN there, which times a weight of zero is NaN. For int8 any value does.
    for i in range(n, (n + LARGEST_PADDING - 1) // LARGEST_PADDING * LARGEST_PADDING):
        operand[i] = 0


# `overload` compiles another function in place of `_pack` for each type of weights.
def _pack(row: Any, operand: Any, scales: Any, index: int, n: int) -> None:
    """Write a row in the type that weights are multiplied with; for int8 its scale too."""
    raise NotImplementedError


@overload(_pack)
def _pack_for(row, operand, scales, index, n):
    if operand.dtype == types.float32:
        return _pack_float32
    return _pack_bfloat16 if operand.dtype == types.uint16 else _pack_uint8


def _pack_float32(row, operand, scales, index, n):
    for i in range(n):
        operand[i] = row[i]
    _pad(operand, n)


def _pack_bfloat16(row, operand, scales, index, n):
    for i in range(n):
        bits = np.float32(row[i]).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        # Rounding could turn a NaN into an infinity.
        operand[i] = np.uint32(0x7FC0) if row[i] != row[i] else rounded
    _pad(operand, n)


def _pack_uint8(row, operand, scales, index, n):
    # The largest value by its bits, which are in the order of floats without signs, NaN and infinity last. A
    # `max` of floats would ignore NaN.
    bits = np.uint32(0)
    for i in range(n):
        bits = max(bits, np.float32(abs(row[i])).view(np.uint32))
    peak = np.uint32(bits).view(np.float32)
    # NaN where a value is NaN or infinite.
    scales[index] = peak / np.float32(LARGEST_OPERAND) + (peak - peak)
    scaled = SMALLEST_PEAK < peak < np.inf
    scale = np.float32(LARGEST_OPERAND) / peak if scaled else np.float32(0)
    for i in range(n):
        operand[i] = OPERAND_OFFSET + (np.int32(np.rint(row[i] * scale)) if scaled else 0)
    _pad(operand, n)


@jit
def _finish(epilogue, totals, scale, matrix_scales, bias, out):
    # Each branch passes a constant, so that only the instructions of that epilogue are written.
    if epilogue == GELU:
        write_sums(GELU, totals, scale, matrix_scales, bias, out)
    elif epilogue == GATE:
        write_sums(GATE, totals, scale, matrix_scales, bias, out)
    elif epilogue == ADD:
        write_sums(ADD, totals, scale, matrix_scales, bias, out)
    else:
        write_sums(WRITE, totals, scale, matrix_scales, bias, out)


# In what follows, `row` is a token's index, and its values lie at `row + shift`, which is called `at`.


@inlined
def _embed(args, stage, shift, low, high):
    n = stage.columns
    for row in range(low, high):
        x = offset(stage.out, (row + shift) * stage.out_stride)
        token = offset(stage.weight, args.ids[row] * n)
        for i in range(n):
            x[i] = token[i]


@jit
def _pack_row(args, stage, values, at):
    operand = offset(args.operand, at * args.operand_stride)
    _pack(values, operand, args.scales, at, stage.columns)


@inlined
def _normalise_rows(args, stage, first, end):
    for at in range(first, end):
        x = offset(stage.rows, at * stage.row_stride)
        # The memory for u and v is not in use yet: the normalised row fits there.
        normal = offset(args.uv, at * args.uv_stride)
        _normalise(x, stage.weight, stage.bias, normal, stage.columns)
        _pack_row(args, stage, normal, at)


@jit
def _sequence_of(args, row):
    sequence = 0
    while args.offsets[sequence + 1] <= row:
        sequence += 1
    return sequence


@jit
def _wait_for_state(args, turns, low, sequence):
    """Wait for the rows before, if they change the state of the first row's sequence; return the time."""
    if args.offsets[sequence] >= low:
        return 0
    start = clock()
    wait(turns, low)
    return clock() - start


@jit
def _pass_state_on(args, turns, low, high):
    """Count these rows as done with the state, after those before them; return the time waited for those."""
    if args.rows == args.sequences:
        return 0
    start = clock()
    # Rows are counted, so they must end in order.
    wait(turns, low)
    signal(turns, high - low)
    return clock() - start


@inlined
def _convolve_rows(args, stage, turns, shift, low, high):
    n, states = stage.columns, offset(args.state, stage.layer * args.layer_stride + stage.tail)
    # The memory for u and v is not in use yet: the normalised row fits there, and after it the convolved one.
    for at in range(low + shift, high + shift):
        normal = offset(args.uv, at * args.uv_stride)
        _normalise(offset(stage.rows, at * stage.row_stride), stage.weight, stage.bias, normal, n)
    sequence = _sequence_of(args, low)
    waited = _wait_for_state(args, turns, low, sequence)
    for row in range(low, high):
        sequence += row == args.offsets[sequence + 1]
        # Rows before `low` are read from the tail: their memory may hold other values already.
        start, end = max(args.offsets[sequence], low), min(args.offsets[sequence + 1], high)
        tail = offset(states, sequence * args.sequence_stride)
        out = offset(args.uv, (row + shift) * args.uv_stride + n)
        for tap in range(stage.taps):
            before = row - tap
            source = offset(args.uv, (before + shift) * args.uv_stride)
            if before < start:
                source = offset(tail, (stage.taps - 1 - (start - before)) * n)
            _apply_tap(out, source, offset(stage.conv, tap * n), n, tap == 0)
        if row == end - 1:
            _keep_tail(args, stage, tail, start + shift, end + shift)
    waited += _pass_state_on(args, turns, low, high)
    for at in range(low + shift, high + shift):
        _pack_row(args, stage, offset(args.uv, at * args.uv_stride + n), at)
    return waited


@inlined
def _smooth_rows(args, stage, turns, shift, low, high):
    n, states = stage.columns, offset(args.state, stage.layer * args.layer_stride)
    heads, adaptive = stage.heads, exists(stage.rate_logits)
    for at in range(low + shift, high + shift):
        v = offset(stage.rows, at * stage.row_stride)
        _normalise(v, stage.weight, stage.bias, v, n)
        if adaptive:
            rates = offset(stage.rate_logits, at * stage.row_stride)
            _write_rates(rates, stage.alpha, stage.decay, heads)
    sequence = _sequence_of(args, low)
    waited = _wait_for_state(args, turns, low, sequence)
    for row in range(low, high):
        sequence += row == args.offsets[sequence + 1]
        start = (row + shift) * stage.row_stride
        v, state = offset(stage.rows, start), offset(states, sequence * args.sequence_stride)
        alpha, decay = stage.alpha, stage.decay
        if adaptive:
            alpha = offset(stage.rate_logits, start)
            decay = offset(alpha, heads)
        write_row(True, heads, n // heads, (v, 0, alpha, decay, state, v, stage.skip, True, False))
    waited += _pass_state_on(args, turns, low, high)
    for at in range(low + shift, high + shift):
        _pack_row(args, stage, offset(stage.rows, at * stage.row_stride), at)
    return waited


@inlined
def _pack_rows(args, stage, first, end):
    for at in range(first, end):
        rows, source = stage.rows, at
        if stage.outputs_only and not args.all_logits:
            if args.own_rows:
                rows = args.last
            else:
                source = args.offsets[at + 1] - 1
        _pack_row(args, stage, offset(rows, source * stage.row_stride), at)


@jit
def _multiply(args, stage, totals, panel, first, end, out_shift):
    """Multiply a panel by the rows that lie at `first` to `end`; outputs lie `out_shift` rows further."""
    never_inlined()
    columns, stride, scales, tile = stage.columns, stage.operand_stride, args.scales, tile_rows(stage.matrix)
    weights, first_output = offset(stage.matrix, panel * stage.panel_size), panel * PANEL
    bias, out = offset(stage.bias, first_output), offset(stage.out, first_output)
    matrix_scales = offset(stage.matrix_scales, first_output)
    epilogue = stage.epilogue if panel < stage.gelu_panels or stage.epilogue != GELU else WRITE
    for top in range(first, end, tile):
        count = min(tile, end - top)
        multiply(weights, offset(stage.operand, top * stride), stride, totals, columns, count)
        for i in range(count):
            at = top + i
            out_i, sums = offset(out, (at + out_shift) * stage.out_stride), offset(totals, i * PANEL)
            _finish(epilogue, sums, scales[at], matrix_scales, bias, out_i)


@inlined
def _multiply_units(args, stage, rows, totals, low, high):
    """A unit is a panel and some rows; those of one panel follow one another."""
    pieces = (rows + ROWS_PER_TASK - 1) // ROWS_PER_TASK
    for unit in range(low, high):
        first = unit % pieces * ROWS_PER_TASK
        _multiply(args, stage, totals, unit // pieces, first, min(first + ROWS_PER_TASK, rows), 0)


@jit
def _take_rows(args, stage, turns, shift, low, high):
    """Take rows through a stage that is no product; return how long they waited for their turn."""
    never_inlined()
    if stage.kind == CONVOLVE:
        return _convolve_rows(args, stage, turns, shift, low, high)
    if stage.kind == SMOOTH:
        return _smooth_rows(args, stage, turns, shift, low, high)
    if stage.kind == EMBED:
        _embed(args, stage, shift, low, high)
    elif stage.kind == NORMALISE:
        _normalise_rows(args, stage, low + shift, high + shift)
    else:
        _pack_rows(args, stage, low + shift, high + shift)
    return 0


@inlined
def _find_bits(args, stage, logits_at, first, end):
    """Compute the surprisal of some rows from their logits, the first of which lies at `logits_at`."""
    sums = stack_array(args.uv, SUMS)
    for row in range(first, end):
        logits = offset(stage.out, (logits_at + row - first) * stage.out_stride)
        args.bits[row] = row_bits(logits, args.num_tokens, args.targets[row], sums)


@inlined
def _keep_last(args, shift, low, high):
    """Keep the last row of each sequence that ends here: the memory of these rows is used again."""
    stage, sequence = args.stages, _sequence_of(args, low)
    while sequence < args.sequences and args.offsets[sequence + 1] <= high:
        x = offset(stage.out, (args.offsets[sequence + 1] - 1 + shift) * stage.out_stride)
        last = offset(args.last, sequence * stage.out_stride)
        for i in range(stage.columns):
            last[i] = x[i]
        sequence += 1


@jit
def rows_for(args, thread):
    """How many rows a thread's next share has: all threads should take the same time over theirs."""
    mine, speeds = args.row_times[thread], 0.0
    for other in range(args.threads):
        theirs = args.row_times[other]
        # A thread that has had no rows counts as equally fast.
        speeds += mine / theirs if mine > 0 and theirs > 0 else 1.0
    tiles = args.threads * args.share_rows / speeds / LARGEST_TILE
    rows = max(round(tiles), 1) * LARGEST_TILE
    return min(rows, args.own_rows) if args.own_rows else rows


@inlined
def _run_share(args, totals, thread, low, high):
    """Take rows through `share_stages` stages, and note how long one took."""
    shift = thread * args.own_rows - low if args.own_rows else 0
    start, waited, logits_at = clock(), 0, thread * args.logits_rows
    for index in range(args.share_stages):
        stage = offset(args.stages, index)
        if stage.kind != MULTIPLY:
            turns = offset(args.counters, (index * 3 + 2) * LINE)
            waited += _take_rows(args, stage, turns, shift, low, high)
            continue
        # Logits are made of some rows at a time, as there is no memory for those of all.
        makes_logits = index == args.stage_count - 1
        step = args.logits_rows if makes_logits else high - low
        for first in range(low, high, step):
            end = min(first + step, high)
            out_shift = logits_at - first - shift if makes_logits else 0
            for panel in range(stage.panels):
                _multiply(args, stage, totals, panel, first + shift, end + shift, out_shift)
            if makes_logits:
                _find_bits(args, stage, logits_at, first, end)
    if args.own_rows and not exists(args.bits):
        _keep_last(args, shift, low, high)
    args.row_times[thread] = (clock() - start - waited) / (high - low)


@inlined
def _run_shares(args, totals, thread):
    """Take shares of the rows, one after another."""
    taken = offset(args.counters, args.stage_count * 3 * LINE)
    done = offset(taken, LINE)
    # There is memory for as many threads as were asked for.
    while thread < args.threads:
        count = rows_for(args, thread)
        low = fetch_add(taken, count)
        if low >= args.rows:
            break
        high = min(low + count, args.rows)
        _run_share(args, totals, thread, low, high)
        signal(done, high - low)
    wait(done, args.rows)


@inlined
def _run_stages(args, totals, first, thread):
    """Take part in all stages from the first one on."""
    outputs = args.rows if args.all_logits else args.sequences
    for index in range(first, args.stage_count):
        stage = offset(args.stages, index)
        rows = outputs if stage.outputs_only else args.rows
        units = rows
        if stage.kind == MULTIPLY:
            units = stage.panels * ((rows + ROWS_PER_TASK - 1) // ROWS_PER_TASK)
        units_per_task = max(1, units // (args.threads * TASKS_PER_THREAD))
        tasks = (units + units_per_task - 1) // units_per_task
        taken = offset(args.counters, index * 3 * LINE)
        done, turns = offset(taken, LINE), offset(taken, 2 * LINE)
        # Every second thread takes the last panels first: call after call a core finds its own in its cache.
        from_end = stage.kind == MULTIPLY and thread % 2 == 1
        step = FROM_END if from_end else 1
        claims = fetch_add(taken, step)
        while claims % FROM_END + claims // FROM_END < tasks:
            task = tasks - 1 - claims // FROM_END if from_end else claims % FROM_END
            low = task * units_per_task
            high = min(low + units_per_task, units)
            if stage.kind == MULTIPLY:
                _multiply_units(args, stage, rows, totals, low, high)
            else:
                _take_rows(args, stage, turns, 0, low, high)
            signal(done, 1)
            claims = fetch_add(taken, step)
        wait(done, tasks)


def run(args):
    """Take part in running the rows through all stages: states are changed in place, logits are written."""
    totals = stack_array(args.stages.matrix, TILE_SUMS)
    for row in range(args.rows):
        if args.ids[row] < 0 or args.ids[row] >= args.num_tokens:
            args.refused = 1
            return
    thread = fetch_add(offset(args.counters, (args.stage_count * 3 + 2) * LINE), 1)
    begin_tiles(args.stages.matrix)
    if args.share_rows:
        _run_shares(args, totals, thread)
    _run_stages(args, totals, args.share_stages, thread)
    end_tiles(args.stages.matrix)
