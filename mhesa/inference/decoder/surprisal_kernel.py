"""Surprisal in native code: one pass over a row of logits for the largest, one for the sum of exponentials.

bits = log2(sum over i of 2 ** power[i]) - power[target],  power[i] = (logits[i] - largest) / ln 2
"""

# Numba finds the types of kernels when it compiles them.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mhesa.inference.statistics import check_targets
from mhesa.ops.cpu.arguments import FLOAT32, FLOAT64, INT64, struct
from mhesa.ops.cpu.atomics import fence, fetch_add
from mhesa.ops.cpu.compiling import compiled, intrinsic, jit, literals, member, offset, stack_array, types
from mhesa.ops.cpu.scan_tiles import fill
from mhesa.ops.cpu.simd import FLOAT, I32, I64, Emitter, exp2, shuffle, splat
from mhesa.ops.cpu.threads import available
from mhesa.ops.cpu.workers import parallel_short

Arguments = struct(
    "Arguments",
    next_task="int64",
    rows="int64",
    rows_per_task="int64",
    num_tokens="int64",
    row_stride="int64",
    logits=FLOAT32,
    targets=INT64,
    out=FLOAT64,
)
# Logits that a thread takes at once, in whole rows.
LOGITS_PER_TASK = 1 << 12
# With fewer logits one thread is done before another has woken.
MIN_PARALLEL = 1 << 17
# Logits that are taken together: four vector registers where they hold sixteen each.
LANES = 64
BITS_PER_NAT = 1 / math.log(2)


def surprisal(logits: Tensor, targets: Tensor) -> np.ndarray:
    """Surprisal in bits of the tokens that came, fp64 `(rows,)`.

    It is NaN where a row of logits holds NaN or plus infinity, or minus infinity alone.

    Args:
        logits: fp32 on CPU, `(rows, num_tokens)`.
        targets: the token that came, `(rows,)`.

    Raises:
        InputError: not as many tokens as rows.
        IndexError: a token that there is no logit for.

    >>> surprisal(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([0])).round(6).tolist()
    [2.0]
    """
    rows, num_tokens = logits.shape
    targets = check_targets(targets, rows, num_tokens)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    found = np.empty(rows)
    rows_per_task = max(1, LOGITS_PER_TASK // max(num_tokens, 1))
    args = Arguments(
        rows=rows,
        rows_per_task=rows_per_task,
        num_tokens=num_tokens,
        row_stride=logits.stride(0),
        logits=logits.data_ptr(),
        targets=targets.data_ptr(),
        out=found.ctypes.data,
    )
    threads = 1 if logits.numel() < MIN_PARALLEL else min(available(), -(-rows // rows_per_task))
    parallel_short(compiled(_kernel, torch.float32, Arguments), args.address, threads)
    return found


def _maximum(builder, a, b):
    """Elementwise maximum; `b` where either is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@intrinsic
def _raise_maxima(context, logits, maxima, lanes):
    """Raise each of `lanes` maxima to its logit where that is larger; NaN changes nothing."""
    if not literals(lanes):
        return None

    def codegen(context, builder, signature, args):
        emit, start = Emitter(builder, types.float32, lanes.literal_value), I64(0)
        emit.store(_maximum(builder, *(emit.load(pointer, start) for pointer in args[:2])), args[1], start)
        return context.get_dummy_value()

    return types.void(logits, maxima, lanes), codegen


@intrinsic
def _add_powers(context, logits, largest, sums, lanes):
    """Add the powers of two of `lanes` logits, less the largest in the row, to as many sums."""
    if not literals(lanes):
        return None

    def codegen(context, builder, signature, args):
        emit, start = Emitter(builder, types.float32, lanes.literal_value), I64(0)
        value, before = emit.load(args[0], start), emit.load(args[2], start)
        power = builder.fmul(builder.fsub(value, splat(emit, args[1])), emit.constant(FLOAT, BITS_PER_NAT))
        # `exp2` makes zero of NaN.
        missing = builder.fcmp_unordered("uno", power, power)
        emit.store(builder.fadd(before, builder.select(missing, power, exp2(emit, power))), args[2], start)
        return context.get_dummy_value()

    return types.void(logits, types.float32, sums, lanes), codegen


def _reduction(combine):
    """An intrinsic that combines `LANES` values, half of them with the other half, until one is left."""

    @intrinsic
    def reduce(context, values):
        def codegen(context, builder, signature, args):
            emit, lanes = Emitter(builder, types.float32, LANES), LANES
            value = emit.load(args[0], I64(0))
            while lanes > 1:
                lanes //= 2
                value = combine(
                    builder, *(shuffle(emit, value, [*range(at, at + lanes)]) for at in (0, lanes))
                )
            return builder.extract_element(value, I32(0))

        return types.float32(values), codegen

    return reduce


_largest, _sum = _reduction(_maximum), _reduction(lambda builder, a, b: builder.fadd(a, b))


@jit
def row_bits(logits, n, target, values):
    """The surprisal of one token; `values` is memory for `LANES` values."""
    whole = n - n % LANES
    fill(values, -np.inf, LANES)
    for i in range(0, whole, LANES):
        _raise_maxima(offset(logits, i), values, LANES)
    for i in range(whole, n):
        _raise_maxima(offset(logits, i), values, 1)
    largest = _largest(values)
    fill(values, 0, LANES)
    for i in range(0, whole, LANES):
        _add_powers(offset(logits, i), largest, values, LANES)
    for i in range(whole, n):
        _add_powers(offset(logits, i), largest, values, 1)
    return math.log2(_sum(values)) + (largest - logits[target]) * BITS_PER_NAT


def _kernel(args):
    values = stack_array(args.logits, LANES)
    while True:
        first = fetch_add(member(args, "next_task"), 1) * args.rows_per_task
        if first >= args.rows:
            break
        for row in range(first, min(first + args.rows_per_task, args.rows)):
            logits = offset(args.logits, row * args.row_stride)
            args.out[row] = row_bits(logits, args.num_tokens, args.targets[row], values)
    fence()
