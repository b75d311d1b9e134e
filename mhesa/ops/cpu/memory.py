"""Memory on CPU: what is fresh in large pages, what is freed kept.

Most of the time that a large fresh tensor takes is not writing it: it is the system handing its memory out
in pages of 4 KB, one fault and one clearing each. Linux hands out 2 MB at a time where it is asked to
(`/sys/kernel/mm/transparent_hugepage/enabled` says `madvise` or `always`); a copy of 134 MB into fresh
memory then takes 13 ms instead of 33.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21
MADV_HUGEPAGE = 14
# mallopt(3)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def empty_hugepages(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """`torch.empty`, contiguous, in huge pages where it spans some and the system has them.

    >>> empty_hugepages(torch.Size([2, 3]), torch.float32).shape
    torch.Size([2, 3])
    """
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.nbytes < HUGE_PAGE:
        return tensor
    start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    length = (tensor.data_ptr() + tensor.nbytes - start) // HUGE_PAGE * HUGE_PAGE
    if length > 0 and (madvise := _madvise()) is not None:
        # Advice that the system cannot take changes nothing but the speed.
        madvise(start, length, MADV_HUGEPAGE)
    return tensor


def keep_memory() -> None:
    """Let the C library keep what is freed: a training step on a CPU asks for the same again a moment later.

    Given back, it comes again page by page, each filled with zeros first: a tenth of a small model's time.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


@cache
def _madvise() -> Any:
    if sys.platform != "linux":
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise
