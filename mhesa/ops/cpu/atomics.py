"""How the threads of a kernel share work: counters that all of them read and write."""

# Numba finds the types of these functions when it compiles them.
# mypy: allow-untyped-defs, allow-untyped-decorators

from __future__ import annotations

import os

from llvmlite import ir

from mhesa.ops.cpu.compiling import cgutils, intrinsic, jit, types

# Reads of a counter before a waiting thread lets another have its core.
SPINS = 4096
# A counter has a cache line, eight int64, to itself.
LINE = 8


@intrinsic
def fetch_add(context, counter):
    """Add one to a counter of all threads and return what it held before."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", args[0], ir.IntType(64)(1), "monotonic")

    return types.int64(counter), codegen


@intrinsic
def fence(context):
    """Make everything stored visible to other threads, non-temporal stores too."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def signal(context, counter):
    """Add one to a counter; whoever waits for it then sees all that this thread has written."""

    def codegen(context, builder, signature, args):
        builder.atomic_rmw("add", args[0], ir.IntType(64)(1), "release")
        return context.get_dummy_value()

    return types.void(counter), codegen


@jit
def wait(counter, target):
    """Wait until a counter has reached `target`."""
    spins = 0
    while _load(counter) < target:
        spins += 1
        if spins % SPINS == 0:
            _yield_core()


@intrinsic
def _load(context, counter):
    """The value of a counter."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(args[0], "acquire", 8)

    return types.int64(counter), codegen


@intrinsic
def _yield_core(context):
    """Let another thread run on this core: the one that is waited for may need it."""
    name = "sched_yield" if os.name == "posix" else "SwitchToThread"

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
        return context.get_dummy_value()

    return types.void(), codegen
