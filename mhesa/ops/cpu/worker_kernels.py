"""How threads of our own share a native call; `mhesa.ops.cpu.workers` starts them."""

# Numba finds the types of these functions when it compiles them.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from llvmlite import ir

from mhesa.ops.cpu.arguments import INT64, struct
from mhesa.ops.cpu.atomics import SPINS, clock, fence, fetch_add, load, pause, signal, wait, yield_core
from mhesa.ops.cpu.compiling import intrinsic, types
from mhesa.ops.cpu.simd import I32, call

# Nanoseconds without a call after which a worker sleeps: more than Python needs between two steps.
IDLE = 1_000_000
# `function` and `data` are addresses. `calls` counts beginnings and ends of calls: it is odd during a call.
# `seats` counts the workers that may still take part. `inside` is minus the number of workers that look at a
# call or work on it. `sleepers` counts those that wait for the semaphore `bell`.
Arguments = struct(
    "Arguments",
    function="int64",
    data="int64",
    workers="int64",
    calls=INT64,
    seats=INT64,
    inside=INT64,
    sleepers=INT64,
    bell=INT64,
)


@intrinsic
def _call(context, function, data):
    """Call a native function of one pointer."""

    def codegen(context, builder, signature, args):
        pointer = ir.IntType(8).as_pointer()
        function = ir.FunctionType(ir.VoidType(), [pointer]).as_pointer()
        builder.call(builder.inttoptr(args[0], function), [builder.inttoptr(args[1], pointer)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _semaphore_function(name):
    """An intrinsic that calls a function of C for a semaphore, `sem_wait` or `sem_post`."""

    @intrinsic
    def function(context, semaphore):
        def codegen(context, builder, signature, args):
            call(builder, name, I32, *args)
            return context.get_dummy_value()

        return types.void(semaphore), codegen

    return function


_sleep, _wake_one = _semaphore_function("sem_wait"), _semaphore_function("sem_post")


def lead(args):
    """Call the function, and return when all workers that take part have returned, too."""
    args.seats[0] = args.workers
    signal(args.calls, 1)
    # A worker that is not counted as asleep yet sees the call before it sleeps.
    fence()
    sleepers = min(load(args.sleepers), args.workers)
    fetch_add(args.sleepers, -sleepers)
    for _ in range(sleepers):
        _wake_one(args.bell)
    _call(args.function, args.data)
    signal(args.calls, 1)
    # A worker that is not inside yet sees that the call is over.
    fence()
    wait(args.inside, 0)


def work(args):
    """Take part in calls, for ever."""
    seen, spins, start = 0, 0, clock()
    while True:
        number = load(args.calls)
        if number % 2 == 1 and number != seen:
            seen = number
            fetch_add(args.inside, -1)
            fence()
            if load(args.calls) == number and fetch_add(args.seats, -1) > 0:
                _call(args.function, args.data)
                start = clock()
            signal(args.inside, 1)
        pause()
        spins += 1
        if spins % SPINS == 0:
            yield_core()
            if clock() - start > IDLE:
                fetch_add(args.sleepers, 1)
                fence()
                number = load(args.calls)
                if number % 2 == 0 or number == seen:
                    _sleep(args.bell)
                start = clock()
