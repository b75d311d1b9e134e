"""Native functions on the OpenMP threads that torch's own operators use.

They are for training, where calls alternate with torch's operators: between two of those its threads spin on
their cores, so others would compete with them. (Decoding has threads of its own, `mhesa.ops.cpu.workers`.)

Numba's own threading layers fail: OpenMP crashes in a forked process, workqueue crashes when two Python
threads enter it, tbb is a further package. If torch's OpenMP library lacks `GOMP_parallel`, Python threads do
the work. A forked process has none of its parent's threads and runs the function alone: so it cannot hang.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any
from weakref import WeakSet

import torch

_forked = False
_locks: WeakSet[Any] = WeakSet()


def available() -> int:
    """The number of threads to use: torch's, or one in a forked process."""
    return 1 if _forked else torch.get_num_threads()


def parallel(function: int, data: int, threads: int) -> None:
    """Call a native function on `threads` threads at once, and wait for all of them.

    Args:
        function: the address of a native function of one pointer, which returns nothing.
        data: the pointer, the same for all threads; the function shares the work among them.
        threads: number of threads, with this one.
    """
    if threads == 1:
        native_function(function)(data)
    elif (openmp := _openmp()) is not None:
        openmp(function, data, threads, 0)
    else:
        call = native_function(function)
        others = [_pool().submit(call, data) for _ in range(threads - 1)]
        call(data)
        for other in others:
            other.result()


def new_lock() -> threading.Lock:
    """A lock that is free in a forked process, even if one of its parent's threads held it."""
    lock = threading.Lock()
    _locks.add(lock)
    return lock


@cache
def native_function(function: int) -> Callable[[int], None]:
    """The native function of one pointer at an address."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)


@cache
def _openmp() -> Any:
    """`GOMP_parallel` of the OpenMP library that torch has loaded, if that has it."""
    if os.name != "posix":
        return None
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
    return function


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="mhesa")


def _after_fork() -> None:
    global _forked
    _forked = True
    for lock in _locks:
        if lock.locked():
            lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
