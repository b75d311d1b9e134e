"""How fast this machine reads memory, which is how fast a step can be at best."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from mhesa.ops.cpu.memory import empty_hugepages
from mhesa.ops.cpu.simd import compiled, fields, floats, jit, offset, take
from mhesa.ops.cpu.threads import available, parallel

TASK, NUMBERS, MEMORY, OUT, FIELDS = range(5)
# Numbers that a task reads.
STRETCH = 1 << 16


@jit(fastmath=True)
def _sum(numbers, count):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(count):
        total += numbers[i]
    return total


def _read(data):  # type: ignore[no-untyped-def]
    p = fields(data)
    while True:
        start = take(p) * STRETCH
        if start >= p[NUMBERS]:
            return
        floats(p[OUT])[0] = _sum(offset(floats(p[MEMORY]), start), min(STRETCH, p[NUMBERS] - start))


def reader(size: int) -> Callable[[], object]:
    """A function that reads `size` bytes of its own, once, on all of torch's threads."""
    memory = empty_hugepages(torch.Size([size // 4]), torch.float32).fill_(1)
    out, table = np.zeros(1, dtype=np.float32), np.zeros(FIELDS, dtype=np.int64)

    def read() -> float:
        table[:] = 0, len(memory), memory.data_ptr(), out.ctypes.data
        parallel(compiled(_read, torch.float32), table.ctypes.data, available())
        return float(out[0])

    return read
