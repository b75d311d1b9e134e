"""Threads of our own, for native calls of microseconds that follow one another, as steps of decoding do.

OpenMP's threads end a call together. Where another program has a core, a call thus waits until the thread
that lost it is back: 20 ms, which is a hundred steps. Workers take part if they are there: a call ends as
soon as its work is done and nobody works on it any more.

After a call, workers look for the next one for a millisecond, then they sleep. They never need Python's lock,
so they are back within microseconds. Calls between which torch's operators use all cores are better off with
`mhesa.ops.cpu.threads.parallel`, on the threads of those.
"""

from __future__ import annotations

import ctypes
import sys
import threading

import numpy as np
import torch

from mhesa.ops.cpu.arguments import Struct
from mhesa.ops.cpu.threads import native_function, new_lock, parallel


def parallel_short(function: int, data: int, threads: int) -> None:
    """Call a native function on up to `threads` threads at once, and wait for those that take part.

    A call that another thread makes meanwhile runs on that thread alone.

    Args:
        function, data: as `mhesa.ops.cpu.threads.parallel` takes them.
        threads: the largest number of threads, with this one.
    """
    if sys.platform != "linux":
        # macOS and Windows have no sem_init.
        parallel(function, data, threads)
    elif threads == 1 or not WORKERS.run(function, data, threads - 1):
        native_function(function)(data)


class Workers:
    """The threads, which are started when they are first needed, and what they share."""

    def __init__(self) -> None:
        self._lock, self._threads = new_lock(), 0
        self._args: Struct | None = None

    def run(self, function: int, data: int, workers: int) -> bool:
        """Call the function here and on up to so many workers; `False` if they are taken."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            args = self._args = self._args or self._prepare()
            self._start(workers)
            args.function, args.data, args.workers = function, data, workers
            self._lead(args.address)
        finally:
            self._lock.release()
        return True

    def _prepare(self) -> Struct:
        # Numba is imported only when a kernel is needed.
        from mhesa.ops.cpu import worker_kernels
        from mhesa.ops.cpu.atomics import LINE
        from mhesa.ops.cpu.compiling import compiled

        names = ("calls", "seats", "inside", "sleepers", "bell")
        self._counters = np.zeros((len(names), LINE), dtype=np.int64)
        pointers = {name: row.ctypes.data for name, row in zip(names, self._counters, strict=True)}
        ctypes.CDLL(None).sem_init(ctypes.c_void_p(pointers["bell"]), 0, 0)
        self._lead, self._work = (
            native_function(compiled(kernel, torch.float32, worker_kernels.Arguments))
            for kernel in (worker_kernels.lead, worker_kernels.work)
        )
        return worker_kernels.Arguments(**pointers)

    def _start(self, workers: int) -> None:
        while self._threads < workers:
            try:
                threading.Thread(target=self._live, daemon=True).start()
            except RuntimeError:  # the system allows no more threads: those that are there do the work
                return
            self._threads += 1

    def _live(self) -> None:
        # As long as this frame exists, so does the memory that the thread reads, at the end of a program too.
        assert self._args is not None
        self._work(self._args.address)


WORKERS = Workers()
