"""How fast this machine reads memory, which is how fast a step can be at best."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from mhesa.ops.cpu.arguments import FLOAT32, struct
from mhesa.ops.cpu.atomics import fetch_add
from mhesa.ops.cpu.compiling import compiled, jit, member, offset
from mhesa.ops.cpu.memory import empty_hugepages
from mhesa.ops.cpu.threads import available, parallel

Arguments = struct("Arguments", next_task="int64", count="int64", numbers=FLOAT32, out=FLOAT32)
# Numbers that a task reads.
STRETCH = 1 << 16


@jit(fastmath=True)
def _sum(numbers, count):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(count):
        total += numbers[i]
    return total


def _read(args):  # type: ignore[no-untyped-def]
    while True:
        start = fetch_add(member(args, "next_task")) * STRETCH
        if start >= args.count:
            return
        args.out[0] = _sum(offset(args.numbers, start), min(STRETCH, args.count - start))


def reader(size: int) -> Callable[[], object]:
    """A function that reads `size` bytes of its own, once, on all of torch's threads."""
    memory = empty_hugepages(torch.Size([size // 4]), torch.float32).fill_(1)
    out = np.zeros(1, dtype=np.float32)
    args = Arguments(count=len(memory), numbers=memory.data_ptr(), out=out.ctypes.data)

    def read() -> float:
        args.next_task = 0
        parallel(compiled(_read, torch.float32, Arguments), args.address, available())
        return float(out[0])

    return read
