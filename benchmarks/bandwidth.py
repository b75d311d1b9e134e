"""How fast this machine reads memory: the bound of a step that reads every weight once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mhesa.ops.cpu.memory import empty_hugepages
from mhesa.ops.cpu.simd import compiled, fields, floats, jit, offset, take
from mhesa.ops.cpu.threads import available, parallel

TASK, COUNT, MEMORY, OUT, FIELDS = range(5)
# Numbers that a task reads.
TASK_SIZE = 1 << 16


@jit(fastmath=True)
def _sum(numbers, count):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(count):
        total += numbers[i]
    return total


def _read(data):  # type: ignore[no-untyped-def]
    p = fields(data)
    while True:
        start = take(p) * TASK_SIZE
        if start >= p[COUNT]:
            return
        floats(p[OUT])[0] = _sum(offset(floats(p[MEMORY]), start), min(TASK_SIZE, p[COUNT] - start))


def readers(size: int) -> dict[str, Callable[[], object]]:
    """Two ways to read `size` bytes once on all of torch's threads; the faster one is the bound.

    Neither is the faster on every processor.

    Returns:
        `native`: a compiled loop on the threads that the decoder uses; `torch`: torch's sum.
    """
    memory = empty_hugepages(torch.Size([size // 4]), torch.float32).fill_(1)
    return {"native": _native_reader(memory), "torch": memory.sum}


def _native_reader(memory: Tensor) -> Callable[[], object]:
    out, table = np.zeros(1, dtype=np.float32), np.zeros(FIELDS, dtype=np.int64)

    def read() -> None:
        table[:] = 0, len(memory), memory.data_ptr(), out.ctypes.data
        parallel(compiled(_read, torch.float32), table.ctypes.data, available())

    return read
