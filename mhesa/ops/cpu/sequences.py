"""What both scans on CPU know of their inputs: where sequences lie, and which layouts kernels read."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# A block of channels has at least this many: shorter pieces of rows are read slowly.
MIN_BLOCK = 32
# Below this many elements, use one thread: waking a second takes longer than the scan.
MIN_PARALLEL = 1 << 14
# Above this many bytes read and written, use non-temporal stores: lines that are about to be overwritten are
# not read first. Operators that read the result next were never slower for it.
NONTEMPORAL_BYTES = 1 << 23
# Threads that one relay keeps busy: the state, which one thread has at a time, is a third of the work.
RELAY_THREADS = 3

Integers = npt.NDArray[np.int64]


class Sequences:
    """Where each sequence lies: its index in the batch, its first row, and the row after its last."""

    def __init__(self, batch: Integers, begin: Integers, end: Integers) -> None:
        self.batch, self.begin, self.end = batch, begin, end
        self._cuts: dict[tuple[Any, ...], Any] = {}

    def cut(self, into: Callable[..., Any], *how: object) -> Any:
        """What `into(self, *how)` returns, computed once."""
        if (into, how) not in self._cuts:
            self._cuts[into, how] = into(self, *how)
        return self._cuts[into, how]


def find_sequences(batch: int, length: int, cu_seqlens: Tensor | None) -> Sequences:
    """The sequences of a batch, or those packed into its one row at the offsets `cu_seqlens`."""
    if cu_seqlens is None:
        return _dense(batch, length)
    return _packed(cu_seqlens.to(torch.int64).numpy().tobytes(), length)


@lru_cache(maxsize=64)
def _dense(batch: int, length: int) -> Sequences:
    sequences = np.arange(batch)
    return Sequences(sequences, np.zeros_like(sequences), np.full_like(sequences, length))


# All layers of a model are given the same offsets, forward and backward.
@lru_cache(maxsize=1)
def _packed(cu_seqlens: bytes, length: int) -> Sequences:
    """Sequences by their offsets, which address memory and which compiled graphs have not checked."""
    offsets = np.frombuffer(cu_seqlens, dtype=np.int64)
    if offsets[0] != 0 or offsets[-1] != length or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"cu_seqlens must rise from 0 to the length {length}, not {offsets.tolist()}")
    return Sequences(np.zeros(len(offsets) - 1, dtype=np.int64), offsets[:-1], offsets[1:])


def count_pieces(counts: Integers) -> tuple[Integers, Integers]:
    """For `counts` pieces of each sequence, in order: whose piece it is, and its index within that."""
    sequence = np.repeat(np.arange(len(counts)), counts)
    return sequence, np.arange(len(sequence)) - np.repeat(counts.cumsum() - counts, counts)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise `ValueError` unless kernels exist for values of `dtype`."""
    if dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ValueError(f"backend 'numba' takes {names}, not {str(dtype).removeprefix('torch.')}")


def readable(tensor: Tensor, *, min_head_dim: float) -> Tensor:
    """A `(batch, length, heads, head_dim)` tensor whose heads are contiguous: itself or a copy.

    Broadcast dimensions stay so. Heads of fewer than `min_head_dim` channels must also lie one after another.
    """
    heads, head_dim = tensor.shape[2:]
    by_batch, by_row, by_head, by_channel = tensor.stride()
    contiguous_heads = heads == 1 or by_head == head_dim
    if tensor.numel() == 0:
        return tensor
    if (head_dim == 1 or by_channel == 1) and (contiguous_heads or head_dim >= min_head_dim):
        return tensor
    # The gradient of a sum is one number, broadcast.
    narrow = tensor[: 1 if by_batch == 0 else None, : 1 if by_row == 0 else None]
    return narrow.contiguous().expand(tensor.shape)
