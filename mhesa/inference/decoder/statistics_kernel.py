"""Statistics of predictions in native code: one pass over a row of logits for the largest, one for the sums.

exponent[i] = (logits[i] - largest) / ln 2,  sum = sum over i of 2 ** exponent[i]
bits        = log2(sum) - exponent[target]
entropy     = log2(sum) - (sum over i of 2 ** exponent[i] * exponent[i]) / sum
rank        = 1 + how many logits are larger than that of the target
"""

# Numba finds the types of kernels when it compiles them.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mhesa.ops.checks import check_targets
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
    bits_only="int64",
    logits=FLOAT32,
    targets=INT64,
    bits=FLOAT64,
    entropy=FLOAT64,
    rank=FLOAT64,
)
# Logits that a thread takes at once, in whole rows.
LOGITS_PER_TASK = 1 << 12
# With fewer logits one thread is done before another has woken.
MIN_PARALLEL = 1 << 17
# Logits that are taken together: four vector registers where they hold sixteen each.
LANES = 64
# Partial sums of a row: one of the powers of two for each lane, then one of the powers times their exponents.
SUMS = 2 * LANES
# No power of two times minus infinity.
SMALLEST_EXPONENT = -1e4
BITS_PER_NAT = 1 / math.log(2)


def measure(logits: Tensor, targets: Tensor, *, bits_only: bool = False) -> np.ndarray:
    """Surprisal, entropy and rank of the tokens that came, fp64 `(3, rows)`, or surprisal alone `(1, rows)`.

    They are those of `mhesa.inference.statistics`. Bits and entropy are NaN where a row of logits holds NaN
    or plus infinity, or minus infinity alone.

    Args:
        logits: fp32 on CPU, `(rows, num_tokens)`.
        targets: the token that came, `(rows,)`.
        bits_only: leave out entropy and rank.

    Raises:
        InputError: not as many tokens as rows.
        IndexError: a token that there is no logit for.

    >>> measure(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([0])).round(4).tolist()
    [[2.0], [0.8113], [2.0]]
    """
    rows, num_tokens = logits.shape
    targets = check_targets(targets, rows, num_tokens)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    found = np.empty((1 if bits_only else 3, rows))
    rows_per_task = max(1, LOGITS_PER_TASK // max(num_tokens, 1))
    args = Arguments(
        rows=rows,
        rows_per_task=rows_per_task,
        num_tokens=num_tokens,
        row_stride=logits.stride(0),
        bits_only=bits_only,
        logits=logits.data_ptr(),
        targets=targets.data_ptr(),
        **{name: row.ctypes.data for name, row in zip(("bits", "entropy", "rank"), found, strict=False)},
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
def _add_powers(context, logits, largest, sums, lanes, with_entropy):
    """Add the powers of two of `lanes` logits, less the largest in the row, to as many sums.

    For the entropy, add them times their exponents to those that lie `LANES` further.
    """
    if not literals(lanes, with_entropy):
        return None

    def codegen(context, builder, signature, args):
        emit, start = Emitter(builder, types.float32, lanes.literal_value), I64(0)
        exponent = builder.fsub(emit.load(args[0], start), splat(emit, args[1]))
        exponent = builder.fmul(exponent, emit.constant(FLOAT, BITS_PER_NAT))
        # `exp2` makes zero of NaN.
        missing = builder.fcmp_unordered("uno", exponent, exponent)
        power = builder.select(missing, exponent, exp2(emit, exponent))
        emit.store(builder.fadd(emit.load(args[2], start), power), args[2], start)
        if with_entropy.literal_value:
            exponent = _maximum(builder, emit.constant(FLOAT, SMALLEST_EXPONENT), exponent)
            product, place = builder.fmul(power, exponent), I64(LANES)
            emit.store(builder.fadd(emit.load(args[2], place), product), args[2], place)
        return context.get_dummy_value()

    return types.void(logits, types.float32, sums, lanes, with_entropy), codegen


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
def _row_maximum(logits, n, values):
    """The largest logit of a row; `values` is memory for `LANES` values."""
    fill(values, -np.inf, LANES)
    whole = n - n % LANES
    for i in range(0, whole, LANES):
        _raise_maxima(offset(logits, i), values, LANES)
    for i in range(whole, n):
        _raise_maxima(offset(logits, i), values, 1)
    return _largest(values)


@jit
def row_bits(logits, n, target, sums):
    """The surprisal of one token; `sums` is memory for `SUMS` values."""
    largest, whole = _row_maximum(logits, n, sums), n - n % LANES
    fill(sums, 0, LANES)
    for i in range(0, whole, LANES):
        _add_powers(offset(logits, i), largest, sums, LANES, False)
    for i in range(whole, n):
        _add_powers(offset(logits, i), largest, sums, 1, False)
    return math.log2(_sum(sums)) + (largest - logits[target]) * BITS_PER_NAT


@jit
def _measure_row(args, logits, row, sums):
    """Write the surprisal, entropy and rank of one token; `sums` is memory for `SUMS` values."""
    n, target = args.num_tokens, logits[args.targets[row]]
    largest, whole, rank = _row_maximum(logits, n, sums), n - n % LANES, 1
    fill(sums, 0, SUMS)
    for i in range(0, whole, LANES):
        _add_powers(offset(logits, i), largest, sums, LANES, True)
    for i in range(whole, n):
        _add_powers(offset(logits, i), largest, sums, 1, True)
    for i in range(n):
        rank += logits[i] > target
    total = _sum(sums)
    args.bits[row] = math.log2(total) + (largest - target) * BITS_PER_NAT
    args.entropy[row] = math.log2(total) - _sum(offset(sums, LANES)) / total
    args.rank[row] = rank


def _kernel(args):
    sums = stack_array(args.logits, SUMS)
    while True:
        first = fetch_add(member(args, "next_task"), 1) * args.rows_per_task
        if first >= args.rows:
            break
        for row in range(first, min(first + args.rows_per_task, args.rows)):
            logits = offset(args.logits, row * args.row_stride)
            if args.bits_only:
                args.bits[row] = row_bits(logits, args.num_tokens, args.targets[row], sums)
            else:
                _measure_row(args, logits, row, sums)
    fence()
