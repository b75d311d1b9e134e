"""Memory on CPU: new tensors in huge pages, freed memory kept by the process.

Writing a large new tensor takes less time than the system needs to hand out its memory, in pages of 4 KB with
a page fault and a clearing each. Linux hands out 2 MB at a time when asked to, if
`/sys/kernel/mm/transparent_hugepage/enabled` says `madvise` or `always`: a copy of 134 MB into new memory
then takes 13 ms instead of 33.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Named wherever memory is allocated for native code, for PyTorch's default device may be another.
CPU = torch.device("cpu")
HUGE_PAGE = 1 << 21
MADV_HUGEPAGE = 14
# mallopt(3)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
# Blocks that `return_large_blocks` gives back.
LARGE_BLOCK = 1 << 20


def empty_hugepages(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """`torch.empty`, of any shape, in huge pages, if the system has them and the tensor spans any.

    >>> empty_hugepages(torch.Size([2, 3]), torch.float32).shape
    torch.Size([2, 3])
    """
    tensor = torch.empty(shape, dtype=dtype, device=CPU)
    if tensor.nbytes < HUGE_PAGE:
        return tensor
    start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    length = (tensor.data_ptr() + tensor.nbytes - start) // HUGE_PAGE * HUGE_PAGE
    if length > 0 and (madvise := _madvise()) is not None:
        # The result is unused: if it fails, memory comes in small pages.
        madvise(start, length, MADV_HUGEPAGE)
    return tensor


def keep_memory() -> None:
    """Let the C library keep freed memory, which the next training step allocates again.

    Otherwise the system takes it back and clears every page again: a tenth of the time of a small model.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def return_large_blocks() -> None:
    """Give every freed block of a megabyte or more back to the system at once.

    Otherwise the C library keeps blocks of up to 32 MB on its heap, in pieces that the next tensor may not
    fit in: 0.1 GiB of a step on 16,384 tokens.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def share_heaps() -> None:
    """Let all threads allocate from two heaps, so that one can use what another freed.

    Otherwise each thread gets a heap of its own, and a server keeps in each what its largest work left there.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


def release_memory() -> None:
    """Give freed memory back to the system.

    Otherwise the C library keeps what lies before memory in use, malloc_trim(3).
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@cache
def _madvise() -> Any:
    if sys.platform != "linux":
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise
