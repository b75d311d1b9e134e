"""Dropout on CPU, in one pass over memory, by random numbers that are computed where they are used.

The numbers are those of Threefry-2x32 with 13 rounds, a generator without state: a key and a counter give two
words. (J. Salmon, M. Moraes, R. Dror, D. Shaw: Parallel random numbers: as easy as 1, 2, 3,
https://doi.org/10.1145/2063384.2063405.) So all threads draw at once, and the backward pass draws the same
numbers again in place of reading a mask.

Of each 32 values, the first 16 have the first words of 16 counters and the last 16 their second words.
"""

# Numba finds the types of kernels when it compiles them.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

from torch import Tensor

from mhesa.ops.cpu.arguments import STORED, struct
from mhesa.ops.cpu.atomics import fence, fetch_add
from mhesa.ops.cpu.compiling import compiled, intrinsic, literals, member, types
from mhesa.ops.cpu.memory import empty_hugepages
from mhesa.ops.cpu.sequences import MIN_PARALLEL, NONTEMPORAL_BYTES
from mhesa.ops.cpu.simd import FLOAT, I32, I64, Emitter, specialized, splat
from mhesa.ops.cpu.threads import available, parallel

Arguments = struct(
    "Arguments",
    next_task="int64",
    count="int64",
    nontemporal="int64",
    key="int64",
    threshold="int64",
    scale="float64",
    x=STORED,
    out=STORED,
)
# Values of a task, and of a vector; processors with shorter vectors take several instructions.
TASK_SIZE, LANES = 1 << 13, 16

ROUNDS = 13
ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
PARITY = 0x1BD11BDA


def dropout(x: Tensor, probability: float, key: int) -> Tensor:
    """`x`, each value set to zero with a probability; the others are divided by one minus it.

    Args:
        x: tensor of any shape, in fp32, bf16 or fp16.
        probability: probability of a zero, above 0 and below 1.
        key: the generator's key, of 63 bits. The same key drops the same values.
    """
    x = x.contiguous()
    out = empty_hugepages(x.shape, x.dtype)
    args = Arguments(
        count=x.numel(),
        nontemporal=2 * x.nbytes > NONTEMPORAL_BYTES,
        key=key,
        threshold=min(round(probability * 2**32), 2**32 - 1),
        scale=1 / (1 - probability),
        x=x.data_ptr(),
        out=out.data_ptr(),
    )
    threads = 1 if x.numel() < MIN_PARALLEL else available()
    parallel(compiled(_kernel, x.dtype, Arguments), args.address, threads)
    return out


def _threefry(emit: Emitter, key: Any, counter: Any) -> list[Any]:
    """The generator's two words for each lane, as 32-bit integers.

    Args:
        emit: writes the instructions.
        key: the 64-bit key.
        counter: the 64-bit counter of the first lane, a multiple of the lanes; the others count on from it.
    """
    builder = emit.builder
    low, high = _halves(emit, key)
    keys = [low, high, builder.xor(builder.xor(low, high), emit.constant(I32, PARITY))]
    words = _halves(emit, counter)
    if emit.lanes > 1:
        words[0] = builder.add(words[0], emit.vector(I32)(list(range(emit.lanes))))
    for step in range(ROUNDS):
        if step % 4 == 0:
            turn = step // 4
            words = [builder.add(word, keys[(turn + i) % 3]) for i, word in enumerate(words)]
            words[1] = builder.add(words[1], emit.constant(I32, turn))
        words[0] = builder.add(words[0], words[1])
        words[1] = builder.xor(_rotated(emit, words[1], ROTATIONS[step % len(ROTATIONS)]), words[0])
    return words


def _halves(emit: Emitter, value: Any) -> list[Any]:
    """The low and the high half of a 64-bit integer, in every lane."""
    builder = emit.builder
    return [splat(emit, builder.trunc(half, I32)) for half in (value, builder.lshr(value, I64(32)))]


def _rotated(emit: Emitter, word: Any, bits: int) -> Any:
    builder = emit.builder
    left = builder.shl(word, emit.constant(I32, bits))
    return builder.or_(left, builder.lshr(word, emit.constant(I32, 32 - bits)))


@intrinsic
def _write_at(context, x, out, index, key, threshold, scale, nontemporal, lanes):
    """Write 32 values from `index` on, a multiple of 32; one value at any index if `lanes` is 1."""
    if not literals(lanes):
        return None

    def codegen(context, builder, signature, args):
        x_0, out_0, index, key, threshold, scale, nontemporal, _ = args
        emit = Emitter(builder, x.dtype, lanes.literal_value)
        threshold, scale = (splat(emit, value) for value in (threshold, scale))
        # The counter of the first of its 32 values.
        block = builder.mul(builder.udiv(index, I64(2 * LANES)), I64(LANES))

        def write(index: Any, word: Any, nontemporal: bool) -> None:
            kept = builder.icmp_unsigned(">=", word, threshold)
            # A product, as torch's: NaN stays.
            factor = builder.select(kept, scale, emit.constant(FLOAT, 0.0))
            value = builder.fmul(emit.widen(emit.load(x_0, index)), factor)
            emit.store(emit.narrow(value), out_0, index, nontemporal)

        def write_block(nontemporal: bool) -> None:
            for i, word in enumerate(_threefry(emit, key, block)):
                write(builder.add(index, I64(i * LANES)), word, nontemporal)

        if lanes.literal_value > 1:
            specialized(builder, write_block, nontemporal)
            return context.get_dummy_value()
        first, second = _threefry(emit, key, builder.add(block, builder.and_(index, I64(LANES - 1))))
        half = builder.and_(index, I64(LANES))
        write(index, builder.select(builder.icmp_unsigned("==", half, I64(0)), first, second), False)
        return context.get_dummy_value()

    numbers = (types.int64, types.int64, types.uint32, types.float32, types.boolean)
    return types.void(x, out, *numbers, lanes), codegen


def _kernel(args: Any) -> None:
    x, out, key, nontemporal = args.x, args.out, args.key, args.nontemporal != 0
    threshold, scale = args.threshold, args.scale
    while True:
        i = fetch_add(member(args, "next_task"), 1) * TASK_SIZE
        if i >= args.count:
            break
        end = min(i + TASK_SIZE, args.count)
        while i + 2 * LANES <= end:
            _write_at(x, out, i, key, threshold, scale, nontemporal, LANES)
            i += 2 * LANES
        while i < end:
            _write_at(x, out, i, key, threshold, scale, False, 1)
            i += 1
    fence()
