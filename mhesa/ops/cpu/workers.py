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
from functools import cache

import numpy as np
import torch

from mhesa.ops.cpu.threads import native_function, new_lock, parallel


def parallel_short(function: int, data: int, threads: int) -> None:
    """Call a native function on up to `threads` threads at once, and wait for those that take part.

    A call that another thread makes meanwhile runs on that thread alone.

    Args:
        function, data: as `mhesa.ops.cpu.threads.parallel` takes them.
        threads: the largest number of threads, with this one.
    """
    if sys.platform != "linux":
        # Elsewhere a process has no semaphores of its own.
        parallel(function, data, threads)
    elif threads == 1 or not _workers().run(function, data, threads - 1):
        native_function(function)(data)


class _Workers:
    def __init__(self) -> None:
        # Numba is imported only when a kernel is needed.
        from mhesa.ops.cpu import worker_kernels
        from mhesa.ops.cpu.atomics import LINE
        from mhesa.ops.cpu.compiling import compiled

        names = ("calls", "seats", "entered", "left", "sleepers", "bell")
        self._counters = np.zeros((len(names), LINE), dtype=np.int64)
        pointers = {name: row.ctypes.data for name, row in zip(names, self._counters, strict=True)}
        ctypes.CDLL(None).sem_init(ctypes.c_void_p(pointers["bell"]), 0, 0)
        self._args = worker_kernels.Arguments(**pointers)
        self._address = self._args.address
        self._share, self._work = (
            native_function(compiled(kernel, torch.float32, worker_kernels.Arguments))
            for kernel in (worker_kernels.share, worker_kernels.work)
        )
        self._lock, self._threads = new_lock(), 0

    def run(self, function: int, data: int, workers: int) -> bool:
        """Call the function here and on up to so many workers; `False` if they are taken."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            while self._threads < workers:
                threading.Thread(target=self._work, args=(self._address,), daemon=True).start()
                self._threads += 1
            args = self._args
            args.function, args.data, args.workers = function, data, workers
            self._share(self._address)
        finally:
            self._lock.release()
        return True


@cache
def _workers() -> _Workers:
    return _Workers()
