"""What the processor can do that kernels are compiled for."""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from typing import Any

import numba
from llvmlite import binding

# arch_prctl(2): the system call, its request, and the tile registers' number.
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18
# Numba does not annotate it.
_CONFIG: Any = numba.config


@cache
def has(feature: str) -> bool:
    """Whether numba compiles for a processor with a feature, by LLVM's name for it.

    That is this processor, unless `NUMBA_CPU_NAME` or `NUMBA_CPU_FEATURES` name another.
    """
    if _CONFIG.CPU_NAME is None and _CONFIG.CPU_FEATURES is None:
        return bool(binding.get_host_cpu_features().get(feature, False))
    return f"+{feature}" in (_CONFIG.CPU_FEATURES or "").split(",")


@cache
def request_tiles() -> bool:
    """Ask the system to let this process use the tile registers of Intel's AMX; whether it may."""
    if not has("amx-bf16") or platform.system() != "Linux":
        return False
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0
