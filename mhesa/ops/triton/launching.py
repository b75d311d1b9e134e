"""What both scans on a GPU need to launch their kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
AHEAD = 16
"""Tiles whose end states the chain kernel loads at once."""


def check_dtype(dtype: torch.dtype) -> None:
    """Raise `ValueError` unless kernels exist for values of `dtype`."""
    if dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ValueError(f"backend 'triton' takes {names}, not {str(dtype).removeprefix('torch.')}")


@lru_cache
def processors(device: torch.device) -> int:
    """The number of multiprocessors, each of which runs several programs at a time."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 1


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` current: Triton launches on the current device, whatever the tensors are on."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return torch.xpu.device(device) if device.type == "xpu" else nullcontext()


def strided(x: Tensor) -> Tensor:
    """`x`, copied unless the channels of each step are contiguous."""
    _, _, heads, head_dim = x.shape
    dense = (head_dim == 1 or x.stride(3) == 1) and (heads == 1 or x.stride(2) == head_dim)
    return x if dense else x.contiguous()


def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor, copied unless it is contiguous."""
    return None if tensor is None else tensor.contiguous()


def sequence_of(cu_seqlens: Tensor | None, x: Tensor) -> Tensor | None:
    """The packed sequence of each row, `(length,)`, computed on the device without synchronising."""
    if cu_seqlens is None:
        return None
    offsets = cu_seqlens.to(x.device)
    rows = torch.arange(x.shape[1], device=x.device, dtype=offsets.dtype)
    found = torch.searchsorted(offsets[1:].contiguous(), rows, right=True, out_int32=True)
    # Offsets on an accelerator are not checked; clamp, so that no kernel can write out of bounds.
    return found.clamp_(max=offsets.numel() - 2)
