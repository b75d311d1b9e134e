"""How fast this machine reads memory: the bound of a step that reads every weight once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mhesa.ops.cpu.arguments import FLOAT32, struct
from mhesa.ops.cpu.atomics import fetch_add
from mhesa.ops.cpu.compiling import compiled, jit, member, offset
from mhesa.ops.cpu.memory import empty_hugepages
from mhesa.ops.cpu.threads import available, parallel

Arguments = struct("Arguments", next_task="int64", count="int64", numbers=FLOAT32, out=FLOAT32)
# Numbers that a task reads.
TASK_SIZE = 1 << 16


@jit(fastmath=True)
def _sum(numbers, count):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(count):
        total += numbers[i]
    return total


def _read(args):  # type: ignore[no-untyped-def]
    while True:
        task = fetch_add(member(args, "next_task"), 1)
        start = task * TASK_SIZE
        if start >= args.count:
            return
        args.out[task] = _sum(offset(args.numbers, start), min(TASK_SIZE, args.count - start))


def readers(size: int) -> dict[str, Callable[[], np.ndarray]]:
    """Two ways to read `size` bytes once on all of torch's threads; the faster one is the bound.

    Neither is the faster on every processor.

    Returns:
        `native`: a compiled loop on the threads that the decoder uses; `torch`: torch's sum. Both return sums
        of what they read; the total is `size // 4`.
    """
    memory = empty_hugepages(torch.Size([size // 4]), torch.float32).fill_(1)
    return {"native": _native_reader(memory), "torch": lambda: memory.sum().numpy()}


def _native_reader(memory: Tensor) -> Callable[[], np.ndarray]:
    out = np.zeros(-(-len(memory) // TASK_SIZE), dtype=np.float32)
    args = Arguments(count=len(memory), numbers=memory.data_ptr(), out=out.ctypes.data)

    def read() -> np.ndarray:
        args.next_task = 0
        parallel(compiled(_read, torch.float32, Arguments), args.address, available())
        return out

    return read
