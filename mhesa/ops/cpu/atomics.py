"""How the threads of a kernel share work: counters that all of them read and write, and a clock."""

# Numba finds the types of these functions when it compiles them.
# mypy: allow-untyped-defs, allow-untyped-decorators

from __future__ import annotations

import os
import platform
import time

from llvmlite import ir

from mhesa.ops.cpu.compiling import cgutils, intrinsic, jit, types
from mhesa.ops.cpu.simd import I32, I64, VOID, call

# Reads of a counter before a waiting thread lets another have its core: a few microseconds.
SPINS = 256
# A counter has a cache line, eight int64, to itself.
LINE = 8


@intrinsic
def fetch_add(context, counter, count):
    """Add to a counter of all threads and return what it held before."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", *args, "monotonic")

    return types.int64(counter, types.int64), codegen


@intrinsic
def fence(context):
    """Make all that was stored visible to other threads, non-temporal stores too, before more is read."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def signal(context, counter, count):
    """Add to a counter; whoever waits for it then sees all that this thread has written."""

    def codegen(context, builder, signature, args):
        builder.atomic_rmw("add", *args, "release")
        return context.get_dummy_value()

    return types.void(counter, types.int64), codegen


@jit
def wait(counter, target):
    """Wait until a counter has reached `target`."""
    spins = 0
    while load(counter) < target:
        pause()
        spins += 1
        if spins % SPINS == 0:
            yield_core()


@intrinsic
def load(context, counter):
    """The value of a counter."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(args[0], "acquire", 8)

    return types.int64(counter), codegen


@intrinsic
def pause(context):
    """Tell the processor that this thread waits, so that the other thread of its core gets more of it."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")

    def codegen(context, builder, signature, args):
        if is_x86:
            call(builder, "llvm.x86.sse2.pause", VOID)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def yield_core(context):
    """Let another thread run on this core: the one that is waited for may need it."""
    name = "sched_yield" if os.name == "posix" else "SwitchToThread"

    def codegen(context, builder, signature, args):
        call(builder, name, I32)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def clock(context):
    """Monotonic clock: nanoseconds, or performance-counter ticks on Windows."""

    def codegen(context, builder, signature, args):
        now = cgutils.alloca_once(builder, ir.ArrayType(I64, 2))
        address = builder.bitcast(now, I64.as_pointer())
        if os.name == "posix":
            call(builder, "clock_gettime", I32, I32(time.CLOCK_MONOTONIC), address)
            seconds, rest = (builder.load(builder.gep(address, [I64(place)])) for place in (0, 1))
            return builder.add(builder.mul(seconds, I64(10**9)), rest)
        call(builder, "QueryPerformanceCounter", I32, address)
        return builder.load(address)

    return types.int64(), codegen
