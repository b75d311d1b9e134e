"""What this processor can do: the features that kernels are compiled for."""

from __future__ import annotations

import ctypes
import platform
from functools import cache

from llvmlite import binding

# arch_prctl(2): the system lets a process use tile registers if it asks for them first.
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18


@cache
def has(feature: str) -> bool:
    """Whether the processor has a feature, by LLVM's name for it."""
    return bool(binding.get_host_cpu_features().get(feature, False))


@cache
def has_tiles() -> bool:
    """Whether this process may multiply tiles of bf16 in registers of a kilobyte (Intel's AMX)."""
    if not has("amx-bf16") or platform.system() != "Linux":
        return False
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0
